/**
 * What can be set on a device while it is served: zram's knobs under their names and with their words, `recall` for
 * virtswap, and `lenders` for ramster. They are files of the mount, and `tmem knob`.
 */
import { type Completion, type Layer, parseBytes } from '@tmem/core'
import type { RamsterLayer } from '@tmem/ramster'
import type { PageKind, Ramzswap, RecompressRequest, WritebackRequest } from '@tmem/ramzswap'
import { inUse, type Users } from './users.ts'

/**
 * One knob. `write` throws or rejects for what makes no sense or cannot be done; what it answers is told to who asked.
 */
export interface Knob {
  read(): string
  write(text: string): string | Promise<string>
}

/** What is served of a device. */
export interface Turned {
  readonly device: Ramzswap
  /** What requests go through: a snapshot, which has to know what changes, or the device itself. */
  readonly served: { resize(sizeBytes: number): void; discard(at: number, length: number): Completion }
  readonly users: Users
  /** Whoever lends memory to it, if anybody does. */
  readonly lending?: Lending | undefined
}

/** The machines that a device's cold pages rest on, and how others are named. */
export type Lending = Required<Pick<RamsterLayer, 'lenders' | 'planOf'>>

/** The part of a stack that borrows from other machines. */
export const lendingIn = (stack: readonly Layer[]): Lending | undefined =>
  stack.find((layer): layer is Layer & Lending => 'lenders' in layer && 'planOf' in layer)

/** Pages that `compact` touches, and those that it touches before requests have their turn. */
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
          // As with zram nothing may be moved until it is said how much.
          device.writebackLimit = text === '0' ? undefined : (device.writebackLimit ?? 0)
        },
      ),
    ],
    ['idle', action((text) => device.idle(text === 'all' ? 'all' : countOf(text)))],
    [
      'writeback',
      action(async (text) => {
        let pages = 0
        // All of it is understood before anything is moved.
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
          if (text !== '0') throw new RangeError(`only 0 can be written, which begins anew, got ${text}`)
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
            // A snapshot may have had to wait: what a client has written since is not to be taken away.
            const late = await users.text()
            if (late !== undefined) throw inUse(`${device.name} is empty, its counters stay: in use since: ${late}`)
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
      // It is gone when it has none of our blocks any more; until then it is shown as leaving.
      else void lenders.remove(which)
      return read()
    },
  }
}

/** What zram has and a device here has not, and what there is instead: for who asks for it. */
export const knobsElsewhere: ReadonlyMap<string, string> = new Map([
  ...['comp_algorithm', 'recomp_algorithm', 'algorithm_params'].map(
    (name) => [name, 'how pages are compressed is said in the stack, e.g. zcache(codec=…,recompress=…)'] as const,
  ),
  ['backing_dev', 'where pages go from memory is said in the stack, e.g. … > frontswap(file=…,size={size})'],
  ['max_comp_streams', 'one thread has a device, and compresses for it'],
  ['writeback_batch_size', 'as many pages as fit into 128 KiB go to the file in one write'],
  ['compressed_writeback', 'pages go to the file as they are in memory, compressed if they shrink'],
  ...['hot_add', 'hot_remove'].map((name) => [name, 'devices are named at the start, with --device'] as const),
  ...['initstate', 'mm_stat', 'io_stat', 'bd_stat', 'debug_stat', 'stat', 'block_state'].map(
    (name) => [name, 'it is for reading: see tmem stat --json, or the folder stats of the mount'] as const,
  ),
])

/** Gives memory back: what it says is what was done. */
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

/** At least one, which may be empty. */
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
        `${word}: a place has one codec for that, which the stack names (zcache(recompress=…)); leave it out`,
      )
    const [, name, value] = /^(type|threshold|max_pages)=(.+)$/.exec(word) ?? []
    if (name === undefined || value === undefined)
      throw new RangeError(`expected type=, threshold= and max_pages=, or less of that, got ${word}`)
    if (name === 'threshold') request = { ...request, thresholdBytes: amountOf(value) }
    else if (name === 'max_pages') request = { ...request, maxPages: countOf(value) }
    else {
      const type = kindOf(value)
      if (type === 'incompressible') throw new RangeError('incompressible pages were tried already')
      request = { ...request, type }
    }
  }
  return request
}

function kindOf(text: string): PageKind {
  if (text === 'huge' || text === 'idle' || text === 'huge_idle' || text === 'incompressible') return text
  throw new RangeError(`expected huge, idle, huge_idle or incompressible, got ${text}`)
}

/** Bytes, as everywhere in this program or as zram has them: `64MiB`, `64M`, `64m`. */
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
