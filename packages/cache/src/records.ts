/**
 * Records: the form of entries in pages.
 *
 * A record has a head of nine bytes (kinds of value and key, flags, length of the key, length of the value), then what
 * the flags say (end of life, end of freshness, tags), then the key and the value. Small records share a page: it
 * begins with the number of its records and its stamp, and at its end, backwards, is the offset of each record. A
 * larger record is alone in pages of its own; it follows the same beginning, and continues from page to page.
 *
 * The stamp is a number that the page gets at its beginning and that no other page ever had. After a restart it tells
 * whether a page is still the same.
 *
 * Numbers are little endian. The layout is a contract, as files contain it.
 */
import { basePageSize } from '@tmem/core'
import { KeyKind } from './hash.ts'
import { Buffer } from './runtime.ts'
import type { ValueKind } from './values.ts'

/** Bytes of a page. */
export const pageBytes: number = basePageSize

/** Bytes at the beginning of a page: its number of records (two), then two of nothing, then its stamp. */
export const headBytes = 8

/** Bytes of a record before what its flags say. */
const fixedBytes = 9
/** Bytes of a time or of a sequence number. */
const wideBytes = 6
/** Largest time and sequence number. */
export const maxWide: number = 2 ** 48 - 1

/** Largest key, in bytes, and most tags of an entry. */
export const maxKeyBytes: number = 64 * 1024
export const maxTags = 255

/** Largest record that shares a page, with its offset. */
export const maxSharedBytes: number = pageBytes - headBytes - 2

/** Longest key that is written faster unit by unit than by a call into the runtime. */
const shortKey = 48

const hasExpiry = 1
const hasFresh = 2
const hasTags = 4

/** What is known of an entry besides key and value. */
export class EntryFacts {
  /** When its life ends, and when it is not fresh any more, in milliseconds since 1970; Infinity: never. */
  expiry: number = Number.POSITIVE_INFINITY
  fresh: number = Number.POSITIVE_INFINITY
  /** Hashes of its tags, and the number of the write, with tags only. */
  tags: readonly number[] = []
  sequence = 0
}

/** Bytes of a record. */
export function recordBytes(facts: EntryFacts, keyLength: number, valueLength: number): number {
  return (
    fixedBytes +
    (facts.expiry === Number.POSITIVE_INFINITY ? 0 : wideBytes) +
    (facts.fresh === Number.POSITIVE_INFINITY ? 0 : wideBytes) +
    (facts.tags.length === 0 ? 0 : 1 + wideBytes + 4 * facts.tags.length) +
    keyLength +
    valueLength
  )
}

/** Writes a record up to its value. Returns where the value goes. */
export function writeRecord(
  into: Buffer,
  at: number,
  facts: EntryFacts,
  key: string | Uint8Array,
  keyKind: KeyKind,
  keyLength: number,
  valueKind: ValueKind,
  valueLength: number,
): number {
  const { expiry, fresh, tags } = facts
  into[at] = valueKind | (keyKind << 4)
  into[at + 1] =
    (expiry === Number.POSITIVE_INFINITY ? 0 : hasExpiry) |
    (fresh === Number.POSITIVE_INFINITY ? 0 : hasFresh) |
    (tags.length === 0 ? 0 : hasTags)
  into[at + 2] = keyLength
  into[at + 3] = keyLength >>> 8
  into[at + 4] = keyLength >>> 16
  into[at + 5] = valueLength
  into[at + 6] = valueLength >>> 8
  into[at + 7] = valueLength >>> 16
  into[at + 8] = valueLength >>> 24
  let to = at + fixedBytes
  if (expiry !== Number.POSITIVE_INFINITY) to = into.writeUIntLE(expiry, to, wideBytes)
  if (fresh !== Number.POSITIVE_INFINITY) to = into.writeUIntLE(fresh, to, wideBytes)
  if (tags.length > 0) {
    into[to] = tags.length
    to = into.writeUIntLE(facts.sequence, to + 1, wideBytes)
    for (const tag of tags) to = into.writeInt32LE(tag, to)
  }
  if (typeof key !== 'string') into.set(key, to)
  else if (keyKind === KeyKind.Narrow && keyLength <= shortKey)
    for (let i = 0; i < keyLength; i++) into[to + i] = key.charCodeAt(i)
  else if (keyKind === KeyKind.Narrow) into.write(key, to, keyLength, 'latin1')
  else into.write(key, to, keyLength, 'utf16le')
  return to + keyLength
}

/** A record that was read: one at a time. */
export class RecordView {
  bytes: Buffer = Buffer.alloc(0)
  valueKind: ValueKind = 0
  keyKind: KeyKind = KeyKind.Narrow
  keyAt = 0
  keyLength = 0
  valueAt = 0
  valueLength = 0
  expiry = 0
  fresh = 0
  tagCount = 0
  sequence = 0
  #tagsAt = 0

  /** Reads the record at `bytes[at]`, of which nothing lies behind `end`. False: it is none. */
  read(bytes: Buffer, at: number, end: number): boolean {
    if (at + fixedBytes > end) return false
    this.bytes = bytes
    const kinds = bytes[at]!
    const flags = bytes[at + 1]!
    this.valueKind = (kinds & 0xf) as ValueKind
    this.keyKind = (kinds >>> 4) as KeyKind
    this.keyLength = bytes[at + 2]! | (bytes[at + 3]! << 8) | (bytes[at + 4]! << 16)
    this.valueLength = bytes[at + 5]! | (bytes[at + 6]! << 8) | (bytes[at + 7]! << 16) | (bytes[at + 8]! << 24)
    let from = at + fixedBytes
    this.expiry = this.fresh = Number.POSITIVE_INFINITY
    this.tagCount = 0
    if (flags !== 0) {
      const times = ((flags & hasExpiry) === 0 ? 0 : wideBytes) + ((flags & hasFresh) === 0 ? 0 : wideBytes)
      if (from + times + ((flags & hasTags) === 0 ? 0 : 1 + wideBytes) > end) return false
      if ((flags & hasExpiry) !== 0) {
        this.expiry = bytes.readUIntLE(from, wideBytes)
        from += wideBytes
      }
      if ((flags & hasFresh) !== 0) {
        this.fresh = bytes.readUIntLE(from, wideBytes)
        from += wideBytes
      }
      if ((flags & hasTags) !== 0) {
        this.tagCount = bytes[from]!
        this.sequence = bytes.readUIntLE(from + 1, wideBytes)
        this.#tagsAt = from + 1 + wideBytes
        from = this.#tagsAt + 4 * this.tagCount
      }
    }
    this.keyAt = from
    this.valueAt = from + this.keyLength
    return this.valueLength >= 0 && this.end <= end
  }

  /** Where it ends. */
  get end(): number {
    return this.valueAt + this.valueLength
  }

  /** Whether it is that of a key. */
  isOf(key: string | Uint8Array, kind: KeyKind, length: number): boolean {
    if (kind !== this.keyKind || length !== this.keyLength) return false
    const { bytes, keyAt } = this
    if (typeof key !== 'string') return bytes.compare(key, 0, length, keyAt, keyAt + length) === 0
    if (kind === KeyKind.Narrow) {
      for (let i = 0; i < length; i++) if (key.charCodeAt(i) !== bytes[keyAt + i]) return false
      return true
    }
    for (let i = 0; i < length; i += 2)
      if (key.charCodeAt(i >>> 1) !== (bytes[keyAt + i]! | (bytes[keyAt + i + 1]! << 8))) return false
    return true
  }

  /** Hash of its n-th tag. */
  tag(n: number): number {
    return this.bytes.readInt32LE(this.#tagsAt + 4 * n)
  }
}

/** Number of records of a page at `bytes[at]`. */
export const recordsIn = (bytes: Buffer, at: number): number => bytes[at]! | (bytes[at + 1]! << 8)
/** Stamp of a page at `bytes[at]`. */
export const stampIn = (bytes: Buffer, at: number): number => bytes.readUInt32LE(at + 4)

/** Writes the beginning of a page. */
export function writeHead(bytes: Buffer, at: number, records: number, stamp: number): void {
  bytes[at] = records
  bytes[at + 1] = records >>> 8
  bytes[at + 2] = 0
  bytes[at + 3] = 0
  bytes.writeUInt32LE(stamp, at + 4)
}

/** Where in a shared page at `bytes[at]` its n-th record begins, from `at` on. */
export const offsetIn = (bytes: Buffer, at: number, record: number): number => {
  const slot = at + pageBytes - 2 * (record + 1)
  return bytes[slot]! | (bytes[slot + 1]! << 8)
}

/** Notes where in a shared page a record begins. */
export function setOffset(bytes: Buffer, at: number, record: number, offset: number): void {
  const slot = at + pageBytes - 2 * (record + 1)
  bytes[slot] = offset
  bytes[slot + 1] = offset >>> 8
}
