/**
 * The playground's machine: a stack that was composed from a text, and a trace that is played over it, one access after
 * the other.
 *
 * Invariant: every page that is read is compared with what was last written, so that what is shown is a stack that
 * works. What a page holds is made of its number and of how often it was written.
 */
import {
  basePageSize,
  compose,
  GetOutcome,
  type LayerFactory,
  type PageStore,
  type Pool,
  PutOutcome,
  parseStack,
  poolRefusalName,
  putOutcomeName,
  type StatsNode,
  Whereabouts,
} from '@tmem/core'
import { slowMemory } from '@tmem/faults'
import { memoryFactory } from '@tmem/memory'
import { zcacheFactory } from '@tmem/zcache'

/** A place that waits, in the page's memory: a browser has no file to swap to. */
const slowFactory: LayerFactory = {
  name: 'slowMemory',
  summary: 'memory that has to wait, as a disk does',
  options: { size: { kind: 'bytes', summary: 'bytes that it holds', required: true, minimum: basePageSize } },
  create: ({ size }) =>
    slowMemory({ sizeBytes: size as number, turn: () => new Promise((resolve) => setTimeout(resolve, 0)) }),
}

/** The layers that a text may name here. */
export const playgroundFactories: readonly LayerFactory[] = [zcacheFactory, memoryFactory, slowFactory]

/** One access of a trace. */
export interface Access {
  readonly kind: 'write' | 'read' | 'discard'
  readonly page: number
}

/** The most pages that a trace may have. */
export const maxPages = 1024

/** Reads a trace: lines of `w`, `r` or `d` and a page, or of a range `w 0-63`. Throws `RangeError` with the line. */
export function parseTrace(text: string): Access[] {
  const accesses: Access[] = []
  for (const [n, line] of text.split('\n').entries()) {
    if (/^\s*(#.*)?$/.test(line)) continue
    const [, letter, first, last] = /^\s*([wrd])\s+(\d{1,4})(?:-(\d{1,4}))?\s*$/.exec(line) ?? []
    const [from, to] = [Number(first), Number(last ?? first)]
    if (letter === undefined || to < from || to >= maxPages)
      throw new RangeError(`line ${n + 1}: expected w, r or d and a page below ${maxPages}, such as w 7 or r 0-63`)
    const kind = letter === 'w' ? 'write' : letter === 'r' ? 'read' : 'discard'
    for (let page = from; page <= to; page++) accesses.push({ kind, page })
    if (accesses.length > 100_000) throw new RangeError(`line ${n + 1}: a trace has at most 100,000 accesses here`)
  }
  return accesses
}

/** What became of an access. */
export interface Done {
  readonly access: Access
  /** In words: `hit`, `fetched`, `stored`, why it was refused. */
  readonly answer: string
}

/** A stack at work. */
export class Replay {
  readonly names: readonly string[]
  readonly #store: PageStore
  readonly #pool: Pool
  readonly #versions: Uint16Array = new Uint16Array(maxPages)
  readonly #held: Uint8Array = new Uint8Array(maxPages)
  readonly #page: Uint8Array = new Uint8Array(basePageSize)
  readonly #expected: Uint8Array = new Uint8Array(basePageSize)
  readonly #where: Whereabouts = new Whereabouts()
  #woken = false
  done = 0

  private constructor(text: string) {
    const layers = parseStack(text, playgroundFactories)
    this.#store = compose(layers, {
      clock: () => performance.now(),
      wake: () => {
        this.#woken = true
      },
    })
    const pool = this.#store.newPool({ client: 0, persistent: true, shared: false, pageSize: basePageSize })
    if (typeof pool === 'number') throw new RangeError(`this stack keeps no such pages: ${poolRefusalName(pool)}`)
    this.#pool = pool
    this.names = this.#store.usage?.().places.map(({ name }) => name) ?? []
  }

  /** Opens the stack of a text. Rejects with `TmemError` for a text that is wrong. */
  static async open(text: string): Promise<Replay> {
    const replay = new Replay(text)
    await replay.#store.ready?.()
    return replay
  }

  /** Does one access, and what the stack wants to do beside it. Rejects when a page is not what was written. */
  async take(access: Access): Promise<Done> {
    const answer = await this.#answer(access)
    this.done++
    if (this.#woken) {
      this.#woken = false
      this.#store.tick({ pages: 16 })
      // What sinks is under way: its place gets its turn.
      await new Promise((resolve) => setTimeout(resolve, 0))
    }
    return { access, answer }
  }

  async #answer({ kind, page }: Access): Promise<string> {
    if (kind === 'write') {
      const version = (this.#versions[page]! + 1) & 0xffff
      fillPage(this.#page, page, version)
      const outcome = this.#pool.put(0, page, this.#page)
      this.#held[page] = outcome === PutOutcome.Stored ? 1 : 0
      this.#versions[page] = version
      return outcome === PutOutcome.Stored ? 'stored' : `refused: ${putOutcomeName(outcome)}`
    }
    if (kind === 'discard') {
      this.#pool.flushPage(0, page)
      this.#held[page] = 0
      return 'flushed'
    }
    let outcome: GetOutcome = this.#pool.get(0, page, this.#page)
    const waited = outcome === GetOutcome.Deferred
    if (waited) outcome = await this.#pool.fetch(0, page, this.#page)
    if (outcome !== GetOutcome.Hit) {
      if (this.#held[page] === 1) throw new Error(`page ${page} was stored, and is gone`)
      return 'miss'
    }
    fillPage(this.#expected, page, this.#versions[page]!)
    for (let at = 0; at < basePageSize; at++)
      if (this.#page[at] !== this.#expected[at]) throw new Error(`page ${page} is wrong at byte ${at}`)
    return waited ? 'fetched' : 'hit'
  }

  /** The place of a page: 0 the directory, then the places from the top; -1: it is nowhere. */
  placeOf(page: number): number {
    return this.#pool.whereIs?.(0, page, this.#where) === true ? this.#where.place + 1 : -1
  }

  stats(): StatsNode {
    return this.#store.stats()
  }

  close(): Promise<void> {
    return this.#store.close()
  }
}

/** A page as programs have them: of every eight one repeats a word, one does not shrink, and the others do. */
function fillPage(into: Uint8Array, page: number, version: number): void {
  const seed = Math.imul(page + 1, 0x9e3779b1) ^ Math.imul(version, 0x85ebca6b)
  if (page % 8 === 7) {
    into.fill(version & 0xff)
    return
  }
  let state = seed >>> 0 || 1
  const isRandom = page % 8 === 3
  for (let at = 0; at < into.length; at++) {
    if (isRandom || at % 64 < 16) {
      state ^= state << 13
      state ^= state >>> 17
      state ^= state << 5
    }
    into[at] = isRandom ? state & 0xff : 97 + ((state >>> (at % 24)) & 15)
  }
}
