/**
 * Whose a file is: the mark in its first block, and the claim of the one owner that uses it now.
 *
 * **The mark** is text that a person can read (`head -n 8 FILE`): what the file holds, its length, whether it is to be
 * kept, which process and thread used it last and how they claimed it, and a checksum. It stands in the first 1024
 * bytes, which a swap header leaves free, and once more from byte 3072, behind what a swap header uses. The rest of
 * both places is zeros. Somebody else's header in a file that was ours (a file system, a partition table) spoils at
 * least one of them, and not by a few bytes: then the file is not ours any more.
 *
 * **The claim** goes to the file behind the name (device and inode), not to the name, and ends with its owner, however
 * that ends. Two locks make it, both the kernel's, both had at once or not at all:
 *  - `flock` on the open file (through koffi). It is that of one descriptor: another one of the same process has no
 *    part in it. The runtime closes a thread's descriptors when the thread ends, *after* the transfers under way: so
 *    nothing is written behind the next owner's back.
 *  - A socket's name in the abstract namespace (Linux), which needs no koffi: one listener at a time has it. Nobody
 *    talks to it. It goes when its thread ends, *before* the transfers under way do (measured: 6 ms after the end,
 *    writes went on for 5.9 s). So where there is no `flock`, the owner to be also waits until no descriptor of this
 *    process, or of the marked one, leads to the file.
 * An owner with koffi has both, and so excludes one without. Each network namespace has its own socket names. Where two
 * owners have no kind of lock in common, the mark decides: it counts as long as its process runs. Where there are no
 * locks at all (neither Linux nor koffi) that alone is left: two who open a file in the same instant are not told
 * apart, and a thread that ended keeps its file until its process ends.
 *
 * Source: flock(2), unix(7), proc(5); mkswap(8) and the kernel's `union swap_header` for what a swap header uses.
 */
import { constants, readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs'
import { createServer, type Server } from 'node:net'
import { types } from 'node:util'
import { threadId } from 'node:worker_threads'
import { crc32 } from 'node:zlib'
import { type MarkedProcess, markedProcess, processMark } from '@tmem/core'

/**
 * Whether `error` is the system's, with that code. It need not be of this realm: in a `vm` context, a test runner's, it
 * is not.
 */
export const hasCode = (error: unknown, code: string): boolean =>
  types.isNativeError(error) && 'code' in error && error.code === code

/** Bytes of a block: what direct transfers are multiples of, and the mark's place. */
export const blockBytes = 4096

/** Where in the first block the mark stands; the rest of the block is the content's. */
export const markPlaces = [
  { from: 0, to: 1024 },
  { from: 3072, to: 4086 },
] as const

/** Whether a range of the file touches the mark. */
export const touchesMark = (position: number, length: number): boolean =>
  markPlaces.some(({ from, to }) => position < to && position + length > from)

/** What a mark says. */
export interface Mark {
  /** What the file holds: 1 to 64 printable characters. */
  readonly content: string
  /** Its length. */
  readonly bytes: number
  /** False: when its process has ended, nobody wants the file. */
  readonly keep: boolean
  /** The mark of the process that uses it; `undefined`: it was closed. */
  readonly process: string | undefined
  /** The thread of that process: 0 is the main one. */
  readonly thread: number
  /** The locks that the claim has: `flock`, `net:[NUMBER]`. */
  readonly locks: readonly string[]
}

const form =
  /^tmem file 1\ncontent ([ -~]{1,64})\nbytes (\d{1,16})\nkeep (yes|no)\nprocess ([ -~]{1,80})\nthread (\d{1,10})\nlocks ([ -~]{1,200})\nchecksum ([0-9a-f]{8})\n$/

/** Writes a mark into both of its places in a block. */
export function setMark(block: Uint8Array, mark: Mark): void {
  const { content, bytes, keep, process: user = '-', thread, locks } = mark
  const lines =
    `tmem file 1\ncontent ${content}\nbytes ${bytes}\nkeep ${keep ? 'yes' : 'no'}\n` +
    `process ${user}\nthread ${thread}\nlocks ${locks.join(' ') || '-'}\n`
  const text = Buffer.from(`${lines}checksum ${checksum(lines)}\n`, 'latin1')
  for (const { from, to } of markPlaces) {
    block.fill(0, from, to)
    block.set(text, from)
  }
}

/**
 * The mark of a block. `whole`: both places are as they were written. `undefined`: there is none that could be
 * believed.
 */
export function findMark(block: Uint8Array): { readonly mark: Mark; readonly whole: boolean } | undefined {
  const [first, second] = markPlaces.map(({ from, to }) => block.subarray(from, to)) as [Uint8Array, Uint8Array]
  const [one, other] = [parse(first), parse(second)]
  // After a crash in the middle of a write, each place may be of another time.
  if (one !== undefined && other !== undefined) return { mark: one, whole: true }
  if (one !== undefined && (isDamaged(second, first) || isZeros(second))) return { mark: one, whole: false }
  // Zeros in the first place are what programs write that make something else of the file.
  if (other !== undefined && isDamaged(first, second)) return { mark: other, whole: false }
  return undefined
}

const checksum = (text: string): string => crc32(text).toString(16).padStart(8, '0')

/** Whether all of some bytes are zero. */
export const isZeros = (bytes: Uint8Array): boolean => bytes.every((byte) => byte === 0)

function textLength(place: Uint8Array): number {
  const end = place.indexOf(0)
  return end < 0 ? place.length : end
}

function parse(place: Uint8Array): Mark | undefined {
  const length = textLength(place)
  const text = Buffer.from(place.subarray(0, length)).toString('latin1')
  const [, content, bytes, keep, user, thread, locks, sum] = form.exec(text) ?? []
  if (content === undefined || sum !== checksum(text.slice(0, text.lastIndexOf('checksum')))) return undefined
  if (!isZeros(place.subarray(length))) return undefined
  return {
    content,
    bytes: Number(bytes),
    keep: keep === 'yes',
    process: user === '-' ? undefined : user,
    thread: Number(thread),
    locks: locks === '-' ? [] : locks!.split(' '),
  }
}

/** Whether a place has the text of the other one, with at most half of its bytes altered, and nothing else. */
function isDamaged(place: Uint8Array, whole: Uint8Array): boolean {
  const length = textLength(whole)
  let same = 0
  for (let n = 0; n < length; n++) if (place[n] === whole[n]) same++
  return same * 2 >= length && isZeros(place.subarray(length))
}

/** A file that is one owner's. */
export interface FileClaim {
  /** The kinds of lock that it has. Two claims that have a kind in common exclude each other. */
  readonly locks: readonly string[]
  /** Ends it, as far as closing the descriptor does not. */
  release(): void
}

/** The mark of a claim of this thread. */
export const markOf = (content: string, bytes: number, keep: boolean, { locks }: FileClaim): Mark => ({
  content,
  bytes,
  keep,
  process: processMark(),
  thread: threadId,
  locks,
})

/** The process that a mark says uses the file, if it can: it still runs. */
export function userOf(mark: Mark | undefined): MarkedProcess | undefined {
  const user = mark?.process === undefined ? undefined : markedProcess(mark.process)
  return user?.running === true ? user : undefined
}

/** Whether the mark of another claim has to be believed, because its owner has no lock that would keep `claim` away. */
export const standsAgainst = (mark: Mark | undefined, claim: FileClaim): boolean =>
  userOf(mark) !== undefined && !mark!.locks.some((kind) => claim.locks.includes(kind))

/** Who uses a file, for a message: as its mark says, or the process that has it locked. */
export function userText(mark: Mark | undefined, lockedBy?: number): string {
  const user = userOf(mark)
  if (user === undefined) {
    if (lockedBy === undefined) return 'somebody uses it already'
    return `${lockedBy === process.pid ? 'this process' : `process ${lockedBy}`} uses it already`
  }
  if (user.pid !== process.pid) return `process ${user.pid} uses it`
  return mark!.thread === threadId ? 'this process uses it already' : `thread ${mark!.thread} of this process uses it`
}

/** How often, a millisecond apart, it is looked whether the descriptors of others have gone. */
const looks = 50

/** How a descriptor is claimed. */
export interface ClaimRequest {
  readonly descriptor: number
  /** Names the file itself. */
  readonly id: string
  /** What was found in it. */
  readonly mark: Mark | undefined
  /** `flock` of the descriptor: false when another one has it, `undefined` where there is none. */
  readonly lock: () => boolean | undefined
  /** Waits in the calling thread. */
  readonly pause: (milliseconds: number) => void
}

/** Claims the file behind a descriptor; `undefined`: somebody else has it. */
export function claimDescriptor({ descriptor, id, mark, lock, pause }: ClaimRequest): FileClaim | undefined {
  const name = process.platform === 'linux' ? lockName(`tmem file ${id}`) : undefined
  if (name === 'held') return undefined
  const locks: string[] = []
  let claimed = false
  try {
    if (name !== undefined) locks.push(readlinkSync('/proc/self/ns/net'))
    const locked = lock()
    if (locked === false) return undefined
    if (locked === true) locks.push('flock')
    // The file of an owner that ended may still be written: see above.
    if (locked === undefined && name !== undefined && isOpenElsewhere(descriptor, userOf(mark)?.pid, pause))
      return undefined
    claimed = true
    return { locks, release: () => name?.close() }
  } finally {
    if (!claimed) name?.close()
  }
}

/** Takes a name of which there is one; `undefined` where there are no such names. */
function lockName(name: string): Server | 'held' | undefined {
  const lock = listen(name)
  if (lock.listening) return lock
  // The reason comes later, as an event; so another name, which nobody has, tells whether it is the name.
  const probe = listen(`${name} ${process.pid} ${threadId}`)
  if (!probe.listening) return undefined
  probe.close()
  return 'held'
}

function listen(name: string): Server {
  const server = createServer((stranger) => stranger.destroy())
  // `listening` has told it already.
  server.on('error', () => undefined)
  // Exclusive: not shared among the processes of a cluster.
  return server.listen({ path: `\0${name}`, exclusive: true }).unref()
}

/** Whether another descriptor of this process, or of that one, leads to the file for writing, and goes on doing so. */
function isOpenElsewhere(
  descriptor: number,
  other: number | undefined,
  pause: (milliseconds: number) => void,
): boolean {
  const { dev, ino } = statSync(`/proc/self/fd/${descriptor}`, { bigint: true })
  const writes = (folder: string, number: string): boolean => {
    const stat = statSync(`${folder}/fd/${number}`, { bigint: true, throwIfNoEntry: false })
    if (stat?.dev !== dev || stat.ino !== ino) return false
    const info = unlessGone(() => readFileSync(`${folder}/fdinfo/${number}`, 'latin1'), '')
    const flags = Number.parseInt(/^flags:\s*([0-7]+)$/m.exec(info)?.[1] ?? '0', 8)
    return (flags & (constants.O_WRONLY | constants.O_RDWR)) !== 0
  }
  const anyWrites = (folder: string, but?: number): boolean => {
    const numbers = unlessGone(() => readdirSync(`${folder}/fd`), [])
    return numbers.some((number) => Number(number) !== but && writes(folder, number))
  }
  // Whoever tries to claim it at the same time has it open for a moment.
  for (let look = 0; look < looks; look++) {
    const there = other !== undefined && other !== process.pid && anyWrites(`/proc/${other}`)
    if (!there && !anyWrites('/proc/self', descriptor)) return false
    pause(1)
  }
  return true
}

/** What is read of a process; `gone` when that, or the process, has gone meanwhile. */
function unlessGone<T>(read: () => T, gone: T): T {
  try {
    return read()
  } catch (error) {
    if (hasCode(error, 'ENOENT') || hasCode(error, 'ESRCH')) return gone
    throw error
  }
}
