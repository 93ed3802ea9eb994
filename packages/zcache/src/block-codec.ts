/**
 * Pages to blocks and back, for a stack: LZ4 in WebAssembly where the runtime has it, with blocks in its own memory,
 * where neither the codec nor the checksum copies them; any codec of @tmem/codecs else.
 */
import {
  type Codec,
  CodecError,
  type CodecName,
  codecName,
  createCodec,
  createLz4Arena,
  type Lz4Arena,
} from '@tmem/codecs'
import type { BlockCodec } from '@tmem/core'
import { maxBlockBytes, TmemError } from '@tmem/core'

/** Makes a block codec. Throws `TmemError` (`TMEM_UNSUPPORTED`) where this runtime lacks the codec. */
export function blockCodec(name: CodecName): BlockCodec {
  // No codec makes more of a block than LZ4's bound and a kilobyte: room for two of the largest.
  const spareAt = 2 * maxBlockBytes
  const home = createLz4Arena(2 * spareAt)
  const { bytes: workspace } = home
  const codec = openCodec(name, home)
  const known: (Codec | undefined)[] = []
  known[codec.id] = codec
  known[home.codec.id] ??= home.codec
  return {
    workspace,
    spareAt,
    id: codec.id,
    encode: (bytes, at, length, to, room) => codec.compress(bytes, at, length, workspace, to, room),
    decode: (id, at, size, into, to, length) => {
      const decoder = known[id]
      if (decoder !== undefined) return decoder.decompress(workspace, at, size, into, to, length) === length
      const other = codecName(id)
      if (other === undefined) return false
      known[id] = openCodec(other, home)
      return known[id].decompress(workspace, at, size, into, to, length) === length
    },
    // The codec counts, so that no other decodes it.
    checksum: (id, at, size) => home.checksum(at, size) ^ Math.imul(id, 0x9e3779b1),
  }
}

/** Makes a codec, or throws `TmemError` (`TMEM_UNSUPPORTED`) where this runtime lacks it. */
export function openCodec(name: CodecName, home: Lz4Arena): Codec {
  try {
    return name === 'lz4' ? home.codec : createCodec(name)
  } catch (error) {
    if (error instanceof CodecError)
      throw new TmemError('TMEM_UNSUPPORTED', `zcache: ${error.message}`, { layer: 'zcache', cause: error })
    throw error
  }
}
