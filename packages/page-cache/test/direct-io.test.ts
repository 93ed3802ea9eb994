/** Reading around the operating system's cache: real files, and kernels that refuse. */
import { closeSync, constants, openSync, readFileSync, truncateSync, writeFileSync, writeSync } from 'node:fs'
import { setTimeout } from 'node:timers/promises'
import { Cleancache, tmemBackend } from '@tmem/cleancache'
import { compose, Tmem, TmemError } from '@tmem/core'
import { memory } from '@tmem/memory'
import { expect, test } from 'vitest'
import { DirectReads, type FileIo, nodeFileIo, PageCache, pageCacheFacts } from '../src/index.ts'
import { systemError, testFolder } from './timed-io.ts'

const path = testFolder()
const pageSize = 4096
// The folder may be on any file system.
const optIn = (): { facts: ReturnType<typeof pageCacheFacts> } => ({ facts: pageCacheFacts('test', pageSize) })

function pattern(bytes: number, seed: number): Buffer {
  const buffer = Buffer.alloc(bytes, seed)
  for (let at = 0; at + 4 <= bytes; at += 32) buffer.writeUInt32LE((at * 31 + seed) >>> 0, at)
  return buffer
}

/** Bytes that this process has had fetched from disks (Linux). */
function fetched(): number {
  return Number(/^read_bytes: (\d+)$/m.exec(readFileSync('/proc/self/io', 'utf8'))?.[1])
}

/** Why files of this folder cannot be read directly, if they cannot. */
async function refusal(): Promise<string | undefined> {
  const io = new DirectReads()
  writeFileSync(path('probe'), pattern(2 * pageSize, 1))
  const descriptor = await io.open(path('probe'), constants.O_RDONLY, 0)
  await io.readv(descriptor, [new Uint8Array(pageSize)], 0)
  await io.close(descriptor)
  return io.counters.directReads === 1 ? undefined : ([...io.refused.values()][0] ?? 'refused for one file')
}

test('files of every length are what they are, and really come from the disk each time', async (ctx) => {
  const why = await refusal()
  if (why !== undefined) ctx.skip(why)
  const io = new DirectReads()
  const cache = new PageCache({ sizeBytes: 16 * pageSize, io, optIn })
  const lengths = [0, 1, 511, 512, 4095, 4096, 4097, 40 * pageSize, 100 * pageSize + 77]
  for (const [n, length] of lengths.entries()) writeFileSync(path(`file${n}`), pattern(length, n + 1), { flush: true })
  await setTimeout(40)
  const before = fetched()
  for (let round = 0; round < 2; round++)
    for (const [n, length] of lengths.entries()) {
      const file = await cache.open(path(`file${n}`))
      const { bytesRead, buffer } = await file.read(Buffer.alloc(length + 100), 0, length + 100, 0)
      expect(bytesRead).toBe(length)
      expect(buffer.subarray(0, length).equals(pattern(length, n + 1))).toBe(true)
      await file.close()
    }
  // The largest file alone does not fit into the cache: it was fetched twice, although it had just been written.
  expect(fetched() - before).toBeGreaterThanOrEqual(2 * 100 * pageSize)
  const node = cache.stats().children.find(({ name }) => name === 'direct-reads')
  expect(node?.counters['directReads']).toBe(io.counters.directReads)
  expect(node?.counters['refusedDevices']).toBe(0)
  // Short reads at the end of a file are looked at once more, the ordinary way.
  expect(io.counters.directBytes).toBeGreaterThanOrEqual(cache.counters.diskBytesRead)
  await cache.close()
})

test('many at once share the buffers; a read longer than a buffer is served in parts', async () => {
  const io = new DirectReads()
  const files = 12
  for (let n = 0; n < files; n++) writeFileSync(path(`many${n}`), pattern(150 * pageSize, n + 1))
  const descriptors = await Promise.all(
    Array.from({ length: files }, (_, n) => io.open(path(`many${n}`), constants.O_RDONLY, 0)),
  )
  await Promise.all(
    descriptors.map(async (descriptor, n) => {
      const into = Array.from({ length: 150 }, () => new Uint8Array(pageSize))
      let got = 0
      while (got < 150 * pageSize) {
        const bytes = await io.readv(descriptor, into.slice(got / pageSize), got)
        expect(bytes).toBeGreaterThan(0)
        expect(bytes % pageSize).toBe(0)
        got += bytes
      }
      expect(Buffer.concat(into).equals(pattern(150 * pageSize, n + 1))).toBe(true)
    }),
  )
  await Promise.all(descriptors.map((descriptor) => io.close(descriptor)))
})

test('what was written, by us or by others, is what is read directly', async () => {
  const io = new DirectReads()
  const cache = new PageCache({ sizeBytes: 16 * pageSize, io, optIn, timestampGranularityMs: 0 })
  writeFileSync(path('written'), pattern(20 * pageSize, 1))
  const file = await cache.open(path('written'), 'r+')
  const wanted = pattern(20 * pageSize, 1)
  const into = Buffer.alloc(20 * pageSize)
  for (let round = 0; round < 20; round++) {
    const change = pattern(5000, round + 2)
    const at = (round * 7919) % (15 * pageSize)
    change.copy(wanted, at)
    if (round % 2 === 0) {
      await file.write(change, 0, change.length, at)
      await file.sync()
    } else {
      const descriptor = openSync(path('written'), constants.O_WRONLY)
      writeSync(descriptor, change, 0, change.length, at)
      closeSync(descriptor)
    }
    // Change times have a tick, on which the test does not want to wait for what it is not about.
    await setTimeout(12)
    cache.dropCaches()
    expect((await file.read(into, 0, into.length, 0)).bytesRead).toBe(into.length)
    expect(into.equals(wanted)).toBe(true)
  }
  truncateSync(path('written'), 3 * pageSize + 5)
  expect((await file.read(into, 0, into.length, 0)).bytesRead).toBe(3 * pageSize + 5)
  await file.close()
  await cache.close()
})

/** The files of this machine, with direct opening or direct reading refused. */
class Refusing implements FileIo {
  /** Code of the error of a second open, or of a direct transfer. */
  readonly #opening: string | undefined
  readonly #reading: string | undefined
  /** Places of a buffer that are taken: multiples of so many bytes after the first. */
  readonly #suits: (at: number) => boolean
  readonly #io = nodeFileIo
  readonly direct = new Set<number>()
  opened = 0
  closed = 0
  attempts = 0

  constructor(opening?: string, reading?: string, suits: (at: number) => boolean = () => false) {
    this.#opening = opening
    this.#reading = reading
    this.#suits = suits
  }

  stat: FileIo['stat'] = (descriptor) => this.#io.stat(descriptor)
  plainStat: FileIo['plainStat'] = (descriptor) => this.#io.plainStat(descriptor)
  kind: FileIo['kind'] = (path) => this.#io.kind(path)
  write: FileIo['write'] = (...args) => this.#io.write(...args)
  truncate: FileIo['truncate'] = (...args) => this.#io.truncate(...args)
  sync: FileIo['sync'] = (descriptor) => this.#io.sync(descriptor)
  datasync: FileIo['datasync'] = (descriptor) => this.#io.datasync(descriptor)
  readv: FileIo['readv'] = (...args) => this.#io.readv(...args)
  writev: FileIo['writev'] = (...args) => this.#io.writev(...args)
  chmod: FileIo['chmod'] = (...args) => this.#io.chmod(...args)
  chown: FileIo['chown'] = (...args) => this.#io.chown(...args)
  utimes: FileIo['utimes'] = (...args) => this.#io.utimes(...args)

  async open(path: string, flags: number, mode: number): Promise<number> {
    const direct = path.startsWith('/proc/self/fd/')
    if (direct && this.#opening !== undefined) throw systemError(this.#opening, 'open')
    // The kernel's own rules are not what is tested here.
    const descriptor = await this.#io.open(path, flags & ~constants.O_DIRECT, mode)
    if (direct) this.direct.add(descriptor)
    this.opened++
    return descriptor
  }

  async close(descriptor: number): Promise<void> {
    this.direct.delete(descriptor)
    this.closed++
    await this.#io.close(descriptor)
  }

  async read(
    descriptor: number,
    into: Uint8Array,
    at: number,
    length: number,
    position: number | null,
  ): Promise<number> {
    if (this.direct.has(descriptor) && this.#reading !== undefined) {
      this.attempts++
      if (!this.#suits(at)) throw systemError(this.#reading, 'read')
    }
    return this.#io.read(descriptor, into, at, length, position)
  }
}

async function readWith(refusing: Refusing, rounds = 1): Promise<DirectReads> {
  const io = new DirectReads({ io: refusing })
  writeFileSync(path('refused'), pattern(40 * pageSize, 9))
  for (let round = 0; round < rounds; round++) {
    const cache = new PageCache({ sizeBytes: 16 * pageSize, io, optIn })
    const file = await cache.open(path('refused'))
    const { bytesRead, buffer } = await file.read(Buffer.alloc(40 * pageSize), 0, 40 * pageSize, 0)
    expect(bytesRead).toBe(40 * pageSize)
    expect(buffer.equals(pattern(40 * pageSize, 9))).toBe(true)
    await file.close()
    await cache.close()
  }
  expect(refusing.closed).toBe(refusing.opened)
  return io
}

test('a file system without direct I/O is read the ordinary way, and that is said, once for the device', async () => {
  const io = await readWith(new Refusing('EINVAL'), 3)
  expect([...io.refused.values()]).toEqual(['its file system has no direct I/O'])
  expect(io.counters).toMatchObject({ directReads: 0, refusedFiles: 1 })
  expect(io.counters.bufferedReads).toBeGreaterThan(2)
})

test('a file that may not be opened again does not speak for its file system', async () => {
  const io = await readWith(new Refusing('EACCES'), 3)
  expect(io.refused.size).toBe(0)
  expect(io.counters).toMatchObject({ directReads: 0, refusedFiles: 3 })
})

test('the place in memory that the device takes is found once for each buffer', async () => {
  const refusing = new Refusing(undefined, 'EINVAL', (at) => at === 16 * 37)
  const io = await readWith(refusing, 4)
  expect(io.counters.bufferedReads).toBe(0)
  expect(refusing.attempts - io.counters.directReads).toBe(37)
})

test('no place in memory that the device takes: the ordinary way, for good', async () => {
  const refusing = new Refusing(undefined, 'EINVAL')
  const io = await readWith(refusing, 3)
  expect([...io.refused.values()]).toEqual(['no alignment of memory suits its device'])
  expect(refusing.attempts).toBe(256)
  expect(io.counters.directReads).toBe(0)
})

test('a disk that fails is not taken for a refusal', async () => {
  const io = new DirectReads({ io: new Refusing(undefined, 'EIO') })
  writeFileSync(path('failing'), pattern(pageSize, 9))
  const descriptor = await io.open(path('failing'), constants.O_RDONLY, 0)
  await expect(io.readv(descriptor, [new Uint8Array(pageSize)], 0)).rejects.toMatchObject({ code: 'EIO' })
  await io.close(descriptor)
  const opening = new DirectReads({ io: new Refusing('EIO') })
  // It can still be read the ordinary way, and whoever reads it will be told.
  await opening.close(await opening.open(path('failing'), constants.O_RDONLY, 0))
  expect(opening.counters.refusedFiles).toBe(1)
})

test('files that cannot be read, and folders, are not opened twice', async () => {
  const refusing = new Refusing()
  const io = new DirectReads({ io: refusing })
  writeFileSync(path('writeonly'), 'x')
  await io.close(await io.open(path('writeonly'), constants.O_WRONLY, 0))
  await io.close(await io.open(path('.'), constants.O_RDONLY, 0))
  expect([refusing.opened, refusing.closed]).toEqual([2, 2])
})

test('no memory for its buffers: it says so', () => {
  const allocator = { allocate: (): undefined => undefined }
  expect(() => new DirectReads({ allocator })).toThrow(TmemError)
  expect(() => new DirectReads({ allocator })).toThrow('no memory for the buffers')
})

test('with a second chance behind it, the second read of a set three times the cache needs no disk', async () => {
  const store = compose([memory({ limitBytes: 2 ** 20 })])
  const cleancache = new Cleancache()
  cleancache.register(tmemBackend(new Tmem(store), 1))
  const io = new DirectReads()
  const cache = new PageCache({ sizeBytes: 32 * pageSize, cleancache, io, optIn })
  const wanted = pattern(96 * pageSize, 5)
  writeFileSync(path('second'), wanted)
  await setTimeout(40)
  const file = await cache.open(path('second'))
  const disk: number[] = []
  for (let round = 0; round < 3; round++) {
    const before = io.counters.directBytes + io.counters.bufferedReads
    const { buffer } = await file.read(Buffer.alloc(96 * pageSize), 0, 96 * pageSize, 0)
    expect(buffer.equals(wanted)).toBe(true)
    disk.push(io.counters.directBytes + io.counters.bufferedReads - before)
  }
  expect(disk[0]).toBeGreaterThan(0)
  expect(disk.slice(1)).toEqual([0, 0])
  await file.close()
  await cache.close()
  await store.close()
})
