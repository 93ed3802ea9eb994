/**
 * The page cache with cleancache against plain node:fs as model: a file that is read and written through the cache,
 * changed by others, replaced, with reads and writes that fail; and its twin, to which the same is done without a
 * cache.
 */
import assert from 'node:assert/strict'
import {
  closeSync,
  constants,
  openSync,
  readFileSync,
  truncateSync,
  unlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { Cleancache, tmemBackend } from '@tmem/cleancache'
import { compose, type Layer, Tmem } from '@tmem/core'
import { delay, discard, refuse } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { type CachedFile, DirectReads, type FileIo, nodeFileIo, PageCache } from '../src/index.ts'
import { TimedIo, testFolder } from './timed-io.ts'

const path = testFolder()
const pageSize = 4096
const largestFile = 30 * pageSize

/** Places that are often at, or next to, the border of a page. */
const place = fc.oneof(
  fc.nat(largestFile),
  fc.tuple(fc.nat(29), fc.constantFrom(-1, 0, 1, 7)).map(([page, beside]) => Math.max(0, page * pageSize + beside)),
)
const length = fc.oneof(fc.nat(300), fc.constantFrom(pageSize, 2 * pageSize, 1), fc.nat(6 * pageSize))
const fill = fc.integer({ min: 1, max: 255 })
const step = fc.oneof(
  { weight: 20, arbitrary: fc.record({ do: fc.constant('read' as const), place, length }) },
  { weight: 4, arbitrary: fc.record({ do: fc.constant('write' as const), place, length, fill }) },
  { weight: 6, arbitrary: fc.record({ do: fc.constant('readOn' as const), length }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('writeOn' as const), length, fill }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constant('truncate' as const), place }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constant('sync' as const) }) },
  { weight: 8, arbitrary: fc.record({ do: fc.constant('scan' as const) }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constant('dropCaches' as const) }) },
  { weight: 6, arbitrary: fc.record({ do: fc.constant('wait' as const), ms: fc.constantFrom(1, 9, 10, 30, 3000) }) },
  {
    weight: 2,
    arbitrary: fc.record({ do: fc.constant('readsAtOnce' as const), places: fc.array(place, { maxLength: 6 }) }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('readDirect' as const), place, length }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('writeDirect' as const), place, length, fill }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('append' as const), length, fill }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('stat' as const) }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('reopen' as const) }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constant('foreignWrite' as const), place, length, fill }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('foreignTruncate' as const), place }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('foreignReplace' as const), length, fill }) },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('failReads' as const), count: fc.integer({ min: 1, max: 3 }) }) },
  {
    weight: 1,
    arbitrary: fc.record({ do: fc.constant('failWrites' as const), count: fc.integer({ min: 1, max: 3 }) }),
  },
  { weight: 1, arbitrary: fc.record({ do: fc.constant('failTruncate' as const), place }) },
  {
    weight: 1,
    arbitrary: fc.record({ do: fc.constant('shortTransfers' as const), bytes: fc.constantFrom(100, 5000, 1e9) }),
  },
)
type Step = typeof step extends fc.Arbitrary<infer S> ? S : never

/** A file through the cache and its twin. */
class Twins {
  readonly io: TimedIo
  readonly ours = path('ours')
  readonly twin = path('twin')
  readonly cache: PageCache
  readonly cleancache = new Cleancache()
  files!: { ours: CachedFile; direct: CachedFile; second: CachedFile; twin: FileHandle }

  constructor(layers: readonly Layer[], files: FileIo) {
    this.io = new TimedIo(files)
    this.cleancache.register(tmemBackend(new Tmem(compose(layers, { check: 'model' })), 1))
    this.cache = new PageCache({
      sizeBytes: 16 * pageSize,
      cleancache: this.cleancache,
      io: this.io,
      now: this.io.now,
      inodes: 2,
    })
    const bytes = pattern(10 * pageSize + 99, 1)
    writeFileSync(this.twin, bytes)
    writeFileSync(this.ours, bytes)
  }

  async openAll(): Promise<void> {
    this.files = {
      ours: await this.cache.open(this.ours, 'r+'),
      direct: await this.cache.open(this.ours, 'r+', { direct: true }),
      second: await this.cache.open(this.ours, 'r'),
      twin: await open(this.twin, 'r+'),
    }
  }

  async closeAll(): Promise<void> {
    const { ours, direct, second, twin } = this.files
    this.compareFiles()
    for (const file of [ours, direct, second, twin]) await file.close()
  }

  compareFiles(): void {
    assert.equal(Buffer.compare(readFileSync(this.ours), readFileSync(this.twin)), 0)
  }

  async read(file: CachedFile, at: number, count: number): Promise<void> {
    const [got, wanted] = [Buffer.alloc(count, 0xee), Buffer.alloc(count, 0xee)]
    const expected = await this.files.twin.read(wanted, 0, count, at)
    const failing = this.io.failReads > 0
    let bytesRead: number
    try {
      ;({ bytesRead } = await file.read(got, 0, count, at))
    } catch (error) {
      assert.equal(failing, true)
      assert.equal((error as NodeJS.ErrnoException).code, 'EIO')
      return
    }
    assert.equal(bytesRead, expected.bytesRead)
    assert.equal(Buffer.compare(got, wanted), 0)
  }

  /** Whatever of a write was taken is written to the twin as well. */
  async write(
    write: () => Promise<{ bytesWritten: number }>,
    twin: (bytes: number) => Promise<unknown>,
  ): Promise<void> {
    const failing = this.io.failWrites > 0
    try {
      const { bytesWritten } = await write()
      await twin(bytesWritten)
    } catch (error) {
      assert.equal(failing, true)
      assert.equal((error as NodeJS.ErrnoException).code, 'ENOSPC')
    }
  }

  async do(action: Step): Promise<void> {
    const { io, cache } = this
    const { ours, direct, second, twin } = this.files
    switch (action.do) {
      case 'read':
        return this.read(action.place % 2 === 0 ? ours : second, action.place, action.length)
      case 'scan':
        for (let at = 0; at <= largestFile; at += 3 * pageSize) await this.read(second, at, 3 * pageSize)
        return
      case 'readOn': {
        // The place of the handle is only moved by reads without a place, and both twins have moved alike.
        const [got, wanted] = [Buffer.alloc(action.length), Buffer.alloc(action.length)]
        io.failReads = 0
        io.largest = Number.POSITIVE_INFINITY
        const { bytesRead } = await ours.read(got)
        assert.equal(bytesRead, (await twin.read(wanted)).bytesRead)
        assert.equal(Buffer.compare(got, wanted), 0)
        return
      }
      case 'write': {
        const bytes = pattern(action.length, action.fill)
        return this.write(
          () => ours.write(bytes, 0, bytes.length, action.place),
          (taken) => twin.write(bytes, 0, taken, action.place),
        )
      }
      case 'writeOn': {
        const bytes = pattern(action.length, action.fill)
        io.failWrites = 0
        await ours.write(bytes)
        await twin.write(bytes)
        return
      }
      case 'truncate':
        await ours.truncate(action.place)
        await twin.truncate(action.place)
        return
      case 'failTruncate':
        io.failTruncates = 1
        await assert.rejects(ours.truncate(action.place), { code: 'ENOSPC' })
        return
      case 'sync':
        await ours.sync()
        return this.compareFiles()
      case 'dropCaches':
        cache.dropCaches()
        return
      case 'wait':
        io.nowMs += action.ms
        return
      case 'readsAtOnce':
        await Promise.all(action.places.map((at, n) => this.read(n % 2 === 0 ? ours : second, at, 2 * pageSize)))
        return
      case 'readDirect':
        io.failWrites = 0
        io.largest = Number.POSITIVE_INFINITY
        return this.read(direct, action.place, action.length)
      case 'writeDirect': {
        const bytes = pattern(action.length, action.fill)
        return this.write(
          () => direct.write(bytes, 0, bytes.length, action.place),
          (taken) => twin.write(bytes, 0, taken, action.place),
        )
      }
      case 'append': {
        io.failWrites = 0
        const appending = await cache.open(this.ours, 'a')
        const bytes = pattern(action.length, action.fill)
        const { bytesWritten } = await appending.write(bytes)
        await twin.write(bytes, 0, bytesWritten, (await twin.stat()).size)
        await appending.close()
        return
      }
      case 'stat':
        assert.equal((await second.stat()).size, (await twin.stat()).size)
        assert.equal((await ours.stat({ bigint: true })).size, (await twin.stat({ bigint: true })).size)
        return
      case 'reopen':
        await this.closeAll()
        return this.openAll()
      case 'foreignWrite': {
        this.compareFiles()
        const bytes = pattern(action.length, action.fill)
        io.foreignWrite(this.ours, bytes, action.place)
        if (bytes.length > 0) plainWrite(this.twin, bytes, action.place)
        return
      }
      case 'foreignTruncate':
        this.compareFiles()
        io.foreignTruncate(this.ours, action.place)
        truncateSync(this.twin, action.place)
        return
      case 'foreignReplace': {
        await this.closeAll()
        const bytes = pattern(action.length, action.fill)
        io.foreignReplace(this.ours, bytes)
        unlinkSync(this.twin)
        writeFileSync(this.twin, bytes)
        return this.openAll()
      }
      case 'failReads':
        io.failReads = action.count
        return
      case 'failWrites':
        io.failWrites = action.count
        return
      case 'shortTransfers':
        io.largest = action.bytes
        return
    }
  }
}

/** Bytes that tell their place and whose they are. */
function pattern(count: number, fill: number): Buffer {
  const bytes = Buffer.alloc(count, fill)
  for (let at = 0; at + 4 <= count; at += 64) bytes.writeUInt32LE(at * 251 + fill, at)
  return bytes
}

function plainWrite(file: string, bytes: Uint8Array, at: number): void {
  const descriptor = openSync(file, constants.O_WRONLY)
  try {
    writeSync(descriptor, bytes, 0, bytes.length, at)
  } finally {
    closeSync(descriptor)
  }
}

const stacks: [name: string, layers: () => Layer[], runs: number, direct?: true][] = [
  ['memory', () => [memory({ limitBytes: 400_000 })], 60],
  ['too little memory', () => [memory({ limitBytes: 100_000 })], 25],
  ['zcache', () => [zcache({ limitBytes: 300_000 })], 25],
  ['memory, the files read around the cache of the system', () => [memory({ limitBytes: 400_000 })], 40, true],
  ['a store that refuses every third page', () => [refuse({ every: 3 }), memory({ limitBytes: 400_000 })], 15],
  ['a store that refuses everything', () => [refuse({ every: 1 }), memory({ limitBytes: 400_000 })], 15],
  ['a store that loses every page', () => [discard({ mode: 'lose' })], 15],
  ['a store that has to wait', () => [delay({ turn: () => Promise.resolve() }), memory({ limitBytes: 400_000 })], 30],
]

test.each(stacks)(
  'any history is answered as plain files would, over %s',
  { timeout: 120_000 },
  async (name, layers, runs, direct) => {
    const totals = { succ_gets: 0, hits: 0, foreignChanges: 0, unsettledDrops: 0, diskReads: 0 }
    const files = direct === true ? new DirectReads() : nodeFileIo
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 20, maxLength: 100, size: 'max' }), async (steps) => {
        const twins = new Twins(layers(), files)
        await twins.openAll()
        try {
          for (const action of steps) await twins.do(action)
          twins.compareFiles()
        } finally {
          await twins.files.twin.close()
          twins.io.failWrites = 0
          await twins.cache.close()
        }
        const { counters } = twins.cache
        totals.succ_gets += twins.cleancache.counters.succ_gets
        for (const name of ['hits', 'foreignChanges', 'unsettledDrops', 'diskReads'] as const)
          totals[name] += counters[name]
      }),
      { seed: 5, numRuns: runs, endOnFailure: true },
    )
    // It was about something.
    expect(totals.hits).toBeGreaterThan(5 * runs)
    expect(totals.foreignChanges).toBeGreaterThan(runs)
    expect(totals.unsettledDrops).toBeGreaterThan(runs / 2)
    const keeps = layers()[0]!.name !== 'discard' && !name.includes('everything')
    expect(totals.succ_gets > runs / 4).toBe(keeps)
    expect(totals.succ_gets === 0).toBe(!keeps)
    // On a file system that refuses, this was the ordinary way once more: see direct-io.test.ts.
    const around = files instanceof DirectReads && files.refused.size === 0
    expect(around ? files.counters.directReads : 10 * runs + 1).toBeGreaterThan(10 * runs)
  },
)
