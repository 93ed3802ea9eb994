/**
 * The governor: makes the byte budget of a zcache follow its host, so that a cache that sizes itself never starves the
 * machine (or the container) it runs on.
 *
 * It looks at two things: how many bytes could still be had (free and reclaimable memory of the host, and what is left
 * under every memory limit of the control groups above this process), and how long tasks have been waiting for memory
 * (pressure-stall information). From them it derives a budget, between a hard floor and a hard ceiling:
 *
 *   room = bytes the pool uses now + bytes that could still be had - a reserve that stays free for everybody else
 *
 * What the pool gives back shows up as available, so room does not depend on the pool's own size: shrinking does not
 * make the governor want to grow again. A budget above room comes down at once, far before the out-of-memory killer
 * acts. A budget below room grows slowly (a bounded step per second), only while nobody waits for memory, only when
 * there is clearly more room than budget, and not for a while after it had to come down.
 *
 * It reads nothing and knows no clock: the caller passes both in, at whatever rhythm it calls `tick` of the store.
 *
 * Sources: the list's objection to self-sizing pools (2009 to 2011: a persistent pool that only grows is an
 * out-of-memory bomb); the kernel's documents on pressure-stall information and on control groups, versions 1 and 2.
 */
import { type ByteAmount, type ByteLimit, bytesOf, checkOptions } from '@tmem/core'

/** What the host has to say. */
export interface HostMemory {
  /** Bytes that could still be had: free, or reclaimable without harm. Of the host, or under the tightest limit. */
  readonly availableBytes: number
  /** Share of the last ten seconds in which some task waited for memory, in percent; 0 where that is not known. */
  readonly pressurePercent: number
}

/** Settings of a governor. Each has a default that fits a host of its own. */
export interface GovernorOptions {
  /** The budget that it steers. Its `maximumBytes` is the ceiling. */
  readonly limit: ByteLimit
  /** It never goes below this: 0 to the ceiling (default: a 16th of the ceiling). */
  readonly floorBytes?: ByteAmount
  /** Memory that stays free for everybody else, in bytes (default: a quarter of the ceiling). */
  readonly reserveBytes?: ByteAmount
  /**
   * Above this much waiting the budget shrinks by an eighth per second, whatever seems available: percent (default 10).
   */
  readonly highPressurePercent?: number
  /** Growing needs less waiting than this: percent (default 1). */
  readonly lowPressurePercent?: number
  /** How fast it grows, in bytes per second (default: a 32nd of the ceiling). */
  readonly growBytesPerSecond?: ByteAmount
  /** It does not grow for so long after it had to take memory from the pool: milliseconds (default 10,000). */
  readonly holdMs?: number
}

/** What one step decided. */
export const Decision = {
  /** Nothing to change. */
  Hold: 0,
  /** The budget was raised. */
  Grow: 1,
  /** The budget was lowered, to something that the pool does not use yet. */
  Lower: 2,
  /** The budget was lowered below what the pool uses: `tick` will give memory back. */
  Shrink: 3,
} as const
export type Decision = (typeof Decision)[keyof typeof Decision]

/** Steers a byte budget; see the file's head. */
export class Governor {
  /** Steps that lowered the budget below what was in use, and that raised it. */
  shrinks = 0
  grows = 0
  readonly #limit: ByteLimit
  readonly #floor: number
  readonly #reserve: number
  readonly #high: number
  readonly #low: number
  readonly #growPerSecond: number
  readonly #holdMs: number
  /** Growing is a matter of more than this. */
  readonly #band: number
  #lastMs: number | undefined
  #holdUntilMs = Number.NEGATIVE_INFINITY

  /** Throws `RangeError` for settings that make no sense. The budget starts at the floor. */
  constructor(options: GovernorOptions) {
    checkOptions('Governor', options, {
      limit: 'object',
      floorBytes: 'bytes?',
      reserveBytes: 'bytes?',
      highPressurePercent: 'number?',
      lowPressurePercent: 'number?',
      growBytesPerSecond: 'bytes?',
      holdMs: 'number?',
    })
    const { limit } = options
    const bytes = (name: 'floorBytes' | 'reserveBytes' | 'growBytesPerSecond', usual: number): number =>
      bytesOf('Governor', name, options[name] ?? usual)
    const ceiling = limit.maximumBytes
    this.#limit = limit
    this.#floor = checked('floorBytes', bytes('floorBytes', Math.floor(ceiling / 16)), ceiling)
    this.#reserve = checked('reserveBytes', bytes('reserveBytes', Math.floor(ceiling / 4)), Number.MAX_SAFE_INTEGER)
    this.#high = checked('highPressurePercent', options.highPressurePercent ?? 10, 100)
    this.#low = checked('lowPressurePercent', options.lowPressurePercent ?? 1, this.#high)
    this.#growPerSecond = checked('growBytesPerSecond', bytes('growBytesPerSecond', Math.ceil(ceiling / 32)), ceiling)
    this.#holdMs = checked('holdMs', options.holdMs ?? 10_000, Number.MAX_SAFE_INTEGER)
    this.#band = Math.floor(ceiling / 32)
    limit.bytes = this.#floor
  }

  /**
   * Sets the budget. `nowMs` is any clock that does not go back, `usedBytes` what the pool uses now (`used_bytes` of
   * its statistics).
   */
  step(nowMs: number, usedBytes: number, host: HostMemory): Decision {
    const seconds = this.#lastMs === undefined ? 0 : Math.max(0, nowMs - this.#lastMs) / 1000
    this.#lastMs = nowMs
    const limit = this.#limit
    let room = usedBytes + host.availableBytes - this.#reserve
    if (host.pressurePercent >= this.#high) room = Math.min(room, usedBytes * 0.875 ** seconds)
    const target = Math.max(this.#floor, Math.min(limit.maximumBytes, Math.floor(room)))
    if (target < limit.bytes) {
      const shrinks = target < usedBytes
      limit.bytes = target
      if (!shrinks) return Decision.Lower
      this.#holdUntilMs = nowMs + this.#holdMs
      this.shrinks++
      return Decision.Shrink
    }
    if (host.pressurePercent >= this.#low) {
      // Somebody waits: that is no time to grow, nor right after it.
      this.#holdUntilMs = Math.max(this.#holdUntilMs, nowMs + this.#holdMs)
      return Decision.Hold
    }
    const clear = target - limit.bytes > this.#band || (target === limit.maximumBytes && target > limit.bytes)
    if (nowMs < this.#holdUntilMs || !clear) return Decision.Hold
    const grown = Math.min(target, Math.floor(limit.bytes + this.#growPerSecond * seconds))
    if (grown === limit.bytes) return Decision.Hold
    limit.bytes = grown
    this.grows++
    return Decision.Grow
  }
}

function checked(name: string, value: number, maximum: number): number {
  if (!(value >= 0 && value <= maximum)) throw new RangeError(`${name} must be from 0 to ${maximum}, got ${value}`)
  return value
}

/** Reads a small text file; `undefined` when there is none. How the governor's inputs are read, and faked in tests. */
export type ReadText = (path: string) => string | undefined

/** A limit on memory that holds for this process. */
export interface MemoryLimit {
  /** Path of the control group that has it, in its hierarchy; `/` is the topmost that can be seen from here. */
  readonly group: string
  readonly limitBytes: number
  /** What could still be had under it, in bytes; file pages that nobody uses can be had back. */
  readonly leftBytes: number
}

/**
 * The limits on memory of all control groups that this process is in (version 2, version 1, or both; each limit on the
 * way up holds). None where there are no control groups.
 */
export function* memoryLimits(read: ReadText): Iterable<MemoryLimit> {
  for (const line of (read('/proc/self/cgroup') ?? '').split('\n')) {
    const [, controllers, path] = /^\d+:([^:]*):(.*)$/.exec(line) ?? []
    if (controllers === undefined || path === undefined) continue
    const isFirst = controllers.split(',').includes('memory')
    if (!isFirst && controllers !== '') continue
    const names = isFirst
      ? ['/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file']
      : ['', 'memory.max', 'memory.current', 'inactive_file']
    const [base, limit, usage, inactive] = names as [string, string, string, string]
    for (const group of upwards(path)) {
      const folder = `/sys/fs/cgroup${base}${group}`
      const limitBytes = number(read(`${folder}/${limit}`))
      const used = number(read(`${folder}/${usage}`))
      // What version 1 shows where there is no limit.
      if (limitBytes === undefined || limitBytes >= unlimited || used === undefined) continue
      const reclaimable = Math.min(used, field(read(`${folder}/memory.stat`), inactive) ?? 0)
      yield {
        group: group === '' ? '/' : group,
        limitBytes,
        leftBytes: Math.max(0, limitBytes - used + reclaimable),
      }
    }
  }
}

/**
 * Reads what Linux says: `/proc/meminfo`, the limits of the control groups of this process, and the pressure of its
 * group of version 2 where it has one, else of the host. Returns `undefined` where there is no `/proc/meminfo`.
 */
export function readHostMemory(read: ReadText): HostMemory | undefined {
  const meminfo = read('/proc/meminfo')
  const host = meminfo === undefined ? undefined : field(meminfo, 'MemAvailable:')
  if (host === undefined) return undefined
  let availableBytes = host * 1024
  for (const { leftBytes } of memoryLimits(read)) availableBytes = Math.min(availableBytes, leftBytes)
  const own = /^0::(.*)$/m.exec(read('/proc/self/cgroup') ?? '')?.[1]
  const pressure =
    (own === undefined ? undefined : read(`/sys/fs/cgroup${own}/memory.pressure`)) ?? read('/proc/pressure/memory')
  const some = /^some avg10=([\d.]+)/m.exec(pressure ?? '')
  return { availableBytes, pressurePercent: some === null ? 0 : Number(some[1]) }
}

/** Version 1 has no word for none: it shows the largest multiple of its page size in 63 bits. */
const unlimited = 2 ** 62

/** `/a/b` gives `/a/b`, `/a` and the root. In a container the path may not be visible: then only the root is. */
function* upwards(path: string): Iterable<string> {
  for (let group = path === '/' ? '' : path; group !== ''; group = group.slice(0, group.lastIndexOf('/'))) yield group
  yield ''
}

/** The number that a file holds; `undefined` for `max`, and for no file. */
function number(text: string | undefined): number | undefined {
  const digits = /^\d+/.exec(text ?? '')
  return digits === null ? undefined : Number(digits[0])
}

/** The number behind a name at the start of a line. */
function field(text: string | undefined, name: string): number | undefined {
  for (const line of (text ?? '').split('\n'))
    if (line.startsWith(`${name} `)) return number(line.slice(name.length).trim())
  return undefined
}
