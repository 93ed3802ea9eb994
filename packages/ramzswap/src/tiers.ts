/**
 * Where the pages of a device can be: a stack of layers for each kind of place, all of them opened together.
 *
 * What a page costs is not asked of the stores (each would have its own name for it) but measured: persistent pages are charged
 * to an account, and the account of a tier is the device's own meter. So the limit on compressed bytes works over
 * any layer, too.
 */
import {
  type Account,
  type Accounts,
  type Allocator,
  type Capabilities,
  compose,
  type Layer,
  type PageStore,
  type Pool,
  planStack,
  poolRefusalName,
  type StatsNode,
  TmemError,
} from '@tmem/core'

/** Bytes of a page, and of a slot. */
export const pageBytes = 4096

/** The stacks of a device; each is a list of layers as `compose` takes it. At least one that keeps pages for good. */
export interface DevicePlan {
  /**
   * Offered each page first, uncompressed: memory that somebody else owns (a hypervisor), may refuse, and may want back
   * (`Ramzswap.recall`). This is what makes a device a virtswap.
   */
  readonly hypervisor?: readonly Layer[]
  /** Takes what compresses, e.g. `[zcache({ limitBytes })]`. */
  readonly compressed?: readonly Layer[]
  /** Where `recompress` moves pages, e.g. `[zcache({ limitBytes, codec: 'zstd' })]`. */
  readonly recompressed?: readonly Layer[]
  /** Takes what does not compress, e.g. `[memory({ limitBytes })]`. */
  readonly uncompressed?: readonly Layer[]
  /** The regular way: takes everything else, e.g. `[frontswap({ file, sizeBytes })]`. Must have room for the whole device. */
  readonly backing?: readonly Layer[]
}

/** Kinds of places in the order in which a new page is offered to them; recompressed is reached by `recompress` only. */
export type TierName = keyof DevicePlan
export const tierNames: readonly TierName[] = Object.freeze([
  'hypervisor',
  'compressed',
  'recompressed',
  'uncompressed',
  'backing',
])

/** Bytes charged, against a limit that can be changed. */
export class Meter implements Account, Accounts {
  readonly weight = 0
  bytes = 0
  /** Largest value that `bytes` had. */
  most = 0
  limit: number = Number.POSITIVE_INFINITY

  of(): Account {
    return this
  }

  charge(bytes: number): boolean {
    if (this.bytes + bytes > this.limit) return false
    this.bytes += bytes
    if (this.bytes > this.most) this.most = this.bytes
    return true
  }

  release(bytes: number): void {
    this.bytes -= bytes
  }
}

/** One opened stack, its pool, and what goes in. */
export interface Tier {
  readonly name: TierName
  readonly store: PageStore
  readonly pool: Pool
  readonly meter: Meter
}

/** The opened tiers of a device. */
export interface Tiers {
  readonly all: readonly Tier[]
  readonly byName: Readonly<Partial<Record<TierName, Tier>>>
  /** Of the pages in the device's own memory: compressed, recompressed, uncompressed. */
  readonly memory: Meter
  /** Bytes that the tier which every page ends in is sure to have room for. */
  readonly roomBytes: number
}

/**
 * Opens all stacks. Throws `TmemError` with nothing left open: `TMEM_BAD_STACK` when layers cannot stand together, or when there is no
 * room for the whole device.
 */
export function openTiers(
  device: string,
  plan: DevicePlan,
  sizeBytes: number,
  allocator: Allocator,
  check: 'arguments' | 'model',
): Tiers {
  const last = [...tierNames].reverse().find((name) => name !== 'recompressed' && plan[name] !== undefined)
  if (last === undefined || last === 'hypervisor')
    throw new TmemError(
      'TMEM_BAD_STACK',
      `${device} has no place of its own for pages: give it a stack, e.g. frontswap(file=…,size=…)`,
      { layer: device },
    )
  const memory = new Meter()
  const opened: Tier[] = []
  const byName: Partial<Record<TierName, Tier>> = {}
  try {
    for (const name of tierNames) {
      const layers = plan[name]
      if (layers === undefined) continue
      const meter = name === 'hypervisor' || name === 'backing' ? new Meter() : memory
      const store = compose(layers, {
        allocator,
        accounts: meter,
        check,
        requirement: {
          by: `device ${device}`,
          persistent: true,
          pageSize: pageBytes,
          ...(name === last ? { reservedBytes: sizeBytes } : {}),
        },
      })
      const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: pageBytes })
      if (typeof pool === 'number') {
        // As below: what goes wrong with this surfaces by itself.
        void store.close()
        throw new TmemError(
          'TMEM_NO_MEMORY',
          `device ${device}: ${store.name} gives no pool for 4 KiB pages: ${poolRefusalName(pool)}`,
          { layer: store.name },
        )
      }
      const tier: Tier = { name, store, pool, meter }
      opened.push(tier)
      byName[name] = tier
    }
  } catch (error) {
    // A rejection of these closes is not handled on purpose: it surfaces beside the error thrown here.
    for (const { store } of opened) void store.close()
    throw error
  }
  return { all: opened, byName, memory, roomBytes: planStack(plan[last]!).reservedBytes }
}

/** Bytes of memory that the layers of a tree say they use. */
export function usedBytes({ counters, children }: StatsNode): number {
  const own = counters['used_bytes'] ?? counters['bytes'] ?? 0
  return children.reduce((sum, child) => sum + usedBytes(child), own)
}

/**
 * The stacks of a device out of one stack that goes all the way down: its last layer, where it can stand alone and the rest without
 * it, becomes the regular way (`backing` when it may have to wait, `uncompressed` when it is memory), so that the device can
 * write back to it and tells in its statistics what rests where.
 */
export function tiersOf(layers: readonly Layer[]): DevicePlan {
  const last = layers.slice(-1)
  const rest = layers.slice(0, -1)
  const end = planOf(last)
  if (end === undefined || end.reservedBytes === 0 || (rest.length > 0 && planOf(rest)?.persistent !== true))
    return { compressed: layers }
  const regular = end.deferred ? { backing: last } : { uncompressed: last }
  return rest.length === 0 ? regular : { compressed: rest, ...regular }
}

/** What a stack can do, or `undefined` when its layers cannot stand together. */
function planOf(layers: readonly Layer[]): Capabilities | undefined {
  try {
    return planStack(layers)
  } catch (error) {
    if (error instanceof TmemError && error.code === 'TMEM_BAD_STACK') return undefined
    throw error
  }
}
