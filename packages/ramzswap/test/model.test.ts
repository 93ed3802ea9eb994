/** Devices against a plain buffer: what is read is what was written, whatever the stores did meanwhile. */

import { zcache } from '@tmem/zcache'
import * as fc from 'fast-check'
import { expect, test } from 'vitest'
import { ramzswap, virtswap } from '../src/index.ts'
import {
  backingFile,
  bytesOf,
  codeOf,
  compressed,
  expectBytes,
  expectSums,
  type Kind,
  room,
  same,
  section,
  systemError,
} from './subject.ts'

const pages = 24
const sectors = pages * 8

const range = fc.tuple(
  fc.nat(sectors - 1),
  fc.oneof(fc.integer({ min: 1, max: 20 }), fc.constant(sectors)),
  fc.boolean(),
)
const kind = fc.constantFrom<Kind>('zero', 'word', 'text', 'third', 'half', 'noise', 'noise')
const operation = fc.oneof(
  { weight: 8, arbitrary: fc.record({ do: fc.constant('write' as const), range, kind, seed: fc.nat(999) }) },
  { weight: 4, arbitrary: fc.record({ do: fc.constant('read' as const), range }) },
  { weight: 2, arbitrary: fc.record({ do: fc.constantFrom('discard' as const, 'zero' as const), range }) },
  {
    weight: 1,
    arbitrary: fc.record({ do: fc.constant('resize' as const), pages: fc.integer({ min: 1, max: pages }) }),
  },
  {
    weight: 2,
    arbitrary: fc.record({
      do: fc.constantFrom('tick', 'idle', 'recompress', 'recall', 'compress-limit'),
      amount: fc.nat(20),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      do: fc.constant('writeback' as const),
      kind: fc.constantFrom('huge', 'idle', 'huge_idle', 'incompressible'),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({ do: fc.constant('fail' as const), code: fc.constantFrom(undefined, 'ENOSPC', 'EIO') }),
  },
)

/** A range of sectors, mostly in whole pages, inside of the size. */
function within([first, count, whole]: readonly [number, number, boolean], size: number): [at: number, length: number] {
  const unit = whole ? 4096 : 512
  const at = Math.floor(((first * 512) % size) / unit) * unit
  return [at, Math.min(size - at, Math.max(unit, Math.floor((count * 512) / unit) * unit))]
}

const kinds = {
  'with a backing file': () => {
    const { layers, file } = backingFile(pages)
    return { file, device: ramzswap({ ...base(), stack: [...compressed(), ...layers] }) }
  },
  'with a tiny memlimit': () => {
    const { layers, file } = backingFile(pages)
    return { file, device: ramzswap({ ...base(), memlimitBytes: 6000, stack: [...compressed(), ...layers] }) }
  },
  'with every kind of place': () => {
    const { layers, file } = backingFile(pages)
    const stack = [...room(3), zcache({ limitBytes: 2 ** 18, recompress: 'deflate' }), ...room(3), ...layers]
    return { file, device: virtswap({ ...base(), stack }) }
  },
  'whose memory is small': () => {
    const { layers, file } = backingFile(pages)
    return { file, device: ramzswap({ ...base(), stack: [...room(4), ...layers] }) }
  },
  'in memory alone': () => ({
    file: undefined,
    device: ramzswap({ ...base(), stack: [...compressed(), ...room(pages)] }),
  }),
}

const base = () => ({ name: 'dev', sizeBytes: pages * 4096, check: 'model' as const })

test.each(Object.keys(kinds))(
  'a device %s holds what a buffer holds',
  async (name) => {
    await fc.assert(
      fc.asyncProperty(fc.array(operation, { minLength: 1, maxLength: 40 }), async (operations) => {
        const { device, file } = kinds[name as keyof typeof kinds]()
        const wanted = new Uint8Array(pages * 4096)
        const got = new Uint8Array(pages * 4096)
        // A page whose write failed holds the old bytes or the new ones, or is lost on a full device: looks which, and
        // goes on with that.
        const adopt = async (at: number, length: number, bytes: Uint8Array): Promise<void> => {
          for (let from = at; from < at + length; ) {
            const to = Math.min(at + length, (Math.floor(from / 4096) + 1) * 4096)
            const start = Math.floor(from / 4096) * 4096
            const page = got.subarray(0, 4096)
            if ((await codeOf(() => device.read(start, page))) === 'none') {
              const old = wanted.slice(start, start + 4096)
              const fresh = old.slice()
              fresh.set(bytes.subarray(from - at, to - at), from - start)
              same(Buffer.compare(page, old) === 0 || Buffer.compare(page, fresh) === 0, true)
              wanted.set(page, start)
            } else {
              same(section(device.stats(), 'slots')['lost']! > 0, true)
              await device.discard(start, 4096)
              wanted.fill(0, start, start + 4096)
            }
            from = to
          }
        }
        let failing = false
        for (const step of operations) {
          const size = device.sizeBytes
          switch (step.do) {
            case 'write': {
              const [at, length] = within(step.range, size)
              const bytes = bytesOf(step.kind, length, step.seed)
              const code = await codeOf(() => device.write(at, bytes))
              if (code === 'none') wanted.set(bytes, at)
              else {
                same([failing, code], [true, 'TMEM_IO'])
                await adopt(at, length, bytes)
              }
              break
            }
            case 'read': {
              const [at, length] = within(step.range, size)
              const into = got.subarray(0, length).fill(0xee)
              await device.read(at, into)
              expectBytes(into, wanted.subarray(at, at + length))
              break
            }
            case 'discard':
            case 'zero': {
              const [at, length] = within(step.range, size)
              const code = await codeOf(() => device[step.do](at, length))
              if (code === 'none') wanted.fill(0, at, at + length)
              else await adopt(at, length, new Uint8Array(length))
              break
            }
            case 'resize':
              device.resize(step.pages * 4096)
              if (step.pages * 4096 < size) wanted.fill(0, step.pages * 4096)
              break
            case 'writeback': {
              if (file === undefined) break
              const code = await codeOf(() => device.writeback(step.kind as 'huge'))
              if (code !== 'none') same([failing, code], [true, 'TMEM_IO'])
              break
            }
            case 'fail':
              if (file === undefined) break
              failing = step.code !== undefined
              file().failWrite = () => (step.code === undefined ? undefined : systemError(step.code))
              break
            case 'tick':
              device.tick({ pages: step.amount })
              break
            case 'idle':
              device.idle('all')
              break
            case 'recall':
              await device.recall(step.amount)
              break
            case 'recompress':
              if (name === 'with every kind of place') await device.recompress({ maxPages: step.amount })
              break
            default:
              if (file !== undefined) device.memlimitBytes = step.amount * 1000
          }
          expectSums(device.stats())
        }
        const all = new Uint8Array(device.sizeBytes)
        await device.read(0, all)
        expectBytes(all, wanted.subarray(0, device.sizeBytes))
        // What is not allocated is zeros.
        let at = 0
        device.map(0, device.sizeBytes, (length, allocated) => {
          if (!allocated) expectBytes(wanted.subarray(at, at + length), new Uint8Array(length))
          at += length
          return true
        })
        expect(at).toBe(device.sizeBytes)
        await device.close()
      }),
      { seed: 6, numRuns: 40 },
    )
  },
  60_000,
)

test('requests that run at the same time and do not overlap are all kept', async () => {
  const writes = fc.array(
    fc.record({ count: fc.integer({ min: 1, max: 11 }), gap: fc.nat(3), kind, seed: fc.nat(99) }),
    {
      minLength: 2,
      maxLength: 20,
    },
  )
  await fc.assert(
    fc.asyncProperty(writes, fc.scheduler(), async (list, scheduler) => {
      const { layers, file } = backingFile(pages)
      const device = ramzswap({ ...base(), stack: [...compressed(), ...layers] })
      const wanted = bytesOf('noise', pages * 4096, 1)
      await device.write(0, wanted)
      file().beforeRead = () => scheduler.schedule(Promise.resolve())
      const running: Promise<void>[] = []
      let at = 0
      for (const { count, gap, kind: what, seed } of list) {
        at += gap * 512
        const length = Math.min(count * 512, pages * 4096 - at)
        if (length <= 0) break
        const bytes = bytesOf(what, length, seed)
        wanted.set(bytes, at)
        running.push(Promise.resolve(device.write(at, bytes)))
        at += length
      }
      const all = Promise.all(running)
      await scheduler.waitFor(all)
      file().beforeRead = () => Promise.resolve()
      const got = new Uint8Array(pages * 4096)
      await device.read(0, got)
      expect(Buffer.compare(got, wanted)).toBe(0)
      expectSums(device.stats())
      await device.close()
    }),
    { seed: 7, numRuns: 100 },
  )
}, 60_000)
