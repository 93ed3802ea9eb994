/**
 * Locks in shared memory that do not stay taken when their thread ends.
 *
 * The word of a lock is the mark of its owner, so that a waiting thread can check whether the owner still runs, and
 * takes the lock over if not. A second word is set while the guarded data is being changed. A thread that enters and
 * finds it set knows that the change was never finished and that the data cannot be trusted.
 *
 * A mark identifies a thread to the operating system: on Linux by its number and start time (`/proc`), elsewhere by a
 * file that it holds open and that the runtime closes when the thread ends.
 *
 * Invariants: only the owner, or a thread that found the owner gone, changes the word of a taken lock, except for the
 * bit that marks waiters. No code of the user runs while a lock is held. So a thread that finds its own mark left the
 * lock by an exception (out of stack or memory), and takes it over as from a thread that ended.
 */
import { TmemError } from '@tmem/core'
import { builtin } from '@tmem/core/runtime'

/** Words of a lock: a cache line, so that no two share one. */
export const lockWords = 16
/** Words: who has it; whether what it guards is being changed; how often it was taken over. */
const holder = 0
const changing = 1
const takenOver = 2

const free = 0
/** Somebody may be asleep, waiting for it. */
const contended = 2 ** 30
const markMask = contended - 1

/** Tries before a thread goes to sleep: longer than a page takes, since waking up costs more. */
const spins = 1000
/** Milliseconds after which a waiting thread asks whether the other one is still there. */
const patienceMs = 10
/** Calls that must be possible to take a lock: more than it needs to be given back, whatever happens meanwhile. */
const depth = 6

/** How threads are known: the same in all that share. */
export type ThreadKind = 'task' | 'descriptor'

/** How threads are known on this system. Throws `TmemError` (`TMEM_UNSUPPORTED`) where they cannot be told apart. */
export function threadKind(): ThreadKind {
  files()
  return process.platform === 'linux' ? 'task' : 'descriptor'
}

function files(): typeof import('node:fs') {
  const fs = builtin<typeof import('node:fs')>('node:fs')
  if (fs !== undefined) return fs
  throw new TmemError(
    'TMEM_UNSUPPORTED',
    'cache.share: in browsers a thread that ended cannot be told from one at work',
    {
      layer: 'cache',
    },
  )
}

/** What this thread is known by, and whether another one is still there. */
export interface ThreadMark {
  /** 1 to 2^30 - 1. */
  readonly mark: number
  /** Whether the thread of a mark is still there; also when that cannot be found out now. */
  isAlive(mark: number): boolean
  /** This thread has left. */
  close(): void
}

/** Makes the mark of this thread. Throws the system's error where that cannot be had. */
export function threadMark(kind: ThreadKind): ThreadMark {
  return kind === 'task' ? taskMark() : descriptorMark()
}

/** Bits of a thread's number on Linux, whose largest is 4,194,304; above are some of the time of its start. */
const taskBits = 22
const startMask = 0xff

/** Source: proc(5), `/proc/thread-self`, `/proc/[pid]/task/[tid]/stat`, field 22. */
function taskMark(): ThreadMark {
  const { readFileSync, readlinkSync } = files()
  const task = Number(readlinkSync('/proc/thread-self').split('/')[2])
  const markOf = (stat: string): number => {
    // The name in parentheses may have any signs; the state is the first field behind it.
    const start = Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19])
    return (task & (2 ** taskBits - 1)) | ((start & startMask) << taskBits)
  }
  const mark = markOf(readFileSync(`/proc/self/task/${task}/stat`, 'latin1'))
  return {
    mark,
    isAlive(other) {
      const number = other & (2 ** taskBits - 1)
      try {
        const stat = readFileSync(`/proc/self/task/${number}/stat`, 'latin1')
        const start = Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19])
        return (start & startMask) === other >>> taskBits
      } catch (error) {
        // Anything else, as too many open files, says nothing about the thread: it is asked again.
        return !isOneOf(error, 'ENOENT', 'ESRCH')
      }
    },
    close() {},
  }
}

/** The mark is the number of a descriptor of the program's own file, plus one. */
function descriptorMark(): ThreadMark {
  const { closeSync, fstatSync, openSync } = files()
  const descriptor = openSync(process.execPath, 'r')
  const { dev, ino } = fstatSync(descriptor)
  return {
    mark: descriptor + 1,
    isAlive(other) {
      try {
        const found = fstatSync(other - 1)
        return found.dev === dev && found.ino === ino
      } catch (error) {
        return !isOneOf(error, 'EBADF')
      }
    },
    close() {
      closeSync(descriptor)
    },
  }
}

const isOneOf = (error: unknown, ...codes: readonly string[]): boolean =>
  codes.includes((error as NodeJS.ErrnoException).code ?? '')

/** One thread's view of the locks of all shards. */
export class Locks {
  readonly #words: Int32Array
  readonly #thread: ThreadMark

  constructor(words: Int32Array, thread: ThreadMark) {
    this.#words = words
    this.#thread = thread
    // The system gives the mark of a thread that ended to the next one: what has it now is not this thread's.
    for (let at = 0; at < words.length; at += lockWords)
      if ((Atomics.load(words, at + holder) & markMask) === thread.mark) this.#takeOver(at, free)
  }

  /** Takes a lock. True: a change of what it guards was never finished. */
  enter(lock: number): boolean {
    const at = lock * lockWords
    assertStack(depth)
    this.#take(at)
    return Atomics.load(this.#words, at + changing) !== 0
  }

  /** What the lock guards is being changed from now on. */
  begin(lock: number): void {
    Atomics.store(this.#words, lock * lockWords + changing, 1)
  }

  /** The change is done: what the lock guards is whole. */
  end(lock: number): void {
    Atomics.store(this.#words, lock * lockWords + changing, 0)
  }

  /** Gives a lock back. */
  leave(lock: number): void {
    const at = lock * lockWords
    if ((Atomics.exchange(this.#words, at + holder, free) & contended) !== 0) Atomics.notify(this.#words, at + holder)
  }

  /** How often a lock was taken over from a thread that ended. */
  takenOver(lock: number): number {
    return Atomics.load(this.#words, lock * lockWords + takenOver)
  }

  /** The thread leaves. */
  close(): void {
    this.#thread.close()
  }

  #take(at: number): void {
    const words = this.#words
    const { mark } = this.#thread
    for (let n = 0; n < spins; n++) if (Atomics.compareExchange(words, at + holder, free, mark) === free) return
    for (;;) {
      const seen = Atomics.load(words, at + holder)
      // Others may be asleep: whoever was is not known any more.
      if (seen === free && Atomics.compareExchange(words, at + holder, free, mark | contended) === free) return
      const has = seen & markMask
      if (has === mark) {
        if (this.#takeOver(at, mark | contended)) return
        continue
      }
      if (has === free || !this.#noteWaiting(at, seen)) continue
      if (Atomics.wait(words, at + holder, has | contended, patienceMs) !== 'timed-out') continue
      if (this.#thread.isAlive(has)) continue
      if (Atomics.compareExchange(words, at + holder, has | contended, mark | contended) !== (has | contended)) continue
      Atomics.add(words, at + takenOver, 1)
      return
    }
  }

  /** Notes that somebody waits for a lock that another thread has. False: it has it no more. */
  #noteWaiting(at: number, seen: number): boolean {
    if ((seen & contended) !== 0) return true
    return Atomics.compareExchange(this.#words, at + holder, seen, seen | contended) === seen
  }

  /** Takes over a lock with this thread's mark, that it does not hold. */
  #takeOver(at: number, next: number): boolean {
    const words = this.#words
    const seen = Atomics.load(words, at + holder)
    if (Atomics.compareExchange(words, at + holder, seen, next) !== seen) return false
    Atomics.add(words, at + takenOver, 1)
    if (next === free) Atomics.notify(words, at + holder)
    return true
  }
}

/** Fails with what the runtime throws when there is not stack for so many calls. */
function assertStack(calls: number): number {
  return calls === 0 ? 0 : assertStack(calls - 1) + 1
}
