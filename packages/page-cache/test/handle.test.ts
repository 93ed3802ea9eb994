/**
 * An open file of a page cache against a file handle of node:fs/promises: the same calls on both, 100,000 of them at
 * random, valid or not, and what they answer, the errors they reject with, the buffers they fill and the files they
 * leave are compared.
 */
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { EventEmitter } from 'node:events'
import { readFileSync, writeFileSync } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { Cleancache, tmemBackend } from '@tmem/cleancache'
import { compose, Tmem } from '@tmem/core'
import { zcache } from '@tmem/zcache'
import fc from 'fast-check'
import { afterAll, describe, expect, expectTypeOf, test } from 'vitest'
import { type CachedFile, PageCache, pageCacheFacts } from '../src/index.ts'
import { testFolder } from './timed-io.ts'

const path = testFolder()
const pageSize = 4096

const cleancache = new Cleancache()
const store = compose([zcache({ limitBytes: 2 ** 18 })], { check: 'model' })
cleancache.register(tmemBackend(new Tmem(store), 1))
const cache = new PageCache({
  sizeBytes: 16 * pageSize,
  cleancache,
  // Nobody else changes these files, so their pages are good at once.
  timestampGranularityMs: 0,
  optIn: () => ({ facts: pageCacheFacts('test', pageSize) }),
})
afterAll(async () => {
  await cache.close()
  await store.close()
})

/** What both have; `fd` is refused by type. */
type Handle = Omit<FileHandle, 'fd'>

const views = {
  Buffer: (bytes: number) => Buffer.alloc(bytes, 0xee),
  DataView: (bytes: number) => new DataView(new ArrayBuffer(bytes + 5), 3, bytes),
  Uint16Array: (bytes: number) => new Uint16Array(new ArrayBuffer((bytes & ~1) + 2), 2, bytes >> 1),
  BigInt64Array: (bytes: number) => new BigInt64Array(bytes >> 3),
  SharedArrayBuffer: (bytes: number) => new Uint8Array(new SharedArrayBuffer(bytes)),
} as const
const encodings = ['utf8', 'latin1', 'utf16le', 'hex', 'base64'] as const

const place = fc.oneof(
  fc.nat(60_000),
  fc.tuple(fc.nat(12), fc.constantFrom(-1, 0, 1)).map(([page, beside]) => Math.max(0, page * pageSize + beside)),
)
const position = fc.oneof(fc.constantFrom(null, undefined, -1), place)
const count = fc.oneof(fc.nat(40), fc.nat(3 * pageSize), fc.constantFrom(0, pageSize))
const view = fc.constantFrom(...(Object.keys(views) as (keyof typeof views)[]))
/** An offset or a length that may be wrong. Some wrong ones end Node's whole process; they are left out. */
const numberOr = (...wrong: readonly unknown[]): fc.Arbitrary<unknown> =>
  fc.oneof(
    { weight: 6, arbitrary: fc.constantFrom(undefined, null) },
    { weight: 6, arbitrary: fc.nat(100) },
    { weight: 1, arbitrary: fc.constantFrom(...wrong) },
  )
const offset = numberOr(-1, 1.5, 1e9, '3', {})
const length = numberOr(-1, 1e9)
const fill = fc.integer({ min: 1, max: 255 })
const encoding = fc.constantFrom(...encodings)
const text = fc.oneof(fc.string({ maxLength: 60 }), fc.constantFrom('', 'line\nline two\r\nthe third', 'ünï€ø'))
const flags = fc.constantFrom(
  'r',
  'r',
  'r+',
  'r+',
  'r+',
  'rs',
  'sr',
  'sr+',
  'w',
  'w+',
  'a',
  'a+',
  'as',
  'wx',
  'xa',
  'q',
  66,
)

const call = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.record({ do: fc.constant('read' as const), view, count, offset, length, position }),
  },
  { weight: 3, arbitrary: fc.record({ do: fc.constant('readOptions' as const), view, count, offset, position }) },
  {
    weight: 2,
    arbitrary: fc.record({
      do: fc.constant('readv' as const),
      view,
      counts: fc.array(count, { maxLength: 4 }),
      position,
    }),
  },
  {
    weight: 6,
    arbitrary: fc.record({
      do: fc.constant('write' as const),
      view,
      count,
      fill,
      offset,
      length,
      position,
    }),
  },
  { weight: 3, arbitrary: fc.record({ do: fc.constant('writeText' as const), text, encoding, position }) },
  {
    weight: 2,
    arbitrary: fc.record({
      do: fc.constant('writev' as const),
      view,
      counts: fc.array(count, { maxLength: 4 }),
      fill,
      position,
    }),
  },
  {
    weight: 2,
    arbitrary: fc.record({
      do: fc.constant('readFile' as const),
      encoding: fc.constantFrom(null, undefined, 'bogus', ...encodings),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({ do: fc.constantFrom('writeFile' as const, 'appendFile' as const), text, encoding }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      do: fc.constant('writePieces' as const),
      texts: fc.array(text, { maxLength: 4 }),
      waiting: fc.boolean(),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('aborted' as const), write: fc.boolean() }) },
  {
    weight: 3,
    arbitrary: fc.record({
      do: fc.constant('truncate' as const),
      length: fc.oneof(place, fc.constantFrom(undefined, -5)),
    }),
  },
  { weight: 2, arbitrary: fc.record({ do: fc.constant('stat' as const), bigint: fc.boolean() }) },
  {
    weight: 1,
    arbitrary: fc.record({
      do: fc.constant('chmod' as const),
      mode: fc.constantFrom(0o600, 0o644, '640', 'rw', -1, 1.5),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('chown' as const), user: fc.constantFrom(-1, 1.5, 'me') }) },
  {
    weight: 1,
    arbitrary: fc.record({
      do: fc.constant('utimes' as const),
      time: fc.constantFrom(1, 1.5, '77', new Date(5000), 'now', {}),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constantFrom('sync' as const, 'datasync' as const) }) },
  {
    weight: 1,
    arbitrary: fc.record({
      do: fc.constant('readStream' as const),
      start: fc.option(place),
      length: count,
      piece: fc.constantFrom(7, 1000, undefined),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      do: fc.constant('writeStream' as const),
      start: fc.option(place),
      texts: fc.array(text, { maxLength: 5 }),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('webStream' as const), count: fc.nat(10_000) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('readLines' as const), start: place }) },
  {
    weight: 2,
    arbitrary: fc.record({
      do: fc.constant('atOnce' as const),
      counts: fc.array(count, { minLength: 2, maxLength: 6 }),
      fill,
      write: fc.boolean(),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('nonsense' as const), how: fc.nat(9) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('close' as const), unawaited: fc.nat(3) }) },
  {
    weight: 3,
    arbitrary: fc.record({
      do: fc.constant('open' as const),
      flags,
      mode: fc.constantFrom(undefined, 0o600, '644', 'x'),
    }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('turn' as const) }) },
)
type Call = typeof call extends fc.Arbitrary<infer C> ? C : never

/** A view of so many bytes of a pattern. */
function filled(kind: keyof typeof views, bytes: number, fill: number): NodeJS.ArrayBufferView {
  const one = views[kind](bytes)
  const of = new Uint8Array(one.buffer, one.byteOffset, one.byteLength)
  for (let at = 0; at < of.length; at++) of[at] = (at * 7 + fill) & 0xff
  return one
}
const bytesOf = (one: NodeJS.ArrayBufferView): string =>
  Buffer.from(one.buffer, one.byteOffset, one.byteLength).toString('latin1')

async function collect(pieces: AsyncIterable<unknown>): Promise<string> {
  let all = ''
  for await (const piece of pieces)
    all += typeof piece === 'string' ? `${piece}\n` : Buffer.from(piece as Uint8Array).toString('latin1')
  return all
}

/** What a call answers, in a form that can be compared. */
async function answerOf(handle: Handle, step: Call): Promise<unknown> {
  switch (step.do) {
    case 'read': {
      const into = filled(step.view, step.count, 9)
      const { bytesRead, buffer } = await handle.read(into, step.offset as number, step.length as number, step.position)
      return [bytesRead, buffer === into, bytesOf(into)]
    }
    case 'readOptions': {
      const into = filled(step.view, step.count, 9)
      const options = { offset: step.offset as number, position: step.position ?? null }
      const first = await handle.read(into, options)
      const { bytesRead, buffer } = await handle.read({ position: step.position ?? null })
      return [first.bytesRead, bytesOf(into), bytesRead, buffer.byteLength, bytesOf(buffer)]
    }
    case 'readv': {
      const into = step.counts.map((bytes) => filled(step.view, bytes, 9))
      const { bytesRead, buffers } = await handle.readv(into, step.position as number)
      return [bytesRead, buffers === into, into.map(bytesOf)]
    }
    case 'write': {
      const from = filled(step.view, step.count, step.fill)
      const written = await handle.write(from, step.offset as number, step.length as number, step.position)
      return [written.bytesWritten, written.buffer === from]
    }
    case 'writeText':
      return { ...(await handle.write(step.text, step.position, step.encoding)) }
    case 'writev': {
      const from = step.counts.map((bytes) => filled(step.view, bytes, step.fill))
      const { bytesWritten, buffers } = await handle.writev(from, step.position as number)
      return [bytesWritten, buffers === from]
    }
    case 'readFile': {
      const got = await handle.readFile(step.encoding as 'utf8')
      return typeof got === 'string' ? got : bytesOf(got)
    }
    case 'writeFile':
    case 'appendFile':
      return handle[step.do](step.text, step.encoding)
    case 'writePieces': {
      async function* waiting(): AsyncGenerator<string> {
        for (const text of step.do === 'writePieces' ? step.texts : []) yield text
      }
      return handle.writeFile((step.waiting ? waiting() : step.texts) as never)
    }
    case 'aborted': {
      const options = { signal: AbortSignal.abort(new Error('no more')) }
      return step.write ? handle.writeFile('text', options) : handle.readFile(options)
    }
    case 'truncate':
      return handle.truncate(step.length)
    case 'stat': {
      const { size, mode, mtimeMs } = await handle.stat({ bigint: step.bigint as false })
      return [size, mode, mtimeMs < 1e6 ? mtimeMs : 'now']
    }
    case 'chmod':
      return handle.chmod(step.mode)
    case 'chown':
      return handle.chown(step.user as number, -1)
    case 'utimes':
      return handle.utimes(step.time as number, step.time as number)
    case 'sync':
    case 'datasync':
      return handle[step.do]()
    case 'readStream': {
      const { start, length, piece } = step
      const range = start === null ? { end: length } : { start, end: start + length }
      return collect(handle.createReadStream({ ...range, autoClose: false, ...(piece && { highWaterMark: piece }) }))
    }
    case 'writeStream': {
      const stream = handle.createWriteStream({ ...(step.start !== null && { start: step.start }), autoClose: false })
      // Node never closes a handle whose stream has finished, or failed, with autoClose false.
      if ('fd' in handle) (handle as unknown as EventEmitter).once('close', () => stream.destroy())
      stream.cork()
      for (const text of step.texts) stream.write(text)
      stream.uncork()
      await new Promise<void>((resolve, reject) => stream.once('error', reject).once('finish', resolve).end())
      return stream.bytesWritten
    }
    case 'webStream': {
      // Node's never closes when it cannot read.
      await handle.read(new Uint8Array(1), 0, 1, 0)
      const reader = handle.readableWebStream({ type: 'bytes' }).getReader({ mode: 'byob' })
      const { done, value } = await reader.read(new Uint8Array(step.count + 1))
      await reader.cancel()
      return [done, value === undefined ? undefined : bytesOf(value)]
    }
    case 'readLines':
      return collect(handle.readLines({ start: step.start, autoClose: false }))
    case 'atOnce':
      throw new Error('not the same on both')
    case 'nonsense':
      return nonsense(handle)[step.how]!()
    case 'close': {
      // The same text each time: in which order Node's threads append it does not matter.
      const last = Array.from({ length: step.unawaited }, (_, n) =>
        outcome(async () => (await handle.write('last', n * 7)).bytesWritten),
      )
      await handle.close()
      return Promise.all(last)
    }
    default:
      return undefined
  }
}

/** Calls that no type would let through. */
function nonsense(handle: Handle): readonly (() => Promise<unknown>)[] {
  const any = handle as unknown as Record<string, (...args: readonly unknown[]) => Promise<unknown>>
  return [
    () => any['read']!('text'),
    () => any['read']!({ buffer: [] }),
    () => any['readv']!('text'),
    () => any['write']!(5),
    () => any['write']!(undefined),
    () => any['writev']!([new Uint8Array(1), 'text']),
    () => any['writeFile']!(5),
    () => any['readFile']!(5),
    () => any['writeFile']!('text', { signal: 5 }),
    () => any['utimes']!(),
  ]
}

async function outcome(work: () => Promise<unknown>): Promise<unknown> {
  try {
    return { answer: await work() }
  } catch (error) {
    const { code, name } = error as NodeJS.ErrnoException
    // Not the work of either.
    if (code === undefined) throw error
    return { code, name }
  }
}

/** The same file, opened in both ways. */
interface Pair {
  readonly ours: CachedFile
  readonly theirs: FileHandle
}

/** Each stream listens for the end of its file, and here a file has many of them. */
const { defaultMaxListeners } = EventEmitter
EventEmitter.defaultMaxListeners = 1000
afterAll(() => {
  EventEmitter.defaultMaxListeners = defaultMaxListeners
})

describe('the same calls on both', () => {
  test('100,000 calls at random', { timeout: 240_000 }, async () => {
    const [oursPath, theirsPath] = [path('random-ours'), path('random-theirs')]
    const tally = new Map<string, number>()
    let calls = 0
    const same = (...after: readonly unknown[]): void => {
      const [ours, theirs] = [readFileSync(oursPath), readFileSync(theirsPath)]
      assert.ok(ours.equals(theirs), `the files differ after ${JSON.stringify(after)}`)
    }
    await fc.assert(
      fc.asyncProperty(fc.array(call, { minLength: 250, maxLength: 250, size: 'max' }), async (steps) => {
        for (const file of [oursPath, theirsPath]) writeFileSync(file, Buffer.alloc(20_000, 'a line of text\n'))
        const openBoth = async (): Promise<Pair> => ({
          ours: await cache.open(oursPath, 'r+'),
          theirs: await open(theirsPath, 'r+'),
        })
        const pairs = [await openBoth(), await openBoth()]
        try {
          for (const [n, step] of steps.entries()) {
            calls++
            const pair = pairs[0]!
            if (step.do === 'turn') pairs.reverse()
            else if (step.do === 'open') {
              const opened: { ours?: CachedFile; theirs?: FileHandle } = {}
              const mode = step.mode as number | undefined
              const answers = [
                await outcome(async () => {
                  opened.ours = await cache.open(oursPath, step.flags, mode)
                }),
                await outcome(async () => {
                  opened.theirs = await open(theirsPath, step.flags, mode)
                }),
              ]
              assert.deepEqual(answers[0], answers[1])
              if (opened.ours === undefined || opened.theirs === undefined) continue
              await Promise.all([pair.ours.close(), pair.theirs.close()])
              pairs[0] = { ours: opened.ours, theirs: opened.theirs }
            } else if (step.do === 'atOnce') {
              // One of ours after the other is what theirs do when each is waited for.
              const each = step.counts.map((bytes, m): Call => {
                const rest = { view: 'Buffer', count: bytes, offset: null, length: null, position: null } as const
                return step.write ? { do: 'write', fill: (step.fill + m) & 0xff, ...rest } : { do: 'read', ...rest }
              })
              const ours = await Promise.all(each.map((one) => outcome(() => answerOf(pair.ours, one))))
              for (const [m, one] of each.entries())
                assert.deepEqual(ours[m], await outcome(() => answerOf(pair.theirs, one)))
            } else {
              const ours = await outcome(() => answerOf(pair.ours, step))
              const theirs = await outcome(() => answerOf(pair.theirs, step))
              assert.deepEqual(ours, theirs)
              const kind = 'code' in (ours as object) ? (ours as { code: string }).code : 'answer'
              tally.set(`${step.do} ${kind}`, (tally.get(`${step.do} ${kind}`) ?? 0) + 1)
            }
            if (n % 4 === 0) same(n, step)
          }
          same(steps.length)
        } finally {
          for (const { ours, theirs } of pairs) await Promise.all([ours.close(), theirs.close()])
        }
      }),
      { seed: 15, numRuns: 400, endOnFailure: true },
    )
    expect(calls).toBeGreaterThanOrEqual(100_000)
    // It was about something.
    for (const kind of [
      'read answer',
      'read EBADF',
      'read ERR_OUT_OF_RANGE',
      'write answer',
      'write EBADF',
      'readFile answer',
    ])
      expect([kind, (tally.get(kind) ?? 0) > 100]).toEqual([kind, true])
    expect(cache.counters.hits).toBeGreaterThan(1000)
  })
})

describe('without waiting', () => {
  test('two writes, two reads: one behind the other', async () => {
    const file = await cache.open(path('two'), 'w+')
    await Promise.all([file.write('a'), file.write('b')])
    expect(readFileSync(path('two'), 'latin1')).toBe('ab')
    const [first, second] = [Buffer.alloc(1), Buffer.alloc(1)]
    const again = await cache.open(pathToFileURL(path('two')))
    await Promise.all([again.read(first), again.read(second)])
    expect([first.toString(), second.toString()]).toEqual(['a', 'b'])
    // At the end of the file nothing is passed over.
    expect(await Promise.all([again.read(first), again.read(second)])).toMatchObject([
      { bytesRead: 0 },
      { bytesRead: 0 },
    ])
    await file.write('c')
    expect((await again.read(first)).buffer.toString()).toBe('c')
    await Promise.all([file.close(), again.close()])
  })

  test('a thousand writes, then close', async () => {
    const file = await cache.open(path('thousand'), 'w')
    const wanted = Array.from({ length: 1000 }, (_, n) => `line ${n}`.padEnd(9))
    const writes = wanted.map((text) => file.write(text))
    await file.close()
    expect(readFileSync(path('thousand'), 'latin1')).toBe(wanted.join(''))
    await Promise.all(writes)
    await expect(file.write('x')).rejects.toMatchObject({ code: 'EBADF' })
  })

  test('one that fails moves nothing, and the next goes on from there', async () => {
    const file = await cache.open(path('fails'), 'w+')
    const results = await Promise.allSettled([
      file.write('one'),
      file.write(5 as never),
      file.readFile(),
      file.write('two'),
    ])
    expect(results.map(({ status }) => status)).toEqual(['fulfilled', 'rejected', 'fulfilled', 'fulfilled'])
    expect(readFileSync(path('fails'), 'latin1')).toBe('onetwo')
    await file.close()
  })

  test('a web stream and a stream that nobody reads do not keep a file from being closed', async () => {
    writeFileSync(path('streams'), Buffer.alloc(100_000, 'x'))
    const file = await cache.open(path('streams'), 'r+')
    const web = file.readableWebStream()
    expect(() => file.readableWebStream()).toThrow(expect.objectContaining({ code: 'ERR_INVALID_STATE' }))
    const reader = web.getReader()
    expect((await reader.read()).value).toHaveLength(16_384)
    file.createReadStream()
    const failing = (await cache.open(path('streams'))).createWriteStream({ autoClose: false })
    await new Promise((resolve) => failing.once('error', resolve).end('x'))
    await file.close()
    expect((await reader.read()).done).toBe(true)
    expect(() => file.readableWebStream()).toThrow('closed')
  })

  test('a web stream that fails lets go of its file', async () => {
    const file = await cache.open(path('unreadable'), 'w')
    await expect(file.readableWebStream().getReader().read()).rejects.toMatchObject({ code: 'EBADF' })
    await file.close()
  })
})

describe('the form', () => {
  test('everything that a file handle has, but for its descriptor', async () => {
    expectTypeOf<CachedFile>().toExtend<Handle>()
    expectTypeOf<CachedFile>().not.toHaveProperty('fd')
    const handle = await open(path('form'), 'w')
    const file = await cache.open(path('form'))
    for (let of: object = handle; of !== Object.prototype; of = Object.getPrototypeOf(of))
      for (const name of Reflect.ownKeys(of)) {
        // What Node keeps for itself has a name that nobody else can write; `getAsyncId` is in no documentation.
        const ours =
          ['fd', 'getAsyncId'].includes(String(name)) || (typeof name === 'symbol' && name !== Symbol.asyncDispose)
        expect([name, ours || name in file || String(name).startsWith('_')]).toEqual([name, true])
      }
    await Promise.all([handle.close(), file.close()])
  })

  test('numbers that are no place in a file are refused in every call, before anything is done', async () => {
    const file = await cache.open(path('places'), 'w+')
    await file.write('content')
    for (const place of [-2, 0.5, Number.NaN, 2 ** 53, Number.POSITIVE_INFINITY]) {
      const wrong = { name: 'RangeError', code: 'ERR_OUT_OF_RANGE' }
      await expect(file.read(Buffer.alloc(4), 0, 4, place)).rejects.toMatchObject(wrong)
      await expect(file.readv([Buffer.alloc(4)], place)).rejects.toMatchObject(wrong)
      await expect(file.write(Buffer.alloc(4), 0, 4, place)).rejects.toMatchObject(wrong)
      await expect(file.write('text', place)).rejects.toMatchObject(wrong)
      await expect(file.writev([Buffer.alloc(4)], place)).rejects.toMatchObject(wrong)
    }
    await expect(file.truncate(1.5)).rejects.toMatchObject({ code: 'ERR_OUT_OF_RANGE' })
    expect((await file.read({ position: 3n })).bytesRead).toBe(4)
    expect(readFileSync(path('places'), 'latin1')).toBe('content')
    await file.close()
  })
})

describe('a program that ends without closing', () => {
  const script = fileURLToPath(new URL('ends.mjs', import.meta.url))
  test.each(['exit', 'throw', 'SIGTERM', 'SIGKILL', 'end'])('by %s has lost no more than one with node:fs', (how) => {
    const left = ['fs', 'page-cache'].map((which) => {
      const file = path(`${which}-${how}`)
      const { status, signal } = spawnSync(process.execPath, [script, which, file, how], { stdio: 'ignore' })
      return { status, signal, content: readFileSync(file, 'latin1') }
    })
    expect(left[1]).toEqual(left[0])
    expect(left[1]!.content.startsWith('one two three four ')).toBe(true)
    expect(left[1]!.content).toHaveLength(how === 'end' ? 6019 : 19)
  })
})
