/**
 * What the model allows and what it finds. A random device that keeps the rules is always right; one that breaks one is
 * not.
 */
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { type Change, DeviceModel, type Left, sectorBytes } from '../src/index.ts'

const bytes = 2 ** 18
const sectors = bytes / sectorBytes

const modelOf = (): DeviceModel => new DeviceModel('disk', 3, bytes, 2 * bytes)

const write = (model: DeviceModel, from: number, to: number, lasts = false): Change => {
  const change = model.begin(from, to)
  model.done(change, lasts)
  return change
}
const flush = (model: DeviceModel): void => model.flushed(model.beginFlush())
const zeros = (from: number, to: number): Uint8Array => new Uint8Array((to - from) * sectorBytes)

describe('a read', () => {
  test('of what was never written is zeros, and else wrong', () => {
    const model = modelOf()
    expect(model.endRead(model.beginRead(0, 8), zeros(0, 8))).toBeUndefined()
    expect(model.endRead(model.beginRead(0, 8), Buffer.alloc(4096, 7))?.message).toMatch(
      /^disk, byte 0: expected zeros, found what was never written/,
    )
  })

  test('names what it found: an older version, another place', () => {
    const model = modelOf()
    const first = write(model, 8, 16)
    const second = write(model, 8, 16)
    const wrong = model.endRead(model.beginRead(8, 16), model.bytesOf(first))
    expect(wrong?.message).toBe('disk, byte 4096: expected version 2, found version 1')
    expect(model.endRead(model.beginRead(8, 16), model.bytesOf(second))).toBeUndefined()
    const elsewhere = write(model, 32, 40)
    expect(model.endRead(model.beginRead(8, 16), model.bytesOf(elsewhere))?.message).toMatch(/found version 3/)
  })

  test('during a write may have either, in each sector', () => {
    const model = modelOf()
    const before = write(model, 0, 2)
    const change = model.begin(0, 2)
    const reading = model.beginRead(0, 2)
    model.done(change, false)
    const mixed = Buffer.concat([
      model.bytesOf(before).subarray(0, sectorBytes),
      model.bytesOf(change).subarray(sectorBytes),
    ])
    expect(model.endRead(reading, mixed)).toBeUndefined()
    expect(model.endRead(model.beginRead(0, 2), mixed)?.sector).toBe(0)
  })
})

describe('after a kill', () => {
  const found = (model: DeviceModel, change: Change): boolean =>
    model.settle(change.from, model.bytesOf(change), true) === undefined

  test('what was flushed may be there, and what is newer, and nothing older', () => {
    for (const [which, expected] of [false, true, true].entries()) {
      const model = modelOf()
      const changes = [write(model, 0, 8)]
      changes.push(write(model, 0, 8))
      flush(model)
      changes.push(write(model, 0, 8))
      model.ended('flushed')
      expect([which, found(model, changes[which]!)]).toEqual([which, expected])
    }
  })

  test('a write that was answered after the flush was sent is not covered by it', () => {
    const model = modelOf()
    const before = write(model, 0, 8, true)
    const sent = model.beginFlush()
    write(model, 0, 8)
    model.flushed(sent)
    model.ended('flushed')
    expect(found(model, before)).toBe(true)
  })

  test.for<[Left, boolean, boolean]>([
    ['nothing', false, false],
    ['flushed', true, true],
    ['acknowledged', true, true],
  ])('%s: a write under way may be there or not', ([left, old, now]) => {
    for (const [which, expected] of [old, now].entries()) {
      const model = modelOf()
      const changes = [write(model, 0, 8, true), model.begin(0, 8)]
      model.ended(left)
      expect(found(model, changes[which]!)).toBe(expected)
    }
  })

  test('what was written for good is there', () => {
    const model = modelOf()
    const before = write(model, 0, 8)
    const last = write(model, 0, 8, true)
    model.ended('flushed')
    expect([found(model, before), found(model, last)]).toEqual([false, true])
  })

  test('what is found is what is there from then on', () => {
    const model = modelOf()
    const before = write(model, 0, 8, true)
    write(model, 0, 8)
    model.ended('flushed')
    expect(found(model, before)).toBe(true)
    expect(model.endRead(model.beginRead(0, 8), model.bytesOf(before))).toBeUndefined()
  })
})

test('an abandoned write keeps its place until somebody has looked', () => {
  const model = modelOf()
  const change = model.begin(4, 12)
  model.abandon(change)
  expect([model.isFree(0, 4), model.isFree(0, 5), model.isFree(12, 16)]).toEqual([true, false, true])
  expect(model.endRead(model.beginRead(4, 12), zeros(4, 12))).toBeUndefined()
  expect(model.endRead(model.beginRead(4, 12), model.bytesOf(change))).toBeUndefined()
  model.settling()
  expect(model.settle(4, model.bytesOf(change), false)).toBeUndefined()
  expect(model.isFree(4, 12)).toBe(true)
  expect(model.endRead(model.beginRead(4, 12), zeros(4, 12))).toBeDefined()
})

test('what is cut off comes back from an image only until the next flush', () => {
  const model = modelOf()
  write(model, sectors - 8, sectors, true)
  model.resize(bytes - 4096)
  model.resize(bytes)
  expect(model.endRead(model.beginRead(sectors - 8, sectors), zeros(0, 8))).toBeUndefined()
  flush(model)
  model.ended('flushed')
  expect(model.settle(sectors - 8, zeros(0, 8), true)).toBeUndefined()
})

test('pages that are held are counted from what was written, trimmed and zeroed', () => {
  const model = modelOf()
  const changes = Array.from({ length: 40 }, (_, n) => write(model, n * 8, n * 8 + 8))
  const { least, most } = model.pages()
  const written = changes.filter((change) => model.bytesOf(change).some((byte) => byte !== 0)).length
  expect([least, most]).toEqual([written, 40])
  model.done(model.begin(0, 12, true), false)
  expect(model.pages().most).toBe(39)
})

interface Step {
  readonly kind: 'write' | 'trim' | 'flush' | 'kill'
  readonly from: number
  readonly length: number
  readonly cut: number
}

/** A device with an image, as simple as it can be; `breaks`: a flush does nothing for that sector. */
function played(steps: readonly Step[], breaks?: number): boolean {
  const model = modelOf()
  let memory = Buffer.alloc(bytes)
  let image = Buffer.alloc(bytes)
  for (const { kind, from, length, cut } of steps) {
    const to = Math.min(sectors, from + length)
    if (kind === 'write' || kind === 'trim') {
      const change = model.begin(from, to, kind === 'trim')
      model.bytesOf(change).copy(memory, from * sectorBytes)
      model.done(change, false)
    } else if (kind === 'flush') {
      const sent = model.beginFlush()
      const kept = Buffer.from(image)
      image = Buffer.from(memory)
      if (breaks !== undefined) kept.copy(image, breaks * sectorBytes, breaks * sectorBytes, (breaks + 1) * sectorBytes)
      model.flushed(sent)
    } else {
      // Some of what was not flushed has come to the image by itself.
      memory.copy(image, from * sectorBytes, from * sectorBytes, Math.min(sectors, from + cut) * sectorBytes)
      memory = Buffer.from(image)
      model.ended('flushed')
      if (model.settle(0, memory, true) !== undefined) return false
    }
    if (model.endRead(model.beginRead(0, sectors), memory) !== undefined) return false
  }
  return true
}

const step = fc.record<Step>({
  kind: fc.constantFrom('write', 'write', 'trim', 'flush', 'kill'),
  from: fc.nat(sectors - 1),
  length: fc.integer({ min: 1, max: 64 }),
  cut: fc.nat(sectors),
})

test('a device that keeps the rules is never wrong', () => {
  fc.assert(
    fc.property(fc.array(step, { maxLength: 30 }), (steps) => played(steps)),
    { seed: 13, numRuns: 60 },
  )
})

test('one that forgets a sector in a flush is found', () => {
  const steps: Step[] = []
  for (let n = 0; n < 6; n++) steps.push({ kind: 'write', from: 0, length: 8, cut: 0 })
  steps.push({ kind: 'flush', from: 0, length: 0, cut: 0 }, { kind: 'kill', from: sectors - 1, length: 0, cut: 0 })
  expect([played(steps), played(steps, 3)]).toEqual([true, false])
})
