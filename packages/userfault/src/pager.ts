/**
 * The pager: the thread that answers the page faults of one `SwappableBuffer`.
 *
 * A page is absent (its bytes are in the store, or it is all zeros) or resident. It comes in write-protected, and its
 * copy in the store stays; the first store to it is a second fault, which marks it dirty and flushes the copy. So a
 * page that was only read is dropped for nothing, and no page is compressed twice without having been written in
 * between. A fault that wants to write makes the page dirty at once.
 *
 * Which page goes: 2Q (Johnson and Shasha, 1994) over what a pager can see, which is faults only. A page comes in at
 * the end of the probation queue; one that comes back after fewer evictions than there are frames goes to the hot queue
 * instead. The oldest page of probation goes while that has more than a quarter of the frames, else the oldest hot one.
 * A page whose first store was seen since it came in is passed over once. Reads of a resident page cost nothing and are
 * not seen: both queues are in the order of faults, not of use.
 *
 * Invariants:
 *  - The pager never touches an absent page of the region: it would wait for itself.
 *  - A dirty page is write-protected from before its bytes are read until it is gone or made writable by a fault: no
 *    store is lost.
 *  - COPY is set exactly while the store holds the bytes that the page has; a page without COPY and without DIRTY is
 *    all zeros.
 *  - Resident pages are in exactly one queue. There are more of them than the limit only while the store refuses them.
 *  - A fault that finds things changed (another thread's fault was first, the page went meanwhile) is answered by a
 *    wake-up:
 *    the thread looks again.
 *  - Any failure ends the process (`guard`): neither a hang nor a wrong byte.
 */
import { writeSync } from 'node:fs'
import { setImmediate, setTimeout } from 'node:timers/promises'
import { parentPort, workerData } from 'node:worker_threads'
import {
  compose,
  factoriesIn,
  GetOutcome,
  type LayerFactory,
  PageBatch,
  type PageStore,
  Pending,
  type Pool,
  PutOutcome,
  poolRefusalName,
  putOutcomeCount,
  putOutcomeName,
  type StatsNode,
  stackFromData,
  TmemError,
} from '@tmem/core'
import { memoryFactory } from '@tmem/memory'
import {
  argumentAt,
  COMMAND,
  Command,
  DONE,
  fatalPrefix,
  fatalSuffix,
  lostPagerStatus,
  type PagerMessage,
  type PagerTask,
  sharedWords,
} from './protocol.ts'
import { faultWrite, faultWriteProtected, type Guard, type Mapping, messageBatch, System } from './system.ts'

// Bits of a page's state.
const RESIDENT = 1
/** Resident, and a store to it is a fault. */
const PROTECTED = 2
/** Written since it came in. */
const DIRTY = 4
/** The store holds its bytes. */
const COPY = 8
/** Its first store was seen since it came in, or since the queue's end passed it. */
const REFERENCED = 16
/** Absent, and being fetched. */
const LOADING = 32
/** LOADING, and somebody wants to write. */
const WANTED = 64
/** It was evicted before: `evictedAt` holds. */
const EVICTED = 128

const none = -1
/** The one object under which the pages are stored: the page number is the index. */
const object = 0
/** Pages that are fetched at once; more have to wait. */
const maxFetches = 16
/** Dirty pages that one eviction offers to a store that refuses. */
const maxOffers = 4
/** A stack that answers a fetch later than this is taken for dead. */
const patienceMs = 60_000
/** While a fetch is under way the pager looks for its answer all the time, then once a millisecond. */
const spinMs = 1
const idleMs = 100
/**
 * A thread that is to end does nothing for so long first. Node 20 aborts, seldom, when a worker ends while a function
 * of it is being compiled in the background: it forgets the worker's isolate before V8 has waited for that.
 */
const graceMs = 50
/** Frames kept free for the faults that come in at once, so that the limit holds at every moment. */
const headroom = messageBatch
/** Faults after which the event loop gets a turn, and the stack the background work that it asked for. */
const turnFaults = 256
const tickPages = 8
const idleTickPages = 64

/** A queue of resident pages, oldest first; the links of all queues are in one array. */
class Queue {
  length = 0
  #oldest = none
  #newest = none
  readonly #next: Int32Array

  constructor(next: Int32Array) {
    this.#next = next
  }

  push(page: number): void {
    if (this.length === 0) this.#oldest = page
    else this.#next[this.#newest] = page
    this.#newest = page
    this.length++
  }

  shift(): number {
    const page = this.#oldest
    this.#oldest = this.#next[page]!
    this.length--
    return page
  }
}

/** Whether the stack wants a `tick`. */
interface Background {
  wanted: boolean
}

class Pager {
  readonly #task: PagerTask
  readonly #system: System
  readonly #guard: Guard
  readonly #store: PageStore
  readonly #background: Background
  readonly #pool: Pool
  readonly #pageSize: number
  readonly #state: Uint8Array
  /** By page: number of evictions before its last one, modulo 2^32. */
  readonly #evictedAt: Uint32Array
  readonly #probation: Queue
  readonly #hot: Queue
  readonly #memory: Mapping
  /** Where pages come in: one for `get`, then one for each fetch. */
  readonly #in: PageBatch
  readonly #out: PageBatch
  readonly #words: Int32Array
  readonly #argument: Float64Array
  readonly #fetchBuffers: readonly Uint8Array[]
  readonly #freeFetches: number[]
  /** Pages that wait for a free place to be fetched to. */
  readonly #backlog: number[] = []
  #fetching = 0
  #oldestFetch = 0
  #failure: unknown
  #closing = false
  #disarmed = false
  #faultsAtTurn = 0

  #missingFaults = 0
  #writeFaults = 0
  #staleFaults = 0
  #zeroFills = 0
  #loads = 0
  #deferredLoads = 0
  #refaults = 0
  #resident = 0
  #residentMax = 0
  #dirty = 0
  #evictions = 0
  #cleanDrops = 0
  #stores = 0
  #secondChances = 0
  #limitExceeded = 0
  #trimmed = 0
  readonly #refused: Float64Array = new Float64Array(putOutcomeCount)

  constructor(
    task: PagerTask,
    system: System,
    guard: Guard,
    store: PageStore,
    background: Background,
    pool: Pool,
    memory: Mapping,
  ) {
    const { pageSize } = system
    this.#task = task
    this.#system = system
    this.#guard = guard
    this.#store = store
    this.#background = background
    this.#pool = pool
    this.#pageSize = pageSize
    this.#memory = memory
    this.#state = new Uint8Array(task.pages)
    this.#evictedAt = new Uint32Array(task.pages)
    const next = new Int32Array(task.pages)
    this.#probation = new Queue(next)
    this.#hot = new Queue(next)
    this.#words = new Int32Array(task.shared, 0, sharedWords)
    this.#argument = new Float64Array(task.shared, argumentAt, 1)
    // First the page of zeros, then the place for gets, then those for fetches.
    this.#in = new PageBatch(1, pageSize, new Uint8Array(memory.buffer))
    this.#in.push(object, 0, pageSize)
    this.#out = new PageBatch(1, pageSize, new Uint8Array(system.view(task.address, task.pages * pageSize)))
    this.#out.push(object, 0, 0)
    this.#fetchBuffers = Array.from(
      { length: maxFetches },
      (_, n) => new Uint8Array(memory.buffer, (2 + n) * pageSize, pageSize),
    )
    this.#freeFetches = this.#fetchBuffers.map((_, n) => n)
  }

  /** Answers faults and commands until it is told to close. */
  async run(): Promise<void> {
    const { fd, bell } = this.#task
    while (!this.#closing) {
      const ready = this.#system.wait(fd, bell, this.#patience())
      if ((ready & 1) !== 0) this.#answerFaults()
      if ((ready & 2) !== 0) {
        this.#system.silence(bell)
        this.#obey()
      }
      if (ready === 0 && this.#fetching === 0) this.#tick(idleTickPages)
      const faults = this.#missingFaults
      if (faults - this.#faultsAtTurn >= turnFaults) {
        this.#faultsAtTurn = faults
        this.#tick(tickPages)
      } else if (ready !== 0 && this.#fetching === 0) continue
      // What the layers wait for comes in through the event loop.
      await setImmediate()
      if (this.#failure !== undefined) throw this.#failure
    }
  }

  /** Does background work of the stack, if that has asked for some. */
  #tick(pages: number): void {
    const background = this.#background
    if (!background.wanted) return
    background.wanted = false
    if (this.#store.tick({ pages }).pending) background.wanted = true
  }

  /** Milliseconds to wait for a fault. */
  #patience(): number {
    if (this.#fetching > 0) {
      const waited = performance.now() - this.#oldestFetch
      if (waited > patienceMs)
        throw new TmemError('TMEM_IO', `the stack has not answered a fetch within ${patienceMs / 1000} s`)
      return waited < spinMs ? 0 : 1
    }
    if (this.#background.wanted) return 0
    return this.#disarmed ? graceMs : idleMs
  }

  #answerFaults(): void {
    const { fd, address } = this.#task
    const system = this.#system
    for (let count = messageBatch; count === messageBatch; ) {
      count = system.readMessages(fd)
      for (let n = 0; n < count; n++) {
        const page = Math.floor((system.messageAddress(n) - address) / this.#pageSize)
        const flags = system.messageFlags(n)
        if ((flags & faultWriteProtected) !== 0) this.#firstStore(page)
        else this.#missing(page, (flags & faultWrite) !== 0)
      }
      this.#makeRoom()
    }
  }

  /** Evicts until there is room for the next faults, or the store refuses. */
  #makeRoom(): void {
    const { limit, pages } = this.#task
    // With room for every page none has to go.
    const most = limit === pages ? pages : limit - headroom
    while (this.#resident > most)
      if (!this.#evict()) {
        if (this.#resident > limit) this.#limitExceeded++
        return
      }
  }

  /** Somebody touched a page that is not there. */
  #missing(page: number, write: boolean): void {
    const state = this.#state[page]!
    this.#missingFaults++
    if ((state & RESIDENT) !== 0) {
      this.#lookAgain(page)
      return
    }
    if ((state & LOADING) !== 0) {
      if (write) this.#state[page] = state | WANTED
      return
    }
    if ((state & COPY) === 0) {
      this.#zeroFills++
      this.#mapIn(page, 0, write)
      return
    }
    const batch = this.#in
    batch.indexes[0] = page
    batch.outcomes[0] = Pending
    this.#pool.getMany(batch)
    switch (batch.outcomes[0] as GetOutcome) {
      case GetOutcome.Hit:
        this.#loads++
        this.#mapIn(page, this.#pageSize, write)
        return
      case GetOutcome.Deferred:
        this.#state[page] = state | LOADING | (write ? WANTED : 0)
        this.#deferredLoads++
        if (this.#freeFetches.length === 0) this.#backlog.push(page)
        else this.#startFetch(page)
        return
      case GetOutcome.Miss:
        throw this.#lost(page)
    }
  }

  #startFetch(page: number): void {
    if (this.#fetching === 0) this.#oldestFetch = performance.now()
    this.#fetching++
    this.#fetch(page, this.#freeFetches.pop()!).catch((error: unknown) => {
      this.#failure ??= error
    })
  }

  async #fetch(page: number, place: number): Promise<void> {
    const outcome = await this.#pool.fetch(object, page, this.#fetchBuffers[place]!)
    this.#fetching--
    // An answer shows that the stack lives.
    this.#oldestFetch = performance.now()
    if (this.#closing) return
    if (outcome !== GetOutcome.Hit) throw this.#lost(page)
    const state = this.#state[page]!
    this.#state[page] = state & ~(LOADING | WANTED)
    this.#mapIn(page, (2 + place) * this.#pageSize, (state & WANTED) !== 0)
    this.#freeFetches.push(place)
    const waiting = this.#backlog.shift()
    if (waiting !== undefined) this.#startFetch(waiting)
    this.#makeRoom()
  }

  /** Makes a page resident with the bytes at `source` of the pager's memory; those who wait go on. */
  #mapIn(page: number, source: number, write: boolean): void {
    const { fd, address, limit } = this.#task
    const state = this.#state[page]!
    const at = address + page * this.#pageSize
    // The state says absent, and only the pager fills: it cannot be there.
    if (!this.#system.fill(fd, at, this.#memory.address + source, !write))
      throw new TmemError('TMEM_BROKEN', `page ${page} was filled by somebody else`)
    this.#resident++
    if (this.#resident > this.#residentMax) this.#residentMax = this.#resident
    const again = (state & EVICTED) !== 0 && (this.#evictions - this.#evictedAt[page]!) >>> 0 < limit
    if (again) {
      this.#refaults++
      this.#hot.push(page)
    } else this.#probation.push(page)
    if (!write) {
      this.#state[page] = state | RESIDENT | PROTECTED
      return
    }
    this.#dirty++
    this.#state[page] = (state & ~COPY) | RESIDENT | DIRTY
    if ((state & COPY) !== 0) this.#pool.flushPage(object, page)
  }

  /** Somebody stores to a protected page. */
  #firstStore(page: number): void {
    const state = this.#state[page]!
    this.#writeFaults++
    if ((state & PROTECTED) === 0) {
      // It went meanwhile, or another thread's store was first.
      this.#lookAgain(page)
      return
    }
    this.#state[page] = (state & ~(PROTECTED | COPY)) | DIRTY | REFERENCED
    if ((state & DIRTY) === 0) this.#dirty++
    this.#system.protect(this.#task.fd, this.#task.address + page * this.#pageSize, false)
    // The copy is out of date from now on.
    if ((state & COPY) !== 0) this.#pool.flushPage(object, page)
  }

  #lookAgain(page: number): void {
    this.#staleFaults++
    this.#system.wake(this.#task.fd, this.#task.address + page * this.#pageSize)
  }

  /** Makes one page absent. False: the store refused all that were offered. */
  #evict(): boolean {
    const { fd, address } = this.#task
    let offers = 0
    while (this.#resident > 0) {
      const probation = this.#probation
      const hot = this.#hot
      // A quarter of the pages, or more when there are no hot ones.
      const queue = probation.length * 4 > this.#resident || hot.length === 0 ? probation : hot
      const page = queue.shift()
      const state = this.#state[page]!
      const at = address + page * this.#pageSize
      if ((state & REFERENCED) !== 0) {
        this.#state[page] = state & ~REFERENCED
        this.#secondChances++
        queue.push(page)
        continue
      }
      if ((state & DIRTY) === 0) this.#cleanDrops++
      else if (offers === maxOffers) {
        queue.push(page)
        return false
      } else {
        offers++
        if ((state & PROTECTED) === 0) this.#system.protect(fd, at, true)
        const batch = this.#out
        batch.indexes[0] = page
        batch.offsets[0] = page * this.#pageSize
        batch.outcomes[0] = Pending
        this.#pool.putMany(batch)
        const outcome = batch.outcomes[0] as PutOutcome
        if (outcome !== PutOutcome.Stored) {
          this.#refused[outcome] = this.#refused[outcome]! + 1
          this.#state[page] = state | PROTECTED
          queue.push(page)
          continue
        }
        this.#stores++
        this.#dirty--
      }
      this.#system.drop(at, this.#pageSize)
      this.#state[page] = EVICTED | ((state & (DIRTY | COPY)) === 0 ? 0 : COPY)
      this.#evictedAt[page] = this.#evictions
      this.#evictions++
      this.#resident--
      return true
    }
    return false
  }

  /** Does what the owner wants, and wakes it. */
  #obey(): void {
    const command = Atomics.exchange(this.#words, COMMAND, Command.none) as Command
    switch (command) {
      case Command.none:
        return
      case Command.trim:
        this.#argument[0] = this.#trim(this.#argument[0]!)
        break
      case Command.stats:
        this.#task.port.postMessage(this.#stats())
        break
      case Command.disarm:
        this.#disarmed = true
        this.#guard.disarm()
        break
      case Command.close:
        this.#closing = true
        this.#system.unregister(this.#task.fd, this.#task.address, this.#task.pages * this.#pageSize)
        break
    }
    Atomics.store(this.#words, DONE, 1)
    Atomics.notify(this.#words, DONE)
  }

  #trim(bytes: number): number {
    const wanted = Math.min(Math.ceil(bytes / this.#pageSize), this.#resident)
    let pages = 0
    while (pages < wanted && this.#evict()) {
      pages++
      // Other threads may wait for pages meanwhile.
      if (pages % messageBatch === 0) this.#answerFaults()
    }
    this.#trimmed += pages
    return pages * this.#pageSize
  }

  #stats(): StatsNode {
    const refused: Record<string, number> = {}
    for (let outcome = 0; outcome < putOutcomeCount; outcome++)
      if (this.#refused[outcome]! > 0) refused[`refused${putOutcomeName(outcome)}`] = this.#refused[outcome]!
    const { pages, limit } = this.#task
    return {
      name: 'userfault',
      counters: {
        pages,
        limit,
        resident: this.#resident,
        residentMax: this.#residentMax,
        dirty: this.#dirty,
        hot: this.#hot.length,
        missingFaults: this.#missingFaults,
        writeFaults: this.#writeFaults,
        staleFaults: this.#staleFaults,
        zeroFills: this.#zeroFills,
        loads: this.#loads,
        deferredLoads: this.#deferredLoads,
        refaults: this.#refaults,
        evictions: this.#evictions,
        cleanDrops: this.#cleanDrops,
        stores: this.#stores,
        secondChances: this.#secondChances,
        trimmed: this.#trimmed,
        limitExceeded: this.#limitExceeded,
        exceededPages: Math.max(0, this.#resident - limit),
        ...refused,
      },
      children: [this.#store.stats()],
    }
  }

  #lost(page: number): TmemError {
    return new TmemError('TMEM_BROKEN', `the stack has lost page ${page}, which it had stored`)
  }
}

/** The layers that modules export, and the one of the core. */
async function factoriesOf(modules: readonly string[]): Promise<LayerFactory[]> {
  const factories: LayerFactory[] = [memoryFactory]
  for (const module of modules) {
    const found = factoriesIn((await import(module)) as Record<string, unknown>)
    if (found.length === 0) throw new TypeError(`${module} exports no layer factory`)
    factories.push(...found)
  }
  return factories
}

async function main(task: PagerTask): Promise<void> {
  const { cpu } = task
  const post = (message: PagerMessage): void => parentPort?.postMessage(message)
  let system: System
  let guard: Guard
  let store: PageStore
  let pager: Pager
  try {
    system = await System.load()
    if (cpu !== undefined) system.pin(cpu)
    const { pageSize } = system
    const layers = stackFromData(task.stack, await factoriesOf(task.modules))
    const background: Background = { wanted: false }
    store = compose(layers, {
      requirement: { by: 'userfault', persistent: true, pageSize },
      clock: () => performance.now(),
      wake: () => {
        background.wanted = true
      },
      // Threads of the runtime's pool wait for pages of the region: when all of them do, none is left to read or write
      // one.
      io: 'blocking',
    })
    const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize })
    if (typeof pool === 'number') {
      await store.close()
      throw new TmemError('TMEM_BAD_STACK', `the stack refused a persistent pool: ${poolRefusalName(pool)}`)
    }
    const memory = system.map((2 + maxFetches) * pageSize)
    guard = system.guard(
      `${fatalPrefix}the pager's thread has ended${fatalSuffix}; last errno`,
      lostPagerStatus,
      task.fd,
    )
    pager = new Pager(task, system, guard, store, background, pool, memory)
  } catch (error) {
    post({
      kind: 'failed',
      code: error instanceof TmemError ? error.code : undefined,
      message: error instanceof Error ? error.message : String(error),
    })
    return
  }
  post({ kind: 'open' })
  try {
    await pager.run()
  } catch (error) {
    writeSync(2, `${fatalPrefix}${error instanceof Error ? error.message : String(error)}${fatalSuffix}\n`)
    system.endProcess(lostPagerStatus)
  }
  // Nobody waits for a fault any more: from here on an error is an ordinary one.
  let failure: string | undefined
  await store.close().catch((error: unknown) => {
    failure = error instanceof Error ? error.message : String(error)
  })
  guard.release()
  system.close(task.fd)
  post({ kind: 'closed', error: failure })
  await setTimeout(graceMs)
}

await main(workerData as PagerTask)
