/**
 * Options of public functions: mistakes in them are told as those in the text of a stack are, with the nearest name.
 */
import { ByteLimit } from './context.ts'

const units: readonly (readonly [string, number])[] = [
  ['TiB', 2 ** 40],
  ['GiB', 2 ** 30],
  ['MiB', 2 ** 20],
  ['KiB', 2 ** 10],
]

/**
 * Reads an amount of bytes: digits, perhaps with a fraction, then `KiB`, `MiB`, `GiB`, `TiB`, `B` or nothing.
 * `undefined` for anything else, and where the amount is no whole number of bytes below 2^53.
 */
export function parseBytes(text: string): number | undefined {
  const match = /^(\d+(?:\.\d+)?)(B|KiB|MiB|GiB|TiB)?$/.exec(text)
  if (match === null) return undefined
  const bytes = Number(match[1]) * (units.find(([unit]) => unit === match[2])?.[1] ?? 1)
  return Number.isSafeInteger(bytes) ? bytes : undefined
}

/** Writes an amount of bytes so that `parseBytes` reads the same amount: `64MiB`, `1536KiB`, `1000`. */
export function formatBytes(bytes: number): string {
  const unit = bytes === 0 ? undefined : units.find(([, size]) => bytes % size === 0)
  return unit === undefined ? `${bytes}` : `${bytes / unit[1]}${unit[0]}`
}

/** An amount of bytes: a number, or text such as `64MiB` (see `parseBytes`). */
export type ByteAmount = number | string

/** What the value of an option is; `bytes`: a `ByteAmount`, `any`: whatever is there. */
export type ValueKind = 'any' | 'bytes' | 'flag' | 'function' | 'list' | 'number' | 'object' | 'text'

/**
 * Every name that options of that type may have, and what its value is, as in `{ file: 'text', keep: 'flag?' }`: with
 * `?` for what may be missing. `true`: whoever takes the options looks at the value.
 */
export type OptionNames<Options> = {
  readonly [Name in keyof Required<Options>]: true | (object extends Pick<Options, Name> ? `${ValueKind}?` : ValueKind)
}

/** How each kind is told, and whether a value is of it. */
const kinds: { readonly [Kind in ValueKind]: readonly [string, (value: unknown) => boolean] } = {
  any: ['a value', (value) => value !== null],
  bytes: [
    "an amount of bytes, such as 67108864 or '64MiB'",
    (value) => typeof value === 'number' || (typeof value === 'string' && parseBytes(value) !== undefined),
  ],
  flag: ['true or false', (value) => typeof value === 'boolean'],
  function: ['a function', (value) => typeof value === 'function'],
  list: ['a list', (value) => Array.isArray(value)],
  number: ['a number', (value) => typeof value === 'number'],
  object: ['an object', (value) => (typeof value === 'object' && value !== null) || typeof value === 'function'],
  text: ['a text that is not empty', (value) => typeof value === 'string' && value !== ''],
}

/**
 * Throws `TypeError` unless `options` is an object without other names than these, with a value of its kind under each
 * name that must be there. `who`: whose options they are, for the message.
 */
export function checkOptions<Options>(who: string, options: Options, names: OptionNames<Options>): void {
  if (typeof options !== 'object' || options === null)
    throw new TypeError(`${who}: expected an object of options, got ${nameOf(options)}`)
  for (const name of Object.keys(options))
    if (!Object.hasOwn(names, name))
      throw new TypeError(`${who} has no option ${name}; ${nearestName(name, Object.keys(names))}`)
  // Allocates nothing: some take options with each operation.
  for (const name in names) {
    const kind: string | true = names[name]
    if (kind === true) continue
    const value: unknown = options[name]
    const isOptional = kind.endsWith('?')
    if (value === undefined && isOptional) continue
    const [what, is] = kinds[(isOptional ? kind.slice(0, -1) : kind) as ValueKind]
    if (value === undefined || !is(value)) throw new TypeError(`${who}: ${name} is ${what}; ${gotOf(value)}`)
  }
}

/** The number of bytes that an option stands for. Throws `TypeError` for what is no amount of bytes. */
export function bytesOf(who: string, name: string, amount: ByteAmount): number {
  const bytes = typeof amount === 'string' ? parseBytes(amount) : amount
  if (typeof bytes === 'number') return bytes
  throw new TypeError(`${who}: ${name} is ${kinds.bytes[0]}; ${gotOf(amount)}`)
}

/**
 * The limit that an option stands for: one of its own for an amount of bytes. Throws `TypeError` for anything else,
 * `RangeError` unless the amount is a positive integer.
 */
export function limitOf(who: string, name: string, limit: ByteAmount | ByteLimit): ByteLimit {
  // Not instanceof: a program may have this package twice.
  if (typeof limit === 'object' && limit !== null && 'maximumBytes' in limit) return limit
  const bytes = bytesOf(who, name, limit)
  if (!Number.isSafeInteger(bytes) || bytes <= 0)
    throw new RangeError(`${who}: ${name} is a positive integer of bytes, got ${bytes}`)
  return new ByteLimit(bytes)
}

const gotOf = (value: unknown): string => (value === undefined ? 'it is missing' : `got ${nameOf(value)}`)

const nameOf = (value: unknown): string => {
  if (typeof value === 'string') return JSON.stringify(value)
  // Some objects have no way to become a text.
  return typeof value === 'object' && value !== null ? (Array.isArray(value) ? 'a list' : 'an object') : String(value)
}

/** What to write instead of a name: the nearest one where one is near, and all of them. */
export function nearestName(name: string, names: readonly string[]): string {
  if (names.length === 0) return 'there is none'
  const candidates = names.map((known) => ({ known, distance: distance(name.toLowerCase(), known.toLowerCase()) }))
  const best = candidates.reduce((a, b) => (b.distance < a.distance ? b : a))
  const all = names.join(', ')
  return best.distance <= Math.max(1, best.known.length / 2)
    ? `did you mean ${best.known}? (one of ${all})`
    : `expected one of ${all}`
}

/**
 * Levenshtein distance, but none from the beginning of a name to the name; names that differ in length by more than the
 * known name's are as far as that.
 */
function distance(name: string, known: string): number {
  if (name.length > 2 && known.startsWith(name)) return 0
  if (name.length > known.length * 2) return name.length - known.length
  let row = Array.from({ length: known.length + 1 }, (_, column) => column)
  for (let i = 1; i <= name.length; i++) {
    const next = [i]
    for (let j = 1; j <= known.length; j++)
      next.push(Math.min(next[j - 1]! + 1, row[j]! + 1, row[j - 1]! + (name[i - 1] === known[j - 1] ? 0 : 1)))
    row = next
  }
  return row[known.length]!
}
