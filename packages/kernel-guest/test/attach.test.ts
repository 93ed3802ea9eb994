/** The host's side of the ring, against a guest that the test plays. */
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { compose, type Layer } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { Command, XenHost } from '@tmem/xen-hypercall'
import { zcache } from '@tmem/zcache'
import { describe, expect, onTestFinished, test } from 'vitest'
import { type AttachedGuest, type AttachOptions, attachGuest, SavedPages } from '../src/index.ts'
import { FakeGuest, frames } from './fake-guest.ts'

const persistent = 0x01000001
const put = { cmd: Command.PutPage, frame: frames.page }
const get = { cmd: Command.GetPage, frame: frames.bounce }

function hostOf(...layers: readonly Layer[]): XenHost {
  const store = compose(layers.length > 0 ? layers : [memory({ limitBytes: 2 ** 22 })])
  const host = new XenHost({ store })
  onTestFinished(async () => {
    host.close()
    await store.close()
  })
  return host
}

async function attached(guest: FakeGuest, more: Partial<AttachOptions> = {}): Promise<AttachedGuest> {
  const { host = hostOf() } = more
  const options = { memory: guest.memory, doorbell: guest.doorbell, domain: 1, ...more, host }
  const made = await attachGuest(options)
  onTestFinished(() => made.detach().catch(() => undefined))
  return made
}

const fill = (guest: FakeGuest, value: number): void => void guest.page(frames.page).fill(value)

describe('calls', () => {
  test('are done in their order, those that are posted before the next one, without a bell', async () => {
    const guest = await new FakeGuest().start()
    const { counters } = await attached(guest)
    const pool = await guest.ask({ cmd: Command.NewPool, flags: persistent })
    expect(pool).toBe(0)
    fill(guest, 7)
    expect(await guest.ask({ ...put, pool, object: 3, index: 5 })).toBe(1)
    expect(await guest.ask({ ...get, pool, object: 3, index: 5 })).toBe(1)
    expect(guest.page(frames.bounce)).toEqual(new Uint8Array(4096).fill(7))
    const flush = guest.post({ cmd: Command.FlushPage, pool, object: 3, index: 5 })
    const again = guest.post({ ...get, pool, object: 3, index: 5 })
    expect(await guest.answer(again)).toBeLessThan(1)
    expect(await guest.answer(flush)).toBe(1)
    expect(counters).toMatchObject({ pools: 1, puts: 1, gets: 2, page_flushes: 1, object_flushes: 0, refused: 1 })
  })

  test('that have to wait for a disk are answered when it has come', async () => {
    const guest = await new FakeGuest().start()
    const file = join(guest.folder, 'swap.img')
    const { counters } = await attached(guest, { host: hostOf(frontswap({ file, sizeBytes: 2 ** 20 })) })
    await guest.ask({ cmd: Command.NewPool, flags: persistent })
    guest.page(frames.page).set(Uint8Array.from({ length: 4096 }, (_, n) => n * n))
    await guest.ask({ ...put, index: 1 })
    expect(await guest.ask({ ...get, index: 1 })).toBe(1)
    expect(guest.page(frames.bounce)).toEqual(guest.page(frames.page))
    expect(counters.waited).toBe(1)
  })

  test('of a whole ring, over its end and over 2^32', async () => {
    const guest = await new FakeGuest().start()
    guest.view.setInt32(frames.head * 4096 + 64, -3, true)
    guest.head = -3
    const { counters } = await attached(guest)
    guest.post({ cmd: Command.NewPool, flags: persistent })
    for (let index = 0; index < 63; index++) guest.post({ ...put, index })
    await guest.connected()
    guest.ring()
    await expect.poll(() => guest.tail).toBe(61)
    expect(counters).toMatchObject({ pools: 1, puts: 63, refused: 0 })
  })

  test('wait while it is paused', async () => {
    const guest = await new FakeGuest().start()
    const link = await attached(guest)
    await guest.ask({ cmd: Command.NewPool, flags: persistent })
    const goOn = await link.pause()
    const call = guest.post(put)
    guest.ring()
    await new Promise((resolve) => setTimeout(resolve, 50))
    expect(guest.tail).toBe(call)
    goOn()
    expect(await guest.answer(call)).toBe(1)
  })
})

describe('a host that goes', () => {
  test('is followed by one that goes on where it stopped', async () => {
    const guest = await new FakeGuest().start()
    const host = hostOf()
    const first = await attached(guest, { host })
    await guest.ask({ cmd: Command.NewPool, flags: persistent })
    fill(guest, 1)
    await guest.ask(put)
    await first.detach()
    const call = guest.post(get)
    guest.ring()
    const second = await attached(guest, { host })
    expect(await guest.answer(call)).toBe(1)
    expect(guest.page(frames.bounce)[0]).toBe(1)
    expect(second.counters).toMatchObject({ gets: 1 })
    expect(first.counters).toMatchObject({ gets: 0 })
  })

  test('is told when the guest has gone', async () => {
    const guest = await new FakeGuest().start()
    const link = await attached(guest)
    await guest.ask({ cmd: Command.NewPool, flags: persistent })
    guest.stop()
    await expect(link.ended).resolves.toBeUndefined()
  })

  test('leaves its pages to the next one in a file', async () => {
    const guest = await new FakeGuest().start()
    const options = { file: join(guest.folder, 'saved'), sizeBytes: '64KiB' }
    let saved = SavedPages.open(options)
    const first = await attached(guest, { saved })
    await guest.ask({ cmd: Command.NewPool, flags: persistent })
    for (const index of [0, 1, 2]) {
      fill(guest, 10 + index)
      expect(await guest.ask({ ...put, object: 5, index })).toBe(1)
    }
    await guest.ask({ cmd: Command.FlushPage, object: 5, index: 1 })
    fill(guest, 20)
    await guest.ask({ ...put, object: 5, index: 2 })
    await first.detach()
    saved.close()
    saved = SavedPages.open(options)
    expect(saved.pages).toBe(2)
    const host = hostOf(zcache({ limitBytes: 2 ** 22 }))
    const second = await attached(guest, { host, saved })
    expect(second.restoredPages).toBe(2)
    for (const [index, value] of [10, undefined, 20].entries()) {
      guest.page(frames.bounce).fill(0)
      expect(await guest.ask({ ...get, object: 5, index })).toBe(value === undefined ? 0 : 1)
      expect(guest.page(frames.bounce)[0]).toBe(value ?? 0)
    }
    await second.detach()
    saved.close({ remove: true })
  })

  test('refuses a page that the file has no room for, and holds none under its name', async () => {
    const guest = await new FakeGuest().start()
    const saved = SavedPages.open({ file: join(guest.folder, 'saved'), sizeBytes: 8192 })
    onTestFinished(() => saved.close())
    const link = await attached(guest, { saved })
    await guest.ask({ cmd: Command.NewPool, flags: persistent })
    const answers = []
    for (const index of [0, 1, 2, 3]) answers.push(await guest.ask({ ...put, index }))
    const kept = answers.filter((answer) => answer === 1).length
    expect(answers).toEqual([1, 1, ...answers.slice(2).map((answer) => (answer === 1 ? 1 : -12))])
    expect(kept).toBeLessThan(4)
    expect(await guest.ask({ ...get, index: 3 })).toBe(0)
    await link.detach()
  })
})

describe('what a guest may have written', () => {
  const head = frames.head * 4096
  test.each<readonly [what: string, spoil: (guest: FakeGuest) => void, line: string | undefined]>([
    ['lies at 4194304, outside of its memory', () => undefined, 'T00000400\n'],
    ['at 8192 has another mark', (guest) => guest.page(frames.head).fill(0), undefined],
    ['is of version 2, not 1', (guest) => guest.view.setUint32(head + 8, 2, true), undefined],
    ['has 4096 entries', (guest) => guest.view.setUint32(head + 12, 4096, true), undefined],
    ['has 65 entries', (guest) => guest.view.setUint32(head + 16, 65, true), undefined],
    ['has -1 entries', (guest) => guest.view.setInt32(head + 16, -1, true), undefined],
  ])('and is no ring, which %s', async (what, spoil, line) => {
    const guest = await new FakeGuest().start()
    const link = await attached(guest)
    const ended = link.ended.catch((error: unknown) => error)
    spoil(guest)
    await guest.connected()
    guest.ring(line)
    expect(await ended).toMatchObject({ code: 'TMEM_BROKEN', message: `the guest's ring ${what}` })
  })

  test('calls that make no sense are answered as Xen did', async () => {
    const guest = await new FakeGuest().start()
    await attached(guest)
    expect(await guest.ask(put)).toBe(-19)
    await guest.ask({ cmd: Command.NewPool, flags: persistent })
    expect(await guest.ask({ ...put, frame: 16 })).toBe(-14)
    expect(await guest.ask({ ...put, frame: 2 ** 40 })).toBe(-14)
    expect(await guest.ask({ cmd: 77 })).toBe(-38)
  })
})

describe('what is not there', () => {
  test('is told by its name', async () => {
    const guest = await new FakeGuest().start()
    await expect(attached(guest, { doorbell: '/nowhere/bell' })).rejects.toMatchObject({
      code: 'TMEM_IO',
      message: expect.stringMatching(/^no guest has its doorbell at \/nowhere\/bell: .*ENOENT/),
    })
    await expect(attached(guest, { memory: '/dev/null' })).rejects.toMatchObject({
      code: 'TMEM_IO',
      message: "the guest's memory /dev/null cannot be mapped: it is no file, or empty",
    })
    rmSync(guest.memory)
    await expect(attached(guest)).rejects.toMatchObject({ code: 'TMEM_IO' })
  })
})
