// Measures all codecs on the mixed corpus. After a build, from anywhere:
//   node packages/codecs/bench/codecs.mjs [--quick] [--json] [--page BYTES]
import process from 'node:process'
import { parseArgs } from 'node:util'
import { codecSubject, interleave, liblz4Subject, mixedCorpus, napiSubject, storeBytes } from '../dist/bench.js'
import { availableCodecs, createCodec, createLz4Arena, createPortableLz4 } from '../dist/index.js'

const { values } = parseArgs({
  options: { quick: { type: 'boolean' }, json: { type: 'boolean' }, page: { type: 'string' } },
})
const pageBytes = Number(values.page ?? 4096)
const corpus = mixedCorpus(Math.max(8, ((values.quick ? 1024 : 4096) * 4096) / pageBytes), pageBytes)
const rounds = values.quick ? 5 : 15

const lz4 = createCodec('lz4')
const arena = createLz4Arena(storeBytes(lz4, corpus))
const subjects = [codecSubject(`lz4 in its arena (${arena.codec.engine})`, arena.codec, corpus, arena.bytes)]
const skipped = []
for (const codec of [lz4, createPortableLz4(), createCodec('lz4js')]) {
  subjects.push(
    codecSubject(`${codec.name} (${codec.engine})`, codec, corpus, new Uint8Array(storeBytes(codec, corpus))),
  )
}
try {
  subjects.push(liblz4Subject(corpus))
} catch (error) {
  skipped.push({ name: 'liblz4', skipped: `needs gcc and liblz4.so.1: ${String(error).split('\n')[0]}` })
}
try {
  subjects.push(
    codecSubject('liblz4 through koffi', await koffiCodec(), corpus, new Uint8Array(storeBytes(lz4, corpus))),
  )
} catch (error) {
  skipped.push({ name: 'liblz4 through koffi', skipped: String(error).split('\n')[0] })
}
try {
  subjects.push(napiSubject(await import('lz4-napi'), corpus))
} catch (error) {
  skipped.push({ name: 'lz4-napi', skipped: String(error) })
}
const measured = await interleave(subjects, rounds)
for (const subject of subjects) subject.close?.()

// The strong codecs are an order of magnitude slower: fewer rounds, at the end.
const strong = availableCodecs()
  .filter((name) => name === 'deflate' || name === 'zstd')
  .map((name) => createCodec(name))
  .map((codec) => codecSubject(codec.name, codec, corpus, new Uint8Array(storeBytes(codec, corpus))))
measured.push(...(await interleave(strong, 3)))

const reference = (name) => measured.find((row) => row.name === name)
const rows = measured.map((row) => {
  const [c, napi] = [reference('liblz4'), reference('lz4-napi')]
  const ratio = (key, other) => (other === undefined ? undefined : Number((row[key] / other[key]).toFixed(2)))
  return {
    ...row,
    ratio: Number((row.bytes / corpus.bytes.length).toFixed(4)),
    compressToC: ratio('compressNs', c),
    decompressToC: ratio('decompressNs', c),
    compressToNapi: ratio('compressNs', napi),
    decompressToNapi: ratio('decompressNs', napi),
    sizeToC: c === undefined ? undefined : Number((row.bytes / c.bytes).toFixed(4)),
  }
})
if (values.json) {
  console.log(JSON.stringify({ node: process.version, pageBytes, sources: corpus.sources, rounds, rows, skipped }))
} else {
  console.log(`Node ${process.version}, ${corpus.pages.length} pages of ${pageBytes} bytes, ${rounds} rounds, medians`)
  for (const { name, pages } of corpus.sources) console.log(`  ${String(pages).padStart(5)} ${name}`)
  const cells = rows.map((row) => [
    row.name,
    row.compressNs.toFixed(0),
    row.decompressNs.toFixed(0),
    row.ratio.toFixed(4),
    ...[row.sizeToC, row.compressToC, row.decompressToC, row.compressToNapi, row.decompressToNapi].map(
      (value) => value ?? '-',
    ),
  ])
  cells.unshift(['codec', 'compress ns', 'decompress ns', 'size', 'size/C', 'comp/C', 'dec/C', 'comp/napi', 'dec/napi'])
  for (const row of cells) console.log(row.map((cell, i) => (i ? String(cell).padStart(14) : cell.padEnd(30))).join(''))
  for (const { name, skipped: reason } of skipped) console.log(`${name}: skipped, ${reason}`)
}

/** The library as a codec, as far as codecSubject() needs one: views instead of offsets. */
async function koffiCodec() {
  const { default: koffi } = await import('koffi')
  const library = koffi.load('liblz4.so.1')
  const compress = library.func('int LZ4_compress_default(const uint8_t *, uint8_t *, int, int)')
  const decompress = library.func('int LZ4_decompress_safe(const uint8_t *, uint8_t *, int, int)')
  return {
    bound: (length) => lz4.bound(length),
    compress: (src, _srcAt, srcLength, dst, dstAt, dstRoom) =>
      compress(src, dst.subarray(dstAt, dstAt + dstRoom), srcLength, dstRoom),
    decompress: (src, srcAt, srcLength, dst, _dstAt, dstLength) =>
      decompress(src.subarray(srcAt, srcAt + srcLength), dst, srcLength, dstLength),
  }
}
