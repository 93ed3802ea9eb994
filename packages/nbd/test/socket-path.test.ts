/** Who listens where a server that was killed has left its socket. */
import { spawn } from 'node:child_process'
import { chownSync, existsSync, lstatSync, symlinkSync, writeFileSync } from 'node:fs'
import { createServer, type Server } from 'node:net'
import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { afterEach, expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { listenAtPath, memoryDevice, nbdServer } from '../src/index.ts'
import { Client, later, testFolder } from './client.ts'

const servers: Server[] = []
afterEach(async () => {
  await Promise.all(servers.splice(0).map((server) => new Promise((resolve) => server.close(resolve))))
})

/** Leaves a socket behind at a path, as a process does that is killed. */
async function leaveSocket(path: string): Promise<void> {
  const script = `require('net').createServer().listen(process.argv[1], () => console.log('there'))`
  const child = spawn(process.execPath, ['-e', script, path], { stdio: ['ignore', 'pipe', 'inherit'] })
  await new Promise((resolve) => child.stdout.once('data', resolve))
  child.kill('SIGKILL')
  await new Promise((resolve) => child.once('close', resolve))
  expect(lstatSync(path).isSocket()).toBe(true)
}

const newServer = (): Server => {
  const server = createServer((socket) => socket.end())
  servers.push(server)
  return server
}

test('of many who find a dead socket at one moment, one listens there', async () => {
  const folder = testFolder()
  for (let round = 0; round < 10; round++) {
    const path = join(folder, `socket${round}`)
    await leaveSocket(path)
    const nbd = nbdServer({ exports: [{ device: memoryDevice({ sizeBytes: 4096 }) }] })
    later(() => nbd.close())
    // Some begin a few turns later: while the first ones look, remove and listen.
    const afterTurns = async (turns: number, listen: () => Promise<unknown>): Promise<unknown> => {
      for (let n = 0; n < turns; n++) await setImmediate()
      return listen()
    }
    const all = await Promise.allSettled([
      nbd.listen({ path }),
      ...Array.from({ length: 24 }, (_, n) => afterTurns((n * round) % 13, () => listenAtPath(newServer(), path))),
    ])
    const reasons = all.flatMap((one) => (one.status === 'rejected' ? [(one.reason as { code: unknown }).code] : []))
    expect(reasons).toEqual(Array.from({ length: 24 }, () => 'EADDRINUSE'))
    // Whoever it is, it is there.
    const trial = newServer()
    await expect(listenAtPath(trial, path)).rejects.toMatchObject({ code: 'EADDRINUSE' })
  }
}, 60_000)

test('what is no dead socket of this user stays', async (ctx) => {
  const folder = testFolder()
  const [file, link, target] = ['file', 'link', 'target'].map((name) => join(folder, name)) as [string, string, string]
  writeFileSync(file, 'mine')
  symlinkSync(target, link)
  for (const path of [file, link])
    await expect(listenAtPath(newServer(), path)).rejects.toMatchObject({ code: 'EADDRINUSE' })
  expect([lstatSync(file).isFile(), lstatSync(link).isSymbolicLink(), existsSync(target)]).toEqual([true, true, false])
  requires(ctx, { root: true })
  const foreign = join(folder, 'foreign')
  await leaveSocket(foreign)
  chownSync(foreign, 65534, 65534)
  await expect(listenAtPath(newServer(), foreign)).rejects.toMatchObject({ code: 'EADDRINUSE' })
  expect(lstatSync(foreign).uid).toBe(65534)
})

test('a socket has its permissions from the beginning, and leads to the server', async () => {
  const path = join(testFolder(), 'socket')
  const mask = process.umask(0)
  try {
    await listenAtPath(newServer(), path, 0o600)
    expect(process.umask()).toBe(0)
  } finally {
    process.umask(mask)
  }
  expect(lstatSync(path).mode & 0o777).toBe(0o600)
})

test('an NBD server takes the place of one that was killed', async () => {
  const path = join(testFolder(), 'socket')
  await leaveSocket(path)
  const nbd = nbdServer({ exports: [{ device: memoryDevice({ sizeBytes: 4096 }) }] })
  later(() => nbd.close())
  expect(await nbd.listen({ path })).toEqual({ path })
  const client = await Client.ready({ path })
  expect((await client.read(0, 512)).error).toBe(0)
})
