/**
 * What can be set on a device while it is served: zram's knobs under their names and with their words, and `recall` for virtswap. They are files of
 * the mount, and `tmem knob`.
 */
import { type Completion, parseBytes } from '@tmem/core'
import type { PageKind, Ramzswap, RecompressRequest, WritebackRequest } from '@tmem/ramzswap'

/** One knob. `write` throws or rejects for what makes no sense or cannot be done; what it answers is told to who asked. */
export interface Knob {
  read(): string
  write(text: string): string | Promise<string>
}

/** What is served of a device. */
export interface Turned {
  readonly device: Ramzswap
  /** What requests go through: a snapshot, which has to know what changes, or the device itself. */
  readonly served: { resize(sizeBytes: number): void; discard(at: number, length: number): Completion }
  /** Who has the device open, if somebody has. */
  readonly holder: () => string | undefined
}

/** Pages that `compact` touches, and those that it touches before requests have their turn. */
const compactPages = 2 ** 16
const turnPages = 64

/** The knobs of a device by name. */
export function knobsOf({ device, served, holder }: Turned): ReadonlyMap<string, Knob> {
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
      setting(
        () => `${device.sizeBytes}`,
        (text) => served.resize(amountOf(text)),
      ),
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
    ['idle', action((text) => device.idle(text === 'all' ? 'all' : countOf(text)))],
    ['writeback', action((text) => device.writeback(writebackOf(text)))],
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
        write: async () => {
          const who = holder()
          if (who !== undefined) throw new Error(`${device.name} is in use: ${who}`)
          await served.discard(0, device.sizeBytes)
          // A snapshot may have had to wait: what was written since is not to be taken away.
          const late = holder()
          if (late !== undefined) throw new Error(`${device.name} is empty, its counters stay: in use since: ${late}`)
          device.reset()
          return 'empty'
        },
      },
    ],
    ['compact', action(() => compact(device))],
  ])
}

async function compact(device: Ramzswap): Promise<number> {
  let pages = 0
  for (let moved = 1; moved > 0 && pages < compactPages; ) {
    moved = device.compact(turnPages)
    pages += moved
    await new Promise((resolve) => setImmediate(resolve))
  }
  return pages
}

/** `huge`, `type=huge`, or `page_index=7`. */
function writebackOf(text: string): WritebackRequest {
  const index = /^page_index=(.*)$/.exec(text)?.[1]
  return index === undefined ? kindOf(text.replace(/^type=/, '')) : { pageIndex: countOf(index) }
}

/** `type=idle threshold=3000 max_pages=100`, each of which may be missing, or `all`. */
function recompressOf(text: string): RecompressRequest {
  if (text === 'all') return {}
  let request: RecompressRequest = {}
  for (const word of text.split(/\s+/).filter((part) => part !== '')) {
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

function amountOf(text: string): number {
  const bytes = parseBytes(text)
  if (bytes === undefined) throw new RangeError(`expected an amount of bytes such as 64MiB, got ${text}`)
  return bytes
}

function countOf(text: string): number {
  if (!/^\d{1,15}$/.test(text)) throw new RangeError(`expected a number, got ${text}`)
  return Number(text)
}
