/**
 * Builds a stack out of layers, with a checked boundary between every two.
 *
 * `compose` first asks each layer, from the bottom up, whether it can stand above the next one; nothing is allocated
 * before the whole stack was judged. It then opens them from the bottom up. Each opened store is wrapped once, so that
 * every call between two layers (and from the outside into the top one) passes exactly one boundary, which checks
 * arguments before the call and the answer after it. In `'model'` mode the boundary also remembers a checksum per
 * 4 KiB and asserts the rules of coherency themselves: put-put-get, get-get, nothing after a refused put or a flush,
 * nothing persistent lost.
 *
 * A boundary that sees a broken rule stops for good (`TMEM_BROKEN`): a store that lied once is not asked again. In that
 * mode the places below a chain have boundaries of their own (`checked-place.ts`), which stop the one above the chain.
 */
import { type Broken, checkedPlace } from './checked-place.ts'
import { createAccounts, systemAllocator } from './context.ts'
import { maxPlaces } from './directory.ts'
import { maxRecords } from './history.ts'
import { checkOptions, type OptionNames } from './options.ts'
import type { GetOutcome, PoolRefusal, PutOutcome } from './outcomes.ts'
import {
  GetOutcome as Got,
  getOutcomeCount,
  getOutcomeName,
  Pending,
  PutOutcome as Put,
  poolRefusalName,
  putOutcomeCount,
  TmemError,
} from './outcomes.ts'
import type { PlaceTraits } from './place.ts'
import { crc32 } from './runtime.ts'
import type { OpenPlace } from './seat.ts'
import { openChains } from './shards.ts'
import type {
  Accounts,
  Allocator,
  Borrower,
  Budget,
  Capabilities,
  Census,
  Layer,
  LayerContext,
  ObjectId,
  OpenProgress,
  PageBatch,
  PageHistory,
  PageStore,
  PageVisitor,
  Pool,
  PoolAttributes,
  Progress,
  StackUsage,
  StatsNode,
  Sunk,
  Whereabouts,
} from './store.ts'
import {
  assertBatch,
  assertClient,
  assertEntries,
  assertIndex,
  assertObject,
  assertPage,
  basePageSize,
  checkedAttributes,
} from './store.ts'

/** What the user of a stack needs of it; `compose` refuses a stack that cannot give it. */
export interface StackRequirement {
  /** Who needs it, for the message, e.g. `swap device /run/tmem.sock`. */
  readonly by: string
  readonly ephemeral?: boolean
  readonly persistent?: boolean
  readonly shared?: boolean
  /** Page size that must be kept, in bytes. */
  readonly pageSize?: number
  /** Bytes that must be sure to find a place: what a block device needs, which cannot refuse a write. */
  readonly reservedBytes?: number
}

/** Settings of `compose`; each has a default that fits. */
export interface ComposeOptions {
  /** Where the layers get memory (default: `systemAllocator`). */
  readonly allocator?: Allocator
  /** Who pays for persistent pages (default: new accounts without a maximum). */
  readonly accounts?: Accounts
  /** `'arguments'` (default): arguments and answers. `'model'`: the rules of coherency, too (slow, for tests). */
  readonly check?: 'arguments' | 'model'
  /** What the stack is for. */
  readonly requirement?: StackRequirement
  /** See `LayerContext`. */
  readonly clock?: () => number
  /**
   * Moves of pages between places that the stack remembers for `Pool.movesOf`, 20 bytes each: 1 to 2^20; it needs a
   * `clock` (default: none).
   */
  readonly history?: number
  readonly wake?: () => void
  readonly io?: 'pool' | 'blocking'
  readonly onProgress?: OpenProgress
}

const composeNames: OptionNames<ComposeOptions> = {
  allocator: 'object?',
  accounts: 'object?',
  check: 'text?',
  requirement: 'object?',
  clock: 'function?',
  history: 'number?',
  wake: 'function?',
  io: 'text?',
  onProgress: 'function?',
}

/**
 * Opens a stack; the first layer is the one that pages enter. Throws `TmemError`: `TMEM_BAD_STACK` names the two layers
 * that cannot stand together and why; whatever a layer throws when it cannot open comes through, after the layers that
 * were open already have been told to close.
 */
export function compose(layers: readonly Layer[], options: ComposeOptions = {}): PageStore {
  if (!Array.isArray(layers)) throw new TypeError('compose: expected a list of layers, the topmost one first')
  checkOptions('compose', options, composeNames)
  const { allocator = systemAllocator, accounts = createAccounts(), check = 'arguments', requirement } = options
  const { clock, history, wake, io, onProgress } = options
  if (history !== undefined && !(Number.isSafeInteger(history) && history >= 1 && history <= maxRecords))
    throw new RangeError(`compose: history must be a number of moves from 1 to ${maxRecords}, got ${history}`)
  if (history !== undefined && clock === undefined)
    throw new TypeError('compose: history needs a clock, such as clock: () => performance.now()')
  const plans = judge(layers)
  if (requirement !== undefined) satisfy(requirement, layers, plans[0]!)
  const context: LayerContext = {
    allocator,
    accounts,
    ...(clock === undefined ? {} : { clock }),
    ...(history === undefined ? {} : { history }),
    ...(wake === undefined ? {} : { wake }),
    ...(io === undefined ? {} : { io }),
    ...(onProgress === undefined ? {} : { onProgress }),
  }
  const filters = filtersOf(layers)
  let store: PageStore | undefined
  const isModel = check === 'model'
  const stateOf = (number: number): BoundaryState =>
    new BoundaryState(number === 0 ? 'the caller' : layers[number - 1]!.name, layers[number]!.name)
  if (filters < layers.length) {
    // Whoever sees a place break a rule tells the boundary above the chain.
    const state = stateOf(filters)
    const chain = openChain(layers.slice(filters), plans[filters]!, context, isModel ? state : undefined)
    store = new Boundary(chain, state, isModel, undefined)
  }
  for (let i = filters - 1; i >= 0; i--) {
    try {
      store = new Boundary(layers[i]!.open!(store, context), stateOf(i), isModel, store)
    } catch (error) {
      // A rejection of this close is not handled on purpose: it surfaces as an unhandled rejection beside the error
      // thrown here.
      if (store !== undefined) void store.close()
      throw error
    }
  }
  return store!
}

/** Layers above the first place: filters, or a store of its own. */
function filtersOf(layers: readonly Layer[]): number {
  let first = layers.findIndex(({ place }) => place !== undefined)
  if (first < 0) return layers.length
  // A place that is a store by itself, and alone, is opened as that: it can do more (views in parts, threads).
  if (first === layers.length - 1 && layers[first]!.open !== undefined) return layers.length
  // What can only change blocks belongs to the place that follows it, also at the top.
  while (first > 0 && layers[first - 1]!.open === undefined && layers[first - 1]!.wrapPlace !== undefined) first--
  return first
}

/** Opens the places of a chain, from the bottom up, and the chain over them. `told`: each is checked. */
function openChain(
  layers: readonly Layer[],
  capabilities: Capabilities,
  context: LayerContext,
  told: Broken | undefined,
): PageStore {
  const places: OpenPlace[] = []
  let below: OpenPlace | undefined
  try {
    for (let i = layers.length - 1; i >= 0; i--) {
      const layer = layers[i]!
      const { place } = layer
      if (place !== undefined) {
        if (below !== undefined) places.unshift(below)
        below = undefined
        below = { place: place.open(context), foreign: place.traits.foreign === true }
      } else below = { place: layer.wrapPlace!(below!.place, context), foreign: below!.foreign }
      if (told !== undefined) below = { place: checkedPlace(below.place, told), foreign: below.foreign }
    }
    places.unshift(below!)
    below = undefined
    return openChains(places, capabilities, context)
  } catch (error) {
    // As above.
    for (const open of below === undefined ? places : [below, ...places]) void open.place.close()
    throw error
  }
}

/**
 * What a stack of these layers could do, without opening anything. Throws `TmemError` (`TMEM_BAD_STACK`), as `compose`
 * would, when they cannot stand together, or cannot do what is required.
 */
export function planStack(layers: readonly Layer[], requirement?: StackRequirement): Capabilities {
  const [can] = judge(layers)
  if (requirement !== undefined) satisfy(requirement, layers, can!)
  return can!
}

/** What each stack from layer i downwards can do. Throws `TMEM_BAD_STACK`. */
function judge(layers: readonly Layer[]): readonly Capabilities[] {
  if (layers.length === 0)
    throw new TmemError('TMEM_BAD_STACK', 'a stack needs at least one layer that keeps pages, e.g. memory')
  const plans = new Array<Capabilities>(layers.length)
  const filters = filtersOf(layers)
  if (filters < layers.length) plans[filters] = judgeChain(layers.slice(filters))
  for (let i = filters - 1; i >= 0; i--) {
    const layer = layers[i]!
    const next = layers[i + 1]
    const where =
      next === undefined ? `${layer.name} cannot be the last layer` : `${layer.name} cannot stand above ${next.name}`
    const plan = layer.plan?.(plans[i + 1]) ?? 'it stands between places only, or is one'
    if (typeof plan === 'string') throw new TmemError('TMEM_BAD_STACK', `${where}: ${plan}`, { layer: layer.name })
    if (plan.minPageSize > plan.maxPageSize)
      throw new TmemError('TMEM_BAD_STACK', `${where}: there is no page size that both keep`, { layer: layer.name })
    if (!plan.ephemeral && !plan.persistent)
      throw new TmemError('TMEM_BAD_STACK', `${where}: there is no kind of pool that both keep`, { layer: layer.name })
    plans[i] = plan
  }
  return plans
}

/** What a chain of places can do, filters between them included. Throws `TMEM_BAD_STACK`. */
function judgeChain(layers: readonly Layer[]): Capabilities {
  const refuse = (layer: Layer, why: string): never => {
    throw new TmemError('TMEM_BAD_STACK', `${layer.name} ${why}`, { layer: layer.name })
  }
  const traits: PlaceTraits[] = []
  for (let number = layers.length - 1; number >= 0; number--) {
    const layer = layers[number]!
    if (layer.place !== undefined) traits.unshift(layer.place.traits)
    else if (layer.wrapPlace === undefined)
      refuse(layer, `cannot stand below ${layers[number - 1]!.name}: it is no place, nor a filter between places`)
    else if (number === layers.length - 1)
      refuse(layer, 'cannot be the last layer: it keeps no pages itself and needs a place below')
    else {
      const changed = layer.planPlace?.(traits[0]!) ?? traits[0]!
      if (typeof changed === 'string')
        return refuse(layer, `cannot stand above ${layers[number + 1]!.name}: ${changed}`)
      traits[0] = changed
    }
  }
  if (traits.length > maxPlaces)
    throw new TmemError('TMEM_BAD_STACK', `a stack has at most ${maxPlaces} places, not ${traits.length}`)
  for (const [number, one] of traits.entries())
    if (number > 0 && !one.waits && traits.slice(0, number).some(({ waits }) => waits)) {
      const layer = layers.filter(({ place }) => place !== undefined)[number]!
      refuse(layer, 'cannot stand below a place that waits: memory comes first')
    }
  const some = (of: (one: PlaceTraits) => boolean): boolean => traits.some(of)
  const most = (of: (one: PlaceTraits) => number): number => Math.max(...traits.map(of))
  return Object.freeze({
    ephemeral: some(({ ephemeral }) => ephemeral),
    persistent: some(({ persistent }) => persistent),
    shared: some(({ ephemeral }) => ephemeral),
    minPageSize: basePageSize,
    maxPageSize: most(({ maxPageSize }) => maxPageSize),
    deferred: some(({ waits }) => waits),
    split: false,
    // What belongs to somebody else is not sure to be there.
    reservedBytes: traits.reduce((sum, { reservedBytes, foreign }) => sum + (foreign === true ? 0 : reservedBytes), 0),
  })
}

function satisfy(need: StackRequirement, layers: readonly Layer[], can: Capabilities): void {
  const names = layers.map((layer) => layer.name).join(' > ')
  const last = layers[layers.length - 1]!.name
  const refuse = (reason: string): never => {
    throw new TmemError('TMEM_BAD_STACK', `${need.by} cannot stand above ${names}: ${reason}`, {
      layer: layers[0]!.name,
    })
  }
  if (need.persistent === true && !can.persistent) refuse('it needs persistent pools, which this stack does not keep')
  if (need.ephemeral === true && !can.ephemeral) refuse('it needs ephemeral pools, which this stack does not keep')
  if (need.shared === true && !can.shared) refuse('it needs shared pools, which this stack does not keep')
  if (need.pageSize !== undefined && (need.pageSize < can.minPageSize || need.pageSize > can.maxPageSize))
    refuse(`it needs pages of ${need.pageSize} bytes, the stack keeps ${can.minPageSize} to ${can.maxPageSize}`)
  if (need.reservedBytes !== undefined && need.reservedBytes > can.reservedBytes)
    refuse(
      `it needs room for all of its ${need.reservedBytes} bytes, because it cannot refuse a write, and ${last} reserves ${can.reservedBytes}: end the stack in a file, e.g. frontswap(file=…,size=…)`,
    )
}

/** Shared by all pools of one boundary, and by the checked places below it: whether it stopped, or was closed. */
class BoundaryState implements Broken {
  readonly upper: string
  readonly lower: string
  broken: TmemError | undefined
  closed = false

  constructor(upper: string, lower: string) {
    this.upper = upper
    this.lower = lower
  }

  /** Throws when the boundary has stopped. */
  assertWhole(): void {
    if (this.broken !== undefined) throw this.broken
  }

  /** Stops the boundary for good. */
  break(rule: string, handle?: string): never {
    this.broken = new TmemError(
      'TMEM_BROKEN',
      `${this.lower} broke a rule towards ${this.upper}: ${rule}${handle === undefined ? '' : ` (${handle})`}; this stack is stopped`,
      handle === undefined ? { layer: this.lower } : { layer: this.lower, handle },
    )
    throw this.broken
  }
}

class Boundary implements PageStore {
  readonly name: string
  readonly capabilities: Capabilities
  readonly #store: PageStore
  readonly #state: BoundaryState
  readonly #model: boolean
  readonly #below: PageStore | undefined
  #closing: Promise<void> | undefined

  constructor(store: PageStore, state: BoundaryState, model: boolean, below: PageStore | undefined) {
    this.name = store.name
    const { readsOnce, ...others } = store.capabilities
    // A filter may look at pages whatever is said below it, and a model does.
    const hasReader = readsOnce === true && (model || below !== undefined)
    this.capabilities = hasReader ? Object.freeze(others) : store.capabilities
    this.#store = store
    this.#state = state
    this.#model = model
    this.#below = below
  }

  get failure(): Error | undefined {
    return this.#store.failure ?? this.#below?.failure
  }

  newPool(attributes: PoolAttributes): Pool | PoolRefusal {
    this.#state.assertWhole()
    const checked = checkedAttributes(attributes)
    const pool = this.#store.newPool(checked)
    this.#state.assertWhole()
    if (typeof pool === 'number') {
      if (poolRefusalName(pool).startsWith('unknown')) this.#state.break(`newPool answered ${pool}`)
      return pool
    }
    return new BoundaryPool(
      pool,
      this.#state,
      this.capabilities,
      this.#model ? new PoolModel(pool.attributes, this.#state) : undefined,
    )
  }

  tick(budget: Budget): Progress {
    this.#state.assertWhole()
    if (!(budget.pages >= 0)) throw new RangeError(`a budget of ${budget.pages} pages makes no sense`)
    const progress = this.#store.tick(budget)
    this.#state.assertWhole()
    if (progress.pages > budget.pages)
      this.#state.break(`tick touched ${progress.pages} pages with a budget of ${budget.pages}`)
    return progress
  }

  usage(): StackUsage {
    return this.#store.usage?.() ?? { sameFilled: 0, places: [] }
  }

  compact(pages: number): number {
    if (this.#state.broken !== undefined) throw this.#state.broken
    return this.#store.compact?.(pages) ?? 0
  }

  evict(client?: number): number {
    if (this.#state.broken !== undefined) throw this.#state.broken
    return this.#store.evict?.(client) ?? 0
  }

  ephemeralBytes(): number {
    return this.#store.ephemeralBytes?.() ?? 0
  }

  async ready(): Promise<void> {
    await this.#store.ready?.()
  }

  async sync(): Promise<void> {
    this.#state.assertWhole()
    await this.#store.sync?.()
    this.#state.assertWhole()
  }

  stats(): StatsNode {
    return this.#store.stats()
  }

  check(): void {
    this.#store.check?.()
    this.#below?.check?.()
  }

  close(): Promise<void> {
    this.#state.closed = true
    this.#closing ??= this.#store.close()
    return this.#closing
  }
}

class BoundaryPool implements Pool {
  readonly attributes: PoolAttributes
  readonly #pool: Pool
  readonly #state: BoundaryState
  readonly #capabilities: Capabilities
  readonly #pageSize: number
  readonly #model: PoolModel | undefined

  constructor(pool: Pool, state: BoundaryState, capabilities: Capabilities, model: PoolModel | undefined) {
    this.attributes = pool.attributes
    this.#pool = pool
    this.#state = state
    this.#capabilities = capabilities
    this.#pageSize = pool.attributes.pageSize
    this.#model = model
    // Whether a refusal leaves the page that is there is known by asking whether the pool has the method.
    if (pool.replace === undefined) this.replace = undefined as never
    if (pool.replaceMany === undefined) this.replaceMany = undefined as never
    if (pool.handOver === undefined) this.handOver = undefined as never
    // So is whether its pages can be listed.
    if (pool.walk === undefined) this.walk = undefined as never
    if (pool.census === undefined) this.census = undefined as never
  }

  put(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    const state = this.#state
    state.assertWhole()
    assertPage(page, this.#pageSize)
    assertObject(object)
    assertIndex(index, this.#pageSize)
    return this.#wasPut(object, index, page, this.#pool.put(object, index, page), false)
  }

  replace(object: ObjectId, index: number, page: Uint8Array): PutOutcome {
    const state = this.#state
    state.assertWhole()
    assertPage(page, this.#pageSize)
    assertObject(object)
    assertIndex(index, this.#pageSize)
    return this.#wasPut(object, index, page, this.#pool.replace!(object, index, page), true)
  }

  #wasPut(object: ObjectId, index: number, page: Uint8Array, outcome: PutOutcome, kept: boolean): PutOutcome {
    const state = this.#state
    state.assertWhole()
    if (outcome >>> 0 !== outcome || outcome >= putOutcomeCount)
      state.break(`put answered ${outcome}`, handleName(object, index))
    if (kept && outcome !== Put.Stored) return outcome
    const complaint = this.#model?.put(object, index, page, 0, outcome)
    if (complaint !== undefined) state.break(complaint, handleName(object, index))
    return outcome
  }

  release(object: ObjectId, index: number): boolean {
    this.#state.assertWhole()
    assertObject(object)
    assertIndex(index, this.#pageSize)
    const answer = this.#pool.release?.(object, index) ?? false
    this.#state.assertWhole()
    return answer
  }

  whereIs(object: ObjectId, index: number, into: Whereabouts): boolean {
    if (this.#state.broken !== undefined) throw this.#state.broken
    assertObject(object)
    assertIndex(index, this.#pageSize)
    return this.#pool.whereIs?.(object, index, into) ?? false
  }

  movesOf(object: ObjectId, index: number): PageHistory | undefined {
    if (this.#state.broken !== undefined) throw this.#state.broken
    assertObject(object)
    assertIndex(index, this.#pageSize)
    return this.#pool.movesOf?.(object, index)
  }

  walk(visit: PageVisitor, object?: ObjectId): void {
    if (this.#state.broken !== undefined) throw this.#state.broken
    if (object !== undefined) assertObject(object)
    this.#pool.walk!(visit, object)
  }

  census(into?: Census): Census {
    if (this.#state.broken !== undefined) throw this.#state.broken
    return this.#pool.census!(into)
  }

  async sink(object: ObjectId, indexes: Uint32Array, count: number, slow: boolean): Promise<Sunk> {
    this.#assertPages(object, indexes, count)
    const sunk = (await this.#pool.sink?.(object, indexes, count, slow)) ?? { pages: 0, failure: undefined }
    if (sunk.pages > count) this.#state.break(`sink counted ${sunk.pages} pages of ${count}`)
    return sunk
  }

  recompress(object: ObjectId, indexes: Uint32Array, count: number): number {
    this.#assertPages(object, indexes, count)
    return this.#pool.recompress?.(object, indexes, count) ?? 0
  }

  #assertPages(object: ObjectId, indexes: Uint32Array, count: number): void {
    if (this.#state.broken !== undefined) throw this.#state.broken
    assertObject(object)
    if (!Number.isInteger(count) || count < 0 || count > indexes.length)
      throw new RangeError(`of ${indexes.length} indexes the first ${count} cannot be had`)
    for (let n = 0; n < count; n++) assertIndex(indexes[n]!, this.#pageSize)
  }

  get(object: ObjectId, index: number, into: Uint8Array): GetOutcome {
    const state = this.#state
    state.assertWhole()
    assertPage(into, this.#pageSize)
    assertObject(object)
    assertIndex(index, this.#pageSize)
    const outcome = this.#pool.get(object, index, into)
    state.assertWhole()
    if (outcome >>> 0 !== outcome || outcome >= getOutcomeCount)
      state.break(`get answered ${outcome}`, handleName(object, index))
    if (outcome === Got.Deferred && !this.#capabilities.deferred)
      state.break('get answered Deferred, which its capabilities exclude', handleName(object, index))
    const complaint = this.#model?.got(object, index, into, 0, outcome)
    if (complaint !== undefined) state.break(complaint, handleName(object, index))
    return outcome
  }

  async fetch(object: ObjectId, index: number, into: Uint8Array, signal?: AbortSignal): Promise<GetOutcome> {
    const state = this.#state
    state.assertWhole()
    assertPage(into, this.#pageSize)
    assertObject(object)
    assertIndex(index, this.#pageSize)
    const changes = this.#model?.changes
    const { closed } = state
    let outcome: GetOutcome
    try {
      outcome = await this.#pool.fetch(object, index, into, signal)
    } finally {
      // A place that broke a rule meanwhile says more than what came of it.
      state.assertWhole()
    }
    if (outcome !== Got.Hit && outcome !== Got.Miss)
      state.break(`fetch answered ${getOutcomeName(outcome)}`, handleName(object, index))
    // Whatever changed while this one waited may have come before or after it: then nothing can be said. What the model
    // still believes to be in a private ephemeral pool may be gone, which is allowed to such a page at any time.
    if (changes === this.#model?.changes && closed === state.closed) {
      const complaint = this.#model?.got(object, index, into, 0, outcome)
      if (complaint !== undefined) state.break(complaint, handleName(object, index))
    }
    return outcome
  }

  flushPage(object: ObjectId, index: number): void {
    this.#state.assertWhole()
    assertObject(object)
    assertIndex(index, this.#pageSize)
    this.#pool.flushPage(object, index)
    this.#state.assertWhole()
    this.#model?.flushPage(object, index)
  }

  flushObject(object: ObjectId): void {
    this.#state.assertWhole()
    assertObject(object)
    this.#pool.flushObject(object)
    this.#state.assertWhole()
    this.#model?.flushObject(object)
  }

  putMany(batch: PageBatch): number {
    return this.#putMany(batch, false)
  }

  replaceMany(batch: PageBatch): number {
    return this.#putMany(batch, true)
  }

  #putMany(batch: PageBatch, kept: boolean): number {
    const state = this.#state
    state.assertWhole()
    assertBatch(batch, this.#pageSize)
    assertEntries(batch)
    const before = this.#model === undefined ? undefined : batch.outcomes.slice(0, batch.length)
    const stored = kept ? this.#pool.replaceMany!(batch) : this.#pool.putMany(batch)
    state.assertWhole()
    let count = 0
    for (let i = 0; i < batch.length; i++) {
      const outcome = batch.outcomes[i]!
      if (outcome >= putOutcomeCount) state.break(`putMany left the outcome ${outcome}`, entryName(batch, i))
      if (outcome === Put.Stored) count++
      if (before === undefined) continue
      const { bytes, objects, indexes, offsets } = batch
      if (before[i] === Pending) {
        if (kept && outcome !== Put.Stored) continue
        const complaint = this.#model!.put(objects[i]!, indexes[i]!, bytes, offsets[i]!, outcome as PutOutcome)
        if (complaint !== undefined) state.break(complaint, entryName(batch, i))
      } else if (before[i] === Put.Stored) this.#model!.flushPage(objects[i]!, indexes[i]!)
    }
    if (count !== stored) state.break(`putMany counted ${stored} stored pages, the outcomes say ${count}`)
    return stored
  }

  getMany(batch: PageBatch): number {
    const state = this.#state
    state.assertWhole()
    assertBatch(batch, this.#pageSize)
    assertEntries(batch)
    const before = this.#model === undefined ? undefined : batch.outcomes.slice(0, batch.length)
    const hits = this.#pool.getMany(batch)
    state.assertWhole()
    let count = 0
    for (let i = 0; i < batch.length; i++) {
      const outcome = batch.outcomes[i]!
      if (outcome >= getOutcomeCount || (outcome === Got.Deferred && !this.#capabilities.deferred))
        state.break(`getMany left the outcome ${outcome}`, entryName(batch, i))
      if (outcome === Got.Hit) count++
      if (before === undefined || before[i] !== Pending) continue
      const { bytes, objects, indexes, offsets } = batch
      const complaint = this.#model!.got(objects[i]!, indexes[i]!, bytes, offsets[i]!, outcome as GetOutcome)
      if (complaint !== undefined) state.break(complaint, entryName(batch, i))
    }
    if (count !== hits) state.break(`getMany counted ${hits} hits, the outcomes say ${count}`)
    return hits
  }

  async fetchMany(batch: PageBatch, signal?: AbortSignal): Promise<number> {
    const state = this.#state
    state.assertWhole()
    assertBatch(batch, this.#pageSize)
    assertEntries(batch)
    try {
      this.getMany(batch)
    } catch (error) {
      // One cannot be had: it is asked for once more by itself, as those are that come after it.
      if (!(error instanceof TmemError) || error.code === 'TMEM_BROKEN') throw error
    }
    const waits: Promise<void>[] = []
    for (let n = 0; n < batch.length; n++) {
      if (batch.outcomes[n] !== Got.Deferred && batch.outcomes[n] !== Pending) continue
      // Through this boundary's own `fetch`, which knows what may be said about what has waited.
      waits.push(
        this.fetch(batch.objects[n]!, batch.indexes[n]!, batch.page(n), signal).then((outcome) => {
          batch.outcomes[n] = outcome
        }),
      )
    }
    const failed = (await Promise.allSettled(waits)).find((result) => result.status === 'rejected')
    if (failed !== undefined) throw failed.reason
    let hits = 0
    for (let n = 0; n < batch.length; n++) if (batch.outcomes[n] === Got.Hit) hits++
    return hits
  }

  flushMany(batch: PageBatch): void {
    this.#state.assertWhole()
    assertBatch(batch, this.#pageSize)
    assertEntries(batch)
    this.#pool.flushMany(batch)
    this.#state.assertWhole()
    if (this.#model === undefined) return
    for (let i = 0; i < batch.length; i++) this.#model.flushPage(batch.objects[i]!, batch.indexes[i]!)
  }

  lend(object: ObjectId, index: number, use: Borrower): GetOutcome {
    const state = this.#state
    state.assertWhole()
    assertObject(object)
    assertIndex(index, this.#pageSize)
    const model = this.#model
    if (model === undefined) return this.#lent(this.#pool.lend(object, index, use), object, index)
    // The borrower sees a copy that is overwritten afterwards: keeping the view shows at once.
    let copy: Uint8Array | undefined
    const outcome = this.#pool.lend(object, index, (bytes, at, length) => {
      if (length !== this.#pageSize) state.break(`lend gave ${length} bytes`, handleName(object, index))
      copy = new Uint8Array(length)
      copy.set(bytes.subarray(at, at + length))
    })
    this.#lent(outcome, object, index)
    if ((outcome === Got.Hit) !== (copy !== undefined))
      state.break(
        `lend answered ${getOutcomeName(outcome)} and ${copy ? 'lent' : 'did not lend'}`,
        handleName(object, index),
      )
    const complaint = model.got(object, index, copy ?? emptyPage, 0, outcome)
    if (complaint !== undefined) state.break(complaint, handleName(object, index))
    if (copy !== undefined) {
      use(copy, 0, copy.length)
      copy.fill(0xdb)
    }
    return outcome
  }

  #lent(outcome: GetOutcome, object: ObjectId, index: number): GetOutcome {
    this.#state.assertWhole()
    if (outcome >>> 0 !== outcome || outcome >= getOutcomeCount)
      this.#state.break(`lend answered ${outcome}`, handleName(object, index))
    if (outcome === Got.Deferred && !this.#capabilities.deferred)
      this.#state.break('lend answered Deferred, which its capabilities exclude', handleName(object, index))
    return outcome
  }

  split(): Pool | PoolRefusal {
    this.#state.assertWhole()
    const parts = this.#pool.split()
    if (typeof parts === 'number') {
      if (this.#capabilities.split)
        this.#state.break(`split answered ${poolRefusalName(parts)} despite its capabilities`)
      return parts
    }
    if (parts.attributes.pageSize !== basePageSize)
      this.#state.break(`split gave pages of ${parts.attributes.pageSize} bytes`)
    return new BoundaryPool(parts, this.#state, this.#capabilities, this.#model?.parts())
  }

  handOver(client: number): boolean {
    this.#state.assertWhole()
    assertClient(client)
    return this.#pool.handOver!(client)
  }

  freeze(): void {
    this.#pool.freeze()
    this.#model?.freeze(true)
  }

  thaw(): void {
    this.#pool.thaw()
    this.#model?.freeze(false)
  }

  destroy(): void {
    this.#pool.destroy()
    this.#model?.destroy()
  }
}

const emptyPage = new Uint8Array(0)
const handleName = (object: ObjectId, index: number): string => `object ${object} index ${index}`
const entryName = (batch: PageBatch, entry: number): string =>
  `entry ${entry}: ${handleName(batch.objects[entry]!, batch.indexes[entry]!)}`

/** What the model knows of one object: for each 4 KiB part that may be there, the checksum of its bytes. */
type ObjectModel = Map<number, number>

/** The pages of a pool and what they must contain, shared between a pool and its view in parts. */
interface PoolContents {
  readonly objects: Map<bigint, ObjectModel>
  changes: number
  destroyed: boolean
  frozen: boolean
  split: boolean
}

/**
 * Knows of every 4 KiB what a get may answer. Absent parts must miss; present parts of a persistent pool must be
 * there; whatever is served must have the checksum of what was put last.
 */
class PoolModel {
  readonly #attributes: PoolAttributes
  readonly #partsPerPage: number
  readonly #contents: PoolContents
  readonly #boundary: { readonly closed: boolean }

  constructor(attributes: PoolAttributes, boundary: { readonly closed: boolean }, contents?: PoolContents) {
    this.#attributes = attributes
    this.#boundary = boundary
    this.#partsPerPage = attributes.pageSize / basePageSize
    this.#contents = contents ?? { objects: new Map(), changes: 0, destroyed: false, frozen: false, split: false }
  }

  /** Number of changes so far. */
  get changes(): number {
    return this.#contents.changes
  }

  /** The model of the view in parts. */
  parts(): PoolModel {
    this.#contents.split = true
    return new PoolModel({ ...this.#attributes, pageSize: basePageSize }, this.#boundary, this.#contents)
  }

  freeze(frozen: boolean): void {
    this.#contents.frozen = frozen
  }

  destroy(): void {
    this.#contents.destroyed = true
    this.#contents.changes++
    this.#contents.objects.clear()
  }

  /** Notes a put. Says what is wrong, if anything. */
  put(object: ObjectId, index: number, bytes: Uint8Array, at: number, outcome: PutOutcome): string | undefined {
    const { frozen, destroyed } = this.#contents
    const known = frozen && this.#knows(object, index)
    this.flushPage(object, index)
    if (outcome !== Put.Stored) return undefined
    if (destroyed || this.#boundary.closed) return 'a destroyed pool stored a page'
    if (frozen && !known) return 'a frozen pool stored a page under a new handle'
    const key = BigInt(object)
    let pages = this.#contents.objects.get(key)
    if (pages === undefined) {
      pages = new Map()
      this.#contents.objects.set(key, pages)
    }
    for (let part = 0; part < this.#partsPerPage; part++)
      pages.set(index * this.#partsPerPage + part, sumOf(bytes, at + part * basePageSize))
    return undefined
  }

  /** Whether any part of the page may be there. */
  #knows(object: ObjectId, index: number): boolean {
    const pages = this.#contents.objects.get(BigInt(object))
    for (let part = 0; part < this.#partsPerPage; part++)
      if (pages?.has(index * this.#partsPerPage + part) === true) return true
    return false
  }

  /**
   * Compares an answer with what is known; afterwards a private ephemeral page is gone. Says what is wrong, if
   * anything.
   */
  got(object: ObjectId, index: number, bytes: Uint8Array, at: number, outcome: GetOutcome): string | undefined {
    const pages = this.#contents.objects.get(BigInt(object))
    const first = index * this.#partsPerPage
    let present = !this.#boundary.closed
    for (let part = 0; part < this.#partsPerPage; part++) present &&= pages?.has(first + part) === true
    if (outcome === Got.Miss) {
      if (present && this.#attributes.persistent) return 'a persistent page is lost'
      // A miss is for good: what was missed once may not come back. Of a split page, parts may still be there.
      if (present && !this.#contents.split) this.flushPage(object, index)
      return undefined
    }
    if (!present) return `${getOutcomeName(outcome)} for a page that was flushed, refused, taken or never stored`
    if (outcome === Got.Deferred) return undefined
    for (let part = 0; part < this.#partsPerPage; part++)
      if (pages!.get(first + part) !== sumOf(bytes, at + part * basePageSize))
        return 'the bytes are not those of the last put'
    if (!this.#attributes.persistent && !this.#attributes.shared) this.flushPage(object, index)
    return undefined
  }

  flushPage(object: ObjectId, index: number): void {
    this.#contents.changes++
    const key = BigInt(object)
    const pages = this.#contents.objects.get(key)
    if (pages === undefined) return
    for (let part = 0; part < this.#partsPerPage; part++) pages.delete(index * this.#partsPerPage + part)
    if (pages.size === 0) this.#contents.objects.delete(key)
  }

  flushObject(object: ObjectId): void {
    this.#contents.changes++
    this.#contents.objects.delete(BigInt(object))
  }
}

/** CRC-32 of the 4 KiB at `at`: enough to tell pages of a test apart. */
const sumOf = (bytes: Uint8Array, at: number): number => crc32(bytes.subarray(at, at + basePageSize))
