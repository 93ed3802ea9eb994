/** Mistakes in the options of layers are told with the option's name, what it may be, and the nearest name. */
import { existsSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { ByteLimit, bytesOf, checkOptions, compose, type Layer, limitOf } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { spill } from '@tmem/spill'
import { zcache } from '@tmem/zcache'
import { describe, expect, test } from 'vitest'

const file = join(tmpdir(), `tmem-options-${process.pid}`)

/** By layer: how it is made, the name of its size, and what else it needs. */
const layers: Readonly<Record<string, [make: (options: never) => Layer, size: string, more: object]>> = {
  memory: [memory, 'limitBytes', {}],
  zcache: [zcache, 'limitBytes', {}],
  frontswap: [frontswap, 'sizeBytes', { file }],
  spill: [spill, 'sizeBytes', { file }],
}

describe.each(Object.entries(layers))('%s', (name, [make, size, more]) => {
  const made = (options: unknown): Layer => make(options as never)

  test('takes bytes as a number and as text', () => {
    expect(made({ ...more, [size]: '1MiB' }).place!.traits).toEqual(made({ ...more, [size]: 2 ** 20 }).place!.traits)
  })

  test('names the option that is meant', () => {
    const wrong = size.slice(0, -'Bytes'.length)
    expect(() => made({ ...more, [size]: '1MiB', [wrong]: 5 })).toThrow(
      `${name} has no option ${wrong}; did you mean ${size}? (one of `,
    )
  })

  test('says what is missing, and what is no amount of bytes', () => {
    expect(() => made(more)).toThrow(
      `${name}: ${size} is an amount of bytes, such as 67108864 or '64MiB'; it is missing`,
    )
    for (const amount of ['64 megs', '', '-1MiB', true, {}, []])
      expect(() => made({ ...more, [size]: amount })).toThrow(`${name}: ${size} is an amount of bytes`)
    for (const amount of [Number.NaN, -1, 0.5, Number.POSITIVE_INFINITY, null])
      expect(() => made({ ...more, [size]: amount })).toThrow(/limit|bytes/)
    for (const options of [undefined, null, 'file', 7])
      expect(() => made(options)).toThrow(/expected an object of options/)
    expect(existsSync(file)).toBe(false)
  })
})

test.each([frontswap, spill])('a file that is not named', (make) => {
  expect(() => make({ sizeBytes: '1MiB' } as never)).toThrow(/file is the path .* it is missing/)
})

test('compose', () => {
  const layer = memory({ limitBytes: '1MiB' })
  expect(() => compose([layer], { clocks: Date.now } as never)).toThrow(
    'compose has no option clocks; did you mean clock?',
  )
  expect(() => compose(layer as never)).toThrow('expected a list of layers')
})

test('a limit of another copy of the package is one', () => {
  const other = { maximumBytes: 2 ** 20, bytes: 2 ** 20 } as ByteLimit
  expect(limitOf('it', 'limit', other)).toBe(other)
  expect(limitOf('it', 'limit', '1MiB').bytes).toBe(2 ** 20)
  expect(limitOf('it', 'limit', new ByteLimit(7)).bytes).toBe(7)
  expect(bytesOf('it', 'size', '1.5KiB')).toBe(1536)
  expect(() => checkOptions('it', { blue: 1 }, { near: true } as never)).toThrow(
    'it has no option blue; expected one of near',
  )
})
