/** How `tmem serve` takes clients in over NBD: sockets that are handed over, and limits on who may come. */
import { execFile, execFileSync, spawn } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { describe, expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const bin = fileURLToPath(new URL('../dist/bin.js', import.meta.url))
const words = (folder: string, ...more: string[]): string[] => [
  'serve',
  '--stack',
  'memory(limit=8MiB)',
  '--device',
  'name=disk,size=4MiB',
  '--control',
  join(folder, 'control.sock'),
  ...more,
]

describe('sockets that are handed over', () => {
  test('nbdinfo and nbdcopy start it and use its only device', async (ctx) => {
    requires(ctx, { commands: ['nbdinfo', 'nbdcopy'] })
    const folder = temporaryDirectory()
    const run = async (command: string, ...before: string[]): Promise<string> =>
      (
        await promisify(execFile)(command, [...before, '--', '[', process.execPath, bin, ...words(folder), ']'], {
          timeout: 30_000,
        })
      ).stdout
    expect(await run('nbdinfo', '--size')).toBe('4194304\n')
    const ours: { exports: { 'export-size': number }[] } = JSON.parse(await run('nbdinfo', '--json'))
    expect(ours.exports).toMatchObject([{ 'export-size': 4_194_304 }])
    expect(await run('nbdinfo', '--map')).toMatch(/^ *0 +4194304 +3 +hole,zero\n$/)
    const image = join(folder, 'image')
    writeFileSync(image, Buffer.alloc(4_194_304, 'tmem'))
    await promisify(execFile)('nbdcopy', ['--', image, '[', process.execPath, bin, ...words(folder), ']'])
  })

  test.for([
    ['2', 'LISTEN_FDS says that descriptor 4 is a socket'],
    ['none', 'LISTEN_FDS: expected a number of sockets'],
  ])('LISTEN_FDS=%s', async ([count, reason], ctx) => {
    requires(ctx, { commands: ['sh'] })
    // The shell knows its own number, and gives it to what it becomes.
    const script = `exec env LISTEN_PID=$$ LISTEN_FDS=${count} "$0" "$@"`
    const { code, stderr } = await tmem(words(temporaryDirectory()), { through: ['sh', '-c', script] })
    expect(code).toBe(2)
    expect(stderr).toContain(count === '2' ? 'LISTEN_FDS says that descriptor 3 is a socket' : reason)
    expect(stderr.trimEnd()).not.toContain('\n')
  })

  test('those of another process are none of its own', async (ctx) => {
    requires(ctx, { commands: ['env'] })
    const { code, stderr } = await tmem(words(temporaryDirectory()), {
      through: ['env', 'LISTEN_PID=1', 'LISTEN_FDS=1'],
    })
    expect(code).toBe(2)
    expect(stderr).toContain('say how to serve')
  })
})

describe('--nbd-limits', () => {
  test('who says nothing is sent away, and whoever runs the server is told', async () => {
    const folder = temporaryDirectory()
    const path = join(folder, 'nbd.sock')
    const more = ['--nbd', `unix:${path}`, '--nbd-limits', 'handshake=0.2,connections=2,bytes=1MiB', '--json']
    const { code, stderr } = await tmem(words(folder, ...more), {
      during: async (running) => {
        await new Promise<unknown>((resolve) => running.stdout.once('data', resolve))
        const silent = connect(path).resume()
        await new Promise((resolve) => silent.on('close', resolve))
        const stats = execFileSync(process.execPath, [
          bin,
          'stat',
          '--control',
          join(folder, 'control.sock'),
          '--json',
        ]).toString()
        expect(stats).toMatch(/"refused":1,.*"refused_silent":1/)
        running.kill('SIGTERM')
      },
    })
    expect(code).toBe(0)
    expect(JSON.parse(stderr)).toMatchObject({
      event: 'client.refused',
      reason: 'silent',
      msg: 'NBD client on a unix socket refused: it did not choose an export within 0.2 s',
    })
  })

  test.for(['connections=0', 'connections', 'bytes=much', 'handshake=-1', 'handshake=3000000', 'places=3', ''])(
    'refuses "%s" in one line',
    async (limits) => {
      const folder = temporaryDirectory()
      const { code, stdout, stderr } = await tmem(
        words(folder, '--nbd', `unix:${folder}/nbd.sock`, '--nbd-limits', limits),
      )
      expect({ code, stdout }).toEqual({ code: 2, stdout: '' })
      expect(stderr).toContain('bad --nbd-limits')
      expect(stderr.trimEnd()).not.toContain('\n')
    },
  )
})

describe('where the address space is limited', () => {
  test('it does not start, or serves many clients with large writes at once, and lives', async (ctx) => {
    requires(ctx, { commands: ['sh'] })
    const outcomes: string[] = []
    // From too little to just enough: what a plain runtime takes is not known before.
    for (let mebibytes = 800; mebibytes <= 2800 && !outcomes.includes('served'); mebibytes += 100) {
      // Each in a folder of its own: one that its limit killed while it started leaves its mark, and the next would
      // refuse.
      const folder = temporaryDirectory()
      const path = join(folder, 'nbd.sock')
      const script = `ulimit -v ${mebibytes * 1024}; exec "$0" "$@"`
      const running = spawn('sh', [
        '-c',
        script,
        process.execPath,
        // The runtime's own parser of HTTP is WebAssembly, for which it would set gigabytes of addresses aside.
        '--disable-wasm-trap-handler',
        bin,
        ...words(folder, '--nbd', `unix:${path}`, '--json'),
      ])
      let said = ''
      running.stderr.on('data', (text) => {
        said += text
      })
      const ended = new Promise<string>((resolve) => {
        running.on('close', (code, signal) => resolve(signal ?? `code ${code}`))
      })
      const ready = await Promise.race([
        ended.then(() => false),
        new Promise<boolean>((resolve) => running.stdout.once('data', () => resolve(true))),
      ])
      if (!ready) {
        outcomes.push(`not started: ${said.trim()}`)
        continue
      }
      const clients = Array.from({ length: 82 }, () => writingClient(path))
      const answers = await Promise.race([Promise.all(clients), ended])
      expect(answers).toEqual(Array.from({ length: 82 }, () => 'written'))
      running.kill('SIGTERM')
      expect(await ended).toBe('code 0')
      outcomes.push('served')
    }
    expect(outcomes.at(-1)).toBe('served')
  })
})

/** Writes the whole device in one request; answers what became of it. */
function writingClient(path: string): Promise<string> {
  const bytes = 4_194_304
  const hello = Buffer.alloc(4 + 16)
  hello.writeUInt32BE(3, 0)
  hello.write('IHAVEOPT', 4, 'latin1')
  hello.writeUInt32BE(1, 12)
  const request = Buffer.alloc(28)
  request.writeUInt32BE(0x25609513, 0)
  request.writeUInt16BE(1, 6)
  request.writeUInt32BE(bytes, 24)
  // The greeting, what EXPORT_NAME answers, and a simple reply.
  const answer = 18 + 10 + 16
  return new Promise((resolve) => {
    const socket = connect(path)
    let received = 0
    socket.on('error', () => {})
    socket.on('close', () => resolve(received === answer ? 'written' : `${received} bytes`))
    socket.on('data', (data) => {
      received += data.length
      if (received === answer) socket.end()
    })
    socket.write(Buffer.concat([hello, request, Buffer.alloc(bytes, 1)]))
  })
}
