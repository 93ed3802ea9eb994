/** Blocks in the memory of a real OpenCL device, which is the processor here; and what happens when it goes. */
import { execFileSync } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { conformance, makePage, placeCases } from '@tmem/conformance'
import { compose, GetOutcome, type LayerContext, type PageStore, type Pool, PutOutcome, parseStack } from '@tmem/core'
import { zcache, zcacheFactory } from '@tmem/zcache'
import { afterAll, afterEach, describe, expect, it, test } from 'vitest'
import { lacking, requires } from '../../../tools/requires.ts'
import { openDevice, type VramOptions, videoDevices, vram, vramFactory } from '../src/index.ts'
import { Device, pocl } from './device.ts'

const MiB = 2 ** 20
const folder = mkdtempSync(join(tmpdir(), 'vram-'))
afterAll(() => rmSync(folder, { recursive: true }))
const stores: PageStore[] = []
afterEach(async () => {
  for (const store of stores.splice(0)) await store.close()
})

function open(options: Partial<VramOptions>, persistent = true): { store: PageStore; pool: Pool } {
  const store = compose([zcache({ limitBytes: 16 * MiB }), vram({ limitBytes: 16 * MiB, ...options })], {
    check: 'model',
  })
  stores.push(store)
  const pool = store.newPool({ client: 1, persistent, shared: !persistent, pageSize: 4096 })
  if (typeof pool === 'number') throw new Error('no pool')
  return { store, pool }
}

const indexes = (count: number, first = 0): Uint32Array => Uint32Array.from({ length: count }, (_, n) => first + n)

/** Puts pages and sends them down, some at a time. How many went. */
async function fill(pool: Pool, count: number, first = 0): Promise<number> {
  for (const index of indexes(count, first))
    expect(pool.put(1, index, makePage('noise', index, 4096))).toBe(PutOutcome.Stored)
  let went = 0
  for (let n = 0; n < count; n += 25)
    went += (await pool.sink!(1, indexes(Math.min(25, count - n), first + n), Math.min(25, count - n), true)).pages
  return went
}

async function expectPages(pool: Pool, count: number, first = 0): Promise<void> {
  await Promise.all(
    [...indexes(count, first)].map(async (index) => {
      const into = new Uint8Array(4096)
      expect(await pool.fetch(1, index, into)).toBe(GetOutcome.Hit)
      expect(Buffer.compare(into, makePage('noise', index, 4096))).toBe(0)
    }),
  )
}

const countersOf = (store: PageStore): Readonly<Record<string, number>> => {
  const all = [store.stats()]
  for (const node of all) {
    if (node.name === 'vram' && 'device_open' in node.counters) return node.counters
    all.push(...node.children)
  }
  throw new Error('vram has no statistics')
}

test('devices are those that clinfo lists', (ctx) => {
  requires(ctx, pocl)
  const listed = execFileSync('clinfo', ['--raw'], { encoding: 'utf8' })
  const names = [...listed.matchAll(/CL_DEVICE_NAME +(.+)$/gm)].map(([, name]) => name!.trim())
  expect(videoDevices().map(({ name }) => name)).toEqual(names)
  expect(names.length).toBeGreaterThan(0)
})

test('pages go to the device in few waits, come back, and leave nothing', async (ctx) => {
  requires(ctx, pocl)
  const { store, pool } = open({ volatile: true })
  expect(await fill(pool, 500)).toBe(500)
  expect(countersOf(store)).toMatchObject({ blocks: 500, written: 500, refused: 0 })
  await expectPages(pool, 500)
  expect(countersOf(store)['read']).toBe(500)
  expect(countersOf(store)['read_batches']).toBeLessThan(10)
  store.check!()
  pool.flushObject(1)
  expect(countersOf(store)).toMatchObject({ blocks: 0, used_bytes: 0 })
})

test('it keeps to its limit, and what it refuses stays above', async (ctx) => {
  requires(ctx, pocl)
  const { store, pool } = open({ volatile: true, limitBytes: 2 * MiB })
  const went = await fill(pool, 1000)
  expect(went).toBeGreaterThan(300)
  expect(went).toBeLessThan(512)
  expect(countersOf(store)['used_bytes']).toBeLessThanOrEqual(2 * MiB)
  await expectPages(pool, 1000)
  store.check!()
})

test('a device that has no room for another buffer refuses, and takes what finds room in those that it has', async (ctx) => {
  requires(ctx, pocl)
  const device = new Device()
  const { store, pool } = open({ volatile: true, open: device.open })
  expect(await fill(pool, 100)).toBe(100)
  device.isFull = true
  expect(await fill(pool, 1000, 1000)).toBeLessThan(500)
  await expectPages(pool, 100)
  await expectPages(pool, 1000, 1000)
  expect(countersOf(store)['devices_lost']).toBe(0)
  store.check!()
})

for (const when of ['at once', 'later'] as const)
  test(`a lost device costs no page that has a copy (${when}), and another one is taken`, async (ctx) => {
    requires(ctx, pocl)
    const device = new Device()
    const copy = join(folder, `copy ${when}`)
    const { store, pool } = open({ copy, open: device.open })
    expect(await fill(pool, 300)).toBe(300)
    device.gone = when
    await expectPages(pool, 300)
    expect(countersOf(store)).toMatchObject({ devices_lost: 1, device_open: 0 })
    expect(countersOf(store)['copies_read']).toBeGreaterThan(0)
    expect(await fill(pool, 10, 1000)).toBe(0)
    device.gone = false
    while (countersOf(store)['device_open'] === 0) {
      await new Promise((resolve) => setTimeout(resolve, 100))
      store.tick({ pages: 16 })
    }
    let went = 0
    while (went < 10) went += (await pool.sink!(1, indexes(10, 1000), 10, true)).pages
    await expectPages(pool, 300)
    await expectPages(pool, 10, 1000)
    store.check!()
    await store.close()
    expect(existsSync(copy)).toBe(false)
  })

test('the device goes while pages are on their way: they stay above', async (ctx) => {
  requires(ctx, pocl)
  const device = new Device()
  const { store, pool } = open({ copy: join(folder, 'on their way'), open: device.open })
  expect(await fill(pool, 50)).toBe(50)
  const going = fill(pool, 100, 100)
  device.gone = 'later'
  await going
  await expectPages(pool, 50)
  await expectPages(pool, 100, 100)
  store.check!()
})

test('without a copy what may vanish is a miss, and what may not is told, never other bytes', async (ctx) => {
  requires(ctx, pocl)
  const [one, other] = [new Device(), new Device()]
  const lossy = open({ volatile: true, open: one.open })
  const cache = open({ open: other.open }, false)
  expect(await fill(lossy.pool, 20)).toBe(20)
  expect(await fill(cache.pool, 20)).toBe(20)
  one.gone = other.gone = 'at once'
  const into = new Uint8Array(4096)
  await expect(lossy.pool.fetch(1, 3, into)).rejects.toMatchObject({ code: 'TMEM_CORRUPT' })
  expect(await cache.pool.fetch(1, 3, into)).toBe(GetOutcome.Miss)
  for (const { store } of [lossy, cache]) store.check!()
})

test('pages that may not vanish are refused without a copy, unless they are said to be volatile', () => {
  const limitBytes = MiB
  expect(vram({ limitBytes }).place!.traits).toMatchObject({ persistent: false, ephemeral: true })
  expect(vram({ limitBytes, volatile: true }).place!.traits.persistent).toBe(true)
  expect(vram({ limitBytes, copy: '/tmp/x' }).place!.traits.persistent).toBe(true)
  expect(parseStack('zcache(limit=16MiB) > vram(limit=1MiB,volatile=yes)', [zcacheFactory, vramFactory])).toHaveLength(
    2,
  )
})

test('a device is chosen by number or name, and one that is not there is told', (ctx) => {
  requires(ctx, pocl)
  const [first] = videoDevices()
  for (const which of ['0', first!.name.slice(2, 9).toUpperCase()]) {
    const device = openDevice(which)
    expect(device.name).toBe(first!.name)
    device.close()
  }
  expect(() => openDevice('no such card')).toThrow(`there is no no such card, there are 0: ${first!.name}`)
  expect(() => openDevice('17')).toThrow('there is no 17')
})

test('where there is no device that is told in one line, and nothing is left behind', () => {
  // A process of its own, to which no driver is registered.
  const code = `
    const { compose } = await import('@tmem/core')
    const { vram } = await import('@tmem/vram')
    try { compose([vram({ limitBytes: '1MiB', copy: ${JSON.stringify(join(folder, 'left'))} })]) } catch (error) {
      console.log(error.code, error.message)
    }`
  const printed = execFileSync(process.execPath, ['--input-type=module', '-e', code], {
    cwd: new URL('..', import.meta.url),
    encoding: 'utf8',
    env: { ...process.env, OCL_ICD_VENDORS: join(folder, 'nobody') },
  })
  expect(printed).toMatch(/^TMEM_UNSUPPORTED vram: (there is no OpenCL here|OpenCL has no device here): install .+\n$/)
  expect(existsSync(join(folder, 'left'))).toBe(false)
})

test('settings that make no sense are refused with a reason', () => {
  expect(() => vram({ limitBytes: 5 })).toThrow('limitBytes is 1048576 to')
  expect(() => vram({ limitBytes: MiB, devise: '0' } as never)).toThrow('did you mean device')
  expect(() => parseStack('vram(limit=1MiB,copi=a)', [vramFactory])).toThrow('did you mean copy')
})

test('the place suite over a device, and over one with a copy', { timeout: 120_000 }, async (ctx) => {
  requires(ctx, pocl)
  let files = 0
  for (const more of [{ volatile: true }, { copy: '' }]) {
    const cases = await placeCases({
      name: 'vram',
      open: (context) =>
        vram({
          limitBytes: 2 * MiB,
          ...more,
          ...('copy' in more ? { copy: join(folder, `suite ${files++}`) } : {}),
        }).place!.open(context),
      manifest: { filledBy: 4 * MiB, property: { runs: 20 } },
    })
    for (const one of cases) await expect(one.run()).resolves.toBeUndefined()
  }
})

if (lacking(pocl) === undefined)
  await conformance(
    {
      name: 'a zcache with little room over vram',
      open: (context: LayerContext) =>
        compose([zcache({ limitBytes: 400_000 }), vram({ limitBytes: 16 * MiB, volatile: true })], {
          ...context,
          check: 'model',
        }),
      manifest: { steady: false, pageSizes: [4096, 65_536], property: { runs: 20 } },
    },
    { describe, it },
  )
