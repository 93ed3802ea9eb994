/** `tmem up`, `status`, `down` and `run`, as an operator would use them. Swap is a system test's. */
import { spawn } from 'node:child_process'
import { mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { bin } from './serving.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

/** Writes a file and brings it up. */
async function up(text: string): Promise<{ folder: string; file: string; ended: Promise<number | null> }> {
  const folder = temporaryDirectory()
  const file = join(folder, 'tmem.yaml')
  writeFileSync(file, text)
  const child = spawn(process.execPath, [bin, 'up', '-f', file, '--json'], { stdio: ['ignore', 'pipe', 'inherit'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  const ended = new Promise<number | null>((resolve) => child.once('close', resolve))
  await Promise.race([
    new Promise((resolve) => child.stdout.once('data', resolve)),
    ended.then((code) => Promise.reject(new Error(`it ended with ${code}`))),
  ])
  return { folder, file, ended }
}

const text = `
stack: zcache(limit=80MiB) > frontswap(file={name}.img,size=80MiB)
devices:
  a: { size: 64MiB }
  b: { size: 32MiB, stack: memory(limit=40MiB) }
nbd: [unix:nbd.sock]
control: control.sock
`

test('up serves what the file says beside the file, status agrees, down leaves nothing', async () => {
  const { folder, file, ended } = await up(text)
  expect(readdirSync(folder).toSorted()).toEqual([
    'a.img',
    'control.sock',
    'control.sock.record',
    'nbd.sock',
    'tmem.yaml',
  ])
  const { code, stdout } = await tmem(['status', '-f', file, '--json'])
  expect(code).toBe(0)
  expect(JSON.parse(stdout)).toMatchObject({
    devices: [
      { name: 'a', sizeBytes: 64 * 2 ** 20, swap: null },
      { name: 'b', sizeBytes: 32 * 2 ** 20, swap: null },
    ],
    differences: [],
  })
  writeFileSync(file, text.replace('size: 64MiB', 'size: 60MiB').replace('  b:', '  c:'))
  const differs = await tmem(['status', '-f', file])
  expect(differs.code).toBe(1)
  expect(differs.stderr).toContain(
    'b is served but not in the file; a has a size of 64MiB instead of 60MiB; c is not served',
  )
  const down = await tmem(['down', '-f', file])
  expect({ code: down.code, stderr: down.stderr }).toEqual({ code: 0, stderr: '' })
  expect(await ended).toBe(0)
  expect(readdirSync(folder)).toEqual(['tmem.yaml'])
  const none = await tmem(['status', '-f', file])
  expect(none.code).toBe(1)
  expect(none.stderr).toMatch(/^tmem: no server at /)
})

test('a file with mistakes is told line by line, and nothing is begun', async () => {
  const folder = temporaryDirectory()
  const file = join(folder, 'tmem.yaml')
  writeFileSync(file, text.replace('nbd:', 'nbdd:').replace('32MiB', '32'))
  for (const words of [['up'], ['config', 'check'], ['status'], ['down']]) {
    const { code, stderr } = await tmem([...words, '-f', file])
    expect(code).toBe(2)
    expect(stderr.trimEnd().split('\n')).toEqual([
      `tmem: ${file} has mistakes`,
      expect.stringMatching(`^${file}:5:8: devices\\.b\\.size: expected whole pages`),
      expect.stringMatching(`^${file}:6:1: nbdd: .*did you mean nbd`),
    ])
  }
  expect(readdirSync(folder)).toEqual(['tmem.yaml'])
})

/** What `tmem run` has left behind in the temporary folder. */
const left = (): string[] => readdirSync(tmpdir()).filter((name) => name.startsWith('tmem-run-'))

const run = (...command: string[]): ReturnType<typeof tmem> =>
  tmem(['run', '--stack', 'memory(limit=80MiB)', '--device', 'name=d,size=64MiB', '--', ...command])

test('run serves for one command, and has its exit code', async (ctx) => {
  requires(ctx, { commands: ['nbdinfo'] })
  const { code, stdout } = await run('sh', '-c', 'nbdinfo --size "$TMEM_NBD"; echo $TMEM_DEVICE; exit 3')
  expect({ code, stdout }).toEqual({ code: 3, stdout: `${64 * 2 ** 20}\nd\n` })
})

test('run tells of a command that is not there, and leaves nothing', async () => {
  const before = left()
  const { code, stderr } = await run('no-such-program')
  expect(code).toBe(1)
  // EACCES where a folder of the PATH is closed to this user.
  expect(stderr).toMatch(/^tmem: no-such-program cannot be run: spawn no-such-program E(NOENT|ACCES)\n$/)
  expect(left()).toEqual(before)
})

test('run tells of what is no command for the system, of no place for its sockets, and leaves nothing', async () => {
  const before = left()
  for (const command of ['', 'x'.repeat(5000)]) {
    const { code, stderr } = await run(command)
    expect(code).toBe(1)
    expect(stderr).toMatch(/^tmem: .* cannot be run: [^\n]*\n$/)
  }
  expect(left()).toEqual(before)
  const nowhere = join(temporaryDirectory(), 'none')
  const { code, stderr } = await tmem(
    ['run', '--stack', 'memory(limit=80MiB)', '--device', 'name=d,size=64MiB', '--', 'true'],
    { through: ['env', `TMPDIR=${nowhere}`] },
  )
  expect(code).toBe(2)
  expect(stderr).toMatch(/^tmem: the sockets cannot be created in [^\n]*\n$/)
})

test('a signal goes to the command', async () => {
  const command = ['sh', '-c', 'trap "echo told; exit 5" TERM; echo begun; while :; do sleep 0.05; done']
  const { code, stdout } = await tmem(
    ['run', '--stack', 'memory(limit=80MiB)', '--device', 'name=d,size=64MiB', '--', ...command],
    {
      during: (child) =>
        new Promise((resolve) => {
          child.stdout.once('data', () => {
            child.kill('SIGTERM')
            resolve()
          })
        }),
    },
  )
  expect({ code, stdout }).toEqual({ code: 5, stdout: 'begun\ntold\n' })
})

test('a folder in the place of the control socket is told, and nothing is left', async () => {
  const folder = temporaryDirectory()
  const file = join(folder, 'tmem.yaml')
  writeFileSync(file, text)
  mkdirSync(join(folder, 'control.sock'))
  const { code, stderr } = await tmem(['up', '-f', file])
  expect(code).toBe(2)
  expect(stderr).toContain('exists and is not a socket')
  expect(readdirSync(folder)).toEqual(['control.sock', 'tmem.yaml'])
})

test('down signals no process that is not the server of the record', async () => {
  const folder = temporaryDirectory()
  const file = join(folder, 'tmem.yaml')
  writeFileSync(file, text)
  const stranger = spawn('sleep', ['60'])
  const answering = createServer({ allowHalfOpen: true }, (socket) => {
    socket.once('data', () =>
      socket.end(`${JSON.stringify({ pid: stranger.pid, devices: [], nbd: [], fileSystem: null })}\n`),
    )
  })
  await new Promise<void>((resolve) => void answering.listen(join(folder, 'control.sock'), resolve))
  const { code, stderr } = await tmem(['down', '-f', file, '--wait', '1'])
  answering.close()
  expect([code, stderr]).toEqual([1, expect.stringContaining('which is not a server on this host')])
  expect(stranger.signalCode).toBe(null)
  stranger.kill()
})
