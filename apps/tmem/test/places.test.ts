/** Sockets and records in folders where others may write, and servers that are somebody else's. */
import { type ChildProcess, spawn } from 'node:child_process'
import {
  chmodSync,
  chownSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const nobody = 65534
const serve = ['serve', '--stack', 'memory(limit=8MiB)', '--device', 'name=d,size=1MiB']

/** A folder in which everybody may write. */
function openFolder(mode: number): string {
  const folder = join(temporaryDirectory(), 'open')
  mkdirSync(folder)
  chmodSync(join(folder, '..'), 0o755)
  chmodSync(folder, mode)
  return folder
}

/** Starts a program of another user that must say something. */
async function begun(script: string, words: readonly string[], uid: number): Promise<ChildProcess> {
  const child = spawn(process.execPath, ['-e', script, ...words], {
    uid,
    gid: uid,
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  onTestFinished(() => void child.kill('SIGKILL'))
  await new Promise((resolve) => child.stdout!.once('data', resolve))
  return child
}

test('a server of another user is not asked, whatever its socket is called', async (ctx) => {
  requires(ctx, { root: true, paths: ['/proc/self/fd'] })
  const folder = openFolder(0o1777)
  const control = join(folder, 'control.sock')
  const victim = join(folder, 'd')
  writeFileSync(victim, "somebody's file")
  const info = {
    pid: 1,
    stack: '',
    devices: [{ name: 'd', sizeBytes: 4096 }],
    nbd: [],
    fuse: folder,
    fileSystem: '0:1',
  }
  // It says also what it was asked, so that the test knows whether it was.
  const script = `
    const heard = process.argv[2]
    require('net').createServer((socket) => {
      socket.on('error', () => {})
      socket.on('data', (text) => { require('fs').appendFileSync(heard, text); socket.end(process.argv[3] + '\\n') })
    }).listen(process.argv[1], () => { require('fs').chmodSync(process.argv[1], 0o777); console.log('there') })`
  const heard = join(folder, 'heard')
  await begun(script, [control, heard, JSON.stringify(info)], nobody)
  const named = join(folder, 'named.sock')
  symlinkSync(control, named)
  // Whose file the socket is does not decide, where the kernel tells whose process listens.
  for (const [path, owner] of [
    [control, nobody],
    [named, nobody],
    [control, 0],
  ] as const) {
    chownSync(control, owner, owner)
    for (const words of [['swap', 'on'], ['swap', 'status'], ['swap', 'off'], ['stat'], ['knob', 'd', 'reset', '1']])
      expect([words, await tmem([...words, '--control', path])]).toEqual([
        words,
        {
          code: 1,
          stdout: '',
          stderr: expect.stringMatching(
            /^tmem: the server at .* belongs to user 65534, whose answers cannot be trusted/,
          ),
        },
      ])
  }
  expect(existsSync(heard)).toBe(false)
  expect(readFileSync(victim, 'utf8')).toBe("somebody's file")
}, 60_000)

test('links that lie where files will be made are not followed', async () => {
  const folder = openFolder(0o1777)
  const victim = join(folder, 'victim')
  const names = ['c.sock', 'c.sock.record', 'c.sock.lock', `c.sock.record-${process.pid}`, 'nbd.sock']
  for (const planted of names) {
    for (const target of [victim, join(folder, 'missing')]) {
      writeFileSync(victim, "root's file")
      symlinkSync(target, join(folder, planted))
      let ready = ''
      const { code } = await tmem(
        [...serve, '--nbd', `unix:${join(folder, 'nbd.sock')}`, '--control', join(folder, 'c.sock')],
        {
          during: async (running) => {
            await new Promise<void>((resolve) => {
              running.stdout.once('data', (text: string) => {
                ready = text
                resolve()
              })
              running.once('exit', () => resolve())
            })
            running.kill('SIGTERM')
          },
        },
      )
      expect([planted, readFileSync(victim, 'utf8'), existsSync(join(folder, 'missing'))]).toEqual([
        planted,
        "root's file",
        false,
      ])
      // It serves where the name is nothing to it, and refuses where it is; the link is not its own to take away.
      expect([planted, code === 0]).toEqual([planted, ready !== ''])
      expect(lstatSync(join(folder, planted)).isSymbolicLink()).toBe(true)

      unlinkSync(join(folder, planted))
      expect(readdirSync(folder).sort()).toEqual(['victim'])
    }
  }
}, 60_000)

test('a folder in which others may replace the socket is refused, and what leads to it', async (ctx) => {
  const folder = openFolder(0o777)
  const inner = join(folder, 'inner')
  mkdirSync(inner, { mode: 0o700 })
  const tried = async (control: string, nbd: string): Promise<string> => {
    const { code, stderr } = await tmem([...serve, '--nbd', `unix:${nbd}`, '--control', control])
    expect(code).toBe(2)
    return stderr
  }
  const own = temporaryDirectory()
  for (const at of [folder, inner]) {
    expect(await tried(join(at, 'c'), join(own, 'n'))).toMatch(/open, where others could replace it/)
    expect(await tried(join(own, 'c'), join(at, 'n'))).toMatch(/open, where others could replace it/)
  }
  expect([readdirSync(own), readdirSync(inner)]).toEqual([[], []])
  requires(ctx, { root: true })
  chmodSync(folder, 0o755)
  chownSync(inner, nobody, nobody)
  expect(await tried(join(inner, 'c'), join(own, 'n'))).toMatch(/which is user 65534's: name your own/)
})

test('a record that another user has put there is not believed', async (ctx) => {
  requires(ctx, { root: true })
  const folder = openFolder(0o1777)
  const control = join(folder, 'c.sock')
  writeFileSync(`${control}.record`, '')
  chownSync(`${control}.record`, nobody, nobody)
  const { code, stderr } = await tmem([...serve, '--nbd', `unix:${join(folder, 'n')}`, '--control', control])
  expect([code, stderr]).toEqual([1, expect.stringMatching(/record/)])
  expect(lstatSync(`${control}.record`).uid).toBe(nobody)
  expect(readdirSync(folder)).toEqual(['c.sock.record'])
})
