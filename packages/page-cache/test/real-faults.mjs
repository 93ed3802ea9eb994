// Faults of the system itself, in a process of its own: node real-faults.mjs full|forbidden FOLDER ordinary|direct
import { readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { DirectReads, PageCache, pageCacheFacts } from '@tmem/page-cache'

const [what, folder, mode] = process.argv.slice(2)
const io = mode === 'direct' ? { io: new DirectReads() } : {}
const optIn = () => ({ facts: pageCacheFacts('test', 4096) })
const cache = new PageCache({ sizeBytes: 256 * 4096, optIn, ...io })
const codeOf = (work) =>
  work().then(
    () => 'done',
    (error) => error.code,
  )
const answer = {}
if (what === 'full') {
  // The file system has room for 64 pages, and half of them are taken.
  writeFileSync(join(folder, 'ballast'), Buffer.alloc(32 * 4096, 1))
  const file = await cache.open(join(folder, 'file'), 'w+')
  const bytes = Buffer.alloc(48 * 4096)
  for (let at = 0; at < bytes.length; at++) bytes[at] = at % 251
  const { bytesWritten } = await file.write(bytes)
  answer.pages = Math.round(bytesWritten / 4096)
  answer.second = await codeOf(() => file.write(bytes, bytesWritten))
  const into = Buffer.alloc(bytesWritten)
  await file.read(into, 0, into.length, 0)
  answer.readBack = into.equals(bytes.subarray(0, bytesWritten))
  rmSync(join(folder, 'ballast'))
  answer.third = await codeOf(() => file.write(bytes, bytesWritten))
  answer.onDisk = readFileSync(join(folder, 'file')).equals(bytes)
  answer.close = await codeOf(() => file.close())
} else {
  const path = join(folder, 'secret')
  writeFileSync(path, Buffer.alloc(3 * 4096, 5), { mode: 0o600 })
  process.seteuid(65534)
  answer.open = await codeOf(() => cache.open(path))
  process.seteuid(0)
  answer.allowed = await codeOf(async () => {
    const file = await cache.open(path)
    const { buffer } = await file.read(Buffer.alloc(100), 0, 100, 4096)
    answer.bytes = buffer.every((byte) => byte === 5)
  })
}
await cache.close()
process.stdout.write(JSON.stringify(answer))
