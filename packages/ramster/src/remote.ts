/**
 * Remote memory: the interface to a lending machine. It keeps blocks under numbers that one life of a borrower never
 * uses twice, so that a delayed block can never be taken for another.
 *
 * Invariants that every implementation keeps:
 *  - A block is returned as it was put, or not at all; the borrower checks it anyway.
 *  - A block for which `put` answered `true` stays until it is removed, until its lease ends, or until the machine
 *    loses it. After a loss `opened` is called before any other answer, or as soon as the loss is known.
 *  - Two borrowers, and two lives of one borrower, never see each other's blocks.
 *  - Every promise settles within a bounded time, whatever the network does.
 */

/** The borrower, and its callbacks. */
export interface Borrower {
  /** Whether blocks of persistent pages are stored: a machine that evicts on its own is then refused. */
  readonly persistent: boolean
  /** Called when the machine answers for the first time or again after an absence, and when it has lost blocks. */
  opened(kept: Kept): void
  /** Called when the machine wants memory back: see `excessBytes`. */
  pressed(): void
}

/**
 * The part of the earlier blocks that the machine still has: all, as far as it can tell; some (`renew` tells for each
 * block); none.
 */
export type Kept = 'all' | 'some' | 'nothing'

/** Memory of one other machine, borrowed. */
export interface RemoteMemory {
  /** Which machine, for messages and statistics. */
  readonly name: string
  /** Whether it would take a transfer now. */
  readonly isOpen: boolean
  /** The machine's own identity: two memories with the same identity fail together. `undefined` if not known yet. */
  readonly identity: string | undefined
  /** Why it is not open, or what failed last. */
  readonly failure: Error | undefined
  /** Bytes that it had left when it was asked last; `Infinity`: it has no limit that it tells of. */
  readonly freeBytes: number
  /** Bytes that it has lent beyond its limit, which was lowered, and wants back: 0 most of the time. */
  readonly excessBytes: number
  /** Milliseconds after which a block is gone unless it is renewed; `undefined`: it stays. */
  readonly leaseMs: number | undefined
  /** Resolves when it is open; rejects with `TmemError` (`TMEM_IO`) when it refuses, or does not answer in time. */
  ready(): Promise<void>
  /**
   * Keeps blocks under keys: for each, whether it was taken (`false`: there is no room). Rejects when that is not
   * known: any of them may be there then. The bytes are the caller's until it settles.
   */
  put(keys: readonly number[], blocks: readonly Uint8Array[]): Promise<readonly boolean[]>
  /** The block of a key; `undefined`: it has none. */
  get(key: number): Promise<Uint8Array | undefined>
  /** Gives blocks up. A key that has none is no error. */
  remove(keys: readonly number[]): Promise<void>
  /** Prolongs the leases of blocks: for each, whether it is there. */
  renew(keys: readonly number[]): Promise<readonly boolean[]>
  /** Releases the machine, with no operation pending. Idempotent. */
  close(): Promise<void>
}

/** A machine to borrow from: data, and how to reach it. */
export interface RemotePlan {
  /** Which machine, for messages and statistics. */
  readonly name: string
  /** Begins to reach it. `opened` is not called before this has returned. */
  borrow(borrower: Borrower): RemoteMemory
}
