/**
 * Freshness and validation of answers: RFC 9111 for a private cache, computed by http-cache-semantics, without
 * heuristics. An answer is reused only if its server has allowed it, and never stale.
 *
 * Sources: RFC 9111 §3 (storing), §4.1 (Vary), §4.2 (freshness, age), §4.3 (validation); RFC 9110 §8.8.2.2
 * (Last-Modified as a validator).
 */
import CachePolicy from 'http-cache-semantics'
import type { Fields } from './request.ts'

/** Headers as the library reads them. */
type Named = Record<string, string>

const namedOf = (fields: Fields): Named => Object.fromEntries(fields)

/** The rules of one answer (200 to a GET). */
export class Freshness {
  readonly #url: string
  readonly #policy: CachePolicy
  readonly #validated: boolean

  /**
   * `request` holds the headers of the program that asked, `response` those of the answer. `now` is in milliseconds
   * since 1970.
   */
  constructor(url: string, request: Fields, response: Fields, now: number = Date.now()) {
    const fields = namedOf(response)
    // The library knows directives in lower case only, and asks again for each answer that says must-revalidate, fresh
    // or not.
    const control = fields['cache-control']?.toLowerCase()
    if (control !== undefined) fields['cache-control'] = control.replace(/(^|,)\s*must-revalidate\s*(?=,|$)/g, '$1')
    // An age that is none, or several: nobody knows how old it is.
    if (!/^\d*$/.test(fields['age'] ?? '')) fields['age'] = String(2 ** 31)
    // RFC 9111 §4.2.3: apparent age, of which the library knows nothing.
    const date = Date.parse(fields['date'] ?? '')
    const apparent = Math.max(0, Math.floor((now - date) / 1000))
    if (apparent > (Number.parseInt(fields['age'] ?? '', 10) || 0)) fields['age'] = String(apparent)
    // What is no ETag names no version.
    if (!/^(W\/)?"[^"]*"$/.test(fields['etag'] ?? '')) delete fields['etag']
    this.#url = url
    this.#policy = new CachePolicy(
      { url, method: 'GET', headers: namedOf(request) },
      { status: 200, headers: fields },
      { shared: false, cacheHeuristic: 0, immutableMinTimeToLive: 0 },
    )
    // A file can change twice in a second, and have the same date of change.
    const changed = Date.parse(fields['last-modified'] ?? '')
    this.#validated = fields['etag'] !== undefined || (Number.isNaN(date) ? now : date) - changed >= 1000
  }

  /** Whether it is of any use to keep the answer. */
  get storable(): boolean {
    return this.#policy.storable() && (this.#validated || !this.#policy.stale())
  }

  /** Seconds since the answer was made, as in the header `Age`. */
  get age(): number {
    return Math.max(0, Math.floor(this.#policy.age()))
  }

  /** Whether the answer may be given to a request with these headers, without asking the server. */
  serves(request: Fields): boolean {
    return !this.#policy.stale() && this.#policy.satisfiesWithoutRevalidation(this.#request(request))
  }

  /** Headers that ask whether the answer is still good; none when it is of no use for such a request. */
  conditions(request: Fields): Named | undefined {
    if (!this.#validated) return undefined
    const all = this.#policy.revalidationHeaders(this.#request(request))
    const conditions: Named = {}
    for (const name of ['if-none-match', 'if-modified-since'])
      if (all[name] !== undefined) conditions[name] = String(all[name])
    return Object.keys(conditions).length === 0 ? undefined : conditions
  }

  #request(fields: Fields): { url: string; method: string; headers: Named } {
    return { url: this.#url, method: 'GET', headers: namedOf(fields) }
  }
}
