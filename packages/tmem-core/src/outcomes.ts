/**
 * What an operation can answer.
 *
 * Every outcome is a member of a closed union of small integers, so that a `switch` over it can be checked for
 * exhaustiveness and an outcome fits a byte of a batch. Zero always means "got what was asked for".
 * Refusals and misses are ordinary outcomes: the caller always has a regular way (the swap file, the file itself).
 * Exceptions are left for misuse (`TypeError`, `RangeError`) and for the outside world failing or an invariant
 * being broken (`TmemError`).
 *
 * Source of the reasons: the refusals collected from Xen's tmem, zcache and the 2009 API text.
 */

/** Answer to a put. After `Stored` exactly one layer holds the page; after anything else no layer holds any page. */
export const PutOutcome = {
  /** The page was copied; later writes to the caller's page do not affect it. */
  Stored: 0,
  /** The byte budget is used up and nothing may be evicted for this page (-ENOMEM). */
  NoMemory: 1,
  /** The owner's maximum of persistent memory is reached: the limit against denial of service. */
  Quota: 2,
  /** The pool is frozen and the handle is new (-EFROZEN). */
  Frozen: 3,
  /** The pool was destroyed or the store closed (-ENODEV). */
  PoolGone: 4,
  /** The page does not shrink enough to be worth keeping here. */
  Incompressible: 5,
  /** The layer's policy says no (ratio limits, hysteresis, write budget, an injected refusal). */
  Policy: 6,
  /** The runtime or the operating system refused memory that the budget would have allowed. */
  AllocationFailed: 7,
  /** Where the page would rest cannot be reached now: no backend registered, link down, disk failed. */
  Unavailable: 8,
} as const
export type PutOutcome = (typeof PutOutcome)[keyof typeof PutOutcome]

/** Answer to a get. */
export const GetOutcome = {
  /** The caller's page was filled with exactly the bytes of the most recent successful put. */
  Hit: 0,
  /** No layer holds the page; the caller's page is unchanged. An ordinary answer, never an error. */
  Miss: 1,
  /** A layer that must wait (disk, network) holds the page: await `fetch`. The caller's page is unchanged. */
  Deferred: 2,
} as const
export type GetOutcome = (typeof GetOutcome)[keyof typeof GetOutcome]

/** Why a pool could not be made. The order is the order of the checks (Xen's new_pool). */
export const PoolRefusal = {
  /** The specification version in the flags word is not 1. */
  BadVersion: 1,
  /** Shared and persistent together. */
  SharedPersistent: 2,
  /** The page size is no power of two from 4 KiB to 2 MiB, or not one that every layer of this stack can keep. */
  BadPageSize: 3,
  /** The reserved "precompressed" flag is set. */
  Precompressed: 4,
  /** A reserved bit is set. */
  ReservedBits: 5,
  /** No memory for the pool. */
  NoMemory: 6,
  /** All pool slots of the client are in use. */
  NoSlot: 7,
  /** All slots for shared pools are in use. */
  NoSharedSlot: 8,
  /** The client may not share under this uuid. */
  NotAuthorized: 9,
  /** A layer of the stack cannot keep this kind of pool (see its capabilities). */
  Unsupported: 10,
  /** The store is closed. */
  Closed: 11,
} as const
export type PoolRefusal = (typeof PoolRefusal)[keyof typeof PoolRefusal]

/** In a batch: the entry still waits for a layer to decide about it. */
export const Pending = 255

const names = (values: Readonly<Record<string, number>>): readonly string[] => {
  const list: string[] = []
  for (const [name, value] of Object.entries(values)) list[value] = name
  return Object.freeze(list)
}

const putNames = names(PutOutcome)
const getNames = names(GetOutcome)
const poolNames = names(PoolRefusal)

/** Name of a put outcome, e.g. `'Stored'`, or `'unknown(9)'`. */
export const putOutcomeName = (outcome: number): string => putNames[outcome] ?? `unknown(${outcome})`
/** Name of a get outcome, e.g. `'Miss'`, or `'unknown(9)'`. */
export const getOutcomeName = (outcome: number): string => getNames[outcome] ?? `unknown(${outcome})`
/** Name of a pool refusal, e.g. `'NoSlot'`, or `'unknown(99)'`. */
export const poolRefusalName = (refusal: number): string => poolNames[refusal] ?? `unknown(${refusal})`

/** Number of put outcomes: every value below it is one. */
export const putOutcomeCount: number = putNames.length
/** Number of get outcomes: every value below it is one. */
export const getOutcomeCount: number = getNames.length

/** Stable codes of `TmemError`: a contract, unlike the messages. */
export type TmemErrorCode =
  /** A stack cannot be built out of these layers. */
  | 'TMEM_BAD_STACK'
  /** The text of a stack has a mistake; the message says where and what was expected. */
  | 'TMEM_BAD_STACK_TEXT'
  /** Memory that must be reserved at the start is not to be had. */
  | 'TMEM_NO_MEMORY'
  /** A file or device failed; `cause` has the system's own error. */
  | 'TMEM_IO'
  /** A page came back altered (length, checksum): it is never served. */
  | 'TMEM_CORRUPT'
  /** An invariant is broken: the store has stopped and serves nothing any more. */
  | 'TMEM_BROKEN'
  /** The store was closed. */
  | 'TMEM_CLOSED'
  /** Something that this host or runtime lacks. */
  | 'TMEM_UNSUPPORTED'

/** Details of a `TmemError`. */
export interface TmemErrorDetails {
  /** The layer in which it happened, e.g. `frontswap`. */
  readonly layer?: string
  /** The page concerned, printable, e.g. `pool 0 object 12 index 7`. */
  readonly handle?: string
  /** The error underneath. */
  readonly cause?: unknown
}

/**
 * The outside world failed, or an invariant is broken. `code` is stable; the message says what, where, and what to do.
 */
export class TmemError extends Error {
  override readonly name = 'TmemError'
  /** Stable code, safe to compare. */
  readonly code: TmemErrorCode
  /** The layer in which it happened, if one did. */
  readonly layer: string | undefined
  /** The page concerned, if there is one. */
  readonly handle: string | undefined

  constructor(code: TmemErrorCode, message: string, details: TmemErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause })
    this.code = code
    this.layer = details.layer
    this.handle = details.handle
  }
}
