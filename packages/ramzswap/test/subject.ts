/** What the tests share: a swap file in memory that fails when told to, devices over it, pages of several kinds. */
import { type Layer, type LayerContext, type PlaceTraits, type StatsNode, TmemError } from '@tmem/core'
import { type SwapFile, SwapPlace } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import { expect } from 'vitest'

/** A swap file in memory. */
export class File implements SwapFile {
  readonly directIo = true
  readonly content: Uint8Array
  closed = false
  /** Transfers so far. */
  writes = 0
  /** Asked before each transfer; what it answers is thrown. */
  failWrite: () => Error | undefined = () => undefined
  failRead: (position: number) => Error | undefined = () => undefined
  /** Awaited before each read, and each write that may wait. */
  beforeRead: () => Promise<void> = () => Promise.resolve()
  beforeWrite: () => Promise<void> = () => Promise.resolve()

  constructor(bytes: number) {
    this.content = new Uint8Array(bytes)
  }

  async write(bytes: Uint8Array, at: number, length: number, position: number): Promise<void> {
    await this.beforeWrite()
    this.writeNow(bytes, at, length, position)
  }

  writeNow(bytes: Uint8Array, at: number, length: number, position: number): void {
    if (this.closed) throw new Error('written after close')
    this.writes++
    const error = this.failWrite()
    if (error !== undefined) throw error
    this.content.set(bytes.subarray(at, at + length), position)
  }

  async read(into: Uint8Array, at: number, length: number, position: number): Promise<void> {
    await this.beforeRead()
    this.readNow(into, at, length, position)
  }

  readNow(into: Uint8Array, at: number, length: number, position: number): void {
    if (this.closed) throw new Error('read after close')
    const error = this.failRead(position)
    if (error !== undefined) throw error
    into.set(this.content.subarray(position, position + length), at)
  }

  sync(): Promise<void> {
    return Promise.resolve()
  }

  async close(): Promise<void> {
    this.closed = true
  }
}

export const systemError = (code: string): Error => Object.assign(new Error(`${code}: injected`), { code })

/** For `failRead`: what is read first cannot be read, now and again; all the rest can. */
export function failsFirst(code: string): (position: number) => Error | undefined {
  let bad: number | undefined
  return (position) => {
    bad ??= position
    return position === bad ? systemError(code) : undefined
  }
}

/**
 * The end of a stack: a swap file in memory, and that file once it was opened. `slots`: as an area made with mkswap has
 * them.
 */
export function backingFile(pages: number, slots: boolean = false): { layers: Layer[]; file: () => File } {
  let file: File | undefined
  const traits: PlaceTraits = {
    persistent: true,
    ephemeral: false,
    waits: true,
    survives: 'nothing',
    rawOnly: slots,
    capacity: pages,
    reservedBytes: pages * 4096,
    maxPageSize: 4096,
  }
  // Frames take more than pages, and clusters are of 128 KiB.
  const roomBytes = slots ? (pages + 1) * 4096 : Math.ceil(pages / 28) * 131_072 + 4 * 131_072
  const open = (context: LayerContext): SwapPlace => {
    file = new File(4096 + roomBytes)
    return new SwapPlace({ file, traits, from: slots ? 0 : 4096, roomBytes, slots, bytesPerHour: undefined }, context)
  }
  return {
    layers: [{ name: 'frontswap', place: { traits, open } }],
    file: () => {
      if (file === undefined) throw new Error('the file is not open')
      return file
    },
  }
}

/**
 * Compressed memory with ramzswap's rule for a backing store below it: what does not shrink to half goes there at once.
 */
export const compressed = (limitBytes: number = 2 ** 20): Layer[] => [zcache({ limitBytes, zvMaxZsize: 2048 })]

/** Plain memory with room for that many pages, or a few more. */
export function room(pages: number): Layer[] {
  for (let limitBytes = pages * 4096 + 32_768; ; limitBytes += 4096) {
    const layer = memory({ limitBytes })
    if (layer.place!.traits.reservedBytes >= pages * 4096) return [layer]
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
  const word = Uint8Array.from({ length: 4 }, next)
  if (kind === 'word') for (let i = 0; i < length; i++) bytes[i] = word[i % 4]!
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
    s['same_filled']! + s['hypervisor']! + s['compressed']! + s['uncompressed']! + s['backing']! + s['lost']!
  expect(s['empty']! + inPlace, 'slots').toBe(s['slots'])
  expect(inPlace + s['overwritten']! + s['freed']! + s['cut_off']!, 'stored').toBe(s['stored'])
  const own = s['compressed']! + s['uncompressed']!
  expect(tree.counters['pages_stored']).toBe(own)
  expect(tree.counters['orig_data_size']).toBe(own * 4096)
  expect(tree.counters['pages_zero']).toBe(s['same_filled'])
  expect(section(tree, 'bd_stat')['bd_count']).toBe(s['backing'])
  expect(section(tree, 'mm_stat')['huge_pages']).toBe(s['uncompressed'])
  let pages = s['same_filled']!
  for (const { name, counters: place } of tree.children.find((child) => child.name === 'places')!.children) {
    const came = place['put']! + place['sunk']! + place['rose']!
    expect([name, came - place['passed_down']! - place['raised']! - place['gone']!]).toEqual([name, place['pages']])
    pages += place['pages']!
  }
  // The stack holds exactly the pages that the device says are there.
  expect(tree.children.find((child) => child.name === 'chain')!.counters['pages']).toBe(pages)
  expect(pages).toBe(inPlace - s['lost']!)
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
