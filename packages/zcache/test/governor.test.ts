/** The governor by simulation: a host with a hog beside a store that obeys its budget. */
import { ByteLimit } from '@tmem/core'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { random } from '../../../tools/random.ts'
import { Decision, Governor, type HostMemory, memoryLimits, readHostMemory } from '../src/index.ts'
import { MiB, newPool, noisyPage, open, settle } from './pages.ts'

const { Hold, Grow, Lower, Shrink } = Decision

/** A machine of `total` bytes: what the hog and the pool do not have is available; waiting begins below 5 %. */
class Host {
  readonly total: number
  hog = 0
  pool = 0
  /** Times that there was nothing left: the out-of-memory killer would have come. */
  kills = 0

  constructor(total: number) {
    this.total = total
  }

  memory(): HostMemory {
    const availableBytes = this.total - this.hog - this.pool
    if (availableBytes < 0) this.kills++
    const share = availableBytes / this.total
    return { availableBytes: Math.max(0, availableBytes), pressurePercent: share < 0.05 ? (1 - share / 0.05) * 100 : 0 }
  }
}

/** Runs a pool that always wants more against a hog, ten steps a second; returns the budgets. */
function simulate(
  host: Host,
  seconds: number,
  hog: (second: number) => number,
): { budgets: number[]; decisions: Decision[]; governor: Governor } {
  const limit = new ByteLimit(512 * MiB)
  const governor = new Governor({ limit, floorBytes: 16 * MiB, reserveBytes: 128 * MiB })
  const budgets: number[] = []
  const decisions: Decision[] = []
  for (let step = 0; step < seconds * 10; step++) {
    host.hog = hog(step / 10)
    decisions.push(governor.step(step * 100, host.pool, host.memory()))
    budgets.push(limit.bytes)
    // The pool fills at 64 MiB per second and gives back at 2 GiB per second.
    if (host.pool > limit.bytes) host.pool = Math.max(limit.bytes, host.pool - 200 * MiB)
    else host.pool = Math.min(limit.bytes, host.pool + 6.4 * MiB)
  }
  return { budgets, decisions, governor }
}

test('on a quiet host the budget grows slowly to its ceiling and stays there', () => {
  const { budgets, decisions, governor } = simulate(new Host(4096 * MiB), 60, () => 0)
  expect(budgets[0]).toBe(16 * MiB)
  expect(budgets.at(-1)).toBe(512 * MiB)
  // A 32nd of the ceiling per second.
  expect(Math.abs(budgets[100]! - budgets[90]! - 16 * MiB)).toBeLessThan(100)
  expect(governor.shrinks).toBe(0)
  expect(new Set(decisions)).toEqual(new Set([Hold, Grow]))
})

test('a hog that grows fast gets its memory: no kill, and the reserve is kept', () => {
  const host = new Host(1024 * MiB)
  // Quiet for 40 s, then 100 MiB per second up to 700 MiB, locked, for good.
  const { budgets, governor } = simulate(host, 120, (second) => Math.min(700, Math.max(0, (second - 40) * 100)) * MiB)
  expect(host.kills).toBe(0)
  expect(Math.max(...budgets)).toBe(512 * MiB)
  expect(governor.shrinks).toBeGreaterThan(0)
  // 1024 - 700 - 128
  expect(budgets.at(-1)).toBe(196 * MiB)
  // No oscillation: once it has come down it does not move.
  expect(new Set(budgets.slice(600))).toEqual(new Set([196 * MiB]))
})

test('a hog that comes and goes makes the budget follow with hysteresis, never to and fro', () => {
  const host = new Host(1024 * MiB)
  const { budgets } = simulate(host, 200, (second) =>
    // It takes a GiB per second.
    second < 55 ? Math.min(600, 100 + Math.max(0, second - 50) * 1000) * MiB : 100 * MiB,
  )
  expect(host.kills).toBe(0)
  let turns = 0
  for (let i = 2, direction = 0; i < budgets.length; i++) {
    const now = Math.sign(budgets[i]! - budgets[i - 1]!)
    if (now !== 0 && now !== direction) {
      if (direction !== 0) turns++
      direction = now
    }
  }
  expect(turns).toBe(2)
  expect(budgets.at(-1)).toBe(512 * MiB)
  // It held for ten seconds after it had shrunk, though the hog was gone after five.
  expect(budgets[590]).toBe(budgets[540])
  expect(budgets[650]).toBeGreaterThan(budgets[540]!)
})

test('noise of a few MiB does not move the budget', () => {
  const host = new Host(700 * MiB)
  const next = random(3)
  const { budgets, governor } = simulate(host, 200, () => (300 + next() * 8) * MiB)
  const late = budgets.slice(1000)
  expect(Math.max(...late) - Math.min(...late)).toBeLessThan(9 * MiB)
  expect(governor.grows).toBeLessThan(400)
  expect(host.kills).toBe(0)
})

test('pressure alone shrinks the pool, by an eighth per second, to the floor and no further', () => {
  const limit = new ByteLimit(512 * MiB)
  const governor = new Governor({ limit, floorBytes: 16 * MiB })
  const host = { availableBytes: 8192 * MiB, pressurePercent: 40 }
  limit.bytes = 512 * MiB
  expect(governor.step(0, 512 * MiB, host)).toBe(Hold)
  expect(governor.step(1000, 512 * MiB, host)).toBe(Shrink)
  expect(limit.bytes).toBe(448 * MiB)
  for (let second = 2; second < 60; second++) governor.step(second * 1000, limit.bytes, host)
  expect(limit.bytes).toBe(16 * MiB)
  // Below the high mark, above the low one: it waits.
  expect(governor.step(60_000, 16 * MiB, { availableBytes: 8192 * MiB, pressurePercent: 5 })).toBe(Hold)
  expect(governor.step(65_000, 16 * MiB, { availableBytes: 8192 * MiB, pressurePercent: 0 })).toBe(Hold)
  expect(governor.step(71_000, 16 * MiB, { availableBytes: 8192 * MiB, pressurePercent: 0 })).toBe(Grow)
})

test('permission to grow is taken away before the pool has used it', () => {
  const limit = new ByteLimit(512 * MiB)
  const governor = new Governor({ limit, floorBytes: 0, reserveBytes: 0 })
  limit.bytes = 512 * MiB
  expect(governor.step(0, 100 * MiB, { availableBytes: 50 * MiB, pressurePercent: 0 })).toBe(Lower)
  expect(limit.bytes).toBe(150 * MiB)
  expect(governor.shrinks).toBe(0)
})

test('whatever the host says, the budget stays between floor and ceiling and never above the room', () => {
  const step = fc.record({
    ms: fc.nat(5000),
    used: fc.nat(600 * MiB),
    available: fc.nat(4096 * MiB),
    pressure: fc.integer({ min: 0, max: 100 }),
  })
  fc.assert(
    fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
      const limit = new ByteLimit(512 * MiB)
      const governor = new Governor({ limit, floorBytes: 16 * MiB, reserveBytes: 64 * MiB })
      let now = 0
      for (const { ms, used, available, pressure } of steps) {
        const before = limit.bytes
        now += ms
        const decision = governor.step(now, used, { availableBytes: available, pressurePercent: pressure })
        const room = Math.max(16 * MiB, used + available - 64 * MiB)
        expect(limit.bytes).toBeLessThanOrEqual(Math.min(512 * MiB, room))
        expect(limit.bytes).toBeGreaterThanOrEqual(16 * MiB)
        expect(limit.bytes - before).toBeLessThanOrEqual(16 * MiB * (ms / 1000))
        expect(decision === Grow).toBe(limit.bytes > before)
        expect(decision === Lower || decision === Shrink).toBe(limit.bytes < before)
      }
    }),
    { numRuns: 200, seed: 5 },
  )
})

test('a store under the governor gives its memory back by ticks, and takes it again', () => {
  const limitBytes = new ByteLimit(8 * MiB)
  const governor = new Governor({
    limit: limitBytes,
    floorBytes: MiB,
    reserveBytes: 0,
    growBytesPerSecond: 8 * MiB,
    holdMs: 0,
  })
  const stack = open({ limitBytes })
  const pool = newPool(stack, 'cache')
  const used = (): number => stack.counters()['used_bytes']!
  let index = 0
  const run = (second: number, availableBytes: number): void => {
    governor.step(second * 1000, used(), { availableBytes, pressurePercent: 0 })
    for (let i = 0; i < 2000; i++) pool.put(0, index++, noisyPage(index, 0.5))
    settle(stack, 64)
  }
  for (let second = 0; second < 3; second++) run(second, 64 * MiB)
  expect(used()).toBeGreaterThan(6 * MiB)
  run(3, 0)
  run(4, 0)
  limitBytes.bytes = MiB
  settle(stack, 64)
  expect(used()).toBeLessThanOrEqual(MiB)
  stack.check()
  for (let second = 6; second < 9; second++) run(second, 64 * MiB)
  expect(used()).toBeGreaterThan(6 * MiB)
})

test('settings that make no sense are refused', () => {
  const limit = new ByteLimit(MiB)
  for (const options of [
    { floorBytes: 2 * MiB },
    { reserveBytes: -1 },
    { highPressurePercent: 101 },
    { lowPressurePercent: 50 },
  ])
    expect(() => new Governor({ limit, ...options })).toThrow(RangeError)
})

const files = (tree: Record<string, string>) => (path: string) => tree[path]

test('reads a host without groups', () => {
  expect(
    readHostMemory(
      files({
        '/proc/meminfo': 'MemTotal:       24684092 kB\nMemFree:        100 kB\nMemAvailable:   16752668 kB\n',
        '/proc/pressure/memory':
          'some avg10=12.50 avg60=3.00 avg300=0.00 total=5\nfull avg10=1.00 avg60=0.00 avg300=0.00 total=0\n',
      }),
    ),
  ).toEqual({ availableBytes: 16_752_668 * 1024, pressurePercent: 12.5 })
  expect(readHostMemory(files({}))).toBeUndefined()
})

test('reads version 2 groups: the tightest limit on the way up, and the group’s own pressure', () => {
  const tree = {
    '/proc/meminfo': 'MemAvailable:   1000000 kB\n',
    '/proc/self/cgroup': '0::/box/job\n',
    '/proc/pressure/memory': 'some avg10=90.00 avg60=0 avg300=0 total=0\n',
    '/sys/fs/cgroup/box/job/memory.max': 'max\n',
    '/sys/fs/cgroup/box/job/memory.current': '5000\n',
    '/sys/fs/cgroup/box/job/memory.pressure': 'some avg10=2.00 avg60=0.00 avg300=0.00 total=0\n',
    '/sys/fs/cgroup/box/memory.max': '100000\n',
    '/sys/fs/cgroup/box/memory.current': '70000\n',
    '/sys/fs/cgroup/box/memory.stat': 'anon 1\ninactive_file 20000\nactive_file 7\n',
  }
  expect(readHostMemory(files(tree))).toEqual({ availableBytes: 50_000, pressurePercent: 2 })
  expect([...memoryLimits(files(tree))]).toEqual([{ group: '/box', limitBytes: 100_000, leftBytes: 50_000 }])
})

test('reads version 1 groups, also where only the root is visible', () => {
  const tree = {
    '/proc/meminfo': 'MemAvailable:   1000000 kB\n',
    '/proc/self/cgroup': '9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/\n',
    '/sys/fs/cgroup/memory/memory.limit_in_bytes': '80000\n',
    '/sys/fs/cgroup/memory/memory.usage_in_bytes': '90000\n',
    '/sys/fs/cgroup/memory/memory.stat': 'total_inactive_file 15000\n',
  }
  expect(readHostMemory(files(tree))).toEqual({ availableBytes: 5000, pressurePercent: 0 })
  expect([...memoryLimits(files(tree))]).toEqual([{ group: '/', limitBytes: 80_000, leftBytes: 5000 }])
  // What version 1 shows where there is no limit.
  const none = { ...tree, '/sys/fs/cgroup/memory/memory.limit_in_bytes': '9223372036854771712\n' }
  expect([...memoryLimits(files(none))]).toEqual([])
})
