/**
 * Codecs for pages that nobody has asked for in a while: smaller, slower, from the runtime's own zlib.
 *
 * - `deflate`: raw DEFLATE (RFC 1951), everywhere where there is node:zlib.
 * - `zstd`: one Zstandard frame (RFC 8878) for each block, in runtimes whose node:zlib has it (Node 22.15, 23.8 and
 * later).
 *
 * DEVIATION: these two make garbage. node:zlib has no interface that works between the caller's buffers, so every call
 * makes a stream object and a result of its own. They are for background work, not for the way of a put.
 *
 * Invariants: a block is exactly one stream, no byte more; whatever zlib finds wrong with it is -1; errors that are not
 * about the block (no memory) are thrown.
 */
import { type Codec, checkBlockLength, checkCall } from './codec.ts'

/** What the sync functions give with `info: true`: the bytes, and the engine that knows how much input it used. */
interface Result {
  readonly buffer: Uint8Array
  readonly engine: { readonly bytesWritten: number }
}

/** The part of node:zlib that is used here; the zstd functions are missing in older runtimes. */
interface Zlib {
  deflateRawSync(bytes: Uint8Array, options: object): Uint8Array
  inflateRawSync(bytes: Uint8Array, options: object): unknown
  readonly zstdCompressSync?: (bytes: Uint8Array, options: object) => Uint8Array
  readonly zstdDecompressSync?: (bytes: Uint8Array, options: object) => unknown
  readonly constants: Readonly<Record<string, number | undefined>>
}

/** Without an import, so that the other codecs also load where there is no node:zlib. */
function zlibOfRuntime(): Zlib | undefined {
  const { process } = globalThis as { process?: { getBuiltinModule?(name: string): unknown } }
  return process?.getBuiltinModule?.('node:zlib') as Zlib | undefined
}

/** The DEFLATE codec, or undefined without node:zlib. */
export function createDeflate(): Codec | undefined {
  const zlib = zlibOfRuntime()
  if (zlib === undefined) return undefined
  return createStrong({
    name: 'deflate',
    id: 3,
    // Stored blocks of the smallest internal buffer, and their headers.
    bound: (length) => length + (length >>> 3) + 64,
    compress: (bytes) => {
      // The window need not be larger than the block; a smaller one is set up faster.
      const windowBits = Math.min(15, Math.max(9, 32 - Math.clz32(bytes.length - 1)))
      return zlib.deflateRawSync(bytes, { level: 6, windowBits, memLevel: 8 })
    },
    decompress: (bytes, maxOutputLength) => zlib.inflateRawSync(bytes, { maxOutputLength, info: true }) as Result,
  })
}

/** The Zstandard codec, or undefined in runtimes without it. */
export function createZstd(): Codec | undefined {
  const zlib = zlibOfRuntime()
  const compressSync = zlib?.zstdCompressSync
  const decompressSync = zlib?.zstdDecompressSync
  if (zlib === undefined || compressSync === undefined || decompressSync === undefined) return undefined
  // Levels on 4 KiB pages of the mixed corpus, size and µs a page (Node 24.21): 3: 0.357, 40; 6: 0.348, 56; 12: 0.339,
  // 250; 19: 0.335, 730.
  const params = { [zlib.constants['ZSTD_c_compressionLevel'] ?? 100]: 6 }
  return createStrong({
    name: 'zstd',
    id: 4,
    bound: (length) => length + (length >>> 8) + 128,
    compress: (bytes) => compressSync(bytes, { params }),
    decompress: (bytes, maxOutputLength) => decompressSync(bytes, { maxOutputLength, info: true }) as Result,
  })
}

interface Strong {
  readonly name: 'deflate' | 'zstd'
  readonly id: number
  bound(length: number): number
  compress(bytes: Uint8Array): Uint8Array
  decompress(bytes: Uint8Array, maxOutputLength: number): Result
}

function createStrong(strong: Strong): Codec {
  return {
    name: strong.name,
    id: strong.id,
    engine: 'node:zlib',
    bound(length) {
      checkBlockLength(length)
      return strong.bound(length)
    },
    compress(src, srcAt, srcLength, dst, dstAt, dstRoom) {
      checkCall(src, srcAt, srcLength, dst, dstAt, dstRoom, srcLength)
      const block = strong.compress(src.subarray(srcAt, srcAt + srcLength))
      if (block.length > dstRoom) return 0
      dst.set(block, dstAt)
      return block.length
    },
    decompress(src, srcAt, srcLength, dst, dstAt, dstLength) {
      checkCall(src, srcAt, srcLength, dst, dstAt, dstLength, dstLength)
      // Node 22.23 takes nothing for a whole frame of nothing.
      if (srcLength === 0) return -1
      let result: Result
      try {
        result = strong.decompress(src.subarray(srcAt, srcAt + srcLength), Math.max(1, dstLength))
      } catch (error) {
        if (isAboutTheBlock(error)) return -1
        throw error
      }
      if (result.buffer.length !== dstLength || result.engine.bytesWritten !== srcLength) return -1
      dst.set(result.buffer, dstAt)
      return dstLength
    },
  }
}

/** Tells zlib's complaints about its input, and about an output that would be too long, from other failures. */
function isAboutTheBlock(error: unknown): boolean {
  const { code } = error as { code?: unknown }
  if (typeof code !== 'string' || code.includes('MEM')) return false
  return code === 'ERR_BUFFER_TOO_LARGE' || /^(Z_|ZSTD_)/.test(code)
}
