// Loads the built package into contexts of their own and uses it there: node --experimental-vm-modules forbidden.mjs
import { loadInContext } from '../../../tools/in-context.mjs'

async function tryIt(globals, wasm) {
  const { createCodec } = await loadInContext(['@tmem/codecs'], import.meta.url, globals, { strings: false, wasm })
  const codec = createCodec('lz4')
  // Arrays of this realm, and not of the context's.
  const page = new Uint8Array(4096).map((_, at) => at % 50)
  const block = new Uint8Array(codec.bound(4096))
  const length = codec.compress(page, 0, 4096, block, 0, block.length)
  const back = new Uint8Array(4096)
  const decoded = codec.decompress(block, 0, length, back, 0, 4096)
  return `${codec.engine} ${decoded} ${Buffer.compare(back, page) === 0}`
}

const answer = {
  forbidden: await tryIt({ atob }, false),
  allowed: await tryIt({ atob }, true),
  bare: await tryIt({}, true),
}
process.stdout.write(JSON.stringify(answer))
