/**
 * Moving bytes between memory and an open file: whole ranges or an error, however the system takes them.
 *
 * Around the system's cache (`O_DIRECT`) the system wants whole blocks and memory that is aligned for the device, and
 * JavaScript cannot see addresses. So the first aligned place in a piece of memory is found by trying: at every
 * multiple of 16 bytes (the allocator's alignment) until the system takes it. Whole blocks move straight from and to
 * memory that was reserved here. Everything else goes through buffers of our own, so the caller's range and memory may
 * lie as they like: a read fetches the blocks around it, a write of parts of blocks reads those first. (Measured: the
 * copy of 128 KiB costs 10 to 15 µs, its direct write 65 to 80.) What lies behind the last whole block of the file goes
 * through the cache.
 *
 * Invariants:
 *  - Writes, and punches, that touch the same block are done in the order in which they were asked for; so what a write
 *    puts
 *    back around its range is what is there. Nothing orders reads: one that meets a write may see a mixture.
 *  - At most as many transfers are under way as there are buffers; who comes later waits in turn. Nothing is allocated
 *    for them but their
 *    promises.
 *  - A write that was acknowledged has reported its errors, unless writes end in the cache (`late`): then a sync
 *    reports them. Where a
 *    sync has to follow each write, those that come together share one; one that fails fails all writes that were under
 *    way.
 *
 * Source: open(2), NOTES on O_DIRECT; fdatasync(2), and what a failed one leaves: pages that count as clean.
 */
import { type Allocator, type ByteAmount, bytesOf, checkOptions, systemAllocator, TmemError } from '@tmem/core'
import { blockBytes, hasCode } from './claim.ts'
import type { PageFileIo } from './system.ts'

/** Settings of `TransferBuffers`. */
export interface TransferBuffersOptions {
  /** Bytes of each: the largest direct transfer, a multiple of 4096 (default: 128 KiB). */
  readonly bytes?: ByteAmount
  /**
   * How many transfers there can be at the same time: 1 to 1024 (default: 4). Those that block have one more buffer of
   * their own.
   */
  readonly count?: number
  readonly allocator?: Allocator
}

/** Memory is aligned to this at least. */
const allocatorAlignment = 16

/** Reserved memory for direct transfers. Several files of one thread can share it. */
export class TransferBuffers {
  /** The largest direct transfer. */
  readonly bytes: number
  readonly count: number
  /** For transfers that block: there is one at a time. */
  readonly blocking: Uint8Array
  readonly #free: Uint8Array[]
  readonly #waiting: ((buffer: Uint8Array) => void)[] = []

  /** Throws `TmemError` (`TMEM_NO_MEMORY`) when there is none. */
  constructor(options: TransferBuffersOptions = {}) {
    checkOptions('TransferBuffers', options, { bytes: 'bytes?', count: 'number?', allocator: 'object?' })
    const { count = 4, allocator = systemAllocator } = options
    const bytes = bytesOf('TransferBuffers', 'bytes', options.bytes ?? 128 * 1024)
    if (!Number.isSafeInteger(bytes) || bytes < blockBytes || bytes % blockBytes !== 0)
      throw new RangeError(`the size of a transfer buffer must be a positive multiple of ${blockBytes}, got ${bytes}`)
    if (!Number.isInteger(count) || count < 1 || count > 1024)
      throw new RangeError(`the number of transfer buffers must be an integer from 1 to 1024, got ${count}`)
    this.bytes = bytes
    this.count = count
    // The aligned place in a buffer is somewhere in its first block.
    const each = bytes + blockBytes
    const memory = allocator.allocate(each * (count + 1), 'pageFile.buffers')
    if (memory === undefined)
      throw new TmemError('TMEM_NO_MEMORY', `no memory for the buffers of a file (${each * (count + 1)} bytes)`, {
        layer: 'page-file',
      })
    const all = Array.from({ length: count + 1 }, (_, n) => new Uint8Array(memory, n * each, each))
    this.blocking = all[0]!
    this.#free = all.slice(1)
  }

  /** A buffer that nobody else uses, as soon as there is one. */
  take(): Uint8Array | Promise<Uint8Array> {
    return this.#free.pop() ?? new Promise((resolve) => this.#waiting.push(resolve))
  }

  give(buffer: Uint8Array): void {
    const next = this.#waiting.shift()
    if (next === undefined) this.#free.push(buffer)
    else next(buffer)
  }
}

/**
 * What was moved, since the file was opened. Transfers are the system's: a write of part of a block has a read, too.
 */
export interface PageFileCounters {
  reads: number
  writes: number
  readBytes: number
  writtenBytes: number
  syncs: number
  /** Bytes given back. */
  punchedBytes: number
  /** Transfers, and syncs, that failed. */
  readErrors: number
  writeErrors: number
  syncErrors: number
}

/** An open file, for `Transfers`. */
export interface TransferTarget {
  readonly io: PageFileIo
  /** The descriptor that goes through the system's cache. */
  readonly cached: number
  /** The one that goes around it, if there is one. */
  readonly direct: number | undefined
  /** Bytes of the file. */
  readonly bytes: number
  /** Whether errors of a write through the cache may come later; then each one is synced before it is acknowledged. */
  readonly secure: boolean
  readonly buffers: TransferBuffers
  /** True: all transfers are done in the calling thread, which waits. */
  readonly blocking: boolean
}

/** One transfer of the system. */
interface Step {
  readonly write: boolean
  readonly direct: boolean
  readonly memory: Uint8Array
  readonly at: number
  readonly length: number
  readonly position: number
}

/**
 * Transfers to be done, each answered with the bytes that it moved, or `refused`: so that one text serves those that
 * wait and those that block. At the end: whether anything was written into the system's cache.
 */
type Steps = Generator<Step, boolean, number>

/** Smallest sector of disks. */
const sectorBytes = 512

/** The answer to a direct transfer that the system does not take as it lies. */
const refused = -1

/** A change of blocks that is under way, or waits for others. */
interface Change {
  readonly from: number
  readonly to: number
  readonly done: Promise<void>
}

const floor = (position: number): number => position - (position % blockBytes)
const ceil = (position: number): number => floor(position + blockBytes - 1)

export class Transfers {
  readonly counters: PageFileCounters = {
    reads: 0,
    writes: 0,
    readBytes: 0,
    writtenBytes: 0,
    syncs: 0,
    punchedBytes: 0,
    readErrors: 0,
    writeErrors: 0,
    syncErrors: 0,
  }
  /** Bytes of the file. */
  bytes: number
  /** Why what was acknowledged since the last good sync may be lost. */
  lost: unknown
  readonly #target: TransferTarget
  readonly #io: PageFileIo
  readonly #buffers: TransferBuffers
  readonly #secure: boolean
  readonly #blocking: boolean
  /** Whether transfers go around the cache. */
  #direct: boolean
  /** Where in a buffer direct transfers begin. */
  #offset = 0
  /** What direct reads are of whole ones of: found by the first that is refused. */
  #sector: number = sectorBytes
  /** Memory that begins at an aligned place. */
  readonly #aligned: Set<Uint8Array> = new Set()
  /** Changes of blocks, in the order in which they were asked for. */
  readonly #changes: Set<Change> = new Set()
  #active = 0
  #whenQuiet: (() => void) | undefined
  /** Something was acknowledged since the last good sync began. */
  #unsynced = false
  #failedSyncs = 0
  #syncing = false
  /** The sync under way, and the one that begins after it and serves all who ask until then. */
  #sync: Promise<unknown> = Promise.resolve()
  #nextSync: Promise<void> | undefined

  constructor(target: TransferTarget) {
    this.#target = target
    this.#io = target.io
    this.#buffers = target.buffers
    this.#direct = target.direct !== undefined
    this.#secure = target.secure
    this.#blocking = target.blocking
    this.bytes = target.bytes
  }

  /** True when the operating system's cache is bypassed. */
  get direct(): boolean {
    return this.#direct
  }

  /** Whether any transfer is under way. */
  get busy(): boolean {
    return this.#active > 0
  }

  /** Finds the aligned place by reading the first block, so that later transfers need not. Blocks. */
  align(): void {
    if (!this.#direct || this.bytes < blockBytes) return
    // A short file, or a hole, would be read at any place; then the first transfer that is refused goes on searching.
    this.#doNow(this.#reading(this.#buffers.blocking, new Uint8Array(blockBytes), 0, blockBytes, 0))
  }

  /** Memory between which and the file whole blocks move without a copy; `undefined` when there is none. Blocks. */
  reserve(bytes: number, allocator: Allocator): Uint8Array | undefined {
    // Its aligned place is somewhere in its first block.
    const memory = allocator.allocate(bytes + blockBytes, 'pageFile.memory')
    if (memory === undefined) return undefined
    for (
      let offset = 0;
      this.#direct && this.bytes >= blockBytes && offset < blockBytes;
      offset += allocatorAlignment
    ) {
      const aligned = new Uint8Array(memory, offset, bytes)
      const step = direct(false, aligned, 0, blockBytes, 0)
      if (this.#doStepNow(step) === refused) continue
      this.#aligned.add(aligned)
      return aligned.fill(0, 0, blockBytes)
    }
    return new Uint8Array(memory, 0, bytes)
  }

  /** The reserved memory to which a place belongs that is aligned. */
  #alignedAt(memory: Uint8Array, at: number): Uint8Array | undefined {
    for (const aligned of this.#aligned)
      if (aligned.buffer === memory.buffer && (memory.byteOffset + at - aligned.byteOffset) % blockBytes === 0)
        return aligned
    return undefined
  }

  /** Whether a change of blocks of that range is under way: one that blocks could not wait for it. */
  changes(position: number, length: number): boolean {
    return this.#conflicts(position, length).length > 0
  }

  async read(into: Uint8Array, at: number, length: number, position: number): Promise<void> {
    if (this.#blocking) return this.readNow(into, at, length, position)
    await this.#using((buffer) => this.#do(this.#reading(buffer, into, at, length, position)))
  }

  readNow(into: Uint8Array, at: number, length: number, position: number): void {
    this.#doNow(this.#reading(this.#buffers.blocking, into, at, length, position))
  }

  async write(
    from: Uint8Array,
    at: number,
    length: number,
    position: number,
    secure: boolean = this.#secure,
  ): Promise<void> {
    if (this.#blocking) return this.writeNow(from, at, length, position, secure)
    await this.#inOrder(position, length, async () => {
      const failures = this.#failedSyncs
      const late = await this.#using((buffer) => this.#do(this.#writing(buffer, from, at, length, position)))
      if (!late || !secure) {
        this.#unsynced = true
        return
      }
      await this.#shareSync()
      // The one that failed took the error; that the system calls the pages clean now means nothing.
      if (failures !== this.#failedSyncs) throw new Error('a sync failed while it was under way')
    })
  }

  writeNow(from: Uint8Array, at: number, length: number, position: number, secure: boolean = this.#secure): void {
    const late = this.#doNow(this.#writing(this.#buffers.blocking, from, at, length, position))
    if (late && secure) this.#syncNow()
    else this.#unsynced = true
  }

  /** Gives whole blocks back; false when that cannot be had. */
  async punch(position: number, length: number): Promise<boolean> {
    if (this.#blocking) return this.#punchNow(position, length)
    return await this.#inOrder(position, length, async () => this.#punchNow(position, length))
  }

  #punchNow(position: number, length: number): boolean {
    if (!this.#io.punch(this.#target.cached, position, length)) return false
    this.counters.punchedBytes += length
    this.#unsynced = true
    return true
  }

  async sync(): Promise<void> {
    if (this.#blocking) return this.syncNow()
    this.#checkLost()
    await this.#whileActive(() => this.#shareSync())
    // One before it may have failed only after this one was asked for.
    this.#checkLost()
  }

  syncNow(): void {
    this.#checkLost()
    this.#syncNow()
  }

  #checkLost(): void {
    if (this.lost !== undefined) throw this.lost
  }

  /** All that was acknowledged since the last good sync was written once more. */
  restored(): void {
    this.lost = undefined
  }

  /** The file has that length now. */
  resized(bytes: number): void {
    this.bytes = bytes
    this.#unsynced = true
  }

  /** Resolves when nothing is under way. */
  async quiet(): Promise<void> {
    if (this.#active > 0)
      await new Promise<void>((resolve) => {
        this.#whenQuiet = resolve
      })
  }

  async #whileActive<T>(action: () => Promise<T>): Promise<T> {
    this.#active++
    try {
      return await action()
    } finally {
      this.#active--
      if (this.#active === 0) this.#whenQuiet?.()
    }
  }

  /** Lends a buffer until `use` has settled. */
  async #using<T>(use: (buffer: Uint8Array) => Promise<T>): Promise<T> {
    return await this.#whileActive(async () => {
      const taken = this.#buffers.take()
      const buffer = taken instanceof Promise ? await taken : taken
      try {
        return await use(buffer)
      } finally {
        this.#buffers.give(buffer)
      }
    })
  }

  /** Makes a change of blocks after those that were asked for before it and touch the same ones. */
  async #inOrder<T>(position: number, length: number, change: () => Promise<T>): Promise<T> {
    const before = this.#conflicts(position, length)
    let end: () => void = () => undefined
    const done = new Promise<void>((resolve) => {
      end = resolve
    })
    const mine: Change = { from: floor(position), to: ceil(position + length), done }
    this.#changes.add(mine)
    return await this.#whileActive(async () => {
      try {
        if (before.length > 0) await Promise.all(before)
        return await change()
      } finally {
        this.#changes.delete(mine)
        end()
      }
    })
  }

  #conflicts(position: number, length: number): Promise<void>[] {
    const conflicts: Promise<void>[] = []
    for (const { from, to, done } of this.#changes)
      if (from < ceil(position + length) && to > floor(position)) conflicts.push(done)
    return conflicts
  }

  *#reading(buffer: Uint8Array, into: Uint8Array, at: number, length: number, position: number): Steps {
    const end = position + length
    let around = true
    for (let done = 0; done < length; ) {
      const begin = position + done
      const directEnd = around && this.#direct ? Math.min(end, floor(this.bytes)) : 0
      if (begin >= directEnd) {
        const moved = yield cached(false, into, at + done, length - done, begin)
        if (moved === 0) throw new Error(`the file ends at ${begin}`)
        done += moved
        continue
      }
      const aligned = this.#alignedAt(into, at + done)
      if (aligned !== undefined && begin % blockBytes === 0 && directEnd - begin >= blockBytes) {
        const moved = yield direct(false, into, at + done, floor(directEnd - begin), begin)
        if (moved === 0) throw new Error(`the file ends at ${begin}`)
        if (moved === refused) this.#aligned.delete(aligned)
        else done += moved
        continue
      }
      // A read need not be of whole blocks, where the disk has smaller sectors.
      const sector = this.#sector
      const first = begin - (begin % sector)
      const size = Math.min(Math.ceil(directEnd / sector) * sector - first, this.#buffers.bytes)
      const offset = this.#offset
      const moved = yield direct(false, buffer, offset, size, first)
      if (moved === refused) {
        if (first % blockBytes !== 0 || size % blockBytes !== 0) this.#sector = blockBytes
        else this.#realign(offset)
        continue
      }
      if (moved === 0) throw new Error(`the file ends at ${first}`)
      const got = Math.min(first + moved, end) - begin
      if (got > 0) {
        const from = offset + begin - first
        into.set(buffer.subarray(from, from + got), at + done)
        done += got
      } else {
        around = false
      }
    }
    return false
  }

  *#writing(buffer: Uint8Array, from: Uint8Array, at: number, length: number, position: number): Steps {
    const end = position + length
    let around = true
    let copied = false
    let late = false
    for (let done = 0; done < length; ) {
      const begin = position + done
      const directEnd = around && this.#direct ? Math.min(end, floor(this.bytes)) : 0
      if (begin >= directEnd) {
        late = true
        const moved = yield cached(true, from, at + done, length - done, begin)
        if (moved === 0) throw new Error(`nothing was written at ${begin}`)
        done += moved
        continue
      }
      const aligned = copied ? undefined : this.#alignedAt(from, at + done)
      if (aligned !== undefined && begin % blockBytes === 0 && directEnd - begin >= blockBytes) {
        const moved = yield direct(true, from, at + done, floor(directEnd - begin), begin)
        if (moved === 0) throw new Error(`nothing was written at ${begin}`)
        if (moved === refused) this.#aligned.delete(aligned)
        else if (moved < blockBytes) copied = true
        else done += floor(moved)
        continue
      }
      const first = floor(begin)
      const size = Math.min(ceil(directEnd) - first, this.#buffers.bytes)
      const last = Math.min(first + size, directEnd)
      const offset = this.#offset
      // What of the first and the last block is not to change is fetched before.
      const tail = first + size - blockBytes
      let fetched = blockBytes
      if (begin > first) fetched = yield direct(false, buffer, offset, blockBytes, first)
      if (fetched === blockBytes && last < first + size && (begin === first || tail > first))
        fetched = yield direct(false, buffer, offset + size - blockBytes, blockBytes, tail)
      const whole = fetched === blockBytes
      if (whole) buffer.set(from.subarray(at + done, at + done + last - begin), offset + begin - first)
      const moved = whole ? yield direct(true, buffer, offset, size, first) : fetched
      if (moved === refused) {
        this.#realign(offset)
        continue
      }
      if (moved === 0) throw new Error(`nothing was written at ${first}`)
      // What a short transfer left of a block is written again.
      const written = whole ? Math.min(first + floor(moved), last) - begin : 0
      if (written > 0) done += written
      else around = false
    }
    return late
  }

  /** The place at that offset of a buffer was refused: tries the next one, or gives up going around the cache. */
  #realign(offset: number): void {
    // Another transfer may have gone on meanwhile.
    if (offset !== this.#offset) return
    if (offset + allocatorAlignment < blockBytes) this.#offset = offset + allocatorAlignment
    else this.#direct = false
  }

  async #do(steps: Steps): Promise<boolean> {
    let step = steps.next()
    while (step.done !== true) step = steps.next(await this.#doStep(step.value))
    return step.value
  }

  #doNow(steps: Steps): boolean {
    let step = steps.next()
    while (step.done !== true) step = steps.next(this.#doStepNow(step.value))
    return step.value
  }

  async #doStep(step: Step): Promise<number> {
    const { write, memory, at, length, position } = step
    const descriptor = this.#descriptor(step)
    try {
      const moved = write
        ? await this.#io.write(descriptor, memory, at, length, position)
        : await this.#io.read(descriptor, memory, at, length, position)
      return this.#count(step, moved)
    } catch (error) {
      return this.#failed(step, error)
    }
  }

  #doStepNow(step: Step): number {
    const { write, memory, at, length, position } = step
    const descriptor = this.#descriptor(step)
    try {
      const moved = write
        ? this.#io.writeNow(descriptor, memory, at, length, position)
        : this.#io.readNow(descriptor, memory, at, length, position)
      return this.#count(step, moved)
    } catch (error) {
      return this.#failed(step, error)
    }
  }

  #descriptor(step: Step): number {
    return step.direct ? this.#target.direct! : this.#target.cached
  }

  /** `refused` for what may go another way; throws anything else. */
  #failed(step: Step, error: unknown): number {
    if (step.direct && hasCode(error, 'EINVAL')) return refused
    if (step.write) this.counters.writeErrors++
    else this.counters.readErrors++
    throw error
  }

  #count(step: Step, moved: number): number {
    const { counters } = this
    if (step.write) {
      counters.writes++
      counters.writtenBytes += moved
    } else {
      counters.reads++
      counters.readBytes += moved
    }
    return moved
  }

  /** A sync that begins after now. */
  #shareSync(): Promise<void> {
    this.#nextSync ??= this.#sync.then(() => {
      this.#nextSync = undefined
      const sync = this.#syncLater()
      // How it ends is told to those who share it, and is nothing to the next.
      this.#sync = sync.catch(() => undefined)
      return sync
    })
    return this.#nextSync
  }

  async #syncLater(): Promise<void> {
    const unsynced = this.#beginSync()
    this.#syncing = true
    try {
      await this.#io.sync(this.#target.cached)
    } catch (error) {
      throw this.#syncFailed(error, unsynced)
    } finally {
      this.#syncing = false
    }
  }

  #syncNow(): void {
    const unsynced = this.#beginSync()
    try {
      this.#io.syncNow(this.#target.cached)
    } catch (error) {
      throw this.#syncFailed(error, unsynced)
    }
    // Of two at the same time either may be told of an error.
    if (this.#syncing) this.#unsynced = true
  }

  #beginSync(): boolean {
    const unsynced = this.#unsynced
    this.#unsynced = false
    this.counters.syncs++
    return unsynced
  }

  #syncFailed(error: unknown, unsynced: boolean): unknown {
    this.counters.syncErrors++
    this.#failedSyncs++
    if (unsynced || this.#unsynced) {
      this.#unsynced = true
      this.lost = error
    }
    return error
  }
}

const cached = (write: boolean, memory: Uint8Array, at: number, length: number, position: number): Step => ({
  write,
  direct: false,
  memory,
  at,
  length,
  position,
})

const direct = (write: boolean, memory: Uint8Array, at: number, length: number, position: number): Step => ({
  write,
  direct: true,
  memory,
  at,
  length,
  position,
})
