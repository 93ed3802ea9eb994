/** What a device's image holds, whenever its process is killed. */
import { execFileSync } from 'node:child_process'
import {
  linkSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { systemAllocator, TmemError } from '@tmem/core'
import { failingAllocator } from '@tmem/faults'
import { type FileCall, MemoryFiles, systemFiles } from '@tmem/page-file'
import * as fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { openSnapshot, type Ramzswap, ramzswap, type Snapshot } from '../src/index.ts'
import {
  backingFile,
  bytesOf,
  codeOf,
  compressed,
  expectBytes,
  type File,
  failsFirst,
  type Kind,
  room,
  same,
  section,
} from './subject.ts'

const pages = 24

/** An image in memory, which fails and waits when it is told to. */
class Image extends MemoryFiles {
  closed = false
  failing: { readonly what: 'write' | 'sync' | 'read' | 'resize'; readonly code: string } | undefined
  /** Awaited before what is done in the background. */
  before: () => Promise<void> = () => Promise.resolve()
  /** Called whenever the content may have changed. */
  onChange: () => void = () => undefined
  readonly calls: FileCall[] = []

  constructor(content?: Uint8Array) {
    super({ direct: false })
    if (content !== undefined) this.put('image', content)
    this.fault = (call) => {
      this.calls.push(call)
      // A process can be killed between two pages of one write.
      this.onChange()
      const { failing } = this
      if (failing?.what === (call.name === 'punch' ? 'write' : call.name)) return { code: failing.code }
      return call.name === 'write' ? { bytes: 4096 - (call.position % 4096) } : undefined
    }
  }

  get bytes(): Uint8Array {
    return this.content('image') ?? new Uint8Array(0)
  }

  /** What a power failure would leave. */
  get synced(): Uint8Array {
    return this.durable('image') ?? new Uint8Array(0)
  }

  override async read(...call: Parameters<MemoryFiles['read']>): Promise<number> {
    await this.before()
    return super.read(...call)
  }

  override async write(...call: Parameters<MemoryFiles['write']>): Promise<number> {
    await this.before()
    return super.write(...call)
  }

  override async sync(descriptor: number): Promise<void> {
    await this.before()
    await super.sync(descriptor)
  }

  override close(descriptor: number): void {
    super.close(descriptor)
    this.closed = true
  }
}

interface Opened {
  readonly device: Snapshot
  readonly inner: Ramzswap
  readonly image: Image
  readonly file: () => File
}

async function opened(options: { image?: Image; writethrough?: boolean; sizePages?: number } = {}): Promise<Opened> {
  const { image = new Image(), writethrough = false, sizePages = pages } = options
  const { layers, file } = backingFile(pages)
  const inner = ramzswap({
    name: 'dev',
    sizeBytes: sizePages * 4096,
    maxSizeBytes: pages * 4096,
    stack: [...compressed(), ...layers],
  })
  const device = await openSnapshot(inner, {
    path: 'image',
    writethrough,
    maxSizeBytes: pages * 4096,
    files: image,
  })
  return { device, inner, image, file }
}

const all = async (device: { sizeBytes: number; read: Snapshot['read'] }): Promise<Uint8Array> => {
  const bytes = new Uint8Array(device.sizeBytes)
  await device.read(0, bytes)
  return bytes
}

/** What was and may still be in each page: versions, the first of which was flushed. */
class History {
  readonly #versions: Uint8Array[][] = Array.from({ length: pages }, () => [new Uint8Array(4096)])

  /** What the device holds now came to be. */
  now(content: Uint8Array): void {
    for (let page = 0; page < pages; page++) {
      const bytes = new Uint8Array(4096)
      bytes.set(content.subarray(page * 4096, (page + 1) * 4096))
      this.push(page, bytes)
    }
  }

  push(page: number, bytes: Uint8Array): void {
    const list = this.#versions[page]!
    if (Buffer.compare(list.at(-1)!, bytes) !== 0) list.push(bytes)
  }

  /** How many versions there are, for `flushed`. */
  marks(): number[] {
    return this.#versions.map((list) => list.length)
  }

  /** Nothing older than these is good enough any more. Marks count from the beginning of the history. */
  flushed(marks: readonly number[], from = 0, to = pages): void {
    for (let page = from; page < to; page++) {
      const list = this.#versions[page]!
      for (let n = 0; n < marks[page]! - 1; n++) list[n] = list[marks[page]! - 1]!
    }
  }

  /** Throws unless each page of an image is the flushed version or a later one. */
  check(content: Uint8Array, what: string): void {
    for (let page = 0; page < pages; page++) {
      const bytes = new Uint8Array(4096)
      bytes.set(content.subarray(page * 4096, (page + 1) * 4096))
      if (!this.#versions[page]!.some((version) => Buffer.compare(version, bytes) === 0))
        throw new Error(`${what}: page ${page} is neither what was flushed nor anything later`)
    }
  }
}

const kind = fc.constantFrom<Kind>('zero', 'word', 'text', 'third', 'half', 'noise', 'noise')
const range = fc.tuple(fc.nat(pages * 8 - 1), fc.integer({ min: 1, max: 40 }), fc.boolean())
const operation = fc.oneof(
  { weight: 8, arbitrary: fc.record({ do: fc.constant('write' as const), range, kind, seed: fc.nat(999) }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constantFrom('discard' as const, 'zero' as const), range }) },
  { weight: 3, arbitrary: fc.record({ do: fc.constant('flush' as const) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('reopen' as const), clean: fc.boolean() }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('resize' as const), size: fc.integer({ min: 1, max: pages }) }) },
  {
    weight: 2,
    arbitrary: fc.record({
      do: fc.constant('fail' as const),
      what: fc.constantFrom('none', 'write', 'sync', 'resize'),
      code: fc.constantFrom('ENOSPC', 'EIO'),
    }),
  },
)

function within([first, count, whole]: readonly [number, number, boolean], size: number): [at: number, length: number] {
  const unit = whole ? 4096 : 512
  const at = Math.floor(((first * 512) % size) / unit) * unit
  return [at, Math.min(size - at, Math.max(unit, Math.floor((count * 512) / unit) * unit))]
}

test.each([false, true])(
  'killed at any moment, each page of the image is what was flushed, or later (writethrough: %s)',
  async (writethrough) => {
    await fc.assert(
      fc.asyncProperty(fc.array(operation, { minLength: 1, maxLength: 40 }), async (operations) => {
        let { device, image } = await opened({ writethrough })
        const history = new History()
        const watch = (): void => {
          image.onChange = () => history.check(image.bytes, 'after a change of the image')
        }
        watch()
        // Versions that are being written may be in the image before the device is asked for them.
        const settle = async (code: string, at: number, length: number): Promise<void> => {
          history.now(await all(device))
          if (writethrough && code === 'none')
            history.flushed(history.marks(), Math.floor(at / 4096), Math.ceil((at + length) / 4096))
          history.check(image.bytes, 'after an operation')
        }
        const expectFailure = (code: string): void => {
          if (code !== 'none') same([code, image.failing !== undefined], ['TMEM_IO', true])
        }
        for (const step of operations) {
          const size = device.sizeBytes
          switch (step.do) {
            case 'write': {
              const [at, length] = within(step.range, size)
              const bytes = bytesOf(step.kind, length, step.seed)
              const next = new Uint8Array(pages * 4096)
              next.set(await all(device))
              next.set(bytes, at)
              history.now(next)
              const code = await codeOf(() => device.write(at, bytes))
              expectFailure(code)
              const got = bytes.slice()
              await device.read(at, got)
              expectBytes(got, bytes)
              await settle(code, at, length)
              break
            }
            case 'discard':
            case 'zero': {
              const [at, length] = within(step.range, size)
              const next = new Uint8Array(pages * 4096)
              next.set(await all(device))
              next.fill(0, at, at + length)
              history.now(next)
              const code = await codeOf(() => device[step.do](at, length))
              expectFailure(code)
              await settle(code, at, length)
              break
            }
            case 'flush': {
              const marks = history.marks()
              const code = await codeOf(() => device.flush())
              expectFailure(code)
              if (code === 'none') {
                history.flushed(marks)
                history.check(image.synced, 'after a flush, on the disk')
              }
              break
            }
            case 'resize': {
              const next = (await all(device)).slice(0, step.size * 4096)
              history.now(next)
              const code = await codeOf(() => device.resize(step.size * 4096))
              expectFailure(code)
              history.now(await all(device))
              break
            }
            case 'reopen': {
              const before = await all(device)
              const sizePages = device.sizeBytes / 4096
              if (step.clean) {
                const code = await codeOf(() => device.close())
                expectFailure(code)
                if (code === 'none') {
                  expectBytes(image.bytes, before)
                  expectBytes(image.synced, before)
                }
              }
              if (image.bytes.length > sizePages * 4096) same(image.failing?.what, 'resize')
              image = new Image(image.bytes.slice(0, sizePages * 4096))
              watch()
              device = (await opened({ image, writethrough, sizePages })).device
              const got = await all(device)
              history.check(got, 'after it was opened again')
              // From here on this is what the device holds.
              history.now(got)
              history.flushed(history.marks())
              break
            }
            default:
              image.failing = step.what === 'none' ? undefined : { what: step.what as 'write', code: step.code }
          }
        }
        image.failing = undefined
        const before = await all(device)
        await device.flush()
        expectBytes(image.synced, before)
        same(section(device.stats(), 'snapshot')['dirty_pages'], 0)
        await device.close()
        expectBytes(image.bytes, before)
      }),
      { seed: 11, numRuns: 200 },
    )
  },
  60_000,
)

test.each([false, true])(
  'writes, discards and flushes at the same time (writethrough: %s)',
  async (writethrough) => {
    const step = fc.oneof(
      {
        weight: 6,
        arbitrary: fc.record({ do: fc.constant('write' as const), page: fc.nat(7), kind, seed: fc.nat(99) }),
      },
      { weight: 1, arbitrary: fc.record({ do: fc.constant('discard' as const), page: fc.nat(7) }) },
      { weight: 3, arbitrary: fc.record({ do: fc.constant('flush' as const) }) },
      { weight: 2, arbitrary: fc.record({ do: fc.constant('turn' as const) }) },
    )
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 4, maxLength: 60 }), fc.scheduler(), async (steps, scheduler) => {
        const { device, image, file } = await opened({ writethrough })
        // What a killed process leaves, and what a power failure does.
        const history = new History()
        const disk = new History()
        image.onChange = () => history.check(image.bytes, 'after a change of the image')
        image.before = () => scheduler.schedule(Promise.resolve())
        file().beforeRead = () => scheduler.schedule(Promise.resolve())
        const running: Promise<void>[] = []
        // One change of a page at a time: their order among themselves is nobody's promise.
        const busy = new Set<number>()
        for (const one of steps) {
          if (one.do === 'turn') {
            if (scheduler.count() > 0) await scheduler.waitOne()
            else await new Promise((resolve) => setImmediate(resolve))
          } else if (one.do === 'flush') {
            const marks = history.marks()
            const unsettled = [...busy]
            running.push(
              Promise.resolve(device.flush()).then(() => {
                for (let page = 0; page < pages; page++)
                  if (!unsettled.includes(page)) for (const one of [history, disk]) one.flushed(marks, page, page + 1)
                disk.check(image.synced, 'after a flush, on the disk')
              }),
            )
          } else if (!busy.has(one.page)) {
            const { page } = one
            const bytes = one.do === 'write' ? bytesOf(one.kind, 4096, one.seed) : new Uint8Array(4096)
            for (const one of [history, disk]) one.push(page, bytes)
            const marks = history.marks()
            busy.add(page)
            const completion = one.do === 'write' ? device.write(page * 4096, bytes) : device.discard(page * 4096, 4096)
            const acknowledged = (): void => {
              busy.delete(page)
              if (writethrough) history.flushed(marks, page, page + 1)
              history.check(image.bytes, 'after it was acknowledged')
            }
            if (completion === undefined) acknowledged()
            else running.push(completion.then(() => acknowledged()))
          }
        }
        await scheduler.waitFor(Promise.all(running))
        const last = Promise.resolve(device.flush())
        await scheduler.waitFor(last)
        image.before = () => Promise.resolve()
        file().beforeRead = () => Promise.resolve()
        expectBytes(image.synced, await all(device))
        await device.close()
      }),
      { seed: 12, numRuns: 300 },
    )
  },
  60_000,
)

test('a resize while pages are copied: nothing of what was cut off comes back', async () => {
  const { device, image } = await opened()
  const text = bytesOf('noise', pages * 4096, 1)
  await device.write(0, text)
  let go: () => void = () => undefined
  image.before = () =>
    new Promise((resolve) => {
      go = resolve
    })
  const flush = device.flush()
  while (go.toString() === (() => undefined).toString()) await new Promise((resolve) => setImmediate(resolve))
  device.resize(4 * 4096)
  device.resize(8 * 4096)
  image.before = () => Promise.resolve()
  go()
  await flush
  expect(image.bytes.length).toBe(8 * 4096)
  await device.flush()
  const wanted = new Uint8Array(8 * 4096)
  wanted.set(text.subarray(0, 4 * 4096))
  expectBytes(image.synced, wanted)
  expectBytes(await all(device), wanted)
  await device.close()
})

test('a disk that is full or broken: the system says why, the rest is saved, the next flush tries again', async () => {
  for (const code of ['ENOSPC', 'EIO']) {
    const { device, image } = await opened()
    await device.write(0, bytesOf('text', 3 * 4096, 2))
    image.failing = { what: 'write', code }
    const failure: unknown = await Promise.resolve(device.flush()).catch((error: unknown) => error)
    same(
      [failure instanceof TmemError && failure.code, (failure as Error & { cause: { code: string } }).cause.code],
      ['TMEM_IO', code],
    )
    same(section(device.stats(), 'snapshot')['dirty_pages'], 3)
    image.failing = undefined
    await device.flush()
    expectBytes(image.synced.subarray(0, 3 * 4096), bytesOf('text', 3 * 4096, 2))
    await device.close()
  }
})

test('a page that the device has lost fails the flush, and the others are saved', async () => {
  const { device, image, file } = await opened({ writethrough: false })
  const noise = bytesOf('noise', pages * 4096, 3)
  await device.write(0, noise)
  file().failRead = failsFirst('EIO')
  expect(await codeOf(() => device.flush())).toBe('TMEM_IO')
  const { dirty_pages: left } = section(device.stats(), 'snapshot')
  expect(left).toBe(1)
  const wrong = [...Array(pages).keys()].filter(
    (page) =>
      Buffer.compare(
        image.bytes.subarray(page * 4096, (page + 1) * 4096),
        noise.subarray(page * 4096, (page + 1) * 4096),
      ) !== 0,
  )
  expect(wrong.length).toBe(1)
  file().failRead = () => undefined
  await device.flush()
  expectBytes(image.synced, noise)
  await device.close()
})

test('a sync that failed is made up for, also where zeros were written', async () => {
  const { device, image } = await opened()
  await device.write(0, bytesOf('text', 2 * 4096, 5))
  await device.flush()
  await device.discard(0, 4096)
  image.failing = { what: 'sync', code: 'EIO' }
  expect(await codeOf(() => device.flush())).toBe('TMEM_IO')
  image.failing = undefined
  await device.flush()
  const wanted = bytesOf('text', 2 * 4096, 5)
  wanted.fill(0, 0, 4096)
  expectBytes(image.synced.subarray(0, 2 * 4096), wanted)
  await device.close()
})

test('written through while an older version of the page is on its way: the newer one stays', async () => {
  const { device, image } = await opened({ writethrough: true })
  image.failing = { what: 'write', code: 'ENOSPC' }
  expect(await codeOf(() => device.write(0, bytesOf('text', 4096, 1)))).toBe('TMEM_IO')
  image.failing = undefined
  let go: (() => void) | undefined
  image.before = () =>
    new Promise((resolve) => {
      go = resolve
    })
  const flush = device.flush()
  while (go === undefined) await new Promise((resolve) => setImmediate(resolve))
  const later = device.write(0, bytesOf('text', 4096, 2))
  image.before = () => Promise.resolve()
  go()
  await later
  expectBytes(image.bytes.subarray(0, 4096), bytesOf('text', 4096, 2))
  await flush
  expectBytes(image.bytes.subarray(0, 4096), bytesOf('text', 4096, 2))
  await device.close()
})

test('zeros are not written where the image has none of anything', async () => {
  const { device, image } = await opened()
  await device.discard(0, pages * 4096)
  await device.zero(0, pages * 4096)
  await device.write(4096, bytesOf('text', 4096, 1))
  await device.flush()
  expect(section(device.stats(), 'snapshot')['saved_pages']).toBe(1)
  await device.discard(4096, 4096)
  await device.flush()
  expect(section(device.stats(), 'snapshot')).toMatchObject({ saved_pages: 2, filled_pages: 0 })
  expectBytes(image.synced, new Uint8Array(pages * 4096))
  await device.close()
})

test('each allocation that fails says which, and leaves nothing open', async () => {
  for (let nth = 1; ; nth++) {
    const { layers, file } = backingFile(pages)
    const allocator = failingAllocator(systemAllocator, { nth })
    const inner = ramzswap({ name: 'dev', sizeBytes: pages * 4096, stack: layers })
    const image = new Image()
    const open = () => openSnapshot(inner, { path: 'image', allocator, files: image })
    if (nth > 3) {
      await (await open()).close()
      same(allocator.failures, 0)
      break
    }
    expect(await codeOf(open)).toBe('TMEM_NO_MEMORY')
    expect([file().closed, image.content('image')]).toEqual([true, undefined])
  }
})

test.each([
  [
    new Uint8Array((pages + 1) * 4096),
    /it has 102400 bytes, more than the 98304 of device dev: give the device its size/,
  ],
  [new Uint8Array(5000), /no whole pages of 4096/],
])('an image that is none of this device is refused (%#)', async (content, message) => {
  await expect(opened({ image: new Image(content) })).rejects.toThrow(message)
})

test('an image that cannot be read is an error, not zeros', async () => {
  const image = new Image(bytesOf('text', pages * 4096, 1))
  image.fault = ({ name, length }) => (name === 'read' && length > 4096 ? { code: 'EIO' } : undefined)
  await expect(opened({ image })).rejects.toThrow(/cannot be read at 0: EIO/)
  expect(image.closed).toBe(true)
})

test('a closed one does nothing any more, and misuse changes nothing', async () => {
  const { device } = await opened()
  expect(() => device.write(1, new Uint8Array(512))).toThrow(RangeError)
  expect(() => device.resize((pages + 1) * 4096)).toThrow(RangeError)
  expect(section(device.stats(), 'snapshot')['dirty_pages']).toBe(0)
  await device.close()
  for (const use of [() => device.write(0, new Uint8Array(512)), () => device.flush(), () => device.discard(0, 512)])
    expect(await codeOf(use)).toBe('TMEM_CLOSED')
})

function folder(): string {
  const path = mkdtempSync(join(tmpdir(), 'tmem-snapshot-'))
  onTestFinished(() => rmSync(path, { recursive: true, force: true }))
  return path
}

const plain = () => ramzswap({ name: 'dev', sizeBytes: pages * 4096, stack: room(pages) })

test('a real file: what was flushed is there again, and anybody can read it', async () => {
  const path = join(folder(), 'image')
  const text = bytesOf('text', 2 * 4096, 4)
  const first = await openSnapshot(plain(), { path })
  await first.write(8 * 4096, text)
  await first.close()
  expect(statSync(path).size).toBe(pages * 4096)
  expectBytes(readFileSync(path).subarray(8 * 4096, 10 * 4096), text)
  const seen: number[] = []
  const second = await openSnapshot(plain(), { path, onProgress: (done, total) => seen.push(done / total) })
  const got = new Uint8Array(2 * 4096)
  await second.read(8 * 4096, got)
  expectBytes(got, text)
  expect(seen.at(-1)).toBe(1)
  await second.close()
})

test('an image has one owner, whatever it is called; and is free again when its device is closed', async () => {
  const path = join(folder(), 'image')
  const first = await openSnapshot(plain(), { path })
  await first.write(0, bytesOf('text', 4096, 1))
  linkSync(path, `${path}-hard`)
  symlinkSync(path, `${path}-soft`)
  for (const name of [path, `${path}-hard`, `${path}-soft`, relative(process.cwd(), path)])
    await expect(openSnapshot(plain(), { path: name })).rejects.toThrow('this process uses it already')
  await first.close()
  for (const name of [`${path}-hard`, `${path}-soft`, path]) {
    const again = await openSnapshot(plain(), { path: name })
    const got = new Uint8Array(4096)
    await again.read(0, got)
    expectBytes(got, bytesOf('text', 4096, 1))
    await again.close()
  }
  expect(readdirSync(join(path, '..')).sort()).toEqual(['image', 'image-hard', 'image-soft'])
})

test('what is no plain file is refused, and a link that leads nowhere; nothing is left behind', async () => {
  const path = folder()
  execFileSync('mkfifo', [join(path, 'pipe')])
  const names = { null: '/dev/null', folder: path, nowhere: join(path, 'missing'), fifo: join(path, 'pipe') }
  for (const [name, to] of Object.entries(names)) symlinkSync(to, join(path, name))
  const before = readdirSync(path)
  for (const [name, message] of [
    ['null', /it is a character device; name a file/],
    ['folder', /it is a directory; name a file/],
    ['nowhere', /the link leads nowhere: ENOENT/],
    ['fifo', /it is a FIFO; name a file/],
    ['pipe', /it is a FIFO; name a file/],
  ] as const)
    await expect(openSnapshot(plain(), { path: join(path, name) })).rejects.toThrow(message)
  expect(readdirSync(path)).toEqual(before)
})

test('only what holds data is read of an image that is there', async () => {
  const content = new Uint8Array(pages * 4096)
  content.set(bytesOf('text', 2 * 4096, 1), 5 * 4096)
  const image = new Image(content)
  const { device } = await opened({ image })
  const reads = image.calls.filter(({ name, length }) => name === 'read' && length > 0)
  // Once by the claim, which looks for a mark.
  expect(reads.filter(({ position }) => position > 0)).toMatchObject([{ position: 5 * 4096, length: 2 * 4096 }])
  expectBytes(await all(device), content)
  expect(section(device.stats(), 'snapshot')).toMatchObject({ loaded_pages: 2, filled_pages: 2 })
  await device.close()
})

test('pages that became zeros give their room back', async () => {
  const path = join(folder(), 'image')
  const device = await openSnapshot(plain(), { path })
  await device.write(0, bytesOf('noise', pages * 4096, 1))
  await device.flush()
  const full = statSync(path).blocks
  await device.discard(4096, (pages - 1) * 4096)
  await device.flush()
  // Without koffi they are zeros that take room.
  expect(statSync(path).blocks).toBeLessThanOrEqual(systemFiles().lacks === undefined ? full / 4 : full)
  expectBytes(readFileSync(path).subarray(4096), new Uint8Array((pages - 1) * 4096))
  await device.close()
})

test.each([false, true])(
  'a sync that fails: what was written before it and while it was under way is on the disk at the next good one (%s)',
  async (writethrough) => {
    const { device, image } = await opened({ writethrough })
    const [before, during] = [bytesOf('text', 4096, 1), bytesOf('text', 4096, 2)]
    await device.write(0, before)
    let go: (() => void) | undefined
    let begun: () => void = () => undefined
    const syncs = new Promise<void>((resolve) => {
      begun = resolve
    })
    const { fault } = image
    image.fault = (call) => {
      if (call.name !== 'sync' || go !== undefined) return fault(call)
      begun()
      const until = new Promise<void>((resolve) => {
        go = resolve
      })
      return { code: 'EIO', until }
    }
    const flush = device.flush()
    await syncs
    const written = device.write(4096, during)
    // It does not wait for the sync.
    expect(written).toBeUndefined()
    go!()
    expect(await codeOf(() => flush)).toBe('TMEM_IO')
    await written
    await device.flush()
    expectBytes(image.synced.subarray(0, 4096), before)
    expectBytes(image.synced.subarray(4096, 8192), during)
    await device.close()
  },
)

describe.each([false, true])('an image that is not left alone (writethrough: %s)', (writethrough) => {
  const served = async (): Promise<{ device: Snapshot; path: string; content: Uint8Array }> => {
    const path = join(folder(), 'image')
    const device = await openSnapshot(plain(), { path, writethrough })
    const content = bytesOf('noise', pages * 4096, 1)
    await device.write(0, content)
    await device.flush()
    return { device, path, content }
  }
  const failsTo = async (device: Snapshot, message: RegExp): Promise<void> => {
    const error: unknown = await Promise.resolve(device.flush()).catch((thrown: unknown) => thrown)
    same([(error as TmemError | undefined)?.code], ['TMEM_IO'])
    expect((error as Error).message).toMatch(message)
  }

  test.each([
    ['removed', (path: string) => rmSync(path), /removed, renamed or replaced it: there is nothing of that name/],
    ['renamed', (path: string) => renameSync(path, `${path}-2`), /there is nothing of that name/],
    [
      'replaced',
      (path: string) => {
        writeFileSync(`${path}-2`, Buffer.alloc(pages * 4096))
        renameSync(`${path}-2`, path)
      },
      /there is another file of that name/,
    ],
  ] as const)('%s: each flush fails, with changes and without, and so does the end', async (_, act, message) => {
    const { device, path } = await served()
    act(path)
    await failsTo(device, message)
    await device.write(0, new Uint8Array(512))
    await failsTo(device, message)
    await failsTo(device, message)
    expect(await codeOf(() => device.close())).toBe('TMEM_IO')
  })

  test('renamed, and put back: it goes on', async () => {
    const { device, path, content } = await served()
    renameSync(path, `${path}-2`)
    await failsTo(device, /nothing of that name/)
    renameSync(`${path}-2`, path)
    await device.flush()
    await device.close()
    expectBytes(readFileSync(path), content)
  })

  test.each([
    ['nothing', 0],
    ['a part', 4096 * 3 + 100],
  ])('cut off to %s: a flush fails, and the next one has written it all again', async (_, length) => {
    const { device, path, content } = await served()
    truncateSync(path, length)
    await failsTo(device, /somebody has cut it off/)
    await device.flush()
    expectBytes(readFileSync(path), content)
    truncateSync(path, length)
    // A write to its last page would make it as long as it was.
    const last = bytesOf('text', 4096, 9)
    await Promise.resolve(device.write((pages - 1) * 4096, last)).catch(() => undefined)
    content.set(last, (pages - 1) * 4096)
    await failsTo(device, /somebody has cut it off/)
    await device.close()
    expectBytes(readFileSync(path), content)
  })
})
