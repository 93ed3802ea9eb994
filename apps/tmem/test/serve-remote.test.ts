/** Devices whose cold pages rest in real Redis servers, as the NBD clients of others see them. */
import { execFile } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { expect, onTestFinished, test } from 'vitest'
import { RealServer, serverCommand } from '../../../packages/ramster/test/server.ts'
import { requires } from '../../../tools/requires.ts'
import { servingIn } from './serving.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const inputBytes = 48 * 2 ** 20
const run = promisify(execFile)
const device = ['--device', 'name=a,size=64MiB']

async function server(): Promise<RealServer> {
  const one = await RealServer.start()
  onTestFinished(() => one.stop())
  return one
}

const stackOver = (a: { readonly port: number }, b: { readonly port: number }): string =>
  `zcache(limit=6MiB) > seal > ramster(valkey=127.0.0.1:${a.port},valkey2=127.0.0.1:${b.port},size=64MiB) > seal > frontswap(file=FOLDER/{name}.img,size={size})`

/** Pages that shrink to about half. */
function writeInput(path: string): string {
  const half = randomBytes(inputBytes / 2)
  const input = Buffer.alloc(inputBytes, 'a page of text ')
  for (let at = 0; at < inputBytes; at += 4096) half.copy(input, at, at / 2, at / 2 + 2048)
  writeFileSync(path, input)
  return digest(path)
}

const digest = (path: string): string =>
  createHash('sha256').update(readFileSync(path).subarray(0, inputBytes)).digest('hex')

test('machines are added and taken out while it serves, and the one that went may die', {
  timeout: 120_000,
}, async (ctx) => {
  requires(ctx, { commands: [serverCommand, 'nbdcopy'] })
  const [a, b, c] = [await server(), await server(), await server()]
  const folder = temporaryDirectory()
  const { control, stop } = await servingIn(folder, stackOver(a, b), ...device)
  const uri = `nbd+unix:///a?socket=${folder}/nbd.sock`
  const [input, back] = [join(folder, 'input'), join(folder, 'back')]
  const wanted = writeInput(input)
  await run('nbdcopy', ['--', input, uri])
  expect(await a.keys()).toBeGreaterThan(1000)
  const lenders = async (...words: string[]): Promise<string> => {
    const { stdout, stderr, code } = await tmem(['knob', 'a', 'lenders', ...words, '--json', '--control', control])
    return code === 0 ? JSON.parse(stdout)['lenders'] : stderr
  }
  const named = (one: RealServer): string => `127.0.0.1:${one.port}`
  expect(await lenders()).toBe(`${named(a)}, ${named(b)}`)
  expect(await lenders('remove', named(a))).toContain('2 must stay; add another machine first')
  expect(await lenders('add', 'nothing')).toContain('a machine is valkey=HOST:PORT or cluster=HOST:PORT')
  expect(await lenders('add', `valkey=${named(c)}`)).toBe([a, b, c].map(named).join(', '))
  expect(await lenders('remove', named(a))).toContain(`${named(a)} (leaving)`)
  while ((await lenders()) !== `${named(b)}, ${named(c)}`) await sleep(50)
  expect(await a.keys()).toBe(0)
  expect(await c.keys()).toBeGreaterThan(1000)
  await a.kill()
  await run('nbdcopy', ['--', uri, back])
  expect(digest(back)).toBe(wanted)
  await stop()
})

test('nbdcopy writes and reads it, while one of the two servers is killed', { timeout: 120_000 }, async (ctx) => {
  requires(ctx, { commands: [serverCommand, 'nbdcopy'] })
  const [a, b] = [await server(), await server()]
  const folder = temporaryDirectory()
  const { control, stop } = await servingIn(folder, stackOver(a, b), ...device)
  const uri = `nbd+unix:///a?socket=${folder}/nbd.sock`
  const [input, back] = [join(folder, 'input'), join(folder, 'back')]
  const wanted = writeInput(input)
  const counters = async (): Promise<Record<string, number>> => {
    const { devices } = JSON.parse((await tmem(['stat', '--json', '--control', control])).stdout)
    const chain = devices[0].children.find(({ name }: { name: string }) => name === 'chain')
    return chain.children.find(({ name }: { name: string }) => name === 'ramster').counters
  }
  const writing = run('nbdcopy', ['--', input, uri])
  // The server itself is asked, which is quicker than the program: it is to be killed in the middle.
  while ((await a.keys()) < 100) await sleep(5)
  // So that something certainly is on its way there.
  a.stall()
  await sleep(500)
  await a.kill()
  await writing
  expect((await counters())['degraded']).toBe(1)
  const away = `127\\.0\\.0\\.1:${a.port}`
  const left = `127\\.0\\.0\\.1:${b.port}`
  const table = (await tmem(['stat', '--control', control])).stdout
  expect(table).toMatch(new RegExp(`^a +${away} +away +\\d+ +0 +0$`, 'm'))
  expect(table).toMatch(new RegExp(`^a +${left} +open +\\d+ +[1-9]\\d* +0$`, 'm'))
  const { checks } = JSON.parse((await tmem(['doctor', '--json', '--control', control])).stdout)
  expect(checks).toContainEqual(
    expect.objectContaining({
      name: `server: a on 127.0.0.1:${b.port}`,
      ok: false,
      found: expect.stringMatching(/^open, \d+ blocks, of which [1-9]\d* would be lost with it$/),
    }),
  )
  await run('nbdcopy', ['--', uri, back])
  expect(digest(back)).toBe(wanted)
  // It goes on with the server that is back, and has everything twice again.
  await a.start()
  for (;;) {
    const { degraded, one_copy_only: lacking, lost } = await counters()
    expect(lost).toBe(0)
    if (degraded === 0 && lacking === 0) break
    await sleep(50)
  }
  const { code, stderr } = await stop()
  expect(code).toBe(0)
  expect(stderr).toMatch(/^tmem: a: ramster fails: /m)
  expect([await a.keys(), await b.keys()]).toEqual([0, 0])
})

test('it does not serve where a machine cannot be reached, and leaves nothing behind', async (ctx) => {
  requires(ctx, { commands: [serverCommand] })
  const [a, gone] = [await server(), await server()]
  await gone.kill()
  const folder = temporaryDirectory()
  await expect(servingIn(folder, stackOver(a, gone), ...device)).rejects.toThrow(
    new RegExp(`^exit code 1: tmem: ramster: 127.0.0.1:${gone.port}: connect ECONNREFUSED .*\\(TMEM_IO\\)$`),
  )
  const leavings = ['a.img', 'nbd.sock', 'control.sock', 'control.sock.record']
  expect(leavings.filter((name) => existsSync(join(folder, name)))).toEqual([])
  expect(await a.keys()).toBe(0)
})

test('a signal ends it while it waits for a machine', async () => {
  // A server that says nothing.
  const mute = createServer((socket) => socket.resume()).listen(0, '127.0.0.1')
  await new Promise((resolve) => mute.once('listening', resolve))
  onTestFinished(() => void mute.close())
  const { port } = mute.address() as { port: number }
  const folder = temporaryDirectory()
  const words = ['serve', '--stack', stackOver({ port }, { port }).replaceAll('FOLDER', folder), ...device]
  const { code, stderr } = await tmem([...words, '--nbd', `unix:${folder}/s`, '--control', join(folder, 'c')], {
    during: async (running) => {
      await new Promise<void>((resolve) => {
        mute.once('connection', () => resolve())
      })
      running.kill('SIGTERM')
    },
  })
  expect([code, stderr]).toEqual([130, 'tmem: interrupted\n'])
})
