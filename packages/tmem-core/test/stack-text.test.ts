import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { formatBytes, parseBytes } from '../src/options.ts'
import { TmemError } from '../src/outcomes.ts'
import { parseStack, stackFromData } from '../src/stack-text.ts'
import type { Layer, LayerFactory, OptionSpec, OptionValue } from '../src/store.ts'

/** A layer that only remembers what it was made of. */
interface Remembering extends Layer {
  readonly options: Readonly<Record<string, OptionValue>>
}

const factory = (name: string, options: Record<string, OptionSpec>): LayerFactory => ({
  name,
  summary: `${name} for tests`,
  options,
  create: (values): Remembering => {
    if (values['ratio'] === 13) throw new RangeError('13 is unlucky\nvery')
    return {
      name,
      options: values,
      plan: () => 'for tests only',
      open: () => {
        throw new Error('reading a text opens nothing')
      },
    }
  },
})

const factories: readonly LayerFactory[] = [
  factory('zcache', {
    limit: { kind: 'bytes', summary: 'most memory', required: true, minimum: 65536, maximum: 2 ** 40 },
    ratio: { kind: 'number', summary: 'worst ratio', minimum: 1 },
    codec: { kind: 'text', summary: 'codec', choices: ['lz4', 'store'] },
  }),
  factory('ramster', {
    valkey: { kind: 'text', summary: 'address' },
    replicas: { kind: 'integer', summary: 'copies', maximum: 3 },
  }),
  factory('frontswap', {
    file: { kind: 'text', summary: 'swap file', required: true },
    size: { kind: 'bytes', summary: 'bytes of the file', choices: ['auto', 'all'] },
    writethrough: { kind: 'flag', summary: 'write all' },
  }),
  factory('memory', {}),
]

const read = (layers: readonly Layer[]): unknown => layers.map((layer) => [layer.name, (layer as Remembering).options])

/** The message of the error, after checking that it is the right one. */
function mistakeOf(run: () => unknown): string {
  const error = thrownBy(run) as TmemError
  expect(error).toBeInstanceOf(TmemError)
  expect(error.code).toBe('TMEM_BAD_STACK_TEXT')
  expect(error.message).not.toMatch(/[\p{Cc}\p{Zl}\p{Zp}]/u)
  return error.message
}

function thrownBy(run: () => unknown): unknown {
  try {
    run()
  } catch (error) {
    return error
  }
  throw new Error('no error')
}

describe('the textual form', () => {
  test('reads layers in the order in which a page travels', () => {
    const text = 'zcache(limit=64MiB) > ramster(valkey=127.0.0.1:7001) > frontswap(file=/tmp/swap.img,size=1GiB)'
    expect(read(parseStack(text, factories))).toEqual([
      ['zcache', { limit: 2 ** 26 }],
      ['ramster', { valkey: '127.0.0.1:7001' }],
      ['frontswap', { file: '/tmp/swap.img', size: 2 ** 30 }],
    ])
  })

  test('reads every kind of option, white space and quoted values', () => {
    const text = ` zcache ( limit = 65536 , ratio=1.5,codec=store)
      >memory>memory( ) > ramster(replicas=-2)>frontswap(file="/tmp/a, (b) > \\"c\\" \\\\=",writethrough=yes) `
    expect(read(parseStack(text, factories))).toEqual([
      ['zcache', { limit: 65536, ratio: 1.5, codec: 'store' }],
      ['memory', {}],
      ['memory', {}],
      ['ramster', { replicas: -2 }],
      ['frontswap', { file: '/tmp/a, (b) > "c" \\=', writethrough: true }],
    ])
    expect(read(parseStack('frontswap(file=a=b,writethrough=no)', factories))).toEqual([
      ['frontswap', { file: 'a=b', writethrough: false }],
    ])
    // A word in an amount's stead.
    expect(read(parseStack('frontswap(file=a,size=all)', factories))).toEqual([
      ['frontswap', { file: 'a', size: 'all' }],
    ])
  })

  test.each([
    ['', 'column 1: expected the name of a layer, got the end'],
    ['  > memory', 'column 3: expected the name of a layer, got "> memory"'],
    ['memory >', 'column 9: expected the name of a layer after ">", got the end'],
    ['memory memory', 'column 8: expected "(", ">" or the end, got "memory"'],
    ['memory() memory', 'column 10: expected ">" or the end, got "memory"'],
    ['zcache(limit=64MiB', 'column 19: expected "," or ")", got the end'],
    ['zcache(limit 64MiB)', 'column 14: expected "=" after the option "limit", got "64MiB)"'],
    [
      'zcache(limit=)',
      'column 14: expected a value for "limit" (in double quotes if it holds , ( ) > " or a space), got ")"',
    ],
    ['zcache(,)', 'column 8: expected the name of an option of "zcache", got ",)"'],
    [
      'frontswap(file="/tmp/a',
      'column 16: expected a closing double quote after this one; inside, write \\" for a quote, \\\\ for a backslash',
    ],
    [
      'frontswap(file="\\n")',
      'column 16: expected a closing double quote after this one; inside, write \\" for a quote, \\\\ for a backslash',
    ],
    [
      'zcahe(limit=1MiB)',
      'column 1: no layer is named "zcahe"; did you mean zcache? (one of zcache, ramster, frontswap, memory)',
    ],
    ['memory > disk', 'column 10: no layer is named "disk"; expected one of zcache, ramster, frontswap, memory'],
    ['zcache(limt=1MiB)', 'column 8: zcache has no option "limt"; did you mean limit? (one of limit, ratio, codec)'],
    ['memory(limit=1MiB)', 'column 8: memory has no option "limit"; there is none'],
    [
      'zcache(limit=1MiB,constructor=1)',
      'column 19: zcache has no option "constructor"; expected one of limit, ratio, codec',
    ],
    ['zcache(limit=1MiB, limit=2MiB)', "column 20: zcache's option limit was given before"],
    ['memory > zcache', 'column 10: zcache needs the option limit: most memory (zcache(limit=64MiB))'],
    [
      'zcache(limit=64MB)',
      'column 14: expected an amount of bytes (such as 64MiB, 1GiB or 65536) for limit, got "64MB"',
    ],
    [
      'zcache(limit=1.0001KiB)',
      'column 14: expected an amount of bytes (such as 64MiB, 1GiB or 65536) for limit, got "1.0001KiB"',
    ],
    ['zcache(limit=4KiB)', 'column 14: limit must be from 64KiB to 1TiB, got "4KiB"'],
    ['zcache(limit=2TiB)', 'column 14: limit must be from 64KiB to 1TiB, got "2TiB"'],
    ['zcache(limit=1MiB,ratio=0.5)', 'column 25: ratio must be at least 1, got "0.5"'],
    ['zcache(limit=1MiB,ratio=x)', 'column 25: expected a number for ratio, got "x"'],
    ['zcache(limit=1MiB,ratio=1e999)', 'column 25: expected a number for ratio, got "1e999"'],
    ['zcache(limit=1MiB,codec=lz5)', 'column 25: codec cannot be "lz5"; did you mean lz4? (one of lz4, store)'],
    ['ramster(replicas=4)', 'column 18: replicas must be at most 3, got "4"'],
    ['ramster(replicas=1.5)', 'column 18: expected a whole number for replicas, got "1.5"'],
    [
      'frontswap(file=a,size=most)',
      'column 23: expected an amount of bytes (such as 64MiB, 1GiB or 65536) or auto or all for size, got "most"',
    ],
    ['frontswap(file="")', 'column 16: expected text for file, got ""'],
    ['frontswap(file=a,writethrough=true)', 'column 31: expected yes or no for writethrough, got "true"'],
    ['memory > zcache(limit=1MiB,ratio=13)', 'column 10: zcache: 13 is unlucky\\u{a}very'],
    [`memory ${'x'.repeat(1000)}`, `column 8: expected "(", ">" or the end, got "${'x'.repeat(40)}…"`],
    ['memory \u2028\u0007', 'column 9: expected "(", ">" or the end, got "\\u{7}"'],
  ])('refuses %j in one line that says where and what', (text, message) => {
    expect(mistakeOf(() => parseStack(text, factories))).toBe(`bad stack at ${message}`)
  })
})

describe('plain data', () => {
  test('reads the same stacks', () => {
    const data = [
      { zcache: { limit: '64MiB', ratio: 2 } },
      'memory',
      { memory: null },
      { frontswap: { file: '/tmp/a b', size: 2 ** 30, writethrough: true } },
    ]
    expect(read(stackFromData(data, factories))).toEqual([
      ['zcache', { limit: 2 ** 26, ratio: 2 }],
      ['memory', {}],
      ['memory', {}],
      ['frontswap', { file: '/tmp/a b', size: 2 ** 30, writethrough: true }],
    ])
    expect(read(stackFromData('memory > memory', factories))).toEqual([
      ['memory', {}],
      ['memory', {}],
    ])
  })

  test.each([
    [undefined, 'the top: expected a list of layers or the text of a stack, got a value of type undefined'],
    [{}, 'the top: expected a list of layers or the text of a stack, got an object'],
    [[], 'the top: expected at least one layer, got an empty list'],
    [[7], '[0]: expected the name of a layer, or an object with one layer and its options, got 7'],
    [
      ['memory', {}],
      '[1]: expected the name of a layer, or an object with one layer and its options, got an object with 0 keys',
    ],
    [
      [{ a: 1, b: 2 }],
      '[0]: expected the name of a layer, or an object with one layer and its options, got an object with 2 keys',
    ],
    [[{ memory: [] }], '[0].memory: expected an object of options, got a list'],
    [
      [{ zcahe: {} }],
      '[0].zcahe: no layer is named "zcahe"; did you mean zcache? (one of zcache, ramster, frontswap, memory)',
    ],
    [
      [{ zcache: { limt: 1 } }],
      '[0].zcache.limt: zcache has no option "limt"; did you mean limit? (one of limit, ratio, codec)',
    ],
    [
      [{ zcache: { limit: 2.5 } }],
      '[0].zcache.limit: expected an amount of bytes (such as 64MiB, 1GiB or 65536) for limit, got 2.5',
    ],
    [[{ zcache: { limit: -1 } }], '[0].zcache.limit: limit must be from 64KiB to 1TiB, got -1'],
    [
      [{ zcache: { limit: null } }],
      '[0].zcache.limit: expected an amount of bytes (such as 64MiB, 1GiB or 65536) for limit, got nothing',
    ],
    [[{ zcache: { limit: 65536, codec: 4 } }], '[0].zcache.codec: expected lz4 or store for codec, got 4'],
    [[{ zcache: {} }], '[0].zcache: zcache needs the option limit: most memory (zcache(limit=64MiB))'],
    [
      [JSON.parse('{"__proto__": {}}')],
      '[0].__proto__: no layer is named "__proto__"; expected one of zcache, ramster, frontswap, memory',
    ],
    [
      [JSON.parse('{"memory": {"__proto__": 1}}')],
      '[0].memory.__proto__: memory has no option "__proto__"; there is none',
    ],
    [
      [{ 'a\nb': {} }],
      '[0].a\\u{a}b: no layer is named "a\\u{a}b"; expected one of zcache, ramster, frontswap, memory',
    ],
  ])('refuses %j in one line that says where and what', (data, message) => {
    expect(mistakeOf(() => stackFromData(data, factories))).toBe(`bad stack at ${message}`)
  })
})

describe('whatever comes in', () => {
  const words = fc.constantFrom(
    'zcache',
    'memory',
    'frontswap',
    'ramster',
    'limit',
    'file',
    'ratio',
    'codec',
    '64MiB',
    '13',
    'yes',
    'lz4',
    '/tmp/x',
    '(',
    ')',
    ',',
    '=',
    '>',
    '"',
    '\\',
    ' ',
    '\n',
    '-',
    '\u{1f600}',
    '\ud800',
  )
  const hostile = fc.oneof(
    fc.array(words, { maxLength: 24 }).map((list) => list.join('')),
    fc.string({ unit: 'binary', maxLength: 60 }),
  )

  const known = factories.map(({ name }) => name)
  const expectStackOrMistake = (run: () => Layer[]): void => {
    let layers: Layer[]
    try {
      layers = run()
    } catch {
      mistakeOf(run)
      return
    }
    expect(layers.length).toBeGreaterThan(0)
    for (const layer of layers) expect(known).toContain(layer.name)
  }

  test('the answer is a stack or a mistake', () => {
    fc.assert(
      fc.property(hostile, (text) => expectStackOrMistake(() => parseStack(text, factories))),
      { seed: 1, numRuns: 2000 },
    )
    const layer = fc.dictionary(fc.constantFrom('zcache', 'memory', 'frontswap', 'other'), fc.anything(), {
      maxKeys: 2,
    })
    const options = fc.dictionary(fc.constantFrom('limit', 'ratio', 'file', 'writethrough', '__proto__'), fc.anything())
    const data = fc.oneof(
      fc.anything(),
      fc.array(fc.oneof(fc.anything(), layer, fc.record({ zcache: options }), fc.record({ frontswap: options }))),
    )
    fc.assert(
      fc.property(data, (value) => expectStackOrMistake(() => stackFromData(value, factories))),
      { seed: 2, numRuns: 2000 },
    )
  })

  test('any value that is text comes back from its quoted form', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary', minLength: 1 }), (file) => {
        const quoted = file.replaceAll('\\', '\\\\').replaceAll('"', '\\"')
        expect(read(parseStack(`frontswap(file="${quoted}")`, factories))).toEqual([['frontswap', { file }]])
      }),
      { seed: 3 },
    )
  })
})

test('amounts of bytes are read as they are written', () => {
  expect([0, 1, 1000, 1024, 1536, 2 ** 26, 3 * 2 ** 30, 2 ** 40, 2 ** 53 - 1].map(formatBytes)).toEqual([
    '0',
    '1',
    '1000',
    '1KiB',
    '1536',
    '64MiB',
    '3GiB',
    '1TiB',
    '9007199254740991',
  ])
  expect(['1.5KiB', '12B', '0.25GiB', '8192TiB'].map(parseBytes)).toEqual([1536, 12, 2 ** 28, undefined])
  const none = ['', 'MiB', '1 MiB', '1mib', '1MB', '-1', '1.KiB', '.5KiB', '0x10', '1e3', '0.3KiB']
  expect(none.filter((text) => parseBytes(text) !== undefined)).toEqual([])
  fc.assert(
    fc.property(fc.maxSafeNat(), fc.nat(40), (amount, shift) => {
      const bytes = Math.floor(amount / 2 ** shift) * 2 ** Math.min(shift, 12)
      fc.pre(Number.isSafeInteger(bytes))
      expect(parseBytes(formatBytes(bytes))).toBe(bytes)
    }),
    { seed: 4 },
  )
})
