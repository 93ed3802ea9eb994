/**
 * The trace layer: a bounded list of the operations that crossed it, which can be printed, and run again on another
 * store (those that were called above the first place: what passes between places is what a stack made of them).
 *
 * The list belongs to the caller; several trace layers can write into one, so that it shows the order in which the
 * layers of a stack were called: an operation stands where its call began. With `pages`, a put keeps a copy of its page
 * (memory from the stack's allocator), and the list can be replayed; without, it keeps a checksum.
 */
import {
  type Allocator,
  type Block,
  type Borrower,
  type Budget,
  type Capabilities,
  checkOptions,
  type Flight,
  GetOutcome,
  getOutcomeName,
  isSlow,
  type Layer,
  type LayerContext,
  type LayerFactory,
  none,
  type ObjectId,
  PageBatch,
  type PageStore,
  Pending,
  type Place,
  type Pool,
  type PoolAttributes,
  type PoolRefusal,
  type Progress,
  type PutOutcome,
  poolRefusalName,
  putOutcomeName,
} from '@tmem/core'
import { crc32 } from '@tmem/core/runtime'
import { openPassing, PassingPool, PassingStore, passingPlace, passingPlan, statsWith } from './passing.ts'

/** A handle in a recorded batch. */
export interface TracedEntry {
  readonly object: ObjectId
  readonly index: number
  /** Outcome before the call: `Pending`, or what a layer above had decided. */
  readonly before: number
  /** Outcome after the call. */
  outcome: number
  /** CRC-32 of the page that was put or got. */
  sum: number | undefined
  /** Copy of the page that was put, when the trace keeps pages. */
  page: Uint8Array | undefined
}

/**
 * What can be recorded: the operations of `PageStore`, `Pool` and of places. `close` is followed by `closed` when it is
 * done.
 */
export type TracedName =
  | 'open'
  | 'close'
  | 'closed'
  | 'newPool'
  | 'tick'
  | 'put'
  | 'get'
  | 'fetch'
  | 'lend'
  | 'flushPage'
  | 'flushObject'
  | 'putMany'
  | 'getMany'
  | 'flushMany'
  | 'replace'
  | 'replaceMany'
  | 'release'
  | 'split'
  | 'freeze'
  | 'thaw'
  | 'destroy'
  | 'sync'
  | 'write'
  | 'writeNow'
  | 'read'
  | 'readNow'
  | 'free'
  | 'forget'

/** One recorded operation. Fields that the operation does not have are `undefined`. */
export interface TracedOperation {
  /** Label of the trace layer. */
  readonly label: string
  readonly name: TracedName
  /** Number of the pool: in the order in which this layer made them; a view in parts has a number of its own. */
  readonly pool: number | undefined
  readonly attributes: PoolAttributes | undefined
  /** Page budget of a tick. */
  readonly budget: number | undefined
  /** Handles: one for single operations, the entries of a batch, an object with index -1 for `flushObject`. */
  readonly entries: readonly TracedEntry[]
  /**
   * What was answered: the outcome of a single operation, the count of a batch, the number of the new pool (`newPool`,
   * `split`) or minus its refusal, the pages of a tick, 1 when a page was released; of a place: the location that it
   * gave or minus its refusal, the frames of a flight that it took. `undefined` until there is an answer.
   */
  answer: number | undefined
  /** What a place was asked, in words; `undefined` above the first place. */
  readonly said?: string
  /** Why a place failed. */
  failure?: string
}

/** Settings of `TraceLog`. */
export interface TraceLogOptions {
  /** Operations kept, 1 to 2^24; the oldest go (default 1024). */
  readonly operations?: number
  /** Keep a copy of each page that is put, for `replay` (default false). */
  readonly pages?: boolean
}

/** A bounded list of operations. */
export class TraceLog {
  readonly limit: number
  readonly pages: boolean
  readonly #ring: TracedOperation[] = []
  #recorded = 0

  constructor(options: TraceLogOptions = {}) {
    checkOptions('TraceLog', options, { operations: 'number?', pages: 'flag?' })
    const { operations = 1024, pages = false } = options
    if (!Number.isInteger(operations) || operations < 1 || operations > 2 ** 24)
      throw new RangeError(`operations must be an integer from 1 to ${2 ** 24}, got ${operations}`)
    this.limit = operations
    this.pages = pages
  }

  /** Operations that fell out at the old end. */
  get dropped(): number {
    return this.#recorded - this.#ring.length
  }

  /** The operations that are kept, oldest first. */
  get operations(): readonly TracedOperation[] {
    const oldest = this.#recorded > this.limit ? this.#recorded % this.limit : 0
    return [...this.#ring.slice(oldest), ...this.#ring.slice(0, oldest)]
  }

  /** Adds an operation at the new end. */
  record(operation: TracedOperation): void {
    this.#ring[this.#recorded % this.limit] = operation
    this.#recorded++
  }

  /** Empties the list. */
  clear(): void {
    this.#ring.length = 0
    this.#recorded = 0
  }

  /** One line for each operation. */
  toString(): string {
    const lines = this.operations.map(traceLine)
    if (this.dropped > 0) lines.unshift(`(${this.dropped} earlier operations were dropped)`)
    return lines.join('\n')
  }
}

/** One operation in one line, e.g. `top pool 0 put 12/7 crc 3fa9c1e0: Stored`. */
export function traceLine(operation: TracedOperation): string {
  const { label, name, pool, attributes, budget, entries, answer, said, failure } = operation
  if (said !== undefined) {
    const words = `${label} ${name}${said === '' ? '' : ` ${said}`}`
    if (failure !== undefined) return `${words}: ${failure}`
    if (answer === undefined) return words
    return `${words}: ${name === 'put' ? (answer < 0 ? putOutcomeName(-answer) : `at ${answer}`) : answer}`
  }
  const words = [label]
  if (pool !== undefined) words.push(`pool ${pool}`)
  words.push(name)
  if (attributes !== undefined) {
    const { client, persistent, shared, pageSize } = attributes
    words.push(
      `client ${client} ${shared ? 'shared' : 'private'} ${persistent ? 'persistent' : 'ephemeral'} ${pageSize}`,
    )
  }
  if (budget !== undefined) words.push(`${budget} pages`)
  const batch = name.endsWith('Many')
  for (const { object, index, sum, outcome, before } of entries) {
    words.push(index < 0 ? `${object}` : `${object}/${index}`)
    if (sum !== undefined) words.push(`crc ${sum.toString(16).padStart(8, '0')}`)
    if (batch && name !== 'flushMany') words.push(before === Pending ? outcomeName(name, outcome) : '(decided above)')
  }
  return answer === undefined ? words.join(' ') : `${words.join(' ')}: ${answerName(name, answer)}`
}

function outcomeName(name: TracedName, outcome: number): string {
  return name.startsWith('put') || name.startsWith('replace') ? putOutcomeName(outcome) : getOutcomeName(outcome)
}

function answerName(name: TracedName, answer: number): string {
  switch (name) {
    case 'put':
    case 'replace':
    case 'get':
    case 'fetch':
    case 'lend':
      return outcomeName(name, answer)
    case 'newPool':
    case 'split':
      return answer < 0 ? poolRefusalName(-answer) : `pool ${answer}`
    default:
      return String(answer)
  }
}

/** Settings of `trace`. */
export interface TraceOptions {
  readonly log: TraceLog
  /** Names this layer in the list (default `trace`). */
  readonly label?: string
}

/** Writes down every operation that crosses it. */
export function trace(options: TraceOptions): Layer {
  checkOptions('trace', options, { log: 'object', label: 'text?' })
  const { log, label = 'trace' } = options
  return Object.freeze({
    name: 'trace',
    plan: (below: Capabilities | undefined) => passingPlan(below),
    open: (next: PageStore | undefined, { allocator }: LayerContext) =>
      openPassing('trace', next, {}, (capabilities, below) => {
        const store = new TraceStore(capabilities, below, log, label, allocator)
        store.record('open')
        return store
      }),
    wrapPlace: (next: Place) => tracing(next, log, label),
  })
}

const framesTaken = ({ locations, count }: Flight): number => {
  let taken = 0
  for (let n = 0; n < count; n++) if (locations[n] !== none) taken++
  return taken
}
const flightSaid = ({ count, filled }: Flight): string => `${count} frames, ${filled} bytes`

function tracing(next: Place, log: TraceLog, label: string): Place {
  let operations = 0
  const record = (name: TracedName, said: string): TracedOperation => {
    operations++
    const unasked = { pool: undefined, attributes: undefined, budget: undefined, entries: [], answer: undefined }
    const operation: TracedOperation = { label, name, said, ...unasked }
    log.record(operation)
    return operation
  }
  record('open', next.name)
  /** Notes what becomes of a call that may fail. */
  const traced = (operation: TracedOperation, call: () => void, answer: () => number | undefined): void => {
    try {
      call()
    } catch (error) {
      operation.failure = String(error)
      throw error
    }
    operation.answer = answer()
  }
  const tracedLater = async (
    operation: TracedOperation,
    call: () => Promise<void>,
    answer: () => number | undefined,
  ): Promise<void> => {
    try {
      await call()
    } catch (error) {
      operation.failure = String(error)
      throw error
    }
    operation.answer = answer()
  }
  const nothing = (): undefined => undefined
  const common = {
    stats: () => statsWith(next, 'trace', { operations, dropped: log.dropped }),
    close: async () => {
      record('close', next.name)
      await next.close()
      record('closed', next.name)
    },
    tick: (budget: Budget): Progress => {
      const operation = record('tick', `${budget.pages} pages`)
      const progress = next.tick!(budget)
      operation.answer = progress.pages
      return progress
    },
  }
  if (!isSlow(next))
    return passingPlace(next, {
      ...common,
      put: (block: Block, owner: number) => {
        const { length, pageBytes, codec } = block
        const operation = record('put', `owner ${owner}, ${length} of ${pageBytes} bytes, codec ${codec}`)
        const location = next.put(block, owner)
        operation.answer = location
        return location
      },
      get: (location: number, into: Block) => {
        record('get', `at ${location}, ${into.length} bytes`)
        next.get(location, into)
      },
      free: (location: number, length: number, pageBytes: number) => {
        record('free', `at ${location}, ${length} bytes`)
        next.free(location, length, pageBytes)
      },
    })
  return passingPlace(next, {
    ...common,
    write: (flight: Flight) =>
      tracedLater(
        record('write', flightSaid(flight)),
        () => next.write(flight),
        () => framesTaken(flight),
      ),
    read: (location: number, units: number, into: Uint8Array) =>
      tracedLater(record('read', `at ${location}, ${units} units`), () => next.read(location, units, into), nothing),
    free: (location: number, units: number) => {
      record('free', `at ${location}, ${units} units`)
      next.free(location, units)
    },
    forget: (location: number, units: number) => {
      record('forget', `at ${location}, ${units} units`)
      next.forget!(location, units)
    },
    writeNow: (flight: Flight) =>
      traced(
        record('writeNow', flightSaid(flight)),
        () => next.writeNow!(flight),
        () => framesTaken(flight),
      ),
    readNow: (location: number, units: number, into: Uint8Array) =>
      traced(record('readNow', `at ${location}, ${units} units`), () => next.readNow!(location, units, into), nothing),
    sync: () => tracedLater(record('sync', ''), () => next.sync!(), nothing),
  })
}

class TraceStore extends PassingStore {
  readonly log: TraceLog
  readonly #label: string
  readonly #allocator: Allocator
  #operations = 0
  #pools = 0

  constructor(capabilities: Capabilities, next: PageStore, log: TraceLog, label: string, allocator: Allocator) {
    super('trace', capabilities, next)
    this.log = log
    this.#label = label
    this.#allocator = allocator
  }

  wrap(pool: Pool): Pool {
    return new TracePool(pool, this, this.nextPool())
  }

  nextPool(): number {
    return this.#pools++
  }

  counters(): Readonly<Record<string, number>> {
    return { operations: this.#operations, dropped: this.log.dropped }
  }

  record(
    name: TracedName,
    details: Partial<Pick<TracedOperation, 'pool' | 'attributes' | 'budget' | 'entries'>> = {},
  ): TracedOperation {
    this.#operations++
    const { pool, attributes, budget, entries = [] } = details
    const operation: TracedOperation = {
      label: this.#label,
      name,
      pool,
      attributes,
      budget,
      entries,
      answer: undefined,
    }
    this.log.record(operation)
    return operation
  }

  /** A copy of a page, when pages are kept and there is memory. */
  copy(bytes: Uint8Array, at: number, length: number): Uint8Array | undefined {
    if (!this.log.pages) return undefined
    const memory = this.#allocator.allocate(length, 'trace.page')
    if (memory === undefined) return undefined
    const page = new Uint8Array(memory)
    page.set(bytes.subarray(at, at + length))
    return page
  }

  override newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    const operation = this.record('newPool', { attributes })
    const pool = super.newPool(attributes)
    operation.answer = typeof pool === 'number' ? -pool : this.#pools - 1
    return pool
  }

  override tick(budget: Budget): Progress {
    const operation = this.record('tick', { budget: budget.pages })
    const progress = this.next.tick(budget)
    operation.answer = progress.pages
    return progress
  }

  override async sync(): Promise<void> {
    this.record('sync')
    await super.sync()
  }

  override async close(): Promise<void> {
    this.record('close')
    await this.next.close()
    this.record('closed')
  }
}

const noPage = { before: Pending, outcome: Pending, sum: undefined, page: undefined }

class TracePool extends PassingPool {
  readonly #store: TraceStore
  readonly #number: number

  constructor(next: Pool, store: TraceStore, number: number) {
    super(next)
    this.#store = store
    this.#number = number
  }

  over(next: Pool): Pool {
    return new TracePool(next, this.#store, this.#store.nextPool())
  }

  #record(name: TracedName, entries: readonly TracedEntry[] = []): TracedOperation {
    return this.#store.record(name, { pool: this.#number, entries })
  }

  override put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    return this.#put('put', object, index, page, () => this.next.put(object, index, page))
  }

  override replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    return this.#put('replace', object, index, page, () => this.next.replace!(object, index, page))
  }

  #put(name: TracedName, object: ObjectId, index: number, page: Uint8Array, put: () => PutOutcome): PutOutcome {
    const entry = { ...noPage, object, index, sum: crc32(page), page: this.#store.copy(page, 0, page.length) }
    const operation = this.#record(name, [entry])
    const outcome = put()
    entry.outcome = outcome
    operation.answer = outcome
    return outcome
  }

  override release(object: ObjectId, index: number): boolean {
    const operation = this.#record('release', [{ ...noPage, object, index }])
    const released = this.next.release!(object, index)
    operation.answer = released ? 1 : 0
    return released
  }

  override get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    const entry: TracedEntry = { ...noPage, object, index }
    const operation = this.#record('get', [entry])
    return answered(operation, entry, into, this.next.get(object, index, into))
  }

  override async fetch(object: ObjectId, index: number, into: Uint8Array): Promise<GetOutcome> {
    const entry: TracedEntry = { ...noPage, object, index }
    const operation = this.#record('fetch', [entry])
    return answered(operation, entry, into, await this.next.fetch(object, index, into))
  }

  override lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    const entry: TracedEntry = { ...noPage, object, index }
    const operation = this.#record('lend', [entry])
    const outcome = this.next.lend(object, index, (bytes, at, length) => {
      entry.sum = crc32(bytes.subarray(at, at + length))
      return use(bytes, at, length)
    })
    entry.outcome = outcome
    operation.answer = outcome
    return outcome
  }

  override flushPage(object: ObjectId, index: number): void {
    this.#record('flushPage', [{ ...noPage, object, index }])
    this.next.flushPage(object, index)
  }

  override flushObject(object: ObjectId): void {
    this.#record('flushObject', [{ ...noPage, object, index: -1 }])
    this.next.flushObject(object)
  }

  override putMany(batch: PageBatch): number {
    return this.#putMany('putMany', batch, () => this.next.putMany(batch))
  }

  override replaceMany(batch: PageBatch): number {
    return this.#putMany('replaceMany', batch, () => this.next.replaceMany!(batch))
  }

  #putMany(name: TracedName, batch: PageBatch, put: () => number): number {
    const entries = this.#entries(batch, true)
    const operation = this.#record(name, entries)
    const stored = put()
    for (let i = 0; i < entries.length; i++) entries[i]!.outcome = batch.outcomes[i]!
    operation.answer = stored
    return stored
  }

  override getMany(batch: PageBatch): number {
    const entries = this.#entries(batch, false)
    const operation = this.#record('getMany', entries)
    const hits = this.next.getMany(batch)
    for (let i = 0; i < entries.length; i++) {
      const entry = entries[i]!
      entry.outcome = batch.outcomes[i]!
      if (entry.before === Pending && entry.outcome === GetOutcome.Hit) entry.sum = crc32(pageOf(batch, i))
    }
    operation.answer = hits
    return hits
  }

  override flushMany(batch: PageBatch): void {
    this.#record('flushMany', this.#entries(batch, false))
    this.next.flushMany(batch)
  }

  override split(): Pool | PoolRefusal {
    const operation = this.#record('split')
    const parts = super.split()
    operation.answer = typeof parts === 'number' ? -parts : (parts as TracePool).#number
    return parts
  }

  override freeze(): void {
    this.#record('freeze')
    this.next.freeze()
  }

  override thaw(): void {
    this.#record('thaw')
    this.next.thaw()
  }

  override destroy(): void {
    this.#record('destroy')
    this.next.destroy()
  }

  #entries(batch: PageBatch, put: boolean): readonly TracedEntry[] {
    const entries: TracedEntry[] = []
    for (let i = 0; i < batch.length; i++) {
      const before = batch.outcomes[i]!
      const offered = put && before === Pending
      entries.push({
        object: batch.objects[i]!,
        index: batch.indexes[i]!,
        before,
        outcome: before,
        sum: offered ? crc32(pageOf(batch, i)) : undefined,
        page: offered ? this.#store.copy(batch.bytes, batch.offsets[i]!, batch.pageSize) : undefined,
      })
    }
    return entries
  }
}

const pageOf = (batch: PageBatch, entry: number): Uint8Array =>
  batch.bytes.subarray(batch.offsets[entry]!, batch.offsets[entry]! + batch.pageSize)

function answered(operation: TracedOperation, entry: TracedEntry, into: Uint8Array, outcome: GetOutcome): GetOutcome {
  entry.outcome = outcome
  if (outcome === GetOutcome.Hit) entry.sum = crc32(into)
  operation.answer = outcome
  return outcome
}

/** An operation that was answered otherwise when it was run again. */
export interface ReplayDifference {
  readonly recorded: TracedOperation
  readonly replayed: TracedOperation
}

/**
 * Runs recorded operations again, one after the other, on an open store, and returns what was answered otherwise
 * (outcomes, counts, bytes). Use the operations of one label, from its `newPool` on. Throws `RangeError` when a page is
 * needed that the trace did not keep (see `TraceLogOptions.pages`), or a pool whose making is not in the list.
 */
export async function replay(
  operations: readonly TracedOperation[],
  store: PageStore,
): Promise<readonly ReplayDifference[]> {
  const log = new TraceLog({ operations: 1 })
  const noMemory: Allocator = { allocate: () => undefined }
  const traced = new TraceStore(store.capabilities, store, log, 'replay', noMemory)
  const pools = new Map<number, Pool>()
  const differences: ReplayDifference[] = []
  for (const recorded of operations) {
    if (recorded.said !== undefined) continue
    if (recorded.name === 'open' || recorded.name === 'close' || recorded.name === 'closed') continue
    await repeat(recorded, traced, pools)
    const replayed = log.operations[0]!
    if (traceLine({ ...recorded, label: '', pool: 0 }) !== traceLine({ ...replayed, label: '', pool: 0 }))
      differences.push({ recorded, replayed })
  }
  return differences
}

async function repeat(operation: TracedOperation, store: PageStore, pools: Map<number, Pool>): Promise<void> {
  const { name, entries, answer } = operation
  if (name === 'tick') {
    store.tick({ pages: operation.budget! })
    return
  }
  if (name === 'newPool') {
    const made = store.newPool(operation.attributes!)
    if (typeof made !== 'number' && answer !== undefined && answer >= 0) pools.set(answer, made)
    return
  }
  if (name === 'sync') {
    await store.sync?.()
    return
  }
  const pool = pools.get(operation.pool!)
  if (pool === undefined) throw new RangeError(`pool ${operation.pool} was made before the trace begins`)
  const { pageSize } = pool.attributes
  if (name === 'putMany' || name === 'replaceMany' || name === 'getMany' || name === 'flushMany') {
    const batch = new PageBatch(Math.max(1, entries.length), pageSize)
    for (const { object, index, before, page } of entries) {
      const i = batch.push(object, index)
      batch.outcomes[i] = before
      if ((name === 'putMany' || name === 'replaceMany') && before === Pending)
        batch.bytes.set(kept(page), i * pageSize)
    }
    // Where the recorded pool kept an older page, this one may not be able to.
    if (name === 'replaceMany' && pool.replaceMany === undefined) pool.putMany(batch)
    else pool[name]!(batch)
    return
  }
  if (name === 'split') {
    const parts = pool.split()
    if (typeof parts !== 'number' && answer !== undefined && answer >= 0) pools.set(answer, parts)
    return
  }
  if (name === 'freeze' || name === 'thaw' || name === 'destroy') {
    pool[name]()
    return
  }
  const { object, index, page } = entries[0]!
  if (name === 'put' || (name === 'replace' && pool.replace === undefined)) pool.put(object, index, kept(page))
  else if (name === 'replace') pool.replace!(object, index, kept(page))
  else if (name === 'release') pool.release?.(object, index)
  else if (name === 'get') pool.get(object, index, new Uint8Array(pageSize))
  else if (name === 'fetch') await pool.fetch(object, index, new Uint8Array(pageSize))
  else if (name === 'lend') pool.lend(object, index, () => undefined)
  else if (name === 'flushPage') pool.flushPage(object, index)
  else pool.flushObject(object)
}

function kept(page: Uint8Array | undefined): Uint8Array {
  if (page === undefined) throw new RangeError('the trace kept no page for this put: record it with {pages: true}')
  return page
}

/** `trace(label=top)` in the text of a stack; what it sees goes into the given list. */
export const traceFactory = (log: TraceLog): LayerFactory => ({
  name: 'trace',
  summary: 'writes down every operation',
  options: { label: { kind: 'text', summary: 'names it in the list' } },
  create: ({ label }) => trace({ log, ...(label === undefined ? {} : { label: label as string }) }),
})
