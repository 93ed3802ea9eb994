import { execFileSync } from 'node:child_process'
import { constants, existsSync, mkdtempSync, readFileSync, rmSync, statfsSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Cleancache, tmemBackend } from '@tmem/cleancache'
import { compose, type Layer, systemAllocator, Tmem, TmemError } from '@tmem/core'
import { corrupt, delay, failingAllocator } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { describe, expect, test } from 'vitest'
import { localDisks, PageCache, type PageCacheOptions, pageCacheFacts } from '../src/index.ts'
import { systemError, TimedIo, testFolder } from './timed-io.ts'

const path = testFolder()
const pageSize = 4096

interface Setup {
  readonly cache: PageCache
  readonly cleancache: Cleancache
  readonly io: TimedIo
  readonly name: string
}
let files = 0
/** A cache of 16 pages, and a file of so many pages, page n filled with n + 1. */
function setup(pages: number, options: Partial<PageCacheOptions> & { layers?: Layer[] } = {}): Setup {
  const { layers = [memory({ limitBytes: 2 ** 20 })], ...rest } = options
  const io = new TimedIo()
  const cleancache = new Cleancache()
  cleancache.register(tmemBackend(new Tmem(compose(layers, { check: 'model' })), 1))
  const cache = new PageCache({ sizeBytes: 16 * pageSize, cleancache, io, now: io.now, ...rest })
  const name = path(`file${files++}`)
  writeFileSync(name, numbered(pages))
  return { cache, cleancache, io, name }
}
const numbered = (pages: number): Buffer =>
  Buffer.concat(Array.from({ length: pages }, (_, page) => Buffer.alloc(pageSize, page + 1)))
const pageOf = (fill: number): Buffer => Buffer.alloc(pageSize, fill)
const later = (io: TimedIo): void => {
  io.nowMs += 100
}

async function readPage(file: { read: PageCacheFile['read'] }, page: number): Promise<number> {
  const into = Buffer.alloc(pageSize, 0xee)
  const { bytesRead } = await file.read(into, 0, pageSize, page * pageSize)
  expect(bytesRead).toBe(pageSize)
  expect(into.every((byte) => byte === into[0])).toBe(true)
  return into[0]!
}
type PageCacheFile = Awaited<ReturnType<PageCache['open']>>

describe('the two levels', () => {
  test('a page that fell out comes back from cleancache, without a read of the file, once', async () => {
    const { cache, cleancache, io, name } = setup(3)
    const file = await cache.open(name)
    later(io)
    for (const page of [0, 2]) expect(await readPage(file, page)).toBe(page + 1)
    const reads = io.reads
    expect(cache.dropCaches()).toBeGreaterThan(0)
    expect(cache.residentPages).toBe(0)
    expect(await readPage(file, 2)).toBe(3)
    expect(await readPage(file, 2)).toBe(3)
    expect(io.reads).toBe(reads)
    expect(cleancache.counters.succ_gets).toBe(1)
    await cache.close()
  })

  test('pages of a file that was closed are found again by who opens it again', async () => {
    const { cache, io, name } = setup(2, { inodes: 1 })
    const other = path('other')
    writeFileSync(other, numbered(1))
    let file = await cache.open(name)
    later(io)
    await readPage(file, 1)
    await file.close()
    // Only one file is remembered: the first is forgotten, its pages are put.
    await (await cache.open(other)).close()
    expect(cache.stats().counters).toMatchObject({ inodes: 1, resident: 0 })
    const reads = io.reads
    file = await cache.open(name)
    later(io)
    expect(await readPage(file, 1)).toBe(2)
    expect(io.reads).toBe(reads)
    await cache.close()
  })

  test('pages of a version that is gone are not found by who opens the file again', async () => {
    const { cache, cleancache, io, name } = setup(2, { inodes: 1 })
    const other = path('another')
    writeFileSync(other, numbered(1))
    let file = await cache.open(name)
    later(io)
    await readPage(file, 1)
    await file.close()
    await (await cache.open(other)).close()
    expect(cleancache.counters.puts).toBe(1)
    // The same length, the same inode; nobody here sees it happen.
    io.foreignWrite(name, pageOf(99), pageSize)
    later(io)
    file = await cache.open(name)
    expect(await readPage(file, 1)).toBe(99)
    expect(await readPage(file, 1)).toBe(99)
    await cache.close()
  })

  test('pages that are read again are kept when many others are read once', async () => {
    const { cache, io, name } = setup(64)
    const file = await cache.open(name)
    later(io)
    for (let round = 0; round < 3; round++) for (const page of [50, 40]) await readPage(file, page)
    const scan = await cache.open(name)
    for (let page = 0; page < 30; page++) await readPage(scan, page)
    const reads = io.reads
    const { succ_gets } = { ...cache.stats().children[0]!.counters }
    for (const page of [50, 40]) expect(await readPage(file, page)).toBe(page + 1)
    expect(io.reads).toBe(reads)
    expect(cache.stats().children[0]!.counters['succ_gets']).toBe(succ_gets)
    expect(cache.stats().counters['activations']).toBeGreaterThanOrEqual(2)
    await cache.close()
  })

  test('who reads on finds the next pages there: one request, not one for each page', async () => {
    const { cache, io, name } = setup(64, { sizeBytes: 128 * pageSize })
    const file = await cache.open(name)
    later(io)
    const into = Buffer.alloc(1024)
    for (let at = 0; at < 64 * pageSize; at += 1024) {
      const { bytesRead } = await file.read(into)
      expect([bytesRead, into[0], into[1023]]).toEqual([1024, at / pageSize + 1, at / pageSize + 1].map(Math.floor))
    }
    expect(io.reads).toBeLessThanOrEqual(6)
    expect(cache.counters.readaheadHits).toBe(cache.counters.readaheadPages)
    // Here and there: no read-ahead.
    const random = await cache.open(name)
    cache.dropCaches()
    const { readaheadPages } = cache.counters
    for (const page of [40, 3, 20]) await readPage(random, page)
    expect(cache.counters.readaheadPages).toBe(readaheadPages)
    await cache.close()
  })

  test('two who want the same page wait for the same read', async () => {
    const { cache, io, name } = setup(4)
    const file = await cache.open(name)
    later(io)
    expect(await Promise.all([readPage(file, 2), readPage(file, 2), readPage(file, 2)])).toEqual([3, 3, 3])
    expect(io.reads).toBe(1)
    await cache.close()
  })

  test('when every frame is taken, reads and writes go past them', async () => {
    const { cache, io, name } = setup(40)
    const file = await cache.open(name, 'r+')
    later(io)
    let open = (): void => {}
    const gate = new Promise<void>((resolve) => {
      open = resolve
    })
    // Sixteen pages are being read and wait; the seventeenth has no frame.
    let waiting = 0
    io.beforeRead = () => (waiting++ < 16 ? gate : undefined)
    const held = Array.from({ length: 16 }, (_, page) => readPage(file, page * 2 + 1))
    await new Promise((resolve) => setImmediate(resolve))
    expect(await readPage(file, 38)).toBe(39)
    expect(cache.counters).toMatchObject({ uncachedReads: 1, diskPagesRead: 1 })
    const { bytesWritten } = await file.write(pageOf(99), 0, pageSize, 36 * pageSize)
    expect(bytesWritten).toBe(pageSize)
    expect(readFileSync(name)[36 * pageSize]).toBe(99)
    open()
    expect(await Promise.all(held)).toEqual(Array.from({ length: 16 }, (_, page) => page * 2 + 2))
    expect(await readPage(file, 36)).toBe(99)
    await cache.close()
  })

  test('a hole, and zeros at the end of a file, are not put', async () => {
    const { cache, cleancache, io, name } = setup(0)
    io.foreignTruncate(name, 8 * pageSize)
    io.foreignWrite(name, pageOf(7), 3 * pageSize)
    const file = await cache.open(name)
    later(io)
    for (const page of [0, 3, 7]) expect(await readPage(file, page)).toBe(page === 3 ? 7 : 0)
    cache.dropCaches()
    // Page 0 was read at the start of the file, so others came with it: holes, too.
    expect(cleancache.counters.puts).toBe(1)
    expect(cleancache.counters.invalidates).toBeGreaterThanOrEqual(2)
    await cache.close()
  })
})

describe('a file that is changed by somebody else', () => {
  const changes: [string, (io: TimedIo, name: string) => void, number][] = [
    ['is written', (io, name) => io.foreignWrite(name, pageOf(77), pageSize), 77],
    ['is replaced, perhaps with the same inode', (io, name) => io.foreignReplace(name, pageOf(77)), 2],
  ]
  test.each(changes)('%s: pages in both levels are out of date', async (_what, change, seen) => {
    const { cache, io, name } = setup(4)
    const file = await cache.open(name)
    later(io)
    for (const page of [1, 3]) await readPage(file, page)
    cache.dropCaches()
    expect(await readPage(file, 1)).toBe(2)
    change(io, name)
    // Who has the old file open reads the old file, as always.
    expect(await readPage(file, 1)).toBe(seen)
    later(io)
    expect(await readPage(file, 1)).toBe(seen)
    await file.close()
    const again = await cache.open(name)
    const into = Buffer.alloc(pageSize)
    await again.read(into, 0, pageSize, seen === 77 ? pageSize : 0)
    expect(into.equals(pageOf(77))).toBe(true)
    await cache.close()
  })

  test('while nobody has it open: another file of the same inode gets nothing of the first', async () => {
    const { cache, cleancache, io, name } = setup(1)
    let same = 0
    for (let round = 0; round < 8; round++) {
      const before = statSync(name).ino
      const file = await cache.open(name)
      later(io)
      expect(await readPage(file, 0)).toBe(round + 1)
      expect(await readPage(file, 0)).toBe(round + 1)
      cache.dropCaches()
      await file.close()
      io.foreignReplace(name, pageOf(round + 2))
      if (statSync(name).ino === before) same++
    }
    expect(cleancache.counters.puts).toBe(8)
    // ext4 gives the same number each time; another file system need not.
    expect(same).toBe(statfsSync(name).type === 0xef53 ? 8 : same)
    await cache.close()
  })

  test('is shortened while it is cached: the end is the new end', async () => {
    const { cache, io, name } = setup(8)
    const file = await cache.open(name)
    later(io)
    const all = Buffer.alloc(8 * pageSize)
    expect((await file.read(all, 0, all.length, 0)).bytesRead).toBe(all.length)
    io.foreignTruncate(name, 5000)
    expect((await file.read(all, 0, all.length, 0)).bytesRead).toBe(5000)
    expect((await file.read(all, 0, 10, 6000)).bytesRead).toBe(0)
    expect((await file.stat()).size).toBe(5000)
    // And longer again: what was cut off does not come back.
    io.foreignTruncate(name, 8 * pageSize)
    later(io)
    expect(await readPage(file, 3)).toBe(0)
    await cache.close()
  })

  test('is shortened in the middle of a read: the read ends there, and nothing of it is kept', async () => {
    const { cache, io, name } = setup(8)
    const file = await cache.open(name)
    later(io)
    io.beforeRead = () => {
      io.beforeRead = undefined
      io.foreignTruncate(name, pageSize + 10)
    }
    const all = Buffer.alloc(8 * pageSize)
    const { bytesRead } = await file.read(all, 0, all.length, pageSize)
    expect(bytesRead).toBe(10)
    await cache.close()
  })

  test('is changed in the middle of a read: those who come later do not get the page that was being read', async () => {
    const { cache, io, name } = setup(8)
    const file = await cache.open(name)
    const second = await cache.open(name)
    later(io)
    await readPage(second, 7)
    let reading = (): void => {}
    const begun = new Promise<void>((resolve) => {
      reading = resolve
    })
    let open = (): void => {}
    const gate = new Promise<void>((resolve) => {
      open = resolve
    })
    io.beforeRead = () => {
      io.beforeRead = undefined
      reading()
      return gate
    }
    const early = readPage(file, 3)
    await begun
    io.foreignWrite(name, pageOf(88), 3 * pageSize)
    const late = readPage(second, 3)
    open()
    expect([await early, await late]).toEqual([88, 88])
    later(io)
    expect(await readPage(second, 3)).toBe(88)
    await cache.close()
  })

  test('a change hidden behind the same change time is not missed', async () => {
    const { cache, cleancache, io, name } = setup(2)
    io.foreignWrite(name, pageOf(5), 0)
    const file = await cache.open(name)
    expect(await readPage(file, 0)).toBe(5)
    // In the same tick: the same stamp. Once with the page in the first level, once with the page dropped.
    io.foreignWrite(name, pageOf(7), 0)
    expect(await readPage(file, 0)).toBe(7)
    cache.dropCaches()
    io.foreignWrite(name, pageOf(6), 0)
    expect(await readPage(file, 0)).toBe(6)
    expect(cleancache.counters.puts).toBe(0)
    expect(cache.counters.foreignChanges).toBe(0)
    later(io)
    expect(await readPage(file, 0)).toBe(6)
    cache.dropCaches()
    expect(cleancache.counters.puts).toBeGreaterThan(0)
    await cache.close()
  })

  test('a file system with whole seconds is not trusted for two of them', async () => {
    const { cache, cleancache, io, name } = setup(1)
    const file = await cache.open(name)
    const stat = io.stat.bind(io)
    io.stat = (descriptor) => Object.assign(stat(descriptor), { ctimeNs: 1_700_000_000_000_000_000n })
    io.nowMs = 1_700_000_002_000
    await readPage(file, 0)
    cache.dropCaches()
    expect(cleancache.counters.puts).toBe(0)
    io.nowMs += 200
    await readPage(file, 0)
    cache.dropCaches()
    expect(cleancache.counters.puts).toBe(1)
    await cache.close()
  })

  test('real files, real change times, another process', async () => {
    const cleancache = new Cleancache()
    cleancache.register(tmemBackend(new Tmem(compose([memory({ limitBytes: 2 ** 20 })])), 1))
    const optIn = (): { facts: ReturnType<typeof pageCacheFacts> } => ({ facts: pageCacheFacts('test', pageSize) })
    const cache = new PageCache({ sizeBytes: 16 * pageSize, cleancache, optIn })
    const name = path('real')
    writeFileSync(name, pageOf(1))
    const file = await cache.open(name)
    const script = `require('fs').writeFileSync(process.argv[1], Buffer.alloc(4096, +process.argv[2]))`
    for (let round = 2; round < 8; round++) {
      expect(await readPage(file, 0)).toBe(round - 1)
      if (round % 2 === 0) await new Promise((resolve) => setTimeout(resolve, 30))
      expect(await readPage(file, 0)).toBe(round - 1)
      cache.dropCaches()
      if (round < 5) execFileSync(process.execPath, ['-e', script, name, `${round}`])
      else writeFileSync(name, pageOf(round))
    }
    expect(cleancache.counters.puts).toBeGreaterThan(0)
    await cache.close()
  })
})

describe('writing', () => {
  test('what was written is in the file, and is read, at once; and only what was written', async () => {
    const { cache, io, name } = setup(4)
    const file = await cache.open(name, 'r+')
    later(io)
    await readPage(file, 1)
    expect(await file.write(Buffer.from('bytes'), 0, 5, pageSize + 100)).toMatchObject({ bytesWritten: 5 })
    expect(readFileSync(name).toString('latin1', pageSize + 99, pageSize + 106)).toBe('\x02bytes\x02')
    // Others change the rest of the page.
    io.foreignWrite(name, Buffer.alloc(50, 9), pageSize)
    const into = Buffer.alloc(110)
    await file.read(into, 0, 110, pageSize)
    expect(into).toEqual(
      Buffer.concat([Buffer.alloc(50, 9), Buffer.alloc(50, 2), Buffer.from('bytes'), Buffer.alloc(5, 2)]),
    )
    expect(cache.counters).toMatchObject({ diskWrites: 1, diskBytesWritten: 5 })
    await cache.close()
  })

  test('pages that were read are out of date when they are written, in both levels', async () => {
    const { cache, cleancache, io, name } = setup(4)
    const file = await cache.open(name, 'r+')
    later(io)
    for (let page = 0; page < 4; page++) await readPage(file, page)
    cache.dropCaches()
    expect(cleancache.counters.puts).toBe(4)
    await file.write(pageOf(33), 0, pageSize, pageSize)
    later(io)
    for (let page = 0; page < 4; page++) expect(await readPage(file, page)).toBe(page === 1 ? 33 : page + 1)
    await cache.close()
  })

  test("a full disk: the write says so, is in nobody's way, and may be tried again", async () => {
    const { cache, io, name } = setup(1)
    const file = await cache.open(name, 'r+')
    io.failWrites = 1
    await expect(file.write(pageOf(9), 0, pageSize, pageSize)).rejects.toMatchObject({ code: 'ENOSPC' })
    expect((await file.stat()).size).toBe(pageSize)
    expect((await file.read(Buffer.alloc(1), 0, 1, pageSize)).bytesRead).toBe(0)
    expect(cache.counters.writeErrors).toBe(1)
    await file.write(pageOf(9), 0, pageSize, pageSize)
    expect(readFileSync(name).subarray(pageSize).equals(pageOf(9))).toBe(true)
    await file.close()
    await expect(file.read(Buffer.alloc(1))).rejects.toMatchObject({ code: 'EBADF' })
    await cache.close()
  })

  test('a disk that is full in the middle of a write: what is written counts, and moves the position', async () => {
    const { cache, io, name } = setup(0)
    const file = await cache.open(name, 'w+')
    io.largest = 1000
    const write = io.write.bind(io)
    let writes = 0
    io.write = (...args) => {
      if (++writes === 3) io.failWrites = 1
      return write(...args)
    }
    for (const again of [false, true]) {
      if (again) writes = 0
      const bytes = Buffer.alloc(9000, again ? 2 : 1)
      const { bytesWritten } = again ? await file.writev([bytes.subarray(0, 700), bytes]) : await file.write(bytes)
      expect(bytesWritten).toBe(2000)
    }
    expect(readFileSync(name)).toEqual(Buffer.concat([Buffer.alloc(2000, 1), Buffer.alloc(2000, 2)]))
    await cache.close()
  })

  test('a write does not wait for a page that is being read, and who reads later has what was written', async () => {
    const { cache, io, name } = setup(2)
    const file = await cache.open(name, 'r+')
    later(io)
    let open = (): void => {}
    const gate = new Promise<void>((resolve) => {
      open = resolve
    })
    io.beforeRead = () => gate
    const into = pageOf(0)
    const reading = file.read(into, 0, pageSize, pageSize)
    await new Promise((resolve) => setImmediate(resolve))
    await file.write('new', pageSize)
    open()
    await reading
    // Both were under way: before or after, never a part of it.
    expect(['\x02\x02\x02\x02', 'new\x02']).toContain(into.toString('latin1', 0, 4))
    await file.read(into, 0, 4, pageSize)
    expect(into.toString('latin1', 0, 4)).toBe('new\x02')
    await cache.close()
  })

  test('truncation: a page in part, whole pages, and longer again', async () => {
    const { cache, cleancache, io, name } = setup(6)
    const file = await cache.open(name, 'r+')
    later(io)
    for (let page = 0; page < 6; page++) await readPage(file, page)
    cache.dropCaches()
    await file.write(pageOf(66), 0, pageSize, 2 * pageSize)
    const { puts } = cleancache.counters
    await file.truncate(2 * pageSize + 10)
    expect((await file.stat()).size).toBe(2 * pageSize + 10)
    await file.truncate(6 * pageSize)
    const wanted = numbered(6)
      .fill(66, 2 * pageSize)
      .fill(0, 2 * pageSize + 10)
    const all = Buffer.alloc(7 * pageSize)
    expect((await file.read(all, 0, all.length, 0)).bytesRead).toBe(6 * pageSize)
    expect(all.subarray(0, 6 * pageSize).equals(wanted)).toBe(true)
    expect(readFileSync(name).equals(wanted)).toBe(true)
    expect(cleancache.counters.puts).toBe(puts)
    await cache.close()
  })

  test('a truncation that fails gives nothing up', async () => {
    const { cache, io, name } = setup(2)
    const file = await cache.open(name, 'r+')
    io.failTruncates = 1
    await expect(file.truncate(10)).rejects.toMatchObject({ code: 'ENOSPC' })
    expect(await readPage(file, 1)).toBe(2)
    expect((await file.stat()).size).toBe(2 * pageSize)
    await cache.close()
  })

  test('direct reads take no frame; direct writes are seen by all', async () => {
    const { cache, io, name } = setup(4)
    const file = await cache.open(name, 'r+')
    const direct = await cache.open(name, 'r+', { direct: true })
    later(io)
    await readPage(file, 2)
    await file.write(pageOf(33), 0, pageSize, 0)
    expect(await readPage(direct, 0)).toBe(33)
    await direct.write(pageOf(44), 0, pageSize, 2 * pageSize)
    expect(await readPage(file, 2)).toBe(44)
    cache.dropCaches()
    later(io)
    expect(await readPage(file, 2)).toBe(44)
    expect(cache.residentPages).toBeGreaterThan(0)
    const resident = cache.residentPages
    await readPage(direct, 3)
    expect(cache.residentPages).toBe(resident)
    await cache.close()
  })

  test('changes of its mode, owner and times leave the bytes, and are not taken for those of others', async () => {
    const { cache, io, name } = setup(2)
    const file = await cache.open(name, 'r+')
    later(io)
    expect(await readPage(file, 1)).toBe(2)
    await file.chmod(0o640)
    await file.chown(process.getuid!(), process.getgid!())
    await file.utimes(1, new Date(2_000_000))
    later(io)
    expect(await readPage(file, 1)).toBe(2)
    const { mode, mtimeMs } = await file.stat()
    expect([mode & 0o777, mtimeMs]).toEqual([0o640, 2_000_000])
    expect(cache.counters.foreignChanges).toBe(0)
    await cache.close()
  })

  test('appending goes to the end as it is then, whoever else appends', async () => {
    const { cache, io, name } = setup(1)
    const file = await cache.open(name, 'a+')
    await file.write('one')
    io.foreign(name, constants.O_WRONLY | constants.O_APPEND, (fd) => writeFileSync(fd, 'two'))
    await file.write('three', 0)
    expect(readFileSync(name).subarray(pageSize).toString()).toBe('onetwothree')
    const into = Buffer.alloc(20)
    const { bytesRead } = await file.read(into, 0, 20, pageSize)
    expect(into.toString('utf8', 0, bytesRead)).toBe('onetwothree')
    await cache.close()
  })
})

describe('opening', () => {
  test('flags mean what they mean to node:fs', async () => {
    const { cache, name } = setup(2)
    await expect(cache.open(name, 'wx')).rejects.toMatchObject({ code: 'EEXIST' })
    await expect(cache.open(path('none'))).rejects.toMatchObject({ code: 'ENOENT' })
    await expect(cache.open(name, 'q')).rejects.toThrow(TypeError)
    const reader = await cache.open(name)
    await readPage(reader, 1)
    await expect(reader.write('x')).rejects.toMatchObject({ code: 'EBADF' })
    await expect(reader.truncate(0)).rejects.toMatchObject({ code: 'EINVAL' })
    const writer = await cache.open(name, 'w')
    await expect(writer.read(Buffer.alloc(1))).rejects.toMatchObject({ code: 'EBADF' })
    expect((await reader.read(Buffer.alloc(10), 0, 10, 0)).bytesRead).toBe(0)
    await writer.write('fresh')
    await writer.close()
    await writer.close()
    expect(Buffer.from((await reader.read({ position: 0n })).buffer).toString('latin1', 0, 5)).toBe('fresh')
    const synchronous = await cache.open(name, 'rs+')
    await synchronous.write('now')
    expect(readFileSync(name, 'latin1')).toBe('nowsh')
    const made = await cache.open(path('made'), 'wx+', 0o600)
    expect(statSync(path('made')).mode & 0o777).toBe(0o600)
    await made.write(Buffer.from('xyz'), { offset: 1, length: 1, position: 2 })
    expect((await made.read(Buffer.alloc(5), { position: 0 })).buffer.toString('latin1')).toBe('\0\0y\0\0')
    await cache.close()
    await expect(cache.open(name)).rejects.toMatchObject({ code: 'TMEM_CLOSED' })
  })

  test('misuse throws', async () => {
    expect(() => new PageCache({ sizeBytes: 15 * pageSize })).toThrow(RangeError)
    expect(() => new PageCache({ sizeBytes: 2 ** 20, pageSize: 5000 })).toThrow(RangeError)
    expect(() => new PageCache({ sizeBytes: 2 ** 20, inodes: 0 })).toThrow(RangeError)
    const { cache, name } = setup(1)
    const file = await cache.open(name, 'r+')
    await expect(file.read(Buffer.alloc(4), 2, 3)).rejects.toThrow(RangeError)
    await expect(file.read(Buffer.alloc(4), 0, 4, -2)).rejects.toThrow(RangeError)
    await expect(file.read('x' as never)).rejects.toThrow('options must be an object')
    await expect(file.write(Buffer.alloc(4), 5)).rejects.toThrow(RangeError)
    await expect(file.truncate(1.5)).rejects.toThrow(RangeError)
    await expect(cache.open(path('.'))).rejects.toMatchObject({ code: 'TMEM_UNSUPPORTED' })
    await cache.close()
  })

  test('an unreadable file: the error of the system, and the next try may succeed', async () => {
    const { cache, io, name } = setup(4)
    const file = await cache.open(name)
    later(io)
    io.failReads = 2
    await expect(readPage(file, 2)).rejects.toMatchObject({ code: 'EIO' })
    expect(cache.counters.readErrors).toBe(2)
    expect(await readPage(file, 2)).toBe(3)
    // Read-ahead that fails disturbs nobody.
    cache.dropCaches()
    io.failReads = 1
    expect(await readPage(file, 3)).toBe(4)
    await cache.close()
  })

  test('unknown file systems and those in memory are passed through', async () => {
    for (const type of [0x01021994, 0x9fa0, 0x6969]) {
      const { cache, cleancache, io, name } = setup(3)
      io.type = type
      const file = await cache.open(name, 'r+')
      later(io)
      for (let round = 0; round < 2; round++) expect(await readPage(file, 1)).toBe(2)
      await file.write('direct', pageSize)
      expect(readFileSync(name).includes('direct')).toBe(true)
      await file.truncate(7)
      expect((await file.read(Buffer.alloc(10), 0, 10, 0)).bytesRead).toBe(7)
      expect([cache.residentPages, cleancache.counters.puts]).toEqual([0, 0])
      expect(io.reads).toBeGreaterThanOrEqual(3)
      await cache.close()
    }
    expect(localDisks({ type: 0xef53, blockSize: 1024 })?.facts).toMatchObject({ name: 'ext4', blockSize: 1024 })
  })

  test('/proc has files without a size: they are read all the same', async () => {
    if (!existsSync('/proc/self/status')) return
    const cache = new PageCache({ sizeBytes: 16 * pageSize })
    const file = await cache.open('/proc/self/status')
    const { bytesRead, buffer } = await file.read()
    expect(Buffer.from(buffer).toString('latin1', 0, bytesRead)).toContain('Pid:')
    await cache.close()
  })

  test('blocks of another size: the first level works, cleancache is not used', async () => {
    const { cache, cleancache, io, name } = setup(3)
    io.blockSize = 1024
    const file = await cache.open(name)
    later(io)
    await readPage(file, 1)
    await readPage(file, 1)
    expect(cache.counters.hits).toBe(1)
    cache.dropCaches()
    expect(cleancache.counters).toEqual({ succ_gets: 0, failed_gets: 0, puts: 0, invalidates: 0 })
    await cache.close()
  })

  test('a file system that cannot be asked: the error comes through, and the next one asks again', async () => {
    const { cache, io, name } = setup(1)
    const kind = io.kind.bind(io)
    io.kind = async () => {
      io.kind = kind
      throw systemError('EIO', 'statfs')
    }
    await expect(cache.open(name)).rejects.toMatchObject({ code: 'EIO' })
    expect(await readPage(await cache.open(name), 0)).toBe(1)
    await cache.close()
  })

  test('the cache closes what is open, and gives its pools up', async () => {
    const { cache, cleancache, name } = setup(1)
    const file = await cache.open(name, 'r+')
    await file.write('last')
    const reading = readPage(await cache.open(name), 0).catch(() => undefined)
    await cache.close()
    await cache.close()
    await reading
    expect(readFileSync(name, 'latin1').startsWith('last')).toBe(true)
    expect(cache.residentPages).toBe(0)
    expect(cleancache.stats().counters['puts']).toBeGreaterThanOrEqual(0)
  })
})

describe('stores that fail', () => {
  test('a page that the store has and cannot give is read from the file', async () => {
    const layers = [delay({ turn: () => Promise.resolve() }), memory({ limitBytes: 2 ** 20 })]
    const { cache, cleancache, io, name } = setup(3, { layers })
    const file = await cache.open(name)
    later(io)
    await readPage(file, 2)
    cache.dropCaches()
    cleancache.fetchPage = async () => {
      throw new TmemError('TMEM_IO', 'the link is down')
    }
    expect(await readPage(file, 2)).toBe(3)
    expect(cache.counters.cleancacheErrors).toBe(1)
    cache.dropCaches()
    cleancache.fetchPage = async () => {
      throw new TmemError('TMEM_BROKEN', 'it lied')
    }
    await expect(readPage(file, 2)).rejects.toMatchObject({ code: 'TMEM_BROKEN' })
    await cache.close()
  })

  test('bits that flip in the memory of a compressed store cost a read, never wrong bytes', async () => {
    const { cache, io, name } = setup(40, {
      layers: [zcache({ limitBytes: 2 ** 20 }), corrupt({ every: 1 }), memory({ limitBytes: 2 ** 20 })],
    })
    const file = await cache.open(name)
    later(io)
    for (let round = 0; round < 2; round++)
      for (let page = 0; page < 40; page++) expect(await readPage(file, page)).toBe(page + 1)
    await cache.close()
  })

  test('every allocation, failed once: the cache says so', () => {
    const counting = failingAllocator(systemAllocator)
    new PageCache({ sizeBytes: 16 * pageSize, allocator: counting })
    const { requests } = counting
    expect(requests).toBeGreaterThanOrEqual(6)
    for (let nth = 1; nth <= requests; nth++) {
      const allocator = failingAllocator(systemAllocator, { nth })
      let thrown: unknown
      try {
        new PageCache({ sizeBytes: 16 * pageSize, allocator })
      } catch (error) {
        thrown = error
      }
      expect(thrown).toMatchObject({ code: 'TMEM_NO_MEMORY' })
    }
  })
})

test('a cluster: what one machine read the others need not read', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'page-cache-cluster-'))
  try {
    const tmem = new Tmem(compose([memory({ limitBytes: 2 ** 20 })], { check: 'model' }))
    const uuid = Uint8Array.from({ length: 16 }, (_, at) => at)
    const id = uuid.reduceRight((number, byte) => (number << 8n) | BigInt(byte), 0n)
    const io = new TimedIo()
    const name = join(folder, 'shared')
    writeFileSync(name, numbered(8))
    const machines = [1, 2, 3].map((client) => {
      tmem.authorize(client, id)
      const cleancache = new Cleancache()
      cleancache.register(tmemBackend(tmem, client))
      const facts = { ...pageCacheFacts('cluster', pageSize), cluster: true }
      const optIn = (): { facts: typeof facts; uuid: Uint8Array } => ({ facts, uuid })
      return new PageCache({ sizeBytes: 16 * pageSize, cleancache, io, now: io.now, optIn })
    })
    const opened = await Promise.all(machines.map((machine) => machine.open(name, 'r+')))
    later(io)
    for (let page = 0; page < 8; page++) await readPage(opened[0]!, page)
    machines[0]!.dropCaches()
    const { reads } = io
    for (const file of opened) for (let page = 0; page < 8; page++) expect(await readPage(file, page)).toBe(page + 1)
    expect(io.reads).toBe(reads)
    // One writes: the others see the new version.
    await opened[1]!.write(pageOf(99), 0, pageSize, 0)
    await opened[1]!.sync()
    later(io)
    for (const file of opened) expect(await readPage(file, 0)).toBe(99)
    // Who made the pool leaves; the others go on.
    await machines[0]!.close()
    machines[2]!.dropCaches()
    const before = io.reads
    expect(await readPage(opened[2]!, 5)).toBe(6)
    expect(io.reads).toBeLessThanOrEqual(before + 1)
    await machines[1]!.close()
    await machines[2]!.close()
  } finally {
    rmSync(folder, { recursive: true })
  }
})
