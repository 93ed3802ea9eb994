/**
 * Answers: the facts that the headers of a response state about a file, and whether the response answers the request.
 *
 * Sources: RFC 9110 (validators §8.8, ranges §14), RFC 9111 §4.3.4.
 */
import { identity } from './request.ts'
import type { Entry } from './table.ts'

/** A part of a file, in bytes: from `first` up to, but not including, `last`. */
export interface Part {
  readonly first: number
  readonly last: number
}

/** Where an answer comes from, after redirects. Answers that a program made itself have no URL. */
export const targetOf = ({ url }: Pick<Response, 'url'>, asked: string): string => {
  if (url === '') return asked
  const hash = url.indexOf('#')
  return hash < 0 ? url : url.slice(0, hash)
}

export const isEncoded = (headers: Headers): boolean => !/^(identity)?$/i.test(headers.get('content-encoding') ?? '')
export const isStrong = (etag: string): boolean => /^"[^"]*"$/.test(etag)

/** Bytes of a body, if that is said. */
export function lengthOf(headers: Headers): number | undefined {
  const length = headers.get('content-length') ?? ''
  return /^\d+$/.test(length) && Number.isSafeInteger(Number(length)) ? Number(length) : undefined
}

/** Whether an answer, 200, is the file that is known. */
export function isSame({ headers }: Pick<Response, 'headers'>, { etag, parts, cookie }: Entry): boolean {
  return parts && headers.get('etag') === etag && lengthOf(headers) === cookie.size && !isEncoded(headers)
}

/**
 * Whether an answer that says that a file is still good means the one that is known (RFC 9111 §4.3.4: compared weakly).
 */
export function isMeant({ headers }: Response, { etag }: Entry): boolean {
  const other = headers.get('etag')
  return other === null || etag === '' || other.replace(/^W\//, '') === etag.replace(/^W\//, '')
}

/** Headers that ask for a part of a file if it is still the same, otherwise for all of it. */
export function rangeOf({ etag }: Entry, { first, last }: Part): Record<string, string> {
  return { ...identity, range: `bytes=${first}-${last - 1}`, 'if-range': etag }
}

/** Whether an answer is the part that was asked for. */
export function isPart(response: Response, entry: Entry, { first, last }: Part): boolean {
  const { headers } = response
  const length = lengthOf(headers) ?? last - first
  const right = headers.get('etag') === entry.etag && length === last - first && !isEncoded(headers)
  return right && response.body !== null && wrongRange(response, first, last, entry.cookie.size) === undefined
}

/** What is wrong with a whole file, if that can be seen. */
export function wrongLength(headers: Headers, size: number): string | undefined {
  const length = headers.get('content-length')
  return length === null || Number(length) === size ? undefined : `200 with ${length} bytes`
}

/** What is wrong with an answer that is to be a part of a file. */
export function wrongRange(
  { status, statusText, headers }: Response,
  start: number,
  end: number,
  size: number,
): string | undefined {
  const text = headers.get('content-range') ?? ''
  const range = /^bytes (\d+)-(\d+)\/(\d+|\*)$/.exec(text)
  const right =
    status === 206 &&
    range !== null &&
    Number(range[1]) === start &&
    Number(range[2]) === end - 1 &&
    (range[3] === '*' || Number(range[3]) === size)
  return right ? undefined : `${status} ${text || statusText}`
}
