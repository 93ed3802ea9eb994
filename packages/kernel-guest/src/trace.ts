/**
 * Traces of the hooks of a guest's kernel, in order: calls of frontswap and cleancache, and the callbacks of an MMU
 * notifier on the address spaces of programs that asked for it (`/dev/tmem_trace` of the module). And their check
 * against the rules of the models: those of @tmem/mmu-notifier are replayed, callback by callback; the few of frontswap
 * and cleancache are in this file.
 *
 * A trace is a head of 16 bytes, then events of 32 bytes: time in nanoseconds, two numbers (a page: swap area and
 * offset, or a file's key, folded, and its index; a range: its first byte and its end), what it is, and a detail (an
 * answer, or a kind of range), whose program or which pool.
 *
 * Source: tmem_guest.c; mm/mmu_notifier.c and include/linux/mmu_notifier.h of 5.10.
 */
import {
  addClient,
  changePte,
  clearFlushYoung,
  createNotifiers,
  invalidateRangeEnd,
  invalidateRangeStart,
  type NotifierWorld,
  RANGES_ONLY,
  register,
  releaseMm,
} from '@tmem/mmu-notifier'
import { createMachine, createSpace, RuleViolation } from '@tmem/vm-mixedmap'

const magic = 'tmem trace 1\n\0\0\0'
/** Bytes of an event. */
export const traceEventBytes: number = 32
/** Programs that are watched at once or one after the other, in a trace that is checked. */
const maxSpaces = 4096

/** What a trace begins with. */
export const traceHead: Uint8Array = new TextEncoder().encode(magic)

/** Kinds of events, by number. */
const Kind = {
  store: 1,
  load: 2,
  invalidate: 3,
  area: 4,
  cleanPut: 5,
  cleanGet: 6,
  cleanInvalidate: 7,
  cleanInode: 8,
  cleanFs: 9,
  register: 16,
  start: 17,
  end: 18,
  range: 19,
  changePte: 20,
  young: 21,
  release: 22,
} as const
const names: ReadonlyMap<number, string> = new Map(Object.entries(Kind).map(([name, number]) => [number, name]))

/** Something that the rules forbid. */
export interface Contradiction {
  /** Number of the event in the trace, from 0. */
  readonly event: number
  /** A short stable name. */
  readonly rule: string
  readonly message: string
}

/** What is in a trace. */
export interface TraceReport {
  readonly events: number
  readonly seconds: number
  /** Events by kind. */
  readonly kinds: Readonly<Record<string, number>>
  /** Ranges of one page, and of more. */
  readonly singlePages: number
  readonly ranges: number
  /** Calls of hooks, as they were (a start and an end for each range), and with one for a single page, as in `#v13`. */
  readonly hooks: number
  readonly hooksWithPages: number
  /** The first 100. */
  readonly contradictions: readonly Contradiction[]
}

const pageBytes = 4096
const maxContradictions = 100

/** Reads and checks a trace. Throws `RangeError` for bytes that are none. */
export function checkTrace(bytes: Uint8Array): TraceReport {
  if (Buffer.from(bytes.subarray(0, magic.length)).toString('latin1') !== magic)
    throw new RangeError('it is no trace: it does not begin as one')
  if ((bytes.length - magic.length) % traceEventBytes !== 0)
    throw new RangeError(`the trace is cut off in event ${Math.floor((bytes.length - magic.length) / traceEventBytes)}`)
  return new Checking(bytes).run()
}

/** An address space that is watched. */
interface Watched {
  readonly mm: number
  /** Ranges between their start and their end, by first byte and end. */
  readonly active: (readonly [first: number, end: number])[]
}

class Checking {
  readonly #view: DataView
  readonly #events: number
  readonly #kinds: Record<string, number> = {}
  readonly #contradictions: Contradiction[] = []
  /** Swap slots that the host has, by area and offset. */
  readonly #stored = new Set<number>()
  /** Pages of files that the host may have, by pool and file. */
  readonly #put = new Map<string, Set<number>>()
  readonly #world: NotifierWorld
  readonly #watched = new Map<number, Watched>()
  #singlePages = 0
  #ranges = 0

  constructor(bytes: Uint8Array) {
    this.#view = new DataView(bytes.buffer, bytes.byteOffset + magic.length, bytes.length - magic.length)
    this.#events = this.#view.byteLength / traceEventBytes
    const machine = createMachine({ memory: { kind: 'flat', frames: 1 }, frames: 1, pteSpecial: true })
    const registrations = Array.from({ length: this.#events }, (_, n) => n).filter(
      (n) => this.#kind(n) === Kind.register,
    )
    if (registrations.length > maxSpaces)
      throw new RangeError(`the trace has ${registrations.length} programs, more than ${maxSpaces}`)
    for (const _ of registrations) createSpace(machine)
    this.#world = { machine, notifiers: createNotifiers(machine, RANGES_ONLY) }
  }

  #kind(event: number): number {
    return this.#view.getUint16(event * traceEventBytes + 24, true)
  }

  #number(event: number, at: number): number {
    return Number(this.#view.getBigUint64(event * traceEventBytes + at, true))
  }

  run(): TraceReport {
    for (let event = 0; event < this.#events; event++) {
      const kind = this.#kind(event)
      const name = names.get(kind) ?? 'unknown'
      this.#kinds[name] = (this.#kinds[name] ?? 0) + 1
      try {
        this.#replay(event, kind)
      } catch (error) {
        if (error instanceof RuleViolation) this.#found(event, error.rule, error.message)
        else if (error instanceof RangeError) this.#found(event, 'cannot-be', error.message)
        else throw error
      }
    }
    for (const [who, { active }] of this.#watched)
      if (active.length > 0) this.#found(this.#events, 'start-and-end-are-paired', `program ${who} has an open range`)
    const last = Math.max(0, this.#events - 1)
    const pairs = this.#singlePages + this.#ranges
    return {
      events: this.#events,
      seconds: this.#events === 0 ? 0 : (this.#number(last, 0) - this.#number(0, 0)) / 1e9,
      kinds: this.#kinds,
      singlePages: this.#singlePages,
      ranges: this.#ranges,
      hooks: 2 * pairs,
      hooksWithPages: this.#singlePages + 2 * this.#ranges,
      contradictions: this.#contradictions,
    }
  }

  #found(event: number, rule: string, message: string): void {
    if (this.#contradictions.length < maxContradictions) this.#contradictions.push({ event, rule, message })
  }

  #replay(event: number, kind: number): void {
    const first = this.#number(event, 8)
    const end = this.#number(event, 16)
    const who = this.#view.getUint32(event * traceEventBytes + 28, true)
    if (kind >= Kind.cleanPut && kind <= Kind.cleanFs) this.#cleancache(event, kind, end, who)
    else if (kind < Kind.register) this.#frontswap(event, kind, first, end)
    else if (kind === Kind.register) this.#register(who)
    else this.#notified(kind, this.#watch(who), first, end, who)
  }

  #frontswap(event: number, kind: number, area: number, offset: number): void {
    const slot = area * 2 ** 40 + offset
    const isThere = this.#stored.has(slot)
    switch (kind) {
      case Kind.store:
        // A page that is refused leaves none under its name.
        if (this.#view.getInt16(event * traceEventBytes + 26, true) === 1) this.#stored.add(slot)
        else this.#stored.delete(slot)
        return
      case Kind.load:
        if (!isThere) throw new RuleViolation('load-needs-store', `slot ${offset} of area ${area} was not stored`)
        return
      case Kind.invalidate:
        if (!isThere) throw new RuleViolation('invalidate-needs-store', `slot ${offset} of area ${area} was not stored`)
        this.#stored.delete(slot)
        return
      case Kind.area:
        for (const one of this.#stored) if (Math.floor(one / 2 ** 40) === area) this.#stored.delete(one)
        return
    }
    throw new RangeError(`there is no event of kind ${kind}`)
  }

  /** A file's key is told from others in all its bits: as a number it would lose some. */
  #cleancache(event: number, kind: number, index: number, pool: number): void {
    const file = `${pool} ${this.#view.getBigUint64(event * traceEventBytes + 8, true)}`
    const pages = this.#put.get(file)
    switch (kind) {
      case Kind.cleanPut:
        if (pages === undefined) this.#put.set(file, new Set([index]))
        else pages.add(index)
        return
      case Kind.cleanGet:
        if (this.#view.getInt16(event * traceEventBytes + 26, true) === 1 && pages?.has(index) !== true)
          throw new RuleViolation('hit-needs-put', `page ${index} of file ${file} was not put, and is there`)
        return
      case Kind.cleanInvalidate:
        pages?.delete(index)
        return
      case Kind.cleanInode:
        this.#put.delete(file)
        return
      case Kind.cleanFs:
        for (const one of this.#put.keys()) if (one.startsWith(`${pool} `)) this.#put.delete(one)
        return
    }
  }

  #register(who: number): void {
    if (this.#watched.has(who)) throw new RuleViolation('register-once', `program ${who} is registered twice`)
    const mm = this.#watched.size
    const client = addClient(this.#world, 'kvm', mm, `program ${who}`)
    register(this.#world, client)
    this.#watched.set(who, { mm, active: [] })
  }

  #watch(who: number): Watched {
    const watched = this.#watched.get(who)
    if (watched === undefined)
      throw new RuleViolation('callback-needs-registration', `program ${who} is not registered`)
    return watched
  }

  #notified(kind: number, { mm, active }: Watched, first: number, end: number, who: number): void {
    if (this.#world.notifiers.mms[mm]!.users === 0)
      throw new RuleViolation('no-callback-after-release', `program ${who} was released, and is called back`)
    const pages = [Math.floor(first / pageBytes), Math.ceil(end / pageBytes)] as const
    switch (kind) {
      case Kind.start:
        invalidateRangeStart(this.#world, mm, ...pages)
        active.push([first, end])
        if (pages[1] - pages[0] === 1) this.#singlePages++
        else this.#ranges++
        return
      case Kind.end: {
        const open = active.findIndex(([from, to]) => from === first && to === end)
        if (open < 0) throw new RuleViolation('start-and-end-are-paired', `program ${who}: an end without its start`)
        active.splice(open, 1)
        invalidateRangeEnd(this.#world, mm, ...pages)
        return
      }
      case Kind.range:
        if (!active.some(([from, to]) => from <= first && end <= to))
          throw new RuleViolation('range-within-start-and-end', `program ${who}: flushed outside of any range`)
        return
      case Kind.changePte:
        changePte(this.#world, mm, pages[0], 0)
        return
      case Kind.young:
        clearFlushYoung(this.#world, mm, pages[0])
        return
      case Kind.release:
        releaseMm(this.#world, mm)
        return
    }
    throw new RangeError(`there is no event of kind ${kind}`)
  }
}
