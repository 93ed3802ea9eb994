/**
 * Pages that are moved because somebody asks for it: zram's writeback and recompression, and virtswap's recall.
 *
 * A device knows which of its pages are idle, its stack which do not shrink and where each is. So the slots are gone
 * through here, and those that match are handed to the stack, some at a time. Requests have their turn in between, and
 * what they change is the stack's to see.
 *
 * One move after the other: two at once would not keep to one limit.
 *
 * Source: zram's documentation (writeback, idle, recompress), virtswap's callback to a guest (December 2009).
 */
import { type ByteAmount, bytesOf, checkOptions, type PlaceUsage, TmemError, Whereabouts } from '@tmem/core'
import type { Slots } from './slots.ts'
import { closedError, type DeviceStack, object, pageError } from './stack.ts'

/** Which pages `recompress` and `writeback` look at. */
export type PageKind = 'huge' | 'idle' | 'huge_idle' | 'incompressible'

/** The page of one slot, or those of all slots up to a last one. */
interface SlotsRequest {
  readonly pageIndex: number
  readonly lastPageIndex?: number
}

/** What `writeback` moves: all pages of a kind, or those of some slots. */
export type WritebackRequest = PageKind | SlotsRequest

/** What `recompress` tries. */
export interface RecompressRequest {
  /** Default: all pages in memory. `incompressible` pages are never tried again. */
  readonly type?: Exclude<PageKind, 'incompressible'>
  /** Only pages that take at least so many bytes (default 0). */
  readonly thresholdBytes?: ByteAmount
  /** At most so many pages are tried (default: all). */
  readonly maxPages?: number
}

const pageKinds: ReadonlySet<string> = new Set<PageKind>(['huge', 'idle', 'huge_idle', 'incompressible'])

/** Slots, the last included. */
interface Range {
  readonly first: number
  readonly last: number
}

/** Pages handed to the stack at once, and slots looked at before requests have their turn. */
const sinkingPages = 64
const recompressedPages = 16
const looksPerTurn = 4096

export class Moves {
  /** Pages that `writeback` may still move; `undefined`: any number. */
  limit: number | undefined
  writtenBack = 0
  recalled = 0
  recallFailed = 0
  readonly #name: string
  readonly #slots: Slots
  readonly #stack: DeviceStack
  readonly #isClosed: () => boolean
  /** From the top. */
  readonly #places: readonly PlaceUsage[]
  readonly #where = new Whereabouts()
  readonly #indexes = new Uint32Array(sinkingPages)
  #turn: Promise<unknown> = Promise.resolve()

  constructor(name: string, slots: Slots, stack: DeviceStack, isClosed: () => boolean) {
    this.#name = name
    this.#slots = slots
    this.#stack = stack
    this.#isClosed = isClosed
    this.#places = stack.store.usage().places
  }

  reset(): void {
    this.writtenBack = this.recalled = this.recallFailed = 0
  }

  /** See `Ramzswap.writeback`. */
  async writeback(request: WritebackRequest, maxPages: number): Promise<number> {
    if (typeof request !== 'string' || !pageKinds.has(request))
      checkOptions('writeback', request as SlotsRequest, { pageIndex: 'number', lastPageIndex: 'number?' })
    const { size } = this.#slots
    if (!this.#places.some(({ waits }) => waits)) throw this.#unsupported('writeback needs a backing store')
    let range: Range | undefined
    if (typeof request === 'object') {
      const { pageIndex: first, lastPageIndex: last = first } = request
      for (const index of [first, last])
        if (!(Number.isInteger(index) && index >= 0 && index < size))
          throw new RangeError(`${this.#name} has no page ${index}`)
      if (last < first) throw new RangeError(`the pages ${first} to ${last} are none: the first is behind the last`)
      range = { first, last }
    }
    let moved = 0
    const room = (): number => Math.min(maxPages - moved, this.limit ?? Number.POSITIVE_INFINITY)
    const matches = (slot: number, where: Whereabouts): boolean =>
      this.#isOwn(where) && (typeof request === 'object' || this.#isKind(slot, where, request))
    await this.#walk(sinkingPages, room, matches, range, async (count) => {
      const { pages, failure } = await this.#stack.pool.sink(object, this.#indexes, count, true)
      moved += pages
      this.writtenBack += pages
      // It may have been changed while the pages were written.
      if (this.limit !== undefined) this.limit = Math.max(0, this.limit - pages)
      if (failure !== undefined)
        throw pageError(
          this.#name,
          'write back',
          this.#indexes[0]!,
          `the backing store failed: ${failure.message}`,
          failure,
        )
      return true
    })
    return moved
  }

  /** See `Ramzswap.recompress`. */
  async recompress(request: RecompressRequest): Promise<number> {
    checkOptions('recompress', request, { type: 'text?', thresholdBytes: 'bytes?', maxPages: 'number?' })
    const { type, maxPages = Number.POSITIVE_INFINITY } = request
    const thresholdBytes = bytesOf('recompress', 'thresholdBytes', request.thresholdBytes ?? 0)
    if (!this.#places.some(({ recompresses }) => recompresses))
      throw this.#unsupported('recompress needs a place with a codec for it, e.g. zcache(limit=64MiB,recompress=zstd)')
    let tried = 0
    let smaller = 0
    const matches = (slot: number, where: Whereabouts): boolean =>
      this.#isOwn(where) &&
      this.#places[where.place]!.recompresses &&
      !where.recompressed &&
      !where.incompressible &&
      where.bytes >= thresholdBytes &&
      (type === undefined || this.#isKind(slot, where, type))
    await this.#walk(
      recompressedPages,
      () => maxPages - tried,
      matches,
      undefined,
      async (count) => {
        tried += count
        smaller += this.#stack.pool.recompress(object, this.#indexes, count)
        return true
      },
    )
    return smaller
  }

  /** See `Ramzswap.recall`. */
  async recall(maxPages: number): Promise<number> {
    let moved = 0
    const matches = (_slot: number, where: Whereabouts): boolean =>
      where.place >= 0 && this.#places[where.place]!.foreign
    await this.#walk(
      sinkingPages,
      () => maxPages - moved,
      matches,
      undefined,
      async (count) => {
        const { pages } = await this.#stack.pool.sink(object, this.#indexes, count, false)
        moved += pages
        this.recalled += pages
        this.recallFailed += count - pages
        // Those that nobody here takes stay where they are, and so would the others.
        return pages === count
      },
    )
    return moved
  }

  #isOwn({ place }: Whereabouts): boolean {
    return place >= 0 && !this.#places[place]!.waits && !this.#places[place]!.foreign
  }

  #isKind(slot: number, where: Whereabouts, kind: PageKind): boolean {
    switch (kind) {
      case 'huge':
        return where.huge
      case 'idle':
        return this.#slots.isIdle(slot)
      case 'huge_idle':
        return where.huge && this.#slots.isIdle(slot)
      case 'incompressible':
        return where.incompressible
    }
  }

  /**
   * Goes through all slots (or those of a range) and calls `work` with the number of those in `#indexes` that match: at
   * most `most`, and as many as there is `room` for; until it answers false.
   */
  async #walk(
    most: number,
    room: () => number,
    matches: (slot: number, where: Whereabouts) => boolean,
    range: Range | undefined,
    work: (count: number) => Promise<boolean>,
  ): Promise<void> {
    const walk = this.#turn.then(() => this.#walkAlone(most, room, matches, range, work))
    // How one ends is told to who asked for it, and is nothing to the next.
    this.#turn = walk.catch(() => undefined)
    await walk
  }

  async #walkAlone(
    most: number,
    room: () => number,
    matches: (slot: number, where: Whereabouts) => boolean,
    range: Range | undefined,
    work: (count: number) => Promise<boolean>,
  ): Promise<void> {
    const slots = this.#slots
    const { pool } = this.#stack
    const end = (): number => (range === undefined ? slots.size : Math.min(slots.size, range.last + 1))
    for (let slot = range?.first ?? 0; slot < end(); ) {
      if (this.#isClosed()) throw closedError(this.#name)
      const wanted = Math.min(most, room())
      if (wanted <= 0) return
      let count = 0
      for (let looks = 0; slot < end() && count < wanted && looks < looksPerTurn; looks++, slot++)
        if (slots.holds(slot) && pool.whereIs(object, slot, this.#where) && matches(slot, this.#where))
          this.#indexes[count++] = slot
      if (count > 0 && !(await work(count))) return
      await new Promise((resolve) => setImmediate(resolve))
    }
    if (this.#isClosed()) throw closedError(this.#name)
  }

  #unsupported(reason: string): TmemError {
    return new TmemError('TMEM_UNSUPPORTED', `device ${this.#name}: ${reason}`, { layer: this.#name })
  }
}
