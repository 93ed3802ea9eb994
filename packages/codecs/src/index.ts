/**
 * Block codecs for compressed pages, behind one interface. See the README for which codec is chosen where.
 *
 * The ids are stored beside every page, so they are a contract: an id is never given to another format.
 * 0 not compressed (the store's own) · 1 lz4js · 2 lz4 · 3 deflate · 4 zstd. 1 and 2 hold the same format.
 */
import { type Codec, CodecError, type CodecName } from './codec.ts'
import { createLz4js, createPortableLz4 } from './lz4.ts'
import { createWasmLz4 } from './lz4-wasm.ts'
import { createDeflate, createZstd } from './strong.ts'

export { type Codec, CodecError, type CodecErrorCode, type CodecName, MAX_BLOCK_BYTES } from './codec.ts'
export { createPortableLz4, isLz4Block } from './lz4.ts'
export { createLz4Arena, type Lz4Arena } from './lz4-wasm.ts'

/** Every codec, the fastest first; the place has nothing to do with the id. */
const NAMES: readonly CodecName[] = Object.freeze(['lz4', 'lz4js', 'zstd', 'deflate'])

/** Codecs by the id that is stored beside each page. */
const BY_ID: readonly (CodecName | undefined)[] = Object.freeze([undefined, 'lz4js', 'lz4', 'deflate', 'zstd'])

/** The name of the codec of an id; `undefined`: there is none, as for 0, which says that nothing was compressed. */
export const codecName = (id: number): CodecName | undefined => BY_ID[id]

/**
 * Makes a codec with scratch memory of its own: any number of them work side by side.
 * @throws CodecError CODEC_UNAVAILABLE when this runtime lacks what the codec needs, CODEC_UNKNOWN for other names.
 */
export function createCodec(name: CodecName): Codec {
  const codec = make(name)
  if (codec === undefined) {
    throw new CodecError(
      'CODEC_UNAVAILABLE',
      name,
      `codec "${name}" needs a runtime whose node:zlib has it (zstd: Node 22.15 or later); here there are: ` +
        `${availableCodecs().join(', ')}`,
    )
  }
  return codec
}

/** Names of the codecs that work in this runtime, the fastest first. */
export function availableCodecs(): readonly CodecName[] {
  return NAMES.filter((name) => make(name) !== undefined)
}

function make(name: CodecName): Codec | undefined {
  switch (name) {
    case 'lz4js':
      return createLz4js()
    case 'lz4':
      return createWasmLz4() ?? createPortableLz4()
    case 'deflate':
      return createDeflate()
    case 'zstd':
      return createZstd()
    default:
      throw unknown(name)
  }
}

/** For callers without types. */
function unknown(name: unknown): CodecError {
  return new CodecError(
    'CODEC_UNKNOWN',
    String(name),
    `there is no codec "${String(name)}"; known: ${NAMES.join(', ')}`,
  )
}
