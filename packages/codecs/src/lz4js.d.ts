/** The part of lz4js 0.2.0 that is used here; the package brings no types. */
declare module 'lz4js' {
  /** Compresses `src[at, at + length)` to the start of `dst`; 0 when it found no match and `at` is 0. */
  export function compressBlock(
    src: Uint8Array,
    dst: Uint8Array,
    at: number,
    length: number,
    table: Uint32Array,
  ): number
  /** Decompresses without any check; returns the index behind the last byte written. */
  export function decompressBlock(
    src: Uint8Array,
    dst: Uint8Array,
    srcAt: number,
    srcLength: number,
    dstAt: number,
  ): number
}
