/**
 * Remote memory: what ramster needs of another machine. It keeps blocks under numbers that are never used twice in the
 * life of one borrower, so a block that is late on its way can never be taken for another one.
 *
 * Invariants that every implementation keeps:
 *  - A block is answered as it was put, or not at all; who asks checks it all the same.
 *  - What `put` has answered with `true` is there until it is removed, until its lease ends, or until the machine loses
 *    it: then `opened` is called before anything else is answered, or as soon as that is known.
 *  - Two borrowers, also two lives of one, never see each other's blocks.
 *  - Every promise settles within a bounded time, whatever the network does.
 */

/** Who borrows, and what it has to be told. */
export interface Borrower {
  /** Blocks are of pages that may not vanish: a machine that drops blocks by itself is refused. */
  readonly persistent: boolean
  /**
   * The machine answers, having been away since it was borrowed or since the last call; or it has found out that some
   * of what was put there is gone.
   */
  opened(kept: Kept): void
  /** It wants memory back: see `excessBytes`. */
  pressed(): void
}

/**
 * What of the blocks that were put before is there: all, as far as one can tell; perhaps not all (whoever wants to know
 * asks for each, with `renew`); nothing.
 */
export type Kept = 'all' | 'some' | 'nothing'

/** Memory of one other machine, borrowed. */
export interface RemoteMemory {
  /** Which machine, for messages and statistics. */
  readonly name: string
  /** Whether it would take a transfer now. */
  readonly isOpen: boolean
  /** Which machine it is, by its own account: two of one identity share their fate. `undefined`: not known yet. */
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
  /** Lets go of the machine. Nothing is under way any more. Idempotent. */
  close(): Promise<void>
}

/** A machine to borrow from: data, and how to reach it. */
export interface RemotePlan {
  /** Which machine, for messages and statistics. */
  readonly name: string
  /** Begins to reach it. `opened` is not called before this has returned. */
  borrow(borrower: Borrower): RemoteMemory
}
