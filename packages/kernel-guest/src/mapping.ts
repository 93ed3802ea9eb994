/**
 * The memory of a virtual machine, mapped into this process: the file in which QEMU keeps it (`memory-backend-file`,
 * shared).
 *
 * Invariant: the runtime unmaps the memory only when no view of it can be reached any more.
 *
 * Source: mmap(2), munmap(2).
 */
import { closeSync, constants, fstatSync, openSync } from 'node:fs'
import { createRequire } from 'node:module'
import { TmemError } from '@tmem/core'

const readAndWrite = 3
const shared = 1

type Koffi = typeof import('koffi')
type Call = (...args: readonly number[]) => number

const unreachable = new FinalizationRegistry<() => void>((unmap) => unmap())

/**
 * Maps a file whole, for reading and writing. Others change the bytes meanwhile: the guest, and QEMU. Throws
 * `TmemError` (`TMEM_UNSUPPORTED`: this is not Linux, or koffi cannot be loaded; `TMEM_IO`: the file is none, is empty,
 * or cannot be mapped).
 */
export function mapGuestMemory(path: string): Uint8Array {
  const koffi = loadKoffi()
  const libc = koffi.load(null)
  const mmap = libc.func('uintptr_t mmap(uintptr_t, size_t, int, int, int, int64_t)') as Call
  const munmap = libc.func('int munmap(uintptr_t, size_t)') as Call
  const failed = (why: string, cause?: unknown): TmemError =>
    new TmemError('TMEM_IO', `the guest's memory ${path} cannot be mapped: ${why}`, { layer: 'kernel-guest', cause })
  let file: number
  try {
    // Without O_NONBLOCK, opening a pipe would wait for a writer.
    file = openSync(path, constants.O_RDWR | constants.O_NONBLOCK)
  } catch (error) {
    throw failed((error as Error).message, error)
  }
  try {
    const found = fstatSync(file)
    if (!found.isFile() || found.size === 0) throw failed('it is no file, or empty')
    const address = mmap(0, found.size, readAndWrite, shared, file, 0)
    // MAP_FAILED is all ones.
    if (address >= 2 ** 53) throw failed(`error ${koffi.errno()}`)
    const memory = koffi.view(BigInt(address), found.size)
    unreachable.register(memory, () => munmap(address, found.size))
    return new Uint8Array(memory)
  } finally {
    closeSync(file)
  }
}

function loadKoffi(): Koffi {
  if (process.platform !== 'linux')
    throw new TmemError('TMEM_UNSUPPORTED', `a guest's memory is mapped on Linux only, and this is ${process.platform}`)
  try {
    return createRequire(import.meta.url)('koffi') as Koffi
  } catch (error) {
    const what = 'koffi, through which memory is mapped, cannot be loaded'
    throw new TmemError('TMEM_UNSUPPORTED', `${what}: install it with its optional dependencies`, { cause: error })
  }
}
