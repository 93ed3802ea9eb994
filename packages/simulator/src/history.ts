/**
 * One history: a stack is drawn, what is done to it, and what goes wrong meanwhile, all from two numbers. Every answer
 * is compared with the reference; at the end all comes to rest, and every page is asked for once more.
 *
 * Rules, besides those of the reference (`model.ts`):
 *  - A put is not refused while its page is sure to find room, unless something has gone wrong.
 *  - A fetch, a sync and a close come back, when the transfers do.
 *  - What `sync` says is synced; no two writes under way touch the same bytes; a file is closed once, with nothing
 *    under way.
 *  - A limit is kept; a lowered one is reached as far as pages can go elsewhere.
 *  - A client pays for its pages, and for nothing when they are gone.
 *  - The stack's own invariants hold (`PageStore.check`), and its statistics add up.
 *
 * Everything happens in microtasks: no timer, no real time. So the same numbers give the same history, in the last
 * detail.
 */
import {
  type BlockCodec,
  type ClientAccounts,
  checkOptions,
  createAccounts,
  GetOutcome,
  maxBlockBytes,
  PageBatch,
  type PageStore,
  Pending,
  PutOutcome,
  poolRefusalName,
  putOutcomeName,
  TmemError,
} from '@tmem/core'
import { blockCodec } from '@tmem/zcache'
import { Complaint, type Fetch, Model, ModelPool } from './model.ts'
import { Pages } from './pages.ts'
import { Random } from './random.ts'
import { drawShape, openShape, type Shape } from './stack.ts'
import { drawRates, type FaultCounts, MemoryPool, World } from './world.ts'

/** Operations at most: mostly few, because a fault shows in few, and costs none of the time of others. */
const lengths: readonly number[] = [220, 220, 220, 220, 220, 260, 260, 260, 300, 300, 600, 2000]
/** What somebody says who does not wait any more. */
const impatience: Error = new Error('it takes too long')

/** Page sizes of the pools of a history: mostly one, because what costs is bytes. */
const pageSizes: readonly (readonly number[])[] = [[4096], [4096, 8192, 16384], [4096, 65536, 131072]]

/** What is done in a history, in the order of its weights. */
const operations = [
  'put',
  'replace',
  'get',
  'fetch',
  'lend',
  'flushPage',
  'flushObject',
  'putMany',
  'replaceMany',
  'getMany',
  'fetchMany',
  'flushMany',
  'release',
  'putBack',
  'sink',
  'recompress',
  'compact',
  'tick',
  'sync',
  'freeze',
  'pool',
  'limit',
  'quota',
  'wait',
  'outage',
  'end',
] as const
type Operation = (typeof operations)[number]

/** Weight of each at most: what ends many pages must be rare, or nothing ever fills. */
const usual: Readonly<Record<Operation, number>> = {
  put: 60,
  replace: 20,
  get: 40,
  fetch: 40,
  lend: 4,
  flushPage: 15,
  flushObject: 1,
  putMany: 10,
  replaceMany: 6,
  getMany: 6,
  fetchMany: 4,
  flushMany: 2,
  release: 10,
  putBack: 8,
  sink: 3,
  recompress: 1,
  compact: 1,
  tick: 12,
  sync: 2,
  freeze: 1,
  pool: 0.4,
  limit: 1,
  quota: 0.5,
  wait: 15,
  outage: 0.3,
  end: 0.05,
}

/** Fetches at once: more than a stack reads at once, so that some wait. */
const maxFetches = 24
/** Turns of the queue of microtasks after which nothing goes on by itself any more. */
const fullDrain = 20
const turn: Promise<void> = Promise.resolve()
const clients = 3

/** What a history did. */
export interface HistoryReport {
  readonly stack: string
  readonly operations: number
  readonly faults: FaultCounts
  readonly pages: number
}

/** A history that found a wrong answer. */
export class HistoryFailure extends Error {
  readonly seed: number
  readonly history: number
  /** The stack, as far as a text can say it. */
  readonly stackText: string
  /** Operations until then. */
  readonly operation: number

  constructor(seed: number, history: number, stack: string, operation: number, cause: unknown) {
    const what = cause instanceof Error ? cause.message : String(cause)
    super(`${what} (${stack}; operation ${operation})`, { cause })
    this.seed = seed
    this.history = history
    this.stackText = stack
    this.operation = operation
  }
}

/** What histories of one run share: memory to work in, and a codec. */
export class Workshop {
  readonly codec: BlockCodec = blockCodec('lz4')
  readonly pages: Pages = new Pages()
  readonly memory: MemoryPool = new MemoryPool()
  readonly #buffers = new Map<number, Uint8Array[]>()
  readonly #batches = new Map<number, PageBatch>()

  /** A page to fetch into. */
  borrow(length: number): Uint8Array {
    return this.#buffers.get(length)?.pop() ?? new Uint8Array(length)
  }

  giveBack(buffer: Uint8Array): void {
    const list = this.#buffers.get(buffer.length)
    if (list === undefined) this.#buffers.set(buffer.length, [buffer])
    else list.push(buffer)
  }

  batch(pageSize: number): PageBatch {
    let batch = this.#batches.get(pageSize)
    if (batch === undefined) {
      batch = new PageBatch(pageSize > 16384 ? 4 : 24, pageSize)
      this.#batches.set(pageSize, batch)
    }
    batch.clear()
    return batch
  }
}

/** How a history is run. */
export interface HistoryOptions {
  /** Memory from histories before (default: new). */
  readonly workshop?: Workshop
  /** Told what is done, line by line. */
  readonly trace?: (line: string) => void
}

/**
 * Runs history `history` of seed `seed`: integers from 0 to 2^32-1. Rejects with `HistoryFailure` when an answer is
 * wrong, and with whatever is thrown when the simulator itself is.
 */
export async function runHistory(seed: number, history: number, options: HistoryOptions = {}): Promise<HistoryReport> {
  checkOptions('runHistory', options, { workshop: 'object?', trace: 'function?' })
  const { workshop = new Workshop(), trace } = options
  const run = new History(seed, history, workshop, trace)
  try {
    await run.run()
  } catch (error) {
    throw new HistoryFailure(seed, history, run.shape.text, run.operation, error)
  } finally {
    workshop.memory.reclaim()
  }
  return { stack: run.shape.text, operations: run.operation, faults: run.world.faults, pages: workshop.pages.count }
}

class History {
  readonly shape: Shape
  readonly world: World
  readonly model: Model
  operation = 0
  readonly #random: Random
  readonly #workshop: Workshop
  readonly #trace: ((line: string) => void) | undefined
  readonly #weights: number[]
  readonly #weightSum: number
  readonly #length: number
  /** Milliseconds between two operations at most; how many turns promises get between them. */
  readonly #pace: number
  readonly #turns: readonly number[]
  readonly #quotas: boolean
  /** A handle is one of the first few so many times of ten. */
  readonly #heat: number
  readonly #pageSizes: readonly number[]
  readonly #reenters: boolean
  readonly #indexesPerObject: number
  /** Keys of pools that there were since the stack was opened. */
  readonly #keys = new Set<string>()
  #store!: PageStore
  #accounts!: ClientAccounts
  #pools: ModelPool[] = []
  #poolsMade = 0
  #page: Uint8Array = new Uint8Array(0)
  #otherPage: Uint8Array = new Uint8Array(0)
  /** Promises under way that are no fetches. */
  #waiting = 0
  /** Times that promises go on by themselves, since something was asked for that waits. */
  #stirs = 0
  /** Stacks so far: what a crashed one still answers counts no more. */
  #generation = 0
  #failure: { readonly error: unknown } | undefined
  #limitsLowered = false
  #quotasSet = false
  #isAllocating = false
  /** The pool that a batch is being put into. */
  #batched: ModelPool | undefined
  #isClosing = false
  readonly #used: number[] = []
  readonly #indexes: Uint32Array = new Uint32Array(8)

  constructor(seed: number, history: number, workshop: Workshop, trace: ((line: string) => void) | undefined) {
    const random = new Random(seed, history)
    this.#random = random
    this.#workshop = workshop
    this.#trace = trace
    this.shape = drawShape(random, workshop.codec)
    this.#pageSizes = pageSizes[random.weighted([8, 1, 1])]!
    const rates = { ...drawRates(random) }
    // Who checks nothing cannot know. And a write that was lost leaves an older page, which looks right: one in parts
    // may be of two ages then.
    if (!this.shape.verifies || this.#pageSizes.some((size) => size > maxBlockBytes))
      rates.torn = rates.lost = rates.rotten = rates.misread = 0
    // What survives shall show it.
    if (this.shape.survives) Object.assign(rates, { restart: 10, crash: 10, powerFailure: 5 })
    this.world = new World(random, rates, workshop.memory)
    workshop.pages.begin(random)
    this.model = new Model(workshop.pages, this.world)
    const swarm = random.swarm(operations.length)
    this.#weights = operations.map((name, n) => Math.ceil(10 * swarm[n]! * usual[name]))
    const fills = (['put', 'replace', 'putMany'] as const).some((name) => this.#weights[operations.indexOf(name)]! > 0)
    if (!fills) this.#weights[0] = 1000
    if (this.shape.survives) this.#weights[operations.indexOf('end')]! *= 20
    if (rates.outage === 0) this.#weights[operations.indexOf('outage')] = 0
    if (rates.restart + rates.crash + rates.powerFailure === 0) this.#weights[operations.indexOf('end')] = 0
    this.#weightSum = this.#weights.reduce((sum, weight) => sum + weight)
    this.#length = random.from(200, random.of(lengths))
    this.#pace = random.of([1, 2, 6])
    this.#turns = random.of([[fullDrain], [0, 1, 2, 3, 5, 8], [2, 4, fullDrain]])
    this.#quotas = random.below(4) === 0
    this.#heat = random.of([0, 5, 8])
    this.#reenters = random.below(8) === 0
    this.#indexesPerObject = random.of([1, 8, 64])
  }

  async run(): Promise<void> {
    await this.#open()
    const { world } = this
    for (; this.operation < this.#length; this.operation++) {
      await this.#pass(this.#random.below(this.#pace + 1))
      await this.#operate(operations[this.#random.weighted(this.#weights, this.#weightSum)]!)
      if (world.isWoken && this.#random.below(3) === 0) this.#tick(64)
      if (this.operation % 128 === 127) this.#look()
    }
    await this.#rest()
    await this.#askForAll()
    await this.#close()
  }

  // ---- Time -------------------------------------------------------------------------------------------------------

  /** Lets time pass, and what it brings be noticed; how far depends on the turns. */
  async #pass(milliseconds: number): Promise<void> {
    const { world } = this
    const happened = world.events.pass(milliseconds)
    // Without either, no promise has anything to do.
    if (happened > 0 || this.#stirs > 0) {
      this.#stirs--
      await this.#drain(this.#random.of(this.#turns))
    }
    this.#judge()
  }

  async #drain(turns: number): Promise<void> {
    for (let left = turns; left > 0; left--) await turn
  }

  /** Throws what went wrong in the background. */
  #judge(): void {
    const { world } = this
    if (world.violation !== undefined) throw new Complaint(world.violation)
    if (this.#failure !== undefined) throw this.#failure.error
  }

  /** Lets everything that is under way come to its end. */
  async #settle(what: string, isDone: () => boolean): Promise<void> {
    const { events } = this.world
    await this.#drain(fullDrain)
    let idle = 0
    for (let left = 10_000; !isDone() || events.pending > 0; left--) {
      // Without a transfer to wait for, what waits in line goes on by itself; each for some turns.
      idle = events.pending === 0 ? idle + 1 : 0
      if (idle > maxFetches || left === 0) throw new Complaint(`${what}, though all transfers have come back`)
      if (events.pending > 0) events.pass(events.untilNext)
      await this.#drain(fullDrain)
      this.#judge()
    }
    this.#judge()
  }

  /** Notes how a promise ends. */
  #await<T>(promise: Promise<T>, done: (value: T) => void, failed: (error: unknown) => void): void {
    const guard =
      <V>(then: (value: V) => void) =>
      (value: V): void => {
        try {
          then(value)
        } catch (error) {
          this.#failure ??= { error }
        }
      }
    this.#stirs = fullDrain
    promise.then(guard(done), guard(failed))
  }

  // ---- The stack --------------------------------------------------------------------------------------------------

  async #open(): Promise<void> {
    const { world, shape } = this
    world.whileAllocating = undefined
    this.#pools = []
    this.#keys.clear()
    for (let attempt = 0; ; attempt++) {
      world.places.length = 0
      world.disks.length = 0
      world.isWoken = false
      // A place needs room for its tables when it opens.
      for (const limit of shape.limits) limit.bytes = limit.maximumBytes
      this.#limitsLowered = false
      this.#quotasSet = false
      this.#accounts = createAccounts()
      // Memory may run out while it opens; the third time it does not.
      world.faulty = attempt < 2
      // What a stack that does not open has opened is closed at once here, and `compose` hands on that this failed,
      // too, as a rejection.
      world.syncsFail = shape.io !== 'blocking'
      try {
        this.#store = openShape(shape, world, this.#accounts)
        break
      } catch (error) {
        const isExpected = error instanceof TmemError && (error.code === 'TMEM_NO_MEMORY' || error.code === 'TMEM_IO')
        if (!isExpected || attempt === 2) throw error
        this.#trace?.(`open: ${error.message}`)
      }
      // What was open is closed, and that may wait.
      world.faulty = false
      let looks = 0
      await this.#settle('a stack that did not open does not close', () => ++looks > 4)
      if (world.disks.some(({ isClosed }) => !isClosed))
        throw new Complaint('a stack did not open and left a file open')
    }
    world.syncsFail = true
    this.#generation++
    this.#waiting = 0
    this.#isClosing = false
    world.faulty = true
    world.whileAllocating = this.#reenters ? () => this.#reenter() : undefined
    this.#used.length = 0
    this.#trace?.(`open ${shape.text}`)
    const pools = this.#random.from(1, 3)
    for (let n = 0; n < pools; n++) this.#newPool()
    world.faulty = false
    const { persistent } = this.#store.capabilities
    if (this.#pools.length === 0 || (persistent && this.#pools.every((pool) => !pool.persistent)))
      this.#newPool(persistent)
    world.faulty = true
  }

  #newPool(persistent: boolean = this.#random.below(4) > 0): void {
    const random = this.#random
    const { capabilities } = this.#store
    if (persistent ? !capabilities.persistent : !capabilities.ephemeral) return
    const pageSize = Math.min(random.of(this.#pageSizes), capabilities.maxPageSize)
    const shared = !persistent && random.below(2) === 0
    const attributes = { client: random.below(clients), persistent, shared, pageSize }
    const pool = this.#store.newPool(attributes)
    if (typeof pool === 'number') {
      if (this.world.faults.allocation === 0)
        throw new Complaint(`no pool ${JSON.stringify(attributes)}: ${poolRefusalName(pool)}`)
      return
    }
    const kind = JSON.stringify(attributes)
    let number = 0
    while (this.#pools.some(({ key }) => key === `${kind}#${number}`)) number++
    const key = `${kind}#${number}`
    // A pool that finds the pages of an earlier one has as many handles as that.
    const share = this.shape.survives ? 0.5 : random.of([0.3, 0.5, 0.8, 1.2])
    const pages = Math.max(4, Math.ceil((this.shape.room * share) / pageSize / 2))
    const indexes = this.#indexesPerObject
    const handles = Math.ceil(Math.min(pages, 200) / indexes) * indexes
    const made = new ModelPool(pool, this.#poolsMade++, key, handles, indexes)
    // A key is asked for once in each run.
    if (this.#keys.has(key)) this.model.lose(key)
    this.#keys.add(key)
    this.model.begin(made)
    this.#pools.push(made)
    this.#trace?.(`pool ${made.number}: ${JSON.stringify(attributes)}, ${made.handles} handles`)
  }

  /** The process ends: with a close, in the middle of everything, or without one. */
  async #end(): Promise<void> {
    const { world } = this
    const { restart, crash, powerFailure } = world.rates
    const how = (['restart', 'crash', 'powerFailure'] as const)[this.#random.weighted([restart, crash, powerFailure])]!
    world.faults[how]++
    if (how === 'restart') {
      await this.#close()
      // A machine may end also after a stack was closed: then it has its pages.
      if (this.#random.below(4) === 0) {
        this.#trace?.('power failure')
        world.failPower()
      }
    } else {
      this.#trace?.(how)
      world.events.forget()
      for (const pool of this.#pools) this.model.end(pool, this.shape.survives)
      this.model.fetches.length = 0
      world.files.kill()
      if (how === 'powerFailure') {
        world.failPower()
        this.model.lose(undefined)
      }
    }
    await this.#open()
  }

  async #close(): Promise<void> {
    this.#trace?.('close')
    const { world, model } = this
    let isClosed = false
    this.#isClosing = true
    this.#await(
      this.#store.close(),
      () => {
        isClosed = true
      },
      (error) => {
        isClosed = true
        const isFile = error instanceof TmemError && error.code === 'TMEM_IO' && this.shape.survives
        if (!isFile || world.faults.failedSync + world.faults.failedWrite + world.faults.outage === 0) throw error
      },
    )
    for (const pool of this.#pools) model.end(pool, this.shape.survives)
    // What is asked of it now is answered, too.
    for (let left = 8; left > 0 && !isClosed; left--) {
      await this.#pass(1)
      await this.#operate(this.#random.of(['put', 'get', 'fetch', 'putMany', 'flushPage', 'tick', 'sync', 'release']))
    }
    await this.#settle('the stack does not close', () => isClosed && model.fetches.length === 0 && this.#waiting === 0)
    for (const [number, disk] of world.disks.entries())
      if (!disk.isClosed) throw new Complaint(`file ${number} was left open`)
    this.#expectPaid()
  }

  // ---- Operations -------------------------------------------------------------------------------------------------

  async #operate(operation: Operation): Promise<void> {
    const pool = this.#random.of(this.#pools)
    switch (operation) {
      case 'put':
      case 'replace':
        return this.#put(pool, this.#handle(pool), operation === 'replace')
      case 'get':
        return this.#get(pool, this.#handle(pool))
      case 'fetch':
        return this.#fetch(pool, this.#handle(pool))
      case 'lend':
        return this.#lend(pool, this.#handle(pool))
      case 'flushPage':
        return this.#flushPage(pool, this.#handle(pool))
      case 'flushObject':
        return this.#flushObject(pool, this.#handle(pool))
      case 'putMany':
      case 'replaceMany':
        return this.#putMany(pool, operation === 'replaceMany')
      case 'getMany':
        return this.#getMany(pool)
      case 'fetchMany':
        return this.#fetchMany(pool)
      case 'flushMany':
        return this.#flushMany(pool)
      case 'release':
        return this.#release(pool, this.#handle(pool))
      case 'putBack':
        return this.#putBack(pool)
      case 'sink':
        return this.#sink(pool, this.#handle(pool))
      case 'recompress':
        return this.#recompress(pool, this.#handle(pool))
      case 'compact':
        this.#trace?.(`compact: ${this.#store.compact?.(64)}`)
        return
      case 'tick':
        this.#tick(this.#random.of([1, 4, 16, 64, 512]))
        return
      case 'sync':
        return this.#sync()
      case 'freeze':
        return this.#freeze(pool)
      case 'pool':
        return this.#changePools(pool)
      case 'limit':
        return this.#limit()
      case 'quota':
        return this.#quota()
      case 'wait':
        return await this.#pass(this.#random.of([5, 50, 500]))
      case 'outage':
        return this.#outage()
      case 'end':
        return await this.#end()
    }
  }

  #handle(pool: ModelPool): number {
    const random = this.#random
    const hot = Math.max(1, pool.handles >>> 3)
    return random.below(random.below(10) < this.#heat ? hot : pool.handles)
  }

  #put(pool: ModelPool, handle: number, replace: boolean): void {
    const { model } = this
    // A pool of pages in parts cannot keep both.
    const keep = replace && pool.pool.replace !== undefined
    const version = model.next(pool, handle)
    const page = this.#pageOf(pool)
    model.pages.fill(version, page, 0, page.length)
    const isSure = this.#isSure(pool, handle, keep)
    const object = pool.objectOf(handle)
    const index = pool.indexOf(handle)
    const outcome = keep ? pool.pool.replace!(object, index, page) : pool.pool.put(object, index, page)
    this.#trace?.(`${keep ? 'replace' : 'put'} ${pool.nameOf(handle)} version ${version}: ${putOutcomeName(outcome)}`)
    model.wasPut(pool, handle, version, outcome, keep)
    if (isSure) this.#expectStored(pool, handle, outcome)
  }

  #get(pool: ModelPool, handle: number): void {
    const page = this.#mark(this.#pageOf(pool))
    let outcome: number
    try {
      outcome = pool.pool.get(pool.objectOf(handle), pool.indexOf(handle), page)
    } catch (error) {
      this.#trace?.(`get ${pool.nameOf(handle)}: ${String(error)}`)
      this.model.failed(pool, handle, error)
      return
    }
    this.#trace?.(`get ${pool.nameOf(handle)}: ${outcome}`)
    this.model.wasGot(pool, handle, outcome, page, 0)
    if (outcome !== GetOutcome.Hit) this.#expectMarked(pool, handle, page)
  }

  #fetch(pool: ModelPool, handle: number): void {
    const { model, world } = this
    if (model.fetches.length >= maxFetches) return
    const into = this.#mark(this.#workshop.borrow(pool.pageSize))
    const fetch: Fetch = { pool, handle, possible: model.possibleOf(pool, handle), into, at: 0 }
    model.fetches.push(fetch)
    // Now and then nobody waits so long.
    const patience = this.#random.below(12) === 0 ? new AbortController() : undefined
    if (patience !== undefined) world.events.after(this.#random.below(30), () => patience.abort(impatience))
    this.#trace?.(`fetch ${pool.nameOf(handle)}${patience === undefined ? '' : ', with patience'}`)
    const end = (answer: unknown): boolean => {
      if (!model.fetches.includes(fetch)) return false
      this.#trace?.(`fetched ${pool.nameOf(handle)}: ${reasonOf(answer)}`)
      model.fetches.splice(model.fetches.indexOf(fetch), 1)
      return true
    }
    this.#await(
      pool.pool.fetch(pool.objectOf(handle), pool.indexOf(handle), into, patience?.signal),
      (outcome) => {
        if (!end(outcome)) return
        model.wasFetched(fetch, outcome)
        if (outcome !== GetOutcome.Hit) this.#expectMarked(pool, handle, into)
        this.#workshop.giveBack(into)
      },
      (error) => {
        if (!end(error)) return
        if (patience?.signal.aborted === true && error === impatience) {
          this.#expectMarked(pool, handle, into)
          model.gaveUp(fetch)
        } else model.failed(pool, handle, error)
        this.#workshop.giveBack(into)
      },
    )
  }

  #fetchMany(pool: ModelPool): void {
    const { model } = this
    const batch = new PageBatch(this.#random.from(1, 4), pool.pageSize)
    if (model.fetches.length + batch.capacity > maxFetches) return
    const fetches: Fetch[] = []
    for (let n = 0; n < batch.capacity; n++) {
      const handle = this.#handle(pool)
      // A page that is got twice at once is another matter.
      if (fetches.some((fetch) => fetch.handle === handle)) continue
      const entry = batch.push(pool.objectOf(handle), pool.indexOf(handle))
      const possible = model.possibleOf(pool, handle)
      fetches.push({ pool, handle, possible, into: batch.bytes, at: batch.offsets[entry]! })
    }
    model.fetches.push(...fetches)
    this.#trace?.(`fetchMany ${fetches.map(({ handle }) => pool.nameOf(handle)).join(', ')}`)
    const end = (error: unknown): void => {
      if (!model.fetches.includes(fetches[0]!)) return
      this.#trace?.(`fetched ${fetches.length}: ${reasonOf(error)}`)
      for (const fetch of fetches) model.fetches.splice(model.fetches.indexOf(fetch), 1)
      // All others are done when one has failed.
      const isOpen = (n: number): boolean => batch.outcomes[n] === GetOutcome.Deferred || batch.outcomes[n] === Pending
      const failed = fetches.filter((_, n) => isOpen(n)).map(({ handle }) => handle)
      if (failed.length > 0 !== (error !== undefined))
        throw new Complaint(`fetchMany: ${failed.length} pages have no answer: ${reasonOf(error)}`)
      for (const [n, fetch] of fetches.entries()) if (!isOpen(n)) model.wasFetched(fetch, batch.outcomes[n]!)
      if (failed.length > 0) model.failedMany(pool, failed, error)
    }
    this.#await(pool.pool.fetchMany!(batch), () => end(undefined), end)
  }

  #lend(pool: ModelPool, handle: number): void {
    const page = this.#pageOf(pool)
    let outcome: number
    try {
      outcome = pool.pool.lend(pool.objectOf(handle), pool.indexOf(handle), (bytes, at, length) => {
        page.set(bytes.subarray(at, at + length))
      })
    } catch (error) {
      this.model.failed(pool, handle, error)
      return
    }
    this.#trace?.(`lend ${pool.nameOf(handle)}: ${outcome}`)
    this.model.wasGot(pool, handle, outcome, page, 0)
  }

  #flushPage(pool: ModelPool, handle: number): void {
    this.#trace?.(`flushPage ${pool.nameOf(handle)}`)
    pool.pool.flushPage(pool.objectOf(handle), pool.indexOf(handle))
    this.model.set(pool, handle, 0)
  }

  #flushObject(pool: ModelPool, handle: number): void {
    this.#trace?.(`flushObject ${pool.nameOf(handle)}`)
    pool.pool.flushObject(pool.objectOf(handle))
    const first = handle - pool.indexOf(handle)
    for (let n = 0; n < pool.indexes; n++) this.model.set(pool, first + n, 0)
  }

  #putMany(pool: ModelPool, replace: boolean): void {
    const { model } = this
    const keep = replace && pool.pool.replaceMany !== undefined
    const { batch, handles } = this.#batchOf(pool)
    const versions: number[] = []
    for (let n = 0; n < batch.length; n++) {
      versions.push(model.next(pool, handles[n]!))
      model.pages.fill(versions[n]!, batch.bytes, batch.offsets[n]!, pool.pageSize)
      // Now and then a layer above has taken it.
      if (this.#random.below(16) === 0) batch.outcomes[n] = PutOutcome.Stored
    }
    const above = batch.outcomes.slice(0, batch.length)
    const isSure = handles.map((handle) => batch.length === 1 && this.#isSure(pool, handle, keep))
    this.#batched = pool
    if (keep) pool.pool.replaceMany!(batch)
    else pool.pool.putMany(batch)
    this.#batched = undefined
    for (let n = 0; n < batch.length; n++) {
      const outcome = batch.outcomes[n]!
      this.#trace?.(
        `${keep ? 'replaceMany' : 'putMany'} ${pool.nameOf(handles[n]!)} version ${versions[n]}: ${above[n] === Pending ? putOutcomeName(outcome) : 'taken above'}`,
      )
      if (above[n] !== Pending) model.set(pool, handles[n]!, 0)
      else {
        model.wasPut(pool, handles[n]!, versions[n]!, outcome, keep)
        if (isSure[n] === true) this.#expectStored(pool, handles[n]!, outcome)
      }
    }
  }

  #getMany(pool: ModelPool): void {
    const { batch, handles } = this.#batchOf(pool)
    try {
      pool.pool.getMany(batch)
    } catch (error) {
      // Those that were answered before count.
      const first = batch.outcomes.indexOf(Pending)
      for (let n = 0; n < first; n++)
        this.model.wasGot(pool, handles[n]!, batch.outcomes[n]!, batch.bytes, batch.offsets[n]!)
      this.model.failed(pool, handles[first]!, error)
      return
    }
    for (let n = 0; n < batch.length; n++) {
      this.#trace?.(`getMany ${pool.nameOf(handles[n]!)}: ${batch.outcomes[n]}`)
      this.model.wasGot(pool, handles[n]!, batch.outcomes[n]!, batch.bytes, batch.offsets[n]!)
    }
  }

  #flushMany(pool: ModelPool): void {
    const { batch, handles } = this.#batchOf(pool)
    this.#trace?.(`flushMany ${handles.map((handle) => pool.nameOf(handle)).join(', ')}`)
    pool.pool.flushMany(batch)
    for (const handle of handles) this.model.set(pool, handle, 0)
  }

  #release(pool: ModelPool, handle: number): void {
    const released = pool.pool.release!(pool.objectOf(handle), pool.indexOf(handle))
    this.#trace?.(`release ${pool.nameOf(handle)}: ${released}`)
    if (released && pool.current[handle] === 0)
      throw new Complaint(`${pool.nameOf(handle)}: released, but no page is there`)
  }

  /** Pages that the caller had taken out go back as they were. */
  #putBack(pool: ModelPool): void {
    const { model } = this
    if (!pool.persistent && !pool.pool.attributes.shared) return
    const { batch, handles } = this.#batchOf(pool)
    const kept: number[] = []
    const length = batch.length
    batch.clear()
    for (let n = 0; n < length; n++) {
      const version = pool.current[handles[n]!]!
      if (version === 0) continue
      const entry = batch.push(pool.objectOf(handles[n]!), pool.indexOf(handles[n]!))
      model.pages.fill(version, batch.bytes, batch.offsets[entry]!, pool.pageSize)
      batch.unchanged[entry] = 1
      kept.push(handles[n]!)
    }
    const versions = kept.map((handle) => pool.current[handle]!)
    this.#batched = pool
    pool.pool.putMany(batch)
    this.#batched = undefined
    for (let n = 0; n < batch.length; n++) {
      this.#trace?.(`putBack ${pool.nameOf(kept[n]!)} version ${versions[n]}: ${putOutcomeName(batch.outcomes[n]!)}`)
      model.wasPut(pool, kept[n]!, versions[n]!, batch.outcomes[n]!, false)
    }
  }

  /** A few pages of an object, from a handle on: their indexes are in `#indexes`. Answers how many. */
  #indexesFrom(pool: ModelPool, handle: number): number {
    const first = pool.indexOf(handle)
    const count = Math.min(pool.indexes - first, this.#random.from(1, this.#indexes.length))
    for (let n = 0; n < count; n++) this.#indexes[n] = first + n
    return count
  }

  #sink(pool: ModelPool, handle: number): void {
    if (this.#waiting > 3) return
    const count = this.#indexesFrom(pool, handle)
    const slow = this.#random.below(2) === 0
    const generation = this.#generation
    this.#trace?.(`sink ${count} from ${pool.nameOf(handle)}${slow ? ' to a place that waits' : ''}`)
    this.#waiting++
    const end = (): void => {
      if (generation === this.#generation) this.#waiting--
    }
    this.#await(pool.pool.sink!(pool.objectOf(handle), this.#indexes.slice(), count, slow), end, (error) => {
      end()
      throw error
    })
  }

  #recompress(pool: ModelPool, handle: number): void {
    const count = this.#indexesFrom(pool, handle)
    const smaller = pool.pool.recompress!(pool.objectOf(handle), this.#indexes, count)
    this.#trace?.(`recompress ${count} from ${pool.nameOf(handle)}: ${smaller}`)
  }

  /** Whether there is more to do now. */
  #tick(pages: number): boolean {
    this.world.isWoken = false
    const progress = this.#store.tick({ pages })
    this.#trace?.(`tick ${pages}: ${progress.pages}${progress.pending ? ', pending' : ''}`)
    return progress.pending
  }

  #sync(): void {
    const { disks } = this.world
    if (this.#waiting > 3) return
    const before = disks.map(({ acknowledged }) => acknowledged)
    const files = [...disks]
    const generation = this.#generation
    const failures = this.world.syncErrors
    this.#waiting++
    this.#trace?.('sync')
    this.#await(
      this.#store.sync!(),
      () => {
        if (generation !== this.#generation) return
        this.#waiting--
        this.#trace?.('synced')
        for (const [number, disk] of files.entries())
          if (disk.survives && disk.synced < before[number]!)
            throw new Complaint(`sync says that all is safe, but writes to file ${number} are not synced`)
      },
      (error) => {
        if (generation !== this.#generation) return
        this.#waiting--
        this.#trace?.(`synced: ${String(error)}`)
        if (this.#isClosing && error instanceof TmemError && error.code === 'TMEM_CLOSED') return
        if (this.world.syncErrors === failures)
          throw new Complaint(`sync failed, but nothing else did: ${String(error)}`)
      },
    )
  }

  #freeze(pool: ModelPool): void {
    pool.isFrozen = this.#random.below(3) === 0
    this.#trace?.(`pool ${pool.number} ${pool.isFrozen ? 'freeze' : 'thaw'}`)
    if (pool.isFrozen) pool.pool.freeze()
    else pool.pool.thaw()
  }

  #changePools(pool: ModelPool): void {
    if (this.#pools.length < 6 && this.#random.below(2) === 0) {
      this.#newPool()
      return
    }
    if (this.#pools.length === 1) return
    this.#trace?.(`destroy pool ${pool.number}`)
    pool.pool.destroy()
    this.model.end(pool, this.shape.survives)
    this.#pools.splice(this.#pools.indexOf(pool), 1)
  }

  #limit(): void {
    const { limits } = this.shape
    if (limits.length === 0) return
    const limit = this.#random.of(limits)
    // What is there already stays above a lowered limit.
    this.#expectLimits()
    limit.bytes = Math.floor(limit.maximumBytes * this.#random.of([0, 0.3, 0.6, 0.9, 1, 1]))
    if (limit.bytes < limit.maximumBytes) this.#limitsLowered = true
    this.#trace?.(`limit ${limit.bytes} of ${limit.maximumBytes}`)
  }

  #quota(): void {
    if (!this.#quotas) return
    this.#quotasSet = true
    const client = this.#random.below(clients)
    const bytes = this.#random.of([0, 65536, 262144, Number.POSITIVE_INFINITY])
    this.#trace?.(`client ${client} may have ${bytes} bytes`)
    this.#accounts.setMaximum(client, bytes)
  }

  #outage(): void {
    const { world } = this
    world.faults.outage++
    world.outageUntil = world.events.now + this.#random.of([5, 50, 500])
    this.#trace?.(`outage until ${world.outageUntil}`)
  }

  /** Somebody who is asked for memory finds some by using the stack. */
  #reenter(): void {
    if (this.#isAllocating || this.#pools.length === 0) return
    const pool = this.#random.of(this.#pools)
    // The reference does not know how far a batch is, and a page in parts may be there in part.
    if (pool === this.#batched || pool.pageSize > maxBlockBytes) return
    this.#isAllocating = true
    try {
      this.#trace?.('while allocating:')
      const page = this.#page
      // Not into the page that is being put.
      this.#page = this.#otherPage
      if (this.#random.below(2) === 0) this.#flushPage(pool, this.#handle(pool))
      else this.#get(pool, this.#handle(pool))
      this.#otherPage = this.#page
      this.#page = page
    } finally {
      this.#isAllocating = false
    }
  }

  // ---- What must be so --------------------------------------------------------------------------------------------

  /** Whether a put of that handle may not be refused. */
  #isSure(pool: ModelPool, handle: number, keep: boolean): boolean {
    const { rates } = this.world
    const { shape } = this
    if (!pool.persistent || pool.isGone || pool.isFrozen) return false
    if (rates.failedRead + rates.failedWrite + rates.outage + rates.allocation + rates.memoryRot > 0) return false
    if (rates.torn + rates.lost + rates.rotten + rates.misread > 0) return false
    // Larger pages that do not shrink leave pieces in which none of them fits.
    if (this.#pageSizes.length > 1) return false
    const isNew = pool.current[handle] === 0 || keep
    const memory = this.#limitsLowered || this.#quotasSet ? 0 : shape.reservedMemory
    return this.model.persistentBytes + (isNew ? pool.pageSize : 0) <= shape.reservedSlow + memory
  }

  #expectStored(pool: ModelPool, handle: number, outcome: number): void {
    if (outcome === PutOutcome.Stored) return
    const { reservedSlow, reservedMemory } = this.shape
    throw new Complaint(
      `${pool.nameOf(handle)}: a put was refused with ${putOutcomeName(outcome)} at ${this.model.persistentBytes} bytes of pages, but ${reservedSlow} on disk and ${reservedMemory} in memory are reserved`,
    )
  }

  /** Looks at the stack from inside. */
  #look(): void {
    this.#store.check?.()
    this.#expectLimits()
    for (let client = 0; client < clients; client++)
      if (this.#accounts.charged(client) < 0) throw new Complaint(`client ${client} was given back more than it paid`)
  }

  /** No place takes more than its limit allows, but for what it had when that was lowered. */
  #expectLimits(): void {
    for (const [number, place] of this.world.places.entries()) {
      const { used_bytes: used, limit_bytes: limit } = place.stats().counters
      if (used === undefined || limit === undefined || place.name !== 'zcache') continue
      if (used > limit && used > (this.#used[number] ?? 0))
        throw new Complaint(`${place.name} takes ${used} bytes, its limit is ${limit}`)
      this.#used[number] = used
    }
  }

  /** Everything comes to rest, and nothing goes wrong any more. */
  async #rest(): Promise<void> {
    const { world, model } = this
    world.faulty = false
    this.#trace?.('rest')
    const atRest = (): boolean => model.fetches.length === 0 && this.#waiting === 0
    await this.#settle('a fetch or sync does not come back', atRest)
    for (let left = 32; left > 0 && (this.#tick(512) || world.events.pending > 0); left--)
      await this.#settle('a fetch or sync does not come back', atRest)
    this.#look()
    this.#expectCounted()
  }

  /** Every persistent page is there. */
  async #askForAll(): Promise<void> {
    const { model } = this
    for (const pool of this.#pools)
      for (let handle = 0; handle < pool.handles; handle++) {
        if (pool.current[handle] === 0 && !this.#random.chance(100)) continue
        while (model.fetches.length >= maxFetches)
          await this.#settle('a fetch does not come back', () => model.fetches.length === 0)
        this.#fetch(pool, handle)
      }
    await this.#settle('a fetch does not come back', () => model.fetches.length === 0)
    this.#look()
  }

  /** The statistics know of exactly the pages that are there. */
  #expectCounted(): void {
    const { counters } = this.#store.stats()
    let least = 0
    let most = 0
    for (const pool of this.#pools)
      for (const [handle, version] of pool.current.entries()) {
        if (version === 0) continue
        most++
        if (pool.persistent && pool.doubtful[handle] === 0) least++
      }
    const { pages = 0, encoded_again: again = 0 } = counters
    if (pages < least || pages > most)
      throw new Complaint(`the stack counts ${pages} pages, right are ${least} to ${most}`)
    // What rises to where pages are kept as they are has to be compressed anew.
    if (again > 0 && !this.shape.text.startsWith('memory')) throw new Complaint(`${again} pages were compressed twice`)
  }

  /** Nobody pays for pages that are gone. */
  #expectPaid(): void {
    for (let client = 0; client < clients; client++) {
      const bytes = this.#accounts.charged(client)
      if (bytes !== 0) throw new Complaint(`client ${client} pays for ${bytes} bytes, but has no pages`)
    }
  }

  /** A page to put from, or to get into. */
  #pageOf(pool: ModelPool): Uint8Array {
    if (this.#page.length !== pool.pageSize) {
      this.#workshop.giveBack(this.#page)
      this.#page = this.#workshop.borrow(pool.pageSize)
    }
    return this.#page
  }

  /** What is not answered leaves the page of the caller as it is. */
  #mark(page: Uint8Array): Uint8Array {
    page[0] = 0xa5
    page[page.length >>> 1] = 0xa5
    page[page.length - 1] = 0xa5
    return page
  }

  #expectMarked(pool: ModelPool, handle: number, page: Uint8Array): void {
    // Of a page in parts, some may be there already when a damaged one is met.
    if (pool.pageSize > maxBlockBytes && this.world.faults.memoryRot > 0) return
    if (page[0] !== 0xa5 || page[page.length >>> 1] !== 0xa5 || page[page.length - 1] !== 0xa5)
      throw new Complaint(`${pool.nameOf(handle)}: there was no hit, but the page of the caller was written to`)
  }

  #batchOf(pool: ModelPool): { batch: PageBatch; handles: number[] } {
    const batch = this.#workshop.batch(pool.pageSize)
    const handles: number[] = []
    for (let left = this.#random.from(1, Math.min(batch.capacity, this.#random.of([2, 8, 24]))); left > 0; left--) {
      const handle = this.#handle(pool)
      handles.push(handle)
      batch.push(pool.objectOf(handle), pool.indexOf(handle))
    }
    return { batch, handles }
  }
}

const reasonOf = (answer: unknown): string =>
  answer instanceof Error ? answer.message : JSON.stringify(answer ?? 'all')
