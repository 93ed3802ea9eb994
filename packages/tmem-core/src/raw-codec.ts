/** The codec of a stack in which nobody compresses: pages stay as they are, and have the checksum of zlib. */
import { TmemError } from './outcomes.ts'
import { type BlockCodec, maxBlockBytes } from './place.ts'
import { crc32 } from './runtime.ts'
import type { Allocator } from './store.ts'

/** Throws `TmemError` (`TMEM_NO_MEMORY`) when the allocator has none for its workspace. */
export function rawCodec(allocator: Allocator): BlockCodec {
  const memory = allocator.allocate(3 * maxBlockBytes, 'chain.workspace')
  if (memory === undefined)
    throw new TmemError('TMEM_NO_MEMORY', `no memory for the workspace of a stack (${3 * maxBlockBytes} bytes)`, {
      layer: 'chain',
    })
  const workspace = new Uint8Array(memory, 0, 3 * maxBlockBytes)
  return {
    workspace,
    spareAt: maxBlockBytes,
    id: 0,
    encode: () => 0,
    decode: () => false,
    checksum: (codec, at, size) => crc32(workspace.subarray(at, at + size)) ^ Math.imul(codec, 0x9e3779b1),
  }
}
