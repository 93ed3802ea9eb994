// The packages that need no system beneath them, in any runtime: the conformance suite on stacks and places in memory,
// a store in shared memory that two threads use, and a case for each of the other packages. It imports what was built.
import { Cache } from '@tmem/cache'
import { Cleancache, PageState, tmemBackend } from '@tmem/cleancache'
import { createCodec, createLz4Arena } from '@tmem/codecs'
import { conformanceCases, placeCases } from '@tmem/conformance'
import { ByteLimit, compose, GetOutcome, PutOutcome, Tmem } from '@tmem/core'
import { slowMemory } from '@tmem/faults'
import { actor, explore } from '@tmem/interleave'
import { memory, SharedMemoryStore } from '@tmem/memory'
import { pageMapping } from '@tmem/mmu-notifier'
import * as vm from '@tmem/vm-mixedmap'
import { zcache } from '@tmem/zcache'

const MiB = 2 ** 20
const pageSizes = [4096, 65_536]

const subject = (name, layers, manifest) => ({
  name,
  open: (context) => compose(layers(), { ...context, check: 'model' }),
  manifest: { pageSizes, ...manifest },
})

const stacks = [
  subject('memory', () => [memory({ limitBytes: 16 * MiB })], {
    refusals: {
      NoMemory: { by: 'filling', bytes: 17 * MiB },
      Quota: { by: 'quota', bytes: MiB },
      AllocationFailed: { by: 'allocator', bytes: 17 * MiB },
    },
  }),
  subject('zcache', () => [zcache({ limitBytes: 300_000 })], {
    steady: false,
    refusals: { NoMemory: { by: 'filling', bytes: 20 * MiB }, Quota: { by: 'quota', bytes: MiB } },
  }),
  subject(
    'memory over zcache over a slow place',
    () => [memory({ limitBytes: 200_000 }), zcache({ limitBytes: 300_000 }), slowMemory({ sizeBytes: 4 * MiB })],
    { steady: false, property: { runs: 20 } },
  ),
]

const place = (name, layer) => {
  const limitBytes = new ByteLimit(MiB)
  return {
    name,
    open: (context) => layer({ limitBytes }).place.open(context),
    manifest: { filledBy: 2 * MiB, limit: limitBytes },
  }
}
const places = [place('memory', memory), place('zcache', zcache)]

const same = (actual, expected, what) => {
  if (actual !== expected) throw new Error(`${what}: ${actual}, not ${expected}`)
}
const newPage = (seed) => new Uint8Array(4096).map((_, at) => (at * seed) & 0xff)

/** A case for each of the packages that are no stores. `startThread` posts something to a thread for its answer. */
const others = (startThread) => ({
  'codecs: a page there and back': () => {
    const lz4 = createCodec('lz4')
    const { bytes, codec } = createLz4Arena(MiB)
    for (const one of [lz4, codec]) {
      const page = newPage(3)
      const block = one === codec ? bytes : new Uint8Array(one.bound(page.length))
      const length = one.compress(page, 0, page.length, block, 0, one.bound(page.length))
      const back = new Uint8Array(4096)
      same(one.decompress(block, 0, length, back, 0, back.length), page.length, 'bytes of the page')
      same(back.join(), page.join(), 'the page')
    }
  },
  'cache: values of all kinds, compressed': async () => {
    const cache = new Cache({ memory: '4MiB' })
    for (let n = 0; n < 20_000; n++) cache.set(`key ${n}`, `value ${n} `.repeat(4), { tags: [`${n % 7}`] })
    for (const n of [19_999, 19_000, 15_000]) same(cache.get(`key ${n}`), `value ${n} `.repeat(4), 'a value')
    cache.set(new Uint8Array([1, 2]), new Uint8Array([3, 4]))
    same(cache.get(new Uint8Array([1, 2])).join(), '3,4', 'bytes')
    for (const text of ['Grüße', '日本語 😀', '\ud83d']) {
      cache.set(text, text)
      same(cache.get(text), text, 'a text')
    }
    cache.deleteByTag('1')
    same(cache.get('key 19993'), undefined, 'a value whose tag was deleted')
    await cache.close()
    const json = new Cache({ memory: '4MiB', codec: { encode: JSON.stringify, decode: JSON.parse } })
    json.set('a', { b: [1, 2] })
    same(JSON.stringify(json.get('a')), '{"b":[1,2]}', 'an object')
    await json.close()
  },
  'cleancache: a second chance': async () => {
    const store = compose([zcache({ limitBytes: 4 * MiB })])
    const cleancache = new Cleancache()
    const promises = { invalidates: true, uniqueInodes: true, invalidatesAtEnd: true, readsAskFirst: true }
    const superblock = cleancache.initFs(
      { name: 'disk', blockSize: 4096, inMemory: false, cluster: false, ...promises },
      4096,
    )
    cleancache.register(tmemBackend(new Tmem(store), 1, { stats: () => store.stats() }))
    const key = cleancache.fileKey(superblock, 4711)
    const page = newPage(5)
    cleancache.removePage(superblock, key, 0, page, PageState.Locked | PageState.UpToDate | PageState.MappedToDisk)
    const back = new Uint8Array(4096)
    same(cleancache.getPage(superblock, key, 0, back, PageState.Locked), GetOutcome.Hit, 'the outcome')
    same(back.join(), page.join(), 'the page')
    await store.close()
  },
  'interleave: a lost update': () => {
    const add = [
      { label: 'read', run: (state, me) => Object.assign(me, { seen: state.value }) },
      { label: 'write', run: (state, me) => Object.assign(state, { value: me.seen + 1 }) },
    ]
    const actors = [actor('A', { seen: 0 }, add), actor('B', { seen: 0 }, add)]
    const atEnd = [{ name: 'nothing lost', check: ({ value }) => (value === 2 ? null : `it is ${value}`) }]
    same(explore({ initial: () => ({ value: 0 }), actors, atEnd }).kind, 'violated', 'the rule')
  },
  'vm-mixedmap: a page without a descriptor': () => {
    const machine = vm.createMachine({ memory: { kind: 'flat', frames: 4 }, frames: 6, pteSpecial: true })
    const space = vm.createSpace(machine)
    const area = vm.mmap(space, { first: 0, pages: 1, mixedMap: true, write: true, backing: { kind: 'device' } })
    vm.vmInsertMixed(machine, space, area, 0, 5)
    same(vm.vmInsertMixed(machine, space, area, 0, 5), '-EBUSY', 'a second one')
    same(vm.auditMachine(machine).length, 0, 'mistakes of the audit')
  },
  'mmu-notifier: a rule and its mutant': () => {
    same(pageMapping.explore('page-lives-until-callback-returns').mutantCaught, true, 'the mutant is caught')
  },
  'memory: a store in shared memory, two threads': async () => {
    const store = SharedMemoryStore.create({ limitBytes: 8 * MiB })
    const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: 4096 })
    for (let index = 0; index < 64; index++) same(pool.put(1, index, newPage(index)), PutOutcome.Stored, 'a put')
    same(await startThread({ handle: store.handle, pool: pool.number, pages: 64 }), 'same pages', 'the other thread')
    const back = new Uint8Array(4096)
    for (let index = 0; index < 64; index++) {
      same(pool.get(2, index, back), GetOutcome.Hit, 'a get')
      same(back.join(), newPage(index + 1).join(), 'a page of the other thread')
    }
    await store.close()
  },
})

/** What the other thread does: gets the pages of object 1, and puts others of object 2. */
export function threadWork({ handle, pool: number, pages }) {
  const pool = SharedMemoryStore.attach(handle).openPool(number)
  const back = new Uint8Array(4096)
  for (let index = 0; index < pages; index++) {
    same(pool.get(1, index, back), GetOutcome.Hit, 'a get')
    same(back.join(), newPage(index).join(), 'a page of the first thread')
    same(pool.put(2, index, newPage(index + 1)), PutOutcome.Stored, 'a put')
  }
  return 'same pages'
}

/** Runs all cases, or with `isQuick` one for each package; answers `{passed, failed: [message]}`. */
export async function runPortable(startThread, isQuick) {
  const cases = Object.entries(others(startThread)).map(([name, run]) => ({ name, run }))
  if (!isQuick) {
    for (const one of stacks) cases.push(...named(one.name, await conformanceCases(one)))
    for (const one of places) cases.push(...named(`place ${one.name}`, await placeCases(one)))
  }
  const failed = []
  for (const { name, run } of cases) {
    try {
      await run()
    } catch (error) {
      failed.push(`${name}: ${error?.stack ?? error}`)
    }
  }
  return { passed: cases.length - failed.length, failed }
}

const named = (name, cases) =>
  cases.map((one) => ({ name: `${name}: ${one.section}: ${one.name}`, run: () => one.run() }))
