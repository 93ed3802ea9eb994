import { existsSync, readdirSync, readlinkSync } from 'node:fs'
import type { Capabilities, Layer, LayerContext, PageStore, Pool, PoolAttributes } from '@tmem/core'
import { compose, GetOutcome, PutOutcome, systemAllocator } from '@tmem/core'
import { delay, failingAllocator, refuse, slowMemory, TraceLog, trace } from '@tmem/faults'
import { afterAll, describe, expect, test } from 'vitest'
import { everyAllocation, makePage, type Workload } from '../src/index.ts'
import { type ReferenceContents, ReferencePool, ReferenceStore, referenceCapabilities } from '../src/reference.ts'
import { countersOf, layers, swapFolder } from './subjects.ts'

const folder = swapFolder()
afterAll(() => folder.remove())

/** Files of the folder that this process has open, where the system tells. */
function openFiles(): string[] {
  if (!existsSync('/proc/self/fd')) return []
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      const target = readlinkSync(`/proc/self/fd/${fd}`)
      return target.includes('tmem-conformance-') ? [target] : []
    } catch (error) {
      // The descriptor of the listing itself is gone by now.
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return []
      throw error
    }
  })
}

const turn = (): Promise<void> => Promise.resolve()
const slow = (): Layer => slowMemory({ sizeBytes: 2 ** 21, turn })
const file = folder.file()
const swap = (): Layer => layers.frontswap(file, 2 ** 20)

interface StackOfSites {
  readonly name: string
  readonly stack: () => Layer[]
  /** Sites that must be among those tried. */
  readonly sites: readonly string[]
}

const stacks: readonly StackOfSites[] = [
  { name: 'memory', stack: () => [layers.memory(300_000)], sites: ['memory.'] },
  {
    name: 'memory over memory',
    stack: () => [layers.memory(200_000), layers.memory(600_000)],
    sites: ['memory.', 'chain.'],
  },
  { name: 'zcache', stack: () => [layers.zcache(400_000)], sites: ['zcache.', 'chain.'] },
  {
    name: 'zcache over memory',
    stack: () => [layers.zcache(300_000), layers.memory(600_000)],
    sites: ['zcache.', 'memory.'],
  },
  { name: 'frontswap', stack: () => [swap()], sites: ['frontswap.'] },
  { name: 'zcache over frontswap', stack: () => [layers.zcache(300_000), swap()], sites: ['zcache.', 'frontswap.'] },
  { name: 'slow memory', stack: () => [slow()], sites: ['chain.'] },
  {
    name: 'zcache over filters over slow memory over filters over frontswap',
    stack: () => [layers.zcache(300_000), refuse({ every: 5 }), slow(), delay({ turn }), swap()],
    sites: ['zcache.', 'chain.', 'frontswap.'],
  },
  {
    name: 'zcache over memory over frontswap',
    stack: () => [layers.zcache(300_000), layers.memory(200_000), swap()],
    sites: ['zcache.', 'memory.', 'frontswap.'],
  },
  {
    name: 'fault layers over memory',
    stack: () => [
      trace({ log: new TraceLog({ operations: 16 }) }),
      delay({ turn, pages: 1024 }),
      refuse({ every: 7 }),
      layers.memory(300_000),
    ],
    sites: ['delay.', 'refuse.', 'memory.'],
  },
]

describe('every allocation fails once, and no byte is lost:', () => {
  test.each(stacks)('$name', async ({ stack, sites }) => {
    const report = await everyAllocation((context) => compose(stack(), { ...context, check: 'model' }), undefined, {
      afterRun: async () => {
        // A stack that could not open tells what was open already to close, and does not wait for it.
        for (let i = 0; i < 100 && openFiles().length > 0; i++) await new Promise((resolve) => setImmediate(resolve))
        expect(openFiles()).toEqual([])
        expect(folder.files()).toEqual([])
      },
    })
    const seen = [...report.sites.keys()]
    for (const prefix of sites) expect(seen.filter((site) => site.startsWith(prefix))).not.toEqual([])
    const requests = [...report.sites.values()].reduce((sum, count) => sum + count, 0)
    expect(report.runs).toBeGreaterThanOrEqual(requests + report.sites.size)
    // A layer that reserves at the start does not open; one that asks later lets pages take the regular way.
    expect(report.notOpened + report.fellBack).toBeGreaterThan(0)
  })
})

describe('without memory in zcache a page takes the regular way:', () => {
  const pages = Array.from({ length: 20 }, (_, i) => makePage('text', i, 4096))

  test('swap: it goes to the swap file, and comes back from there', async () => {
    const allocator = failingAllocator(systemAllocator)
    const store = compose([layers.zcache(300_000), swap()], { allocator, check: 'model' })
    const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
    if (typeof pool === 'number') throw new Error('no pool')
    allocator.fail('all')
    for (const [i, page] of pages.entries()) expect(pool.put(1, i, page)).toBe(PutOutcome.Stored)
    expect(allocator.failures).toBeGreaterThan(0)
    expect(countersOf(store, 'frontswap')).toMatchObject([{ pages: pages.length, used_slots: pages.length }])
    for (const [i, page] of pages.entries()) {
      const into = new Uint8Array(4096)
      expect(pool.get(1, i, into)).toBe(GetOutcome.Deferred)
      expect(await pool.fetch(1, i, into)).toBe(GetOutcome.Hit)
      expect(into).toEqual(page)
    }
    await store.close()
  })

  test('page cache: it is really freed', async () => {
    const allocator = failingAllocator(systemAllocator)
    const store = compose([layers.zcache(300_000)], { allocator, check: 'model' })
    const pool = store.newPool({ client: 1, persistent: false, shared: false, pageSize: 4096 })
    if (typeof pool === 'number') throw new Error('no pool')
    allocator.fail('all')
    for (const [i, page] of pages.entries()) expect(pool.put(1, i, page)).toBe(PutOutcome.AllocationFailed)
    for (const i of pages.keys()) expect(pool.get(1, i, new Uint8Array(4096))).toBe(GetOutcome.Miss)
    allocator.fail('none')
    expect(pool.put(1, 0, pages[0]!)).toBe(PutOutcome.Stored)
    await store.close()
  })
})

describe('the driver itself notices', () => {
  /** A reference store for persistent pages with something changed in its pools. */
  const changed =
    (change: (pool: ReferencePool) => void) =>
    (context: LayerContext): PageStore => {
      class Changed extends ReferenceStore {
        override readonly capabilities: Capabilities = Object.freeze({ ...referenceCapabilities, ephemeral: false })
        override poolOf(contents: ReferenceContents, attributes: PoolAttributes): Pool {
          const pool = new ReferencePool(this, contents, attributes)
          change(pool)
          return pool
        }
      }
      return new Changed(context)
    }
  const sound = ReferencePool.prototype

  test('an older page after a refused put', async () => {
    const open = changed((pool) => {
      pool.put = (object, index, page) => {
        const into = new Uint8Array(page.length)
        const held = pool.lend(object, index, (bytes) => into.set(bytes)) === GetOutcome.Hit
        const outcome = sound.put.call(pool, object, index, page)
        if (held && outcome === PutOutcome.AllocationFailed) sound.put.call(pool, object, index, into)
        return outcome
      }
    })
    await expect(everyAllocation(open)).rejects.toThrow('is there after a refused put')
  })

  test('a lost page', async () => {
    const open = changed((pool) => {
      pool.put = (object, index, page) => {
        const outcome = sound.put.call(pool, object, index, page)
        return outcome === PutOutcome.AllocationFailed ? PutOutcome.Stored : outcome
      }
    })
    await expect(everyAllocation(open)).rejects.toThrow('is lost')
  })

  test('a charge that is not given back', async () => {
    const open = (context: LayerContext): PageStore => {
      class Forgetful extends ReferenceStore {
        override async close(): Promise<void> {
          this.closed = true
        }
      }
      return new Forgetful(context)
    }
    const workload: Workload = async (store) => {
      const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
      if (typeof pool === 'number') throw new Error('no pool')
      return pool.put(1, 0, makePage('text', 1, 4096)) === PutOutcome.Stored
        ? { stored: 1, regular: 0 }
        : { stored: 0, regular: 1 }
    }
    await expect(everyAllocation(open, workload)).rejects.toThrow('4096 bytes are still charged to client 1')
  })

  test('that there was nothing to fail', async () => {
    const open = (): PageStore => compose([layers.zcache(400_000)])
    await expect(everyAllocation(open)).rejects.toThrow('nothing was allocated')
  })

  test('an exception where a refusal is due', async () => {
    const open = changed((pool) => {
      pool.put = (object, index, page) => {
        const outcome = sound.put.call(pool, object, index, page)
        if (outcome === PutOutcome.AllocationFailed) throw new Error('out of memory')
        return outcome
      }
    })
    await expect(everyAllocation(open)).rejects.toThrow('out of memory')
  })
})
