/**
 * The stack of a device: one chain of places, opened for it alone, with one pool in which slot n is the page of index
 * n.
 *
 * A block device cannot refuse a write. So there must be room for its whole size in places that are sure to have it,
 * and a device without that is refused when it is made.
 *
 * Invariant: the meter has what the pages in memory of the device's own take; pages in somebody else's memory, and on a
 * disk, cost nothing.
 */
import {
  type Account,
  type Accounts,
  type Allocator,
  compose,
  type Layer,
  type OpenProgress,
  type PageStore,
  type Pool,
  PutOutcome,
  planStack,
  poolRefusalName,
  putOutcomeName,
  type StackRequirement,
  TmemError,
} from '@tmem/core'

/** Bytes of a page, and of a slot. */
export const pageBytes = 4096

/** Every page is in one object. */
export const object = 0

/** Bytes charged, against a limit that can be changed. */
export class Meter implements Account, Accounts {
  readonly weight = 0
  bytes = 0
  limit: number = Number.POSITIVE_INFINITY

  of(): Account {
    return this
  }

  charge(bytes: number): boolean {
    if (this.bytes + bytes > this.limit) return false
    this.bytes += bytes
    return true
  }

  release(bytes: number): void {
    this.bytes -= bytes
  }
}

/** A pool of a stack of places, which can do all of this. */
export type PlacePool = Pool & Required<Pick<Pool, 'replace' | 'replaceMany' | 'whereIs' | 'sink' | 'recompress'>>

/** The opened stack of a device. */
export interface DeviceStack {
  readonly store: PageStore & Required<Pick<PageStore, 'usage' | 'compact'>>
  readonly pool: PlacePool
  readonly meter: Meter
  /**
   * Bytes of pages that are sure to find room; and those of them that do in places that wait, where no memlimit is in
   * the way.
   */
  readonly roomBytes: number
  readonly waitingRoomBytes: number
  /** Some place promises that what it has acknowledged survives the process. */
  readonly survives: boolean
}

/** What a stack is opened with. */
export interface StackOptions {
  readonly name: string
  readonly layers: readonly Layer[]
  readonly sizeBytes: number
  readonly allocator: Allocator
  readonly check: 'arguments' | 'model'
  readonly clock: (() => number) | undefined
  readonly history: number | undefined
  readonly wake: (() => void) | undefined
  readonly onProgress: OpenProgress | undefined
}

/** A place that could be a store by itself is a place here, too: the device has to know where its pages are. */
const placesOf = (layers: readonly Layer[]): Layer[] =>
  layers.map((layer) => (layer.place === undefined ? layer : { name: layer.name, place: layer.place }))

const requirementOf = (name: string, sizeBytes: number): StackRequirement => ({
  by: `device ${name}`,
  persistent: true,
  pageSize: pageBytes,
  reservedBytes: sizeBytes,
})

/**
 * Whether a device of so many bytes could stand above a stack, without opening anything. Throws `TmemError`
 * (`TMEM_BAD_STACK`), as `ramzswap` would, or `virtswap` where the first place is somebody else's memory.
 */
export function planDevice(
  name: string,
  sizeBytes: number,
  stack: readonly Layer[],
  { isVirtual = false }: { readonly isVirtual?: boolean } = {},
): void {
  const layers = placesOf(stack)
  planStack(isVirtual ? lent(layers) : layers, requirementOf(name, sizeBytes))
}

/**
 * Opens the stack of a device. Throws `TmemError` with nothing left open: `TMEM_BAD_STACK` when its layers cannot stand
 * together, are no places, or have no room for the whole device.
 */
export function openStack(options: StackOptions): DeviceStack {
  const { name, sizeBytes, allocator, check, clock, history, wake, onProgress } = options
  const layers = placesOf(options.layers)
  const meter = new Meter()
  const store = compose(layers, {
    allocator,
    accounts: meter,
    check,
    ...(clock === undefined ? {} : { clock }),
    ...(history === undefined ? {} : { history }),
    ...(wake === undefined ? {} : { wake }),
    ...(onProgress === undefined ? {} : { onProgress }),
    requirement: requirementOf(name, sizeBytes),
  }) as DeviceStack['store']
  const refuse = (code: 'TMEM_BAD_STACK' | 'TMEM_NO_MEMORY', reason: string): never => {
    // A rejection of this close is not handled on purpose: it surfaces beside the error thrown here.
    void store.close()
    throw new TmemError(code, `device ${name}: ${reason}`, { layer: store.name })
  }
  const { places } = store.usage()
  if (places.length === 0)
    refuse('TMEM_BAD_STACK', `${store.name} is no stack of places: it does not say where pages are`)
  const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: pageBytes })
  if (typeof pool === 'number')
    return refuse('TMEM_NO_MEMORY', `${store.name} gives no pool for 4 KiB pages: ${poolRefusalName(pool)}`)
  if (pool.replace === undefined)
    refuse('TMEM_BAD_STACK', `${store.name} cannot keep a page until the one that replaces it is safe`)
  return {
    store,
    pool: pool as PlacePool,
    meter,
    roomBytes: store.capabilities.reservedBytes,
    waitingRoomBytes: layers.reduce(
      (sum, { place }) => sum + (place?.traits.waits === true ? place.traits.reservedBytes : 0),
      0,
    ),
    survives: places.some(({ survives }) => survives !== 'nothing'),
  }
}

/** The same stack, whose first place is memory of somebody else: it is charged to nobody, and not sure to be there. */
export function lent(layers: readonly Layer[]): Layer[] {
  const first = layers.findIndex(({ place }) => place !== undefined)
  return layers.map((layer, n) => {
    const { place } = layer
    if (n !== first || place === undefined) return layer
    return { name: layer.name, place: { ...place, traits: Object.freeze({ ...place.traits, foreign: true }) } }
  })
}

/** An error of a device about one of its pages. */
export const pageError = (device: string, what: string, slot: number, reason: string, cause?: Error): TmemError =>
  new TmemError('TMEM_IO', `device ${device}: cannot ${what} page ${slot}: ${reason}`, {
    layer: device,
    handle: `page ${slot}`,
    cause,
  })

/** Why a page was refused: for servers, which tell a full device from a broken one by the code of the cause. */
export function refusalError(device: string, slot: number, outcome: PutOutcome, failure: Error | undefined): TmemError {
  const cause = outcome === PutOutcome.Unavailable ? failure : full(outcome)
  const why = cause === undefined ? '' : ` (${cause.message})`
  return pageError(device, 'write', slot, `its stack refused the page: ${putOutcomeName(outcome)}${why}`, cause)
}

/** The error of a device that is full, if that was the reason. */
function full(outcome: PutOutcome): Error | undefined {
  if (outcome !== PutOutcome.NoMemory && outcome !== PutOutcome.Quota && outcome !== PutOutcome.AllocationFailed)
    return undefined
  return Object.assign(new Error('no place has room'), { code: 'ENOSPC' })
}

/** A device that is closed does nothing any more. */
export const closedError = (device: string): TmemError =>
  new TmemError('TMEM_CLOSED', `device ${device} is closed`, { layer: device })
