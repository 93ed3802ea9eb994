/** docs/operating.md: its commands work as they stand, one after the other, and what it says of a kill is so. */
import { once } from 'node:events'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { type AddressInfo, createServer } from 'node:net'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { codeIn, localTo, shellIn } from './operating.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const code = codeIn('sh')
const config = codeIn('yaml').get('Bring it up')!

/** Three ports that nobody has at the moment. */
async function freePorts(): Promise<number[]> {
  const servers = [0, 1, 2].map(() => createServer().listen(0, '127.0.0.1'))
  await Promise.all(servers.map((server) => once(server, 'listening')))
  const ports = servers.map((server) => (server.address() as AddressInfo).port)
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))))
  return ports
}

test('each command of the page is run by a test', () => {
  expect([...code.keys()]).toEqual([
    'Install',
    'Bring it up',
    'As a service', // below
    'Watch it',
    'Caches', // below
    'Change it while it is in use',
    'What survives what',
    'Backups',
    'Stop, upgrade, reboot',
    'Swap on the same host', // system/operating.test.ts
  ])
})

test('installed, brought up, watched, changed, killed, started anew, copied, ended', {
  timeout: 120_000,
}, async (ctx) => {
  requires(ctx, { commands: ['curl', 'nbdcopy'] })
  const folder = temporaryDirectory()
  const local = localTo(folder, await freePorts())
  const file = join(folder, 'etc/tmem.yaml')
  writeFileSync(file, local(config))
  const shell = shellIn(folder)
  onTestFinished(() => shell.end())
  const run = (section: string): Promise<string> => shell.run(local(code.get(section)!))

  expect(await run('Install')).toMatch(/^\d+\.\d+\.\d+\n$/)
  const begun = await run('Bring it up')
  expect(begun).toContain('is valid: vm1 of 32MiB, scratch of 8MiB')
  expect(begun).toMatch(/^vm1 +32MiB +8192 /m)
  const content = Buffer.alloc(2 * 2 ** 20, 'what is to be there again ')
  writeFileSync(join(folder, 'content'), content)
  const { uri } = /(?<uri>nbd\+unix:[^']+)/.exec(local(code.get('Backups')!))!.groups!
  await shell.run(`nbdcopy --flush content '${uri}'`)

  const watched = await run('Watch it')
  expect(watched).toMatch(/^vm1 +zcache /m)
  expect(watched).toContain('tmem_device_pages{')
  expect(watched).toContain('<!doctype html>')
  const changed = await run('Change it while it is in use')
  expect(changed).toMatch(/^mem_limit +0$/m)
  expect(changed).toContain('given back')

  const control = join(folder, 'run/control.sock')
  const { info } = JSON.parse((await tmem(['stat', '--json', '--control', control])).stdout)
  process.kill(info.pid, 'SIGKILL')
  await shell.run('wait %1 || true')
  const refused = await tmem(['up', '-f', file])
  expect(refused.code).toBe(3)
  expect(refused.stderr).toMatch(/was killed: the pages of scratch are lost.*start with --fresh\n$/)
  await run('What survives what')
  await run('Backups')
  const copy = readFileSync(join(folder, 'lib/backup.raw'))
  expect(copy.length).toBe(32 * 2 ** 20)
  expect(copy.subarray(0, content.length).equals(content)).toBe(true)

  expect(await run('Stop, upgrade, reboot')).toContain('has ended')
  await shell.run('wait')
  expect(readdirSync(join(folder, 'lib')).toSorted()).toEqual(['backup.raw', 'vm1.raw'])
  expect(readdirSync(join(folder, 'run'))).toEqual([])
})

test('a cache is brought up, used with redis-cli, and ended', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: ['redis-cli'] })
  const folder = temporaryDirectory()
  const local = localTo(folder, await freePorts())
  writeFileSync(join(folder, 'etc/caches.yaml'), local(codeIn('yaml').get('Caches')!))
  const shell = shellIn(folder)
  onTestFinished(() => shell.end())
  expect(await shell.run(local(code.get('Install')!))).toMatch(/^\d/)
  const said = await shell.run(local(code.get('Caches')!))
  expect(said).toMatch(/^sessions +0 +[\d.]+MiB +8\.0MiB /m)
  expect(said).toMatch(/^OK\n3600\n# Server$/m)
  expect(said).toContain('has ended')
  await shell.run('wait')
  expect(readdirSync(join(folder, 'lib'))).toEqual(['pages.cache'])
  expect(readdirSync(join(folder, 'run'))).toEqual([])
})

test('the commands of a service are those that install-unit says', async (ctx) => {
  const folder = temporaryDirectory()
  const local = localTo(folder)
  writeFileSync(join(folder, 'etc/tmem.yaml'), local(config), { mode: 0o644 })
  const [install, ...next] = local(code.get('As a service')!).trim().split('\n')
  const words = install!.split(' ').slice(1)
  const said = await tmem([...words, '--root', folder, '--json'])
  if (/could not read .* is closed to others/.test(said.stderr)) ctx.skip('needs a checkout that everybody may read')
  expect(said.code).toBe(0)
  expect(JSON.parse(said.stdout).next).toEqual(next)
})

test('the exit codes are those of the program', async () => {
  const page = readFileSync(new URL('../../../docs/operating.md', import.meta.url), 'utf8')
  const table = page.split('\n## Exit codes\n')[1]!.split('\n## ')[0]!
  const { exitCodes } = await import('../src/ending.ts')
  expect([...table.matchAll(/^\| (\d+) \|/gm)].map(([, number]) => Number(number))).toEqual(
    exitCodes.map(([number]) => number),
  )
})
