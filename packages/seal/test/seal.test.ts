/** What somebody can do who writes to where sealed blocks lie: here to the swap file itself. */

import { equal, ok } from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import {
  closeSync,
  existsSync,
  fsyncSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { makePage } from '@tmem/conformance'
import {
  compose,
  GetOutcome,
  type Layer,
  type PageStore,
  type Pool,
  PutOutcome,
  parseStack,
  planStack,
} from '@tmem/core'
import { slowMemory } from '@tmem/faults'
import { frontswap, frontswapFactory } from '@tmem/frontswap'
import { zcache, zcacheFactory } from '@tmem/zcache'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { type SealOptions, seal, sealFactory } from '../src/index.ts'

const MiB = 2 ** 20
let folder: string
let file: string
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'seal-'))
  file = join(folder, 'swap')
})
const stores: PageStore[] = []
afterEach(async () => {
  for (const store of stores.splice(0)) await store.close()
  rmSync(folder, { recursive: true })
})

/** A part of the file. */
interface Part {
  readonly at: number
  readonly bytes: Buffer
}

/** A zcache over a swap file, and a hand that knows what was written where. */
class World {
  readonly store: PageStore
  readonly pool: Pool

  constructor(filters: readonly Layer[]) {
    this.store = compose([zcache({ limitBytes: MiB }), ...filters, frontswap({ file, sizeBytes: 4 * MiB })], {
      check: 'arguments',
    })
    stores.push(this.store)
    this.pool = this.store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 }) as Pool
  }

  /** Puts a page and sends it to the file: what has changed there. */
  async send(index: number, page: Uint8Array): Promise<Part> {
    equal(this.pool.put(1, index, page), PutOutcome.Stored)
    const before = readFileSync(file)
    equal((await this.pool.sink!(1, Uint32Array.of(index), 1, true)).pages, 1)
    const after = readFileSync(file)
    const changed = (n: number): boolean => before[n] !== after[n]
    let at = 0
    while (at < after.length && !changed(at)) at++
    let end = after.length
    while (end > at && !changed(end - 1)) end--
    ok(end > at)
    // A frame begins at a unit, and a byte of it may have been there before by chance.
    at -= at % 128
    return { at, bytes: after.subarray(at, Math.ceil(end / 128) * 128) }
  }

  async fetch(index: number): Promise<Buffer> {
    const into = Buffer.alloc(4096)
    equal(await this.pool.fetch(1, index, into), GetOutcome.Hit)
    return into
  }

  counter(name: string): number {
    const { children } = this.store.stats()
    const place = children.find((child) => child.name === 'frontswap')!
    return place.children.find((child) => child.name === 'seal')!.counters[name]!
  }
}

function overwrite(at: number, bytes: Uint8Array): void {
  const descriptor = openSync(file, 'r+')
  writeSync(descriptor, bytes, 0, bytes.length, at)
  fsyncSync(descriptor)
  closeSync(descriptor)
}

const noise = (seed: number): Uint8Array => makePage('noise', seed, 4096)

test('what lies outside is no page; without a seal it is', async () => {
  const open = new World([])
  await open.send(0, noise(1))
  expect(readFileSync(file).includes(Buffer.from(noise(1).subarray(100, 116)))).toBe(true)
  await open.store.close()
  rmSync(file, { force: true })
  const world = new World([seal()])
  await world.send(0, noise(1))
  expect(readFileSync(file).includes(Buffer.from(noise(1).subarray(100, 116)))).toBe(false)
  expect(await world.fetch(0)).toEqual(Buffer.from(noise(1)))
})

describe('TMEM_CORRUPT, and never bytes:', () => {
  const kinds: Record<string, (world: World) => Promise<void>> = {
    'any bit of a block was altered': async (world) => {
      // What is before it is the place's own, which nobody else needs to believe.
      for (const offset of [16, 17, 31, 32, 1000, 4112, 4127, 4128, 4143]) {
        const { at, bytes } = await world.send(0, noise(offset))
        overwrite(at + offset, Buffer.of(bytes[offset]! ^ (1 << (offset % 8))))
        await expect(world.pool.fetch(1, 0, new Uint8Array(4096))).rejects.toMatchObject({ code: 'TMEM_CORRUPT' })
        world.pool.flushPage(1, 0)
      }
      const { at, bytes } = await world.send(0, noise(1))
      overwrite(at + 40, Buffer.of(bytes[40]! ^ 1))
    },
    'a block was cut': async (world) => {
      const { at, bytes } = await world.send(0, noise(1))
      overwrite(at + 2048, Buffer.alloc(bytes.length - 2048))
    },
    'two blocks were exchanged': async (world) => {
      const one = await world.send(0, noise(1))
      const other = await world.send(1, noise(2))
      expect(other.at).not.toBe(one.at)
      overwrite(one.at, other.bytes)
      overwrite(other.at, one.bytes)
      await expect(world.pool.fetch(1, 1, new Uint8Array(4096))).rejects.toMatchObject({ code: 'TMEM_CORRUPT' })
    },
    'an older block of the same page was put back': async (world) => {
      const old = await world.send(0, noise(1))
      const { at } = await world.send(0, noise(2))
      overwrite(at, old.bytes)
    },
    'a block is one of another start': async (world) => {
      await world.store.close()
      rmSync(file, { force: true })
      const one = new World([seal()])
      const old = await one.send(0, noise(1))
      await one.store.close()
      rmSync(file, { force: true })
      const two = new World([seal()])
      const { at } = await two.send(0, noise(1))
      expect(at).toBe(old.at)
      overwrite(at, old.bytes)
      await expect(two.pool.fetch(1, 0, new Uint8Array(4096))).rejects.toMatchObject({ code: 'TMEM_CORRUPT' })
    },
  }
  test.for(Object.keys(kinds))('%s', async (kind) => {
    const world = new World([seal()])
    await kinds[kind]!(world)
    if (kind.endsWith('start')) return
    const into = Buffer.alloc(4096, 7)
    await expect(world.pool.fetch(1, 0, into)).rejects.toMatchObject({
      code: 'TMEM_CORRUPT',
      message: expect.stringContaining('is not what was sealed for this page'),
    })
    expect(into.every((byte) => byte === 7)).toBe(true)
    expect(world.counter('corrupt')).toBeGreaterThan(0)
    // The page of now, put anew, is served.
    world.pool.put(1, 0, noise(9))
    await world.send(0, noise(9))
    expect(await world.fetch(0)).toEqual(Buffer.from(noise(9)))
  })
})

test('the same page is sealed otherwise each time, also under the same secret and in another start', async () => {
  const keyFile = join(folder, 'key')
  writeFileSync(keyFile, Buffer.alloc(32, 'secret'))
  const seen = new Set<string>()
  for (let start = 0; start < 3; start++) {
    const world = new World([seal({ keyFile })])
    for (let n = 0; n < 3; n++) {
      const { bytes } = await world.send(n, noise(1))
      expect(await world.fetch(n)).toEqual(Buffer.from(noise(1)))
      seen.add(bytes.subarray(16).toString('hex'))
    }
    await world.store.close()
    rmSync(file, { force: true })
  }
  expect(seen.size).toBe(9)
})

test('a number is used once, also when what was sealed under it was not taken', async () => {
  const failing: { fails: boolean } = { fails: true }
  const refusing: Layer = {
    name: 'refusing',
    wrapPlace: (next) => {
      const write = (next as unknown as { write: () => Promise<void> }).write.bind(next)
      return Object.assign(next, {
        write: (...given: []) => (failing.fails ? Promise.reject(new Error('no')) : write(...given)),
      })
    },
  }
  const world = new World([seal(), refusing])
  world.pool.put(1, 0, noise(1))
  expect((await world.pool.sink!(1, Uint32Array.of(0), 1, true)).pages).toBe(0)
  expect([world.counter('sealed'), world.counter('blocks')]).toEqual([1, 0])
  failing.fails = false
  for (let tries = 0; (await world.pool.sink!(1, Uint32Array.of(0), 1, true)).pages === 0; tries++)
    expect(tries).toBeLessThan(2000)
  expect([world.counter('sealed'), world.counter('blocks')]).toEqual([2, 1])
  expect(await world.fetch(0)).toEqual(Buffer.from(noise(1)))
})

test.for<[string, (path: string) => void, string]>([
  ['that is not there', () => undefined, 'ENOENT'],
  ['that is too short', (path) => writeFileSync(path, 'x'.repeat(31)), 'it has 31 bytes'],
  ['that is too long', (path) => writeFileSync(path, 'x'.repeat(5000)), 'more than 4096 bytes'],
  ['that is a pipe', (path) => void execFileSync('mkfifo', [path]), 'it is no file'],
  ['that is a folder', (path) => rmSync(path, { force: true }), 'it is no file'],
])('a secret %s is told when the stack is opened, and nothing is left behind', async ([kind, make, why]) => {
  const keyFile = kind.endsWith('folder') ? folder : join(folder, 'key')
  if (keyFile !== folder) make(keyFile)
  expect(() => new World([seal({ keyFile })])).toThrow(
    expect.objectContaining({ code: 'TMEM_IO', message: expect.stringContaining(why) }),
  )
  // The swap file was there already, and is given up.
  await expect.poll(() => existsSync(file)).toBe(false)
})

test('it stands only where blocks leave the process, and are forgotten with it', () => {
  const plan = (...layers: Layer[]): unknown => planStack(layers)
  const swap = (): Layer => frontswap({ file, sizeBytes: MiB })
  expect(plan(seal(), swap())).toMatchObject({ persistent: true, reservedBytes: MiB })
  expect(() => plan(seal(), zcache({ limitBytes: MiB }), swap())).toThrow('its blocks do not leave the process')
  expect(() => plan(zcache({ limitBytes: MiB }), seal(), slowMemory({ sizeBytes: MiB, frames: new Map() }))).toThrow(
    'it survives this process',
  )
  expect(() => plan(seal(), frontswap({ file, sizeBytes: MiB, slots: true }))).toThrow('it takes pages as they are')
  expect(() => plan(swap(), seal())).toThrow('seal cannot be the last layer')
  const small = compose.bind(undefined, [
    zcache({ limitBytes: MiB }),
    seal(),
    slowMemory({ sizeBytes: MiB, unitBytes: 32 }),
  ])
  expect(small).toThrow('its unit has 32 bytes')
})

test('in text, and with options that make no sense', () => {
  const factories = [sealFactory, zcacheFactory, frontswapFactory]
  const names = (text: string): string[] => parseStack(text, factories).map(({ name }) => name)
  expect(names(`zcache(limit=1MiB) > seal > frontswap(file=${file},size=1MiB)`)).toEqual([
    'zcache',
    'seal',
    'frontswap',
  ])
  expect(names('seal(keyFile=/etc/key) > seal')).toEqual(['seal', 'seal'])
  expect(() => parseStack('seal(keyfile=/etc/key)', factories)).toThrow('keyFile')
  expect(() => seal({ key: 'x' } as SealOptions)).toThrow('seal has no option key')
  expect(() => seal({ keyFile: '' })).toThrow(TypeError)
})
