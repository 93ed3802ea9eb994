/**
 * A guest and a device: in two threads, over stores that wait, against the kernel's own header, and with a hostile
 * guest.
 */
import { execFileSync } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, rmSync, statSync, writeFileSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import { compose, type PageStore, PutOutcome } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { describe, expect, onTestFinished, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import {
  ChannelCommand,
  ChannelDevice,
  ChannelGuest,
  type ChannelHandle,
  type ChannelOptions,
  ChannelShape,
  createChannel,
  needsEvent,
} from '../src/index.ts'

const temporary = (): string => {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-virtio-'))
  onTestFinished(() => rmSync(folder, { recursive: true }))
  return folder
}

interface Made {
  readonly handle: ChannelHandle
  readonly device: ChannelDevice
  readonly guest: ChannelGuest
}

/** One that gets copies of the guest's pages, and one that gets the pages themselves. */
const stores = {
  zcache: (): PageStore => compose([zcache({ limitBytes: '4MiB' })], { check: 'model' }),
  memory: (): PageStore => compose([memory({ limitBytes: '4MiB' })]),
}
const kinds = Object.keys(stores) as (keyof typeof stores)[]

function made(options: ChannelOptions = {}, store: PageStore = stores.zcache()): Made {
  const handle = createChannel({ pages: 32, ...options })
  return { handle, device: new ChannelDevice(handle, store, 1), guest: new ChannelGuest(handle) }
}

/** Submits one entry, lets the device work, and answers its result. */
async function one(
  { device, guest }: Made,
  command: ChannelCommand,
  pool: number,
  object: number | bigint,
  index = 0,
  page = 0,
): Promise<number> {
  const ticket = guest.submit(command, pool, { objects: [object], indexes: [index], pages: [page] }, 0, 1)
  guest.notify()
  await device.poll()
  guest.wait()
  const result = guest.result(ticket, 0)
  guest.release(ticket)
  return result
}

describe('two threads', () => {
  test.each([
    { perKick: 512, pages: 2048, kicks: 4 },
    { perKick: 1, pages: 64, kicks: 64 },
    { perKick: 48, pages: 480, kicks: 10 },
    { perKick: 1, pages: 64, kicks: 64, looks: 0 },
    { perKick: 48, pages: 480, kicks: 10, looks: 0 },
  ])('$perKick pages per notification, looks: $looks', async ({ perKick, pages, kicks, looks = 2 ** 17 }) => {
    const handle = createChannel({ pages, looks })
    const start = <Said>(name: string): [Worker, Promise<Said>] => {
      const worker = new Worker(new URL(name, import.meta.url), {
        execArgv: [],
        workerData: { handle, pages, perKick },
      })
      const said = new Promise<Said>((resolve, reject) => {
        worker.once('message', resolve)
        worker.once('error', reject)
      })
      return [worker, said]
    }
    const [, counted] = start<Record<string, number>>('device-worker.mjs')
    const [, said] = start<Record<string, number>>('guest-worker.mjs')
    const answer = await said
    expect(answer).toMatchObject({ pool: 0, stored: pages, got: pages, same: pages, missed: pages })
    expect(answer['kicks']).toBeLessThanOrEqual(kicks)
    expect(answer['interrupts']).toBeLessThanOrEqual(kicks)
    // Puts, gets, flushes, gets, and the pool.
    expect(await counted).toMatchObject({ refused: 0, entries: 4 * pages + 1 })
  })
})

test('the ring is where the kernel looks for it', (ctx) => {
  requires(ctx, { commands: ['cc'], paths: ['/usr/include/linux/virtio_ring.h'] })
  const folder = temporary()
  const source = join(folder, 'ring.c')
  writeFileSync(
    source,
    `#include <stdio.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <linux/virtio_ring.h>
int main(void) {
  for (unsigned n = 2; n <= 32768; n *= 2) {
    char *p = aligned_alloc(4096, 4194304);
    struct vring r;
    vring_init(&r, n, p, 4);
    printf("%u %td %td %td %td %zu %zu %d %d\\n", n, (char *)r.avail - p, (char *)r.used - p, (char *)&vring_used_event(&r) - p,
      (char *)&vring_avail_event(&r) - p, offsetof(struct vring_desc, len), offsetof(struct vring_desc, next),
      vring_need_event(5, 7, 4), vring_need_event(65535, 3, 65530));
    free(p);
  }
  return 0;
}`,
  )
  execFileSync('cc', ['-w', '-o', join(folder, 'ring'), source])
  const lines = execFileSync(join(folder, 'ring'), { encoding: 'utf8' }).trim().split('\n')
  expect(lines.length).toBe(15)
  for (const line of lines) {
    const [n, ...numbers] = line.split(' ').map(Number)
    const shape = new ChannelShape({ queueSize: n!, chains: 1, pagesPerChain: 1, pages: 1 })
    const usedEvent = shape.availableAt + 4 + n! * 2
    const availableEvent = shape.usedAt + 4 + n! * 8
    const events = [needsEvent(5, 7, 4), needsEvent(65_535, 3, 65_530)].map(Number)
    expect(numbers).toEqual([shape.availableAt, shape.usedAt, usedEvent, availableEvent, 8, 14, ...events])
  }
})

test.each(kinds)('each command, and what it is refused with, over %s', async (kind) => {
  const channel = made({}, stores[kind]())
  const { guest } = channel
  for (let n = 0; n < 16; n++) expect(await one(channel, ChannelCommand.NewPool, 0, n & 1)).toBe(n)
  expect(await one(channel, ChannelCommand.NewPool, 0, 1)).toBe(-1)
  guest.page(3).fill(5).set([1])
  expect(await one(channel, ChannelCommand.Put, 1, 2n ** 191n, 2 ** 32 - 1, 3)).toBe(1)
  expect(await one(channel, ChannelCommand.Get, 1, 2n ** 191n, 2 ** 32 - 1, 4)).toBe(1)
  expect([...guest.page(4).subarray(0, 3)]).toEqual([1, 5, 5])
  expect(await one(channel, ChannelCommand.Get, 3, 2n ** 191n, 2 ** 32 - 1, 4)).toBe(0)
  for (const pool of [16, -1, 2 ** 31 - 1]) {
    expect(await one(channel, ChannelCommand.Put, pool, 1)).toBe(-PutOutcome.PoolGone)
    expect(await one(channel, ChannelCommand.Get, pool, 1)).toBe(-PutOutcome.PoolGone)
  }
  expect(await one(channel, ChannelCommand.Put, 1, 2n ** 192n - 1n)).toBe(-PutOutcome.Policy)
  expect(await one(channel, ChannelCommand.Get, 1, 2n ** 192n - 1n)).toBe(0)
  expect(await one(channel, ChannelCommand.FlushObject, 1, 2n ** 191n)).toBe(1)
  expect(await one(channel, ChannelCommand.Get, 1, 2n ** 191n, 2 ** 32 - 1, 4)).toBe(0)
  expect(await one(channel, ChannelCommand.DestroyPool, 1, 0)).toBe(1)
  expect(await one(channel, ChannelCommand.Put, 1, 1)).toBe(-PutOutcome.PoolGone)
  expect(await one(channel, ChannelCommand.NewPool, 0, 1)).toBe(1)
})

test('a queue that is full says so, and goes on', async () => {
  const { guest, device } = made({ queueSize: 8, chains: 4 })
  const entries = { objects: [1], indexes: [0], pages: [0] }
  const tickets = [0, 1, 2].map(() => guest.submit(ChannelCommand.NewPool, 0, entries, 0, 1))
  expect(tickets).toEqual([0, 1, 2])
  // Three descriptors are needed for a page, and two are left.
  expect(guest.submit(ChannelCommand.Put, 0, entries, 0, 1)).toBe(-1)
  expect(() => guest.result(0, 0)).toThrow('chain 0 has no result 0')
  expect(() => guest.release(0)).toThrow('is not done')
  guest.notify()
  await device.poll()
  guest.wait()
  for (const ticket of tickets) guest.release(ticket)
  // More chains than the indexes of the ring count.
  for (let n = 0; n < 70_000; n++) {
    const ticket = guest.submit(ChannelCommand.FlushPage, 0, entries, 0, 1)
    guest.notify()
    await device.poll()
    guest.wait()
    guest.release(ticket)
  }
  expect(device.counters).toMatchObject({ chains: 70_003, refused: 0 })
})

test.each(kinds)('several pools in a chain, the same page twice, a device that is awake: %s', async (kind) => {
  const channel = made({ pagesPerChain: 8 }, stores[kind]())
  const { guest, device } = channel
  const [a, b] = [await one(channel, ChannelCommand.NewPool, 0, 1), await one(channel, ChannelCommand.NewPool, 0, 1)]
  const all = async (
    command: ChannelCommand,
    pools: readonly number[],
    pages: readonly number[],
  ): Promise<number[]> => {
    const entries = { objects: pools.map(() => 5), indexes: pools.map((_, n) => n % 3), pages }
    const ticket = guest.submit(command, a!, entries, 0, pools.length)
    // Each entry has a pool of its own: the guest of this package names one for all.
    const view = new DataView(channel.handle.memory)
    const { headersAt, headerStride } = new ChannelShape(channel.handle)
    for (const [n, pool] of pools.entries()) view.setInt32(headersAt + ticket * headerStride + 8 + n * 32, pool, true)
    expect(await device.poll()).toBe(1)
    guest.wait()
    const results = pools.map((_, n) => guest.result(ticket, n))
    guest.release(ticket)
    return results
  }
  const pools = [a, a, b, 9, b, a, a]
  for (let n = 0; n < 7; n++)
    guest
      .page(n)
      .fill(n + 1)
      .set([99])
  expect(await all(ChannelCommand.Put, pools, [0, 1, 2, 3, 4, 5, 6])).toEqual([1, 1, 1, -PutOutcome.PoolGone, 1, 1, 1])
  // Handles repeat after three entries: in pool a entry 6 has replaced entry 0.
  expect(await all(ChannelCommand.Get, pools, [10, 11, 12, 13, 14, 15, 16])).toEqual([
    1,
    1,
    1,
    -PutOutcome.PoolGone,
    1,
    1,
    1,
  ])
  expect([10, 11, 12, 14, 15, 16].map((n) => guest.page(n)[9])).toEqual([7, 2, 3, 5, 6, 7])
  expect(await all(ChannelCommand.FlushPage, [a, b], [])).toEqual([1, 1])
  expect(await all(ChannelCommand.Get, [a, b, b, a], [10, 11, 12, 13])).toEqual([0, 0, 1, 0])
})

/** Words that do not shrink. */
function noise(seed: number): Uint8Array {
  let state = seed * 2_654_435_761 + 1
  const words = Uint32Array.from({ length: 1024 }, () => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return state
  })
  return new Uint8Array(words.buffer)
}

describe('pages that lie on a disk', () => {
  const count = 256
  const numbers = Array.from({ length: count }, (_, n) => n)

  /**
   * A channel to a store whose pages are mostly in a file; `all` does a command with each page, and answers the
   * results.
   */
  async function onDisk(): Promise<Made & { file: string; all: (command: ChannelCommand) => Promise<number[]> }> {
    const file = join(temporary(), 'swap')
    const store = compose([zcache({ limitBytes: '256KiB' }), frontswap({ file, sizeBytes: '4MiB' })])
    onTestFinished(() => store.close())
    await store.ready?.()
    const handle = createChannel({ pages: count })
    const device = new ChannelDevice(handle, store, 1)
    const guest = new ChannelGuest(handle)
    const pool = await one({ handle, device, guest }, ChannelCommand.NewPool, 0, 1)
    const entries = { objects: numbers.map(() => 1), indexes: numbers, pages: numbers }
    const all = async (command: ChannelCommand): Promise<number[]> => {
      const tickets = numbers.filter((n) => n % 16 === 0).map((from) => guest.submit(command, pool, entries, from, 16))
      guest.notify()
      await device.poll()
      guest.wait()
      const results = numbers.map((n) => guest.result(tickets[Math.floor(n / 16)]!, n % 16))
      for (const ticket of tickets) guest.release(ticket)
      return results
    }
    for (const n of numbers) guest.page(n).set(noise(n))
    expect(await all(ChannelCommand.Put)).toEqual(numbers.map(() => 1))
    for (const n of numbers) guest.page(n).fill(0)
    return { handle, device, guest, file, all }
  }

  test('are waited for, with those that come after', async () => {
    const { guest, all } = await onDisk()
    expect(await all(ChannelCommand.Get)).toEqual(numbers.map(() => 1))
    for (const n of numbers) expect(Buffer.compare(guest.page(n), noise(n))).toBe(0)
  })

  test('and cannot be had are no misses, and do not end the device', async () => {
    const { guest, device, file, all } = await onDisk()
    const swap = openSync(file, 'r+')
    writeSync(swap, Buffer.alloc(statSync(file).size - 4096, 0x5a), 0, undefined, 4096)
    closeSync(swap)
    const results = await all(ChannelCommand.Get)
    const isHad = results.map((result) => result === 1)
    expect(results).toEqual(isHad.map((had) => (had ? 1 : -PutOutcome.Unavailable)))
    expect(isHad.filter(Boolean).length).toBeGreaterThan(0)
    expect(isHad.filter(Boolean).length).toBeLessThan(count)
    // The guest's pages are what they were.
    const wanted = numbers.map((n) => (isHad[n] === true ? noise(n) : new Uint8Array(4096)))
    expect(numbers.filter((n) => Buffer.compare(guest.page(n), wanted[n]!) !== 0)).toEqual([])
    expect(await all(ChannelCommand.FlushPage)).toEqual(numbers.map(() => 1))
    expect(await all(ChannelCommand.Get)).toEqual(numbers.map(() => 0))
    expect(device.counters.refused).toBe(0)
  })
})

describe('a hostile guest', () => {
  const shapeOf = (handle: ChannelHandle): [ChannelShape, DataView] => [
    new ChannelShape(handle),
    new DataView(handle.memory),
  ]

  test.each([
    { name: 'a loop', change: (view: DataView) => view.setUint16(14, 0, true) },
    { name: 'a descriptor beyond the table', change: (view: DataView) => view.setUint16(14, 60_000, true) },
    { name: 'a header outside', change: (view: DataView) => view.setUint32(4, 1, true) },
    { name: 'a header past the end', change: (view: DataView) => view.setUint32(0, 0xffffffff, true) },
    { name: 'a header too long', change: (view: DataView) => view.setUint32(8, 0x7fffffff, true) },
    { name: 'a header to write to', change: (view: DataView) => view.setUint16(12, 3, true) },
    { name: 'an indirect descriptor', change: (view: DataView) => view.setUint16(12, 5, true) },
    { name: 'half a page', change: (view: DataView) => view.setUint32(16 + 8, 2048, true) },
    { name: 'a page to write to', change: (view: DataView) => view.setUint16(16 + 12, 3, true) },
    { name: 'a chain without results', change: (view: DataView) => view.setUint16(12, 0, true) },
    { name: 'results to read from', change: (view: DataView) => view.setUint16(32 + 12, 0, true) },
    { name: 'room for other results', change: (view: DataView) => view.setUint32(32 + 8, 8, true) },
  ])('$name: refused, with nothing written', async ({ change }) => {
    const channel = made()
    const { handle, guest, device } = channel
    const ticket = guest.submit(ChannelCommand.Put, 0, { objects: [1], indexes: [0], pages: [0] }, 0, 1)
    const [, view] = shapeOf(handle)
    change(view)
    guest.notify()
    expect(await device.poll()).toBe(1)
    guest.wait()
    expect(() => guest.result(ticket, 0)).toThrow('it was refused')
    guest.release(ticket)
    expect(device.counters).toMatchObject({ chains: 0, refused: 1 })
    // And the device goes on.
    expect(await one(channel, ChannelCommand.NewPool, 0, 1)).toBe(0)
  })

  test('an index that jumps stops the device, and the guest is told', async () => {
    const { handle, guest, device } = made()
    const [shape, view] = shapeOf(handle)
    guest.submit(ChannelCommand.NewPool, 0, { objects: [1], indexes: [0], pages: [0] }, 0, 1)
    guest.notify()
    view.setUint16(shape.availableAt + 2, 2000, true)
    expect(await device.poll()).toBe(0)
    expect(() => guest.wait()).toThrow('it needs a reset')
    await device.serve()
  })

  test.each(kinds)('whatever it writes, the device answers or stops, others keep their pages: %s', async (kind) => {
    for (let seed = 1; seed <= 40; seed++) {
      let state = seed * 7919
      const any = (below: number): number => {
        state ^= state << 13
        state ^= state >>> 17
        state ^= state << 5
        return (state >>> 0) % below
      }
      const store = stores[kind]()
      const other = store.newPool({ client: 2, persistent: true, shared: false, pageSize: 4096 })
      if (typeof other === 'number') throw new Error('no pool')
      const secret = new Uint8Array(4096).fill(0x5e).fill(1, 0, 8)
      for (let n = 0; n < 4; n++) other.put(n, 0, secret)
      const handle = createChannel({ queueSize: 16, chains: 8, pagesPerChain: 4, pages: 4 })
      const device = new ChannelDevice(handle, store, 1)
      const [shape, view] = shapeOf(handle)
      const bytes = new Uint8Array(handle.memory)
      for (let turn = 0; turn < 200; turn++) {
        const guest = new ChannelGuest(handle)
        const command = [1, 4, 4, 5, 6, 7, 2][any(7)] as ChannelCommand
        const count = 1 + any(4)
        const entries = { objects: [any(3), 1, 2, 3], indexes: [0, 1, 2, 3], pages: [0, 1, 2, 3] }
        guest.submit(command, any(3), entries, 0, count)
        const changes = any(4)
        for (let n = 0; n < changes; n++)
          view.setUint16(any(shape.pagesAt / 2) * 2, [any(65_536), any(20), 0xffff][any(3)]!, true)
        // The device's own index, so that it looks at what was written.
        const at = shape.availableAt + 2
        view.setUint16(at, (view.getUint16(shape.usedAt + 2, true) + (any(30) === 0 ? any(65_536) : 1)) & 0xffff, true)
        await device.poll()
        const seen = Buffer.from(bytes.buffer).includes(Buffer.alloc(32, 0x5e))
        if (seen) throw new Error(`seed ${seed}, turn ${turn}: a page of another client`)
      }
      const into = new Uint8Array(4096)
      for (let n = 0; n < 4; n++) {
        other.get(n, 0, into)
        expect(Buffer.compare(into, secret)).toBe(0)
      }
      store.check?.()
      device.close()
      await store.close()
    }
  })
})

test.each(kinds)('pages that change while they are put and got: %s', async (kind) => {
  const store = stores[kind]()
  const channel = made({ pages: 32, pagesPerChain: 16 }, store)
  const { handle, guest, device } = channel
  const { pagesAt } = new ChannelShape(handle)
  const pool = await one(channel, ChannelCommand.NewPool, 0, 1)
  const stop = new Int32Array(new SharedArrayBuffer(4))
  // The other processor of the guest: each page is of one byte, and now and then of another one.
  const writer = new Worker(
    `const { memory, pagesAt, stop } = require('node:worker_threads').workerData
     const bytes = new Uint8Array(memory, pagesAt, 16 * 4096)
     for (let n = 0; Atomics.load(stop, 0) === 0; n++) bytes.fill(0xa0 + (n & 7))`,
    { eval: true, execArgv: [], workerData: { memory: handle.memory, pagesAt, stop } },
  )
  try {
    await new Promise((resolve) => writer.once('online', resolve))
    const numbers = Array.from({ length: 16 }, (_, n) => n)
    const act = async (command: ChannelCommand, pages: readonly number[]): Promise<void> => {
      const ticket = guest.submit(command, pool, { objects: numbers, indexes: numbers, pages }, 0, 16)
      guest.notify()
      await device.poll()
      guest.wait()
      expect(numbers.map((n) => guest.result(ticket, n))).toEqual(numbers.map(() => 1))
      guest.release(ticket)
    }
    let mixed = 0
    for (let round = 0; round < 500 || (mixed === 0 && round < 20_000); round++) {
      await act(ChannelCommand.Put, numbers)
      // Into a page that is written to meanwhile, and into one that is not.
      await act(ChannelCommand.Get, numbers)
      await act(
        ChannelCommand.Get,
        numbers.map((n) => 16 + n),
      )
      for (const n of numbers) {
        const page = guest.page(16 + n)
        if (page.some((byte) => byte !== 0 && byte >>> 3 !== 0xa0 >>> 3)) throw new Error('bytes that nobody wrote')
        if (page.some((byte) => byte !== page[0])) mixed++
      }
    }
    // Else nothing has changed while it was put.
    expect(mixed).toBeGreaterThan(0)
    store.check?.()
    expect(device.counters.refused).toBe(0)
  } finally {
    Atomics.store(stop, 0, 1)
    await writer.terminate()
    device.close()
    await store.close()
  }
})

test('shapes that make no sense, and ends', async () => {
  expect(() => createChannel({ queueSize: 3 })).toThrow('a power of two')
  expect(() => createChannel({ pagesPerChain: 513 })).toThrow('from 1 to 512')
  expect(() => createChannel({ chains: 2000 })).toThrow('from 1 to 1024')
  expect(() => createChannel({ looks: -1 })).toThrow('looks must be from 0 to 16777216, got -1')
  expect(() => createChannel({ page: 1 } as never)).toThrow('createChannel has no option page')
  const { handle, guest, device } = made()
  expect(() => new ChannelGuest({ ...handle, pages: 2 ** 18 })).toThrow('a channel of that shape has')
  expect(() => guest.page(32)).toThrow('none of the 32')
  expect(() => guest.submit(ChannelCommand.Put, 0, { objects: [], indexes: [], pages: [] }, 0, 17)).toThrow('1 to 16')
  guest.submit(ChannelCommand.NewPool, 0, { objects: [1], indexes: [0], pages: [0] }, 0, 1)
  device.close()
  expect(() => guest.wait()).toThrow('the channel is closed')
  await device.serve()
})
