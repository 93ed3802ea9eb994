/** Memory by mmap: what is given back is the system's at once, and nobody reads what is not mapped. */
import { setImmediate } from 'node:timers/promises'
import type { Allocator, Pool } from '@tmem/core'
import { ByteLimit, compose, createAccounts, PutOutcome } from '@tmem/core'
import { afterEach, describe, expect, type TestContext, test, vi } from 'vitest'
import { mappedAllocator } from '../src/mapped.ts'
import { MemoryStore, memory } from '../src/memory.ts'
import { collectGarbage } from './garbage.mjs'

const MiB = 2 ** 20
const resident = (): number => process.memoryUsage.rss()

/** The allocator, or a skipped test that says why there is none. */
function mapped(ctx: TestContext): Required<Pick<Allocator, 'free'>> & Allocator {
  const { lacks, ...allocator } = mappedAllocator()
  if (allocator.free === undefined) ctx.skip(`needs mapped memory: ${lacks}`)
  return allocator as Required<Pick<Allocator, 'free'>> & Allocator
}

const touch = (memory: ArrayBufferLike): Uint8Array => new Uint8Array(memory).fill(7)

test('what is given back is the system’s at once, and zeroed when it is handed out again', (ctx) => {
  const allocator = mapped(ctx)
  const before = resident()
  const memories = Array.from({ length: 64 }, () => allocator.allocate(MiB, 'test')!)
  const views = memories.map(touch)
  expect(resident() - before).toBeGreaterThan(60 * MiB)
  for (const each of memories) allocator.free(each, 'test')
  expect(resident() - before).toBeLessThan(8 * MiB)
  // Who looks all the same sees zeros, and harms nobody who has other memory.
  expect(views.every((view) => view[0] === 0 && view[MiB - 1] === 0)).toBe(true)
  const again = Array.from({ length: 64 }, () => allocator.allocate(MiB, 'test')!)
  expect(new Set(again)).toEqual(new Set(memories))
  expect(new Uint8Array(again[63]!).every((byte) => byte === 0)).toBe(true)
  expect(memories).not.toContain(allocator.allocate(MiB, 'test'))
})

test('another size is other memory; small requests are the runtime’s', (ctx) => {
  const allocator = mapped(ctx)
  const large = allocator.allocate(2 * MiB, 'test')!
  allocator.free(large, 'test')
  expect(allocator.allocate(MiB, 'test')).not.toBe(large)
  expect(allocator.allocate(2 * MiB, 'test')).toBe(large)
  const small = allocator.allocate(4096, 'test')!
  touch(small)
  allocator.free(small, 'test')
  expect(new Uint8Array(small)[0]).toBe(7)
  const odd = allocator.allocate(100_001, 'test')!
  expect(odd.byteLength).toBe(100_001)
})

test('misuse: given back twice, and sent away', (ctx) => {
  const allocator = mapped(ctx)
  const memory = allocator.allocate(MiB, 'test')!
  let name = 'DataCloneError'
  try {
    // Copies it before Node 21, and throws since.
    structuredClone(memory, { transfer: [memory as ArrayBuffer] })
  } catch (error) {
    name = (error as Error).name
  }
  expect(name).toBe('DataCloneError')
  expect(memory.byteLength).toBe(MiB)
  allocator.free(memory, 'test')
  expect(() => allocator.free(memory, 'memory.chunk')).toThrow(
    new RangeError('memory was given back twice (memory.chunk)'),
  )
})

test('more than there is: no memory', (ctx) => {
  expect(mapped(ctx).allocate(2 ** 47, 'test')).toBeUndefined()
})

describe('what nobody can reach', () => {
  /** Collects garbage until so little is left. */
  const collect = async (before: number): Promise<void> => {
    for (let turns = 0; resident() - before > 16 * MiB && turns < 100; turns++) {
      collectGarbage()
      await setImmediate()
    }
    expect(resident() - before).toBeLessThan(16 * MiB)
  }

  test('goes back to the system with its allocator', async (ctx) => {
    const before = resident()
    const leave = (): void => {
      const allocator = mapped(ctx)
      for (let i = 0; i < 64; i++) touch(allocator.allocate(MiB, 'test')!)
    }
    leave()
    expect(resident() - before).toBeGreaterThan(60 * MiB)
    await collect(before)
  })

  test('and is handed out again, zeroed, where its allocator is there', async (ctx) => {
    const allocator = mapped(ctx)
    const before = resident()
    const leave = (): void => {
      for (let i = 0; i < 64; i++) touch(allocator.allocate(MiB, 'test')!)
    }
    leave()
    await collect(before)
    for (let i = 0; i < 64; i++) {
      const memory = new Uint8Array(allocator.allocate(MiB, 'test')!)
      expect(memory.every((byte) => byte === 0)).toBe(true)
      memory.fill(9)
    }
  })
})

describe('chunks that a store gives back', () => {
  const poolOf = (store: { newPool: MemoryStore['newPool'] | ReturnType<typeof compose>['newPool'] }): Pool => {
    const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: 4096 })
    if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
    return pool
  }
  const fill = (pool: Pool): void => {
    const page = Buffer.alloc(4096)
    for (let i = 0; i < 15_000; i++) {
      page.writeUInt32LE(i)
      expect(pool.put(0, i, page)).toBe(PutOutcome.Stored)
    }
  }

  test('memory alone', async (ctx) => {
    const limit = new ByteLimit(64 * MiB)
    const store = new MemoryStore(limit, { allocator: mapped(ctx), accounts: createAccounts() })
    const pool = poolOf(store)
    const before = resident()
    fill(pool)
    expect(resident() - before).toBeGreaterThan(50 * MiB)
    pool.flushObject(0)
    limit.bytes = 8 * MiB
    while (store.tick({ pages: 1000 }).pending);
    expect(resident() - before).toBeLessThan(20 * MiB)
    await store.close()
  })

  test('memory as a place', async (ctx) => {
    const limitBytes = new ByteLimit(64 * MiB)
    const store = compose([memory({ limitBytes }), memory({ limitBytes: 4 * MiB })], { allocator: mapped(ctx) })
    const pool = poolOf(store)
    const before = resident()
    fill(pool)
    expect(resident() - before).toBeGreaterThan(50 * MiB)
    for (let i = 0; i < 15_000; i++) if (i % 100 !== 0) pool.flushPage(0, i)
    limitBytes.bytes = 8 * MiB
    while (store.tick({ pages: 1000 }).pending);
    expect(resident() - before).toBeLessThan(20 * MiB)
    const into = Buffer.alloc(4096)
    for (let i = 0; i < 15_000; i += 100) {
      expect(pool.get(0, i, into)).toBe(0)
      expect(into.readUInt32LE()).toBe(i)
    }
    await store.close()
  })

  test('a store that closes gives all of them back', async (ctx) => {
    const allocator = mapped(ctx)
    const given = new Set<ArrayBufferLike>()
    const counting: Allocator = {
      allocate(bytes, site) {
        const memory = allocator.allocate(bytes, site)
        if (memory !== undefined && site === 'memory.chunk') given.add(memory)
        return memory
      },
      free(memory, site) {
        expect(given.delete(memory)).toBe(true)
        allocator.free(memory, site)
      },
    }
    for (const layers of [1, 2]) {
      const store = compose(
        Array.from({ length: layers }, () => memory({ limitBytes: 64 * MiB })),
        { allocator: counting },
      )
      fill(poolOf(store))
      expect(given.size).toBeGreaterThan(3)
      await store.close()
      expect(given.size).toBe(0)
    }
  })
})

describe('where it cannot be had', () => {
  afterEach(() => {
    vi.doUnmock('@tmem/core/runtime')
    vi.resetModules()
  })

  test('without koffi it is the runtime’s memory, and says so', async () => {
    vi.resetModules()
    const createRequire = () => (): never => {
      throw new Error("Cannot find module 'koffi'\nRequire stack: somewhere")
    }
    vi.doMock('@tmem/core/runtime', () => ({
      builtin: (name: string) => (name === 'node:module' ? { createRequire } : process.getBuiltinModule(name)),
    }))
    const { mappedAllocator: without } = await import('../src/mapped.ts')
    const allocator = without()
    expect(allocator.lacks).toBe("memory cannot be mapped: Cannot find module 'koffi'")
    expect(typeof allocator.free).toBe('undefined')
    expect(allocator.allocate(MiB, 'test')!.byteLength).toBe(MiB)
  })
})
