/** Clients as simple as can be against the rule of when to send: what is counted is sendings. */
import { describe, expect, test } from 'vitest'
import { Pace } from '../src/pace.ts'
import { Command } from '../src/protocol.ts'
import { bareConnection, Client, requestBytes, serve } from './client.ts'

/**
 * A client that keeps `depth` requests of `bytes` under way: it sends the next one for each answer that it gets, and
 * the event loop turns `turns` times between two of its requests. Answers how many were sent together, each time.
 */
function sendings(pace: Pace, depth: number, bytes: number, requests: number, turns = 1): number[] {
  const sent: number[] = []
  let waiting = depth
  let ready = 0
  const send = (): void => {
    sent.push(ready)
    waiting += ready
    ready = 0
    pace.sent()
  }
  for (let served = 0; served < requests; ) {
    if (waiting > 0) {
      waiting--
      served++
      ready++
      pace.arrived()
      if (pace.answered(bytes)) send()
      else if (!pace.holds) send()
    }
    for (let turn = 0; turn < turns && ready > 0; turn++) if (pace.turned()) send()
  }
  return sent
}

describe('answers are sent', () => {
  test('one by one to a client that waits for each, but for a trial now and then', () => {
    const pace = new Pace()
    const trials: number[] = []
    for (let n = 0; n < 640; n++) {
      pace.arrived()
      expect(pace.answered(4096)).toBe(false)
      if (pace.holds) {
        trials.push(n)
        while (!pace.turned());
      }
      pace.sent()
    }
    expect(trials).toEqual(Array.from({ length: 10 }, (_, n) => n * 64))
  })

  test('by halves of what the client has under way', () => {
    const sent = sendings(new Pace(), 12, 4096, 2000)
    // The first time, and as a trial: all that it has.
    expect(sent.slice(0, 3)).toEqual([12, 6, 6])
    expect(sent.filter((count) => count === 6).length).toBeGreaterThan(sent.length * 0.95)
    expect(Math.max(...sent)).toBe(12)
  })

  test('by halves also when it has all of them arrive at once', () => {
    const pace = new Pace()
    pace.arrived()
    pace.answered(0)
    while (!pace.turned());
    pace.sent()
    const sent: number[] = []
    for (let n = 0; n < 20; n++) {
      pace.arrived()
      let ready = 0
      for (let request = 0; request < 32; request++) {
        ready++
        if (!pace.answered(512)) continue
        sent.push(ready)
        ready = 0
        pace.sent()
      }
      if (ready > 0) {
        sent.push(ready)
        pace.sent()
      }
    }
    expect(sent.slice(-20).every((count) => count === 16)).toBe(true)
  })

  test('when they are many bytes', () => {
    expect(Math.max(...sendings(new Pace(), 64, 4096, 1000))).toBe(16)
    expect(sendings(new Pace(), 4, 2 ** 20, 100).every((count) => count === 1)).toBe(true)
  })

  test('at the latest when there are 64, to a client that never waits and never pauses', () => {
    const pace = new Pace()
    const sent: number[] = []
    for (let n = 0, ready = 0; n < 20_000; n++) {
      // Now many at once, now one by one, and always before the event loop is quiet.
      if (n < 4096 ? n % 4096 === 0 : true) pace.arrived()
      ready++
      if (!pace.answered(0) && pace.holds) continue
      pace.sent()
      sent.push(ready)
      ready = 0
    }
    expect(Math.max(...sent)).toBe(64)
    expect(sent.length).toBeGreaterThan(20_000 / 64 - 1)
  })

  test('when nothing more comes, whatever was learned; and one by one again soon', () => {
    const pace = new Pace()
    sendings(pace, 32, 512, 1000)
    const sent = sendings(pace, 1, 512, 200, 20)
    expect(sent.every((count) => count === 1)).toBe(true)
    let held = 0
    for (let n = 0; n < 63; n++) {
      pace.arrived()
      pace.answered(512)
      if (pace.holds) held++
      pace.sent()
    }
    expect(held).toBeLessThan(2)
  })
})

test('what is ready does not wait for the rest of a large payload', () => {
  let held = 0
  const hold = (): void => void held++
  const { connection, wire } = bareConnection({ hold })
  const said = (): number => {
    const bytes = wire.sentBytes
    wire.sentBytes = 0
    return bytes
  }
  // The first is a trial: held until nothing more comes.
  const read = requestBytes(Command.READ, 0, 512, 1n)
  connection.feed(read)
  expect([held, said()]).toEqual([1, 0])
  connection.feed(Buffer.concat([requestBytes(Command.WRITE, 0, 4096, 2n), Buffer.alloc(100)]))
  expect(said()).toBe(0)
  connection.feed(Buffer.alloc(3996))
  expect(said()).toBe(0)
  connection.feed(Buffer.concat([requestBytes(Command.WRITE, 0, 2 ** 17, 3n), Buffer.alloc(100)]))
  expect(said()).toBe(16 + 512 + 16)
  connection.feed(Buffer.alloc(2 ** 17 - 100))
  expect(said()).toBe(16)
  connection.closed()
})

test('a client that sends everything at once gets all its answers, held or not', async () => {
  for (const busyTurns of [0, 50]) {
    const { address, server } = await serve({ busyTurns })
    const client = await Client.ready(address)
    for (let round = 0; round < 100; round++) {
      const count = 1 + (round % 40)
      const answers = await Promise.all(Array.from({ length: count }, (_, n) => client.read(n * 512, 512)))
      expect(answers.map(({ error }) => error)).toEqual(Array(count).fill(0))
    }
    // Held answers are lost with a client that goes, and nothing else is.
    const gone = await Client.ready(address)
    for (let n = 0; n < 100; n++) gone.send(requestBytes(Command.READ, 0, 512, BigInt(n)))
    gone.socket.destroy()
    expect((await client.read(0, 512)).error).toBe(0)
    await server.close()
    expect(server.stats().counters).toMatchObject({ connections: 0, buffer_bytes: 0 })
  }
})
