/**
 * A file as a read-only device, through a page cache with a second chance: pages that the small first level evicts rest
 * compressed in a stack, and return without a disk read.
 *
 * Reads of the file bypass the system's cache if the file system allows it, so that pages are in memory only once.
 * Other programs may change the file meanwhile: no page of an older version is served. If the file is truncated, reads
 * beyond its end fail, like those of a bad block of a disk.
 */
import { statSync } from 'node:fs'
import { Cleancache, tmemBackend } from '@tmem/cleancache'
import {
  type Allocator,
  assertBlockRange,
  type BlockDevice,
  type Budget,
  type Completion,
  compose,
  idle,
  type Layer,
  type PageStore,
  type Progress,
  type StatsNode,
  Tmem,
  TmemError,
} from '@tmem/core'
import { type CachedFile, DirectReads, PageCache } from '@tmem/page-cache'
import { BadInput } from '../ending.ts'

/** A file to serve. */
export interface CachedFileRequest {
  readonly name: string
  readonly file: string
  /** Bytes of the first level. */
  readonly memoryBytes: number
  /** Text of the stack for the second chance (default: no second chance). */
  readonly stack?: string
}

/** With what it is opened. */
interface Context {
  readonly stack: readonly Layer[]
  readonly clock: () => number
  readonly wake: () => void
  readonly allocator: Allocator
}

const sectorBytes = 512

/** Throws `BadInput` for anything but a regular file of whole sectors. */
export function judgeFile({ name, file }: CachedFileRequest): void {
  const found = statSync(file, { throwIfNoEntry: false })
  if (found?.isFile() !== true)
    throw new BadInput(
      `${file}, the file of ${name}, ${found === undefined ? 'does not exist' : 'is not a regular file'}`,
    )
  if (found.size === 0 || found.size % sectorBytes !== 0)
    throw new BadInput(
      `${file}, the file of ${name}, has ${found.size} bytes: expected whole sectors of ${sectorBytes}`,
    )
}

export class CachedFileDevice implements BlockDevice {
  readonly name: string
  readonly sizeBytes: number
  readonly blockSize: number = sectorBytes
  readonly preferredBlockSize = 4096
  readonly readOnly = true
  readonly #file: CachedFile
  readonly #cache: PageCache
  readonly #store: PageStore | undefined

  private constructor(
    name: string,
    sizeBytes: number,
    file: CachedFile,
    cache: PageCache,
    store: PageStore | undefined,
  ) {
    this.name = name
    this.sizeBytes = sizeBytes
    this.#file = file
    this.#cache = cache
    this.#store = store
  }

  /** Opens a checked file. Rejects with `TmemError`, or the system's error. */
  static async open({ name, file: path, memoryBytes }: CachedFileRequest, context: Context): Promise<CachedFileDevice> {
    const { stack, clock, wake, allocator } = context
    const store = stack.length === 0 ? undefined : compose([...stack], { clock, wake, allocator })
    try {
      const cleancache = new Cleancache()
      if (store !== undefined) cleancache.register(tmemBackend(new Tmem(store), 0, { stats: () => store.stats() }))
      const cache = new PageCache({ sizeBytes: memoryBytes, cleancache, allocator, io: new DirectReads({ allocator }) })
      try {
        const file = await cache.open(path, 'r')
        const { size } = await file.stat()
        return new CachedFileDevice(name, size - (size % sectorBytes), file, cache, store)
      } catch (error) {
        await cache.close()
        throw error
      }
    } catch (error) {
      await store?.close()
      throw error
    }
  }

  read(at: number, into: Uint8Array): Completion {
    assertBlockRange(this, at, into.length)
    return this.#read(at, into)
  }

  write(): Completion {
    return this.#refuse()
  }

  discard(): Completion {
    return this.#refuse()
  }

  zero(): Completion {
    return this.#refuse()
  }

  flush(): Completion {
    return undefined
  }

  map(at: number, length: number, report: (length: number, allocated: boolean) => boolean): void {
    assertBlockRange(this, at, length)
    report(length, true)
  }

  /** Lets the stack do background work. */
  tick(budget: Budget): Progress {
    return this.#store?.tick(budget) ?? idle
  }

  stats(): StatsNode {
    return { name: this.name, counters: { file_bytes: this.sizeBytes }, children: [this.#cache.stats()] }
  }

  async close(): Promise<void> {
    await this.#cache.close()
    await this.#store?.close()
  }

  async #read(at: number, into: Uint8Array): Promise<void> {
    const { bytesRead } = await this.#file.read(into, 0, into.length, at)
    if (bytesRead < into.length)
      throw new TmemError(
        'TMEM_IO',
        `device ${this.name}: its file was truncated from ${this.sizeBytes} to ${at + bytesRead} bytes`,
        {
          layer: this.name,
        },
      )
  }

  #refuse(): Promise<never> {
    return Promise.reject(new TmemError('TMEM_UNSUPPORTED', `device ${this.name} is read-only`, { layer: this.name }))
  }
}
