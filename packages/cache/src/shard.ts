/**
 * A shard of a cache that threads share: entries and all state in one part of the shared memory, in which one thread
 * works at a time (`locks.ts`).
 *
 * Small records are in pages, as everywhere in a cache (`records.ts`). A page that is being filled is uncompressed; a
 * full page is compressed to a block and appended to the segments of its queue. A larger record is a block of its own;
 * one longer than half a segment has a chain of its own segments, with a block for each 64 KiB. Eviction frees whole
 * segments: first expired ones; then, as in S3-FIFO, the oldest of new entries while these are more than a tenth, and
 * else the oldest of reused entries. Used entries of the segment are written again, for which one segment always stays
 * free.
 *
 * An entry is a node: hash, position, and next node of its bucket. A block lists the nodes of its records, so that an
 * unused segment is evicted without being read. The window has decoded pages; a page is in a frame if the block names
 * the frame and the frame names the block.
 *
 * Invariants: memory of zeros, as the system provides it, is an empty shard. Numbers in tables are the index plus one;
 * 0 means none. `live` of a segment is the number of nodes with a position in it. Memory in use is all that was ever
 * touched, since shared memory cannot be given back; it never exceeds the limit. Changes are between `begin` and `end`
 * of the lock, except those that change no entry (uses, frames), as a thread may end at any point.
 */
import type { BlockCodec } from '@tmem/core'
import { maxBlockBytes } from '@tmem/core'
import { copyBytes } from '@tmem/core/runtime'
import type { KeyKind } from './hash.ts'
import { hit, Miss } from './outcome.ts'
import { isMainQueue, queueFor, queues } from './pages.ts'
import {
  type EntryFacts,
  headBytes,
  maxSharedBytes,
  offsetIn,
  pageBytes,
  RecordView,
  recordBytes,
  recordsIn,
  setOffset,
  writeHead,
  writeRecord,
} from './records.ts'
import { Buffer } from './runtime.ts'
import { Count, nodeWords, ShardMemory, type ShardShape, tagSlots, versionCount, Word } from './shard-memory.ts'
import { Ghosts, maxRecords, maxUses, pageOf as nextOf, recordOf, refOf, usesOf, withUses } from './table.ts'
import type { ValueWriter } from './values.ts'

const none = -1
const HASH = 0
const PLACE = 1
/** Next node, number of the record in its page, uses: as a reference of the other table (`table.ts`). */
const LINK = 2

/** Bytes of a block before its nodes: bytes as stored; bytes as page or record; frame; nodes. */
const blockBytes = 16
const blockWords = blockBytes / 4
/** In the second word: the bytes are stored as they are; they are one record, not a page of them. */
const isRaw = 2 ** 30
const isSingle = 2 ** 29
const lengthIn = (word: number): number => word & (isSingle - 1)
/** Blocks begin at multiples of that. */
const step = 8

/** Deleted tags that are remembered. */
const maxDeleted: number = tagSlots / 2
/** How often a write makes room before it gives up. */
const attempts = 64
/** Free segments that a write leaves: one for what an eviction writes anew, one for the page that it fills. */
const keptFree = 2

/** What a change of a shard is announced to. */
export interface ChangeLock {
  begin(lock: number): void
  end(lock: number): void
}

/** A thread's view of a shard. Its methods are called while the thread holds the lock of the shard. */
export class Shard {
  /** The record that was found. */
  readonly record: RecordView = new RecordView()
  readonly shape: ShardShape
  readonly #parts: ShardMemory
  readonly #number: number
  readonly #lock: ChangeLock
  readonly #codec: BlockCodec
  readonly #ghosts: Ghosts
  /** A page that is being emptied, and the nodes of a page that is being written. This thread's own. */
  readonly #page: Buffer = Buffer.alloc(pageBytes)
  readonly #sealing: Int32Array = new Int32Array(maxRecords)
  /** What the caller's clock says. */
  #now = 0
  /** Where the record that was found begins in its bytes. */
  #recordAt = 0
  /** Entries that went since this was read last. */
  #went = 0

  /**
   * @param memory at least `memoryOf` bytes, zeroed for a new shard
   * @param number of its lock
   * @param codec this thread's own
   */
  constructor(shape: ShardShape, memory: ArrayBufferLike, number: number, lock: ChangeLock, codec: BlockCodec) {
    this.shape = shape
    this.#parts = new ShardMemory(shape, memory)
    this.#number = number
    this.#lock = lock
    this.#codec = codec
    this.#ghosts = new Ghosts(this.#parts.ghosts)
  }

  /** Counters, by `Count`. */
  get counts(): Float64Array {
    return this.#parts.counts
  }

  get entries(): number {
    return this.#parts.words[Word.entries]!
  }

  /** Memory in use: of the tables, and of nodes and segments what was ever touched. */
  get usedBytes(): number {
    const { words, fixedBytes } = this.#parts
    return (
      fixedBytes + words[Word.touchedNodes]! * nodeWords * 4 + words[Word.touchedSegments]! * this.shape.segmentBytes
    )
  }

  /** Bytes of nodes and buckets; of the window. */
  get tableBytes(): number {
    return this.#parts.buckets.byteLength + this.#parts.words[Word.touchedNodes]! * nodeWords * 4
  }

  get windowBytes(): number {
    return this.#parts.window.length
  }

  /** Blocks; bytes of the segments that are taken, and of those that ever were. */
  get pages(): number {
    return this.#parts.words[Word.pages]!
  }

  get takenBytes(): number {
    const { words } = this.#parts
    return (words[Word.segments]! - words[Word.freeSegments]!) * this.shape.segmentBytes
  }

  get touchedBytes(): number {
    return this.#parts.words[Word.touchedSegments]! * this.shape.segmentBytes
  }

  /** Entries that had to go since the last call. */
  takeWent(): number {
    const went = this.#went
    this.#went = 0
    return went
  }

  /** What rises with each write of a key with such a hash, and with all that deletes more than one key. */
  versionOf(hash: number): number {
    const { versions, words } = this.#parts
    return (versions[hash & (versionCount - 1)]! >>> 0) + (words[Word.epoch]! & 0xfffff) * 2 ** 32
  }

  // ---- Reading ----------------------------------------------------------------------------------------------------

  /**
   * Looks for a key: `hit`, or `Miss`. On `hit`, `record` is it, until the lock is given back; it may have expired.
   *
   * @param isUse whether it counts as use
   */
  find(key: string | Uint8Array, kind: KeyKind, length: number, hash: number, isUse: boolean): number {
    const node = this.#nodeOf(hash)
    if (node === none) return this.#ghosts.has(hash) ? Miss.Evicted : Miss.Absent
    const { nodes } = this.#parts
    this.#readNode(node)
    if (!this.record.isOf(key, kind, length)) return Miss.Collided
    if (this.#isUntagged()) {
      this.#lock.begin(this.#number)
      this.#remove(node)
      this.#lock.end(this.#number)
      return Miss.Untagged
    }
    const link = nodes[node * nodeWords + LINK]!
    const uses = usesOf(link)
    if (isUse && uses < maxUses) {
      nodes[node * nodeWords + LINK] = withUses(link, uses + 1)
      if (uses + 1 === maxUses) this.#gather(node)
    }
    return hit
  }

  /** Removes the entry of a key that was found, if it still is as it was and its time is over now. */
  expire(key: string | Uint8Array, kind: KeyKind, length: number, hash: number, now: number): void {
    if (this.find(key, kind, length, hash, false) !== hit || this.record.expiry > now) return
    this.#lock.begin(this.#number)
    this.#remove(this.#nodeOf(hash))
    this.counts[Count.expired]!++
    this.#lock.end(this.#number)
  }

  /**
   * An entry that is used again and again is written anew beside others that were used again: so a page in the window
   * has several such entries, and they do not go with what is new. The record that was found stays as it is.
   */
  #gather(node: number): void {
    const { nodes, openPages, queue: queueOf, window } = this.#parts
    const { record } = this
    const place = nodes[node * nodeWords + PLACE]!
    if (place < 0 || record.bytes !== window || isMainQueue(queueOf[this.#segmentOf(place)]!)) return
    if (this.#freeSegments() < keptFree) return
    const bytes = record.end - this.#recordAt
    const hash = nodes[node * nodeWords + HASH]!
    this.#lock.begin(this.#number)
    this.#remove(node)
    // What the clock said last is good enough for the order in which segments go.
    const queue = queueFor(record.expiry - this.#now, true)
    const at = this.#reserve(queue, bytes)
    window.copy(openPages, at, this.#recordAt, record.end)
    this.#noted(queue, at, bytes, hash, record.expiry, 1)
    this.counts[Count.kept]!++
    this.#lock.end(this.#number)
  }

  /** Reads the record of a node. */
  #readNode(node: number): void {
    const { nodes, openPages } = this.#parts
    const place = nodes[node * nodeWords + PLACE]!
    const number = recordOf(nodes[node * nodeWords + LINK]!)
    if (place < 0) {
      const at = (-1 - place) * pageBytes
      this.#readRecord(openPages, at + offsetIn(openPages, at, number), at + pageBytes)
      return
    }
    const segment = this.#segmentOf(place)
    if (this.#parts.chained[segment] !== 0) {
      const whole = this.#readChain(segment)
      this.#readRecord(whole, 0, whole.length)
      return
    }
    const { segmentWords } = this.#parts
    const length = lengthIn(segmentWords[place * 2 + 1]!)
    if ((segmentWords[place * 2 + 1]! & isSingle) !== 0) {
      const whole = Buffer.allocUnsafeSlow(length)
      this.#decode(place * step, whole, 0)
      this.#readRecord(whole, 0, length)
      return
    }
    const { window } = this.#parts
    const at = this.#frameFor(place) * pageBytes
    this.#readRecord(window, at + offsetIn(window, at, number), at + pageBytes)
  }

  #readRecord(bytes: Buffer, at: number, end: number): void {
    this.#recordAt = at
    if (!this.record.read(bytes, at, end)) throw new Error('cache: a shared page has a record that is none')
  }

  /** The frame that has the page of a block; brings it there. */
  #frameFor(place: number): number {
    const { frameOf, frameUsed, segmentWords, window, words } = this.#parts
    const known = segmentWords[place * 2 + 2]! - 1
    if (known >= 0 && frameOf[known] === place + 1) {
      frameUsed[known] = 1
      return known
    }
    let frame = words[Word.hand]!
    while (frameUsed[frame] !== 0) {
      frameUsed[frame] = 0
      frame = frame + 1 === this.shape.frames ? 0 : frame + 1
    }
    words[Word.hand] = frame + 1 === this.shape.frames ? 0 : frame + 1
    // It names its block only when the page is there: a thread may end in between.
    frameOf[frame] = 0
    this.#decode(place * step, window, frame * pageBytes)
    frameOf[frame] = place + 1
    segmentWords[place * 2 + 2] = frame + 1
    return frame
  }

  /** Decodes the block at `segments[at]`. Returns its bytes. */
  #decode(at: number, into: Buffer, to: number): number {
    const { segments, segmentWords } = this.#parts
    const { workspace, spareAt } = this.#codec
    const stored = segmentWords[at / 4]!
    const raw = segmentWords[at / 4 + 1]!
    const length = lengthIn(raw)
    const from = at + blockBytes + segmentWords[at / 4 + 3]! * 4
    if ((raw & isRaw) !== 0) segments.copy(into, to, from, from + stored)
    else {
      segments.copy(workspace, spareAt, from, from + stored)
      if (!this.#codec.decode(this.#codec.id, spareAt, stored, into, to, length))
        throw new Error('cache: a block in shared memory cannot be decoded')
    }
    this.counts[Count.pagesRead]!++
    return length
  }

  /** Reads a record that has segments of its own. */
  #readChain(first: number): Buffer {
    const { chained, fill, segments, segmentWords } = this.#parts
    const { segmentBytes } = this.shape
    const head = first * segmentBytes
    const whole = Buffer.allocUnsafeSlow(segmentWords[head / 4 + 1]!)
    let to = 0
    // The blocks run on over the ends of the segments: so each is put together first.
    const block = Buffer.allocUnsafeSlow(blockBytes + maxBlockBytes)
    let segment = first
    let at = step
    const take = (into: Buffer, start: number, bytes: number): void => {
      for (let done = 0; done < bytes; ) {
        if (at === fill[segment]) {
          segment = chained[segment]! - 1
          at = 0
        }
        const run = Math.min(bytes - done, fill[segment]! - at)
        segments.copy(into, start + done, segment * segmentBytes + at, segment * segmentBytes + at + run)
        at += run
        done += run
      }
    }
    while (to < whole.length) {
      take(block, 0, 8)
      const stored = block.readInt32LE(0)
      const raw = block.readInt32LE(4)
      const length = lengthIn(raw)
      take(block, 0, stored)
      if ((raw & isRaw) !== 0) block.copy(whole, to, 0, stored)
      else {
        block.copy(this.#codec.workspace, this.#codec.spareAt, 0, stored)
        if (!this.#codec.decode(this.#codec.id, this.#codec.spareAt, stored, whole, to, length))
          throw new Error('cache: a block in shared memory cannot be decoded')
      }
      to += length
      this.counts[Count.pagesRead]!++
    }
    return whole
  }

  // ---- Writing ----------------------------------------------------------------------------------------------------

  /**
   * Stores what the writer has under a key. False: there was no room, and the key has no value now.
   *
   * @param lifetime milliseconds
   * @param version stored only if it is still that of the hash (`versionOf`)
   */
  write(
    key: string | Uint8Array,
    kind: KeyKind,
    length: number,
    hash: number,
    facts: EntryFacts,
    writer: ValueWriter,
    lifetime: number,
    now: number,
    version: number | undefined,
  ): boolean {
    if (version !== undefined && version !== this.versionOf(hash)) {
      writer.takeAbsent()
      return false
    }
    const { counts, openPages, versions } = this.#parts
    this.#now = now
    this.#lock.begin(this.#number)
    counts[Count.sets]!++
    versions[hash & (versionCount - 1)]!++
    if (facts.tags.length > 0) facts.sequence = ++counts[Count.sequence]!
    const queue = queueFor(lifetime, this.#replace(hash))
    const bytes = recordBytes(facts, length, writer.length)
    let stored = true
    if (bytes > this.shape.limitBytes / 2) {
      counts[Count.tooLarge]!++
      stored = false
    } else if (bytes > maxSharedBytes) {
      const whole = Buffer.allocUnsafeSlow(bytes)
      writer.writeTo(whole, writeRecord(whole, 0, facts, key, kind, length, writer.kind, writer.length))
      stored = this.#storeWhole(whole, hash, facts.expiry, queue)
    } else if (this.#makeRoom(keptFree)) {
      const at = this.#reserve(queue, bytes)
      writer.writeTo(openPages, writeRecord(openPages, at, facts, key, kind, length, writer.kind, writer.length))
      this.#noted(queue, at, bytes, hash, facts.expiry, 0)
    } else {
      counts[Count.noRoom]!++
      stored = false
    }
    this.#lock.end(this.#number)
    if (!stored) writer.takeAbsent()
    return stored
  }

  /** Takes over an entry of a hash that is not there: its record is `bytes[at, end)`. There may be no room for it. */
  adopt(bytes: Buffer, at: number, end: number, hash: number, expiry: number, isMain: boolean, now: number): void {
    this.#now = now
    const queue = queueFor(expiry - now, isMain)
    this.#lock.begin(this.#number)
    if (end - at > maxSharedBytes) this.#storeWhole(Buffer.from(bytes.subarray(at, end)), hash, expiry, queue)
    else if (this.#makeRoom(keptFree)) {
      const to = this.#reserve(queue, end - at)
      bytes.copy(this.#parts.openPages, to, at, end)
      this.#noted(queue, to, end - at, hash, expiry, 0)
    }
    this.#lock.end(this.#number)
  }

  /** Removes the entry of a hash, if it is that of the key: `find` said so. */
  remove(hash: number, isThere: boolean): void {
    const { counts, versions } = this.#parts
    this.#lock.begin(this.#number)
    versions[hash & (versionCount - 1)]!++
    if (isThere) {
      this.#remove(this.#nodeOf(hash))
      counts[Count.deletes]!++
    }
    this.#lock.end(this.#number)
  }

  /** Notes that a tag is deleted. */
  deleteByTag(tag: number): void {
    const { counts, tagHashes, tagWrites, words } = this.#parts
    this.#lock.begin(this.#number)
    words[Word.epoch]!++
    let slot = this.#tagSlot(tag)
    if (tagWrites[slot] === 0 && words[Word.tags] === maxDeleted) {
      tagWrites.fill(0)
      words[Word.tags] = 0
      counts[Count.floor] = counts[Count.sequence]!
      slot = this.#tagSlot(tag)
    }
    if (tagWrites[slot] === 0) words[Word.tags]!++
    tagHashes[slot] = tag
    tagWrites[slot] = counts[Count.sequence]! + 1
    this.#lock.end(this.#number)
  }

  /** Deletes everything. */
  clear(): void {
    this.#lock.begin(this.#number)
    this.#reset()
    this.#lock.end(this.#number)
  }

  /** A thread has ended in the middle of a change: nothing of the shard is believed, and it is empty. */
  drop(): void {
    const { counts, words } = this.#parts
    counts[Count.dropped]!++
    counts[Count.droppedEntries]! += words[Word.entries]!
    this.#reset()
    this.#lock.end(this.#number)
  }

  /** Lets so many segments go, at most, of which all has expired. How many went. */
  tick(segments: number, now: number): number {
    this.#now = now
    for (let n = 0; n < segments; n++) {
      const victim = this.#victim()
      if (victim === none || this.#parts.expiry[victim]! > now) return n
      this.#lock.begin(this.#number)
      this.#evict()
      this.#lock.end(this.#number)
    }
    return segments
  }

  /** Removes the entry of a hash, if there is one. Whether the next one has been here before, and was used. */
  #replace(hash: number): boolean {
    const { nodes, queue } = this.#parts
    const node = this.#nodeOf(hash)
    if (node === none) {
      const isBack = this.#ghosts.has(hash)
      if (isBack) this.#ghosts.remove(hash)
      return isBack
    }
    const place = nodes[node * nodeWords + PLACE]!
    const was = place < 0 ? -1 - place : queue[this.#segmentOf(place)]!
    const isMain = usesOf(nodes[node * nodeWords + LINK]!) > 0 || isMainQueue(was)
    this.#remove(node)
    return isMain
  }

  /** Sees to it that there are so many free segments, and a node. */
  #makeRoom(segments: number): boolean {
    for (let tries = 0; this.#freeSegments() < segments || !this.#hasNode(); tries++)
      if (tries === attempts + segments || !this.#evict()) return false
    return true
  }

  /** Where in the open page of a queue a record goes; a full page becomes a block. There is a segment for that. */
  #reserve(queue: number, bytes: number): number {
    const { openExpiry, openPages, words } = this.#parts
    const page = queue * pageBytes
    const filled = words[Word.filled + queue]!
    if (filled !== 0) {
      const records = recordsIn(openPages, page)
      if (records < maxRecords && filled + bytes + 2 * (records + 1) <= pageBytes) return page + filled
      this.#seal(queue)
    }
    openPages.fill(0, page, page + pageBytes)
    writeHead(openPages, page, 0, 0)
    words[Word.filled + queue] = headBytes
    openExpiry[queue] = 0
    return page + headBytes
  }

  /** Notes the record that was written where `#reserve` said. */
  #noted(queue: number, at: number, bytes: number, hash: number, expiry: number, uses: number): void {
    const { openExpiry, openNodes, openPages, words } = this.#parts
    const page = queue * pageBytes
    const number = recordsIn(openPages, page)
    setOffset(openPages, page, number, at - page)
    writeHead(openPages, page, number + 1, 0)
    words[Word.filled + queue]! += bytes
    words[Word.openLive + queue]!++
    if (expiry > openExpiry[queue]!) openExpiry[queue] = expiry
    openNodes[queue * maxRecords + number] = this.#addNode(hash, -1 - queue, number, uses) + 1
  }

  /** Makes a block of the open page of a queue. */
  #seal(queue: number): void {
    const { counts, live, nodes, openExpiry, openNodes, openPages, segmentWords, words } = this.#parts
    const sealing = this.#sealing
    const page = queue * pageBytes
    const count = recordsIn(openPages, page)
    const isEmpty = words[Word.openLive + queue] === 0
    for (let n = 0; n < count; n++) {
      sealing[n] = openNodes[queue * maxRecords + n]!
      openNodes[queue * maxRecords + n] = 0
    }
    words[Word.filled + queue] = 0
    words[Word.openLive + queue] = 0
    if (isEmpty) return
    const stored = this.#codec.encode(openPages, page, pageBytes, 0, pageBytes - 1)
    const at = this.#append(queue, stored, pageBytes, 0, count, openExpiry[queue]!)
    if (at === none) {
      for (let n = 0; n < count; n++) {
        if (sealing[n] === 0) continue
        this.#dropNode(sealing[n]! - 1)
        counts[Count.refused]!++
      }
      return
    }
    this.#fillBlock(at, stored, openPages, page, pageBytes)
    const segment = this.#segmentOf(at / step)
    for (let n = 0; n < count; n++) {
      segmentWords[at / 4 + blockWords + n] = sealing[n]!
      if (sealing[n] === 0) continue
      nodes[(sealing[n]! - 1) * nodeWords + PLACE] = at / step
      live[segment]!++
    }
    counts[Count.pagesWritten]!++
  }

  /**
   * Begins a block in the segment of a queue that is being written: where it is, or `none`.
   *
   * @param stored bytes of the block in the workspace; 0: it is stored as it is
   */
  #append(queue: number, stored: number, length: number, flags: number, count: number, expiry: number): number {
    const { blocks, expiry: expiries, fill, live, segmentWords, words } = this.#parts
    const { segmentBytes } = this.shape
    const bytes = stored === 0 ? length : stored
    const whole = Math.ceil((blockBytes + 4 * count + bytes) / step) * step
    let segment = words[Word.open + queue]! - 1
    if (segment === none || fill[segment]! + whole > segmentBytes) {
      words[Word.open + queue] = 0
      if (segment !== none && live[segment] === 0) this.#freeSegment(segment)
      segment = this.#newSegment(queue)
      if (segment === none) return none
      words[Word.open + queue] = segment + 1
    }
    const at = segment * segmentBytes + fill[segment]!
    fill[segment]! += whole
    blocks[segment]!++
    words[Word.pages]!++
    if (expiry > expiries[segment]!) expiries[segment] = expiry
    segmentWords[at / 4] = bytes
    segmentWords[at / 4 + 1] = length | flags | (stored === 0 ? isRaw : 0)
    segmentWords[at / 4 + 2] = 0
    segmentWords[at / 4 + 3] = count
    return at
  }

  /** Writes the bytes of a block: those of the workspace, or as they are. */
  #fillBlock(at: number, stored: number, raw: Buffer, from: number, length: number): void {
    const { segments, segmentWords } = this.#parts
    const to = at + blockBytes + segmentWords[at / 4 + 3]! * 4
    if (stored === 0) raw.copy(segments, to, from, from + length)
    else copyBytes.call(this.#codec.workspace, segments, to, 0, stored)
  }

  /** Stores a record that shares no page. */
  #storeWhole(whole: Buffer, hash: number, expiry: number, queue: number): boolean {
    const { counts, live, segmentWords } = this.#parts
    const bytes = whole.length
    // Making room uses the workspace.
    if (!this.#makeRoom(keptFree)) {
      counts[Count.noRoom]!++
      return false
    }
    const most = this.shape.segmentBytes / 2
    const stored = bytes > maxBlockBytes ? 0 : this.#codec.encode(whole, 0, bytes, 0, Math.min(bytes - 1, most))
    if (stored === 0 && bytes > most) return this.#writeChain(whole, hash, expiry, queue)
    const at = this.#append(queue, stored, bytes, isSingle, 1, expiry)
    if (at === none) {
      counts[Count.noRoom]!++
      return false
    }
    this.#fillBlock(at, stored, whole, 0, bytes)
    segmentWords[at / 4 + blockWords] = this.#addNode(hash, at / step, 0, 0) + 1
    live[this.#segmentOf(at / step)]!++
    counts[Count.pagesWritten]!++
    return true
  }

  /** Stores a record in segments of its own. */
  #writeChain(whole: Buffer, hash: number, expiry: number, queue: number): boolean {
    const { blocks, chained, counts, expiry: expiries, fill, live, segments, segmentWords, words } = this.#parts
    const { segmentBytes } = this.shape
    const parts = Math.ceil(whole.length / maxBlockBytes)
    const stream = Buffer.allocUnsafeSlow(step + whole.length + parts * 8)
    let length: number = step
    for (let from = 0; from < whole.length; from += maxBlockBytes) {
      const bytes = Math.min(maxBlockBytes, whole.length - from)
      const stored = this.#codec.encode(whole, from, bytes, 0, bytes - 1)
      stream.writeInt32LE(stored === 0 ? bytes : stored, length)
      stream.writeInt32LE(stored === 0 ? bytes | isRaw : bytes, length + 4)
      if (stored === 0) whole.copy(stream, length + 8, from, from + bytes)
      else copyBytes.call(this.#codec.workspace, stream, length + 8, 0, stored)
      length += 8 + (stored === 0 ? bytes : stored)
    }
    const count = Math.ceil(length / segmentBytes)
    if (!this.#makeRoom(count + keptFree)) {
      counts[Count.noRoom]!++
      return false
    }
    const first = this.#newSegment(queue)
    let last = first
    for (let n = 0; n < count; n++) {
      const segment = n === 0 ? first : this.#newSegment(none)
      const bytes = Math.min(segmentBytes, length - n * segmentBytes)
      stream.copy(segments, segment * segmentBytes, n * segmentBytes, n * segmentBytes + bytes)
      fill[segment] = bytes
      chained[last] = segment + 1
      last = segment
    }
    // The last one names itself.
    chained[last] = last + 1
    const head = first * segmentBytes
    segmentWords[head / 4] = this.#addNode(hash, head / step, 0, 0) + 1
    segmentWords[head / 4 + 1] = whole.length
    live[first] = 1
    expiries[first] = expiry
    words[Word.queued + (queue & 1)]! += count - 1
    blocks[first] = parts
    words[Word.pages]! += parts
    counts[Count.pagesWritten]! += parts
    return true
  }

  // ---- Nodes ------------------------------------------------------------------------------------------------------

  /** The node of a hash, or `none`. */
  #nodeOf(hash: number): number {
    const { buckets, nodes } = this.#parts
    let node = buckets[hash & (this.shape.buckets - 1)]! - 1
    while (node !== none && nodes[node * nodeWords + HASH] !== hash) node = nextOf(nodes[node * nodeWords + LINK]!)
    return node
  }

  #hasNode(): boolean {
    const { words } = this.#parts
    return (
      words[Word.freeNode] !== 0 ||
      words[Word.nodes]! < words[Word.touchedNodes]! ||
      (words[Word.nodes]! < this.shape.nodes && this.usedBytes + nodeWords * 4 <= this.shape.limitBytes)
    )
  }

  /** Adds a node for a hash that has none. There is one to be had. */
  #addNode(hash: number, place: number, number: number, uses: number): number {
    const { buckets, nodes, words } = this.#parts
    let node = words[Word.freeNode]! - 1
    if (node === none) {
      node = words[Word.nodes]!++
      if (node >= words[Word.touchedNodes]!) words[Word.touchedNodes] = node + 1
    } else words[Word.freeNode] = nodes[node * nodeWords + LINK]!
    const bucket = hash & (this.shape.buckets - 1)
    nodes[node * nodeWords + HASH] = hash
    nodes[node * nodeWords + PLACE] = place
    nodes[node * nodeWords + LINK] = refOf(buckets[bucket]! - 1, number, uses)
    buckets[bucket] = node + 1
    words[Word.entries]!++
    return node
  }

  /** Takes a node out of the table. */
  #dropNode(node: number): void {
    const { buckets, nodes, words } = this.#parts
    const link = nodes[node * nodeWords + LINK]!
    const bucket = nodes[node * nodeWords + HASH]! & (this.shape.buckets - 1)
    if (buckets[bucket] === node + 1) buckets[bucket] = nextOf(link) + 1
    else {
      let before = buckets[bucket]! - 1
      for (;;) {
        const next = nextOf(nodes[before * nodeWords + LINK]!)
        if (next === node) break
        before = next
      }
      const of = nodes[before * nodeWords + LINK]!
      nodes[before * nodeWords + LINK] = refOf(nextOf(link), recordOf(of), usesOf(of))
    }
    // No block has that place.
    nodes[node * nodeWords + PLACE] = nowhere
    nodes[node * nodeWords + LINK] = words[Word.freeNode]!
    words[Word.freeNode] = node + 1
    words[Word.entries]!--
  }

  /** Removes an entry. */
  #remove(node: number): void {
    const { live, nodes, openNodes, queue, words } = this.#parts
    const place = nodes[node * nodeWords + PLACE]!
    const number = recordOf(nodes[node * nodeWords + LINK]!)
    this.#dropNode(node)
    if (place < 0) {
      openNodes[(-1 - place) * maxRecords + number] = 0
      words[Word.openLive - 1 - place]!--
      return
    }
    const segment = this.#segmentOf(place)
    live[segment]!--
    if (live[segment] === 0 && queue[segment] !== none && words[Word.open + queue[segment]!] !== segment + 1)
      this.#freeSegment(segment)
  }

  // ---- Segments ---------------------------------------------------------------------------------------------------

  #segmentOf(place: number): number {
    return Math.floor((place * step) / this.shape.segmentBytes)
  }

  /** Segments that could be had now. */
  #freeSegments(): number {
    const { words } = this.#parts
    const { limitBytes, segmentBytes, segments } = this.shape
    const touched = words[Word.touchedSegments]!
    const more = Math.max(0, Math.floor((limitBytes - this.usedBytes) / segmentBytes))
    return words[Word.freeSegments]! + touched - words[Word.segments]! + Math.min(segments - touched, more)
  }

  /** Takes a segment for a queue, or for a record (`none`): its number, or `none`. */
  #newSegment(queue: number): number {
    const { blocks, chained, counts, expiry, fill, live, older, queue: queueOf, stamp, words } = this.#parts
    if (this.#freeSegments() === 0) return none
    let segment = words[Word.freeSegment]! - 1
    if (segment === none) {
      segment = words[Word.segments]!++
      if (segment >= words[Word.touchedSegments]!) words[Word.touchedSegments] = segment + 1
    } else {
      words[Word.freeSegment] = older[segment]!
      words[Word.freeSegments]!--
    }
    blocks[segment] = 0
    chained[segment] = 0
    expiry[segment] = 0
    fill[segment] = 0
    live[segment] = 0
    queueOf[segment] = none
    stamp[segment] = ++counts[Count.stamp]!
    if (queue !== none) this.#enqueue(segment, queue)
    return segment
  }

  /** Gives a segment back, in a queue or not, and those that are chained to it. */
  #freeSegment(first: number): void {
    const { blocks, chained, older, queue, words } = this.#parts
    if (queue[first] !== none) this.#unlink(first)
    words[Word.pages]! -= blocks[first]!
    for (let segment = first; ; ) {
      const next = chained[segment]! - 1
      chained[segment] = 0
      older[segment] = words[Word.freeSegment]!
      words[Word.freeSegment] = segment + 1
      words[Word.freeSegments]!++
      if (next === none || next === segment) return
      segment = next
    }
  }

  /** Segments of a record, or one. */
  #lengthOf(first: number): number {
    const { chained } = this.#parts
    let count = 1
    for (let segment = first; chained[segment] !== 0 && chained[segment] !== segment + 1; count++)
      segment = chained[segment]! - 1
    return count
  }

  #enqueue(segment: number, queue: number): void {
    const { newer, older, queue: queueOf, words } = this.#parts
    const newest = words[Word.newest + queue]!
    older[segment] = newest
    newer[segment] = 0
    if (newest === 0) words[Word.oldest + queue] = segment + 1
    else newer[newest - 1] = segment + 1
    words[Word.newest + queue] = segment + 1
    queueOf[segment] = queue
    words[Word.queued + (queue & 1)]! += this.#lengthOf(segment)
  }

  #unlink(segment: number): void {
    const { newer, older, queue: queueOf, words } = this.#parts
    const queue = queueOf[segment]!
    if (older[segment] === 0) words[Word.oldest + queue] = newer[segment]!
    else newer[older[segment]! - 1] = newer[segment]!
    if (newer[segment] === 0) words[Word.newest + queue] = older[segment]!
    else older[newer[segment]! - 1] = older[segment]!
    queueOf[segment] = none
    words[Word.queued + (queue & 1)]! -= this.#lengthOf(segment)
  }

  // ---- Evicting ---------------------------------------------------------------------------------------------------

  /** The segment that goes next, or `none`. */
  #victim(): number {
    const { expiry, words } = this.#parts
    const small = this.#oldestOf(0)
    if (small !== none && expiry[small]! <= this.#now) return small
    const main = this.#oldestOf(1)
    if (main !== none && expiry[main]! <= this.#now) return main
    if (small === none) return main
    return main === none || words[Word.queued]! * 10 > words[Word.queued + 1]! ? small : main
  }

  /** The oldest segment of the queues of a kind; one of which all has expired before all others. */
  #oldestOf(kind: number): number {
    const { expiry, stamp, words } = this.#parts
    let oldest = none
    for (let queue = kind; queue < queues; queue += 2) {
      const segment = words[Word.oldest + queue]! - 1
      if (segment === none) continue
      if (expiry[segment]! <= this.#now) return segment
      if (oldest === none || stamp[segment]! < stamp[oldest]!) oldest = segment
    }
    return oldest
  }

  /** Lets a segment go: what is used of it is written anew. False: there is none. */
  #evict(): boolean {
    const { chained, fill, queue: queueOf, segmentWords, words } = this.#parts
    const victim = this.#victim()
    if (victim === none) return false
    const queue = queueOf[victim]!
    const isMain = isMainQueue(queue)
    if (words[Word.open + queue] === victim + 1) words[Word.open + queue] = 0
    this.#unlink(victim)
    if (chained[victim] !== 0) {
      this.#evictChain(victim, isMain)
      return true
    }
    const end = victim * this.shape.segmentBytes + fill[victim]!
    for (let at = victim * this.shape.segmentBytes; at < end; ) {
      const stored = segmentWords[at / 4]!
      const count = segmentWords[at / 4 + 3]!
      this.#evictBlock(at, count, isMain)
      at += Math.ceil((blockBytes + 4 * count + stored) / step) * step
    }
    this.#freeSegment(victim)
    return true
  }

  #evictChain(first: number, isMain: boolean): void {
    const { expiry, nodes, segmentWords } = this.#parts
    const node = segmentWords[(first * this.shape.segmentBytes) / 4]! - 1
    const link = nodes[node * nodeWords + LINK]!
    const uses = usesOf(link)
    if (uses > 0 && expiry[first]! > this.#now) {
      nodes[node * nodeWords + LINK] = withUses(link, isMain ? uses - 1 : 0)
      this.counts[Count.kept]!++
      this.#enqueue(first, queueFor(expiry[first]! - this.#now, true))
      return
    }
    this.#forget(node, expiry[first]! <= this.#now, isMain)
    this.#freeSegment(first)
  }

  /** Lets the entries of a block go, or writes them anew. The segment is in no queue. */
  #evictBlock(at: number, count: number, isMain: boolean): void {
    const { expiry, nodes, segmentWords } = this.#parts
    const isOver = expiry[this.#segmentOf(at / step)]! <= this.#now
    let isRead = false
    for (let n = 0; n < count; n++) {
      const node = segmentWords[at / 4 + blockWords + n]! - 1
      if (node === none || nodes[node * nodeWords + PLACE] !== at / step) continue
      const link = nodes[node * nodeWords + LINK]!
      if (recordOf(link) !== n) continue
      const uses = usesOf(link)
      if (uses === 0 || isOver) {
        this.#forget(node, isOver, isMain)
        continue
      }
      const next = isMain ? uses - 1 : 0
      if ((segmentWords[at / 4 + 1]! & isSingle) !== 0) {
        this.#keepSingle(node, at, next, isMain)
        continue
      }
      if (!isRead) this.#decode(at, this.#page, 0)
      isRead = true
      this.#readRecord(this.#page, offsetIn(this.#page, 0, n), pageBytes)
      this.#keep(node, next, isMain)
    }
  }

  /** Writes the record that was read, out of `#page`, anew. */
  #keep(node: number, uses: number, isMain: boolean): void {
    const { counts, nodes, openPages } = this.#parts
    const { record } = this
    const { expiry } = record
    if (expiry <= this.#now || this.#isUntagged()) {
      this.#forget(node, expiry <= this.#now, isMain)
      return
    }
    const hash = nodes[node * nodeWords + HASH]!
    const bytes = record.end - this.#recordAt
    this.#remove(node)
    const queue = queueFor(expiry - this.#now, true)
    const at = this.#reserve(queue, bytes)
    this.#page.copy(openPages, at, this.#recordAt, record.end)
    this.#noted(queue, at, bytes, hash, expiry, uses)
    counts[Count.kept]!++
  }

  /** Moves a block that is one record, as it is stored. */
  #keepSingle(node: number, at: number, uses: number, isMain: boolean): void {
    const { counts, live, nodes, segments, segmentWords } = this.#parts
    const { record } = this
    const stored = segmentWords[at / 4]!
    const raw = segmentWords[at / 4 + 1]!
    const whole = Buffer.allocUnsafeSlow(lengthIn(raw))
    this.#decode(at, whole, 0)
    this.#readRecord(whole, 0, whole.length)
    const isOver = record.expiry <= this.#now
    const to =
      isOver || this.#isUntagged()
        ? none
        : this.#append(
            queueFor(record.expiry - this.#now, true),
            (raw & isRaw) !== 0 ? 0 : stored,
            lengthIn(raw),
            isSingle,
            1,
            record.expiry,
          )
    if (to === none) {
      this.#forget(node, isOver, isMain)
      return
    }
    segments.copyWithin(to + blockBytes + 4, at + blockBytes + 4, at + blockBytes + 4 + stored)
    segmentWords[to / 4 + blockWords] = node + 1
    nodes[node * nodeWords + PLACE] = to / step
    nodes[node * nodeWords + LINK] = withUses(nodes[node * nodeWords + LINK]!, uses)
    live[this.#segmentOf(at / step)]!--
    live[this.#segmentOf(to / step)]!++
    counts[Count.kept]!++
  }

  /** An entry goes because its time is over, or its room is needed. */
  #forget(node: number, isOver: boolean, isMain: boolean): void {
    const { counts, nodes } = this.#parts
    const hash = nodes[node * nodeWords + HASH]!
    this.#remove(node)
    this.#went++
    counts[isOver ? Count.expired : Count.room]!++
    if (!isOver && !isMain) this.#ghosts.add(hash)
  }

  // ---- Tags -------------------------------------------------------------------------------------------------------

  /** Where a tag is noted, or would be. */
  #tagSlot(tag: number): number {
    const { tagHashes, tagWrites } = this.#parts
    let slot = tag & (tagSlots - 1)
    while (tagWrites[slot] !== 0 && tagHashes[slot] !== tag) slot = (slot + 1) & (tagSlots - 1)
    return slot
  }

  /** Whether the record that was read was deleted by a tag. */
  #isUntagged(): boolean {
    const { counts, tagWrites, words } = this.#parts
    const { record } = this
    if (record.tagCount === 0) return false
    if (record.sequence <= counts[Count.floor]!) return true
    if (words[Word.tags] === 0) return false
    for (let n = 0; n < record.tagCount; n++) {
      const until = tagWrites[this.#tagSlot(record.tag(n))]!
      if (until !== 0 && record.sequence < until) return true
    }
    return false
  }

  /** As new, but for what was touched and counted. */
  #reset(): void {
    const { buckets, frameOf, frameUsed, ghosts, openNodes, tagWrites, words } = this.#parts
    const touchedSegments = words[Word.touchedSegments]!
    const touchedNodes = words[Word.touchedNodes]!
    const epoch = words[Word.epoch]!
    words.fill(0)
    buckets.fill(0)
    ghosts.fill(0)
    tagWrites.fill(0)
    openNodes.fill(0)
    frameOf.fill(0)
    frameUsed.fill(0)
    words[Word.touchedSegments] = touchedSegments
    words[Word.touchedNodes] = touchedNodes
    words[Word.epoch] = epoch + 1
  }

  // ---- For tests --------------------------------------------------------------------------------------------------

  /** Throws an `Error` that names a broken invariant. @param hashOf the hash of the record that was read */
  check(hashOf: (record: RecordView) => number): void {
    const { buckets, chained, live, newer, nodes, older, queue: queueOf, words } = this.#parts
    const alive = new Int32Array(this.shape.segments)
    const open = new Int32Array(queues)
    let entries = 0
    for (let bucket = 0; bucket < buckets.length; bucket++)
      for (let node = buckets[bucket]! - 1; node !== none; node = nextOf(nodes[node * nodeWords + LINK]!)) {
        if (++entries > words[Word.nodes]!) throw new Error('cache: the nodes of a bucket go round in a circle')
        const place = nodes[node * nodeWords + PLACE]!
        if (place < 0) open[-1 - place]!++
        else alive[this.#segmentOf(place)]!++
        this.#readNode(node)
        if (hashOf(this.record) !== nodes[node * nodeWords + HASH])
          throw new Error(`cache: the record of node ${node} is another one's`)
      }
    if (entries !== words[Word.entries])
      throw new Error(`cache: ${entries} entries in a shard, counted ${words[Word.entries]}`)
    for (let segment = 0; segment < alive.length; segment++)
      if (segment < words[Word.segments]! && queueOf[segment] !== none && alive[segment] !== live[segment])
        throw new Error(`cache: segment ${segment} has ${alive[segment]} entries, counted ${live[segment]}`)
    let taken = 0
    const queued = [0, 0]
    for (let queue = 0; queue < queues; queue++) {
      if (open[queue] !== words[Word.openLive + queue])
        throw new Error(`cache: an open page has ${open[queue]} entries, counted ${words[Word.openLive + queue]}`)
      let before = 0
      for (let segment = words[Word.oldest + queue]!; segment !== 0; segment = newer[segment - 1]!) {
        if (queueOf[segment - 1] !== queue || older[segment - 1] !== before)
          throw new Error(`cache: segment ${segment - 1} is out of order in queue ${queue}`)
        before = segment
        taken += this.#lengthOf(segment - 1)
        queued[queue & 1]! += this.#lengthOf(segment - 1)
      }
      if (before !== words[Word.newest + queue]) throw new Error(`cache: queue ${queue} has another end`)
    }
    if (queued[0] !== words[Word.queued] || queued[1] !== words[Word.queued + 1])
      throw new Error(`cache: ${queued.join(' and ')} segments in queues, counted otherwise`)
    let spare = 0
    for (let segment = words[Word.freeSegment]!; segment !== 0; segment = older[segment - 1]!) {
      if (++spare > words[Word.segments]!) throw new Error('cache: the free segments go round in a circle')
      if (chained[segment - 1] !== 0) throw new Error(`cache: segment ${segment - 1} is free, and of a record`)
    }
    if (spare !== words[Word.freeSegments] || taken + spare !== words[Word.segments])
      throw new Error(`cache: of ${words[Word.segments]} segments ${taken} are taken and ${spare} are free`)
    if (this.usedBytes > this.shape.limitBytes)
      throw new Error(`cache: a shard uses ${this.usedBytes} bytes of ${this.shape.limitBytes}`)
  }
}

/** Of no block, and of no open page. */
const nowhere = -(2 ** 31)
