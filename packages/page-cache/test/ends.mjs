// A program that writes and never closes: node ends.mjs page-cache|fs FILE HOW. What it was told is written it has lost
// if it is not there.
import { open } from 'node:fs/promises'
import { PageCache, pageCacheFacts } from '@tmem/page-cache'

const [which, path, how] = process.argv.slice(2)
const cache = new PageCache({ sizeBytes: 64 * 4096, optIn: () => ({ facts: pageCacheFacts('test', 4096) }) })
const file = await (which === 'fs' ? open(path, 'w') : cache.open(path, 'w'))
await file.write('one ')
await file.writeFile('two ')
await file.writev([Buffer.from('three '), Buffer.from('four ')])
switch (how) {
  case 'exit':
    process.exit(0)
    break
  case 'throw':
    throw new Error('as it goes')
  case 'SIGTERM':
  case 'SIGKILL':
    process.kill(process.pid, how)
    break
  default:
    // Nobody waits for these: they are done before the program ends all the same.
    for (let n = 0; n < 1000; n++) file.write('a line').catch(() => undefined)
}
