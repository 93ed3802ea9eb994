/**
 * Requests: what a program asks for, as far as that could be answered from a cache.
 *
 * Invariants: what is not known to change nothing of the answer is left to `fetch`; so is what is wrong with a request.
 */

/** How to talk to servers. */
export type Fetch = typeof globalThis.fetch
/** Names, in lower case, and values: `[...headers]`. `Headers` check each name again whenever they are copied. */
export type Fields = readonly (readonly [name: string, value: string])[]

/** A GET that may be answered from the cache. */
export interface Asked {
  readonly key: string
  readonly url: string
  readonly fields: Fields
  readonly cache: 'default' | 'no-cache' | 'reload'
  readonly signal: AbortSignal | undefined
  /** Sends it, with further headers, whose names are in lower case. */
  readonly send: (headers?: Readonly<Record<string, string>>) => Promise<Response>
}

/** Characters of a URL with the headers of the request; what has more is passed through. */
const longestKey = 8192

/** Undefined: nothing that could be answered from the cache. What is wrong with a request is said by `fetch` itself. */
export function askedBy(
  fetch: Fetch,
  input: Parameters<Fetch>[0],
  init: RequestInit | null | undefined,
): Asked | undefined {
  const request = input instanceof Request ? input : undefined
  const url = addressOf(input)
  if (url === undefined) return undefined
  const settings: Record<string, unknown> = {}
  // As `fetch` reads them: also what is inherited.
  for (const name in init ?? {}) {
    const value = (init as Record<string, unknown>)[name]
    if (value === undefined) continue
    if (!(name in harmless)) return undefined
    settings[name] = value
  }
  const setting = (name: string): unknown => settings[name] ?? (request as Record<string, unknown> | undefined)?.[name]
  for (const [name, values] of restricted) {
    const value = setting(name)
    if (value !== undefined && !values.includes(value)) return undefined
  }
  const signal = setting('signal') ?? undefined
  if (signal !== undefined && !(signal instanceof AbortSignal)) return undefined
  const method = setting('method') ?? 'GET'
  const given = setting('headers')
  // What can be read once only is left to `fetch`.
  if (typeof method !== 'string' || !/^get$/i.test(method)) return undefined
  const fields = given === undefined || given === null ? [] : fieldsOf(given)
  if (fields === undefined) return undefined
  const names = fields.filter(([name]) => !directives.has(name))
  const key = names.length === 0 ? url : `${url} ${JSON.stringify(names)}`
  if (key.length > longestKey || fields.some(([name]) => questions.has(name))) return undefined
  if (fields.some(([name, value]) => name === 'cache-control' && /\b(no-store|only-if-cached)\b/i.test(value)))
    return undefined
  return {
    key,
    url,
    fields,
    cache: (setting('cache') as Asked['cache'] | undefined) ?? 'default',
    signal,
    send: async (more) => {
      if (more === undefined) return fetch(input, init ?? undefined)
      const others = fields.filter(([name]) => !Object.hasOwn(more, name))
      return fetch(input, {
        ...settings,
        ...asking,
        headers: [...others, ...Object.entries(more)] as [string, string][],
      })
    },
  }
}

/** So that ranges and lengths are those of the file, not of a compressed form. */
export const identity = { 'accept-encoding': 'identity' }
/**
 * With the default, `fetch` adds `Cache-Control: no-cache` to each question, and then there are servers that send the
 * whole file; so it is `max-age=0`. The setting is known to the runtime, not to its types.
 */
export const asking: object = { cache: 'no-cache' }
/** Headers that make a request a question of its own, or answers for one person. */
const questions: ReadonlySet<string> = new Set([
  'authorization',
  'cookie',
  'if-match',
  'if-modified-since',
  'if-none-match',
  'if-range',
  'if-unmodified-since',
  'proxy-authorization',
  'range',
])
/** Headers that say how to use a cache, not what is wanted. */
const directives: ReadonlySet<string> = new Set(['cache-control', 'pragma'])
/**
 * Settings of a request that change nothing of the answer; undefined: any value. What is not here is not known to do no
 * harm.
 */
const harmless: Readonly<Record<string, readonly unknown[] | undefined>> = {
  method: undefined,
  headers: undefined,
  signal: undefined,
  duplex: undefined,
  body: [null],
  cache: ['default', 'no-cache', 'reload'],
  credentials: ['same-origin'],
  integrity: [''],
  keepalive: [false],
  mode: ['cors'],
  redirect: ['follow'],
  referrer: ['about:client'],
  referrerPolicy: [''],
  window: [null],
}
const restricted: readonly (readonly [string, readonly unknown[]])[] = Object.entries(harmless).flatMap(
  ([name, values]) => (values === undefined ? [] : [[name, values]]),
)

/** The address of a file on an HTTP server, without a fragment. */
export function addressOf(input: Parameters<Fetch>[0]): string | undefined {
  const text = input instanceof Request ? input.url : input
  if (!(typeof text === 'string' || text instanceof URL)) return undefined
  let address: URL
  try {
    address = new URL(text)
  } catch {
    return undefined
  }
  // What has a name and a password is refused by `fetch`.
  if (!/^https?:$/.test(address.protocol) || address.username !== '' || address.password !== '') return undefined
  // Also an empty one is written.
  if (address.href.includes('#')) address.hash = ''
  return address.href
}

/** Headers of a request; undefined: they are wrong, or can be read once only. */
function fieldsOf(given: unknown): Fields | undefined {
  const again =
    given instanceof Headers ||
    Array.isArray(given) ||
    (typeof given === 'object' && given !== null && !(Symbol.iterator in given))
  if (!again) return undefined
  try {
    return [...new Headers(given as Headers)]
  } catch {
    return undefined
  }
}
