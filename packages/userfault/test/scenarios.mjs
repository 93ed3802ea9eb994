// What the tests run in processes of their own: a thread that waits for a page for ever can only be ended from outside.
// node scenarios.mjs NAME [ARGUMENT]: prints one JSON document.
import { spawn, spawnSync } from 'node:child_process'
import { createHash, randomFill } from 'node:crypto'
import {
  close,
  closeSync,
  open,
  openSync,
  read,
  readdirSync,
  readFileSync,
  readlinkSync,
  readSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { MessageChannel, receiveMessageOnPort, Worker } from 'node:worker_threads'
import { gzipSync } from 'node:zlib'
import { SwappableBuffer, userfaultUnsupported } from '@tmem/userfault'
import koffi from 'koffi'
import { increments } from './increments.mjs'

const MiB = 2 ** 20
const pageBytes = 4096
const layers = new URL('./layers.mjs', import.meta.url).href
const zcache = import.meta.resolve('@tmem/zcache')
const frontswap = import.meta.resolve('@tmem/frontswap')
const modules = [layers, zcache, frontswap]
const [, , name, argument] = process.argv

const make = (bytes, residentBytes, stack, more = {}) =>
  SwappableBuffer.open({ bytes, residentBytes, stack, modules, ...more })

/** xorshift: the same numbers in every run. */
let seed = 0x2545f491
const random = () => {
  seed ^= seed << 13
  seed ^= seed >>> 17
  seed ^= seed << 5
  return seed >>> 0
}

/** A region whose every page holds words made of its number and a version. Version 0 is all zeros. */
class Pages {
  constructor(buffer) {
    this.words = new Uint32Array(buffer)
    this.bytes = new Uint8Array(buffer)
    this.count = buffer.byteLength / pageBytes
    this.versions = new Uint32Array(this.count)
    this.wrong = 0
  }

  /** Three words in four are the same in a page: it shrinks to about a third. */
  word(page, version, i) {
    if (version === 0) return 0
    return (
      ((i & 3) === 0 ? Math.imul(version * 7919 + i + page, 40503) : Math.imul(page + 1, 2654435761) + version) >>> 0
    )
  }

  write(page) {
    const version = ++this.versions[page]
    for (let i = 0, at = page * 1024; i < 1024; i++) this.words[at + i] = this.word(page, version, i)
  }

  check(page) {
    const version = this.versions[page]
    for (let i = 0, at = page * 1024; i < 1024; i++)
      if (this.words[at + i] !== this.word(page, version, i)) {
        this.wrong++
        return
      }
  }

  checkAll() {
    for (let page = 0; page < this.count; page++) this.check(page)
  }

  touch(operations, each = () => {}) {
    for (let n = 0; n < operations; n++) {
      const page = random() % this.count
      if (random() % 3 === 0) this.write(page)
      else this.check(page)
      each(n)
    }
  }

  /** Makes sure that these pages are not in memory. */
  pushOut(first, count) {
    for (let page = 0; page < this.count; page++) if (page < first || page >= first + count) this.check(page)
  }
}

/** Kilobytes of a buffer that are in memory, as the kernel counts them. */
function residentKiB(buffer) {
  const start = Number(koffi.address(buffer)).toString(16)
  const text = readFileSync('/proc/self/smaps', 'utf8')
  const at = text.search(new RegExp(`^0*${start}-`, 'm'))
  return Number(/^Rss:\s+(\d+) kB$/m.exec(text.slice(at))[1])
}

const isUserfaultfd = (fd) => {
  try {
    return readlinkSync(`/proc/self/fd/${fd}`).includes('userfaultfd')
  } catch (error) {
    // The descriptor of the folder itself.
    if (error.code === 'ENOENT') return false
    throw error
  }
}

const counters = (memory) => memory.stats().counters

/** What moved to and from a place of the stack; nothing where there is no such place. */
const movesOf = (memory, place) => {
  const [stack] = memory.stats().children
  const found = stack.children.find(({ name }) => name === place)
  return found?.children.find(({ name }) => name === 'moves').counters
}

const scenarios = {
  /** Region 8 times its resident limit. */
  async pages() {
    const memory = await make(256 * MiB, 32 * MiB, 'zcache(limit=192MiB)', { cpu: 0 })
    const pages = new Pages(memory.buffer)
    let mostKiB = 0
    for (let page = 0; page < pages.count; page++) pages.write(page)
    pages.touch(60_000, (n) => {
      if (n % 10_000 === 9_999) mostKiB = Math.max(mostKiB, residentKiB(memory.buffer))
    })
    pages.checkAll()
    mostKiB = Math.max(mostKiB, residentKiB(memory.buffer))
    const stats = memory.stats()
    const written = pages.versions.reduce((sum, version) => sum + (version > 0 ? 1 : 0), 0)
    await memory.close()
    return { wrong: pages.wrong, written, mostKiB, stats, after: pages.words[0] }
  },

  /** Bare increments by two threads in a set that hardly fits: every store that is lost is a wrong sum. */
  async increments() {
    const memory = await make(2 * MiB, 1.875 * MiB, 'zcache(limit=8MiB)')
    const shared = {
      address: Number(koffi.address(memory.buffer)),
      length: memory.buffer.byteLength,
      turns: new Int32Array(new SharedArrayBuffer(8)),
      increments: true,
    }
    const worker = new Worker(new URL('./toucher.mjs', import.meta.url), { workerData: shared, execArgv: [] })
    const other = new Promise((resolve) => worker.once('message', resolve))
    while (Atomics.load(shared.turns, 0) === 0) await new Promise((resolve) => setTimeout(resolve, 1))
    const wrong = increments(memory.buffer, 0, 200_000, random)
    Atomics.store(shared.turns, 1, 1)
    const wrongThere = await other
    const { writeFaults, staleFaults, stores } = counters(memory)
    await memory.close()
    return { wrong, wrongThere, writeFaults, staleFaults, stores }
  },

  /** A second pass that only reads compresses nothing, and a store to a clean page makes its copy invalid. */
  async clean() {
    const memory = await make(8 * MiB, MiB, 'zcache(limit=16MiB)')
    const pages = new Pages(memory.buffer)
    for (let page = 0; page < pages.count; page++) pages.write(page)
    for (let page = 0; page < pages.count; page++) pages.check(page)
    const before = memory.stats()
    for (let pass = 0; pass < 3; pass++) pages.checkAll()
    const read = memory.stats()
    // One word of each page: a load, a fault for the store, and one page to compress.
    for (let page = 0; page < pages.count; page++) {
      pages.check(page)
      pages.write(page)
    }
    pages.checkAll()
    const written = memory.stats()
    const flat = ({ counters, children: [below] }) => ({
      ...counters,
      stored: below.counters.stored,
      live: below.counters.pages,
      encoded: below.counters.encoded,
    })
    await memory.close()
    return { wrong: pages.wrong, count: pages.count, before: flat(before), read: flat(read), written: flat(written) }
  },

  /** Faults inside of system calls, in the runtime's pool of threads, in native code. */
  async native() {
    const folder = argument
    const memory = await make(16 * MiB, MiB, 'zcache(limit=32MiB)')
    const pages = new Pages(memory.buffer)
    for (let page = 0; page < pages.count; page++) pages.write(page)
    const bytes = Buffer.from(memory.buffer)
    const length = 128 * pageBytes
    const expected = Buffer.alloc(length)
    for (let i = 0; i < length / 4; i++) expected.writeUInt32LE(pages.word(i >> 10, 1, i & 1023), i * 4)
    const part = bytes.subarray(0, length)
    const sum = (data) => createHash('sha256').update(data).digest('hex')
    const answer = {}
    pages.pushOut(0, 128)
    answer.hash = sum(part) === sum(expected)
    pages.pushOut(0, 128)
    writeFileSync(join(folder, 'out'), part)
    answer.write = readFileSync(join(folder, 'out')).equals(expected)
    pages.pushOut(0, 128)
    answer.compare = Buffer.compare(part, expected) === 0
    pages.pushOut(0, 128)
    answer.zip = gzipSync(part).equals(gzipSync(expected))
    const file = openSync(join(folder, 'in'), 'w+')
    const content = Buffer.alloc(length, 'something else ')
    writeSync(file, content)
    pages.pushOut(0, 128)
    answer.readBytes = readSync(file, part, 0, length, 0)
    pages.pushOut(0, 128)
    answer.read = part.equals(content)
    part.fill(0)
    pages.pushOut(0, 128)
    // Eight at a time, in four threads, at places that are not whole pages.
    const piece = length / 8
    const lengths = await Promise.all(
      Array.from({ length: 8 }, (_, n) => promisify(read)(file, part, n * piece, piece, n * piece)),
    )
    closeSync(file)
    answer.poolBytes = lengths.reduce((all, { bytesRead }) => all + bytesRead, 0)
    pages.pushOut(0, 128)
    answer.pool = part.equals(content)
    await promisify(randomFill)(part)
    const random = Buffer.from(part)
    pages.pushOut(0, 128)
    answer.random = part.equals(random) && !random.equals(content)
    answer.wrong = pages.wrong
    await memory.close()
    return answer
  },

  /** Garbage on both sides. */
  async garbage() {
    const memory = await make(8 * MiB, MiB, 'litter')
    const pages = new Pages(memory.buffer)
    let trash = []
    pages.touch(15_000, (n) => {
      trash.push(new Array(200).fill({ n }))
      if (trash.length > 1000) trash = []
      if (n % 1000 === 0) globalThis.gc()
    })
    pages.checkAll()
    const { evictions } = counters(memory)
    await memory.close()
    return { wrong: pages.wrong, evictions }
  },

  /** Child processes are started while pages come and go. */
  async children() {
    const memory = await make(16 * MiB, 2 * MiB, 'zcache(limit=32MiB)')
    const pages = new Pages(memory.buffer)
    pages.touch(3000)
    const said = []
    const running = []
    for (let n = 0; n < 8; n++) {
      said.push(spawnSync(process.execPath, ['-p', '6 * 7'], { encoding: 'utf8', timeout: 10_000 }).stdout.trim())
      pages.touch(500)
      const child = spawn('sleep', ['0.05'], { timeout: 10_000, killSignal: 'SIGKILL' })
      running.push(new Promise((resolve) => child.once('exit', (code) => resolve(code))))
      pages.touch(500)
    }
    const codes = await Promise.all(running)
    pages.checkAll()
    await memory.close()
    return { wrong: pages.wrong, said, codes }
  },

  /** Two buffers, each with a pager of its own. */
  async two() {
    const one = await make(8 * MiB, MiB, 'zcache(limit=16MiB)')
    const other = await make(8 * MiB, 2 * MiB, 'memory(limit=16MiB)')
    const a = new Pages(one.buffer)
    const b = new Pages(other.buffer)
    for (let n = 0; n < 3000; n++) {
      a.touch(1)
      b.touch(1)
    }
    await one.close()
    b.touch(1000)
    b.checkAll()
    await other.close()
    return { wrong: a.wrong + b.wrong }
  },

  /** A store that takes 1 MiB of 8. */
  async refused() {
    const memory = await make(8 * MiB, MiB, 'memory(limit=1MiB)')
    const pages = new Pages(memory.buffer)
    for (let page = 0; page < pages.count; page++) pages.write(page)
    pages.checkAll()
    const stats = counters(memory)
    const trimmed = memory.trim(8 * MiB)
    pages.checkAll()
    const kib = residentKiB(memory.buffer)
    await memory.close()
    return { wrong: pages.wrong, stats, trimmed, kib }
  },

  /** A store that refuses for a while. */
  async moody() {
    const memory = await make(8 * MiB, MiB, 'moody(from=100,to=3000)')
    const pages = new Pages(memory.buffer)
    let most = 0
    for (let pass = 0; pass < 4; pass++)
      for (let page = 0; page < pages.count; page++) {
        pages.write(page)
        if (page % 100 === 0) most = Math.max(most, counters(memory).exceededPages)
      }
    pages.checkAll()
    const stats = counters(memory)
    await memory.close()
    return { wrong: pages.wrong, most, stats }
  },

  async transfer() {
    const memory = await make(MiB, MiB / 2, 'zcache(limit=4MiB)')
    const pages = new Pages(memory.buffer)
    for (let page = 0; page < pages.count; page++) pages.write(page)
    const { port1, port2 } = new MessageChannel()
    const ways = {
      clone: () => structuredClone(memory.buffer, { transfer: [memory.buffer] }),
      post: () => {
        port1.postMessage(memory.buffer, [memory.buffer])
        return receiveMessageOnPort(port2).message
      },
    }
    const said = {}
    for (const [name, way] of Object.entries(ways))
      try {
        const got = way()
        said[name] = got !== memory.buffer && Buffer.compare(Buffer.from(got), pages.bytes) === 0 ? 'copied' : 'wrong'
      } catch (error) {
        said[name] = error.name
      }
    port1.close()
    pages.checkAll()
    const left = memory.buffer.byteLength
    await memory.close()
    return { ...said, left, wrong: pages.wrong }
  },

  async trim() {
    const memory = await make(16 * MiB, 8 * MiB, 'zcache(limit=32MiB)')
    const pages = new Pages(memory.buffer)
    for (let page = 0; page < 1000; page++) pages.write(page)
    const before = residentKiB(memory.buffer)
    const some = memory.trim(pageBytes * 99 + 1)
    const afterSome = residentKiB(memory.buffer)
    const nothing = memory.trim(0)
    const rest = memory.trim(Infinity)
    const after = residentKiB(memory.buffer)
    const stats = counters(memory)
    pages.checkAll()
    await memory.close()
    return { wrong: pages.wrong, before, some, afterSome, nothing, rest, after, stats }
  },

  /** Pages for which the store has to wait, while the pool's four threads and this one want some. */
  async deferred() {
    const [stack, folder] = argument.split('|')
    const memory = await make(4 * MiB, MiB, stack)
    const pages = new Pages(memory.buffer)
    for (let page = 0; page < pages.count; page++) pages.write(page)
    pages.checkAll()
    const file = await promisify(open)(join(folder, 'data'), 'w+')
    const bytes = new Uint8Array(memory.buffer)
    const zeros = new Uint8Array(16 * pageBytes)
    writeSync(file, zeros)
    const reads = Array.from({ length: 16 }, (_, n) =>
      // Not a whole page at either end, so that what is there has to come in first.
      promisify(read)(file, bytes, n * 16 * pageBytes + 100, 15 * pageBytes, 0),
    )
    for (let page = 300; page < 400; page++) pages.check(page)
    await Promise.all(reads)
    await promisify(close)(file)
    let unread = 0
    for (let n = 0; n < 16; n++) {
      const start = n * 16 * pageBytes + 100
      for (let at = start; at < start + 15 * pageBytes; at++) if (bytes[at] !== 0) unread++
      for (let page = n * 16; page < n * 16 + 16; page++) pages.write(page)
    }
    pages.checkAll()
    const stats = counters(memory)
    const moves = movesOf(memory, 'frontswap')
    await memory.close()
    return { wrong: pages.wrong, unread, stats, moves }
  },

  /** Closed while a worker and the pool's threads use it: they go on, with zeros. */
  async close() {
    const memory = await make(8 * MiB, MiB, argument)
    const pages = new Pages(memory.buffer)
    for (let page = 0; page < pages.count; page++) pages.write(page)
    const turns = new Int32Array(new SharedArrayBuffer(8))
    const worker = new Worker(new URL('./toucher.mjs', import.meta.url), {
      workerData: { address: Number(koffi.address(memory.buffer)), length: memory.buffer.byteLength, turns },
      execArgv: [],
    })
    while (Atomics.load(turns, 0) < 500) await new Promise((resolve) => setTimeout(resolve, 5))
    const fills = Array.from({ length: 4 }, (_, n) =>
      promisify(randomFill)(new Uint8Array(memory.buffer, n * MiB, MiB)),
    )
    await Promise.all([memory.close(), memory.close()])
    const atClose = Atomics.load(turns, 0)
    while (Atomics.load(turns, 0) < atClose + 500) await new Promise((resolve) => setTimeout(resolve, 5))
    Atomics.store(turns, 1, 1)
    await new Promise((resolve) => worker.once('exit', resolve))
    await Promise.all(fills)
    const errors = []
    for (const use of [() => memory.stats(), () => memory.trim(1)])
      try {
        use()
      } catch (error) {
        errors.push(error.code)
      }
    return { errors, last: new Uint8Array(memory.buffer)[7 * MiB + 5] }
  },

  /** The stack cannot be closed. */
  async clinging() {
    const memory = await make(MiB, 512 * 1024, 'clinging')
    new Uint8Array(memory.buffer).fill(1)
    try {
      await memory.close()
      return {}
    } catch (error) {
      return { code: error.code, message: error.message }
    }
  },

  /** The pager ends; so must this process, though its only thread is in a fault. */
  async death() {
    const memory = await make(4 * MiB, MiB, argument)
    new Pages(memory.buffer).touch(100_000)
    return { survived: true }
  },

  /** The process ends in one of several ways while a buffer is open, and a thread of the pool uses it. */
  async exit() {
    const memory = await make(4 * MiB, MiB, 'zcache(limit=16MiB)')
    const pages = new Pages(memory.buffer)
    for (let page = 0; page < pages.count; page++) pages.write(page)
    process.on('exit', () => {
      for (let page = 0; page < 768; page++) pages.check(page)
      writeSync(1, JSON.stringify({ wrong: pages.wrong }))
    })
    if (argument === 'call') {
      void promisify(randomFill)(new Uint8Array(memory.buffer, 3 * MiB))
      process.exit(3)
    }
    if (argument === 'throw') throw new Error('on purpose')
    return undefined
  },

  /** Buffers that were closed and dropped leave no memory maps behind. */
  async collected() {
    const size = () => Number(/^VmSize:\s+(\d+)/m.exec(readFileSync('/proc/self/status', 'utf8'))[1])
    const sizes = []
    for (let n = 0; n < 6; n++) {
      const memory = await make(1024 * MiB, MiB, 'memory(limit=1MiB)')
      new Uint8Array(memory.buffer)[n * 4096] = 1
      await memory.close()
      await new Promise((resolve) => setTimeout(resolve, 20))
      globalThis.gc()
      await new Promise((resolve) => setTimeout(resolve, 20))
      sizes.push(size())
    }
    return { grownKiB: sizes[5] - sizes[1] }
  },

  /** Opened in a worker, and closed there, or left open at its end. */
  async worker() {
    const worker = new Worker(new URL('./owner.mjs', import.meta.url), { workerData: argument, execArgv: [] })
    const answer = await new Promise((resolve, reject) => {
      worker.once('message', resolve)
      worker.once('error', reject)
    })
    const code = await new Promise((resolve) => worker.once('exit', resolve))
    return { ...answer, code }
  },

  /** What cannot be. */
  async mistakes() {
    const said = {}
    const attempt = async (label, options) => {
      try {
        const memory = await SwappableBuffer.open({
          bytes: MiB,
          residentBytes: MiB / 2,
          stack: 'memory(limit=1MiB)',
          ...options,
        })
        await memory.close()
        said[label] = 'opened'
      } catch (error) {
        said[label] = `${error.name} ${error.code ?? ''} ${error.message}`
      }
    }
    await attempt('fine', {})
    await attempt('no bytes', { bytes: 0 })
    await attempt('odd bytes', { bytes: 5000 })
    await attempt('too many bytes', { bytes: 2 ** 60 })
    await attempt('few resident', { residentBytes: 4096 })
    await attempt('cpu', { cpu: -1 })
    await attempt('absent cpu', { cpu: 8000 })
    await attempt('text', { stack: 'zcahe(limit=1MiB)', modules: [zcache] })
    await attempt('no factory', { modules: [new URL('./empty.mjs', import.meta.url).href] })
    await attempt('no module', { modules: ['file:///nowhere.mjs'] })
    await attempt('data', { stack: [{ zcache: { limit: '1MiB' } }], modules: [zcache] })
    const memory = await SwappableBuffer.open({ bytes: MiB, residentBytes: MiB / 2, stack: 'memory(limit=1MiB)' })
    try {
      memory.trim(-1)
    } catch (error) {
      said.trim = error.name
    }
    await memory.close()
    said.descriptors = readdirSync('/proc/self/fd').filter((fd) => isUserfaultfd(fd)).length
    return said
  },

  /** Both threads on one processor while the buffer is open. */
  async cpu() {
    const allowed = () => /^Cpus_allowed_list:\s+(.*)$/m.exec(readFileSync('/proc/thread-self/status', 'utf8'))[1]
    const before = allowed()
    const memory = await make(MiB, MiB / 2, 'memory(limit=2MiB)', { cpu: 0 })
    const during = allowed()
    new Pages(memory.buffer).touch(1000)
    await memory.close()
    return { before, during, after: allowed() }
  },

  /** Why it does not work, on machines that lack something. */
  async unsupported() {
    if (argument === 'platform') Object.defineProperty(process, 'platform', { value: 'darwin' })
    if (argument === 'arch') Object.defineProperty(process, 'arch', { value: 's390x' })
    if (argument === 'privileges') {
      // What it needs is loaded: nobody may not be able to read where this checkout is.
      await userfaultUnsupported()
      process.setuid(65534)
    }
    const why = await userfaultUnsupported()
    try {
      await make(MiB, MiB / 2, 'memory(limit=2MiB)')
      return { why, opened: true }
    } catch (error) {
      return { why, code: error.code, same: error.message === why }
    }
  },
}

const answer = await scenarios[name]()
if (answer !== undefined) console.log(JSON.stringify(answer))
