/**
 * `tmem bench cleancache`: a page cache with a compressed second chance against a plain one of the same total memory.
 *
 * Two loads, both of real files, every page compared with the file:
 * - a set of source files three times the first level is read twice; tmem has as much memory as the first level;
 * - the reads of a real build of this repository (`tsc -b`, recorded by strace), again and again, as somebody builds
 * who works; both
 *   caches have memory for four fifths of the pages, ours half of it as tmem.
 *
 * Files are read around the operating system's cache, so that a read is a read of the disk, as in a machine whose
 * memory is used up. Where that is refused a row says so, and times are of reads that this cache answers; the numbers
 * of pages are the same.
 *
 * A saved read is a page that came back from tmem instead of from the file. What tmem costs is the time inside of its
 * calls, puts and gets that were in vain included; beside it stands what the codec alone takes for the same pages. The
 * seed's headline, about 300 I/O a second saved at 0.1 to 0.2 % of a CPU, is the goal of two rows: one counts pages,
 * one requests to the disk.
 */
import { spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, symlinkSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { Cleancache, type CleancacheBackend, tmemBackend } from '@tmem/cleancache'
import { createLz4Arena } from '@tmem/codecs'
import { basePageSize, compose, type PageStore, Tmem } from '@tmem/core'
import { type CachedFile, DirectReads, PageCache, pageCacheFacts } from '@tmem/page-cache'
import { zcache } from '@tmem/zcache'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { type Bench, median, type Row, ratioRow, type Suite, skippedRow, valueRow } from './frame.ts'

/** The suite. */
export const cleancache: Suite = {
  name: 'cleancache',
  summary: 'files through a page cache with a compressed second chance, against a plain cache of the same memory',
  run: async (bench) => [...(await rereadRows(bench)), ...(await replayRows(bench))],
}

/** A part of a file, read at one go. */
interface Read {
  readonly path: string
  readonly position: number
  readonly length: number
}

/** A page cache, what is behind it, and what its calls cost. */
class Rig {
  readonly cache: PageCache
  /** Milliseconds inside of tmem, and pages that came from it. */
  tmemMs = 0
  readonly cleancache = new Cleancache()
  readonly direct = new DirectReads()
  readonly #store: PageStore | undefined
  readonly #files = new Map<string, CachedFile>()
  readonly #into: Buffer = Buffer.alloc(2 ** 20)

  /** `tmemBytes`: 0 for a plain cache. */
  constructor(sizeBytes: number, tmemBytes: number) {
    if (tmemBytes > 0) {
      this.#store = compose([zcache({ limitBytes: tmemBytes })])
      this.cleancache.register(this.#timed(tmemBackend(new Tmem(this.#store), 1)))
    }
    // The files may lie on any file system: none of them changes here.
    const optIn = (): { facts: ReturnType<typeof pageCacheFacts> } => ({ facts: pageCacheFacts('bench', basePageSize) })
    this.cache = new PageCache({ sizeBytes, cleancache: this.cleancache, optIn, io: this.direct })
  }

  /** Reads, and compares with the file. */
  async read({ path, position, length }: Read, wanted: Buffer): Promise<void> {
    let file = this.#files.get(path)
    if (file === undefined) {
      file = await this.cache.open(path)
      this.#files.set(path, file)
    }
    for (let done = 0; done < length; ) {
      const count = Math.min(this.#into.length, length - done)
      const { bytesRead } = await file.read(this.#into, 0, count, position + done)
      const from = position + done
      if (bytesRead !== count || this.#into.compare(wanted, from, from + count, 0, count) !== 0)
        throw new Failed(`bench cleancache: wrong bytes in ${path} from ${from}`)
      done += count
    }
  }

  /** Why reads of a file do not go to the disk, if they do not. */
  get cachedBecause(): string | undefined {
    const [reason] = this.direct.refused.values()
    return reason ?? (this.direct.counters.directReads === 0 ? 'files cannot be opened for direct reading' : undefined)
  }

  async closeFiles(): Promise<void> {
    for (const file of this.#files.values()) await file.close()
    this.#files.clear()
  }

  async close(): Promise<void> {
    await this.cache.close()
    await this.#store?.close()
  }

  /** Written out, so that nothing but the clock itself is measured besides. */
  #timed(backend: CleancacheBackend): CleancacheBackend {
    return {
      ...backend,
      putPage: (pool, key, index, page) => {
        const start = performance.now()
        backend.putPage(pool, key, index, page)
        this.tmemMs += performance.now() - start
      },
      getPage: (pool, key, index, into) => {
        const start = performance.now()
        const outcome = backend.getPage(pool, key, index, into)
        this.tmemMs += performance.now() - start
        return outcome
      },
      invalidatePage: (pool, key, index) => {
        const start = performance.now()
        backend.invalidatePage(pool, key, index)
        this.tmemMs += performance.now() - start
      },
      invalidateInode: (pool, key) => {
        const start = performance.now()
        backend.invalidateInode(pool, key)
        this.tmemMs += performance.now() - start
      },
    }
  }
}

/** A row that says why times are not those of a disk, where they are not. */
function directRows(name: string, { cachedBecause }: Rig): readonly Row[] {
  return cachedBecause === undefined ? [] : [skippedRow(`${name}-direct`, cachedBecause)]
}

/** Root of the checkout, or of whatever the program is installed in. */
const root = join(dirname(fileURLToPath(import.meta.url)), '../../../..')
const pagesOf = (bytes: number): number => Math.ceil(bytes / basePageSize)

/** Source files of this machine, in a fixed order, with as many pages as wanted or as there are. */
function sourceFiles(pages: number): Read[] {
  const files: Read[] = []
  let found = 0
  const walk = (folder: string): void => {
    const entries = readdirSync(folder, { withFileTypes: true }).sort((a, b) => (a.name < b.name ? -1 : 1))
    for (const entry of entries) {
      if (found >= pages) return
      const path = join(folder, entry.name)
      if (entry.isDirectory()) walk(path)
      else if (entry.isFile() && /\.(ts|mts|js|mjs|cjs|h|c|py)$/.test(entry.name)) {
        const { size } = statSync(path)
        // As many pages as wanted, not more: a large file is left out when it does not fit any more.
        if (size === 0 || found + pagesOf(size) > pages) continue
        files.push({ path, position: 0, length: size })
        found += pagesOf(size)
      }
    }
  }
  // Nobody edits these meanwhile.
  for (const folder of [join(root, 'node_modules/.pnpm'), '/usr/include', '/usr/lib'])
    if (existsSync(folder)) walk(folder)
  return files
}

/** A working set of three times the first level, read twice. */
async function rereadRows(bench: Bench): Promise<readonly Row[]> {
  const frames = bench.quick ? 1024 : 4096
  const sizeBytes = frames * basePageSize
  const files = sourceFiles(frames * 3)
  const pages = files.reduce((sum, { length }) => sum + pagesOf(length), 0)
  if (pages < frames * 3) return [skippedRow('reread-3x', `only ${pages} pages of source files were found here`)]
  const contents = files.map(({ path }) => readFileSync(path))
  const rigs = { ours: new Rig(sizeBytes, sizeBytes), plain: new Rig(sizeBytes * 2, 0) }
  const second = { ours: 0, plain: 0 }
  const seconds = { ours: 0, plain: 0 }
  const { ours } = rigs
  try {
    for (let round = 0; round < 2; round++)
      for (const name of ['ours', 'plain'] as const) {
        const rig = rigs[name]
        const { diskPagesRead } = rig.cache.counters
        const start = performance.now()
        for (let n = 0; n < files.length; n++) {
          await rig.read(files[n]!, contents[n]!)
          if (n % 64 === 0) {
            await setImmediate()
            throwIfInterrupted(bench.signal)
          }
        }
        await rig.closeFiles()
        if (round === 0) continue
        second[name] = rig.cache.counters.diskPagesRead - diskPagesRead
        seconds[name] = performance.now() - start
      }
    const saved = ours.cleancache.counters.succ_gets
    return [
      ...directRows('reread-3x', rigs.plain),
      valueRow('reread-3x-from-file', '% of pages', (second.ours / pages) * 100, 10),
      valueRow('reread-3x-from-file-plain', '% of pages', (second.plain / pages) * 100),
      ratioRow('reread-3x-time', 'ms', seconds.ours, 'plain-cache-of-the-same-memory', seconds.plain),
      saved === 0
        ? skippedRow('reread-3x-tmem', 'no page came back from tmem')
        : valueRow('reread-3x-tmem-per-saved-read', 'µs', (ours.tmemMs * 1000) / saved),
    ]
  } finally {
    for (const rig of Object.values(rigs)) await rig.close()
  }
}

/** The reads of a build of this repository, in their order; or why they cannot be had. */
function recordBuild(folder: string): readonly Read[] | string {
  const compiler = join(root, 'node_modules/.bin/tsc')
  if (!existsSync(join(root, 'tsconfig.json')) || !existsSync(compiler)) return 'this is no checkout with its tools'
  if (spawnSync('strace', ['-V']).error !== undefined) return 'strace is not installed'
  // A copy, so that nothing of the checkout is built anew.
  for (const name of readdirSync(root))
    if (/^(tsconfig.*\.json|package\.json)$/.test(name)) cpSync(join(root, name), join(folder, name))
  for (const group of ['packages', 'apps'])
    cpSync(join(root, group), join(folder, group), {
      recursive: true,
      verbatimSymlinks: true,
      filter: (path) => !/\/(dist|\.reports)$/.test(path),
    })
  symlinkSync(join(root, 'node_modules'), join(folder, 'node_modules'))
  const trace = join(folder, 'trace')
  const options = ['-f', '-qq', '-y', '-s', '0', '-e', 'trace=openat,read,pread64', '-o', trace]
  const built = spawnSync('strace', [...options, compiler, '-b', 'tsconfig.json'], { cwd: folder, timeout: 300_000 })
  if (built.status !== 0)
    return `the build ended with ${built.status ?? built.signal}: ${built.stdout.toString().slice(0, 200)}`
  return readsOf(readFileSync(trace, 'latin1'))
}

/** Reads of regular source files out of strace's lines. */
export function readsOf(trace: string): Read[] {
  const reads: Read[] = []
  const positions = new Map<string, number>()
  /** What a thread has begun and not ended. */
  const open = new Map<string, string>()
  for (const line of trace.split('\n')) {
    const [, thread = '', text = ''] = /^(\d+)\s+(.*)$/.exec(line) ?? []
    if (text.endsWith('<unfinished ...>')) {
      open.set(thread, text.slice(0, -'<unfinished ...>'.length))
      continue
    }
    const resumed = /^<\.\.\. \w+ resumed>(.*)$/.exec(text)
    const call = resumed === null ? text : (open.get(thread) ?? '') + resumed[1]!
    const opened = /^openat\(.* = \d+<(.*)>$/.exec(call)
    if (opened !== null) positions.set(unescaped(opened[1]!), 0)
    const read = /^(read|pread64)\(\d+<(\/[^>]*)>,.*?(?:, (\d+))?\) = (\d+)$/.exec(call)
    if (read === null) continue
    const [, name, shown = '', offset, count = '0'] = read
    const path = unescaped(shown)
    if (!/\.(ts|mts|tsx|js|mjs|json)$/.test(path) || count === '0') continue
    const length = Number(count)
    const position = name === 'pread64' ? Number(offset) : (positions.get(path) ?? 0)
    if (name === 'read') positions.set(path, position + length)
    reads.push({ path, position, length })
  }
  return reads
}

/** A path as it is: strace shows bytes that are not ASCII, or have a meaning in its lines, as `\303` (octal). */
function unescaped(shown: string): string {
  const bytes = shown.replaceAll(/\\([0-7]{1,3})/g, (_, digits: string) =>
    String.fromCharCode(Number.parseInt(digits, 8)),
  )
  return Buffer.from(bytes, 'latin1').toString()
}

/** Measures what compressing a page and getting it back takes at least, in µs: a saved read costs one of each. */
function codecAlone(files: readonly Buffer[]): () => number {
  const room = 2 * basePageSize
  const { bytes, codec } = createLz4Arena(room)
  const page = new Uint8Array(basePageSize)
  return () => {
    let pages = 0
    let milliseconds = 0
    for (const file of files)
      for (let at = 0; at < file.length; at += basePageSize, pages++) {
        page.fill(0).set(file.subarray(at, at + basePageSize))
        const start = performance.now()
        const length = codec.compress(page, 0, basePageSize, bytes, 0, room)
        codec.decompress(bytes, 0, length, page, 0, basePageSize)
        milliseconds += performance.now() - start
      }
    return (milliseconds * 1000) / pages
  }
}

/** A real build, replayed. */
async function replayRows(bench: Bench): Promise<readonly Row[]> {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-bench-'))
  try {
    const recorded = recordBuild(folder)
    if (typeof recorded === 'string') return [skippedRow('replay-tsc', recorded)]
    const contents = new Map<string, Buffer>()
    const reads: Read[] = []
    for (const read of recorded) {
      // What the build made itself, and removed again, cannot be read any more.
      if (!contents.has(read.path) && existsSync(read.path)) contents.set(read.path, readFileSync(read.path))
      const bytes = contents.get(read.path)
      if (bytes !== undefined && read.position + read.length <= bytes.length) reads.push(read)
    }
    const pages = [...contents.values()].reduce((sum, bytes) => sum + pagesOf(bytes.length), 0)
    if (pages < 300) return [skippedRow('replay-tsc', `the build read ${pages} pages only`)]
    return await replay(bench, reads, contents, Math.ceil(pages * 0.4) * basePageSize)
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

async function replay(
  bench: Bench,
  reads: readonly Read[],
  contents: ReadonlyMap<string, Buffer>,
  sizeBytes: number,
): Promise<readonly Row[]> {
  // The first ones until the runtime has compiled what is measured: medians leave them out.
  const builds = bench.quick ? 3 : 25
  const rigs = { ours: new Rig(sizeBytes, sizeBytes), plain: new Rig(sizeBytes * 2, 0) }
  const requests = { ours: [] as number[], plain: [] as number[] }
  const pages = { ours: [] as number[], plain: [] as number[] }
  const milliseconds = { ours: [] as number[], plain: [] as number[] }
  const { ours } = rigs
  const perSaved = { us: [] as number[], puts: [] as number[], codecUs: [] as number[] }
  const oursMs: number[] = []
  const codec = codecAlone([...contents.values()])
  try {
    for (let build = 0; build <= builds; build++)
      for (const name of ['ours', 'plain'] as const) {
        const rig = rigs[name]
        const { diskReads, diskPagesRead } = rig.cache.counters
        const [msBefore, before] = [ours.tmemMs, { ...ours.cleancache.counters }]
        const start = performance.now()
        for (const read of reads) await rig.read(read, contents.get(read.path)!)
        await rig.closeFiles()
        await setImmediate()
        throwIfInterrupted(bench.signal)
        // The first build finds nothing, as after every start.
        if (build === 0) continue
        milliseconds[name].push(performance.now() - start)
        requests[name].push(rig.cache.counters.diskReads - diskReads)
        pages[name].push(rig.cache.counters.diskPagesRead - diskPagesRead)
        if (name === 'plain') continue
        oursMs.push(ours.tmemMs - msBefore)
        const saved = ours.cleancache.counters.succ_gets - before.succ_gets
        if (saved === 0) continue
        perSaved.codecUs.push(codec())
        perSaved.us.push(((ours.tmemMs - msBefore) * 1000) / saved)
        perSaved.puts.push((ours.cleancache.counters.puts - before.puts) / saved)
      }
    const plain = 'plain-cache-of-the-same-memory'
    const rows = [
      ...directRows('replay-tsc', rigs.plain),
      ratioRow('replay-tsc-reads', 'requests', median(requests.ours), plain, median(requests.plain)),
      ratioRow('replay-tsc-pages', 'pages from files', median(pages.ours), plain, median(pages.plain)),
      ratioRow('replay-tsc-time', 'ms', median(milliseconds.ours), plain, median(milliseconds.plain)),
    ]
    if (perSaved.us.length === 0) return [...rows, skippedRow('replay-tsc-tmem', 'no page came back from tmem')]
    const perSavedUs = median(perSaved.us)
    // The disk counts requests, not pages: one request reads many pages of a file.
    const savedRequests = median(requests.plain) - median(requests.ours)
    const perRequestMs = median(oursMs) / savedRequests
    return [
      ...rows,
      valueRow('replay-tsc-puts-per-saved-read', 'puts', median(perSaved.puts)),
      ratioRow('replay-tsc-tmem-per-saved-read', 'µs', perSavedUs, 'codec-alone', median(perSaved.codecUs)),
      valueRow('replay-tsc-tmem-at-300-saved-reads-per-second', '% of a CPU', (perSavedUs * 300) / 10_000, 0.2),
      savedRequests > 0
        ? valueRow('replay-tsc-tmem-at-300-saved-requests-per-second', '% of a CPU', perRequestMs * 30, 0.2)
        : skippedRow('replay-tsc-tmem-at-300-saved-requests-per-second', 'no request was saved'),
    ]
  } finally {
    for (const rig of Object.values(rigs)) await rig.close()
  }
}
