/**
 * Our own front ends through raw hypercalls: the store conforms, `Frontswap` keeps its pages in it, and a page cache
 * its second chance.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Cleancache } from '@tmem/cleancache'
import { conformance } from '@tmem/conformance'
import {
  compose,
  GetOutcome,
  type Layer,
  type PageStore,
  type Pool,
  PoolRefusal,
  PutOutcome,
  systemAllocator,
} from '@tmem/core'
import { delay } from '@tmem/faults'
import { Frontswap, frontswap, SwapArea, swapOffset } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { PageCache, pageCacheFacts } from '@tmem/page-cache'
import { zcache } from '@tmem/zcache'
import fc from 'fast-check'
import { afterAll, describe, expect, it, test } from 'vitest'
import {
  type Bits,
  type Domain,
  GuestMemory,
  HypercallStore,
  LinuxGuest,
  linuxCleancache,
  type Release,
  XenHost,
} from '../src/index.ts'

const MiB = 2 ** 20
const folder = mkdtempSync(join(tmpdir(), 'tmem-xen-'))
afterAll(() => rmSync(folder, { recursive: true }))
let files = 0
const path = (name: string): string => join(folder, `${name}${files++}`)

function domainOf(host: XenHost, id = 1, bits: Bits = 64): Domain {
  return host.addDomain({ id, memory: new GuestMemory(new Uint8Array(24 * 4096)), bits })
}

/** A store over hypercalls that takes its host along when it is closed. */
class Closing extends HypercallStore {
  readonly #host: XenHost

  constructor(host: XenHost, bits: Bits) {
    super(host, domainOf(host, 1, bits), 1)
    this.#host = host
  }

  override async close(): Promise<void> {
    await super.close()
    this.#host.close()
    await this.#host.store.close()
  }
}

const inFile = (): Layer[] => [
  zcache({ limitBytes: 256 * 1024 }),
  frontswap({ file: path('swap'), sizeBytes: 4 * MiB }),
]
const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
const slow = (): Layer[] => [delay({ turn }), memory({ limitBytes: 4 * MiB })]
const stacks: readonly {
  name: string
  release: Release
  bits: Bits
  layers: () => Layer[]
  bytes: number
  /**
   * Ephemeral pages may go: a pool that is frozen asks for them by a get, which a host that waits has done too late.
   */
  steady?: false
}[] = [
  { name: 'plain memory', release: '4.9', bits: 64, layers: () => [memory({ limitBytes: 4 * MiB })], bytes: 5 * MiB },
  { name: 'zcache', release: '4.2', bits: 32, layers: () => [zcache({ limitBytes: 4 * MiB })], bytes: 80 * MiB },
  { name: 'what always waits', release: '4.9', bits: 32, layers: slow, bytes: 5 * MiB, steady: false },
  { name: 'zcache over a file', release: '4.9', bits: 64, layers: inFile, bytes: 80 * MiB },
]
const refused = 'PUT_PAGE is answered -ENOMEM, whatever the host has too little of'
for (const { name, release, bits, layers, bytes, steady = true } of stacks)
  await conformance(
    {
      name: `hypercalls of ${release}, ${bits} bits, over ${name}`,
      open: async (context) => {
        const store = compose(layers(), { ...context, check: 'model' })
        await store.ready?.()
        return new Closing(new XenHost({ store, release }), bits)
      },
      manifest: {
        steady,
        property: { runs: 20 },
        refusals: { NoMemory: { by: 'filling', bytes }, Quota: refused, AllocationFailed: refused },
      },
    },
    { describe, it },
  )

const attributes = { client: 1, persistent: true, shared: false, pageSize: 4096 }
/** Not all of one word, which would rest in no place. */
const pageOf = (fill: number): Uint8Array => new Uint8Array(4096).fill(fill).fill(fill ^ 0xff, 0, 1)

function poolIn(store: PageStore, more: Partial<typeof attributes> = {}): Pool {
  const pool = store.newPool({ ...attributes, ...more })
  if (typeof pool === 'number') throw new Error(`no pool: ${pool}`)
  return pool
}

test('a domain has 16 pools, shared with its shims; another one is refused', () => {
  const host = new XenHost({ store: compose([zcache({ limitBytes: MiB })]) })
  const domain = domainOf(host)
  const shims = new LinuxGuest(host, domain, 1)
  const store = new HypercallStore(host, domain, 4)
  expect(shims.frontswapInit()).toBe(true)
  const pools = Array.from({ length: 15 }, () => poolIn(store))
  expect(store.newPool(attributes)).toBe(PoolRefusal.NoSlot)
  pools[3]!.destroy()
  expect(poolIn(store).put(1, 1, pageOf(1))).toBe(PutOutcome.Stored)
  expect(shims.frontswapLoad(0, 1, pageOf(0))).toBe(GetOutcome.Miss)
  expect(() => new HypercallStore(host, domain, 9)).toThrow('the guest has no frames 9 to 24')
})

test('an object id for which 4.0.0 has no room is refused, and names no other', () => {
  const host = new XenHost({ store: compose([zcache({ limitBytes: MiB })]), release: '4.0.0' })
  const pool = poolIn(new HypercallStore(host, domainOf(host), 1))
  expect(pool.put(5, 1, pageOf(1))).toBe(PutOutcome.Stored)
  for (const object of [2n ** 64n + 5n, 2n ** 191n, 2n ** 64n - 1n])
    expect(pool.put(object, 1, pageOf(2))).toBe(PutOutcome.NoMemory)
  expect(pool.get(2n ** 64n + 5n, 1, pageOf(0))).toBe(GetOutcome.Miss)
  pool.flushObject(2n ** 64n + 5n)
  const into = new Uint8Array(4096)
  expect(pool.get(5, 1, into)).toBe(GetOutcome.Hit)
  expect(into).toEqual(pageOf(1))
})

/** A pool of a guest whose host waits for every page that it has, and for its turn. */
function waiting(persistent: boolean): {
  readonly host: XenHost
  readonly store: HypercallStore
  readonly pool: Pool
} {
  const host = new XenHost({ store: compose(slow()) })
  const store = new HypercallStore(host, domainOf(host), 1)
  const pool = poolIn(store, { persistent })
  for (const object of [1, 2, 3, 4]) expect(pool.put(object, 0, pageOf(object))).toBe(PutOutcome.Stored)
  return { host, store, pool }
}

async function turns(): Promise<void> {
  for (let n = 0; n < 5; n++) await turn()
}

describe('while a get is waited for', () => {
  test('a put, a flush and a new pool are not answered with what was there before', async () => {
    const { host, store, pool } = waiting(true)
    const into = new Uint8Array(4096)
    // The answer of each get is there before anything changes, or is not.
    expect(pool.get(1, 0, into)).toBe(GetOutcome.Deferred)
    await turns()
    expect(pool.put(1, 0, pageOf(9))).toBe(PutOutcome.Stored)
    expect(await pool.fetch(1, 0, into)).toBe(GetOutcome.Hit)
    expect(into).toEqual(pageOf(9))
    expect(pool.get(4, 0, into)).toBe(GetOutcome.Deferred)
    expect(pool.put(4, 0, pageOf(8))).toBe(PutOutcome.Stored)
    expect(await pool.fetch(4, 0, into)).toBe(GetOutcome.Hit)
    expect(into).toEqual(pageOf(8))
    expect(pool.get(2, 0, into)).toBe(GetOutcome.Deferred)
    await turns()
    pool.flushObject(2)
    expect(await pool.fetch(2, 0, into)).toBe(GetOutcome.Miss)
    expect(pool.get(3, 0, into)).toBe(GetOutcome.Deferred)
    await turns()
    pool.destroy()
    // Its number is given out again.
    const later = poolIn(store)
    expect(await later.fetch(3, 0, into)).toBe(GetOutcome.Miss)
    expect(later.put(3, 0, pageOf(7))).toBe(PutOutcome.Stored)
    expect(await later.fetch(3, 0, into)).toBe(GetOutcome.Hit)
    expect(into).toEqual(pageOf(7))
    expect(host.clients.get(1)!.slots.findIndex((one) => one !== undefined)).toBe(0)
  })

  test('fetches take turns, each with its own page; one that ends early leaves its buffer alone', async () => {
    const { pool } = waiting(false)
    const pages = Array.from({ length: 5 }, () => new Uint8Array(4096))
    await expect(pool.fetch(1, 0, pages[0]!, AbortSignal.abort(new Error('enough')))).rejects.toThrow('enough')
    const late = new AbortController()
    const ended = pool.fetch(4, 0, pages[4]!, late.signal)
    const fetching = Promise.all([1, 2, 3, 3].map((object, n) => pool.fetch(object, 0, pages[n]!)))
    late.abort(new Error('too late'))
    await expect(ended).rejects.toThrow('too late')
    const [first, second, ...third] = await fetching
    expect([first, second]).toEqual([GetOutcome.Hit, GetOutcome.Hit])
    expect(pages.slice(0, 2)).toEqual([pageOf(1), pageOf(2)])
    // A private ephemeral page is had once.
    expect(third.filter((outcome) => outcome === GetOutcome.Hit).length).toBe(1)
    expect(pages[2 + third.indexOf(GetOutcome.Hit)]).toEqual(pageOf(3))
    expect(pages[4]).toEqual(new Uint8Array(4096))
  })
})

test('a page that the host has and cannot give is an error, and not a miss', async () => {
  let isPermitted = true
  const host = new XenHost({ store: compose([zcache({ limitBytes: MiB })]), security: () => isPermitted })
  const pool = poolIn(new HypercallStore(host, domainOf(host), 1))
  expect(pool.put(1, 1, pageOf(1))).toBe(PutOutcome.Stored)
  isPermitted = false
  expect(() => pool.get(1, 1, pageOf(0))).toThrow('the host has the page and cannot give it: GET_PAGE was answered -1')
  await expect(pool.fetch(1, 1, pageOf(0))).rejects.toMatchObject({
    code: 'TMEM_IO',
    handle: 'pool 0 object 1 index 1',
  })
  expect(pool.put(1, 1, pageOf(2))).toBe(PutOutcome.Policy)
})

test('a refused put leaves nothing, also where the host keeps the older page as the original did', () => {
  let free = 2 * MiB
  const store = compose([zcache({ limitBytes: MiB })])
  const host = new XenHost({ store, release: '4.4', defects: 'original', freeBytes: () => free })
  const pool = poolIn(new HypercallStore(host, domainOf(host), 1))
  expect(pool.put(1, 1, pageOf(1))).toBe(PutOutcome.Stored)
  free = 0
  expect(pool.put(1, 1, pageOf(2))).toBe(PutOutcome.NoMemory)
  expect(pool.get(1, 1, pageOf(0))).toBe(GetOutcome.Miss)
})

describe.each(stacks)(
  'Frontswap through hypercalls of $release, $bits bits, over $name',
  ({ release, bits, layers }) => {
    const slots = 24

    async function history(steps: readonly { kind: string; slot: number; fill: number }[]): Promise<void> {
      const store = compose(layers(), { check: 'model' })
      await store.ready?.()
      const host = new XenHost({ store, release })
      const area = SwapArea.open({ file: path('area'), sizeBytes: slots * 4096 }, systemAllocator)
      try {
        const swap = new Frontswap({ allocator: systemAllocator })
        swap.register(new HypercallStore(host, domainOf(host, 1, bits), 1))
        swap.addOwner(0, attributes)
        const type = swap.swapon(area)
        const entries = Array.from({ length: slots }, () => swap.getSwapPage())
        const fills = entries.map((_, slot) => slot + 1)
        const write = (slot: number): void => area.write(swapOffset(entries[slot]!), pageOf(fills[slot]!))
        const put = (slot: number): void => {
          if (swap.store(entries[slot]!, pageOf(fills[slot]!)) !== PutOutcome.Stored) write(slot)
        }
        for (let slot = 0; slot < slots; slot++) put(slot)
        const load = async (entry: number): Promise<object> => {
          const page = new Uint8Array(4096)
          let outcome = swap.load(entry, page)
          if (outcome === GetOutcome.Deferred) outcome = await swap.fetch(entry, page)
          const isInHost = outcome === GetOutcome.Hit
          return { isInHost, page: isInHost || (await area.read(swapOffset(entry), page)) ? page : undefined }
        }
        for (const { kind, slot, fill } of steps) {
          const entry = entries[slot]!
          let [got, wanted]: (object | undefined)[] = []
          if (kind === 'store') {
            fills[slot] = fill
            put(slot)
          } else if (kind === 'invalidate') {
            swap.invalidatePage(entry)
            write(slot)
          } else if (kind === 'area') {
            const held = entries.filter((one) => swap.test(one))
            swap.invalidateArea(type)
            for (const one of held) write(entries.indexOf(one))
          } else if (kind === 'freeze' || kind === 'thaw') host.freeze(host.clients.get(1)!, kind === 'freeze')
          else {
            got = await load(entry)
            wanted = { isInHost: swap.test(entry), page: pageOf(fills[slot]!) }
          }
          expect(got).toEqual(wanted)
          expect(host.clients.get(1)!.slots[0]!.pool.census!().pages).toBe(swap.currPages)
        }
        // Swapoff brings each page back, from wherever it is.
        const pulled = new Map<number, Uint8Array>()
        const frame = (entry: number): Uint8Array => {
          const page = new Uint8Array(4096)
          pulled.set(entry, page)
          return page
        }
        expect(await swap.swapoff(type, { frame, done: (_entry, _frame, isMoved) => expect(isMoved).toBe(true) })).toBe(
          true,
        )
        expect(entries.map((entry) => pulled.get(entry)![9])).toEqual(fills)
        expect(host.clients.get(1)!.slots[0]!.pool.census!().pages).toBe(0)
        store.check?.()
      } finally {
        await area.close()
        host.close()
        await store.close()
      }
    }

    test('each slot has the page that was written last, in the host or on the disk', async () => {
      const step = fc.record({
        kind: fc.constantFrom('store', 'store', 'store', 'load', 'load', 'invalidate', 'freeze', 'thaw', 'area'),
        slot: fc.nat(slots - 1),
        fill: fc.integer({ min: 2, max: 255 }),
      })
      await fc.assert(fc.asyncProperty(fc.array(step, { maxLength: 80 }), history), { numRuns: 15, seed: 17 })
    }, 60_000)
  },
)

describe.each([
  { release: '4.2' as const, bits: 32 as const },
  { release: '4.9' as const, bits: 64 as const },
])('a page cache through hypercalls of $release, $bits bits', ({ release, bits }) => {
  test('what fell out comes back from the host, and never when the file has changed', async () => {
    const store = compose([zcache({ limitBytes: 4 * MiB })], { check: 'model' })
    const host = new XenHost({ store, release })
    const cleancache = new Cleancache()
    cleancache.register(linuxCleancache(new LinuxGuest(host, domainOf(host, 1, bits), 1)))
    const cache = new PageCache({
      sizeBytes: 16 * 4096,
      cleancache,
      // Whatever the folder is on; and a minute later, so that the change times are past.
      optIn: ({ blockSize }) => ({ facts: pageCacheFacts('ext4', blockSize) }),
      now: () => Date.now() + 60_000,
    })
    const name = path('file')
    const pages = 64
    const write = (first: number): void =>
      writeFileSync(name, Buffer.concat(Array.from({ length: pages }, (_, n) => pageOf(first + n))))
    write(2)
    const file = await cache.open(name)
    const readAll = async (): Promise<number[]> => {
      const fills: number[] = []
      for (let n = pages - 1; n >= 0; n--) {
        const into = Buffer.alloc(4096)
        await file.read(into, 0, 4096, n * 4096)
        expect(into.equals(pageOf(into[9]!))).toBe(true)
        fills.unshift(into[9]!)
      }
      return fills
    }
    const from = (first: number): number[] => Array.from({ length: pages }, (_, n) => first + n)
    expect(await readAll()).toEqual(from(2))
    expect(cleancache.counters.succ_gets).toBe(0)
    expect(await readAll()).toEqual(from(2))
    expect(cleancache.counters.succ_gets).toBeGreaterThanOrEqual(pages - 16)
    // Each of them was a hypercall that hit.
    expect(host.clients.get(1)!.slots[0]!.counters.gs).toBe(cleancache.counters.succ_gets)
    write(100)
    expect(await readAll()).toEqual(from(100))
    await cache.close()
    expect(host.clients.get(1)!.slots[0]).toBeUndefined()
    host.close()
    await store.close()
  })
})
