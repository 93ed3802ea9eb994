/**
 * Deletion of entries by tag, without a list of the entries of a tag: an entry is deleted if one of its tags was
 * deleted after the entry was written. The last deletion of each tag is remembered, for a limited number of tags;
 * beyond it, every older entry with tags counts as deleted.
 *
 * A hash stands for a tag: a collision deletes too much, never too little.
 */
import type { RecordView } from './records.ts'

/** Deleted tags that are remembered. */
const maxDeleted = 16384
/** Bytes of one, at most: three words, a bucket's half, and that the map grows by doubling. */
const deletedBytes = 56

export class Tags {
  /** The number of the last write of an entry with tags. */
  sequence = 0
  /** Entries with tags that were written up to here are gone. */
  floor = 0
  /** By hash of the tag: the last write when it was deleted. */
  readonly deleted: Map<number, number> = new Map()

  /** Bytes of what is remembered. */
  get bytes(): number {
    return this.deleted.size * deletedBytes
  }

  delete(tag: number): void {
    if (this.deleted.size === maxDeleted && !this.deleted.has(tag)) {
      this.deleted.clear()
      this.floor = this.sequence
    } else this.deleted.set(tag, this.sequence)
  }

  /** Whether the entry of a record was deleted by a tag. */
  hasDeleted(record: RecordView): boolean {
    if (record.tagCount === 0) return false
    if (record.sequence <= this.floor) return true
    if (this.deleted.size === 0) return false
    for (let n = 0; n < record.tagCount; n++) {
      const until = this.deleted.get(record.tag(n))
      if (until !== undefined && record.sequence <= until) return true
    }
    return false
  }

  clear(): void {
    this.deleted.clear()
  }
}
