/**
 * A device whose pages survive its process: a block device over another one, and beside it a raw image of it in a file.
 *
 * Reads are the device's own. What was changed is dirty, by page of 4 KiB, until it is in the image. `flush` copies all
 * dirty pages there and syncs the file. With `writethrough` each write is in the image (in the operating system's
 * cache) before it is acknowledged, so that it survives the process; `flush` then only syncs. When a device is opened
 * over an image that is there, its pages go into the device first.
 *
 * The image is a page file (@tmem/page-file) without a mark: byte n of it is byte n of the device. It is sparse: pages
 * that were never written take no room, and those that became zeros give theirs back where the file system can do that.
 * It is claimed as long as the device is open.
 *
 * Invariants:
 *  - Each page of the image holds what the device's page held when it was last flushed, or at some time since: never a
 *    mixture, as far as
 *    the process goes. (When power fails, what of the writes since the last flush is there is up to the disk, as with
 *    any disk.)
 *  - Outside of a copy under way, a page of the image that differs from the device's is dirty. A bit is cleared before
 *    its page is read, so a change meanwhile sets it again; it
 *    is also set again when the copy failed.
 *  - A page without a `filled` bit is all zeros in the image, so zeros need not be written there: an image stays
 *    sparse.
 *  - `unsynced` are the pages that were written since the last sync that succeeded began. When a sync fails they all
 *    become dirty, also those that were written while it was under way: the operating system may have given them up,
 *    and no later sync would tell.
 *  - An image that cannot be found by its name any more, or that somebody has cut off, fails the flush. What was cut
 *    off is dirty then.
 *  - Copies and syncs are done one after the other. With `writethrough`, a write to pages that are being copied waits
 *    for the copy.
 */
import { lstatSync, realpathSync } from 'node:fs'
import {
  type Allocator,
  type BlockDevice,
  type ByteAmount,
  bytesOf,
  type Completion,
  checkOptions,
  type StatsNode,
  systemAllocator,
  TmemError,
} from '@tmem/core'
import { PageFile, type PageFileIo } from '@tmem/page-file'
import { pageBytes } from './stack.ts'

/** Settings of a snapshot. */
export interface SnapshotOptions {
  /**
   * The image. It is made when it is not there; one that is smaller than the device grows. A link is followed to the
   * file itself.
   */
  readonly path: string
  /** Acknowledge a write only when it survives the process (default: when it is flushed). */
  readonly writethrough?: boolean
  /**
   * Largest size that `resize` will be asked for (default: the device's size). Half a byte is reserved for each page.
   */
  readonly maxSizeBytes?: ByteAmount
  /** Told how many bytes of the image are in the device. */
  readonly onProgress?: (done: number, total: number) => void
  readonly allocator?: Allocator
  /** The system that has the image (default: this machine's); tests give one that fails. */
  readonly files?: PageFileIo
}

/** Pages that are copied at once. */
const copyPages = 64
const zeros: Uint8Array = new Uint8Array(pageBytes)

/**
 * Fills a device with its image and keeps the image from then on. The device belongs to the snapshot, which closes it,
 * also when this rejects: with `TMEM_IO` (the image cannot be used, or somebody else has it) or `TMEM_NO_MEMORY`. An
 * image that was made is then removed again.
 */
export async function openSnapshot(device: BlockDevice, options: SnapshotOptions): Promise<Snapshot> {
  let made: Snapshot | undefined
  try {
    made = new Snapshot(device, options)
    await made.load(options.onProgress)
    return made
  } catch (error) {
    if (made === undefined) await device.close()
    else await made.abandon()
    throw error
  }
}

/** A set of pages, one bit each. */
class PageSet {
  readonly words: Uint32Array

  constructor(words: Uint32Array) {
    this.words = words
  }

  has(page: number): boolean {
    return (this.words[page >>> 5]! & (1 << (page & 31))) !== 0
  }

  add(from: number, to: number): void {
    for (let page = from; page < to; page++) this.words[page >>> 5]! |= 1 << (page & 31)
  }

  remove(from: number, to: number): void {
    for (let page = from; page < to; page++) this.words[page >>> 5]! &= ~(1 << (page & 31))
  }

  /** The first page of the set in the range, or `to`. */
  next(from: number, to: number): number {
    for (let page = from; page < to; ) {
      const word = this.words[page >>> 5]! & (-1 << (page & 31))
      const base = page - (page & 31)
      if (word !== 0) return Math.min(to, base + 31 - Math.clz32(word & -word))
      page = base + 32
    }
    return to
  }

  addAll({ words }: PageSet): void {
    for (let n = 0; n < words.length; n++) this.words[n]! |= words[n]!
  }

  /** Takes all pages of another set, which is empty then. */
  takeAll(other: PageSet): void {
    this.addAll(other)
    other.words.fill(0)
  }

  /** Pages of the set below `to`. */
  count(to: number): number {
    let pages = 0
    for (let page = this.next(0, to); page < to; page = this.next(page + 1, to)) pages++
    return pages
  }
}

/** A device with an image. Made by `openSnapshot`. */
export class Snapshot implements BlockDevice {
  readonly path: string
  readonly writethrough: boolean
  readonly maxSizeBytes: number
  readonly #device: BlockDevice
  readonly #image: PageFile
  readonly #buffer: Uint8Array
  readonly #dirty: PageSet
  readonly #filled: PageSet
  readonly #unsynced: PageSet
  /** What `unsynced` was when the sync under way began: empty at any other time. */
  readonly #syncing: PageSet
  /** The last of what is done one after the other, and how many of that there are. */
  #turn: Promise<unknown> = Promise.resolve()
  #turns = 0
  /** The flush that has not begun: it serves everybody who asks until then. */
  #nextFlush: Promise<void> | undefined
  /** The pages that are being copied, and when that is over. */
  #copyFrom = 0
  #copyTo = 0
  #copied: Promise<void> = Promise.resolve()
  #resizes = 0
  /** The image is not as long as the device; or it is, and a sync has yet to make that last. */
  #misfit = false
  #refitted = false
  #closing: Promise<void> | undefined
  #flushes = 0
  #loadedPages = 0
  #savedPages = 0
  #failures = 0

  constructor(device: BlockDevice, options: SnapshotOptions) {
    checkOptions('openSnapshot', options, {
      path: 'text',
      writethrough: 'flag?',
      maxSizeBytes: 'bytes?',
      onProgress: 'function?',
      allocator: 'object?',
      files: 'object?',
    })
    const { path, writethrough = false, allocator = systemAllocator, files } = options
    const { sizeBytes, name } = device
    const maxSizeBytes = bytesOf('openSnapshot', 'maxSizeBytes', options.maxSizeBytes ?? sizeBytes)
    if (sizeBytes % pageBytes !== 0 || maxSizeBytes % pageBytes !== 0 || maxSizeBytes < sizeBytes)
      throw new RangeError(
        `the sizes of ${name} must be whole pages of ${pageBytes} bytes, the largest one not the smaller`,
      )
    this.path = path
    this.writethrough = writethrough
    this.maxSizeBytes = maxSizeBytes
    this.#device = device
    const ask = (bytes: number, site: string): ArrayBufferLike => {
      const memory = allocator.allocate(bytes, `snapshot.${site}`)
      if (memory === undefined)
        throw new TmemError('TMEM_NO_MEMORY', `snapshot ${path}: no memory for its ${site} (${bytes} bytes)`, {
          layer: 'snapshot',
        })
      return memory
    }
    const words = Math.ceil(maxSizeBytes / pageBytes / 32)
    const sets = ask(words * 16, 'sets')
    const set = (n: number): PageSet => new PageSet(new Uint32Array(sets, n * words * 4, words))
    this.#dirty = set(0)
    this.#filled = set(1)
    this.#unsynced = set(2)
    this.#syncing = set(3)
    this.#buffer = new Uint8Array(ask(copyPages * pageBytes, 'buffer'))
    this.#image = PageFile.open({
      // The file itself, where a link leads to it: it is what is claimed, and looked for later.
      path: files === undefined ? fileOf(path) : path,
      mode: 'plain',
      bytes: sizeBytes,
      keep: true,
      through: 'cache',
      layer: 'snapshot',
      allocator,
      ...(files === undefined ? {} : { files }),
    })
  }

  get name(): string {
    return this.#device.name
  }

  get sizeBytes(): number {
    return this.#device.sizeBytes
  }

  get blockSize(): number {
    return this.#device.blockSize
  }

  get preferredBlockSize(): number {
    return this.#device.preferredBlockSize
  }

  get readOnly(): boolean {
    return this.#device.readOnly
  }

  /** Puts the image's pages into the device. For `openSnapshot`. */
  async load(onProgress?: (done: number, total: number) => void): Promise<void> {
    const { bytes: total } = this.#image
    if (total > this.sizeBytes)
      throw this.#error(
        `it has ${total} bytes, more than the ${this.sizeBytes} of device ${this.name}: give the device its size, or name another image`,
      )
    if (total % pageBytes !== 0)
      throw this.#error(`it has ${total} bytes, which are no whole pages of ${pageBytes}: it is no image of a device`)
    if (total < this.sizeBytes) this.#fit()
    // The length of a new one is yet to last.
    if (this.#image.found === 'nothing') this.#refitted = true
    let done = 0
    // Holes are not read.
    for (const [position, length] of this.#image.dataExtents()) {
      if (position >= total) break
      const end = Math.min(total, Math.ceil((position + length) / pageBytes) * pageBytes)
      // The file system's blocks may be smaller than pages.
      for (let at = Math.max(done, position - (position % pageBytes)); at < end; at = done) {
        done = Math.min(end, at + this.#buffer.length)
        await this.#loadPart(at, done - at)
        onProgress?.(done, total)
      }
    }
    onProgress?.(total, total)
  }

  async #loadPart(at: number, length: number): Promise<void> {
    const bytes = this.#buffer.subarray(0, length)
    try {
      await this.#image.read(bytes, 0, length, at)
    } catch (error) {
      throw this.#failed('read', error, at)
    }
    const first = at / pageBytes
    const end = first + length / pageBytes
    const isFilled = (page: number): boolean => !isZero(bytes, page - first)
    for (let from = runFrom(first, end, isFilled); from < end; ) {
      const to = runEnd(from, end, isFilled)
      this.#filled.add(from, to)
      this.#loadedPages += to - from
      await this.#device.write(from * pageBytes, bytes.subarray((from - first) * pageBytes, (to - first) * pageBytes))
      from = runFrom(to, end, isFilled)
    }
  }

  /** Closes without a flush, where nothing was acknowledged yet: an image that was made is removed again. */
  async abandon(): Promise<void> {
    const remove = this.#image.found === 'nothing'
    this.#closing ??= this.#end(() => Promise.resolve(), remove)
    await this.#closing
  }

  read(at: number, into: Uint8Array): Completion {
    return this.#device.read(at, into)
  }

  write(at: number, bytes: Uint8Array): Completion {
    return this.#change(at, bytes.length, () => this.#device.write(at, bytes), bytes)
  }

  discard(at: number, length: number): Completion {
    return this.#change(at, length, () => this.#device.discard(at, length))
  }

  zero(at: number, length: number, keep?: boolean): Completion {
    return this.#change(at, length, () => this.#device.zero(at, length, keep))
  }

  flush(): Completion {
    if (this.#closing !== undefined) return Promise.reject(this.#closedError())
    const { sizeBytes } = this
    const idle = this.#turns === 0 && !this.#misfit && !this.#refitted
    if (idle && !anyOf(this.#dirty, sizeBytes) && !anyOf(this.#unsynced, sizeBytes)) {
      const failure = this.#lookFor()
      return failure === undefined ? undefined : Promise.reject(failure)
    }
    this.#nextFlush ??= this.#inTurn(() => {
      this.#nextFlush = undefined
      return this.#flush()
    })
    return this.#nextFlush
  }

  map(at: number, length: number, report: (length: number, allocated: boolean) => boolean): void {
    this.#device.map(at, length, report)
  }

  /** As the device's own, up to `maxSizeBytes`. The image gets the same size. */
  resize(sizeBytes: number): void {
    const { sizeBytes: before } = this
    const device = this.#device
    if (device.resize === undefined)
      throw new TmemError('TMEM_UNSUPPORTED', `device ${this.name} keeps its size`, { layer: 'snapshot' })
    if (sizeBytes > this.maxSizeBytes)
      throw new RangeError(`${this.name} was made for at most ${this.maxSizeBytes} bytes, not ${sizeBytes}`)
    device.resize(sizeBytes)
    this.#resizes++
    try {
      this.#fit()
    } catch (error) {
      this.#misfit = true
      if (sizeBytes > before) {
        device.resize(before)
        throw error
      }
      // Smaller it is. What could not be cut off is overwritten with zeros if the device grows again; the next flush
      // tries again, or fails.
      const first = sizeBytes / pageBytes
      this.#dirty.add(first, before / pageBytes)
      this.#filled.add(first, before / pageBytes)
    }
  }

  stats(): StatsNode {
    const stats = this.#device.stats()
    const pages = this.sizeBytes / pageBytes
    const counters = {
      image_bytes: this.sizeBytes,
      writethrough: this.writethrough ? 1 : 0,
      dirty_pages: this.#dirty.count(pages),
      unsynced_pages: this.#unsynced.count(pages),
      filled_pages: this.#filled.count(pages),
      loaded_pages: this.#loadedPages,
      saved_pages: this.#savedPages,
      flushes: this.#flushes,
      failures: this.#failures,
    }
    return { ...stats, children: [...stats.children, { name: 'snapshot', counters, children: [] }] }
  }

  /** Flushes, then closes all. Rejects when the flush failed: then the image is as it was flushed before, or newer. */
  close(): Promise<void> {
    this.#closing ??= this.#end(() => this.#inTurn(() => this.#flush()))
    return this.#closing
  }

  async #end(flush: () => Promise<void>, remove = false): Promise<void> {
    const errors: unknown[] = []
    for (const step of [flush, () => this.#device.close(), () => this.#image.close({ remove })])
      await step().catch((error: unknown) => errors.push(error))
    if (errors.length > 0) throw errors[0]
  }

  /** Changes pages of the device. Those of `bytes`, if they were written at once, can go into the image as they are. */
  #change(at: number, length: number, change: () => Completion, bytes?: Uint8Array): Completion {
    if (this.#closing !== undefined) return Promise.reject(this.#closedError())
    const from = Math.floor(at / pageBytes)
    const to = Math.ceil((at + length) / pageBytes)
    const { writethrough } = this
    if (writethrough && from < this.#copyTo && to > this.#copyFrom)
      return this.#copied.then(() => this.#change(at, length, change, bytes))
    const changed = (): void => this.#dirty.add(from, Math.min(to, this.maxSizeBytes / pageBytes))
    let completion: Completion
    try {
      completion = change()
    } catch (error) {
      // Misuse changed nothing.
      if (!(error instanceof RangeError)) changed()
      throw error
    }
    if (completion !== undefined)
      return completion.then(
        () => {
          changed()
          return writethrough ? this.#inTurn(() => this.#copy(from, to)) : undefined
        },
        (error: unknown) => {
          changed()
          throw error
        },
      )
    // A page that is dirty after a failure is copied whole: a part of it would make a mixture.
    if (!writethrough || bytes === undefined || this.#dirty.next(from, to) < to) {
      changed()
      return writethrough && length > 0 ? this.#inTurn(() => this.#copy(from, to)) : undefined
    }
    this.#touched(from, to)
    try {
      this.#image.writeNow(bytes, 0, length, at)
    } catch (error) {
      changed()
      return Promise.reject(this.#failed('written', error, at))
    }
    this.#savedPages += to - from
    return undefined
  }

  /** Does a job after those before it. */
  #inTurn(job: () => Promise<void>): Promise<void> {
    this.#turns++
    const done = this.#turn.then(job).finally(() => {
      this.#turns--
    })
    // How one ends is told to who asked for it, and is nothing to the next.
    this.#turn = done.catch(() => undefined)
    return done
  }

  async #flush(): Promise<void> {
    this.#flushes++
    const failure = this.#lookFor()
    if (failure !== undefined) throw failure
    if (this.#misfit) this.#fit()
    await this.#copy(0, Number.POSITIVE_INFINITY)
    // All that a failed sync may have lost was dirty, and is written now.
    this.#image.restored()
    this.#syncing.takeAll(this.#unsynced)
    this.#refitted = false
    try {
      await this.#image.sync()
      this.#syncing.words.fill(0)
    } catch (error) {
      this.#refitted = true
      this.#unsynced.takeAll(this.#syncing)
      this.#dirty.addAll(this.#unsynced)
      this.#filled.addAll(this.#unsynced)
      throw this.#failed('synced', error)
    }
  }

  /**
   * Why the image is not what it has to be, if that is so: it cannot be found, or somebody has cut it off; what was
   * there is dirty then.
   */
  #lookFor(): Error | undefined {
    const image = this.#image
    try {
      const first = Math.floor(image.presentBytes / pageBytes)
      const end = Math.min(image.bytes, this.sizeBytes) / pageBytes
      if (first < end) {
        this.#dirty.add(first, end)
        this.#filled.add(first, end)
        // The length is put right by the flush that has been told of it.
        if (this.#misfit) return undefined
        this.#misfit = true
      }
      image.checkThere()
      return undefined
    } catch (error) {
      return this.#failed('looked for', error)
    }
  }

  /** Copies the dirty pages of a range into the image: all of those that can be; then throws what went wrong first. */
  async #copy(from: number, to: number): Promise<void> {
    let failure: unknown
    const end = (): number => Math.min(to, this.sizeBytes / pageBytes)
    for (let page = this.#dirty.next(from, end()); page < end(); page = this.#dirty.next(page, end())) {
      const last = runEnd(page, Math.min(end(), page + copyPages), (n) => this.#dirty.has(n))
      const error = await this.#copyRun(page, last)
      // One page may have spoilt it for all.
      for (let n = page; error !== undefined && n < last; n++) {
        const alone = last - page === 1 ? error : await this.#copyRun(n, n + 1)
        failure ??= alone
      }
      page = last
    }
    if (this.#misfit) this.#fit()
    if (failure !== undefined) throw failure
  }

  /** Copies pages side by side; answers what went wrong. */
  async #copyRun(from: number, to: number): Promise<unknown> {
    if (!this.#dirty.has(from) || to * pageBytes > this.sizeBytes) return undefined
    const { promise, resolve } = settled()
    this.#copied = promise
    this.#copyFrom = from
    this.#copyTo = to
    this.#dirty.remove(from, to)
    const resizes = this.#resizes
    try {
      await this.#save(from, to)
      return undefined
    } catch (error) {
      this.#dirty.add(from, to)
      // What was cut off meanwhile is nobody's any more.
      return from * pageBytes < this.sizeBytes ? error : undefined
    } finally {
      if (this.#resizes !== resizes) {
        // What was cut off meanwhile may have been written behind the end, and what grew again needs its zeros.
        this.#dirty.add(from, to)
        this.#filled.add(from, to)
        this.#misfit = true
      }
      this.#copyFrom = 0
      this.#copyTo = 0
      resolve()
    }
  }

  async #save(from: number, to: number): Promise<void> {
    const bytes = this.#buffer.subarray(0, (to - from) * pageBytes)
    await this.#device.read(from * pageBytes, bytes)
    const isWanted = (page: number): boolean => this.#filled.has(page) || !isZero(bytes, page - from)
    let page = runFrom(from, to, isWanted)
    // Without anything to wait for, everybody else would wait.
    if (page === to) await new Promise((resolve) => setImmediate(resolve))
    while (page < to) {
      const zeros = isZero(bytes, page - from)
      const end = runEnd(page, to, (each) => isWanted(each) && isZero(bytes, each - from) === zeros)
      const at = page * pageBytes
      const length = (end - page) * pageBytes
      this.#touched(page, end)
      try {
        // Where no room can be given back, zeros are written.
        if (!zeros || !(await this.#image.punch(at, length)))
          await this.#image.write(bytes, (page - from) * pageBytes, length, at)
      } catch (error) {
        throw this.#failed('written', error, at)
      }
      this.#savedPages += end - page
      if (zeros) this.#filled.remove(page, end)
      page = runFrom(end, to, isWanted)
    }
  }

  /** Pages are about to change in the image. Where that fails, nobody knows what is there. */
  #touched(from: number, to: number): void {
    this.#filled.add(from, to)
    this.#unsynced.add(from, to)
  }

  /** Gives the image the size of the device. */
  #fit(): void {
    this.#refitted = true
    try {
      this.#image.resize(this.sizeBytes)
    } catch (error) {
      throw this.#failed('given another size', error)
    }
    this.#misfit = false
    const first = this.sizeBytes / pageBytes
    const last = this.maxSizeBytes / pageBytes
    this.#dirty.remove(first, last)
    this.#filled.remove(first, last)
  }

  /**
   * Counts a failure of the image. The system's own error says why; where there is none, the file says what is wrong.
   */
  #failed(what: string, error: unknown, at?: number): Error {
    this.#failures++
    const { cause } = error as Error
    if (!(cause instanceof Error)) return error as Error
    return this.#error(`it cannot be ${what}${at === undefined ? '' : ` at ${at}`}: ${cause.message}`, cause)
  }

  #error(what: string, cause?: Error): TmemError {
    return new TmemError('TMEM_IO', `snapshot ${this.path}: ${what}`, { layer: 'snapshot', cause })
  }

  #closedError(): TmemError {
    return new TmemError('TMEM_CLOSED', `device ${this.name} is closed`, { layer: 'snapshot' })
  }
}

/** The file that a path leads to, through links; the path itself where there is nothing. */
function fileOf(path: string): string {
  const link = lstatSync(path, { throwIfNoEntry: false })?.isSymbolicLink() === true
  try {
    return link ? realpathSync(path) : path
  } catch (error) {
    throw new TmemError('TMEM_IO', `snapshot ${path}: the link leads nowhere: ${(error as Error).message}`, {
      layer: 'snapshot',
      cause: error,
    })
  }
}

/** Whether page `n` of some bytes is zeros. */
const isZero = (bytes: Uint8Array, n: number): boolean =>
  Buffer.prototype.compare.call(bytes, zeros, 0, pageBytes, n * pageBytes, (n + 1) * pageBytes) === 0

/** The first page of the range that matches, or `to`. */
function runFrom(from: number, to: number, matches: (page: number) => boolean): number {
  let page = from
  while (page < to && !matches(page)) page++
  return page
}

/** The first page behind `from` that does not match, or `to`. */
const runEnd = (from: number, to: number, matches: (page: number) => boolean): number =>
  runFrom(from + 1, to, (page) => !matches(page))

const anyOf = (set: PageSet, sizeBytes: number): boolean => {
  const pages = sizeBytes / pageBytes
  return set.next(0, pages) < pages
}

function settled(): { promise: Promise<void>; resolve: () => void } {
  let resolve: () => void = () => undefined
  const promise = new Promise<void>((done) => {
    resolve = done
  })
  return { promise, resolve }
}
