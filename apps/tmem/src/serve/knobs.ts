/**
 * The knobs of a device, which can be set while it is served: those of zram with zram's names and values, `recall` for
 * virtswap, and `lenders` for ramster. `tmem knob` and files of the mount set them.
 */
import { type Completion, type Layer, parseBytes } from '@tmem/core'
import type { RamsterLayer } from '@tmem/ramster'
import type { PageKind, Ramzswap, RecompressRequest, WritebackRequest } from '@tmem/ramzswap'
import { inUse, type Users } from './users.ts'

/** One knob. `write` returns an answer for the setter, and throws or rejects for a bad value and for a failure. */
export interface Knob {
  read(): string
  write(text: string): string | Promise<string>
}

/** A device and its served form. */
export interface Turned {
  readonly device: Ramzswap
  /** The target of requests: the snapshot, which must know of all changes, or the device itself. */
  readonly served: { resize(sizeBytes: number): void; discard(at: number, length: number): Completion }
  readonly users: Users
  /** The machines that lend memory to it, if any. */
  readonly lending?: Lending | undefined
}

/** The machines with a device's cold pages, and the parser of names for others. */
export type Lending = Required<Pick<RamsterLayer, 'lenders' | 'planOf'>>

/** The part of a stack that borrows from other machines. */
export const lendingIn = (stack: readonly Layer[]): Lending | undefined =>
  stack.find((layer): layer is Layer & Lending => 'lenders' in layer && 'planOf' in layer)

/** Pages that `compact` touches in all, and between two turns of requests. */
const compactPages = 2 ** 16
const turnPages = 64

/** The knobs of a device by name. */
export function knobsOf({ device, served, users, lending }: Turned): ReadonlyMap<string, Knob> {
  const setting = (read: () => string, write: (text: string) => void): Knob => ({
    read,
    write: (text) => {
      write(text)
      return read()
    },
  })
  const action = (act: (text: string) => number | Promise<number>): Knob => ({
    read: () => '',
    write: async (text) => `${await act(text)} pages`,
  })
  return new Map([
    [
      'disksize',
      {
        read: () => `${device.sizeBytes}`,
        write: async (text) => {
          const sizeBytes = amountOf(text)
          if (sizeBytes < device.sizeBytes) await users.whileUnused(() => served.resize(sizeBytes))
          else served.resize(sizeBytes)
          return `${device.sizeBytes}`
        },
      },
    ],
    [
      'mem_limit',
      setting(
        () => `${device.memlimitBytes}`,
        (text) => {
          device.memlimitBytes = amountOf(text)
        },
      ),
    ],
    [
      'writeback_limit',
      setting(
        () => (device.writebackLimit === undefined ? 'off' : `${device.writebackLimit}`),
        (text) => {
          device.writebackLimit = text === 'off' ? undefined : countOf(text)
        },
      ),
    ],
    [
      'writeback_limit_enable',
      setting(
        () => (device.writebackLimit === undefined ? '0' : '1'),
        (text) => {
          if (text !== '0' && text !== '1') throw new RangeError(`expected 0 or 1, got ${text}`)
          // As with zram, nothing may be moved until the limit is set.
          device.writebackLimit = text === '0' ? undefined : (device.writebackLimit ?? 0)
        },
      ),
    ],
    ['idle', action((text) => device.idle(text === 'all' ? 'all' : countOf(text)))],
    [
      'writeback',
      action(async (text) => {
        let pages = 0
        // The whole value is parsed before anything is moved.
        for (const request of wordsOf(text).map(writebackOf)) pages += await device.writeback(request)
        return pages
      }),
    ],
    ['recompress', action((text) => device.recompress(recompressOf(text)))],
    ['recall', action((text) => device.recall(text === 'all' ? undefined : countOf(text)))],
    [
      'mem_used_max',
      setting(
        () => `${device.stats().children.find(({ name }) => name === 'mm_stat')!.counters['mem_used_max']}`,
        (text) => {
          if (text !== '0') throw new RangeError(`expected 0, which resets it, got ${text}`)
          device.forgetMostUsed()
        },
      ),
    ],
    [
      'reset',
      {
        read: () => '',
        write: async (text) => {
          if (countOf(text) === 0) throw new RangeError('expected a number above 0, got 0')
          return users.whileUnused(async () => {
            await served.discard(0, device.sizeBytes)
            // The snapshot may have waited: pages that a client has written since must stay.
            const late = await users.text()
            if (late !== undefined)
              throw inUse(
                `${device.name} was emptied, but its counters were not reset, as it came into use meanwhile: ${late}`,
              )
            device.reset()
            return 'empty'
          })
        },
      },
    ],
    ['compact', { read: () => '', write: () => compact(device) }],
    ...(lending === undefined ? [] : [['lenders', lendersKnob(lending)] as const]),
  ])
}

/** `add valkey=HOST:PORT`, `add cluster=HOST:PORT+HOST:PORT`, `remove NAME`. */
function lendersKnob({ lenders, planOf }: Lending): Knob {
  const read = (): string =>
    lenders.machines.map(({ name, isLeaving }) => (isLeaving ? `${name} (leaving)` : name)).join(', ')
  return {
    read,
    write: (text) => {
      const [, what, which] = /^(add|remove) +(.+?) *$/.exec(text) ?? []
      if (what === undefined || which === undefined)
        throw new RangeError(`expected add valkey=HOST:PORT, add cluster=HOST:PORT or remove NAME, got ${text}`)
      if (what === 'add') lenders.add(planOf(which))
      // The machine is shown as leaving until it has no blocks any more.
      else void lenders.remove(which)
      return read()
    },
  }
}

/** The knobs that zram has and tmem has not, and what replaces them, for error messages. */
export const knobsElsewhere: ReadonlyMap<string, string> = new Map([
  ...['comp_algorithm', 'recomp_algorithm', 'algorithm_params'].map(
    (name) => [name, 'the stack sets the compression, e.g. zcache(codec=…,recompress=…)'] as const,
  ),
  ['backing_dev', 'the stack names the backing file, e.g. … > frontswap(file=…,size={size})'],
  ['max_comp_streams', 'each device has one thread, which also compresses'],
  ['writeback_batch_size', 'one write to the file carries as many pages as fit into 128 KiB'],
  ['compressed_writeback', 'pages go to the file as they are in memory, compressed if they shrink'],
  ...['hot_add', 'hot_remove'].map((name) => [name, 'devices are named at the start, with --device'] as const),
  ...['initstate', 'mm_stat', 'io_stat', 'bd_stat', 'debug_stat', 'stat', 'block_state'].map(
    (name) => [name, 'it is read-only: see tmem stat --json, or the directory stats of the mount'] as const,
  ),
])

/** Gives memory back, and answers how much. */
async function compact(device: Ramzswap): Promise<string> {
  let [pages, bytes] = [0, 0]
  for (let moved = 1; moved > 0 && pages < compactPages; ) {
    const before = device.ramzswapStats().mem_used_total
    moved = device.compact(turnPages)
    pages += moved
    bytes += before - device.ramzswapStats().mem_used_total
    await new Promise((resolve) => setImmediate(resolve))
  }
  return `${pages} pages, ${Math.floor(bytes / 1024)} KiB given back`
}

/** The words of a value: at least one, which may be empty. */
const wordsOf = (text: string): string[] => text.trim().split(/\s+/)

/** `huge`, `type=huge`, `page_index=7`, or `page_indexes=7-9`. */
function writebackOf(word: string): WritebackRequest {
  const index = /^page_index=(.*)$/.exec(word)?.[1]
  if (index !== undefined) return { pageIndex: countOf(index) }
  const [, first, last] = /^page_indexes=([^-]*)-(.*)$/.exec(word) ?? []
  if (first !== undefined) return { pageIndex: countOf(first), lastPageIndex: countOf(last!) }
  return kindOf(word.replace(/^type=/, ''))
}

/** `type=idle threshold=3000 max_pages=100`, each of which may be missing, or `all`. */
function recompressOf(text: string): RecompressRequest {
  if (text === 'all') return {}
  let request: RecompressRequest = {}
  for (const word of wordsOf(text)) {
    if (/^(algo|priority)=/.test(word))
      throw new RangeError(
        `${word}: leave it out: a place has one codec for recompression, which the stack names (zcache(recompress=…))`,
      )
    const [, name, value] = /^(type|threshold|max_pages)=(.+)$/.exec(word) ?? []
    if (name === undefined || value === undefined)
      throw new RangeError(`expected type=, threshold= or max_pages=, got ${word}`)
    if (name === 'threshold') request = { ...request, thresholdBytes: amountOf(value) }
    else if (name === 'max_pages') request = { ...request, maxPages: countOf(value) }
    else {
      const type = kindOf(value)
      if (type === 'incompressible') throw new RangeError('incompressible pages were already tried: leave them out')
      request = { ...request, type }
    }
  }
  return request
}

function kindOf(text: string): PageKind {
  if (text === 'huge' || text === 'idle' || text === 'huge_idle' || text === 'incompressible') return text
  throw new RangeError(`expected huge, idle, huge_idle or incompressible, got ${text}`)
}

/** Bytes in the notation of this program or of zram: `64MiB`, `64M`, `64m`. */
function amountOf(text: string): number {
  const [, number, unit] = /^(\d+)([KMGT])$/i.exec(text) ?? []
  const bytes = parseBytes(number === undefined ? text : `${number}${unit!.toUpperCase()}iB`)
  if (bytes === undefined) throw new RangeError(`expected an amount of bytes such as 64MiB, got ${text}`)
  return bytes
}

function countOf(text: string): number {
  if (!/^\d{1,15}$/.test(text)) throw new RangeError(`expected a number, got ${text}`)
  return Number(text)
}
