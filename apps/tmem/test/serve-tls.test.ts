/** `tmem serve` over TLS: certificates made with openssl, a client from elsewhere. */
import { execFileSync } from 'node:child_process'
import { copyFileSync, mkdirSync, renameSync } from 'node:fs'
import { join } from 'node:path'
import { beforeEach, describe, expect, test } from 'vitest'
import { makeCertificates } from '../../../tools/certificates.ts'
import { requires } from '../../../tools/requires.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

/** Fills three directories: the server's, a client's, and a client's whom nobody knows. */
function fillDirectories(folder: string): void {
  makeCertificates(folder, { known: ['server', 'client'], stranger: ['unknown'] })
  for (const [directory, name] of [
    ['server', 'server'],
    ['client', 'client'],
    ['unknown', 'client'],
  ] as const) {
    const own = join(folder, directory)
    mkdirSync(own)
    copyFileSync(join(folder, `${directory}.key`), join(own, `${name}-key.pem`))
    copyFileSync(join(folder, `${directory}.pem`), join(own, `${name}-cert.pem`))
    copyFileSync(join(folder, 'known.pem'), join(own, 'ca-cert.pem'))
  }
}

describe('tmem serve over TLS', () => {
  let folder: string
  const serve = (...words: string[]): string[] => [
    'serve',
    '--stack',
    'memory(limit=8MiB)',
    '--device',
    'name=disk,size=4MiB',
    '--control',
    join(folder, 'control.sock'),
    '--json',
    ...words,
  ]
  beforeEach(() => {
    folder = temporaryDirectory()
  })

  test('lets in who has a certificate, and nobody else', async (ctx) => {
    requires(ctx, { commands: ['openssl', 'nbdinfo'] })
    fillDirectories(folder)
    const sizes = new Map<string, string>()
    const said = new Map<string, string>()
    const options = ['--tls-certificates', join(folder, 'server'), '--tls-verify-peer']
    const { code, stderr } = await tmem(serve('--nbd', 'tcp:127.0.0.1:0', ...options), {
      during: async (running) => {
        const lines: string[] = []
        running.stderr.on('data', (more: string) => lines.push(more))
        const [text] = (await new Promise<string>((resolve) => running.stdout.once('data', resolve))).split('\n')
        const port = /:(\d+)$/.exec(JSON.parse(text!).nbd[0])![1]!
        const size = (uri: string): string => {
          try {
            return execFileSync('nbdinfo', ['--size', uri], {
              encoding: 'utf8',
              stdio: ['ignore', 'pipe', 'pipe'],
            }).trim()
          } catch (error) {
            said.set(sizes.has('unknown') ? 'in the clear' : 'unknown', (error as { stderr: string }).stderr)
            return 'refused'
          }
        }
        for (const who of ['client', 'unknown'])
          sizes.set(who, size(`nbds://localhost:${port}/disk?tls-certificates=${join(folder, who)}`))
        sizes.set('in the clear', size(`nbd://localhost:${port}/disk`))
        // The second one is told of when its connection has ended.
        for (let tries = 0; lines.join('').split('\n').length < 3 && tries < 500; tries++)
          await new Promise((resolve) => setTimeout(resolve, 10))
        running.kill('SIGTERM')
      },
    })
    expect(Object.fromEntries(sizes)).toEqual({ client: '4194304', unknown: 'refused', 'in the clear': 'refused' })
    expect(code).toBe(0)
    // Each of them is told why, and so is whoever runs the server.
    const told = stderr
      .trimEnd()
      .split('\n')
      .map((line): unknown => JSON.parse(line))
    expect(told).toEqual(
      ['it showed no certificate', 'it does not use TLS'].map((reason) =>
        expect.objectContaining({
          level: 'warn',
          event: 'client.refused',
          reason: 'tls',
          msg: expect.stringMatching(new RegExp(`^NBD client on .*:\\d+ refused: ${reason}$`)),
        }),
      ),
    )
    // It shows the words of the answer only where it is asked for more.
    expect(said.get('unknown')).toContain('server policy prevents')
    expect(said.get('in the clear')).toContain('TLS')
  })

  test('says what is wrong with its certificates before it serves', async (ctx) => {
    requires(ctx, { commands: ['openssl'] })
    fillDirectories(folder)
    const tcp = ['--nbd', 'tcp:127.0.0.1:0']
    const unix = ['--nbd', `unix:${folder}/nbd.sock`]
    const certificates = (directory: string): string[] => ['--tls-certificates', join(folder, directory)]
    mkdirSync(join(folder, 'mixed'))
    copyFileSync(join(folder, 'server/server-cert.pem'), join(folder, 'mixed/server-cert.pem'))
    renameSync(join(folder, 'client/client-key.pem'), join(folder, 'mixed/server-key.pem'))
    for (const [words, reason] of [
      [[...tcp, ...certificates('nowhere')], 'server-cert.pem'],
      [[...tcp, ...certificates('mixed')], 'key values mismatch'],
      [[...tcp, '--tls-verify-peer'], 'needs --tls-certificates'],
      [[...unix, ...certificates('server')], 'is for TCP'],
    ] as const) {
      const { code, stdout, stderr } = await tmem(serve(...words))
      expect({ code, stdout }).toEqual({ code: 2, stdout: '' })
      expect(stderr).toContain(reason)
      expect(stderr.trimEnd()).not.toContain('\n')
    }
  })
})
