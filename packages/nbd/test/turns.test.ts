/** Connections that take turns: the rule over a clock of its own, and clients of a server beside hostile ones. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { memoryDevice } from '../src/index.ts'
import { Command } from '../src/protocol.ts'
import { Extents, Slice } from '../src/slices.ts'
import { type Account, Turns, turnMs } from '../src/turns.ts'
import { Client, requestBytes, serve, until } from './client.ts'

/** A clock that goes only where the test lets it. */
class Rig {
  nowMs = 0
  readonly turns: Turns = new Turns(() => this.nowMs)

  member(requests: number, costMs: number): Member {
    return new Member(this, requests, costMs)
  }
}

/** Somebody who has so many requests of so many milliseconds, and takes turns until they are done. */
class Member implements Account {
  used = 0
  bulk = false
  waits = false
  left: number
  readonly #rig: Rig
  readonly #costMs: number

  constructor(rig: Rig, requests: number, costMs: number) {
    this.#rig = rig
    this.left = requests
    this.#costMs = costMs
  }

  arrive(more: number): void {
    this.left += more
    this.turn()
  }

  turn(): void {
    const { turns } = this.#rig
    if (!turns.enter(this)) return
    while (this.left > 0) {
      if (turns.over()) {
        turns.wait(this)
        break
      }
      this.left--
      this.#rig.nowMs += this.#costMs
    }
    turns.leave(this)
  }
}

const turned = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

describe('turns', () => {
  test('one alone is never kept waiting longer than a turn of the event loop', async () => {
    const rig = new Rig()
    const one = rig.member(1000, turnMs / 7.99)
    one.turn()
    expect(one.left).toBe(992)
    for (let n = 0; n < 125; n++) await turned()
    expect(one.left).toBe(0)
    expect(one.waits).toBe(false)
  })

  test('time is shared equally, whatever a request costs', async () => {
    const rig = new Rig()
    const members = [rig.member(1e6, turnMs / 50), rig.member(1e6, turnMs * 0.8), rig.member(1e6, turnMs * 7)]
    for (const member of members) member.turn()
    for (let n = 0; n < 3000; n++) await turned()
    const used = members.map(
      (member) => (1e6 - member.left) * [turnMs / 50, turnMs * 0.8, turnMs * 7][members.indexOf(member)]!,
    )
    expect(Math.max(...used) - Math.min(...used)).toBeLessThan(8 * turnMs)
  })

  test('who asks for little is served before many who ask for all they can get', async () => {
    const rig = new Rig()
    const hogs = Array.from({ length: 200 }, () => rig.member(1e6, turnMs / 3))
    for (const hog of hogs) hog.turn()
    // Of each of them it shows in its first turn.
    for (let n = 0; n < 200; n++) await turned()
    const light = rig.member(0, turnMs / 20)
    for (let n = 0; n < 50; n++) {
      await turned()
      const before = rig.nowMs
      light.arrive(1)
      while (light.left > 0) await turned()
      expect(rig.nowMs - before).toBeLessThan(3 * turnMs)
    }
  })

  test('everybody is served, and no turn is lost, in whatever order they come', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.record({ requests: fc.nat(50), cost: fc.integer({ min: 1, max: 40 }) }), {
          minLength: 1,
          maxLength: 12,
        }),
        fc.array(fc.tuple(fc.nat(11), fc.nat(30)), { maxLength: 30 }),
        async (list, later) => {
          const rig = new Rig()
          const members = list.map(({ requests, cost }) => rig.member(requests, (turnMs * cost) / 20))
          for (const member of members) member.turn()
          for (const [who, more] of later) {
            await turned()
            members[who % members.length]!.arrive(more)
          }
          for (let n = 0; members.some(({ left }) => left > 0); n++) {
            if (n > 5000) throw new Error(`never served: ${members.map(({ left }) => left).join(' ')}`)
            await turned()
          }
          await turned()
          expect(members.every(({ waits }) => !waits)).toBe(true)
        },
      ),
      { numRuns: 60, seed: 20091 },
    )
  })

  test('who has gone has no turn', async () => {
    const rig = new Rig()
    const [one, other] = [rig.member(10, turnMs), rig.member(10, turnMs)]
    one.turn()
    other.turn()
    rig.turns.forget(one)
    const left = one.left
    for (let n = 0; n < 30; n++) await turned()
    expect([one.left, other.left]).toEqual([left, 0])
  })
})

describe('slices', () => {
  test('are adjacent and end at units, whatever was measured', () => {
    fc.assert(
      fc.property(
        fc.constantFrom(512, 4096, 65_536),
        fc.nat(2 ** 30),
        fc.integer({ min: 1, max: 2 ** 26 }),
        fc.infiniteStream(fc.double({ min: 0, max: 50, noNaN: true })),
        (unit, from, length, times) => {
          const slice = new Slice(unit, 2 ** 23)
          let at = from
          for (let left = length; left > 0; ) {
            const bytes = slice.next(at, left)
            expect(bytes).toBeGreaterThan(0)
            at += bytes
            left -= bytes
            expect(left > 0 ? at % unit : 0).toBe(0)
            expect(left).toBeGreaterThanOrEqual(0)
            slice.took(bytes, times.next().value as number)
          }
        },
      ),
      { numRuns: 200, seed: 7 },
    )
  })

  test('become what fits into a turn', () => {
    const slice = new Slice(4096, 2 ** 23)
    const after = (msPerMebibyte: number): number => {
      for (let n = 0; n < 40; n++) {
        const bytes = slice.next(0, 2 ** 30)
        slice.took(bytes, (msPerMebibyte * bytes) / 2 ** 20)
      }
      return (slice.next(0, 2 ** 30) * msPerMebibyte) / 2 ** 20
    }
    expect(after(1e-6)).toBeLessThan(turnMs)
    expect(slice.next(0, 2 ** 30)).toBe(2 ** 23)
    for (const msPerMebibyte of [0.5, 3, 0.1, 1]) {
      const ms = after(msPerMebibyte)
      expect(ms).toBeLessThanOrEqual(turnMs)
      expect(ms).toBeGreaterThan(turnMs / 4)
    }
  })

  test('of a map end when the answer is full', () => {
    const extents = new Extents(true)
    expect(extents.report(4096, true)).toBe(true)
    expect(extents.report(4096, true)).toBe(true)
    expect(extents.report(4096, false)).toBe(false)
    expect(extents).toMatchObject({ full: true, lengths: [8192], states: [0] })
  })
})

describe('beside a hostile client another one is served at once', () => {
  const sizeBytes = 2 ** 32
  test.for([
    ['20,000 BLOCK_STATUS of 1 GiB', Command.BLOCK_STATUS, 20_000, 2 ** 30],
    ['9,000 TRIM of 1 GiB', Command.TRIM, 9000, 2 ** 30],
    ['9,000 WRITE_ZEROES of 1 GiB', Command.WRITE_ZEROES, 9000, 2 ** 30],
    ['100,000 CACHE', Command.CACHE, 100_000, 2 ** 20],
    ['100,000 unknown commands', 77, 100_000, 0],
  ] as const)('%s', async ([, type, count, length]) => {
    const device = memoryDevice({ sizeBytes, allocator: { allocate: () => shared } })
    const { address, server } = await serve({ exports: [{ device }], limits: { bytes: 2 ** 24 } })
    const hostile = await Client.ready(address, { status: true })
    hostile.socket.removeAllListeners('data').resume()
    const light = await Client.ready(address)
    const asked = (): number => {
      const counters = server.stats().children[0]!.counters
      return ['statuses', 'trims', 'zeroes', 'caches', 'errors'].reduce((sum, name) => sum + counters[name]!, 0)
    }
    const requests = Buffer.concat(Array.from({ length: count }, (_, n) => requestBytes(type, 0, length, BigInt(n))))
    hostile.send(requests)
    await until(() => asked() > 0)
    // Most of what it asked for is still to be done when the other one has its answers.
    for (let n = 0; n < 5; n++) expect((await light.read(0, 4096)).error).toBe(0)
    expect(asked()).toBeLessThan(count)
    hostile.socket.destroy()
    await until(() => server.stats().counters['connections'] === 1)
    expect((await light.read(0, 4096)).error).toBe(0)
    light.socket.destroy()
    await until(() => server.stats().counters['buffer_bytes'] === 0)
  })
})

/** 4 GiB that are 64 MiB: nothing here looks at what was written. */
const shared = new ArrayBuffer(64 * 2 ** 20)
