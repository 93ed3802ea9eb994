/** Whole ranges or an error: against a plain buffer, on real files and on ones that fail. */
import { mkdtempSync, rmSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { type Allocator, systemAllocator, type TmemError } from '@tmem/core'
import * as fc from 'fast-check'
import { afterAll, describe, expect, test } from 'vitest'
import {
  type FileCall,
  type FileFault,
  MemoryFiles,
  PageFile,
  type PageFileIo,
  type PageFileRequest,
  systemFiles,
  TransferBuffers,
} from '../src/index.ts'

const folders: string[] = []
const folderIn = (parent: string): string => {
  const folder = mkdtempSync(join(parent, 'page-file-'))
  folders.push(folder)
  return folder
}
afterAll(() => {
  for (const folder of folders) rmSync(folder, { recursive: true })
})

const bytes = 2 ** 17

const open = (more: Partial<PageFileRequest> & { readonly files: PageFileIo }): PageFile =>
  PageFile.open({ path: 'pages', mode: 'make', bytes, content: { name: 'tmem test' }, ...more })

/** Fails calls of that name, those that `when` says. */
const failing =
  (name: FileCall['name'], fault: FileFault, when: (call: FileCall) => boolean = () => true) =>
  (call: FileCall): FileFault | undefined =>
    call.name === name && when(call) ? fault : undefined

const settled = (promise: Promise<unknown>): Promise<string> =>
  promise.then(
    () => 'done',
    (error: TmemError) => `${error.code} ${(error.cause as { code?: string } | undefined)?.code ?? ''}`,
  )

describe.each([
  ['a disk, direct', '/var/tmp', {}, true],
  ['a disk, blocking', '/var/tmp', { io: 'blocking' }, true],
  ['a disk, through the cache', '/var/tmp', { through: 'cache' }, false],
  ['memory', '/dev/shm', {}, false],
  ['a disk, without koffi', '/var/tmp', { files: systemFiles({ native: false }) }, true],
  ['files of a test, direct', undefined, {}, true],
  ['files of a test, through the cache', undefined, { through: 'cache' }, false],
] as const)('on %s', (_, parent, more, direct) => {
  const files = (): PageFileIo =>
    parent === undefined ? new MemoryFiles() : 'files' in more ? more.files : systemFiles()
  const path = parent === undefined ? 'pages' : join(folderIn(parent), 'pages')
  const holes = !('files' in more)

  test('reads and writes of any ranges are those of a buffer', async () => {
    const range = (from: number) =>
      fc.tuple(fc.integer({ min: from, max: bytes - 1 }), fc.oneof(fc.nat(600), fc.nat(40_000), fc.constant(4096)))
    const step = fc.record({
      kind: fc.constantFrom('write', 'write', 'write', 'now', 'read', 'punch', 'sync'),
      range: range(4096),
      whole: fc.boolean(),
      reserves: fc.boolean(),
      byte: fc.integer({ min: 1, max: 255 }),
    })
    await fc.assert(
      fc.asyncProperty(fc.array(fc.array(step, { maxLength: 6 }), { maxLength: 8 }), async (batches) => {
        const buffers = new TransferBuffers({ bytes: 8192, count: 3 })
        const file = open({ path, files: files(), buffers, ...more })
        const reserved = file.reserve(65536)
        try {
          expect(file.directIo).toBe(direct)
          const model = new Uint8Array(bytes - 4096)
          const wrong: number[] = []
          for (const batch of batches) {
            const under: Promise<unknown>[] = []
            for (const { kind, range, whole, byte, reserves } of batch) {
              const position = whole ? Math.floor(range[0] / 4096) * 4096 : range[0]
              const length = Math.min(whole ? Math.ceil(range[1] / 4096) * 4096 : range[1], bytes - position)
              const into = model.subarray(position - 4096, position - 4096 + length)
              if (kind === 'write' || kind === 'now') {
                const own = reserves && kind === 'now'
                const at = own ? 8192 : 7
                const data = own ? reserved : new Uint8Array(length + at)
                for (let n = 0; n < length; n++) data[at + n] = (byte + n) % 256
                if (kind === 'now') await Promise.all(under)
                if (kind === 'now') file.writeNow(data, at, length, position)
                else under.push(file.write(data, at, length, position))
                into.set(data.subarray(at, at + length))
              } else if (kind === 'read') {
                await Promise.all(under)
                const at = reserves ? 4096 : 5
                const data = reserves ? reserved : new Uint8Array(length + at)
                await file.read(data, at, length, position)
                wrong.push(Buffer.compare(data.subarray(at, at + length), into))
              } else if (kind === 'punch' && whole) {
                under.push(
                  file.punch(position, length).then((done) => wrong.push(done === (holes || length === 0) ? 0 : 1)),
                )
                if (holes) into.fill(0)
              } else {
                under.push(file.sync())
              }
            }
            await Promise.all(under)
            const all = new Uint8Array(model.length)
            file.readNow(all, 0, all.length, 4096)
            wrong.push(Buffer.compare(all, model))
          }
          expect(wrong.filter((result) => result !== 0)).toEqual([])
        } finally {
          await file.close()
        }
      }),
      { seed: 13, numRuns: 60 },
    )
  }, 60_000)

  test('the room is taken, and what is there stays', async () => {
    const file = open({ path, files: files(), ...more })
    await file.write(new Uint8Array(1000).fill(7), 0, 1000, 50_000)
    const seen: number[] = []
    await file.fill((done, total) => {
      expect(total).toBe(bytes)
      seen.push(done)
    })
    expect(seen.at(-1)).toBe(bytes)
    file.fillNow()
    const taken = parent === undefined ? bytes : statSync(path).blocks * 512
    expect(taken).toBeGreaterThanOrEqual(bytes)
    const back = new Uint8Array(1002)
    await file.read(back, 0, 1002, 49_999)
    expect(back).toEqual(new Uint8Array(1002).fill(7, 1, 1001))
    await file.close()
  })

  test('data is found between holes, as far as holes are told', async () => {
    const file = open({ path, files: files(), ...more })
    await file.write(new Uint8Array(4096).fill(7), 0, 4096, 65536)
    await file.sync()
    expect([...file.dataExtents(4096)]).toEqual([holes ? [65536, 4096] : [4096, bytes - 4096]])
    await file.close()
  })
})

describe('transfers of the system', () => {
  test.each([true, false])('that are short are continued, and the rest is right (direct %s)', async (direct) => {
    await fc.assert(
      fc.asyncProperty(
        fc.infiniteStream(fc.oneof(fc.constant(undefined), fc.integer({ min: 1, max: 9000 }))),
        fc.array(fc.tuple(fc.integer({ min: 4096, max: bytes - 1 }), fc.nat(30_000), fc.integer({ min: 1, max: 255 }))),
        async (shorts, writes) => {
          const files = new MemoryFiles({ direct })
          const file = open({ files, buffers: new TransferBuffers({ bytes: 16384, count: 1 }) })
          files.fault = ({ name }) => {
            const short = shorts.next().value
            return (name === 'read' || name === 'write') && short !== undefined ? { bytes: short } : undefined
          }
          const model = new Uint8Array(bytes)
          for (const [position, size, byte] of writes) {
            const length = Math.min(size, bytes - position)
            await file.write(new Uint8Array(length).fill(byte), 0, length, position)
            model.fill(byte, position, position + length)
          }
          const back = new Uint8Array(bytes)
          await file.read(back, 4096, bytes - 4096, 4096)
          expect(Buffer.compare(back, model)).toBe(0)
        },
      ),
    )
  })

  test.each([true, false])('that move nothing, or fail, are errors with the cause (direct %s)', async (direct) => {
    const files = new MemoryFiles({ direct })
    const file = open({ files, layer: 'swap' })
    const page = new Uint8Array(4096)
    for (const code of ['EIO', 'ENOSPC']) {
      files.fault = failing('write', { code })
      await expect(file.write(page, 0, 4096, 8192)).rejects.toMatchObject({
        code: 'TMEM_IO',
        layer: 'swap',
        cause: { code },
      })
      expect(() => file.writeNow(page, 0, 100, 9000)).toThrow(
        expect.objectContaining({ code: 'TMEM_IO', cause: expect.objectContaining({ code }) }),
      )
      files.fault = failing('read', { code })
      await expect(file.read(page, 0, 4096, 8192)).rejects.toMatchObject({ code: 'TMEM_IO', cause: { code } })
    }
    expect(file.counters).toMatchObject({ readErrors: 2, writeErrors: 4 })
    files.fault = ({ name }) => (name === 'write' || name === 'read' ? { bytes: 0 } : undefined)
    await expect(file.write(page, 0, 4096, 8192)).rejects.toThrow(/nothing was written at 8192/)
    await expect(file.read(page, 0, 4096, 8192)).rejects.toThrow(/the file ends at 8192/)
    files.fault = () => undefined
    await file.write(page, 0, 4096, 8192)
    await file.close()
  })

  test('go through the cache, and are synced, where no memory suits the device', async () => {
    const files = new MemoryFiles()
    const file = open({ files })
    expect(file.directIo).toBe(true)
    files.fault = ({ direct }) => (direct ? { code: 'EINVAL' } : undefined)
    await file.write(new Uint8Array(5000).fill(7), 0, 5000, 5000)
    expect(file.directIo).toBe(false)
    expect(file.counters.syncs).toBe(1)
    const back = new Uint8Array(5000)
    await file.read(back, 0, 5000, 5000)
    expect(back.every((byte) => byte === 7)).toBe(true)
    await file.close()
  })

  test('that search for an aligned place at the same time miss none', async () => {
    const files = new MemoryFiles()
    // There is nothing to read yet when it is opened, so nothing could be tried.
    const file = PageFile.open({ path: 'pages', mode: 'plain', bytes: 0, files })
    file.resize(bytes)
    await Promise.all([0, 1, 2, 3].map((n) => file.write(new Uint8Array(4096).fill(n + 1), 0, 4096, n * 4096)))
    expect(file.directIo).toBe(true)
    expect([0, 1, 2, 3].map((n) => files.content('pages')![n * 4096])).toEqual([1, 2, 3, 4])
    await file.close()
  })

  test('of whole blocks are one call, and parts cost reads of their own blocks only', async () => {
    const files = new MemoryFiles()
    const calls: string[] = []
    const file = open({ files })
    files.fault = ({ name, position, length }) => {
      calls.push(`${name} ${position} ${length}`)
      return undefined
    }
    await file.write(new Uint8Array(2 ** 16), 0, 2 ** 16, 8192)
    await file.write(new Uint8Array(9000), 0, 9000, 8200)
    await file.write(new Uint8Array(10), 0, 10, 8200)
    await file.read(new Uint8Array(10), 0, 10, 8200)
    expect(calls).toEqual([
      'write 8192 65536',
      'read 8192 4096',
      'read 16384 4096',
      'write 8192 12288',
      'read 8192 4096',
      'write 8192 4096',
      'read 8192 4096',
    ])
    await file.close()
  })

  test('of whole blocks from and to reserved memory are one call however long, and no copy', async () => {
    const files = new MemoryFiles()
    const file = open({ files, buffers: new TransferBuffers({ bytes: 4096, count: 1 }) })
    const memory = file.reserve(2 ** 17)
    expect(memory.every((byte) => byte === 0)).toBe(true)
    const calls: string[] = []
    files.fault = ({ name, position, length }) => {
      calls.push(`${name} ${position} ${length}`)
      return undefined
    }
    await file.write(memory.fill(7), 8192, 65536, 4096)
    await file.read(memory, 4096, 65536, 4096)
    file.writeNow(memory.subarray(4096), 0, 65536, 4096)
    // Parts of blocks take the other way.
    await file.read(memory, 4096, 5000, 4096)
    expect(calls).toEqual([
      'write 4096 65536',
      'read 4096 65536',
      'write 4096 65536',
      'read 4096 4096',
      'read 8192 4096',
    ])
    await file.close()
  })

  test('that the system does not take from reserved memory are copied', async () => {
    const files = new MemoryFiles()
    const file = open({ files })
    const memory = file.reserve(65536)
    const refuse = (): FileFault => {
      // Only at the place that the first one had.
      files.fault = () => undefined
      return { code: 'EINVAL' }
    }
    for (const name of ['write', 'read'] as const) {
      files.fault = refuse
      await file[name](memory, 0, 65536, 4096)
    }
    expect(file.directIo).toBe(true)
    await file.close()
  })

  test('are at most as many at a time as there are buffers', async () => {
    const files = new MemoryFiles()
    const file = open({ files, buffers: new TransferBuffers({ bytes: 4096, count: 3 }) })
    let under = 0
    let most = 0
    let go: () => void = () => undefined
    const until = new Promise<void>((resolve) => {
      go = resolve
    })
    files.fault = () => {
      under++
      most = Math.max(most, under)
      return { until: until.then(() => void under--) }
    }
    const all = Array.from({ length: 10 }, (_, n) => file.write(new Uint8Array(4096), 0, 4096, 4096 * (n + 1)))
    await Promise.resolve()
    expect(under).toBe(3)
    go()
    await Promise.all(all)
    expect(most).toBe(3)
    await file.close()
  })
})

describe('order', () => {
  /** Holds up writes to a position until told. */
  const held = (files: MemoryFiles, position: number): (() => void) => {
    let go: () => void = () => undefined
    const until = new Promise<void>((resolve) => {
      go = resolve
    })
    files.fault = failing('write', { until }, (call) => call.position === position)
    return go
  }

  test('writes to the same block are done in the order in which they were asked for, others are not held up', async () => {
    const files = new MemoryFiles()
    const file = open({ files })
    const go = held(files, 8192)
    const done: string[] = []
    const write = (name: string, position: number, length: number): Promise<unknown> =>
      file.write(new Uint8Array(length).fill(name.charCodeAt(0)), 0, length, position).then(() => done.push(name))
    const first = [
      write('a', 8192, 4096),
      write('b', 8200, 10),
      file.punch(8192, 4096).then(() => done.push('punched')),
      write('c', 8210, 10),
    ]
    await write('d', 16384, 4096)
    expect(done).toEqual(['d'])
    // It cannot wait, and must not overtake.
    expect(() => file.writeNow(new Uint8Array(10), 0, 10, 9000)).toThrow(/a write to the same blocks is under way/)
    go()
    await Promise.all(first)
    expect(done).toEqual(['d', 'a', 'b', 'punched', 'c'])
    const back = new Uint8Array(4096)
    await file.read(back, 0, 4096, 8192)
    expect(back).toEqual(new Uint8Array(4096).fill(99, 18, 28))
    await file.close()
  })

  test('a failed write holds nobody up', async () => {
    const files = new MemoryFiles()
    const file = open({ files })
    files.fault = failing('write', { code: 'EIO' })
    const first = file.write(new Uint8Array(4096), 0, 4096, 8192)
    const second = file.write(new Uint8Array(4096), 0, 4096, 8192)
    expect(await Promise.all([settled(first), settled(second)])).toEqual(['TMEM_IO EIO', 'TMEM_IO EIO'])
    await file.close()
  })

  test('close waits for what is under way, and nothing begins after it', async () => {
    const files = new MemoryFiles()
    const file = open({ files, keep: true })
    const go = held(files, 8192)
    const write = file.write(new Uint8Array(4096).fill(7), 0, 4096, 8192)
    const closed = file.close()
    expect(file.close()).toBe(closed)
    expect(() => file.read(new Uint8Array(1), 0, 1, 0)).toThrow(expect.objectContaining({ code: 'TMEM_CLOSED' }))
    expect(
      await Promise.race([closed.then(() => 'closed'), new Promise((resolve) => setImmediate(resolve, 'open'))]),
    ).toBe('open')
    go()
    await Promise.all([write, closed])
    expect(files.content('pages')![8192]).toBe(7)
  })

  test('close at once throws while something is under way', async () => {
    const files = new MemoryFiles()
    const file = open({ files })
    const go = held(files, 8192)
    const write = file.write(new Uint8Array(4096), 0, 4096, 8192)
    expect(() => file.closeNow()).toThrow(/transfers are under way/)
    expect(() => file.resize(8192)).toThrow(/transfers are under way/)
    go()
    await write
    file.closeNow()
    file.closeNow()
    expect(files.content('pages')).toBeUndefined()
  })
})

describe('what lasts', () => {
  test('around the cache, a power failure takes what was not synced, and only that', async () => {
    const files = new MemoryFiles()
    const file = open({ files, keep: true })
    await file.write(new Uint8Array(4096).fill(1), 0, 4096, 8192)
    await file.sync()
    await file.write(new Uint8Array(8192).fill(2), 0, 8192, 8192)
    files.powerFailure(({ length }) => Math.min(length, 100))
    expect(files.content('pages')!.subarray(8192, 16384)).toEqual(
      new Uint8Array(8192).fill(2, 0, 100).fill(1, 100, 4096),
    )
    const again = open({ files, mode: 'ours' })
    expect(again.found).toBe('ours')
    await again.close()
  })

  test('where writes end in the cache, one is acknowledged when it is synced; several share a sync', async () => {
    const files = new MemoryFiles({ direct: false })
    const file = open({ files, keep: true })
    const before = file.counters.syncs
    await Promise.all([1, 2, 3, 4].map((n) => file.write(new Uint8Array(4096).fill(n), 0, 4096, n * 4096)))
    expect(file.counters.syncs - before).toBeLessThanOrEqual(2)
    file.writeNow(new Uint8Array(4096).fill(5), 0, 4096, 5 * 4096)
    files.powerFailure()
    for (const n of [1, 2, 3, 4, 5]) expect(files.content('pages')![n * 4096]).toBe(n)
  })

  test('a sync that fails fails every write that was under way, and no other; the file is not lost', async () => {
    const files = new MemoryFiles({ direct: false })
    const file = open({ files })
    const write = (n: number): Promise<string> => settled(file.write(new Uint8Array(4096), 0, 4096, n * 4096))
    expect(await write(1)).toBe('done')
    let go: () => void = () => undefined
    const until = new Promise<void>((resolve) => {
      go = resolve
    })
    // While the sync of the first one goes wrong, the second one is written; its own sync would succeed.
    files.fault = failing('sync', { code: 'EIO', until })
    const first = write(2)
    await new Promise((resolve) => setImmediate(resolve))
    const second = write(3)
    await new Promise((resolve) => setImmediate(resolve))
    files.fault = () => undefined
    go()
    expect(await first).toBe('TMEM_IO EIO')
    expect(await second).toBe('TMEM_IO ')
    expect(await write(3)).toBe('done')
    expect(file.lost).toBeUndefined()
    await file.sync()
    await file.close()
  })

  test.each(['device', 'cache'] as const)(
    'after a failed sync every sync fails until all is restored (through the %s)',
    async (through) => {
      const files = new MemoryFiles()
      const file = open({ files, through })
      const page = new Uint8Array(4096)
      await file.sync()
      await file.write(page.fill(5), 0, 4096, 8192)
      await file.write(page, 0, 4096, 16384)
      files.fault = failing('sync', { code: 'EIO' })
      const [first, second] = [settled(file.sync()), settled(file.sync())]
      expect([await first, await second]).toEqual(['TMEM_IO EIO', 'TMEM_IO EIO'])
      files.fault = () => undefined
      // The system would say that all is well.
      expect(await settled(file.sync())).toBe('TMEM_IO EIO')
      expect(() => file.syncNow()).toThrow(/cannot be synced: EIO/)
      expect(file.lost).toMatchObject({ code: 'EIO' })
      await file.write(page.fill(6), 0, 4096, 8192)
      file.restored()
      await file.sync()
      file.syncNow()
      expect(file.lost).toBeUndefined()
      files.powerFailure()
      // What was not written again is gone, as on a real disk.
      expect([8192, 16384].map((at) => files.content('pages')![at])).toEqual([6, 0])
    },
  )

  test('a sync that waited while one failed fails, too', async () => {
    const files = new MemoryFiles()
    const file = open({ files })
    await file.write(new Uint8Array(4096), 0, 4096, 8192)
    let go: () => void = () => undefined
    const until = new Promise<void>((resolve) => {
      go = resolve
    })
    files.fault = failing('sync', { code: 'EIO', until })
    const first = settled(file.sync())
    await new Promise((resolve) => setImmediate(resolve))
    // Its own call of the system would succeed.
    const second = settled(file.sync())
    files.fault = () => undefined
    go()
    expect([await first, await second]).toEqual(['TMEM_IO EIO', 'TMEM_IO EIO'])
    await file.close()
  })

  test('with nothing to lose a failed sync is only an error', async () => {
    const files = new MemoryFiles()
    const file = open({ files })
    await file.write(new Uint8Array(4096), 0, 4096, 8192)
    await file.sync()
    files.fault = failing('sync', { code: 'EIO' })
    expect(() => file.syncNow()).toThrow(/cannot be synced: EIO/)
    expect(file.lost).toBeUndefined()
    await file.close()
  })

  test('a killed process loses nothing that was written', async () => {
    const files = new MemoryFiles()
    const file = open({ files, keep: true, through: 'cache' })
    await file.write(new Uint8Array(4096).fill(3), 0, 4096, 8192)
    files.kill()
    await expect(file.write(new Uint8Array(4096), 0, 4096, 8192)).rejects.toMatchObject({ cause: { code: 'EBADF' } })
    const again = open({ files, mode: 'ours' })
    const back = new Uint8Array(4096)
    await again.read(back, 0, 4096, 8192)
    expect(back[0]).toBe(3)
    await again.close()
  })
})

test('blocking transfers never use the pool', async () => {
  const files = new MemoryFiles()
  const unexpected = (): never => {
    throw new Error('not in the calling thread')
  }
  files.read = unexpected
  files.write = unexpected
  files.sync = unexpected
  const file = open({ files, io: 'blocking' })
  await file.write(new Uint8Array(9000).fill(7), 0, 9000, 5000)
  const back = new Uint8Array(9000)
  await file.read(back, 0, 9000, 5000)
  expect(back.every((byte) => byte === 7)).toBe(true)
  await file.sync()
  await file.punch(8192, 4096)
  await file.fill()
  await file.close()
})

test('buffers can be shared by files, and are given back', async () => {
  const buffers = new TransferBuffers({ bytes: 4096, count: 1 })
  const files = new MemoryFiles()
  const all = ['a', 'b', 'c'].map((path) => open({ files, path, buffers }))
  await Promise.all(all.map((file, n) => file.write(new Uint8Array(9000).fill(n + 1), 0, 9000, 5000)))
  files.fault = failing('read', { code: 'EIO' })
  await Promise.all(all.map((file) => settled(file.read(new Uint8Array(9000), 0, 9000, 5000))))
  files.fault = () => undefined
  for (const [n, file] of all.entries()) {
    const back = new Uint8Array(9000)
    await file.read(back, 0, 9000, 5000)
    expect(back.every((byte) => byte === n + 1)).toBe(true)
    await file.close()
  }
  expect(() => new TransferBuffers({ bytes: 1000 })).toThrow(RangeError)
  expect(() => new TransferBuffers({ count: 0 })).toThrow(RangeError)
})

test('memory comes from the allocator when the file is opened, and its refusal leaves nothing behind', async () => {
  const sites: string[] = []
  const counting: Allocator = {
    allocate: (bytes, site) => {
      sites.push(`${site} ${bytes}`)
      return systemAllocator.allocate(bytes, site)
    },
  }
  const files = new MemoryFiles()
  const file = open({ files, allocator: counting })
  await file.write(new Uint8Array(9000), 0, 9000, 5000)
  await file.fill()
  await file.close()
  expect(sites).toEqual([`pageFile.buffers ${5 * (128 * 1024 + 4096)}`])
  expect(() => open({ files, allocator: { allocate: () => undefined } })).toThrow(
    expect.objectContaining({ code: 'TMEM_NO_MEMORY' }),
  )
  expect(files.content('pages')).toBeUndefined()
  open({ files }).closeNow()
})

test('ranges outside of the file, the memory or the content throw, and do nothing', async () => {
  const files = new MemoryFiles()
  const file = open({ files })
  const page = new Uint8Array(4096)
  for (const [at, length, position] of [
    [0, 4096, bytes],
    [0, 4097, 4096],
    [1, 4096, 4096],
    [0, 4096, -1],
    [0, 4096, 0.5],
    [0, -1, 4096],
    [-1, 1, 4096],
    [0, Number.NaN, 4096],
  ] as const) {
    expect(() => file.read(page, at, length, position)).toThrow(RangeError)
    expect(() => file.write(page, at, length, position)).toThrow(RangeError)
    expect(() => file.writeNow(page, at, length, position)).toThrow(RangeError)
  }
  expect(() => file.write(page, 0, 1, 1023)).toThrow(/its mark/)
  expect(() => file.write(page, 0, 10, 3070)).toThrow(/its mark/)
  expect(() => file.writeNow(page, 0, 4096, 0)).toThrow(/its mark/)
  await expect(file.punch(0, 4096)).rejects.toThrow(RangeError)
  await expect(file.punch(4096, 100)).rejects.toThrow(RangeError)
  await expect(file.punch(4096, bytes)).rejects.toThrow(RangeError)
  expect(() => file.resize(5000)).toThrow(RangeError)
  expect(file.counters).toMatchObject({ writes: 0 })
  // What of the first block is the caller's.
  await file.write(page.fill(5), 0, 2048, 1024)
  await file.write(page, 0, 10, 4086)
  await file.close()
})

test('a disk that is too small is found when the room is taken', async () => {
  const files = new MemoryFiles({ roomBytes: 2 ** 18 })
  files.put('big', new Uint8Array(2 ** 17))
  const file = open({ files })
  files.identifyOpen = () => ({ kind: 'file', id: 'memory', bytes, allocatedBytes: 0, owner: 0 })
  await expect(file.fill()).rejects.toThrow(/it needs 131072 more bytes, and 0 are free/)
  expect(() => file.fillNow()).toThrow(/it needs 131072 more bytes/)
  await file.close()
})
