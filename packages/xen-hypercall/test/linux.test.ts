/** Linux's side: front ends of ours through the hypercalls, and memory that a guest gives back by itself. */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Cleancache, PageState } from '@tmem/cleancache'
import { compose, GetOutcome } from '@tmem/core'
import { frontswap, SelfShrink } from '@tmem/frontswap'
import { zcache } from '@tmem/zcache'
import { describe, expect, onTestFinished, test } from 'vitest'
import {
  balloonFloor,
  GuestMemory,
  LinuxGuest,
  linuxCleancache,
  type Release,
  SelfBalloon,
  XenHost,
} from '../src/index.ts'
import { world } from './guest.ts'

const state = PageState.Locked | PageState.UpToDate | PageState.MappedToDisk
const facts = {
  name: 'ext4',
  blockSize: 4096,
  inMemory: false,
  invalidates: true,
  uniqueInodes: true,
  invalidatesAtEnd: true,
  readsAskFirst: true,
  cluster: false,
}
const pageOf = (fill: number): Uint8Array => new Uint8Array(4096).fill(fill).fill(1, 0, 1)

function guestOf(host: XenHost, id: number, bits: 32 | 64 = 64): LinuxGuest {
  return new LinuxGuest(host, host.addDomain({ id, memory: new GuestMemory(new Uint8Array(4 * 4096)), bits }), 1)
}

describe.each((['4.0.0', '4.2', '4.9'] as const).map((release) => ({ release })))('Xen $release', ({ release }) => {
  test.each([{ bits: 32 as const }, { bits: 64 as const }])('cleancache, guest of $bits bits', ({ bits }) => {
    const { host } = world({ release })
    const cache = new Cleancache()
    cache.register(linuxCleancache(guestOf(host, 1, bits)))
    const fs = cache.initFs(facts, 4096)
    expect(fs.poolId).toBe(0)
    const into = new Uint8Array(4096)
    cache.putPage(fs, 42, 7, pageOf(5), state)
    expect(cache.getPage(fs, 42, 8, into, state)).toBe(GetOutcome.Miss)
    expect(cache.getPage(fs, 42, 7, into, state)).toBe(GetOutcome.Hit)
    expect(into).toEqual(pageOf(5))
    expect(cache.getPage(fs, 42, 7, into, state)).toBe(GetOutcome.Miss)
    cache.putPage(fs, 42, 1, pageOf(1), state)
    cache.putPage(fs, 43, 1, pageOf(2), state)
    cache.invalidateInode(fs, 42)
    expect(cache.getPage(fs, 42, 1, into, state)).toBe(GetOutcome.Miss)
    expect(cache.getPage(fs, 43, 1, into, state)).toBe(GetOutcome.Hit)
    cache.invalidateFs(fs)
    expect(host.clients.get(1)!.slots[0]).toBeUndefined()
    // A page of another size is refused, as Xen does.
    expect(cache.initFs({ ...facts, blockSize: 8192 }, 8192).poolId).toBeUndefined()
  })

  test('frontswap: one pool, 16 objects for each area', () => {
    const { host } = world({ release })
    const guest = guestOf(host, 1)
    const into = new Uint8Array(4096)
    expect(guest.frontswapStore(1, 1, pageOf(1))).toBe(false)
    expect([guest.frontswapInit(), guest.frontswapInit()]).toEqual([true, true])
    for (let offset = 1; offset < 40; offset++) expect(guest.frontswapStore(1, offset, pageOf(offset))).toBe(true)
    expect(guest.frontswapStore(2, 1, pageOf(99))).toBe(true)
    expect(guest.frontswapStore(1, 2 ** 32, pageOf(1))).toBe(false)
    const { pool } = host.clients.get(1)!.slots[0]!
    const names: string[] = []
    pool.walk!((object, index) => names.push(`${object}:${index}`) > 0)
    expect(names.length).toBe(40)
    expect(names).toEqual(expect.arrayContaining(['17:0', '31:0', '16:1', '33:0']))
    for (let offset = 1; offset < 40; offset++) {
      expect(guest.frontswapLoad(1, offset, into)).toBe(GetOutcome.Hit)
      expect(into[9]).toBe(offset)
    }
    guest.frontswapInvalidatePage(1, 5)
    expect(guest.frontswapLoad(1, 5, into)).toBe(GetOutcome.Miss)
    guest.frontswapInvalidateArea(1)
    expect(pool.census!()).toEqual({ pages: 1, objects: 1 })
    expect(guest.frontswapLoad(2, 1, into)).toBe(GetOutcome.Hit)
    expect(host.clients.size).toBe(1)
  })
})

test('a file system of a cluster: its uuid, first bytes first', () => {
  const { host } = world({ release: '4.8' satisfies Release })
  const [one, two] = [1, 2].map((id) => {
    const cache = new Cleancache()
    cache.register(linuxCleancache(guestOf(host, id)))
    return cache
  }) as [Cleancache, Cleancache]
  const uuid = Uint8Array.from({ length: 16 }, (_, n) => n + 1)
  const [a, b] = [one, two].map((cache) => cache.initSharedFs(uuid, { ...facts, cluster: true }, 4096))
  one.putPage(a!, 1, 1, pageOf(7), state)
  const into = new Uint8Array(4096)
  expect(two.getPage(b!, 1, 1, into, state)).toBe(GetOutcome.Hit)
  expect(host.shared[0]!.uuid).toBe(0x100f0e0d0c0b0a09_0807060504030201n)
})

test('pages that lie on a disk are fetched, also several at once', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-xen-'))
  const store = compose([zcache({ limitBytes: '1MiB' }), frontswap({ file: join(folder, 'swap'), sizeBytes: '4MiB' })])
  onTestFinished(async () => {
    await store.close()
    rmSync(folder, { recursive: true })
  })
  await store.ready?.()
  const host = new XenHost({ store })
  const guest = guestOf(host, 1)
  guest.frontswapInit()
  const offsets = [16, 32, 48, 64]
  for (const offset of offsets) guest.frontswapStore(0, offset, pageOf(offset))
  await host.clients.get(1)!.slots[0]!.pool.sink!(0, Uint32Array.of(1, 2, 3, 4), 4, true)
  const pages = offsets.map(() => new Uint8Array(4096))
  expect(guest.frontswapLoad(0, 16, pages[0]!)).toBe(GetOutcome.Deferred)
  // The others wait for their turn.
  const outcomes = await Promise.all(offsets.map((offset, n) => guest.frontswapFetch(0, offset, pages[n]!)))
  expect(outcomes).toEqual(offsets.map(() => GetOutcome.Hit))
  expect(pages.map((page) => page[9])).toEqual(offsets)
  expect(await guest.frontswapFetch(0, 80, pages[0]!)).toBe(GetOutcome.Miss)
})

describe('selfballooning', () => {
  const mib = 256

  test('the floor, by the table', () => {
    const floor = (usable: number): number => balloonFloor({ highest: (usable + 10) * mib, reserve: 10 * mib }) / mib
    expect([0, 15, 16, 32, 63].map(floor)).toEqual([10, 25, 26, 34, 49.5])
    expect([64, 104, 511].map(floor)).toEqual([10 + 40 + 3, 10 + 40 + 8, 10 + 40 + 58.875])
    expect([512, 99 + 3200].map((usable) => Math.floor(floor(usable)))).toEqual([10 + 99 + 12, 10 + 99 + 100])
    expect(balloonFloor({ highest: 1000 * mib, reserve: 10 * mib }, 7)).toBe(17 * mib)
  })

  test('every five seconds: an eighth down, all of it up, never below the floor', () => {
    let now = 0
    const balloon = new SelfBalloon({ clock: () => now, minUsableMiB: 20 })
    const at = (current: number, committed: number): number | undefined => {
      const target = balloon.target({
        current: current * mib,
        committed: committed * mib,
        reserve: 10 * mib,
        highest: 1024 * mib,
        frontswap: 50 * mib,
      })
      return target === undefined ? undefined : target / mib
    }
    expect(at(800, 70)).toBeUndefined()
    now = 5000
    expect(at(800, 70)).toBe(800 - (800 - 80) / 8)
    now = 9999
    expect(at(710, 70)).toBeUndefined()
    now = 10_000
    expect(at(100, 500)).toBe(510)
    now = 15_000
    // Nothing is committed: it goes to the floor and stays.
    expect(at(31, 0)).toBe(30)
    now = 20_000
    expect(at(30, 0)).toBe(30)
  })

  test('what is in frontswap will be wanted; domain 0 keeps what it has', () => {
    let now = 0
    const memory = { current: 100, committed: 100, reserve: 0, highest: 100, frontswap: 50 }
    const shrinking = new SelfBalloon({ clock: () => now, selfShrinking: true, minUsableMiB: 0.01 })
    const domain0 = new SelfBalloon({ clock: () => now, isDomain0: true })
    now = 5000
    expect(shrinking.target(memory)).toBe(150)
    expect(domain0.target(memory)).toBeUndefined()
    // With room again frontswap gives its pages back, a little at a time, once it has stopped growing.
    const shrink = new SelfShrink()
    const targets = [50, 50, 50, 50].map((pages) => shrink.target(pages))
    expect(targets).toEqual([undefined, undefined, undefined, 48])
  })

  test('options that make no sense', () => {
    const clock = (): number => 0
    expect(() => new SelfBalloon({ clock, downHysteresis: 0 })).toThrow('downHysteresis must be a positive integer')
    expect(() => new SelfBalloon({ clock, reservedMiB: -1 })).toThrow('reservedMiB must not be negative')
    expect(() => new SelfBalloon({ clock, reserved: 1 } as never)).toThrow('did you mean reservedMiB?')
    const { host } = world()
    const domain = host.addDomain({ id: 1, memory: new GuestMemory(new Uint8Array(2 * 4096)) })
    expect(() => new LinuxGuest(host, domain, 0)).toThrow('the guest has no frames 0 to 2')
  })
})
