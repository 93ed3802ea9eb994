/** Limits that follow the host: what the host says is made up. */
import { compose, type Layer, type MemoryPlace, type PageStore, parseStack, planStack } from '@tmem/core'
import { describe, expect, test } from 'vitest'
import { layerFactories } from '../src/layers.ts'
import { AutoMemory } from '../src/serve/memory.ts'

const MiB = 2 ** 20

/** A host without control groups, whose free memory can be changed; in KiB, as it says it. */
function host(availableBytes: number): { read: (path: string) => string | undefined; has: (bytes: number) => void } {
  let available = availableBytes
  return {
    read: (path) => (path === '/proc/meminfo' ? `MemTotal: 1 kB\nMemAvailable:  ${available / 1024} kB\n` : undefined),
    has: (bytes) => {
      available = bytes
    },
  }
}

const limitsOf = (store: PageStore): number[] => {
  const chain = store.stats()
  return chain.children
    .filter(({ counters }) => 'limit_bytes' in counters)
    .map(({ counters }) => counters['limit_bytes']!)
}

describe('limit=auto', () => {
  const opened = (auto: AutoMemory, text: string): PageStore => {
    const layers: Layer[] = parseStack(text, auto.factories(layerFactories))
    auto.begin()
    return compose(layers)
  }

  test('the limit begins at the floor, grows by a 32nd of the ceiling in a second, and stops at the ceiling', async () => {
    const { read } = host(1024 * MiB)
    const auto = new AutoMemory('auto,floor=8MiB,ceiling=64MiB,reserve=16MiB', read)
    const store = opened(auto, 'zcache(limit=auto) > memory(limit=1MiB)')
    expect(limitsOf(store)[0]).toBe(8 * MiB)
    const seen: number[] = []
    for (let second = 0; second <= 40; second++) {
      expect(auto.step(second * 1000)).toBe(false)
      seen.push(limitsOf(store)[0]! / MiB)
    }
    expect(seen.slice(0, 4)).toEqual([8, 10, 12, 14])
    expect(seen.at(-1)).toBe(64)
    // The other limit is as it was given.
    expect(limitsOf(store)[1]).toBe(MiB)
    await store.close()
  })

  test('when the host has less, it says that somebody should tick, and pages go', async () => {
    const { read, has } = host(1024 * MiB)
    const auto = new AutoMemory('auto,floor=1MiB,ceiling=8MiB,reserve=1MiB', read)
    const store = opened(auto, 'zcache() > memory(limit=16MiB)')
    for (let second = 0; second < 60; second++) auto.step(second * 1000)
    expect(limitsOf(store)[0]).toBe(8 * MiB)
    const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: 4096 })
    if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
    let state = 1
    const page = Buffer.alloc(4096)
    const fill = (n: number): Buffer => {
      state = n + 1
      for (let i = 0; i < 4096; i++) {
        state = (Math.imul(state, 1664525) + 1013904223) >>> 0
        page[i] = state >>> 24
      }
      return page
    }
    for (let n = 0; n < 1500; n++) pool.put(0, n, fill(n))
    expect(store.usage!().places[0]!.pages).toBe(1500)
    has(0)
    expect(auto.step(61_000)).toBe(true)
    expect(limitsOf(store)[0]).toBeLessThan(6.5 * MiB)
    const before = store.usage!().places[0]!.usedBytes
    for (let n = 0; n < 200; n++) store.tick({ pages: 64 })
    const { pages, usedBytes } = store.usage!().places[0]!
    expect(pages).toBeLessThan(1500)
    expect(usedBytes).toBeLessThan(before)
    const into = Buffer.alloc(4096)
    for (let n = 0; n < 1500; n++) {
      expect(pool.get(0, n, into)).toBe(0)
      expect(into.equals(fill(n))).toBe(true)
    }
    await store.close()
  })

  test('several share one budget', () => {
    const { read } = host(1024 * MiB)
    const auto = new AutoMemory('auto,floor=8MiB,ceiling=64MiB', read)
    const factories = auto.factories(layerFactories)
    const stacks = ['zcache() > memory(limit=auto)', 'zcache(limit=auto,codec=lz4js) > memory(limit=1MiB)'].map(
      (text) => compose(parseStack(text, factories)),
    )
    auto.begin()
    const sum = (): number => stacks.flatMap(limitsOf).reduce((all, bytes) => all + bytes, 0)
    const third = Math.floor((8 * MiB) / 3)
    expect(stacks.flatMap(limitsOf)).toEqual([third, third, third, MiB])
    for (let second = 0; second < 100; second++) {
      auto.step(second * 1000)
      expect(sum() - MiB).toBeLessThanOrEqual(64 * MiB)
    }
    expect(sum() - MiB).toBeGreaterThan(63.9 * MiB)
  })

  test('without settings the ceiling is half of what the host has; nothing of it counts as room', () => {
    const { read } = host(100 * MiB)
    const auto = new AutoMemory(undefined, read)
    const layers = parseStack(
      'zcache(limit=auto) > memory(limit=auto) > memory(limit=1MiB)',
      auto.factories(layerFactories),
    )
    auto.begin()
    const plan = planStack(layers)
    expect(plan.reservedBytes).toBe(
      planStack(parseStack('zcache(limit=1MiB) > memory(limit=1MiB)', layerFactories)).reservedBytes,
    )
    const place = layers[0]!.place!.open({
      allocator: { allocate: (bytes) => new ArrayBuffer(bytes) },
      accounts: never,
    })
    for (let second = 0; second < 60; second++) auto.step(second * 1000)
    expect((place as MemoryPlace).limitBytes).toBeGreaterThan(22 * MiB)
    expect((place as MemoryPlace).limitBytes).toBeLessThanOrEqual(25 * MiB)
  })

  test.each([
    ['auto', 'memory(limit=1MiB)', /needs a zcache or memory without a limit/],
    ['auto,ceiling=1MiB', 'zcache() > memory()', /ceiling=1048576 is too small: 2 places need at least 2097152 bytes/],
    ['auto,floor=2MiB,ceiling=1MiB', 'zcache()', /floorBytes must be from 0 to 1048576/],
  ])('%s over %s makes no sense', (text, stack, message) => {
    const auto = new AutoMemory(text, host(1024 * MiB).read)
    parseStack(stack, auto.factories(layerFactories))
    expect(() => auto.begin()).toThrow(message)
  })

  test.each([
    '',
    'on',
    'auto,',
    'auto,floor',
    'auto,floor=',
    'auto,floor=x',
    'auto,floor=1MiB,floor=1MiB',
    'auto,ceiling=0',
  ])('--memory %s is no such setting', (text) => {
    expect(() => new AutoMemory(text, host(1).read)).toThrow(/^bad --memory/)
  })

  test('a host that says nothing has no limit that follows it', () => {
    const auto = new AutoMemory(undefined, () => undefined)
    expect(() => parseStack('zcache(limit=auto)', auto.factories(layerFactories))).toThrow(
      /does not say how much memory/,
    )
    expect(() => parseStack('zcache(limit=nonsense)', auto.factories(layerFactories))).toThrow(
      /expected an amount of bytes \(such as .*\) or auto for limit, got "nonsense"/,
    )
    expect(() => parseStack('zcache()', auto.factories(layerFactories))).toThrow(/zcache needs the option limit/)
  })
})

const never = { of: () => ({ weight: 0, charge: () => true, release: () => undefined }) }
