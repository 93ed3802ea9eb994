import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  statfsSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import {
  compose,
  GetOutcome,
  type Layer,
  PageBatch,
  type PageStore,
  type Pool,
  PoolRefusal,
  PutOutcome,
  TmemError,
} from '@tmem/core'
import { memory } from '@tmem/memory'
import { systemFiles } from '@tmem/page-file'
import { describe, expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { frontswap, frontswapFactory, type SwapFileOptions } from '../src/index.ts'
import { attributes, codeOf, Disk, fetched, mixed, poolOf, same, testFolder } from './device.ts'

const folder = testFolder()

const run = (command: string, ...parameters: string[]): string =>
  execFileSync(command, parameters, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] })

const open = (options: SwapFileOptions): PageStore => compose([frontswap(options)], { check: 'model' })

/** What opening says, and that it says so with the code for the outside world. */
function refusal(options: SwapFileOptions): string {
  let store: PageStore
  try {
    store = open(options)
  } catch (error) {
    if (error instanceof TmemError && error.code === 'TMEM_IO' && error.layer === 'frontswap') return error.message
    throw error
  }
  void store.close()
  return 'it was opened'
}

interface Opened {
  readonly store: PageStore
  readonly pool: Pool
  readonly disk: Disk
  readonly counter: (name: string) => number
}

/** A swap file on a disk in memory, below those layers, with one pool. */
function onDisk(pages: number, above: readonly Layer[] = [], more: Partial<SwapFileOptions> = {}, size = 4096): Opened {
  const disk = new Disk()
  const layer = frontswap({ file: disk.path, sizeBytes: pages * 4096, files: disk.files, ...more })
  const store = compose([...above, layer], { check: 'model' })
  const pool = poolOf(store.newPool({ ...attributes, pageSize: size }))
  disk.forget()
  const find = (node: ReturnType<PageStore['stats']>): ReturnType<PageStore['stats']> | undefined =>
    node.name === 'frontswap' ? node : node.children.map(find).find((one) => one !== undefined)
  return { store, pool, disk, counter: (name) => find(store.stats())!.counters[name] ?? Number.NaN }
}

function batchOf(pages: readonly (readonly [index: number, fill: number])[], size = 4096): PageBatch {
  const batch = new PageBatch(Math.max(1, pages.length), size)
  for (const [index, fill] of pages) {
    const at = batch.offsets[batch.push(1, index)]!
    batch.bytes.set(mixed(fill, size), at)
  }
  return batch
}

/** Lets a stack sink what wants to, and waits until all of it has landed. */
async function settle(store: PageStore): Promise<void> {
  for (let pending = true; pending; ) {
    pending = store.tick({ pages: 256 }).pending
    await new Promise((resolve) => setImmediate(resolve))
  }
  store.check!()
}

describe('the file', () => {
  test('is made with all of its room, for this user alone, and goes with the store', async () => {
    const file = folder.file()
    const store = open({ file, sizeBytes: 64 * 4096 })
    const pool = poolOf(store.newPool(attributes))
    const { size, blocks, mode } = statSync(file)
    expect(size).toBeGreaterThan(65 * 4096)
    expect([blocks * 512 >= size, mode & 0o777]).toEqual([true, 0o600])
    const into = new Uint8Array(4096)
    expect(pool.put(1, 3, mixed(42))).toBe(PutOutcome.Stored)
    expect(pool.get(1, 3, into)).toBe(GetOutcome.Deferred)
    expect(into[0]).toBe(0)
    expect(await fetched(pool, 3)).toBe(42)
    pool.flushPage(1, 3)
    expect(pool.get(1, 3, into)).toBe(GetOutcome.Miss)
    await Promise.all([store.close(), store.close()])
    expect(existsSync(file)).toBe(false)
    expect(store.newPool(attributes)).toBe(PoolRefusal.Closed)
  })

  test('is used around the cache of the operating system where the file system lets it', async (ctx) => {
    if (statfsSync(folder.path).type === 0x01021994) ctx.skip('needs a temporary folder on a disk')
    const store = open({ file: folder.file(), sizeBytes: 64 * 4096 })
    expect(JSON.stringify(store.stats())).toContain('"directIo":1')
    await store.close()
  })

  test('has one owner: in this process, in one stack, and as the file of a process that runs', async () => {
    const file = folder.file()
    const store = open({ file, sizeBytes: 8192 })
    expect(refusal({ file, sizeBytes: 8192 })).toContain('this process uses it already')
    await store.close()
    const twice = [frontswap({ file, sizeBytes: 8192 }), frontswap({ file, sizeBytes: 8192 })]
    expect(await codeOf(() => compose(twice))).toBe('TMEM_IO')
    expect(existsSync(file)).toBe(false)
  })

  test('that a killed process has left makes way for the next', async () => {
    const file = folder.file()
    const program = fileURLToPath(new URL('./owner.mjs', import.meta.url))
    const owner = spawn(process.execPath, [program, file, String(64 * 4096)], { stdio: ['ignore', 'pipe', 'inherit'] })
    await once(owner.stdout, 'data')
    expect(refusal({ file, sizeBytes: 8192 })).toContain(`process ${owner.pid}`)
    owner.kill('SIGKILL')
    await once(owner, 'exit')
    expect(existsSync(file)).toBe(true)
    const store = open({ file, sizeBytes: 8192 })
    await store.close()
    expect(existsSync(file)).toBe(false)
  })

  test('that is used in a realm whose errors are not those of the system, as in Jest', () => {
    const file = folder.file()
    const program = fileURLToPath(new URL('./realm.mjs', import.meta.url))
    const flags = ['--experimental-vm-modules', '--no-warnings']
    const answer = JSON.parse(execFileSync(process.execPath, [...flags, program, file], { encoding: 'utf8' }))
    expect(answer).toMatchObject({ stored: true, fetched: true, code: 'TMEM_IO' })
    expect(answer.message).toContain('this process uses it already')
    expect(existsSync(file)).toBe(false)
  })

  test('that a thread has left, however it ended, makes way for the next', async () => {
    const file = folder.file()
    for (let round = 0; round < 3; round++) {
      const program = new URL('./owner.mjs', import.meta.url)
      const worker = new Worker(program, { argv: [file, String(64 * 4096)], execArgv: [] })
      await once(worker, 'message')
      expect(refusal({ file, sizeBytes: 8192 })).toContain(`thread ${worker.threadId} of this process uses it`)
      await worker.terminate()
    }
    const store = open({ file, sizeBytes: 8192 })
    await store.close()
    expect(existsSync(file)).toBe(false)
  })

  test('that is not ours is left alone, whatever it is', () => {
    const file = folder.file()
    writeFileSync(file, 'precious')
    expect(refusal({ file, sizeBytes: 8192 })).toContain('it is there, and it is none of ours')
    expect(refusal({ file, sizeBytes: 8192, existing: true })).toContain('no swap header')
    const link = folder.file()
    symlinkSync(file, link)
    expect(refusal({ file: link, sizeBytes: 8192 })).toContain('symbolic link')
    symlinkSync(folder.file(), `${link}.dangling`)
    expect(refusal({ file: `${link}.dangling`, sizeBytes: 8192 })).toContain('symbolic link')
    expect(refusal({ file: folder.path, sizeBytes: 8192 })).toContain('directory')
    expect(refusal({ file: '/dev/null', sizeBytes: 8192, existing: true })).toContain('character device')
    expect(refusal({ file: join(folder.path, 'no', 'where'), sizeBytes: 8192 })).toContain('folder does not exist')
    expect(refusal({ file: join(folder.path, 'nowhere'), sizeBytes: 8192, existing: true })).toContain(
      'nothing of that',
    )
    expect(readFileSync(file, 'utf8')).toBe('precious')
  })

  test('that is kept stays, and is nobody else’s to take', async () => {
    const file = folder.file()
    await open({ file, sizeBytes: 8192, keep: true }).close()
    expect(refusal({ file, sizeBytes: 8192 })).toContain('is to be kept')
    expect(existsSync(file)).toBe(true)
  })

  test('is removed only if it is the one that was made', async () => {
    const file = folder.file()
    const store = open({ file, sizeBytes: 8192 })
    renameSync(file, `${file}.moved`)
    writeFileSync(file, 'somebody else')
    await store.close()
    expect(readFileSync(file, 'utf8')).toBe('somebody else')
  })

  test('that finds no room is refused, and nothing is left behind', () => {
    const disk = new Disk(2 ** 20)
    const options = { file: disk.path, sizeBytes: 2 ** 21, files: disk.files }
    expect(refusal(options)).toMatch(/ENOSPC/)
    expect(disk.files.content(disk.path)).toBe(undefined)
    const { bavail, bsize } = statfsSync(folder.path)
    // Well above what is free: others may free some meanwhile. No swap file is larger, whatever the disk holds.
    const sizeBytes = Math.min(2 ** 36 - 4096, Math.ceil((bavail * bsize * 1.5) / 4096) * 4096 + 2 ** 30)
    if (sizeBytes < bavail * bsize) return
    const before = folder.files()
    expect(refusal({ file: folder.file(), sizeBytes })).toMatch(/it needs \d+ more bytes, and \d+ are free/)
    expect(folder.files()).toEqual(before)
  })
})

describe('an area made with mkswap', () => {
  test('holds pages as they are in its slots, but for the header, and stays', async (ctx) => {
    requires(ctx, { commands: ['mkswap', 'file'] })
    const file = folder.file()
    writeFileSync(file, '')
    truncateSync(file, 64 * 4096)
    run('mkswap', '-q', '-L', 'mine', file)
    expect(refusal({ file, sizeBytes: 64 * 4096, existing: true })).toContain('64 pages')
    const store = open({ file, sizeBytes: 63 * 4096, existing: true })
    const pool = poolOf(store.newPool(attributes))
    // A hole is no place for a page.
    expect(statSync(file).blocks * 512).toBeGreaterThanOrEqual(64 * 4096)
    for (let round = 0; round < 2; round++)
      for (let index = 0; index < 63; index++) same(pool.put(1, index, mixed(index + 1)), PutOutcome.Stored)
    expect(pool.put(1, 63, mixed(9))).toBe(PutOutcome.NoMemory)
    for (let index = 0; index < 63; index++) same(await fetched(pool, index), index + 1)
    const content = readFileSync(file)
    expect(new Set(Array.from({ length: 63 }, (_, n) => content[(n + 1) * 4096])).size).toBe(63)
    store.check!()
    await store.close()
    expect(run('file', file)).toContain('LABEL=mine')
    truncateSync(file, 32 * 4096)
    expect(refusal({ file, sizeBytes: 63 * 4096, existing: true })).toContain('fewer than')
  })

  test('with a header that cannot be trusted is refused', () => {
    const file = folder.file()
    const header = (change: (content: Buffer) => void): void => {
      const content = Buffer.alloc(16 * 4096)
      content.write('SWAPSPACE2', 4086)
      content.writeUInt32LE(1, 1024)
      content.writeUInt32LE(15, 1028)
      change(content)
      writeFileSync(file, content)
    }
    const existing = { file, sizeBytes: 8 * 4096, existing: true }
    header((content) => content.writeUInt32LE(2, 1024))
    expect(refusal(existing)).toContain('another version')
    header((content) => content.writeUInt32LE(3, 1032))
    expect(refusal(existing)).toContain('bad pages')
    header((content) => content.write('SWAP-SPACE', 4086))
    expect(refusal(existing)).toContain('no swap header')
    header((content) => content.writeUInt32LE(0xffffffff, 1028))
    expect(refusal({ ...existing, sizeBytes: 20 * 4096 })).toContain('fewer than')
    writeFileSync(file, 'short')
    expect(refusal(existing)).toContain('no swap header')
  })

  test('that the system swaps to is refused', (ctx) => {
    requires(ctx, { root: true, commands: ['mkswap', 'swapon', 'swapoff'] })
    const file = folder.file()
    writeFileSync(file, Buffer.alloc(40 * 4096), { mode: 0o600 })
    run('mkswap', '-q', file)
    try {
      run('swapon', file)
    } catch (error) {
      ctx.skip(`needs a kernel that swaps to a file here: ${error instanceof Error ? error.message : ''}`)
    }
    try {
      expect(refusal({ file, sizeBytes: 8 * 4096, existing: true })).toContain('swaps to it')
    } finally {
      run('swapoff', file)
    }
  })

  test('on a block device has one user at a time', async (ctx) => {
    requires(ctx, { root: true, commands: ['losetup', 'mkswap'], paths: ['/dev/loop-control'] })
    const file = folder.file()
    writeFileSync(file, Buffer.alloc(256 * 4096))
    run('mkswap', '-q', file)
    const device = run('losetup', '--find', '--show', file).trim()
    let store: PageStore
    try {
      store = open({ file: device, sizeBytes: 200 * 4096, existing: true })
    } finally {
      // While it is open it only goes when the last one closes it, however that comes about.
      run('losetup', '--detach', device)
    }
    expect(refusal({ file: device, sizeBytes: 200 * 4096, existing: true })).toMatch(/in use|uses it/)
    const pool = poolOf(store.newPool({ ...attributes, pageSize: 8192 }))
    expect(pool.put(1, 1, mixed(3, 8192))).toBe(PutOutcome.Stored)
    expect(await fetched(pool, 1, 8192)).toBe(3)
    await store.close()
    expect(existsSync(device)).toBe(true)
  })
})

test('the room for all of a file is taken at once, or it is told how far that is', async () => {
  const sizeBytes = 2 ** 22
  for (const native of [true, false]) {
    const file = folder.file()
    const told: [what: string, done: number, total: number][] = []
    const onProgress = (what: string, done: number, total: number): number => told.push([what, done, total])
    const store = compose([frontswap({ file, sizeBytes, files: systemFiles({ native }) })], { onProgress })
    const { size, blocks } = statSync(file)
    expect(blocks * 512).toBeGreaterThanOrEqual(size)
    expect(new Set(told.map(([what, , total]) => `${what} ${total}`))).toEqual(
      new Set([`taking the room for ${file} ${size}`]),
    )
    const steps = told.map(([, done]) => done)
    expect(steps).toEqual([...steps].sort((a, b) => a - b))
    expect(steps.at(-1)).toBe(size)
    expect([native, steps.length > 30]).toEqual([native, !native])
    await store.close()
  }
})

describe('pages', () => {
  test('as many as it was made for find room, whatever they hold; one more is refused', async () => {
    const { store, pool, counter } = onDisk(50, [], { existing: false })
    for (let round = 0; round < 3; round++)
      for (let index = 0; index < 50; index++) same(pool.put(1, index, mixed(index + round)), PutOutcome.Stored)
    expect(store.capabilities).toMatchObject({ persistent: true, ephemeral: false, reservedBytes: 50 * 4096 })
    expect(store.newPool({ ...attributes, persistent: false })).toBe(PoolRefusal.Unsupported)
    for (let index = 50; pool.put(1, index, mixed(index)) === PutOutcome.Stored; index++) same(index < 200, true)
    for (let index = 0; index < 50; index++) same(await fetched(pool, index), index + 2)
    expect(counter('frames')).toBeGreaterThanOrEqual(50)
    store.check!()
    await store.close()
  })

  test('of a batch are written together, and are read in one request each', async () => {
    const { store, pool, disk, counter } = onDisk(200)
    expect(pool.putMany(batchOf(Array.from({ length: 31 }, (_, n) => [n, n])))).toBe(31)
    expect(disk.asked('write').map(({ length }) => length)).toEqual([128 * 1024])
    expect([counter('diskWrites'), counter('diskBytesWritten'), counter('clusteredWrites')]).toEqual([1, 128 * 1024, 1])
    disk.forget()
    expect(await fetched(pool, 30)).toBe(30)
    expect(disk.asked('read').map(({ length }) => length)).toEqual([8192])
    expect([counter('diskReads'), counter('diskBytesRead')]).toEqual([1, 8192])
    await store.close()
  })

  test('sink from memory in few writes, are all there, and go with their flush', async () => {
    const { store, pool, disk, counter } = onDisk(600, [memory({ limitBytes: 2 ** 19 })])
    for (let index = 0; index < 500; index++) {
      same(pool.put(1, index, mixed(index & 255)), PutOutcome.Stored)
      if (index % 32 === 31) await settle(store)
    }
    await settle(store)
    expect(counter('frames')).toBeGreaterThan(300)
    // Those that a put forces are of a sixteenth of the memory.
    expect(disk.asked('write').length * 6).toBeLessThan(counter('frames'))
    expect(counter('diskWrites')).toBe(disk.asked('write').length)
    for (let index = 0; index < 500; index++) same(await fetched(pool, index), index & 255)
    pool.flushObject(1)
    expect([counter('frames'), counter('used_bytes_on_disk')]).toEqual([0, 0])
    await store.close()
  })
})

describe('a disk that fails', () => {
  test.each(['ENOSPC', 'EIO'])('with %s refuses the page and says why; nothing is lost', async (code) => {
    const { store, pool, disk, counter } = onDisk(16)
    expect(pool.put(1, 1, mixed(1))).toBe(PutOutcome.Stored)
    disk.fail('write', code)
    expect(pool.put(1, 2, mixed(2))).toBe(PutOutcome.Unavailable)
    expect(store.failure).toMatchObject({ code: 'TMEM_IO', cause: { code } })
    disk.fail('write', undefined)
    for (let tries = 0; pool.put(1, 2, mixed(2)) !== PutOutcome.Stored; tries++) same(tries < 5, true)
    expect(store.failure).toBe(undefined)
    expect([await fetched(pool, 1), await fetched(pool, 2)]).toEqual([1, 2])
    expect(counter('writeErrors')).toBe(1)
    store.check!()
    await store.close()
  })

  test('leaves in memory what was on its way, and takes it later', async () => {
    const { store, pool, disk, counter } = onDisk(600, [memory({ limitBytes: 2 ** 20 })])
    let index = 0
    disk.fail('write', 'EIO')
    while (pool.put(1, index, mixed(index & 255)) === PutOutcome.Stored) {
      index++
      if (index % 16 === 0) await settle(store)
    }
    expect(index).toBeGreaterThan(100)
    expect([counter('frames'), counter('used_bytes_on_disk')]).toEqual([0, 0])
    expect(counter('writeErrors')).toBeGreaterThan(0)
    for (let n = 0; n < index; n++) same(await fetched(pool, n), n & 255)
    disk.fail('write', undefined)
    for (let n = index; n < 400; n++) {
      while (pool.put(1, n, mixed(n & 255)) !== PutOutcome.Stored) await settle(store)
    }
    for (let n = 0; n < 400; n++) same(await fetched(pool, n), n & 255)
    expect(counter('frames')).toBeGreaterThan(0)
    store.check!()
    await store.close()
  })

  test('when it reads: the fetch says which page, others go on, and a second one has it', async () => {
    const { store, pool, disk, counter } = onDisk(64)
    for (let index = 0; index < 4; index++) pool.put(1, index, mixed(index + 1))
    let reads = 0
    disk.fault = ({ name }) => (name === 'read' && ++reads === 2 ? { code: 'EIO' } : undefined)
    expect(await fetched(pool, 0)).toBe(1)
    await expect(fetched(pool, 1)).rejects.toMatchObject({
      code: 'TMEM_IO',
      layer: 'frontswap',
      handle: expect.stringMatching(/object 1 index 1$/),
    })
    expect([await fetched(pool, 2), await fetched(pool, 1), counter('readErrors')]).toEqual([3, 2, 1])
    await store.close()
  })

  test('silently: a damaged page is found out at every fetch, until it is put again', async () => {
    const disk = new Disk()
    // A checked boundary takes damage for the place's own fault, and stops it.
    const store = compose([frontswap({ file: disk.path, sizeBytes: 16 * 4096, files: disk.files })])
    const pool = poolOf(store.newPool(attributes))
    pool.put(1, 1, mixed(1))
    pool.put(1, 2, mixed(2))
    // In the bytes of the first page; the block that both share is written anew by the second.
    disk.damage(4096 + 100)
    for (let n = 0; n < 2; n++)
      await expect(fetched(pool, 1)).rejects.toMatchObject({
        code: 'TMEM_CORRUPT',
        handle: expect.stringMatching(/object 1 index 1$/),
      })
    expect(await fetched(pool, 2)).toBe(2)
    pool.put(1, 1, mixed(3))
    expect(await fetched(pool, 1)).toBe(3)
    store.check!()
    await store.close()
  })
})

test('with io "blocking" reads and writes are done in the calling thread', async () => {
  const disk = new Disk()
  const layer = frontswap({ file: disk.path, sizeBytes: 64 * 4096, files: disk.files })
  const store = compose([layer], { check: 'model', io: 'blocking' })
  const pool = poolOf(store.newPool(attributes))
  const never = new Promise<void>(() => undefined)
  // What does not block would never end.
  disk.fault = () => ({ until: never })
  expect(pool.put(1, 1, mixed(7))).toBe(PutOutcome.Stored)
  expect(await fetched(pool, 1)).toBe(7)
  await store.close()
})

test('without need no more is written than the budget of the hour allows', async () => {
  const disk = new Disk()
  let now = 0
  const layers = [
    memory({ limitBytes: 2 ** 20 }),
    frontswap({ file: disk.path, sizeBytes: 2 ** 23, files: disk.files, bytesPerHour: 2 ** 18 }),
  ]
  const store = compose(layers, { check: 'model', clock: () => now })
  const pool = poolOf(store.newPool(attributes))
  disk.forget()
  // Above the high mark, but with room: nobody needs to wait for the disk.
  for (let index = 0; index < 235; index++) same(pool.put(1, index, mixed(index & 255)), PutOutcome.Stored)
  await settle(store)
  const first = disk.bytes('write')
  expect(first).toBeLessThanOrEqual(2 ** 18)
  // Without room the budget does not count.
  for (let index = 235; index < 800; index++) {
    same(pool.put(1, index, mixed(index & 255)), PutOutcome.Stored)
    if (index % 16 === 0) await settle(store)
  }
  expect(disk.bytes('write')).toBeGreaterThan(2 ** 20)
  now += 3_600_000
  for (let index = 0; index < 800; index++) same(await fetched(pool, index), index & 255)
  await store.close()
})

test('from text: what there is to set', async () => {
  const file = folder.file()
  const store = compose([frontswapFactory.create({ file, size: 10_000, keep: true })])
  expect(store.capabilities.reservedBytes).toBe(8192)
  await store.close()
  expect(existsSync(file)).toBe(true)
})

test('numbers that make no sense are refused', () => {
  for (const sizeBytes of [0, 100, -4096, Number.NaN, 2 ** 37])
    expect(() => frontswap({ file: 'x', sizeBytes })).toThrow(RangeError)
})

test('a folder that is missing is said before anything is made', () => {
  const folderOfFile = join(folder.path, 'later')
  expect(refusal({ file: join(folderOfFile, 'swap.img'), sizeBytes: 8192 })).toContain('folder')
  mkdirSync(folderOfFile)
  expect(refusal({ file: join(folderOfFile, 'swap.img'), sizeBytes: 8192 })).toBe('it was opened')
})
