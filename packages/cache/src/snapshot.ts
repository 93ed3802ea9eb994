/**
 * Snapshots of the table of entries in pages of the stack, so that the next run finds the entries in the file.
 *
 * A snapshot has parts of a page each, under an object of its own; two objects take turns, so that the last whole one
 * stays until the next one is whole. Each part names its snapshot and the number of parts, and repeats everything that
 * must survive the loss of another part (seeds, numbers). A lost part costs its entries; lost tags cost all entries
 * with tags; a lost list of pages costs the entries in these pages.
 *
 * An entry names its page by number and stamp. Any change of a page after the snapshot gave it another stamp, or
 * removed it. So an entry of a snapshot is found unchanged, or not at all.
 */
import { GetOutcome, type Pool, PutOutcome, TmemError } from '@tmem/core'
import { none, type PageBook, queues } from './pages.ts'
import { maxWide, pageBytes } from './records.ts'
import { Buffer } from './runtime.ts'
import { type EntryTable, pageOf } from './table.ts'
import type { Tags } from './tags.ts'

/** Objects of the snapshots: behind those of all pages. */
const firstObject = 2 ** 40

/** "tmc1", as a number. */
const magic = 0x31636d74
const headWords = 16
const rowBytes = pageBytes - headWords * 4
/** Parts that are looked for when the first ones are lost, and that are written at once. */
const searched = 64
const atOnce = 256

/** Kinds of rows, and words of each. */
const Kind = { Pages: 1, Entries: 2, Tags: 3 } as const
const wordsOf: Readonly<Record<number, number>> = { [Kind.Pages]: 8, [Kind.Entries]: 2, [Kind.Tags]: 3 }

/** What a snapshot is of. */
export interface SnapshotState {
  readonly table: EntryTable
  readonly book: PageBook
  readonly tags: Tags
}

/** What is in the head of each part. */
interface Head {
  readonly epoch: number
  readonly parts: number
  readonly seed0: number
  readonly seed1: number
  readonly stamp: number
  readonly sequence: number
  readonly floor: number
}

/** A snapshot that was found. */
interface Found {
  readonly head: Head
  readonly parts: readonly (Buffer | undefined)[]
  readonly isWhole: boolean
}

/** Makes the parts of a snapshot, at once: what comes later is not in it. */
export function takeSnapshot(
  { table, book, tags }: SnapshotState,
  epoch: number,
  seed0: number,
  seed1: number,
): Buffer[] {
  const parts: Buffer[] = []
  let kind = 0
  let part: Buffer = Buffer.alloc(0)
  let rows = 0
  const row = (of: number): number => {
    const bytes = wordsOf[of]! * 4
    if (kind !== of || (rows + 1) * bytes > rowBytes) {
      part = Buffer.alloc(pageBytes)
      parts.push(part)
      part.writeUInt32LE(of, 8)
      kind = of
      rows = 0
    }
    part.writeUInt32LE(rows + 1, 12)
    return headWords * 4 + rows++ * bytes
  }
  for (let queue = 0; queue < queues; queue++)
    for (let page = book.oldest(queue); page !== none; page = book.newer(page)) {
      const at = row(Kind.Pages)
      part.writeUInt32LE(page, at)
      part.writeUInt32LE(book.stamps[page]!, at + 4)
      part.writeUInt32LE(book.spans[page]!, at + 8)
      part.writeInt32LE(book.hashes[page]!, at + 12)
      part.writeUInt32LE(queue, at + 16)
      part.writeDoubleLE(book.expiry[page]!, at + 24)
    }
  for (const [tag, until] of tags.deleted) {
    const at = row(Kind.Tags)
    part.writeInt32LE(tag, at)
    part.writeUIntLE(until, at + 4, 6)
  }
  table.forEach((hash, ref) => {
    if (!book.isQueued(pageOf(ref))) return
    const at = row(Kind.Entries)
    part.writeInt32LE(hash, at)
    part.writeInt32LE(ref, at + 4)
  })
  for (const one of parts) {
    one.writeUInt32LE(magic, 0)
    one.writeUInt32LE(epoch, 4)
    one.writeUInt32LE(parts.length, 16)
    one.writeInt32LE(seed0, 20)
    one.writeInt32LE(seed1, 24)
    one.writeUInt32LE(book.nextStamp, 28)
    one.writeUIntLE(tags.sequence, 32, 6)
    one.writeUIntLE(tags.floor, 40, 6)
  }
  return parts
}

/** Writes a snapshot down to where it survives. Rejects with `TmemError` when that is not to be had. */
export async function writeSnapshot(pool: Pool, parts: readonly Buffer[], epoch: number): Promise<void> {
  const object = firstObject + (epoch & 1)
  pool.flushObject(object)
  for (let first = 0; first < parts.length; first += atOnce) {
    const count = Math.min(atOnce, parts.length - first)
    for (let n = first; n < first + count; n++)
      if (pool.put(object, n, parts[n]!) !== PutOutcome.Stored)
        throw new TmemError('TMEM_IO', 'cache: the stack does not take the table of entries', { layer: 'cache' })
    await sinkPages(
      pool,
      object,
      Uint32Array.from({ length: count }, (_, n) => first + n),
      count,
    )
  }
}

/** Moves pages down to a place that waits. Rejects with `TmemError` (`TMEM_IO`) when that place fails. */
export async function sinkPages(pool: Pool, object: number, indexes: Uint32Array, count: number): Promise<void> {
  const sunk = await pool.sink?.(object, indexes, count, true)
  if (sunk?.failure === undefined) return
  throw new TmemError('TMEM_IO', `cache: what is in memory cannot be written down: ${sunk.failure.message}`, {
    layer: 'cache',
    cause: sunk.failure,
  })
}

/**
 * Reads the last snapshot into a state that has nothing yet, and answers its head; `undefined`: there is none. Nothing
 * that it says is believed unchecked: what makes no sense costs the row.
 */
export async function restoreSnapshot(pool: Pool, { table, book, tags }: SnapshotState): Promise<Head | undefined> {
  const found = [await find(pool, 0), await find(pool, 1)].filter((one) => one !== undefined)
  // The newest whole one; else the newest.
  found.sort((a, b) => Number(b.isWhole) - Number(a.isWhole) || b.head.epoch - a.head.epoch)
  const [best] = found
  if (best === undefined) return undefined
  const { head, parts, isWhole } = best
  book.nextStamp = head.stamp
  tags.sequence = head.sequence
  // With a part the tags may be lost that were deleted.
  tags.floor = isWhole ? head.floor : head.sequence
  for (const part of parts) if (part !== undefined && part.readUInt32LE(8) === Kind.Pages) restorePages(part, book)
  for (const part of parts) {
    if (part?.readUInt32LE(8) === Kind.Tags) restoreTags(part, tags)
    else if (part?.readUInt32LE(8) === Kind.Entries) restoreEntries(part, table, book)
  }
  book.endRestore((page) => {
    if (book.spans[page] === 0) pool.flushPage(0, page)
    else pool.flushObject(page + 1)
  })
  return head
}

async function find(pool: Pool, which: number): Promise<Found | undefined> {
  const object = firstObject + which
  const read = async (n: number): Promise<Buffer | undefined> => {
    const part = Buffer.alloc(pageBytes)
    if ((await pool.fetch(object, n, part)) !== GetOutcome.Hit) return undefined
    return part.readUInt32LE(0) === magic && (part.readUInt32LE(4) & 1) === which ? part : undefined
  }
  let first: Buffer | undefined
  for (let n = 0; n < searched && first === undefined; n++) first = await read(n)
  if (first === undefined) return undefined
  const head: Head = {
    epoch: first.readUInt32LE(4),
    parts: Math.min(first.readUInt32LE(16), 2 ** 20),
    seed0: first.readInt32LE(20),
    seed1: first.readInt32LE(24),
    stamp: first.readUInt32LE(28),
    sequence: Math.min(first.readUIntLE(32, 6), maxWide),
    floor: first.readUIntLE(40, 6),
  }
  const parts: (Buffer | undefined)[] = []
  for (let n = 0; n < head.parts; n++) {
    const part = await read(n)
    parts.push(part?.readUInt32LE(4) === head.epoch ? part : undefined)
  }
  return { head, parts, isWhole: parts.every((part) => part !== undefined) }
}

/** Calls `use` with the place of each row of a part. */
function forRows(part: Buffer, use: (at: number) => void): void {
  const bytes = wordsOf[part.readUInt32LE(8)]! * 4
  const rows = Math.min(part.readUInt32LE(12), Math.floor(rowBytes / bytes))
  for (let n = 0; n < rows; n++) use(headWords * 4 + n * bytes)
}

function restorePages(part: Buffer, book: PageBook): void {
  forRows(part, (at) => {
    const page = part.readUInt32LE(at)
    const span = part.readUInt32LE(at + 8)
    const queue = part.readUInt32LE(at + 16)
    if (page >= book.capacity || span > 0xffff || queue >= queues || book.isQueued(page)) return
    book.restore(page, {
      stamp: part.readUInt32LE(at + 4),
      span,
      hash: part.readInt32LE(at + 12),
      queue,
      expiry: part.readDoubleLE(at + 24),
    })
  })
}

function restoreTags(part: Buffer, tags: Tags): void {
  forRows(part, (at) => {
    tags.deleted.set(part.readInt32LE(at), part.readUIntLE(at + 4, 6))
  })
}

function restoreEntries(part: Buffer, table: EntryTable, book: PageBook): void {
  forRows(part, (at) => {
    const hash = part.readInt32LE(at)
    const ref = part.readInt32LE(at + 4)
    const page = pageOf(ref)
    if (page < 0 || page >= book.watermark || !book.isQueued(page) || table.find(hash) >= 0) return
    // A page of its own has one entry.
    if (book.spans[page] !== 0 && (book.live[page] !== 0 || book.hashes[page] !== hash)) return
    if (!table.reserve(hash)) return
    table.add(hash, ref)
    book.live[page]!++
  })
}
