/** Saved streams of both generations: there and back, cut everywhere, wrong everywhere, and what the original did. */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  Command,
  type DescribedRecord,
  describeStream,
  Errno,
  endSave,
  type Release,
  restoreDomain,
  saveDomain,
  saveFlushed,
  type XenHost,
} from '../src/index.ts'
import { flags, Guest, world } from './guest.ts'

const generations = (['4.0.0', '4.0', '4.5', '4.8', '4.9'] as const).map((release) => ({ release }))

async function bytesOf(stream: AsyncIterable<Uint8Array>): Promise<Uint8Array> {
  const pieces: Uint8Array[] = []
  for await (const piece of stream) pieces.push(piece)
  return Buffer.concat(pieces)
}

function* cut(bytes: Uint8Array, size: number): Generator<Uint8Array> {
  for (let at = 0; at < bytes.length; at += size) yield bytes.subarray(at, at + size)
}

/** A domain 1 with a persistent pool in slots 0 and 2, an ephemeral one in slot 1. */
function source(
  release: Release,
  pages: number,
  defects: 'mended' | 'original' = 'mended',
): { host: XenHost; guest: Guest } {
  const { host } = world({ release, defects })
  const guest = new Guest(host, 1)
  const version = release === '4.0.0' ? 0 : 0x01000000
  guest.newPool(version | 1)
  guest.newPool(version)
  guest.newPool(version | 1)
  for (let n = 0; n < pages; n++) guest.put(0, BigInt(n % 3), n, n + 1)
  guest.put(1, 1n, 1, 99)
  guest.put(2, release === '4.0.0' ? 2n ** 63n : 2n ** 190n + 1n, 2 ** 32 - 1, 77)
  return { host, guest }
}

function target(release: Release, defects: 'mended' | 'original' = 'mended'): { host: XenHost; guest: Guest } {
  const { host } = world({ release, defects })
  return { host, guest: new Guest(host, 7) }
}

const contents = (guest: Guest, pages: number): number[] =>
  Array.from({ length: pages }, (_, n) => guest.get(0, BigInt(n % 3), n))

const pagesIn = (host: XenHost, id: number): number =>
  host.clients.get(id)?.slots.reduce((sum, pool) => sum + (pool === undefined ? 0 : pool.pool.census!().pages), 0) ?? 0

describe.each(generations)('$release', ({ release }) => {
  const wide = release === '4.0.0' ? 2n ** 63n : 2n ** 190n + 1n

  test('a domain comes back as it was, whatever pieces its stream comes in', async () => {
    const { host, guest } = source(release, 5)
    host.setWeight(host.clients.get(1)!, 250)
    host.clients.get(1)!.compress = false
    const stream = await bytesOf(saveDomain(host, 1))
    // Saved it is frozen, and not changed otherwise.
    expect(guest.put(0, 9n, 9, 9)).toBe(-Errno.EFROZEN)
    endSave(host, 1)
    expect(guest.put(0, 9n, 9, 9)).toBe(1)
    for (const size of [1, 7, 4096, stream.length]) {
      const { host: other, guest: restored } = target(release)
      expect(await restoreDomain(other, 7, cut(stream, size))).toEqual({ pools: 3, pages: 6, flushed: 0 })
      expect(contents(restored, 5)).toEqual([1, 2, 3, 4, 5])
      expect(restored.get(2, wide, 2 ** 32 - 1)).toBe(77)
      // Ephemeral pools come back empty.
      expect(restored.get(1, 1n, 1)).toBe(-Errno.EEMPTY)
      const client = other.clients.get(7)!
      expect([client.weight, client.compress, client.isFrozen]).toEqual([250, false, false])
      expect(restored.put(0, 9n, 9, 9)).toBe(1)
    }
  })

  test('cut at any byte, it restores nothing, or whole pages, and says so', async () => {
    const { host } = source(release, 1)
    const stream = await bytesOf(saveDomain(host, 1, true))
    const whole = Buffer.concat([stream, await bytesOf(saveFlushed(host, 1))])
    const { host: other } = target(release)
    let most = 0
    for (let length = 0; length < whole.length; length++) {
      // In the middle of a page every hundredth byte will do.
      if (length > 300 && length < stream.length - 4400 && length % 100 !== 0) continue
      if (other.clients.has(7)) other.killDomain(7)
      if (!other.hasDomain(7)) new Guest(other, 7, 64, 4)
      const error = await restoreDomain(other, 7, [whole.subarray(0, length)], true).then(
        () => undefined,
        (reason: Error) => reason,
      )
      const pages = pagesIn(other, 7)
      expect(error?.message).toMatch(/^the saved stream (ends|is empty)/)
      expect(error?.message).toContain(`${pages} pages in `)
      expect(pages).toBeGreaterThanOrEqual(most)
      most = pages
    }
    expect(most).toBe(2)
  })

  test('whatever it is, it is read or refused with one clear error', async () => {
    const { host } = source(release, 2)
    const stream = await bytesOf(saveDomain(host, 1))
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.tuple(fc.nat(600), fc.nat(255)), { minLength: 1, maxLength: 4 }),
        fc.boolean(),
        async (changes, isAtEnd) => {
          const bytes = stream.slice()
          for (const [at, value] of changes) bytes[isAtEnd ? bytes.length - 1 - at : at] = value
          const { host: other } = target(release)
          const error = await restoreDomain(other, 7, [bytes]).then(
            () => undefined,
            (reason: Error & { code?: string }) => reason,
          )
          expect(error === undefined || /^TMEM_(CORRUPT|IO)$/.test(error.code ?? error.stack ?? '')).toBe(true)
          expect(pagesIn(other, 7)).toBeLessThanOrEqual(3)
          other.close()
        },
      ),
      { numRuns: 60, seed: 17 },
    )
  })

  test('while it moves, pages that go are told of', async () => {
    const { host, guest } = source(release, 6)
    const stream = await bytesOf(saveDomain(host, 1, true))
    expect(guest.page(Command.FlushPage, 0, 0n, 0)).toBe(-Errno.EFROZEN)
    expect(guest.put(0, 1n, 1, 50)).toBe(-Errno.ENOSPC)
    expect(guest.page(Command.FlushObject, 0, 2n, 0)).toBe(-Errno.EFROZEN)
    expect(guest.page(Command.FlushPage, 0, 0n, 0)).toBe(-Errno.EFROZEN)
    expect(guest.destroyPool(2)).toBe(1)
    const flushed = await bytesOf(saveFlushed(host, 1))
    endSave(host, 1)
    const { host: other, guest: moved } = target(release)
    expect(await restoreDomain(other, 7, [stream, flushed], true)).toEqual({ pools: 3, pages: 7, flushed: 5 })
    expect(contents(moved, 6)).toEqual([0, 0, 0, 4, 5, 0])
    expect(moved.get(2, wide, 2 ** 32 - 1)).toBe(-Errno.EEMPTY)
  })
})

describe.each(generations)('$release in words', ({ release }) => {
  /** A stream of a domain that has moved, and one that was saved. */
  async function moved(): Promise<Uint8Array> {
    const { host, guest } = source(release, 4)
    host.setWeight(host.clients.get(1)!, 250)
    const stream = await bytesOf(saveDomain(host, 1, true))
    guest.page(Command.FlushPage, 0, 1n, 1)
    return Buffer.concat([stream, await bytesOf(saveFlushed(host, 1))])
  }
  const all = async (stream: AsyncIterable<DescribedRecord>): Promise<DescribedRecord[]> => {
    const records: DescribedRecord[] = []
    for await (const record of stream) records.push(record)
    return records
  }

  test('each record, one after the other, of the generation that the head has', async () => {
    const stream = await moved()
    const records = await all(describeStream(cut(stream, 1000)))
    const names = 'head,pool,page,page,page,page,pool,pool,page,end of pools,flushed pages,flushed,end of flushed pages'
    expect(records.map(({ name }) => name)).toEqual(names.split(','))
    // Nothing is left out between them.
    let at = 0
    for (const record of records) {
      expect(record.at).toBe(at)
      at += record.bytes
    }
    expect(at).toBe(stream.length)
    const words = records.map((record) => record.words)
    const isNew = release === '4.8' || release === '4.9'
    const generation = isNew ? '4.8 and later' : release === '4.0.0' ? '4.0.0' : '4.0 to 4.7'
    expect(words[0]).toMatch(new RegExp(`^Xen ${generation}: version .*, weight 250`))
    expect(words[0]).toContain(isNew ? '3 of up to 16 pools' : 'up to 16 pools')
    expect(words[1]).toMatch(/^pool 0: persistent, private, .*; up to 4 pages$/)
    expect(words.slice(2, 6).toSorted()).toEqual(
      [0, 1, 2, 3].map((n) => `pool 0, object ${n % 3}, index ${n}`).toSorted(),
    )
    expect(words[8]).toBe(`pool 2, object ${release === '4.0.0' ? 2n ** 63n : 2n ** 190n + 1n}, index 4294967295`)
    expect(words.at(-2)).toBe('pool 0, object 1, index 1')
    expect(await all(describeStream([stream], release))).toEqual(records)
  })

  test('cut anywhere: what is whole is told, and where it ends', async () => {
    const stream = await moved()
    const whole = await all(describeStream([stream]))
    const ends = whole.map((record) => record.at + record.bytes)
    for (let length = 1; length < stream.length; length += length < 200 || length > stream.length - 200 ? 1 : 997) {
      const told: DescribedRecord[] = []
      const error = await (async () => {
        for await (const record of describeStream([stream.subarray(0, length)])) told.push(record)
      })().then(
        () => undefined,
        (reason: Error) => reason,
      )
      expect(told).toEqual(whole.filter((_, n) => ends[n]! <= length))
      // Behind its pools it may end.
      const isEnd = length === whole.find(({ name }) => name === 'flushed pages')!.at
      expect(error?.message ?? 'none').toMatch(isEnd ? /^none$/ : /^the saved stream ends in .* \(byte \d+\)$/)
    }
  })

  test('of another generation it is refused before anything is done', async () => {
    const stream = await moved()
    const other = release === '4.8' || release === '4.9' ? '4.5' : '4.9'
    await expect(all(describeStream([stream], other))).rejects.toThrow(
      /is of Xen 4\.[78] or (earlier|later), not of 4\./,
    )
    const { host } = target(other)
    await expect(restoreDomain(host, 7, [stream])).rejects.toThrow('0 pages in 0 pools of domain 7 are restored')
    expect(host.clients.has(7)).toBe(false)
  })
})

test('all ones name no object in 4.0.0 either: such a page would end its pool in a stream', async () => {
  const { host, guest } = source('4.0.0', 2)
  expect(guest.put(0, 2n ** 64n - 1n, 1, 5)).toBe(-Errno.ENOMEM)
  expect(guest.get(0, 2n ** 64n - 1n, 1)).toBe(0)
  const stream = await bytesOf(saveDomain(host, 1))
  expect(await restoreDomain(target('4.0.0').host, 7, [stream])).toEqual({ pools: 3, pages: 3, flushed: 0 })
})

test('nothing to save writes nothing, and restores nothing', async () => {
  const { host } = world()
  new Guest(host, 1)
  const stream = await bytesOf(saveDomain(host, 1))
  expect(stream.length).toBe(0)
  expect(await restoreDomain(host, 1, [stream])).toEqual({ pools: 0, pages: 0, flushed: 0 })
  await expect(restoreDomain(host, 1, [stream], true)).rejects.toThrow('is empty')
})

test('the bytes of both generations', async () => {
  const make = (release: Release): XenHost => {
    const { host } = world({ release })
    const guest = new Guest(host, 1)
    guest.newPool(flags.persistent)
    guest.put(0, 5n, 9, 1)
    host.setWeight(host.clients.get(1)!, 3)
    return host
  }
  const text = async (release: Release): Promise<string> => {
    const stream = Buffer.from(await bytesOf(saveDomain(make(release), 1)))
    const page = stream.indexOf(Buffer.alloc(64, 1))
    return `${stream.subarray(0, page).toString('hex')} ${stream.subarray(page + 4096).toString('hex')}`
  }
  const handle = `0500000000000000${'00'.repeat(16)}09000000`
  expect(await text('4.5')).toBe(
    `fbffffff0100000010000000ffffffff010000000300000000000000ffffffff000000000100000101000000${'00'.repeat(16)}${handle} ffffffff`,
  )
  expect(await text('4.9')).toBe(
    `fbffffff010000001000000001000000` +
      `0300000003000000ffffffff01000001000000000100000000000000${'00'.repeat(16)}${handle} ffffffff`,
  )
})

test('a client that was frozen before is frozen again, after its pages have come', async () => {
  const { host } = source('4.5', 2)
  host.freeze(host.clients.get(1)!, true)
  const stream = await bytesOf(saveDomain(host, 1))
  const { host: other, guest } = target('4.5')
  await restoreDomain(other, 7, [stream])
  expect(other.clients.get(7)!.isFrozen).toBe(true)
  expect(contents(guest, 2)).toEqual([1, 2])
})

test('a domain that has a client is left alone', async () => {
  const { host } = source('4.9', 2)
  const stream = await bytesOf(saveDomain(host, 1))
  await expect(restoreDomain(host, 1, [stream])).rejects.toThrow('RESTORE_BEGIN of domain 1 was answered -17')
  await expect(restoreDomain(host, 5, [stream])).rejects.toThrow('RESTORE_BEGIN of domain 5 was answered -12')
})

describe('as the original', () => {
  test('one page per pool is lost, and pools of one page', async () => {
    const { host } = source('4.5', 5, 'original')
    const stream = await bytesOf(saveDomain(host, 1))
    const { host: other } = target('4.5', 'original')
    expect(await restoreDomain(other, 7, [stream])).toEqual({ pools: 3, pages: 4, flushed: 0 })
  })

  test('a second save goes on where the first has ended', async () => {
    const { host } = source('4.5', 5, 'original')
    await bytesOf(saveDomain(host, 1))
    endSave(host, 1)
    const stream = await bytesOf(saveDomain(host, 1))
    expect((await restoreDomain(target('4.5').host, 7, [stream])).pages).toBe(0)
  })

  test('weight and cap become 0', async () => {
    const { host } = source('4.5', 5)
    host.setWeight(host.clients.get(1)!, 250)
    const stream = await bytesOf(saveDomain(host, 1))
    const { host: other } = target('4.5', 'original')
    await restoreDomain(other, 7, [stream])
    expect(other.clients.get(7)!.weight).toBe(0)
  })

  test('who was frozen before cannot be restored', async () => {
    const { host } = source('4.5', 5)
    host.freeze(host.clients.get(1)!, true)
    const stream = await bytesOf(saveDomain(host, 1))
    const { host: other } = target('4.5', 'original')
    await expect(restoreDomain(other, 7, [stream])).rejects.toThrow('was answered -1000; 0 pages in 1 pools')
  })

  test('pages kept as they are cannot be saved from 4.4 on', async () => {
    for (const [release, pages] of [
      ['4.3', 4],
      ['4.4', 0],
    ] as const) {
      const { host } = source(release, 5, 'original')
      host.clients.get(1)!.compress = false
      const stream = await bytesOf(saveDomain(host, 1))
      expect((await restoreDomain(target(release).host, 7, [stream])).pages).toBe(pages)
    }
  })

  test('4.0 tells flags without the version, so that no pool is restored', async () => {
    const { host } = source('4.0', 5, 'original')
    const stream = await bytesOf(saveDomain(host, 1))
    await expect(restoreDomain(target('4.0').host, 7, [stream])).rejects.toThrow(
      'RESTORE_NEW of pool 0 was answered -1',
    )
  })

  test('libxc of 4.8 restored zeros, of 4.9 nothing', async () => {
    const { host } = source('4.8', 2)
    const stream = await bytesOf(saveDomain(host, 1))
    const { host: other, guest } = target('4.8', 'original')
    await expect(restoreDomain(other, 7, [stream])).rejects.toThrow('has 0xffffffff for the mark of flushed pages')
    expect(contents(guest, 2)).toEqual([0, 0])
    expect(guest.page(Command.GetPage, 0, 0n, 0)).toBe(1)
    const later = source('4.9', 2)
    const second = await bytesOf(saveDomain(later.host, 1))
    await expect(restoreDomain(target('4.9', 'original').host, 7, [second])).rejects.toThrow(
      'SET_POOLS of pool 0 was answered -1',
    )
  })

  test('a pool that is destroyed meanwhile keeps its pages, where nobody reaches them', async () => {
    const kept = async (defects: 'mended' | 'original'): Promise<number | undefined> => {
      const { host, guest } = source('4.9', 5, defects)
      const { pool } = host.clients.get(1)!.slots[0]!
      await bytesOf(saveDomain(host, 1, true))
      expect(guest.destroyPool(0)).toBe(1)
      return pool.census?.().pages
    }
    expect([await kept('mended'), await kept('original')]).toEqual([0, 5])
  })
})
