/**
 * The host's side of a guest whose kernel has the module of this package: a `XenHost` does the hypercalls that come
 * through a ring in the guest's memory, in order, one at a time.
 *
 * The guest rings a doorbell (a byte in a socket of QEMU) only while the host sleeps. After work the host polls for a
 * moment, because waking a process takes longer than most calls, and sleeps once the guest pauses.
 *
 * Invariants:
 *  - Everything that the guest writes is checked: an impossible ring is an error and ends the attachment. The `XenHost`
 *    checks numbers and frames in calls.
 *  - An entry counts as answered (`tail`) once all its effects are done. The next host after a dead one goes on at
 *    `tail`.
 *  - After `detach`, the guest's memory is not written.
 *
 * Source of the ring: tmem_guest.c, which lies beside this file.
 */
import { once } from 'node:events'
import { connect, type Socket } from 'node:net'
import { setTimeout } from 'node:timers/promises'
import { checkOptions, type OptionNames, TmemError } from '@tmem/core'
import {
  Command,
  Errno,
  GuestMemory,
  operationLayouts,
  pageBytes,
  readField,
  readObject,
  restoreDomain,
  type XenHost,
} from '@tmem/xen-hypercall'
import { mapGuestMemory } from './mapping.ts'
import type { SavedPages } from './saved-pages.ts'
import { traceEventBytes } from './trace.ts'

/** Options of attaching a guest. */
export interface AttachOptions {
  /** Does the calls. The domain is added to it, unless it is there already (restored, or moved here). */
  readonly host: XenHost
  /** Number of the domain: 0 to 32,751. */
  readonly domain: number
  /** The file that is the guest's memory: `GuestOptions.memoryFile` of @tmem/guest. */
  readonly memory: string
  /** The socket of its doorbell: `GuestOptions.doorbell` of @tmem/guest. */
  readonly doorbell: string
  /** Where pages are kept, too, so that they outlive this process. */
  readonly saved?: SavedPages
  /** The doorbell may be missing still, and is waited for until this aborts (default: it must be there). */
  readonly signal?: AbortSignal
  /**
   * How long this side looks for the next call before it sleeps, in microseconds: 0 to 10,000 (default 50). It takes
   * its processor all that time.
   */
  readonly lookMicroseconds?: number
  /** Told what a guest that traces has recorded: whole events, as `checkTrace` reads them. */
  readonly onEvents?: (events: Uint8Array) => void
}

const optionNames: OptionNames<AttachOptions> = {
  host: 'object',
  domain: 'number',
  memory: 'text',
  doorbell: 'text',
  saved: 'object?',
  signal: 'object?',
  onEvents: 'function?',
  lookMicroseconds: 'number?',
}

/** Counters of the calls of a guest. */
export interface AttachCounters {
  /** NEW_POOL and DESTROY_POOL. */
  pools: number
  puts: number
  gets: number
  page_flushes: number
  object_flushes: number
  /** Other commands. */
  others: number
  /** Answers below 1. */
  refused: number
  /** Calls for which the store had to wait for a disk or another machine. */
  waited: number
  /** Bells that were heard. */
  bells: number
  /** Microseconds in calls, waiting included. */
  busyMicroseconds: number
}

/** By bytes: of the ring, from its start. */
const ring = {
  magic: 0,
  version: 8,
  entries: 12,
  head: 16,
  tail: 64,
  awake: 68,
  first: pageBytes,
  entry: 64,
  result: 56,
}
const magic = 'tmemring'
const version = 1
/** Where it says that it lies: `T`, the number of its first frame in hex, a new line. */
const place = /T([\da-f]{8})\n/g
/** A command that is none of Xen's: a frame with so many events. */
const traceCommand = 0x74726163
/** Longest time without a turn for others, in milliseconds. */
const turnMs = 2
const defaultLookMicroseconds = 50

/**
 * Maps the guest's memory and connects to its doorbell. The guest may be booting still: it is served when its module
 * says where its ring is. Rejects with `TmemError` (`TMEM_IO`, `TMEM_UNSUPPORTED`) when that cannot be done; throws
 * `TypeError` or `RangeError` for options that make no sense.
 */
export async function attachGuest(options: AttachOptions): Promise<AttachedGuest> {
  checkOptions('attachGuest', options, optionNames)
  const { host, domain, lookMicroseconds = defaultLookMicroseconds } = options
  if (!(lookMicroseconds >= 0 && lookMicroseconds <= 10_000))
    throw new RangeError(`attachGuest: lookMicroseconds must be from 0 to 10000, got ${lookMicroseconds}`)
  if (options.saved !== undefined && host.hasDomain(domain))
    throw new RangeError(`attachGuest: domain ${domain} is there already, with pages that are not in the file`)
  const socket = await connected(options.doorbell, options.signal)
  let memory: GuestMemory
  let restoredPages = 0
  let isAdded = false
  try {
    memory = new GuestMemory(mapGuestMemory(options.memory), undefined, true)
    if (host.hasDomain(domain)) host.domain(domain).memory = memory
    else {
      host.addDomain({ id: domain, memory })
      isAdded = true
      if (options.saved !== undefined) {
        const restored = await restoreDomain(host, domain, options.saved.stream())
        restoredPages = restored.pages
      }
    }
  } catch (error) {
    socket.destroy()
    if (isAdded) host.killDomain(domain)
    throw error
  }
  return new AttachedGuest(options, memory, socket, lookMicroseconds, restoredPages)
}

async function connected(path: string, signal: AbortSignal | undefined): Promise<Socket> {
  for (;;) {
    const socket = connect(path)
    try {
      await once(socket, 'connect')
      // QEMU that is killed resets the connection: its end is told by `close`.
      socket.on('error', () => socket.destroy())
      return socket
    } catch (error) {
      socket.destroy()
      if (signal?.aborted === false) {
        await setTimeout(20)
        continue
      }
      const message = `no guest has its doorbell at ${path}: ${(error as Error).message}`
      throw new TmemError('TMEM_IO', message, { layer: 'kernel-guest', cause: error })
    }
  }
}

interface Settle {
  resolve(): void
  reject(error: Error): void
}

/** A guest whose calls are answered here. */
export class AttachedGuest {
  readonly counters: AttachCounters = {
    pools: 0,
    puts: 0,
    gets: 0,
    page_flushes: 0,
    object_flushes: 0,
    others: 0,
    refused: 0,
    waited: 0,
    bells: 0,
    busyMicroseconds: 0,
  }
  /**
   * Resolves when the guest has gone or was detached. Rejects with `TmemError` when its ring cannot be, or the store
   * has stopped.
   */
  readonly ended: Promise<void>
  /** Pages that came from `saved`. */
  readonly restoredPages: number
  readonly #host: XenHost
  readonly #domain: number
  readonly #saved: SavedPages | undefined
  readonly #onEvents: ((events: Uint8Array) => void) | undefined
  readonly #lookMs: number
  readonly #memory: GuestMemory
  readonly #words: Int32Array
  readonly #view: DataView
  readonly #socket: Socket
  /** What of a line has been heard. */
  #heard = ''
  /** First byte of the ring, and its entries less one; -1: not known yet. */
  #ring = -1
  #mask = 0
  /** Somebody is in `#serve`, or will be: a call that waits, or the next turn. */
  #isServing = false
  #isPaused = false
  #isDetached = false
  /** Told when the entry under way is done. */
  #whenIdle: (() => void)[] = []
  readonly #settle: Settle

  /** @internal */
  constructor(
    options: AttachOptions,
    memory: GuestMemory,
    socket: Socket,
    lookMicroseconds: number,
    restoredPages: number,
  ) {
    const { bytes } = memory
    this.restoredPages = restoredPages
    this.#host = options.host
    this.#domain = options.domain
    this.#saved = options.saved
    this.#onEvents = options.onEvents
    this.#lookMs = lookMicroseconds / 1000
    this.#memory = memory
    this.#words = new Int32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
    this.#socket = socket
    let settle: Settle | undefined
    this.ended = new Promise((resolve, reject) => {
      settle = { resolve, reject }
    })
    this.#settle = settle!
    socket.on('data', (heard: Buffer) => this.#hear(heard))
    socket.on('close', () => {
      this.#isDetached = true
      this.#idle()
      this.#settle.resolve()
    })
  }

  /** Stops between two calls; the guest waits. What it resolves to lets it go on. */
  async pause(): Promise<() => void> {
    this.#isPaused = true
    if (this.#isServing) await new Promise<void>((resolve) => this.#whenIdle.push(resolve))
    return () => {
      this.#isPaused = false
      this.#serve()
    }
  }

  /**
   * Ends it between two calls; the guest waits for another host then, and panics when none comes in time. Its domain
   * stays.
   */
  async detach(): Promise<void> {
    await this.pause()
    this.#isDetached = true
    // Whoever comes next is woken by a bell.
    if (this.#ring >= 0) Atomics.store(this.#words, (this.#ring + ring.awake) / 4, 0)
    this.#socket.destroy()
    await this.ended
  }

  #hear(heard: Buffer): void {
    for (const byte of heard) if (byte === 0x21 || byte === 0x0a) this.counters.bells++
    if (this.#ring < 0) {
      this.#heard += heard.toString('latin1')
      const found = [...this.#heard.matchAll(place)].at(-1)?.[1]
      // Half of a line may have come.
      this.#heard = this.#heard.slice(-10)
      if (found === undefined) return
      const mistake = this.#take(Number.parseInt(found, 16) * pageBytes)
      if (mistake !== undefined) {
        this.#fail(new TmemError('TMEM_BROKEN', `the guest's ring ${mistake}`, { layer: 'kernel-guest' }))
        return
      }
    }
    this.#serve()
  }

  /** Looks at a ring; what is wrong with it, or `undefined`. */
  #take(at: number): string | undefined {
    const { bytes } = this.#memory
    if (at + 4 * pageBytes > bytes.length) return `lies at ${at}, outside of its memory`
    if (Buffer.from(bytes.slice(at, at + magic.length)).toString('latin1') !== magic) return `at ${at} has another mark`
    const word = (field: number): number => this.#words[(at + field) / 4]!
    if (word(ring.version) !== version) return `is of version ${word(ring.version)}, not ${version}`
    if (word(ring.entries) !== pageBytes / ring.entry) return `has ${word(ring.entries)} entries`
    this.#ring = at
    this.#mask = word(ring.entries) - 1
    return undefined
  }

  #fail(error: Error): void {
    this.#isDetached = true
    this.#settle.reject(error)
    this.#socket.destroy()
    this.#idle()
  }

  #idle(): void {
    this.#isServing = false
    for (const told of this.#whenIdle.splice(0)) told()
  }

  /** Answers what was asked, until there is nothing more, or others must have their turn. */
  #serve(): void {
    if (this.#isServing || this.#isPaused || this.#isDetached || this.#ring < 0) return
    this.#isServing = true
    try {
      this.#turn()
    } catch (error) {
      this.#fail(error as Error)
    }
  }

  #turn(): void {
    const words = this.#words
    const awake = (this.#ring + ring.awake) / 4
    const head = (this.#ring + ring.head) / 4
    const tail = (this.#ring + ring.tail) / 4
    const begun = performance.now()
    let last = begun
    Atomics.store(words, awake, 1)
    for (;;) {
      if (this.#isPaused || this.#isDetached) break
      const asked = (Atomics.load(words, head) - words[tail]!) | 0
      if (asked < 0 || asked > this.#mask + 1)
        throw new TmemError('TMEM_BROKEN', `the guest's ring has ${asked} entries`, { layer: 'kernel-guest' })
      if (asked > 0) {
        if (this.#call(words[tail]!)) {
          last = performance.now()
          if (last - begun < turnMs) continue
          // What is asked meanwhile needs no bell: the next turn looks.
          setImmediate(() => this.#again())
        }
        return
      }
      if (performance.now() - last < this.#lookMs) continue
      Atomics.store(words, awake, 0)
      // The guest asks, and then looks whether a bell is needed.
      if (Atomics.load(words, head) === words[tail]!) break
      Atomics.store(words, awake, 1)
    }
    if (!this.#isDetached) Atomics.store(words, awake, 0)
    this.#idle()
  }

  #again(): void {
    this.#isServing = false
    if (this.#isPaused || this.#isDetached) this.#idle()
    else this.#serve()
  }

  /** Does an entry; false: its answer comes later, and then it goes on. */
  #call(position: number): boolean {
    const at = this.#ring + ring.first + (position & this.#mask) * ring.entry
    const begun = performance.now()
    const isTrace = this.#words[at / 4] === traceCommand
    const answer = isTrace ? this.#events(at) : this.#host.call(this.#domain, at)
    if (typeof answer === 'number') {
      this.#answered(position, at, answer, begun)
      return true
    }
    this.counters.waited++
    answer
      .then((late) => {
        if (!this.#isDetached) this.#answered(position, at, late, begun)
        this.#again()
      })
      .catch((error: Error) => this.#fail(error))
    return false
  }

  #events(at: number): number {
    const { gen } = operationLayouts(this.#host.release, 64)
    const view = new DataView(this.#view.buffer, this.#view.byteOffset + at, ring.result)
    const frame = this.#memory.frame(readField(view, gen.fields.cmfn))
    const bytes = readField(view, gen.fields.index) * traceEventBytes
    if (frame === undefined || bytes > pageBytes) return -Errno.EFAULT
    this.#onEvents?.(frame.slice(0, bytes))
    return 1
  }

  #answered(position: number, at: number, answer: number, begun: number): void {
    const command = this.#words[at / 4]!
    const result = this.#saved === undefined ? answer : this.#keep(this.#saved, command, at, answer)
    this.#words[(at + ring.result) / 4] = result
    this.#count(command, result)
    this.counters.busyMicroseconds += (performance.now() - begun) * 1000
    // The guest may read the answer from here on.
    Atomics.store(this.#words, (this.#ring + ring.tail) / 4, (position + 1) | 0)
  }

  /** Does with the saved pages what was done; the answer, which a page that cannot be saved changes. */
  #keep(saved: SavedPages, command: number, at: number, answer: number): number {
    const pool = this.#words[at / 4 + 1]!
    const view = new DataView(this.#view.buffer, this.#view.byteOffset + at, ring.result)
    const { creat, gen } = operationLayouts(this.#host.release, 64)
    if (command === Command.NewPool) {
      if (answer >= 0) saved.newPool(answer, readField(view, creat.fields.flags))
      return answer
    }
    if (command === Command.DestroyPool) {
      if (answer === 1) saved.destroyPool(pool)
      return answer
    }
    const object = readObject(view, gen.fields.oid)
    const index = readField(view, gen.fields.index)
    if (command === Command.FlushObject) saved.flushObject(pool, object)
    else if (command === Command.FlushPage) saved.flushPage(pool, object, index)
    else if (command === Command.PutPage) {
      if (answer !== 1) saved.flushPage(pool, object, index)
      else if (!saved.put(pool, object, index, this.#memory.frame(readField(view, gen.fields.cmfn))!)) {
        const client = this.#host.clients.get(this.#domain)!
        this.#host.flushPage(client.slots[pool]!, object, index)
        return -Errno.ENOMEM
      }
    }
    return answer
  }

  #count(command: number, answer: number): void {
    const { counters } = this
    if (answer < 1 && command !== Command.NewPool) counters.refused++
    switch (command) {
      case Command.NewPool:
      case Command.DestroyPool:
        counters.pools++
        break
      case Command.PutPage:
        counters.puts++
        break
      case Command.GetPage:
        counters.gets++
        break
      case Command.FlushPage:
        counters.page_flushes++
        break
      case Command.FlushObject:
        counters.object_flushes++
        break
      default:
        counters.others++
    }
  }
}
