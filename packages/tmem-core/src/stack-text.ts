/**
 * Stacks as text: `zcache(limit=64MiB) > ramster(valkey=127.0.0.1:7001) > frontswap(file=/tmp/swap.img,size=1GiB)`, and
 * the same as plain data (what a YAML or JSON file holds).
 *
 *     stack  = layer { ">" layer }
 *     layer  = name [ "(" [ option { "," option } ] ")" ]
 *     option = name "=" ( bare value | quoted value )
 *
 * Names are letters, digits and hyphens. White space may stand between any two of these. A bare value ends before white
 * space and before , ( ) > and "; a quoted value stands in double quotes, with \" and \\ for the quote and the
 * backslash.
 *
 * Invariants: the answer is a list of layers or a `TmemError` with code `TMEM_BAD_STACK_TEXT` whose message is one line
 * that says where, what was expected, and which valid name is nearest; nothing is opened or allocated. Which layers
 * there are is the caller's business: this file knows none.
 */

import { formatBytes, nearestName, parseBytes } from './options.ts'
import { TmemError } from './outcomes.ts'
import type { Layer, LayerFactory, OptionSpec, OptionValue } from './store.ts'

/**
 * Reads a stack, topmost layer first. `factories` are the layers that may be named.
 * Throws `TmemError` (`TMEM_BAD_STACK_TEXT`) with the column, counted from 1, where the text cannot be a stack.
 */
export function parseStack(text: string, factories: readonly LayerFactory[]): Layer[] {
  return build(new Reader(text).stack(), factories)
}

/**
 * The same from plain data: a list whose entries are a layer's name, or an object with one key, the layer's name, and
 * an object of its options as value, e.g. `[{zcache: {limit: '64MiB'}}, {frontswap: {file: '/tmp/swap.img', size: 2 **
 * 30}}]`; or one string: the text form. Throws `TmemError` (`TMEM_BAD_STACK_TEXT`) with the place, e.g.
 * `[1].frontswap.size`.
 */
export function stackFromData(data: unknown, factories: readonly LayerFactory[]): Layer[] {
  if (typeof data === 'string') return parseStack(data, factories)
  if (!Array.isArray(data))
    throw mistake('the top', `expected a list of layers or the text of a stack, got ${describe(data)}`)
  if (data.length === 0) throw mistake('the top', 'expected at least one layer, got an empty list')
  return build(
    Array.from(data, (entry: unknown, number) => layerOfData(entry, `[${number}]`)),
    factories,
  )
}

/** A layer as it was written: each part with its place in words. Values are strings, or anything that the data held. */
interface WrittenLayer {
  readonly name: string
  readonly at: string
  readonly options: readonly WrittenOption[]
}
interface WrittenOption {
  readonly name: string
  readonly at: string
  readonly value: unknown
  readonly valueAt: string
}

/** Reads the grammar above from left to right; `#at` is the next character. */
class Reader {
  readonly #text: string
  #at = 0

  constructor(text: string) {
    this.#text = text
  }

  stack(): WrittenLayer[] {
    const layers = [this.#layer('the name of a layer')]
    while (this.#take('>')) layers.push(this.#layer('the name of a layer after ">"'))
    if (this.#at < this.#text.length)
      throw this.#expected(layers.at(-1)!.closed ? '">" or the end' : '"(", ">" or the end')
    return layers
  }

  #layer(what: string): WrittenLayer & { readonly closed: boolean } {
    const { name, at } = this.#name(what)
    const options: WrittenOption[] = []
    const closed = this.#take('(')
    if (closed && !this.#take(')')) {
      do options.push(this.#option(name))
      while (this.#take(','))
      if (!this.#take(')')) throw this.#expected('"," or ")"')
    }
    return { name, at, options, closed }
  }

  #option(layer: string): WrittenOption {
    const { name, at } = this.#name(`the name of an option of ${quote(layer)}`)
    if (!this.#take('=')) throw this.#expected(`"=" after the option ${quote(name)}`)
    this.#skipSpace()
    const valueAt = this.#place()
    return { name, at, value: this.#value(name), valueAt }
  }

  #name(what: string): { name: string; at: string } {
    this.#skipSpace()
    const at = this.#place()
    const name = this.#match(/[A-Za-z][A-Za-z0-9-]*/y)
    if (name === '') throw this.#expected(what)
    return { name, at }
  }

  #value(option: string): string {
    if (this.#text[this.#at] !== '"') {
      const bare = this.#match(/[^\s,()>"]+/y)
      if (bare === '')
        throw this.#expected(`a value for ${quote(option)} (in double quotes if it holds , ( ) > " or a space)`)
      return bare
    }
    const start = this.#place()
    const quoted = this.#match(/"(?:[^"\\]|\\["\\])*"/y)
    if (quoted === '')
      throw mistake(
        start,
        `expected a closing double quote after this one; inside, write \\" for a quote, \\\\ for a backslash`,
      )
    return quoted.slice(1, -1).replaceAll(/\\(["\\])/g, '$1')
  }

  #take(character: string): boolean {
    this.#skipSpace()
    if (this.#text[this.#at] !== character) return false
    this.#at++
    return true
  }

  #skipSpace(): void {
    this.#match(/\s*/y)
  }

  #match(sticky: RegExp): string {
    sticky.lastIndex = this.#at
    const found = sticky.exec(this.#text)?.[0] ?? ''
    this.#at += found.length
    return found
  }

  #place(): string {
    return `column ${this.#at + 1}`
  }

  #expected(what: string): TmemError {
    const rest = this.#text.slice(this.#at)
    return mistake(this.#place(), `expected ${what}, got ${rest === '' ? 'the end' : quote(rest)}`)
  }
}

function layerOfData(entry: unknown, at: string): WrittenLayer {
  if (typeof entry === 'string') return { name: entry, at, options: [] }
  const expected = 'expected the name of a layer, or an object with one layer and its options'
  if (!isRecord(entry)) throw mistake(at, `${expected}, got ${describe(entry)}`)
  const named = Object.entries(entry)
  const [only] = named
  if (only === undefined || named.length > 1) throw mistake(at, `${expected}, got an object with ${named.length} keys`)
  const [name, values] = only
  const where = `${at}.${short(name)}`
  // YAML reads a layer without options (`- zcache:`) as null.
  if (values !== null && !isRecord(values))
    throw mistake(where, `expected an object of options, got ${describe(values)}`)
  const options = Object.entries(values ?? {}).map(([option, value]) => {
    const place = `${where}.${short(option)}`
    return { name: option, at: place, value, valueAt: place }
  })
  return { name, at: where, options }
}

function build(written: readonly WrittenLayer[], factories: readonly LayerFactory[]): Layer[] {
  return written.map(({ name, at, options }) => {
    const factory = factories.find((known) => known.name === name)
    if (factory === undefined)
      throw mistake(
        at,
        `no layer is named ${quote(name)}; ${nearestName(
          name,
          factories.map((known) => known.name),
        )}`,
      )
    const values: Record<string, OptionValue> = {}
    for (const option of options) {
      if (!Object.hasOwn(factory.options, option.name))
        throw mistake(
          option.at,
          `${name} has no option ${quote(option.name)}; ${nearestName(option.name, Object.keys(factory.options))}`,
        )
      if (Object.hasOwn(values, option.name))
        throw mistake(option.at, `${name}'s option ${option.name} was given before`)
      values[option.name] = optionValue(option, factory.options[option.name]!)
    }
    for (const [option, spec] of Object.entries(factory.options))
      if (spec.required === true && !Object.hasOwn(values, option))
        throw mistake(at, `${name} needs the option ${option}: ${spec.summary} (${name}(${option}=${example(spec)}))`)
    try {
      return factory.create(values)
    } catch (error) {
      // What one option's specification cannot say, e.g. that two exclude each other.
      if (error instanceof RangeError || error instanceof TypeError)
        throw mistake(at, `${name}: ${printable(error.message)}`, error)
      throw error
    }
  })
}

function optionValue({ name, value, valueAt }: WrittenOption, spec: OptionSpec): OptionValue {
  const wrong = (expected: string): TmemError =>
    mistake(valueAt, `expected ${expected} for ${name}, got ${describe(value)}`)
  const oneOf = (what: string): TmemError => wrong([what, ...(spec.choices ?? [])].join(' or '))
  if (spec.kind === 'flag') {
    if (value === true || value === 'yes') return true
    if (value === false || value === 'no') return false
    throw wrong('yes or no')
  }
  if (spec.kind === 'text') {
    if (typeof value !== 'string' || value === '')
      throw wrong(spec.choices === undefined ? 'text' : spec.choices.join(' or '))
    if (spec.choices !== undefined && !spec.choices.includes(value))
      throw mistake(valueAt, `${name} cannot be ${quote(value)}; ${nearestName(value, spec.choices)}`)
    return value
  }
  if (typeof value === 'string' && spec.choices?.includes(value) === true) return value
  const number = typeof value === 'string' ? numberOf(value, spec.kind) : value
  if (typeof number !== 'number' || !Number.isFinite(number)) throw oneOf(kinds[spec.kind])
  if (spec.kind !== 'number' && !Number.isSafeInteger(number)) throw oneOf(kinds[spec.kind])
  const { minimum = spec.kind === 'bytes' ? 0 : -Infinity, maximum = Infinity } = spec
  if (number < minimum || number > maximum) {
    const show = (limit: number): string => (spec.kind === 'bytes' ? formatBytes(limit) : `${limit}`)
    const range =
      minimum === -Infinity
        ? `at most ${show(maximum)}`
        : maximum === Infinity
          ? `at least ${show(minimum)}`
          : `from ${show(minimum)} to ${show(maximum)}`
    throw mistake(valueAt, `${name} must be ${range}, got ${describe(value)}`)
  }
  return number
}

const kinds = Object.freeze({
  bytes: 'an amount of bytes (such as 64MiB, 1GiB or 65536)',
  integer: 'a whole number',
  number: 'a number',
} as const)

function numberOf(text: string, kind: keyof typeof kinds): number | undefined {
  if (kind === 'bytes') return parseBytes(text)
  return /^-?\d+(?:\.\d+)?(?:e[+-]?\d+)?$/.test(text) ? Number(text) : undefined
}

function example(spec: OptionSpec): string {
  if (spec.choices?.[0] !== undefined) return spec.choices[0]
  switch (spec.kind) {
    case 'bytes':
      return formatBytes(Math.max(spec.minimum ?? 0, 2 ** 26))
    case 'integer':
    case 'number':
      return `${spec.minimum ?? 1}`
    case 'flag':
      return 'yes'
    case 'text':
      return 'TEXT'
  }
}

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

function describe(value: unknown): string {
  if (value === null) return 'nothing'
  if (typeof value === 'string') return quote(value)
  if (typeof value === 'number' || typeof value === 'boolean') return `${value}`
  if (Array.isArray(value)) return 'a list'
  return typeof value === 'object' ? 'an object' : `a value of type ${typeof value}`
}

const longestShown = 40

/** Text in double quotes. */
const quote = (text: string): string => `"${short(text)}"`

/** Text on one line, cut where it is long. */
const short = (text: string): string =>
  `${printable(text.slice(0, longestShown))}${text.length > longestShown ? '…' : ''}`

/** Text without anything that would end the line or steer a terminal. */
const printable = (text: string): string =>
  text.replaceAll(/[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu, (character) => `\\u{${character.codePointAt(0)!.toString(16)}}`)

function mistake(at: string, what: string, cause?: unknown): TmemError {
  return new TmemError('TMEM_BAD_STACK_TEXT', `bad stack at ${at}: ${what}`, { cause })
}

/** The layers that a module exports: every export that looks like a `LayerFactory`. */
export function factoriesIn(module: Readonly<Record<string, unknown>>): LayerFactory[] {
  return Object.values(module).filter(isLayerFactory)
}

function isLayerFactory(value: unknown): value is LayerFactory {
  if (typeof value !== 'object' || value === null) return false
  const { name, options, create } = value as Partial<Record<keyof LayerFactory, unknown>>
  return typeof name === 'string' && typeof options === 'object' && options !== null && typeof create === 'function'
}
