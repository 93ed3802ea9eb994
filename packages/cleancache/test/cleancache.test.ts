import { compose, GetOutcome, Tmem } from '@tmem/core'
import { delay, discard, refuse } from '@tmem/faults'
import { memory } from '@tmem/memory'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  Cleancache,
  type CleancacheBackend,
  type FileSystemFacts,
  HandleType,
  keyOfHandle,
  keyOfInode,
  missingGuarantees,
  PageState,
  Registration,
  type Superblock,
  tmemBackend,
} from '../src/index.ts'

const { Hit, Miss, Deferred } = GetOutcome
const pageSize = 4096
const locked = PageState.Locked
const clean = locked | PageState.UpToDate | PageState.MappedToDisk
const disk: FileSystemFacts = {
  name: 'disk',
  blockSize: pageSize,
  inMemory: false,
  invalidates: true,
  uniqueInodes: true,
  invalidatesAtEnd: true,
  readsAskFirst: true,
  cluster: false,
}
const uuid = (last: number): Uint8Array => Uint8Array.from({ length: 16 }, (_, at) => (at === 15 ? last : at))
const uuidNumber = (last: number): bigint => uuid(last).reduceRight((number, byte) => (number << 8n) | BigInt(byte), 0n)
const pageOf = (fill: number): Uint8Array => new Uint8Array(pageSize).fill(fill)

interface Setup {
  readonly tmem: Tmem
  readonly cleancache: Cleancache
  readonly superblock: Superblock
}
function setup(): Setup {
  const tmem = new Tmem(compose([memory({ limitBytes: 2 ** 20 })], { check: 'model' }))
  const cleancache = new Cleancache()
  expect(cleancache.register(tmemBackend(tmem, 1))).toBe(Registration.Done)
  const superblock = cleancache.initFs(disk, pageSize)
  return { tmem, cleancache, superblock }
}

/** A backend that writes down what it is asked for. */
function recorder(log: string[], pools = [0, 1, 2, 3]): CleancacheBackend {
  return {
    name: 'recorder',
    initFs: (size) => {
      log.push(`initFs ${size}`)
      return pools.shift() ?? -1
    },
    initSharedFs: (id, size) => {
      log.push(`initSharedFs ${id[15]} ${size}`)
      return pools.shift() ?? -1
    },
    putPage: (pool, key, index) => void log.push(`put ${pool} ${key} ${index}`),
    getPage: (pool, key, index) => {
      log.push(`get ${pool} ${key} ${index}`)
      return Miss
    },
    fetchPage: async (pool, key, index) => {
      log.push(`fetch ${pool} ${key} ${index}`)
      return Miss
    },
    invalidatePage: (pool, key, index) => void log.push(`page ${pool} ${key} ${index}`),
    invalidateInode: (pool, key) => void log.push(`inode ${pool} ${key}`),
    invalidateFs: (pool) => void log.push(`fs ${pool}`),
  }
}

describe('file keys', () => {
  test('an inode number is the key, whatever its width', () => {
    expect(keyOfInode(7)).toBe(7)
    expect(keyOfInode(7n)).toBe(7)
    expect(keyOfInode(2n ** 53n)).toBe(2n ** 53n)
    expect(keyOfInode(2n ** 64n - 1n)).toBe(2n ** 64n - 1n)
    expect(() => keyOfInode(2n ** 64n)).toThrow(RangeError)
    expect(() => keyOfInode(-1)).toThrow(RangeError)
  })

  test('a handle is the key: words from the lowest, unused ones zero', () => {
    expect(keyOfHandle({ type: 1, words: [5] })).toBe(5)
    expect(keyOfHandle({ type: 1, words: [5, 1] })).toBe(2 ** 32 + 5)
    expect(keyOfHandle({ type: 1, words: [1, 2, 3, 4, 5, 6] })).toBe(
      1n | (2n << 32n) | (3n << 64n) | (4n << 96n) | (5n << 128n) | (6n << 160n),
    )
    expect(keyOfHandle({ type: 1, words: Uint32Array.of(0xffffffff) })).toBe(0xffffffff)
  })

  test('no key: root, invalid, more than six words, the reserved id', () => {
    expect(keyOfHandle({ type: HandleType.Root, words: [5] })).toBeUndefined()
    expect(keyOfHandle({ type: -1, words: [5] })).toBeUndefined()
    expect(keyOfHandle({ type: HandleType.Invalid, words: [5] })).toBeUndefined()
    expect(keyOfHandle({ type: 1, words: [1, 2, 3, 4, 5, 6, 7] })).toBeUndefined()
    expect(keyOfHandle({ type: 1, words: [1, 0, 0, 0, 0, 0, 0] })).toBeUndefined()
    expect(keyOfHandle({ type: 1, words: new Uint32Array(6).fill(0xffffffff) })).toBeUndefined()
    expect(keyOfHandle({ type: 254, words: [5] })).toBe(5)
  })

  test('different handles of the same length are different keys', () => {
    const words = fc.array(fc.nat(0xffffffff), { minLength: 6, maxLength: 6 })
    fc.assert(
      fc.property(words, words, (a, b) => {
        const same = a.every((word, at) => word === b[at])
        expect(keyOfHandle({ type: 1, words: a }) === keyOfHandle({ type: 1, words: b })).toBe(same)
      }),
      { seed: 1 },
    )
  })

  test('a file system that encodes handles is asked for them, another one gives inode numbers', () => {
    const { cleancache, superblock } = setup()
    expect(cleancache.fileKey(superblock, 12)).toBe(12)
    const encoding = { ...disk, encodeHandle: (inode: number | bigint) => ({ type: 1, words: [Number(inode), 9] }) }
    expect(cleancache.fileKey(cleancache.initFs(encoding, pageSize), 12)).toBe(9 * 2 ** 32 + 12)
    const rootOnly = { ...disk, encodeHandle: () => ({ type: HandleType.Root, words: [1] }) }
    expect(cleancache.fileKey(cleancache.initFs(rootOnly, pageSize), 12)).toBeUndefined()
  })

  test('a file without a key reaches neither the backend nor a counter', async () => {
    const log: string[] = []
    const cleancache = new Cleancache()
    cleancache.register(recorder(log))
    const superblock = cleancache.initFs(disk, pageSize)
    log.length = 0
    cleancache.putPage(superblock, undefined, 0, pageOf(1), clean)
    cleancache.removePage(superblock, undefined, 0, pageOf(1), locked)
    cleancache.invalidatePage(superblock, undefined, 0, locked)
    cleancache.invalidateInode(superblock, undefined)
    expect(cleancache.getPage(superblock, undefined, 0, pageOf(1), locked)).toBe(Miss)
    expect(await cleancache.fetchPage(superblock, undefined, 0, pageOf(1), locked)).toBe(Miss)
    expect(log).toEqual([])
    expect(cleancache.counters).toEqual({ succ_gets: 0, failed_gets: 0, puts: 0, invalidates: 0 })
  })
})

describe('opting in', () => {
  test.each([
    [1, { inMemory: true }],
    [2, { invalidates: false }],
    [3, { uniqueInodes: false }],
    [4, { invalidatesAtEnd: false }],
    [5, { readsAskFirst: false }],
    [6, { blockSize: 1024 }],
    [7, { cluster: true }],
  ])('guarantee %i is needed', (guarantee, change) => {
    const log: string[] = []
    const cleancache = new Cleancache()
    const superblock = cleancache.initFs({ ...disk, ...change }, pageSize)
    expect(superblock.missing.map((missing) => missing.guarantee)).toEqual([guarantee])
    expect(superblock.missing[0]!.reason).toMatch(/^disk: /)
    expect(superblock.waiting).toBe(false)
    cleancache.register(recorder(log))
    cleancache.putPage(superblock, 1, 0, pageOf(1), clean)
    expect(cleancache.getPage(superblock, 1, 0, pageOf(1), locked)).toBe(Miss)
    expect(log).toEqual([])
    expect(cleancache.counters).toEqual({ succ_gets: 0, failed_gets: 0, puts: 0, invalidates: 0 })
  })

  test('file handles stand in for unique inode numbers, a shared pool lets a cluster in', () => {
    const handles = { ...disk, uniqueInodes: false, encodeHandle: () => ({ type: 1, words: [1] }) }
    expect(missingGuarantees(handles, pageSize, false)).toEqual([])
    expect(missingGuarantees({ ...disk, cluster: true }, pageSize, true)).toEqual([])
    expect(missingGuarantees(disk, pageSize, false)).toEqual([])
    expect(missingGuarantees({ ...disk, inMemory: true, blockSize: 512 }, pageSize, false)).toHaveLength(2)
  })

  test('impossible sizes are misuse', () => {
    const cleancache = new Cleancache()
    expect(() => cleancache.initFs(disk, 1000)).toThrow(RangeError)
    expect(() => cleancache.initSharedFs(new Uint8Array(15), disk, pageSize)).toThrow(RangeError)
  })
})

describe('registration', () => {
  test('file systems that were mounted before get their pools first, private and shared', () => {
    const log: string[] = []
    const cleancache = new Cleancache()
    const before = cleancache.initFs(disk, pageSize)
    const shared = cleancache.initSharedFs(uuid(3), disk, 8192 / 2)
    expect([before.waiting, shared.waiting, before.poolId]).toEqual([true, true, undefined])
    expect(cleancache.enabled).toBe(false)
    expect(cleancache.register(recorder(log))).toBe(Registration.Done)
    expect(log).toEqual(['initFs 4096', 'initSharedFs 3 4096'])
    expect([before.poolId, shared.poolId]).toEqual([0, 1])
    expect(before.waiting).toBe(false)
    const after = cleancache.initFs(disk, pageSize)
    expect(after.poolId).toBe(2)
    log.length = 0
    cleancache.putPage(before, 7, 8, pageOf(1), clean)
    expect(log).toEqual(['put 0 7 8'])
  })

  test('a second backend is refused and told nothing', () => {
    const log: string[] = []
    const cleancache = new Cleancache()
    cleancache.initFs(disk, pageSize)
    cleancache.register(recorder([]))
    expect(cleancache.register(recorder(log))).toBe(Registration.Busy)
    expect(log).toEqual([])
  })

  test('a file system that waits for a backend counts nothing (4.1 on; puts and failed gets counted in 3.10)', async () => {
    const cleancache = new Cleancache()
    const superblock = cleancache.initFs(disk, pageSize)
    cleancache.putPage(superblock, 1, 0, pageOf(1), clean)
    expect(cleancache.getPage(superblock, 1, 0, pageOf(0), locked)).toBe(Miss)
    expect(await cleancache.fetchPage(superblock, 1, 0, pageOf(0), locked)).toBe(Miss)
    cleancache.invalidatePage(superblock, 1, 0, locked)
    cleancache.invalidateInode(superblock, 1)
    expect(cleancache.counters).toEqual({ succ_gets: 0, failed_gets: 0, puts: 0, invalidates: 0 })
  })

  test('while the pools are being made only pages of file systems that have one reach the backend (4.1 on)', () => {
    const log: string[] = []
    const cleancache = new Cleancache()
    const superblocks = [cleancache.initFs(disk, pageSize), cleancache.initFs(disk, pageSize)]
    const inner = recorder(log)
    cleancache.register({
      ...inner,
      initFs: (size) => {
        for (const superblock of superblocks) cleancache.putPage(superblock, 1, 0, pageOf(1), clean)
        return inner.initFs(size)
      },
    })
    expect(log).toEqual(['initFs 4096', 'put 0 1 0', 'initFs 4096'])
    expect(cleancache.counters.puts).toBe(1)
  })

  test('a file system that is mounted while another one gets its pool has one pool', () => {
    const log: string[] = []
    const cleancache = new Cleancache()
    cleancache.initFs(disk, pageSize)
    const inner = recorder(log)
    let mounted = false
    cleancache.register({
      ...inner,
      initFs: (size) => {
        if (!mounted) {
          mounted = true
          cleancache.initFs(disk, pageSize)
        }
        return inner.initFs(size)
      },
    })
    expect(log).toEqual(['initFs 4096', 'initFs 4096'])
  })

  test('a backend that registers while another one is being registered comes too late', () => {
    const first: string[] = []
    const second: string[] = []
    const answers: Registration[] = []
    const cleancache = new Cleancache()
    const superblock = cleancache.initFs(disk, pageSize)
    const inner = recorder(first)
    const initFs = (size: number): number => {
      answers.push(cleancache.register(recorder(second)))
      return inner.initFs(size)
    }
    expect(cleancache.register({ ...inner, initFs })).toBe(Registration.Done)
    expect(answers).toEqual([Registration.Busy])
    cleancache.putPage(superblock, 1, 0, pageOf(1), clean)
    expect([first, second]).toEqual([['initFs 4096', 'put 0 1 0'], []])
  })

  test('DEVIATION: more than 32 file systems may wait, without fake ids; one that the backend refuses is not cached', () => {
    const log: string[] = []
    const cleancache = new Cleancache()
    const superblocks = Array.from({ length: 40 }, () => cleancache.initFs(disk, pageSize))
    expect(superblocks.map(({ poolId, waiting }) => [poolId, waiting])).toEqual(Array(40).fill([undefined, true]))
    cleancache.register(
      recorder(
        log,
        Array.from({ length: 39 }, (_, id) => id),
      ),
    )
    expect(superblocks.map((superblock) => superblock.poolId)).toEqual([...Array(39).keys(), undefined])
    expect(superblocks[39]!.waiting).toBe(false)
    log.length = 0
    cleancache.putPage(superblocks[39]!, 1, 0, pageOf(1), clean)
    expect(cleancache.getPage(superblocks[39]!, 1, 0, pageOf(1), locked)).toBe(Miss)
    expect(log).toEqual([])
    expect(cleancache.counters).toEqual({ succ_gets: 0, failed_gets: 0, puts: 0, invalidates: 0 })
  })

  test('every negative pool id is a refusal, whatever its number', () => {
    const cleancache = new Cleancache()
    const before = cleancache.initFs(disk, pageSize)
    cleancache.register(recorder([], [-2, -3]))
    const after = cleancache.initFs(disk, pageSize)
    for (const superblock of [before, after])
      expect([superblock.poolId, superblock.waiting]).toEqual([undefined, false])
  })

  test('a file system that went before the backend came gets no pool', () => {
    const log: string[] = []
    const cleancache = new Cleancache()
    const superblock = cleancache.initFs(disk, pageSize)
    cleancache.invalidateFs(superblock)
    cleancache.register(recorder(log))
    expect(log).toEqual([])
    expect(superblock.waiting).toBe(false)
  })

  test('invalidateFs gives the pool back once; afterwards nothing reaches the backend', () => {
    const log: string[] = []
    const cleancache = new Cleancache()
    cleancache.register(recorder(log))
    const superblock = cleancache.initFs(disk, pageSize)
    cleancache.invalidateFs(superblock)
    cleancache.invalidateFs(superblock)
    cleancache.putPage(superblock, 1, 0, pageOf(1), clean)
    cleancache.invalidatePage(superblock, 1, 0, locked)
    cleancache.invalidateInode(superblock, 1)
    expect(log).toEqual(['initFs 4096', 'fs 0'])
    expect(superblock.poolId).toBeUndefined()
  })
})

describe('the hooks', () => {
  test('removePage puts what is up to date and mapped to disk, and invalidates everything else', () => {
    const log: string[] = []
    const cleancache = new Cleancache()
    cleancache.register(recorder(log))
    const superblock = cleancache.initFs(disk, pageSize)
    log.length = 0
    cleancache.removePage(superblock, 1, 0, pageOf(1), clean)
    cleancache.removePage(superblock, 1, 1, pageOf(1), locked | PageState.UpToDate)
    cleancache.removePage(superblock, 1, 2, pageOf(1), locked | PageState.MappedToDisk)
    cleancache.removePage(superblock, 1, 3, pageOf(1), locked)
    expect(log).toEqual(['put 0 1 0', 'page 0 1 1', 'page 0 1 2', 'page 0 1 3'])
    expect(cleancache.counters).toEqual({ succ_gets: 0, failed_gets: 0, puts: 1, invalidates: 3 })
  })

  test('every call that names a page wants it locked', async () => {
    const { cleancache, superblock } = setup()
    const unlocked = clean & ~locked
    expect(() => cleancache.putPage(superblock, 1, 0, pageOf(1), unlocked)).toThrow(TypeError)
    expect(() => cleancache.removePage(superblock, 1, 0, pageOf(1), unlocked)).toThrow(TypeError)
    expect(() => cleancache.getPage(superblock, 1, 0, pageOf(1), unlocked)).toThrow(TypeError)
    expect(() => cleancache.invalidatePage(superblock, 1, 0, 0)).toThrow(TypeError)
    await expect(cleancache.fetchPage(superblock, 1, 0, pageOf(1), unlocked)).rejects.toThrow(TypeError)
  })

  test('aroundInode invalidates at the start and at the end, also when the work fails', async () => {
    const { cleancache, superblock } = setup()
    const page = pageOf(3)
    cleancache.putPage(superblock, 1, 0, page, clean)
    const seen = await cleancache.aroundInode(superblock, 1, async () => {
      const outcome = cleancache.getPage(superblock, 1, 0, page, locked)
      await new Promise((resolve) => setImmediate(resolve))
      // Pages that are dropped meanwhile satisfy the condition for a put.
      cleancache.removePage(superblock, 1, 0, page, clean)
      return outcome
    })
    expect(seen).toBe(Miss)
    expect(cleancache.getPage(superblock, 1, 0, page, locked)).toBe(Miss)
    const failing = cleancache.aroundInode(superblock, 1, () => {
      cleancache.removePage(superblock, 1, 4, page, clean)
      throw new Error('the disk is full')
    })
    await expect(failing).rejects.toThrow('the disk is full')
    expect(cleancache.getPage(superblock, 1, 4, page, locked)).toBe(Miss)
    // Invalidating a file is not counted.
    expect(cleancache.counters.invalidates).toBe(0)
  })

  test('a file without a cached page is invalidated at both ends as well, and hooks of a whole file need no lock', async () => {
    const log: string[] = []
    const cleancache = new Cleancache()
    cleancache.register(recorder(log))
    const superblock = cleancache.initFs(disk, pageSize)
    log.length = 0
    expect(await cleancache.aroundInode(superblock, 7, () => log.push('work'))).toBe(2)
    cleancache.invalidateInode(superblock, 8)
    expect(log).toEqual(['inode 0 7', 'work', 'inode 0 7', 'inode 0 8'])
  })

  test('put-put-get: the second or nothing; get-get: after a miss, a miss until the next put', () => {
    for (const layers of [[memory({ limitBytes: 2 ** 20 })], [refuse({ every: 2 }), memory({ limitBytes: 2 ** 20 })]]) {
      const cleancache = new Cleancache()
      cleancache.register(tmemBackend(new Tmem(compose(layers, { check: 'model' })), 1))
      const superblock = cleancache.initFs(disk, pageSize)
      const into = pageOf(0)
      let hits = 0
      for (let index = 0; index < 9; index++) {
        for (const fill of [1, 2]) cleancache.putPage(superblock, 1, index, pageOf(fill), clean)
        const outcome = cleancache.getPage(superblock, 1, index, into.fill(2), locked)
        if (outcome === Hit) hits++
        // Untouched by a miss.
        expect(into).toEqual(pageOf(2))
        for (let again = 0; again < 2; again++)
          expect(cleancache.getPage(superblock, 1, index, into, locked)).toBe(Miss)
        cleancache.putPage(superblock, 1, index + 100, pageOf(3), clean)
      }
      expect(hits).toBeGreaterThan(2)
      expect(cleancache.counters).toMatchObject({ puts: 27, succ_gets: hits, failed_gets: 27 - hits })
    }
  })

  test('a private pool gives a page once, a shared one keeps it', () => {
    const { cleancache, superblock, tmem } = setup()
    tmem.authorize(1, uuidNumber(9))
    const shared = cleancache.initSharedFs(uuid(9), disk, pageSize)
    const into = pageOf(0)
    for (const [mounted, second] of [
      [superblock, Miss],
      [shared, Hit],
    ] as const) {
      cleancache.putPage(mounted, 1, 0, pageOf(5), clean)
      expect(cleancache.getPage(mounted, 1, 0, into.fill(0), locked)).toBe(Hit)
      expect(into).toEqual(pageOf(5))
      expect(cleancache.getPage(mounted, 1, 0, into, locked)).toBe(second)
    }
    expect(cleancache.counters).toEqual({ succ_gets: 3, failed_gets: 1, puts: 2, invalidates: 0 })
  })

  test('an index beyond 32 bits is not cached: the put is dropped, the get a miss', async () => {
    const { cleancache, superblock } = setup()
    const far = 2 ** 32
    cleancache.putPage(superblock, 1, far, pageOf(1), clean)
    expect(cleancache.getPage(superblock, 1, far, pageOf(0), locked)).toBe(Miss)
    // Not taken for index 0, either.
    expect(cleancache.getPage(superblock, 1, 0, pageOf(0), locked)).toBe(Miss)
    expect(await cleancache.fetchPage(superblock, 1, far, pageOf(0), locked)).toBe(Miss)
    cleancache.invalidatePage(superblock, 1, far, locked)
    cleancache.putPage(superblock, 1, far - 1, pageOf(1), clean)
    expect(cleancache.getPage(superblock, 1, far - 1, pageOf(0), locked)).toBe(Hit)
    expect(cleancache.counters).toEqual({ succ_gets: 1, failed_gets: 3, puts: 2, invalidates: 1 })
  })

  test('DEVIATION: a store that has to wait: getPage defers and counts nothing, fetchPage counts', async () => {
    const tmem = new Tmem(compose([delay({ turn: async () => {} }), memory({ limitBytes: 2 ** 20 })]))
    const cleancache = new Cleancache()
    cleancache.register(tmemBackend(tmem, 1))
    const superblock = cleancache.initFs(disk, pageSize)
    cleancache.putPage(superblock, 1, 0, pageOf(4), clean)
    const into = pageOf(0)
    expect(cleancache.getPage(superblock, 1, 0, into, locked)).toBe(Deferred)
    expect(cleancache.counters).toMatchObject({ succ_gets: 0, failed_gets: 0 })
    expect(await cleancache.fetchPage(superblock, 1, 0, into, locked)).toBe(Hit)
    expect(into).toEqual(pageOf(4))
    expect(await cleancache.fetchPage(superblock, 1, 0, into, locked)).toBe(Miss)
    expect(cleancache.counters).toMatchObject({ succ_gets: 1, failed_gets: 1 })
  })

  test.each([
    ['refuses', [refuse({ every: 1 }), memory({ limitBytes: 2 ** 20 })]],
    ['loses', [discard({ mode: 'lose' })]],
  ])('with a store that %s every page all is a miss, and nothing fails', (_word, layers) => {
    const cleancache = new Cleancache()
    cleancache.register(tmemBackend(new Tmem(compose(layers)), 1))
    const superblock = cleancache.initFs(disk, pageSize)
    for (let index = 0; index < 10; index++) {
      cleancache.putPage(superblock, 1, index, pageOf(index), clean)
      expect(cleancache.getPage(superblock, 1, index, pageOf(0), locked)).toBe(Miss)
    }
    expect(cleancache.counters).toEqual({ succ_gets: 0, failed_gets: 10, puts: 10, invalidates: 0 })
  })

  test('statistics have the historical names, and what is below', () => {
    const store = compose([memory({ limitBytes: 2 ** 20 })])
    const cleancache = new Cleancache()
    expect(cleancache.stats().children).toEqual([])
    cleancache.register(tmemBackend(new Tmem(store), 1, { stats: () => store.stats() }))
    const { name, counters, children } = cleancache.stats()
    expect(name).toBe('cleancache')
    expect(Object.keys(counters)).toEqual(['succ_gets', 'failed_gets', 'puts', 'invalidates'])
    expect(children.map((child) => child.name)).toEqual(['memory'])
  })
})

describe('a cluster of three machines (the case of ocfs2)', () => {
  const cluster = { ...disk, name: 'cluster', cluster: true }
  const machines = (
    authorized: readonly number[],
  ): { tmem: Tmem; caches: readonly Cleancache[]; readonly mount: (machine: number, id?: number) => Superblock } => {
    const tmem = new Tmem(compose([memory({ limitBytes: 2 ** 20 })], { check: 'model' }), { sharedPools: 2 })
    for (const client of authorized) tmem.authorize(client, uuidNumber(1))
    const caches = [1, 2, 3].map((client) => {
      const cache = new Cleancache()
      cache.register(tmemBackend(tmem, client))
      return cache
    })
    return { tmem, caches, mount: (machine, id = 1) => caches[machine]!.initSharedFs(uuid(id), cluster, pageSize) }
  }

  test('DEVIATION: it really shares: pages of one are got by the others, and stay; an invalidation of any is for all', async () => {
    const { caches, mount } = machines([1, 2, 3])
    const superblocks = [mount(0), mount(1), mount(2)]
    const into = pageOf(0)
    const get = (machine: number, key: number): GetOutcome =>
      caches[machine]!.getPage(superblocks[machine]!, key, 0, into.fill(0), locked)
    caches[0]!.putPage(superblocks[0]!, 5, 0, pageOf(1), clean)
    for (const machine of [1, 2, 0, 1]) {
      expect(get(machine, 5)).toBe(Hit)
      expect(into).toEqual(pageOf(1))
    }
    caches[2]!.putPage(superblocks[2]!, 5, 0, pageOf(2), clean)
    expect(get(0, 5)).toBe(Hit)
    expect(into).toEqual(pageOf(2))
    caches[1]!.invalidatePage(superblocks[1]!, 5, 0, locked)
    for (const machine of [0, 1, 2]) expect(get(machine, 5)).toBe(Miss)
    caches[1]!.putPage(superblocks[1]!, 6, 0, pageOf(3), clean)
    await caches[2]!.aroundInode(superblocks[2]!, 6, () => undefined)
    for (const machine of [0, 1, 2]) expect(get(machine, 6)).toBe(Miss)
  })

  test('the machine that made the pool leaves: the pages stay with the others, until the last one has left', () => {
    const { caches, mount } = machines([1, 2, 3])
    const superblocks = [mount(0), mount(1), mount(2)]
    const get = (machine: number): GetOutcome =>
      caches[machine]!.getPage(superblocks[machine]!, 5, 0, pageOf(0), locked)
    caches[0]!.putPage(superblocks[0]!, 5, 0, pageOf(1), clean)
    expect(get(0)).toBe(Hit)
    caches[0]!.invalidateFs(superblocks[0]!)
    expect([get(0), get(1), get(2)]).toEqual([Miss, Hit, Hit])
    caches[1]!.invalidateFs(superblocks[1]!)
    expect(get(2)).toBe(Hit)
    caches[2]!.invalidateFs(superblocks[2]!)
    // The uuid is free again, and nothing of before is left.
    superblocks[0] = mount(0)
    expect(get(0)).toBe(Miss)
  })

  test('DEVIATION: who is not authorised is not cached, and shares nothing, rather than with itself', () => {
    const { caches, mount } = machines([1, 2])
    const superblocks = [mount(0), mount(1), mount(2)]
    expect(superblocks[2]!.poolId).toBeUndefined()
    caches[0]!.putPage(superblocks[0]!, 5, 0, pageOf(1), clean)
    caches[2]!.putPage(superblocks[2]!, 5, 0, pageOf(9), clean)
    expect(caches[2]!.getPage(superblocks[2]!, 5, 0, pageOf(0), locked)).toBe(Miss)
    const into = pageOf(0)
    expect(caches[1]!.getPage(superblocks[1]!, 5, 0, into, locked)).toBe(Hit)
    expect(into).toEqual(pageOf(1))
    expect(caches[2]!.counters).toEqual({ succ_gets: 0, failed_gets: 0, puts: 0, invalidates: 0 })
  })

  test('one machine may mount the same file system twice, and unmount it once', () => {
    const { caches, mount } = machines([1])
    const [first, second] = [mount(0), mount(0)]
    expect(second.poolId).not.toBe(first.poolId)
    caches[0]!.putPage(first, 5, 0, pageOf(1), clean)
    expect(caches[0]!.getPage(second, 5, 0, pageOf(0), locked)).toBe(Hit)
    caches[0]!.invalidateFs(first)
    expect(caches[0]!.getPage(second, 5, 0, pageOf(0), locked)).toBe(Hit)
  })

  test('the reserved uuid shares nothing', () => {
    const { tmem, caches } = machines([])
    tmem.authorizeEverybody(true)
    const reserved = new Uint8Array(16).fill(0xff)
    expect(caches[0]!.initSharedFs(reserved, cluster, pageSize).poolId).toBeUndefined()
  })
})
