/**
 * The file to which a zcache writes cold persistent pages back: compressed as they are, many to a write.
 *
 * The file is a row of clusters of 128 KiB. A write fills one free cluster with as many pages as fit; a cluster is free
 * again when none of its pages is needed any more. There is one write and one read under way at a time, with a buffer each
 * that was reserved at the start: so the memory is bounded, and pages need no lock (what changes while it is being
 * written is simply not counted as written).
 *
 * Nothing is lost by a failing device: a page is given up in memory only after its cluster was written whole. After a
 * failure the file rests for a number of attempts that doubles from failure to failure. A page is checked against the
 * checksum that stayed in memory when it comes back.
 *
 * The content is worth nothing to the next process: tmem is memory, not storage. The file is emptied when it is opened.
 *
 * Source: zram's writeback (backing device, limit of what is written, counters in units of 4 KiB).
 */
import { closeSync, ftruncateSync, openSync, read, write } from 'node:fs'
import type { Allocator } from '@tmem/core'
import { TmemError } from '@tmem/core'
import { type ByteBudget, none } from './arena.ts'
import { copyBytes } from './bytes.ts'

/** What a file can do; calls back once, with the number of bytes. Replaceable, so that it can fail in tests. */
export interface WritebackDevice {
  write(bytes: Uint8Array, length: number, position: number, done: (error: Error | null, bytes: number) => void): void
  read(bytes: Uint8Array, length: number, position: number, done: (error: Error | null, bytes: number) => void): void
  close(): void
}

/** Settings of writing back. */
export interface WritebackOptions {
  /** Path of the file (created, or emptied), or a device. */
  readonly file: string | WritebackDevice
  /** Bytes of the file: at least 128 KiB, at most 256 GiB. */
  readonly sizeBytes: number
  /** Pages are written while what is live is above this share of the byte limit: percent, 1 to 100 (default 80). */
  readonly startPercent?: number
  /** At most so many bytes are written in any hour, to protect flash (default: no limit). Needs `clock`. */
  readonly bytesPerHour?: number
  /** Milliseconds, from any start, never going back. */
  readonly clock?: () => number
}

export const clusterBytes: number = 128 * 1024
const unitBytes = 64
const unitsPerCluster = clusterBytes / unitBytes
const maxClusters = 2 ** 32 / unitsPerCluster
const maxRest = 1024
const hourMs = 3_600_000

/** Opens a path for writing back. Throws `TmemError` (`TMEM_IO`). */
export function openDevice(path: string): WritebackDevice {
  let fd: number
  try {
    fd = openSync(path, 'w+', 0o600)
  } catch (error) {
    throw ioError(`cannot open ${path} to write pages back: ${String(error)}`, error)
  }
  return {
    write: (bytes, length, position, done) => write(fd, bytes, 0, length, position, done),
    read: (bytes, length, position, done) => read(fd, bytes, 0, length, position, done),
    close: () => {
      ftruncateSync(fd, 0)
      closeSync(fd)
    },
  }
}

const ioError = (message: string, cause: unknown): TmemError =>
  new TmemError('TMEM_IO', `zcache: ${message}`, { layer: 'zcache', cause })

export class Writeback {
  /** Bytes of memory that it holds. */
  readonly memoryBytes: number
  readonly startPercent: number
  /** The last page that was read. */
  readonly page: Uint8Array
  /** Clusters without a page, and not being written. */
  freeClusters: number
  pages = 0
  writes = 0
  reads = 0
  writtenBytes = 0
  failedWrites = 0
  failedReads = 0
  readonly #device: WritebackDevice
  readonly #clusters: number
  readonly #cluster: Uint8Array
  readonly #live: Int32Array
  readonly #entries: Int32Array
  readonly #places: Float64Array
  readonly #bytesPerHour: number
  readonly #clock: () => number
  #count = 0
  #filled = 0
  #current = none
  #search = 0
  #writing: Promise<void> | undefined
  #reading: Promise<unknown> = Promise.resolve()
  /** Attempts still to be skipped after a failure, and how many the next failure costs. */
  #rest = 0
  #nextRest = 1
  /** Bytes of the hour's budget that are left, and when that was so. */
  #allowance: number
  #allowanceAt: number
  #closed = false

  /** Takes its memory out of the budget. Throws `TmemError` when there is none, or the file cannot be opened. */
  constructor(options: WritebackOptions, maxBlockBytes: number, allocator: Allocator, budget: ByteBudget) {
    this.startPercent = options.startPercent ?? 80
    this.#clusters = Math.floor(options.sizeBytes / clusterBytes)
    this.freeClusters = this.#clusters
    this.#bytesPerHour = options.bytesPerHour ?? Number.POSITIVE_INFINITY
    this.#clock = options.clock ?? (() => 0)
    this.#allowance = this.#bytesPerHour
    this.#allowanceAt = this.#clock()
    const tables = this.#clusters * 4 + unitsPerCluster * 12
    this.memoryBytes = clusterBytes + maxBlockBytes + tables
    const memory = allocator.allocate(this.memoryBytes, 'zcache.writeback')
    if (memory === undefined || !budget.take(this.memoryBytes))
      throw new TmemError('TMEM_NO_MEMORY', `zcache: no memory to write pages back (${this.memoryBytes} bytes)`, {
        layer: 'zcache',
      })
    this.#cluster = new Uint8Array(memory, 0, clusterBytes)
    this.page = new Uint8Array(memory, clusterBytes, maxBlockBytes)
    let at = clusterBytes + maxBlockBytes
    this.#places = new Float64Array(memory, at, unitsPerCluster)
    at += unitsPerCluster * 8
    this.#entries = new Int32Array(memory, at, unitsPerCluster)
    at += unitsPerCluster * 4
    this.#live = new Int32Array(memory, at, this.#clusters)
    this.#device = typeof options.file === 'string' ? openDevice(options.file) : options.file
  }

  /** Whether pages can be added now: nothing under way, a free cluster, the hour's budget not used up, no rest. */
  begin(): boolean {
    if (this.#writing !== undefined || this.freeClusters === 0 || this.#closed) return false
    if (this.#rest > 0) {
      this.#rest--
      return false
    }
    if (this.#bytesPerHour !== Number.POSITIVE_INFINITY) {
      const now = this.#clock()
      const earned = (this.#bytesPerHour / hourMs) * (now - this.#allowanceAt)
      this.#allowance = Math.min(this.#bytesPerHour, this.#allowance + earned)
      this.#allowanceAt = now
    }
    if (this.#allowance < clusterBytes) return false
    this.#count = 0
    this.#filled = 0
    return true
  }

  /** Adds the page of an entry to the cluster; false when it is full. */
  add(entry: number, bytes: Uint8Array, at: number, size: number): boolean {
    if (this.#filled + size > clusterBytes) return false
    copyBytes(bytes, at, size, this.#cluster, this.#filled)
    this.#entries[this.#count] = entry
    this.#places[this.#count] = this.#filled / unitBytes
    this.#count++
    this.#filled += Math.ceil(size / unitBytes) * unitBytes
    return true
  }

  /**
   * Writes what was added, if anything. Afterwards `written(entry, location)` is called for each entry and answers whether the
   * page is still wanted there, or `failed(entry)` for each.
   */
  submit(written: (entry: number, location: number) => boolean, failed: (entry: number) => void): void {
    if (this.#count === 0) return
    while (this.#live[this.#search] !== 0) this.#search = (this.#search + 1) % this.#clusters
    const cluster = this.#search
    this.#current = cluster
    this.#search = (this.#search + 1) % this.#clusters
    // Nobody may take the cluster meanwhile.
    this.#live[cluster] = 1
    this.freeClusters--
    const length = this.#filled
    this.#allowance -= length
    this.#writing = new Promise((resolve) => {
      this.#device.write(this.#cluster, length, cluster * clusterBytes, (error, bytes) => {
        this.#writing = undefined
        this.#current = none
        this.#live[cluster] = 0
        const whole = error === null && bytes === length
        if (whole) {
          this.writes++
          this.writtenBytes += length
          this.#nextRest = 1
        } else {
          this.failedWrites++
          this.#rest = this.#nextRest
          this.#nextRest = Math.min(maxRest, this.#nextRest * 2)
        }
        let live = 0
        for (let i = 0; i < this.#count; i++) {
          const entry = this.#entries[i]!
          if (!whole) failed(entry)
          else if (written(entry, cluster * unitsPerCluster + this.#places[i]!)) live++
        }
        this.#live[cluster] = live
        this.pages += live
        if (live === 0) this.freeClusters++
        resolve()
      })
    })
  }

  /** The page at that location is not needed any more. */
  release(location: number): void {
    const cluster = Math.floor(location / unitsPerCluster)
    this.pages--
    this.#live[cluster] = this.#live[cluster]! - 1
    if (this.#live[cluster] === 0) this.freeClusters++
  }

  /**
   * Reads a page of `size` bytes, lets `use` look at it in `page`, and resolves to what that returns. Reads are one after
   * the other. Rejects with `TmemError` (`TMEM_IO`).
   */
  read<T>(location: number, size: number, use: () => T): Promise<T> {
    const next = this.#reading.then(
      () =>
        new Promise<T>((resolve, reject) => {
          const position =
            Math.floor(location / unitsPerCluster) * clusterBytes + (location % unitsPerCluster) * unitBytes
          this.#device.read(this.page, size, position, (error, bytes) => {
            if (error !== null || bytes !== size) {
              this.failedReads++
              const why = error === null ? `only ${bytes} of ${size} bytes are there` : error.message
              reject(ioError(`cannot read a page that was written back: ${why}`, error))
              return
            }
            this.reads++
            try {
              resolve(use())
            } catch (thrown) {
              reject(thrown)
            }
          })
        }),
    )
    // The next reader waits for this one; its failure is this reader's alone.
    this.#reading = next.then(
      () => undefined,
      () => undefined,
    )
    return next
  }

  /** Waits for what is under way and closes the file. */
  async close(): Promise<void> {
    this.#closed = true
    await this.#writing
    await this.#reading
    this.#device.close()
  }

  counters(): Record<string, number> {
    return {
      bd_count: this.pages,
      bd_reads: this.reads,
      bd_writes: Math.ceil(this.writtenBytes / 4096),
      written_bytes: this.writtenBytes,
      cluster_writes: this.writes,
      failed_writes: this.failedWrites,
      failed_reads: this.failedReads,
      clusters: this.#clusters,
      free_clusters: this.freeClusters,
      writing: this.#writing === undefined ? 0 : 1,
    }
  }

  /** Throws an `Error` when the clusters do not hold as many pages as `locations` says. */
  check(locations: readonly number[]): void {
    const live = new Int32Array(this.#clusters)
    for (const location of locations) live[Math.floor(location / unitsPerCluster)]!++
    let free = 0
    for (let cluster = 0; cluster < this.#clusters; cluster++) {
      const expected = cluster === this.#current ? 1 : live[cluster]!
      if (this.#live[cluster] !== expected)
        throw new Error(`writeback: cluster ${cluster} has ${live[cluster]} pages, counted ${this.#live[cluster]}`)
      if (expected === 0) free++
    }
    if (free !== this.freeClusters) throw new Error(`writeback: ${free} free clusters, counted ${this.freeClusters}`)
    if (locations.length !== this.pages) throw new Error(`writeback: ${locations.length} pages, counted ${this.pages}`)
  }
}

/** Throws `RangeError` for settings that make no sense. */
export function assertWriteback(options: WritebackOptions): void {
  const { sizeBytes, startPercent = 80, bytesPerHour, clock } = options
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < clusterBytes || sizeBytes > maxClusters * clusterBytes)
    throw new RangeError(
      `writeback needs a size from ${clusterBytes} to ${maxClusters * clusterBytes} bytes, got ${sizeBytes}`,
    )
  if (!Number.isInteger(startPercent) || startPercent < 1 || startPercent > 100)
    throw new RangeError(`startPercent must be an integer from 1 to 100, got ${startPercent}`)
  if (bytesPerHour === undefined) return
  if (!(bytesPerHour >= clusterBytes))
    throw new RangeError(`bytesPerHour must be at least ${clusterBytes}: what one write takes; got ${bytesPerHour}`)
  if (clock === undefined) throw new TypeError('bytesPerHour needs a clock')
}
