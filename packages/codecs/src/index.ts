/**
 * Block codecs for compressed pages, behind one interface. See the README for which codec is chosen where.
 *
 * The ids are stored beside every page, so they are a contract: an id is never given to another format.
 */
import { type Codec, CodecError, type CodecName } from "./codec.ts";
import { createLz4js, createPortableLz4 } from "./lz4.ts";

export { type Codec, CodecError, type CodecErrorCode, type CodecName, MAX_BLOCK_BYTES } from "./codec.ts";
export { isLz4Block } from "./lz4.ts";

/** Makes a codec with scratch memory of its own. */
export function createCodec(name: CodecName): Codec {
  switch (name) {
    case "lz4js":
      return createLz4js();
    case "lz4":
      return createPortableLz4();
    default:
      throw new CodecError("CODEC_UNAVAILABLE", name, `codec "${name}" is not available in this runtime`);
  }
}

/** Names of the codecs that work in this runtime, fastest first. */
export function availableCodecs(): readonly CodecName[] {
  return ["lz4", "lz4js"];
}
