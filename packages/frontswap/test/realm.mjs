// A swap file in a `vm` context, used, and refused to a second one: node --experimental-vm-modules realm.mjs FILE
import { loadInContext } from '../../../tools/in-context.mjs'

const [, , file] = process.argv
const globals = { ArrayBuffer, Buffer, process, SharedArrayBuffer, setImmediate, setTimeout, Uint8Array }
const { compose, frontswap, PutOutcome, GetOutcome } = await loadInContext(
  ['@tmem/core', '@tmem/frontswap'],
  import.meta.url,
  globals,
)
const open = () => compose([frontswap({ file, sizeBytes: 64 * 4096 })])
const store = open()
const pool = store.newPool({ client: 0, persistent: true, shared: false, pageSize: 4096 })
const page = Buffer.alloc(4096, 'a page ')
const answer = { stored: pool.put(1, 0, page) === PutOutcome.Stored }
const back = new Uint8Array(4096)
answer.fetched = (await pool.fetch(1, 0, back)) === GetOutcome.Hit && page.equals(back)
try {
  open()
} catch (error) {
  answer.code = error.code
  answer.message = error.message
}
await store.close()
process.stdout.write(JSON.stringify(answer))
