/**
 * Memory that goes back to the system the moment it is given back, not when the garbage collector comes round:
 * anonymous mappings, made through koffi, on Linux.
 *
 * What is given back loses its pages at once (MADV_DONTNEED) and keeps its addresses, for the next request of that
 * size. So a view that somebody kept by mistake reads zeros, or what the next owner puts there, but never touches what
 * is not mapped; nothing is ever unmapped. A buffer that was not given back, and that nobody can reach any more, loses
 * its pages when the garbage collector has found it.
 *
 * Invariants: memory is with its owner or here, never both; what is handed out is zeroed.
 *
 * Source: mmap(2), madvise(2).
 */
import type { Allocator } from '@tmem/core'
import { systemAllocator } from '@tmem/core'
import { builtin } from '@tmem/core/runtime'

/** Bytes of the smallest request that is worth a mapping. */
const smallestMapping = 64 * 1024

const readAndWrite = 3
const privateAnonymous = 0x22
const dontNeed = 4

type Koffi = typeof import('koffi')
/** What runtimes have since 21, and the types of 20 do not know. */
interface Marks {
  readonly isMarkedAsUntransferable?: (object: object) => boolean
  readonly markAsUntransferable: (object: object) => void
}
type Call = (...args: readonly number[]) => number

/**
 * Empties what became unreachable. It must be there as long as any mapping, also when the allocator that made it is
 * not.
 */
const unreachable = new FinalizationRegistry<() => void>((empty) => empty())

/** An allocator of mapped memory, or of the runtime's where that cannot be had. */
export interface MappedAllocator extends Allocator {
  /** Why memory is not mapped here, but the runtime's, as that of `systemAllocator`; `undefined`: it is mapped. */
  readonly lacks: string | undefined
}

/** What is used of the C library. */
class Maps {
  readonly #koffi: Koffi
  readonly #marks: Marks
  readonly #mmap: Call
  readonly #madvise: Call

  /** Throws when koffi cannot be loaded, or buffers cannot lie in memory that is not the runtime's. */
  constructor() {
    const system = builtin<typeof import('node:process')>('node:process')?.platform ?? 'a browser'
    if (system !== 'linux') throw new Error(`it needs Linux's madvise, and this is ${system}`)
    const { createRequire } = builtin<typeof import('node:module')>('node:module')!
    this.#koffi = createRequire(import.meta.url)('koffi') as Koffi
    this.#marks = builtin<Marks>('node:worker_threads')!
    const libc = this.#koffi.load(null)
    this.#mmap = libc.func('uintptr_t mmap(uintptr_t, size_t, int, int, int, int64_t)') as Call
    this.#madvise = libc.func('int madvise(uintptr_t, size_t, int)') as Call
  }

  /** Address of zeroed memory, or `undefined` when there is none. */
  map(bytes: number): number | undefined {
    const address = this.#mmap(0, bytes, readAndWrite, privateAnonymous, -1, 0)
    // MAP_FAILED is all ones.
    return address < 2 ** 53 ? address : undefined
  }

  /** The memory at an address. */
  view(address: number, bytes: number): ArrayBuffer {
    const buffer = this.#koffi.view(BigInt(address), bytes)
    // Runtimes since 21 have done it themselves. Marked once more, the buffer cannot be let go of when Node 24 ends,
    // which ends with SIGABRT then.
    if (this.#marks.isMarkedAsUntransferable?.(buffer) !== true) this.#marks.markAsUntransferable(buffer)
    return buffer
  }

  /** Makes a mapping zeros again, and its pages the system's, unless they are locked in memory. */
  empty(address: number, bytes: number): void {
    if (this.#madvise(address, bytes, dontNeed) !== 0) new Uint8Array(this.view(address, bytes)).fill(0)
  }
}

/**
 * Makes an allocator that takes requests of 64 KiB and more from the system directly, and gives them back at once.
 * Where that cannot be had (another system than Linux, no koffi) it is as `systemAllocator`, and `lacks` says why.
 *
 * `free` throws `RangeError` for memory that was given back already.
 */
export function mappedAllocator(): MappedAllocator {
  let maps: Maps
  try {
    maps = new Maps()
  } catch (error) {
    const reason = error instanceof Error ? error.message.split('\n')[0]! : String(error)
    return { ...systemAllocator, lacks: `memory cannot be mapped: ${reason}` }
  }
  const addresses = new WeakMap<ArrayBufferLike, number>()
  /** By size: what was given back, and addresses of what nobody could reach any more. */
  const here = new Map<number, Set<ArrayBufferLike>>()
  const lost = new Map<number, number[]>()
  return {
    lacks: undefined,
    allocate(bytes, site) {
      if (bytes < smallestMapping) return systemAllocator.allocate(bytes, site)
      const same = here.get(bytes)
      for (const memory of same ?? []) {
        same!.delete(memory)
        return memory
      }
      const address = lost.get(bytes)?.pop() ?? maps.map(bytes)
      if (address === undefined) return undefined
      const memory = maps.view(address, bytes)
      addresses.set(memory, address)
      unreachable.register(memory, () => {
        maps.empty(address, bytes)
        const before = lost.get(bytes)
        if (before === undefined) lost.set(bytes, [address])
        else before.push(address)
      })
      return memory
    },
    free(memory, site) {
      const address = addresses.get(memory)
      // Small requests are the garbage collector's.
      if (address === undefined) return
      const bytes = memory.byteLength
      const same = here.get(bytes) ?? new Set()
      if (same.has(memory)) throw new RangeError(`memory was given back twice (${site})`)
      maps.empty(address, bytes)
      here.set(bytes, same.add(memory))
    },
  }
}
