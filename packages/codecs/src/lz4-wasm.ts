/**
 * The host of the fast LZ4 codec: a WebAssembly instance of wasm/lz4.ts with a memory of its own.
 *
 * The memory is divided once and never grows, so views of it stay valid: the table and scratch memory for one block on
 * either side (4.1 MiB of address space; a machine gives memory only to the parts that blocks of the used length
 * touch), then the arena, which belongs to the caller.
 *
 * Invariants:
 * - Blocks that lie in the arena are read and written in place. Other bytes pass through the scratch memory.
 * - No call makes an object, with one exception: a source that is a part of an array outside the arena needs a view.
 * - The destination is written only after the whole block was made or proved good; nothing but the result is written.
 * - Lengths reach the instance only after checkCall; it trusts them.
 */
import { type Codec, checkCall, checkRanges, MAX_BLOCK_BYTES } from './codec.ts'
import { checksumPortable, createPortableLz4, lz4Bound } from './lz4.ts'
import { LZ4_MODULE } from './lz4-module.ts'

/** Where wasm/lz4.ts expects the page and the block; the numbers must be the same there. */
const PAGE = 0x10000
const BLOCK = 0x211c00
/** Behind the longest block (BLOCK + 2,105,392) and 1 KiB over which copies may run, at the next 64 KiB. */
const ARENA = 0x420000
const WASM_PAGE = 0x10000
/** Loads may run over the end of an arena by less than this. */
const TAIL = 1024
/** Addresses have 32 bits, and sums of an address and two block lengths must not overflow. */
const MAX_ARENA_BYTES: number = 2 ** 32 - 16 * MAX_BLOCK_BYTES

/** The part of the WebAssembly interface that is used here. */
interface WasmInterface {
  validate(bytes: Uint8Array): boolean
  Module: new (bytes: Uint8Array) => object
  Memory: new (limits: { initial: number; maximum: number }) => { readonly buffer: ArrayBuffer }
  Instance: new (module: object, imports: { env: { memory: object } }) => { readonly exports: unknown }
}

/** What wasm/lz4.ts exports. */
interface Exports {
  compress(length: number, to: number, room: number): number
  decompress(src: number, length: number, outLength: number): number
  checksum(at: number, length: number): number
}

/** Memory for compressed pages, and the codec that works in it without copying them. */
export interface Lz4Arena {
  /** The caller's memory, zeroed. Its content is only what the caller, or `codec` for the caller, puts there. */
  readonly bytes: Uint8Array
  /** An LZ4 codec. It takes any array; blocks in `bytes` are compressed and decompressed in place. */
  readonly codec: Codec
  /**
   * A 32-bit checksum of `bytes[at, at + length)`, for telling damage; the same for the same bytes in every runtime. An
   * altered word changes it, but for one case in 2^32. 70 ns for 2,300 bytes (Node 20.20), a third of what a loop in
   * JavaScript takes.
   * @throws RangeError when the range lies outside the arena.
   */
  checksum(at: number, length: number): number
}

/**
 * Makes an arena of `byteLength` bytes (0 to about 3.96 GiB; address space at first, memory where it is touched).
 * Where WebAssembly SIMD is missing or forbidden the arena is ordinary memory and the codec the portable one.
 * @throws RangeError when `byteLength` is out of range or the machine has not that much.
 */
export function createLz4Arena(byteLength: number): Lz4Arena {
  if (!Number.isInteger(byteLength) || byteLength < 0 || byteLength > MAX_ARENA_BYTES) {
    throw new RangeError(`codec: an arena has 0 to ${MAX_ARENA_BYTES} bytes, not ${byteLength}; make several`)
  }
  const arena = createWasmArena(byteLength)
  if (arena !== undefined) return arena
  const bytes = new Uint8Array(byteLength)
  return {
    bytes,
    codec: createPortableLz4(),
    checksum(at, length) {
      checkRanges(bytes, at, length, bytes, 0, 0)
      return checksumPortable(bytes, at, length)
    },
  }
}

/** The fast codec alone, or undefined where WebAssembly SIMD is missing or forbidden, or memory for an instance. */
export function createWasmLz4(): Codec | undefined {
  return createWasmArena(0)?.codec
}

function createWasmArena(byteLength: number): Lz4Arena | undefined {
  const wasm = (globalThis as { WebAssembly?: WasmInterface }).WebAssembly
  // A bare `vm` context has no `atob`.
  if (wasm === undefined || typeof atob !== 'function') return undefined
  const text = Uint8Array.from(atob(LZ4_MODULE), (character) => character.charCodeAt(0))
  if (!wasm.validate(text)) return undefined
  const pages = Math.ceil((ARENA + byteLength + TAIL) / WASM_PAGE)
  let memory: { readonly buffer: ArrayBuffer }
  let instance: { readonly exports: unknown }
  try {
    const module = new wasm.Module(text)
    memory = new wasm.Memory({ initial: pages, maximum: pages })
    instance = new wasm.Instance(module, { env: { memory } })
  } catch (error) {
    if (isForbidden(error)) return undefined
    throw error
  }
  const bytes = new Uint8Array(memory.buffer, ARENA, byteLength)
  const code = instance.exports as Exports
  return {
    bytes,
    codec: createHost(code, memory.buffer),
    checksum(at, length) {
      checkRanges(bytes, at, length, bytes, 0, 0)
      return code.checksum(ARENA + at, length)
    },
  }
}

/**
 * Whether an error says that there is no WebAssembly for this program, though the module is good: `CompileError` and
 * `EvalError`, where compiling is forbidden (a Content-Security-Policy without `wasm-unsafe-eval`, a `vm` context with
 * `wasm: false`); `RangeError`, where there is no address space for the memory (`ulimit -v`). By name, because the
 * error may be of another realm.
 */
const isForbidden = (error: unknown): boolean =>
  ['CompileError', 'EvalError', 'RangeError'].includes((error as { readonly name?: string } | null)?.name ?? '')

/** Results up to this many bytes are copied out through views that are kept: one for each multiple of 64. */
const KEPT_VIEWS_BYTES = 0x10000

function createHost(code: Exports, home: ArrayBuffer): Codec {
  const whole = new Uint8Array(home)
  const blocks: (Uint8Array | undefined)[] = new Array(KEPT_VIEWS_BYTES / 64 + 1).fill(undefined)
  let page = whole.subarray(PAGE, PAGE + 4096)

  /**
   * Copies from outside. A part of an array needs a view for that: 50 ns and a short-lived object, against 590 ns for a
   * loop (2,000 bytes, Node 20.20). A page that is a whole array needs none.
   */
  function copyIn(src: Uint8Array, srcAt: number, length: number, to: number): void {
    if (srcAt === 0 && length === src.length) whole.set(src, to)
    else whole.set(src.subarray(srcAt, srcAt + length), to)
  }

  /** Copies the block of `length` bytes that lies at BLOCK to `dst`. */
  function copyBlock(length: number, dst: Uint8Array, dstAt: number): void {
    if (length > KEPT_VIEWS_BYTES) {
      dst.set(whole.subarray(BLOCK, BLOCK + length), dstAt)
      return
    }
    const slot = length >>> 6
    let at = slot << 6
    let view = blocks[slot]
    if (view === undefined) {
      view = whole.subarray(BLOCK, BLOCK + at)
      blocks[slot] = view
    }
    dst.set(view, dstAt)
    for (; at < length; at++) dst[dstAt + at] = whole[BLOCK + at] as number
  }

  return {
    name: 'lz4',
    id: 2,
    engine: 'wasm-simd',
    bound: lz4Bound,
    compress(src, srcAt, srcLength, dst, dstAt, dstRoom) {
      checkCall(src, srcAt, srcLength, dst, dstAt, dstRoom, srcLength)
      if (src.buffer === home) {
        const from = src.byteOffset + srcAt
        whole.copyWithin(PAGE, from, from + srcLength)
      } else {
        copyIn(src, srcAt, srcLength, PAGE)
      }
      if (dst.buffer === home) return code.compress(srcLength, dst.byteOffset + dstAt, dstRoom)
      const written = code.compress(srcLength, 0, dstRoom)
      if (written > 0) copyBlock(written, dst, dstAt)
      return written
    },
    decompress(src, srcAt, srcLength, dst, dstAt, dstLength) {
      checkCall(src, srcAt, srcLength, dst, dstAt, dstLength, dstLength)
      // A sequence takes no more bytes than it yields, save one for every 255 of a length, so no good block is longer.
      if (srcLength > dstLength + dstLength / 255 + 16) return -1
      let from = BLOCK
      if (src.buffer === home) from = src.byteOffset + srcAt
      else copyIn(src, srcAt, srcLength, BLOCK)
      if (code.decompress(from, srcLength, dstLength) !== dstLength) return -1
      if (page.length !== dstLength) page = whole.subarray(PAGE, PAGE + dstLength)
      dst.set(page, dstAt)
      return dstLength
    },
  }
}
