/**
 * What the two threads of a `SwappableBuffer` share: the one that owns the buffer and the pager that answers its
 * faults.
 *
 * The owner gives one command at a time: it writes the command and its argument into shared words, rings the bell, and
 * sleeps until the pager has written the answer. It may sleep, because the pager needs nothing of it.
 */
import type { MessagePort } from 'node:worker_threads'
import type { TmemErrorCode } from '@tmem/core'

/** Shared words (Int32Array). */
export const COMMAND = 0
export const DONE = 1
export const sharedWords = 4
/** Argument and result: a double after the words. */
export const argumentAt = 16
export const sharedBytes = 24

/** Commands. */
export const Command = {
  none: 0,
  /** Gives back as many bytes as the argument says; answers how many it were. */
  trim: 1,
  /** Posts the statistics to the port. */
  stats: 2,
  /** The process ends: the thread may end, too, without taking the process with it; faults are answered until then. */
  disarm: 3,
  /** Ends the watch, closes the stack, ends the thread. Answered at once, when nobody waits for a fault any more. */
  close: 4,
} as const
export type Command = (typeof Command)[keyof typeof Command]

/** What the pager's thread is started with. */
export interface PagerTask {
  readonly fd: number
  readonly bell: number
  readonly address: number
  readonly pages: number
  /** Resident pages. */
  readonly limit: number
  readonly shared: SharedArrayBuffer
  /** Statistics go here, because the owner takes them without waiting for an event. */
  readonly port: MessagePort
  readonly stack: unknown
  readonly modules: readonly string[]
  readonly cpu: number | undefined
}

/** What the pager posts to its parent: first `open` or `failed`, last `closed`. */
export type PagerMessage =
  | { readonly kind: 'open' }
  | { readonly kind: 'failed'; readonly code: TmemErrorCode | undefined; readonly message: string }
  | { readonly kind: 'closed'; readonly error: string | undefined }

/** Exit status of a process that ends because its pager did (EX_SOFTWARE of sysexits.h). */
export const lostPagerStatus = 70

/** How every message of a process that ends because of its pager begins. */
export const fatalPrefix = 'tmem userfault: '
export const fatalSuffix = '; pages of a SwappableBuffer cannot be had any more, so this process ends now'
