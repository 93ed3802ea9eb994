/** What the page of the console is told: one document, whole each time, so that one that is missed does not matter. */
import type { StatsNode } from '@tmem/core'

/** All that the page shows. */
export interface ConsoleState {
  /** Milliseconds of the server's clock, never going back: what lies between two documents gives rates. */
  readonly atMs: number
  readonly server: ConsoleServer
  readonly devices: readonly ConsoleDevice[]
  /** What the servers of NBD, files and the log count. */
  readonly servers: readonly StatsNode[]
  /** The last events, the newest at the end. */
  readonly events: readonly ConsoleEvent[]
}

/** Which server it is. */
export interface ConsoleServer {
  readonly pid: number
  /** Another one for each run of a server: what was counted before has nothing to do with what is counted now. */
  readonly run: string
  /** The text of its stacks. */
  readonly stack: string
  readonly nbd: readonly string[]
  /** Directory of its mount, or null. */
  readonly fuse: string | null
  /** Whether knobs can be turned here, by who has the token. */
  readonly writable: boolean
}

/** A device that is served. */
export interface ConsoleDevice {
  readonly name: string
  readonly stats: StatsNode
  /** Values of its knobs by name; those that act have an empty one. */
  readonly knobs: Readonly<Record<string, string>>
  /** Connections of NBD, and open files. */
  readonly users: { readonly clients: number; readonly opens: number }
  /** The kernel of this host swaps to it; null: it does not, or nobody can tell. */
  readonly swap: ConsoleSwap | null
  /** How long pages were not touched, by where they rest; null: not known. */
  readonly ages: ConsoleAges | null
}

/** What the kernel says of its swap area. Bytes. */
export interface ConsoleSwap {
  readonly sizeBytes: number
  readonly usedBytes: number
  readonly priority: number
}

/** Pages by how long nobody has touched them. */
export interface ConsoleAges {
  /** Ages in seconds at which a column ends; the last column has no end. */
  readonly bounds: readonly number[]
  /** Pages that were looked at, of all that are there: where that is less, counts are of a sample. */
  readonly seen: number
  readonly places: readonly { readonly name: string; readonly pages: readonly number[] }[]
}

/** Something that happened. */
export interface ConsoleEvent {
  readonly number: number
  /** Milliseconds since 1970. */
  readonly time: number
  readonly level: string
  readonly event: string
  readonly message: string
}

/** What is known of one slot: lines of a name and a text. */
export type ExplainedSlot = Readonly<Record<string, unknown>>
