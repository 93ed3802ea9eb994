/**
 * One machine of the demo: a number of frames, and a store for the pages that find no frame.
 *
 * The time of a machine is the time of its stream: it writes every page, in order, and then does one reference after
 * the other. A read compares all bytes of the page with what was last written. A write replaces the page by another
 * page of the input, so that one number for each page says what it must hold. Afterwards, outside of the measured time,
 * the machine reads and compares every page once more.
 */
import { setImmediate } from 'node:timers/promises'
import { basePageSize, type PageStore } from '@tmem/core'
import { Swapper } from '@tmem/swapper'
import { Failed, throwIfInterrupted } from '../ending.ts'
import type { Terminal } from '../terminal.ts'
import type { Input } from './input.ts'
import { writeBit } from './workload.ts'

/** The parts of a machine, and its work. */
export interface MachineOptions {
  readonly name: string
  /** Frames of memory, in pages of 4 KiB. */
  readonly frames: number
  /** The store for pages without a frame. The caller closes it. */
  readonly store: PageStore
  /** Whether the store has asked for background work since the last call. */
  readonly isWoken: () => boolean
  readonly input: Input
  /** Page numbers; writes have `writeBit` set. */
  readonly stream: Uint32Array
  /** Called with the state of the machine, again and again until the end of the stream. */
  readonly onLook?: (look: MachineLook) => void
}

/** The state of a machine in the middle of its work. */
export interface MachineLook {
  readonly seconds: number
  /** Part of the first writes and of the stream that is done, 0 to 1. */
  readonly done: number
  readonly swapOuts: number
  readonly swapIns: number
  /** Frames that hold a page. */
  readonly usedFrames: number
}

/** The work that a machine did. */
export interface MachineRun {
  readonly seconds: number
  readonly swapOuts: number
  readonly swapIns: number
  /** Pages that were compared with what was last written; all were right. */
  readonly comparedPages: number
}

/** References between two looks at the signal and the clock, and pages of background work at a time. */
const chunk = 4096
const backgroundPages = 128
/** Step to the page of the input that a write stores next: far away, and through all pages in turn. */
const stride = 61_803

/**
 * Runs the stream; calls `atEnd` at its end, before the pages are checked once more. Rejects with `Failed` at the first
 * wrong byte, with `Interrupted`, and with any error of the store.
 */
export async function runMachine(options: MachineOptions, atEnd: () => void, terminal: Terminal): Promise<MachineRun> {
  const { name, frames, store, input, stream } = options
  let pending = false
  /** Does background work if the store has asked for some, and gives the disk its turn. */
  const background = (): Promise<void> | undefined => {
    if (!options.isWoken() && !pending) return undefined
    pending = store.tick({ pages: backgroundPages }).pending
    return setImmediate()
  }
  const { pages } = input
  const swapper = new Swapper({ pages, frames, store })
  const program = new Program(name, swapper, input, background)
  const progress = terminal.progress(`${name} machine`)
  const total = pages + stream.length + pages
  try {
    let milliseconds = 0
    const inChunks = async (
      count: number,
      before: number,
      work: (from: number, to: number) => Promise<void>,
    ): Promise<void> => {
      for (let from = 0; from < count; from += chunk) {
        const start = performance.now()
        await work(from, Math.min(from + chunk, count))
        milliseconds += performance.now() - start
        const to = Math.min(from + chunk, count)
        if (before < pages + stream.length)
          options.onLook?.({
            seconds: milliseconds / 1000,
            done: (before + to) / (pages + stream.length),
            swapOuts: swapper.counters.swapOuts,
            swapIns: swapper.counters.swapIns,
            usedFrames: Math.min(frames, before + to),
          })
        progress.at(before + from, total)
        await setImmediate()
        throwIfInterrupted(terminal.signal)
      }
    }
    await inChunks(pages, 0, (from, to) => program.fill(from, to))
    await inChunks(stream.length, pages, (from, to) => program.use(stream, from, to))
    const seconds = milliseconds / 1000
    const { swapOuts, swapIns } = swapper.counters
    atEnd()
    program.checkResident()
    await inChunks(pages, pages + stream.length, (from, to) => program.checkRest(from, to))
    progress.done(`${seconds.toFixed(2)} s`)
    return { seconds, swapOuts, swapIns, comparedPages: program.comparedPages }
  } finally {
    progress.end()
    swapper.close()
  }
}

/** The program on the machine: its address space, and what each page must hold. */
class Program {
  readonly #name: string
  readonly #swapper: Swapper
  readonly #memory: Buffer
  readonly #input: Input
  /** For each page, the page of the input that it holds. */
  readonly #holds: Uint32Array
  readonly #checked: Uint8Array
  readonly #background: () => Promise<void> | undefined
  comparedPages = 0

  constructor(name: string, swapper: Swapper, input: Input, background: () => Promise<void> | undefined) {
    this.#background = background
    const { buffer, byteOffset, length } = swapper.memory
    this.#name = name
    this.#swapper = swapper
    this.#memory = Buffer.from(buffer, byteOffset, length)
    this.#input = input
    this.#holds = new Uint32Array(input.pages).map((_, page) => page)
    this.#checked = new Uint8Array(input.pages)
  }

  /** Writes pages for the first time. */
  async fill(from: number, to: number): Promise<void> {
    for (let page = from; page < to; page++) {
      let at = this.#swapper.resident(page)
      if (at < 0) at = await this.#fault(page)
      this.#write(page, at, page)
    }
  }

  /** Does references, without waiting and without a promise as long as the pages are in memory. */
  async use(stream: Uint32Array, from: number, to: number): Promise<void> {
    const { pages } = this.#input
    for (let next = from; next < to; next++) {
      const reference = stream[next]!
      const page = reference % writeBit
      let at = this.#swapper.resident(page)
      if (at < 0) at = await this.#fault(page)
      if (reference >= writeBit) this.#write(page, at, (this.#holds[page]! + stride) % pages)
      else this.#compare(page, at)
    }
  }

  /** Compares the pages in memory; these come first, because reads of the others evict them. */
  checkResident(): void {
    for (let page = 0; page < this.#input.pages; page++) {
      const at = this.#swapper.resident(page)
      if (at < 0) continue
      this.#compare(page, at)
      this.#checked[page] = 1
    }
  }

  /** Reads and compares the pages that were not in memory. */
  async checkRest(from: number, to: number): Promise<void> {
    for (let page = from; page < to; page++) if (this.#checked[page] === 0) this.#compare(page, await this.#fault(page))
  }

  async #fault(page: number): Promise<number> {
    const work = this.#background()
    if (work !== undefined) await work
    for (;;) {
      const wait = this.#swapper.fault(page)
      if (wait !== undefined) await wait
      const at = this.#swapper.resident(page)
      if (at >= 0) return at
    }
  }

  #write(page: number, at: number, source: number): void {
    this.#swapper.modified(page)
    this.#input.bytes.copy(this.#memory, at, source * basePageSize, (source + 1) * basePageSize)
    this.#holds[page] = source
  }

  #compare(page: number, at: number): void {
    const source = this.#holds[page]! * basePageSize
    const { bytes } = this.#input
    this.comparedPages++
    if (this.#memory.compare(bytes, source, source + basePageSize, at, at + basePageSize) === 0) return
    let offset = 0
    while (this.#memory[at + offset] === bytes[source + offset]) offset++
    const hex = (byte: number): string => `0x${byte.toString(16).padStart(2, '0')}`
    throw new Failed(
      `wrong data on the ${this.#name} machine: page ${page}, offset ${offset}: got ${hex(this.#memory[at + offset]!)}, last written was ${hex(bytes[source + offset]!)}`,
    )
  }
}
