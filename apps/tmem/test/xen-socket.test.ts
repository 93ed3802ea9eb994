/** Streams between processes: whoever takes nothing is ended, and waiting leaves nothing behind. */
import { once } from 'node:events'
import { connect, createServer, type Socket } from 'node:net'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { expect, onTestFinished, test } from 'vitest'
import { writePieces } from '../src/xen/socket.ts'
import { temporaryDirectory } from './tmem.ts'

/** Both ends of a connection over a unix socket. */
async function pair(): Promise<readonly [here: Socket, there: Socket]> {
  const server = createServer({ pauseOnConnect: true })
  const path = join(temporaryDirectory(), 'pair.sock')
  server.listen(path)
  await once(server, 'listening')
  const accepted = once(server, 'connection')
  const here = connect(path)
  const [there] = (await accepted) as [Socket]
  onTestFinished(() => {
    here.destroy()
    there.destroy()
    server.close()
  })
  return [here, there]
}

async function* parts(count: number): AsyncGenerator<Uint8Array> {
  for (let n = 0; n < count; n++) {
    await Promise.resolve()
    yield new Uint8Array(65_536)
  }
}

test('whoever takes nothing of a stream is ended, as a guest stands still meanwhile', async () => {
  const [here] = await pair()
  await expect(writePieces(here, parts(100), 50)).rejects.toThrow('reads nothing')
  expect(here.destroyed).toBe(true)
})

test('whoever takes it slowly gets all of it, and each wait takes its listeners with it', async () => {
  const [here, there] = await pair()
  let taken = 0
  let drained = 0
  here.on('drain', () => drained++)
  there.on('data', (bytes: Buffer) => {
    taken += bytes.length
    there.pause()
    void setTimeout(5).then(() => there.resume())
  })
  there.resume()
  const before = here.listenerCount('close')
  expect(await writePieces(here, parts(64), 10_000)).toBe(64 * 65_536)
  expect(here.listenerCount('close')).toBe(before)
  expect(drained).toBeGreaterThan(1)
  await expect.poll(() => taken).toBe(64 * (65_536 + 4))
})
