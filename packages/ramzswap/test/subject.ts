/** What the tests share: a swap file in memory that fails when told to, devices over it, pages of several kinds. */
import { type Layer, type StatsNode, TmemError } from '@tmem/core'
import { type BlockFile, type BlockFileRequest, frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { expect } from 'vitest'

/** A swap file in memory. */
export class File implements BlockFile {
  readonly directIo = true
  readonly alignedFrom = 0
  readonly request: BlockFileRequest
  readonly content: Uint8Array
  closed = false
  writes = 0
  /** Asked before each transfer; what it answers is thrown. */
  failWrite: (slot: number) => Error | undefined = () => undefined
  failRead: (slot: number) => Error | undefined = () => undefined
  /** Awaited before each read. */
  beforeRead: () => Promise<void> = () => Promise.resolve()

  constructor(request: BlockFileRequest) {
    this.request = request
    this.content = new Uint8Array(request.bytes)
  }

  write(at: number, length: number, position: number): void {
    if (this.closed) throw new Error('written after close')
    this.writes++
    const error = this.failWrite(position / 4096)
    if (error !== undefined) throw error
    this.content.set(this.request.memory.subarray(at, at + length), position)
  }

  async read(at: number, length: number, position: number): Promise<void> {
    await this.beforeRead()
    if (this.closed) throw new Error('read after close')
    const error = this.failRead(position / 4096)
    if (error !== undefined) throw error
    this.request.memory.set(this.content.subarray(position, position + length), at)
  }

  close(): void {
    this.closed = true
  }
}

export const systemError = (code: string): Error => Object.assign(new Error(`${code}: injected`), { code })

/** A backing store on a swap file in memory, and that file once it was opened. */
export function backingFile(pages: number): { layers: Layer[]; file: () => File } {
  let file: File | undefined
  const open = (request: BlockFileRequest): File => {
    file = new File(request)
    return file
  }
  return {
    layers: [frontswap({ file: 'file', sizeBytes: pages * 4096, open })],
    file: () => {
      if (file === undefined) throw new Error('the file is not open')
      return file
    },
  }
}

/** A compressed tier with the limits of ramzswap above a backing store. */
export const compressed = (limitBytes: number = 2 ** 20): Layer[] => [
  zcache({ limitBytes, zvMaxZsize: 2048, zvMaxMeanZsize: 4096 }),
]

/** Plain memory with room for that many pages. */
export function room(pages: number): Layer[] {
  for (let limitBytes = pages * 4096; ; limitBytes += 65536) {
    const layer = memory({ limitBytes })
    const plan = layer.plan(undefined)
    if (typeof plan !== 'string' && plan.reservedBytes >= pages * 4096) return [layer]
  }
}

/** How compressible a page is. */
export type Kind = 'zero' | 'word' | 'text' | 'third' | 'half' | 'noise'

/** Bytes of a kind, always the same for the same seed. */
export function bytesOf(kind: Kind, length: number, seed: number): Uint8Array {
  const bytes = new Uint8Array(length)
  if (kind === 'zero') return bytes
  let state = seed * 2654435761 + 12345
  const next = (): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state >>> 24
  }
  const word = Uint8Array.from({ length: 8 }, next)
  if (kind === 'word') for (let i = 0; i < length; i++) bytes[i] = word[i % 8]!
  else
    for (let i = 0; i < length; i++) {
      if (kind === 'noise') bytes[i] = next()
      // Two thirds noise: too much for half a page, and little enough for zstd to gain a bit on LZ4.
      else if (kind === 'third') bytes[i] = i % 1024 < 340 ? next() : i & 7
      else if (kind === 'half') bytes[i] = i % 1024 < 640 ? next() & 0x3f : i & 7
      else bytes[i] = i % 61 === 0 ? next() : 97 + ((i * 7) % 23)
    }
  return bytes
}

/** Asserts equality, also where a history takes another branch each time. */
export const same = (got: unknown, wanted: unknown): void => expect(got).toEqual(wanted)

/** Asserts that bytes are equal, and says where they are not. */
export function expectBytes(got: Uint8Array, wanted: Uint8Array): void {
  expect(got.length).toBe(wanted.length)
  if (Buffer.compare(got, wanted) === 0) return
  const at = got.findIndex((byte, n) => byte !== wanted[n])
  expect.fail(`byte ${at} (page ${at >>> 12}, ${at & 4095}) is ${got[at]}, not ${wanted[at]}`)
}

/** The section of that name. */
export function section(tree: StatsNode, name: string): Readonly<Record<string, number>> {
  const found = tree.children.find((child) => child.name === name)
  if (found === undefined) throw new Error(`no section ${name} in ${tree.name}`)
  return found.counters
}

/** Asserts what must add up in the statistics of a device. */
export function expectSums(tree: StatsNode): void {
  const s = section(tree, 'slots')
  const inPlace =
    s['same_filled']! +
    s['hypervisor']! +
    s['compressed']! +
    s['recompressed']! +
    s['uncompressed']! +
    s['backing']! +
    s['lost']!
  expect(s['empty']! + inPlace, 'slots').toBe(s['slots'])
  expect(inPlace + s['overwritten']! + s['freed']! + s['cut_off']!, 'stored').toBe(s['stored'])
  const own = s['compressed']! + s['recompressed']! + s['uncompressed']!
  expect(tree.counters['pages_stored']).toBe(own)
  expect(tree.counters['orig_data_size']).toBe(own * 4096)
  expect(tree.counters['pages_zero']).toBe(s['same_filled'])
  expect(section(tree, 'bd_stat')['bd_count']).toBe(s['backing'])
  expect(section(tree, 'mm_stat')['huge_pages']).toBeLessThanOrEqual(own)
  for (const tier of tree.children.filter((child) => child.children.length > 0)) {
    const { name, counters } = tier.children[0]!
    // Each store holds exactly the pages that the device says are there.
    if (tier.name in s && ['zcache', 'frontswap', 'memory'].includes(name))
      same(counters['live'] ?? counters['pages'], s[tier.name])
  }
  for (const [name, value] of Object.entries({ ...s, ...tree.counters }))
    expect(Number.isInteger(value) && value >= 0, `${name} is ${value}`).toBe(true)
}

/** The code of the `TmemError` that `use` throws or rejects with; `'none'` when it does neither. */
export async function codeOf(use: () => unknown): Promise<string> {
  try {
    await use()
  } catch (error) {
    if (error instanceof TmemError) return error.code
    throw error
  }
  return 'none'
}
