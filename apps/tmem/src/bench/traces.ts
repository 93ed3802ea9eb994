/**
 * The fixed traces of `tmem bench tiers`: references to the pages of an address space, the same on every machine and in
 * every run.
 *
 * A trace lies here as the rule that makes it and the digest of what must come out. As files they would be 3 MB of
 * noise in the repository: a reference to one of 16,384 equally likely pages holds 14 bits, and no coding takes them
 * away. What comes out is compared with the digest before anything is measured: a generator that changed is an error
 * and not another trace. All of it is arithmetic that IEEE 754 and ECMAScript fix to the last bit: integers, and of the
 * others `+` and `/`; not `Math.log` or `Math.exp`, whose last bits are the engine's own.
 *
 * Every trace begins with a write to each page, in order. Its size is that of an address space of 65,536 pages over
 * 8,192 frames, or a sixteenth of all that for quick runs.
 */
import { createHash } from 'node:crypto'
import { createRandom, type Random, writeBit } from '../demo/workload.ts'
import { Failed } from '../ending.ts'

/** Names of the traces. */
export type TraceName = 'hot-set' | 'zipf-writes' | 'zipf' | 'scan' | 'loop'

/** References, and the parts that they are divided into. */
export interface Trace {
  readonly name: TraceName
  /** Pages of the address space, and frames of real memory under it. */
  readonly pages: number
  readonly frames: number
  /** Page numbers in their order, those of writes with `writeBit`. A write replaces the whole page. */
  readonly references: Uint32Array
  /** Parts after the first writes, in their order, without gaps; the last one ends where the trace does. */
  readonly parts: readonly TracePart[]
}

/** References `from` (included) to `to` (excluded) of a trace. */
export interface TracePart {
  readonly name: string
  readonly from: number
  readonly to: number
}

/** How a trace is made: `scaled` makes a number of the full size one of the size asked for. */
interface Rule {
  readonly seed: number
  readonly digests: { readonly full: string; readonly quick: string }
  make(add: Add, random: Random, pages: number, scaled: (full: number) => number): void
}

/** Adds a part: so many references, each to the page that `next` answers (with `writeBit` for a write). */
type Add = (part: string, count: number, next: () => number) => void

const fullPages = 65_536
const quickDivisor = 16
const framesPart = 8

const rules: Readonly<Record<TraceName, Rule>> = Object.freeze({
  // Three sets one after the other, each a quarter of all pages: those that were written last, those that were written
  // first (by then cold), and, with three writes in ten, some from the middle.
  'hot-set': {
    seed: 12_345,
    digests: { full: 'c8762e8d682fabb8', quick: '916a2b23f5a28f96' },
    make(add, random, pages, scaled) {
      const hot = scaled(16_384)
      const phases = [
        ['newest', pages - hot, 0],
        ['oldest', 0, 0],
        ['mixed', pages / 2, 0.3],
      ] as const
      for (const [name, first, writes] of phases)
        add(name, scaled(150_000), () => sometimes(first + below(hot, random), writes, random))
    },
  },
  'zipf-writes': {
    seed: 777,
    digests: { full: 'e12638001af244dd', quick: 'b7b6a790d66cb8f2' },
    make: (add, random, pages, scaled) => zipf(add, random, pages, scaled, 0.1),
  },
  zipf: {
    seed: 778,
    digests: { full: '1b0faea869baf03b', quick: '21f625c402682350' },
    make: (add, random, pages, scaled) => zipf(add, random, pages, scaled, 0),
  },
  // Six references in ten go to a hot set of 20,000 pages, one in ten of them a write; the others scan the rest, in
  // order, over and over.
  scan: {
    seed: 4242,
    digests: { full: '032f63c65c8342e5', quick: '7182bad6fd24e811' },
    make(add, random, pages, scaled) {
      const hot = scaled(20_000)
      let scanned = 0
      const next = (): number =>
        random() < 0.6 ? sometimes(below(hot, random), 0.1, random) : hot + (scanned++ % (pages - hot))
      add('warm-up', scaled(200_000), next)
      add('steady', scaled(300_000), next)
    },
  },
  // More pages than find room, read in order, over and over: whoever keeps the last used ones never has the next.
  loop: {
    seed: 0,
    digests: { full: 'e4c46d48572d3abc', quick: '9795765e81ee2a7b' },
    make(add, _random, _pages, scaled) {
      const round = scaled(45_000)
      let at = 0
      const next = (): number => at++ % round
      add('warm-up', scaled(200_000), next)
      add('steady', scaled(200_000), next)
    },
  },
})

/** All traces, in the order in which they are run. */
export const traceNames: readonly TraceName[] = Object.freeze(Object.keys(rules) as TraceName[])

/** Makes a trace. Throws `Failed` when it is not the one that the digest stands for. */
export function traceOf(name: TraceName, quick: boolean): Trace {
  const rule = rules[name]
  const divisor = quick ? quickDivisor : 1
  const pages = fullPages / divisor
  const references: number[] = []
  const parts: TracePart[] = []
  for (let page = 0; page < pages; page++) references.push(page + writeBit)
  const add: Add = (part, count, next) => {
    const from = references.length
    for (let n = 0; n < count; n++) references.push(next())
    parts.push({ name: part, from, to: references.length })
  }
  rule.make(add, createRandom(rule.seed), pages, (full) => Math.floor(full / divisor))
  const trace: Trace = { name, pages, frames: pages / framesPart, references: Uint32Array.from(references), parts }
  const expected = quick ? rule.digests.quick : rule.digests.full
  const found = digestOf(trace.references)
  if (found !== expected)
    throw new Failed(
      `bench tiers: the trace ${name} came out as ${found} instead of ${expected}: its goals are for that one`,
    )
  return trace
}

/** The first 16 hexadecimal digits of the SHA-256 of the references, each as four bytes, the lowest first. */
export function digestOf(references: Uint32Array): string {
  const bytes = new DataView(new ArrayBuffer(references.length * 4))
  for (let n = 0; n < references.length; n++) bytes.setUint32(n * 4, references[n], true)
  return createHash('sha256').update(bytes).digest('hex').slice(0, 16)
}

const below = (count: number, random: Random): number => Math.floor(random() * count)

const sometimes = (page: number, writes: number, random: Random): number => (random() < writes ? page + writeBit : page)

/** The k-th most used page comes in proportion to 1 / k. Which pages are used most is random, too. */
function zipf(add: Add, random: Random, pages: number, scaled: (full: number) => number, writes: number): void {
  const upTo = new Float64Array(pages)
  let sum = 0
  for (let rank = 0; rank < pages; rank++) {
    sum += 1 / (rank + 1)
    upTo[rank] = sum
  }
  const pageOfRank = Uint32Array.from(upTo, (_, rank) => rank)
  for (let last = pages - 1; last > 0; last--) {
    const other = below(last + 1, random)
    const page = pageOfRank[last]
    pageOfRank[last] = pageOfRank[other]
    pageOfRank[other] = page
  }
  const next = (): number => {
    const wanted = random() * sum
    let [low, high] = [0, pages - 1]
    while (low < high) {
      const middle = (low + high) >> 1
      if (upTo[middle] < wanted) low = middle + 1
      else high = middle
    }
    return sometimes(pageOfRank[low], writes, random)
  }
  add('warm-up', scaled(300_000), next)
  add('steady', scaled(400_000), next)
}
