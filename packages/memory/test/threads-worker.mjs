// What the worker threads of the tests do. A worker thread cannot load TypeScript, so it loads the built packages.
import { parentPort, workerData } from 'node:worker_threads'
import { History, PageOperation } from '@tmem/conformance'
import { GetOutcome, PageBatch, Pending, PutOutcome } from '@tmem/core'
import { SharedMemoryStore } from '@tmem/memory'
import { collectGarbage } from './garbage.mjs'

const { thread, progress } = workerData
/** Words in which the destroyer of pools and those who live in them tell each other how far they are. */
const [WORK, BEGUN, NUMBER, OPENED, ENDED, LEFT] = [0, 1, 2, 3, 4, 5]
/** Longest wait for another thread. */
const patience = 5000

/** Numbers from 0 to below - 1, the same for the same seed. */
function randomOf(seed) {
  let state = Math.imul(seed, 0x9e3779b1) | 1
  return (below) => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) % below
  }
}

/** Waits until all threads of the task have come here. */
function gather(gate, count) {
  Atomics.add(gate, 0, 1)
  Atomics.notify(gate, 0)
  waitFor(gate, 0, (here) => here >= count, `${count} threads at the start`)
}

/** Waits until a word of shared memory is as wanted, but not for ever. */
function waitFor(words, at, wanted, what) {
  for (;;) {
    const now = Atomics.load(words, at)
    if (wanted(now)) return now
    if (Atomics.wait(words, at, now, patience) === 'timed-out')
      throw new Error(`thread ${thread} waited ${patience} ms for ${what}; the word is ${now}`)
  }
}

function bump(words, at, by = 1) {
  Atomics.add(words, at, by)
  Atomics.notify(words, at)
}

/** One value all over the page, and a checksum at its end. */
function fillPage(page, value) {
  const words = new Uint32Array(page.buffer, page.byteOffset, page.length / 4)
  words.fill(value)
  words[words.length - 1] = Math.imul(value, 0x85ebca6b) ^ page.length
}

/** The value of a page; throws when it is made of two. */
function readPage(page) {
  const words = new Uint32Array(page.buffer, page.byteOffset, page.length / 4)
  const value = words[0]
  const last = words.length - 1
  for (let i = 1; i < last; i++)
    if (words[i] !== value) throw new Error(`torn page: word 0 is ${value}, word ${i} is ${words[i]}`)
  if (words[last] !== (Math.imul(value, 0x85ebca6b) ^ page.length) >>> 0)
    throw new Error(`torn page: of value ${value}, and the checksum ${words[last]} is not`)
  return value
}

const tasks = {
  /**
   * Random operations on the pages of some pools, recorded. `pools`: number, first handle, objects, indexes, and for
   * pools whose pages are also worked on in parts the number of parts (every part is a page of the history).
   */
  hammer({
    store: handle,
    pools: specs,
    seed,
    operations,
    history: memory,
    clock,
    gate,
    threads,
    firstObject = 0,
    mutant,
  }) {
    const store = SharedMemoryStore.attach(handle)
    if (mutant === 'without locks') Object.assign(store, { enter() {}, leave() {} })
    const history = new History(memory)
    const random = randomOf(seed)
    const tally = {}
    const count = (name) => {
      tally[name] = (tally[name] ?? 0) + 1
    }
    let values = 0
    const newValue = () => thread * 2 ** 22 + ++values
    const now = () => Atomics.add(clock, 0, 1)
    const pools = specs.map((spec) => {
      const pool = store.openPool(spec.number)
      if (typeof pool === 'number') throw new Error(`pool ${spec.number} could not be opened: ${pool}`)
      const size = pool.attributes.pageSize
      const parts = spec.parts ?? 1
      return {
        ...spec,
        pool: mutant === 'stale bytes' ? stale(pool, random) : pool,
        parts,
        view: pool.split(),
        page: new Uint8Array(size),
        part: new Uint8Array(4096),
        batch: new PageBatch(6, size),
      }
    })
    const record = (operation, at, value, invoked, answered) =>
      history.record(thread, operation, at, value, invoked, answered)
    const whole = (spec, operation, at, value, invoked, answered) => {
      for (let part = 0; part < spec.parts; part++)
        record(operation, at + part, typeof value === 'number' ? value : value[part], invoked, answered)
    }
    const pieces = (spec, page) =>
      spec.parts === 1
        ? [page]
        : Array.from({ length: spec.parts }, (_, part) => page.subarray(part * 4096, (part + 1) * 4096))

    gather(gate, threads)
    for (let i = 0; i < operations; i++) {
      const spec = pools[random(pools.length)]
      const { pool, view, page, part, parts, batch, indexes } = spec
      const object = firstObject + random(spec.objects)
      const index = random(indexes)
      const at =
        spec.base + ((object - firstObject) * indexes + index) * parts + (spec.ownHandles ? thread * 100_000 : 0)
      const kind = random(spec.kinds ?? 100)
      progress[thread * 2] = i
      progress[thread * 2 + 1] = kind
      if (kind < 25) {
        const value = newValue()
        for (const piece of pieces(spec, page)) fillPage(piece, value)
        const invoked = now()
        const outcome = pool.put(object, index, page)
        const stored = outcome === PutOutcome.Stored
        count(`put ${outcome}`)
        whole(spec, stored ? PageOperation.Put : PageOperation.RefusedPut, at, value, invoked, now())
      } else if (kind < 55) {
        const invoked = now()
        let outcome
        if (kind < 45) outcome = pool.get(object, index, page)
        else outcome = pool.lend(object, index, (bytes, from, length) => page.set(bytes.subarray(from, from + length)))
        const answered = now()
        count(`get ${outcome}`)
        if (outcome === GetOutcome.Hit)
          whole(spec, PageOperation.Hit, at, pieces(spec, page).map(readPage), invoked, answered)
        else if (parts === 1) record(PageOperation.Miss, at, 0, invoked, answered)
        // That a page was missed says no more than that one of its parts was.
      } else if (kind < 60) {
        const invoked = now()
        pool.flushPage(object, index)
        whole(spec, PageOperation.Flush, at, 0, invoked, now())
      } else if (kind < 75 && parts > 1) {
        const which = random(parts)
        const value = newValue()
        fillPage(part, value)
        const invoked = now()
        const outcome = view.put(object, index * parts + which, part)
        const stored = outcome === PutOutcome.Stored
        count(`part put ${outcome}`)
        record(stored ? PageOperation.Put : PageOperation.RefusedPut, at + which, value, invoked, now())
      } else if (kind < 92 && parts > 1) {
        const which = random(parts)
        const invoked = now()
        const outcome = view.get(object, index * parts + which, part)
        const answered = now()
        count(`part get ${outcome}`)
        if (outcome === GetOutcome.Hit) record(PageOperation.Hit, at + which, readPage(part), invoked, answered)
        else record(PageOperation.Miss, at + which, 0, invoked, answered)
      } else if (kind < 97 && parts > 1) {
        const which = random(parts)
        const invoked = now()
        view.flushPage(object, index * parts + which)
        record(PageOperation.Flush, at + which, 0, invoked, now())
      } else if (kind < 98 && parts === 1) {
        batch.clear()
        const entries = 1 + random(batch.capacity)
        for (let entry = 0; entry < entries; entry++) batch.push(object, (index + entry) % indexes)
        const first = at - index * parts
        const each = (operationOf, valueAt, invoked, answered) => {
          for (let entry = 0; entry < entries; entry++) {
            const outcome = batch.outcomes[entry]
            if (outcome === Pending && operationOf !== flushed) throw new Error(`entry ${entry} was not decided`)
            record(operationOf(outcome), first + batch.indexes[entry], valueAt(entry, outcome), invoked, answered)
          }
        }
        const pageAt = (entry) => batch.bytes.subarray(batch.offsets[entry], batch.offsets[entry] + batch.pageSize)
        const flushed = () => PageOperation.Flush
        if (kind < 75) {
          const put = Array.from({ length: entries }, newValue)
          for (let entry = 0; entry < entries; entry++) fillPage(pageAt(entry), put[entry])
          const invoked = now()
          pool.putMany(batch)
          const answered = now()
          each(
            (outcome) => (outcome === PutOutcome.Stored ? PageOperation.Put : PageOperation.RefusedPut),
            (entry) => put[entry],
            invoked,
            answered,
          )
        } else if (kind < 93) {
          const invoked = now()
          pool.getMany(batch)
          const answered = now()
          each(
            (outcome) => (outcome === GetOutcome.Hit ? PageOperation.Hit : PageOperation.Miss),
            (entry, outcome) => (outcome === GetOutcome.Hit ? readPage(pageAt(entry)) : 0),
            invoked,
            answered,
          )
        } else {
          const invoked = now()
          pool.flushMany(batch)
          each(flushed, () => 0, invoked, now())
        }
        count('batch')
      } else if (kind === 98) {
        const invoked = now()
        pool.flushObject(object)
        const answered = now()
        for (let page = 0; page < indexes * parts; page++)
          record(PageOperation.Flush, at - index * parts + page, 0, invoked, answered)
        count('flush object')
      } else {
        store.tick({ pages: 4 })
        const { counters } = store.stats()
        if (!(counters.pages >= 0 && counters.bytes <= counters.limit_bytes))
          throw new Error(`impossible statistics: ${JSON.stringify(counters)}`)
      }
    }
    return tally
  },

  /** Throws unless the invariants hold; the counters. */
  check({ store: handle }) {
    const store = SharedMemoryStore.attach(handle)
    store.check()
    return store.stats().counters
  },

  /** Makes a pool again and again, lets the others work in it, and destroys it in the midst of that. */
  destroyer({ store: handle, attributes, rounds, words, pages, history: memory, clock, gate, threads }) {
    const store = SharedMemoryStore.attach(handle)
    const history = new History(memory)
    const destroyed = []
    gather(gate, threads)
    for (let round = 0; round < rounds; round++) {
      const pool = store.newPool(attributes)
      if (typeof pool === 'number') throw new Error(`pool ${round} was refused: ${pool}`)
      Atomics.store(words, NUMBER, pool.number)
      Atomics.store(words, WORK, 0)
      bump(words, BEGUN)
      waitFor(words, OPENED, (opened) => opened >= (round + 1) * (threads - 1), 'the others to open the pool')
      waitFor(words, WORK, (done) => done >= 300, 'work in the pool')
      const invoked = Atomics.add(clock, 0, 1)
      pool.destroy()
      const answered = Atomics.add(clock, 0, 1)
      destroyed.push(answered)
      bump(words, ENDED)
      for (let page = 0; page < pages; page++)
        history.record(thread, PageOperation.Flush, round * pages + page, 0, invoked, answered)
      waitFor(words, LEFT, (left) => left >= (round + 1) * (threads - 1), 'the others to leave the pool')
    }
    return destroyed
  },

  /** Works in the destroyer's pools until each is gone, and looks at the one before meanwhile. */
  inhabitant({ store: handle, seed, rounds, words, pages, history: memory, clock, gate, threads }) {
    const store = SharedMemoryStore.attach(handle)
    const history = new History(memory)
    const random = randomOf(seed)
    const lastStored = []
    let value = 0
    let before
    gather(gate, threads)
    for (let round = 0; round < rounds; round++) {
      waitFor(words, BEGUN, (begun) => begun > round, 'the next pool')
      const pool = store.openPool(Atomics.load(words, NUMBER))
      if (typeof pool === 'number') throw new Error(`pool of round ${round} could not be opened: ${pool}`)
      bump(words, OPENED)
      const page = new Uint8Array(pool.attributes.pageSize)
      lastStored[round] = -1
      for (let done = 0, after = 0; after < 20; done++) {
        // When the destroyer gets no time to run, the history must not fill.
        if (done === 2000) waitFor(words, ENDED, (ended) => ended > round, 'the end of the pool')
        if (Atomics.load(words, ENDED) > round) after++
        const index = random(pages)
        const at = round * pages + index
        progress[thread * 2] = round
        const invoked = Atomics.add(clock, 0, 1)
        if (random(2) === 0) {
          fillPage(page, thread * 2 ** 22 + ++value)
          const outcome = pool.put(5, index, page)
          const stored = outcome === PutOutcome.Stored
          if (!stored && outcome !== PutOutcome.PoolGone) throw new Error(`a put was refused: ${outcome}`)
          const answered = Atomics.add(clock, 0, 1)
          history.record(
            thread,
            stored ? PageOperation.Put : PageOperation.RefusedPut,
            at,
            thread * 2 ** 22 + value,
            invoked,
            answered,
          )
          if (stored) lastStored[round] = invoked
        } else {
          const hit = pool.get(5, index, page) === GetOutcome.Hit
          const answered = Atomics.add(clock, 0, 1)
          history.record(
            thread,
            hit ? PageOperation.Hit : PageOperation.Miss,
            at,
            hit ? readPage(page) : 0,
            invoked,
            answered,
          )
        }
        // Whoever has its number now.
        if (before !== undefined) {
          if (before.put(5, index, page) !== PutOutcome.PoolGone) throw new Error('a destroyed pool took a page')
          if (before.get(5, index, page) !== GetOutcome.Miss) throw new Error('a destroyed pool has a page')
          if (before.split().get(5, index, page.subarray(0, 4096)) !== GetOutcome.Miss)
            throw new Error('a destroyed pool has a part')
          before.flushObject(5)
          before.destroy()
        }
        bump(words, WORK)
      }
      before = pool
      bump(words, LEFT)
    }
    return lastStored
  },

  /** Makes pools until there are `count` or none are to be had; puts a page into each that tells whose it is. */
  makePools({ store: handle, count, seed, gate, threads }) {
    const store = SharedMemoryStore.attach(handle)
    const random = randomOf(seed)
    const made = []
    let refusal = 0
    gather(gate, threads)
    while (made.length < count && refusal === 0) {
      const persistent = random(2) === 0
      const shared = !persistent && random(2) === 0
      const attributes = { client: thread, persistent, shared, pageSize: 4096 << random(3) }
      const pool = store.newPool(attributes)
      progress[thread * 2]++
      if (typeof pool === 'number') {
        refusal = pool
        continue
      }
      const page = new Uint8Array(attributes.pageSize)
      fillPage(page, thread * 1000 + pool.number)
      made.push({ number: pool.number, attributes, outcome: pool.put(1, 2, page) })
    }
    return { made, refusal }
  },

  /** Makes pools and destroys them again, a few at a time; each holds this thread's page. */
  churn({ store: handle, rounds, seed, gate, threads }) {
    const store = SharedMemoryStore.attach(handle)
    const random = randomOf(seed)
    const pools = []
    const page = new Uint8Array(4096)
    gather(gate, threads)
    for (let round = 0; round < rounds; round++) {
      progress[thread * 2] = round
      const which = random(4)
      const old = pools[which]
      if (old !== undefined) {
        const outcome = old.pool.get(which, 7, page)
        if (outcome !== GetOutcome.Hit || readPage(page) !== old.value)
          throw new Error(`the page of pool ${old.pool.number} is not there: ${outcome}`)
        old.pool.destroy()
      }
      const pool = store.newPool({ client: thread, persistent: true, shared: false, pageSize: 4096 })
      if (typeof pool === 'number') throw new Error(`a pool was refused: ${pool}`)
      const value = thread * 2 ** 22 + round
      fillPage(page, value)
      const outcome = pool.put(which, 7, page)
      if (outcome !== PutOutcome.Stored) throw new Error(`a put into pool ${pool.number} was refused: ${outcome}`)
      pools[which] = { pool, value }
    }
    return pools.filter((one) => one !== undefined).length
  },

  /** Opens pools of another thread, reads their pages, and destroys some. */
  visitPools({ store: handle, whose, made, destroy, gate, threads }) {
    const store = SharedMemoryStore.attach(handle)
    const pools = made.map(({ number }) => store.openPool(number))
    gather(gate, threads)
    return made.map(({ number }, i) => {
      const pool = pools[i]
      if (typeof pool === 'number') return { refusal: pool }
      const page = new Uint8Array(pool.attributes.pageSize)
      const hit = pool.get(1, 2, page) === GetOutcome.Hit
      if (i % destroy === 0) pool.destroy()
      return { attributes: pool.attributes, own: hit && readPage(page) === whose * 1000 + number }
    })
  },

  /** Freezes and thaws; when each began and ended. */
  freezer({ store: handle, number, rounds, words, clock, gate, threads }) {
    const pool = SharedMemoryStore.attach(handle).openPool(number)
    const periods = []
    const now = () => Atomics.add(clock, 0, 1)
    gather(gate, threads)
    const work = () => {
      const begun = Atomics.load(words, 0)
      waitFor(words, 0, (done) => done >= begun + 60, 'puts')
    }
    for (let round = 0; round < rounds; round++) {
      work()
      const freezing = now()
      pool.freeze()
      const frozen = now()
      work()
      const thawing = now()
      pool.thaw()
      periods.push({ freezing, frozen, thawing, thawed: now() })
    }
    Atomics.store(words, 1, 1)
    return periods
  },

  /** Puts pages under handles that are new each time. */
  newcomer({ store: handle, number, words, clock, gate, threads }) {
    const pool = SharedMemoryStore.attach(handle).openPool(number)
    const puts = []
    const page = new Uint8Array(4096)
    gather(gate, threads)
    for (let i = 0; Atomics.load(words, 1) === 0; i++) {
      fillPage(page, i)
      progress[thread * 2] = i
      const invoked = Atomics.add(clock, 0, 1)
      const outcome = pool.put(thread, i % 32, page)
      puts.push({ invoked, outcome, answered: Atomics.add(clock, 0, 1) })
      pool.flushPage(thread, i % 32)
      bump(words, 0)
    }
    return puts
  },

  /** Puts and flushes pages of one client up to its maximum; in the end as many as go in. The pages stored. */
  spender({ store: handle, number, client, maximum, seed, operations, gate, threads }) {
    const store = SharedMemoryStore.attach(handle)
    const pool = store.openPool(number)
    const random = randomOf(seed)
    const page = new Uint8Array(pool.attributes.pageSize)
    const have = new Set()
    let refused = 0
    const put = (index) => {
      const outcome = pool.put(thread, index, page)
      if (outcome === PutOutcome.Stored) have.add(index)
      else if (outcome === PutOutcome.Quota) {
        have.delete(index)
        refused++
      } else throw new Error(`a put was refused: ${outcome}`)
    }
    gather(gate, threads)
    for (let i = 0; i < operations; i++) {
      const index = random(maximum)
      progress[thread * 2] = i
      if (random(3) > 0) put(index)
      else {
        pool.flushPage(thread, index)
        have.delete(index)
      }
      const charged = store.charged(client)
      if (charged > maximum * page.length) throw new Error(`${charged} bytes charged, the maximum is ${maximum} pages`)
      if (charged < have.size * page.length) throw new Error(`${charged} bytes charged, ${have.size} pages stored here`)
    }
    for (let index = 0; index < maximum; index++) if (!have.has(index)) put(index)
    return { stored: have.size, refused }
  },

  /** Puts, gets and flushes pages in a pool of its own until it is told to stop. */
  neighbour({ store: handle, seed, words }) {
    const [STOP, BEGUN] = [0, 1]
    const store = SharedMemoryStore.attach(handle)
    const pool = store.newPool({ client: 60_000, persistent: true, shared: false, pageSize: 4096 })
    bump(words, BEGUN)
    if (typeof pool === 'number') throw new Error(`the pool was refused: ${pool}`)
    const random = randomOf(seed)
    const page = new Uint8Array(4096)
    const held = new Map()
    for (let operation = 1; Atomics.load(words, STOP) === 0; operation++) {
      const index = random(16)
      const kind = random(4)
      if (kind < 2) {
        fillPage(page, operation)
        if (pool.put(1, index, page) === PutOutcome.Stored) held.set(index, operation)
        else held.delete(index)
      } else if (kind === 2) {
        const found = pool.get(1, index, page) === GetOutcome.Hit ? readPage(page) : undefined
        if (found !== held.get(index)) throw new Error(`page ${index} is ${found}, not ${held.get(index)}`)
      } else {
        pool.flushPage(1, index)
        held.delete(index)
      }
      // Leaves the processor to others now and then.
      if (operation % 200 === 0) Atomics.wait(words, STOP, 0, 0.2)
    }
    pool.destroy()
    if (seed % 16 === 0) collectGarbage()
  },

  /** One put (or without a value get) of the page 0 of object 1; the outcome, and what was found. */
  once({ store: handle, number, value }) {
    const store = SharedMemoryStore.attach(handle)
    const pool = store.openPool(number)
    if (typeof pool === 'number') return { refusal: pool }
    const page = new Uint8Array(pool.attributes.pageSize)
    if (value === undefined) {
      const outcome = pool.get(1, 0, page)
      return outcome === GetOutcome.Hit ? { outcome, value: readPage(page) } : { outcome }
    }
    fillPage(page, value)
    return { outcome: pool.put(1, 0, page) }
  },

  /** Calls everything from inside of a borrower; what each call threw. */
  async misuse({ store: handle, number }) {
    const store = SharedMemoryStore.attach(handle)
    const pool = store.openPool(number)
    const { pageSize } = pool.attributes
    const page = new Uint8Array(pageSize)
    fillPage(page, 77)
    pool.put(1, 0, page)
    const batch = new PageBatch(1, pageSize)
    batch.push(2, 0)
    const view = pool.split()
    const calls = {
      put: () => pool.put(2, 0, page),
      get: () => pool.get(1, 0, page),
      fetch: () => pool.fetch(1, 0, page),
      flushPage: () => pool.flushPage(1, 0),
      flushObject: () => pool.flushObject(1),
      putMany: () => pool.putMany(batch),
      getMany: () => pool.getMany(batch),
      flushMany: () => pool.flushMany(batch),
      lend: () => pool.lend(1, 0, () => {}),
      'put of a part': () => view.put(1, 0, page.subarray(0, 4096)),
      freeze: () => pool.freeze(),
      thaw: () => pool.thaw(),
      destroy: () => pool.destroy(),
      newPool: () => store.newPool(pool.attributes),
      openPool: () => store.openPool(number),
      tick: () => store.tick({ pages: 1 }),
      stats: () => store.stats(),
      check: () => store.check(),
      close: () => store.close(),
    }
    const thrown = {}
    const promises = []
    const said = (name) => (error) => {
      thrown[name] = `${error.name}: ${error.message}`
    }
    pool.lend(1, 0, () => {
      for (const [name, call] of Object.entries(calls)) {
        thrown[name] = 'nothing'
        try {
          const answer = call()
          if (answer instanceof Promise) promises.push(answer.catch(said(name)))
        } catch (error) {
          said(name)(error)
        }
      }
    })
    await Promise.all(promises)
    const mistakes = {
      'a borrower that throws': () =>
        pool.lend(1, 0, () => {
          throw new Error('thrown by the borrower')
        }),
      'a short page': () => pool.put(1, 0, page.subarray(1)),
      'no page': () => pool.get(1, 0, undefined),
      'an object that is none': () => pool.put('one', 0, page),
      'a negative object': () => pool.put(-1n, 0, page),
      'half an object': () => pool.flushObject(0.5),
      'an index that is none': () => pool.flushPage(1, 2 ** 32),
      'no batch': () => pool.getMany([]),
      'a negative maximum': () => store.setMaximum(1, -1),
      'half a weight': () => store.setWeight(1, 0.5),
    }
    for (const [name, call] of Object.entries(mistakes))
      try {
        call()
        thrown[name] = 'nothing'
      } catch (error) {
        said(name)(error)
      }
    const after = new Uint8Array(pageSize)
    const outcome = pool.get(1, 0, after)
    return { thrown, outcome, value: readPage(after) }
  },

  /** Closes this thread's use of a store; what is possible afterwards. */
  async leave({ store: handle, number, attributes }) {
    const store = SharedMemoryStore.attach(handle)
    await store.close()
    await store.close()
    return {
      newPool: store.newPool(attributes),
      openPool: store.openPool(number),
      tick: store.tick({ pages: 9 }).pages,
    }
  },

  /** Holds a pool open until the store was closed elsewhere; what is possible then. */
  stay({ store: handle, number, attributes, words }) {
    const store = SharedMemoryStore.attach(handle)
    const pool = store.openPool(number)
    const page = new Uint8Array(attributes.pageSize)
    fillPage(page, 1)
    const before = pool.put(3, 3, page)
    bump(words, 0)
    waitFor(words, 1, (closed) => closed === 1, 'the store to be closed')
    const newPool = store.newPool(attributes)
    return { before, put: pool.put(3, 3, page), get: pool.get(3, 3, page), newPool, openPool: store.openPool(number) }
  },
}

/** A pool that now and then returns what this thread saw of the page before. */
function stale(pool, random) {
  const seen = new Map()
  return {
    attributes: pool.attributes,
    put: (object, index, page) => pool.put(object, index, page),
    get(object, index, into) {
      const before = seen.get(`${object}/${index}`)
      if (before !== undefined && random(100) === 0) {
        into.set(before)
        return GetOutcome.Hit
      }
      const outcome = pool.get(object, index, into)
      if (outcome === GetOutcome.Hit) seen.set(`${object}/${index}`, into.slice())
      return outcome
    },
  }
}

parentPort.on('message', ({ id, task, args }) => {
  new Promise((resolve) => resolve(tasks[task](args))).then(
    (value) => parentPort.postMessage({ id, value }),
    (error) => parentPort.postMessage({ id, error: `${error.name}: ${error.message}`, stack: error.stack }),
  )
})
