/**
 * What `tmem bench cache` stores: JSON records of 100 to 2,000 bytes out of real files, and traces of keys.
 *
 * Records are the objects in the JSON files of npm and of this checkout whose text has that length, each with a number
 * of its own. So the same object comes again after thousands of others: never in one page.
 */
import { readdirSync, readFileSync, statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Failed } from '../ending.ts'

/** A record, as a program would have it. */
export interface StoredRecord {
  readonly id: number
  readonly from: string
  readonly data: unknown
}

/** Most objects that are gathered, and the largest file that is looked at. */
const maxObjects = 20_000
const maxFileBytes = 512 * 1024

/** The records of a run: number n is the same in every process of it. */
export class Records {
  readonly #from: string[] = []
  readonly #data: unknown[] = []

  constructor() {
    const root = fileURLToPath(new URL('../../../..', import.meta.url))
    for (const folder of [join(root, 'node_modules'), join(dirname(dirname(process.execPath)), 'lib', 'node_modules')])
      this.#gather(folder)
    if (this.#data.length < 100)
      throw new Failed(`bench cache: only ${this.#data.length} JSON objects of 100 to 2,000 bytes were found`)
  }

  at(n: number): StoredRecord {
    const which = Math.imul(n, 0x9e3779b1) >>> 0
    const object = which % this.#data.length
    return { id: n, from: this.#from[object]!, data: this.#data[object] }
  }

  #gather(folder: string): void {
    let names: string[]
    try {
      names = readdirSync(folder)
    } catch (error) {
      // Not everybody has both.
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return
      throw error
    }
    for (const name of names.sort()) {
      if (this.#data.length >= maxObjects) return
      const path = join(folder, name)
      const status = statSync(path, { throwIfNoEntry: false })
      if (status?.isDirectory() === true && depthOf(path) < 12) this.#gather(path)
      else if (status?.isFile() === true && name.endsWith('.json') && status.size <= maxFileBytes) this.#read(path)
    }
  }

  #read(path: string): void {
    let content: unknown
    try {
      content = JSON.parse(readFileSync(path, 'utf8'))
    } catch (error) {
      // Some are JSON with comments, or tests of parsers.
      if (error instanceof SyntaxError) return
      throw error
    }
    this.#take(path.slice(-60), content)
  }

  #take(from: string, value: unknown): void {
    if (typeof value !== 'object' || value === null) return
    const { length } = JSON.stringify({ from, data: value })
    if (length >= 100 && length <= 1980) {
      this.#from.push(from)
      this.#data.push(value)
    } else if (length > 1980) for (const inner of Object.values(value)) this.#take(from, inner)
  }
}

const depthOf = (path: string): number => path.split('/').length - fileURLToPath(import.meta.url).split('/').length + 6

/** The key of a record. */
export const keyOf = (n: number): string => `record:${n}`

/** Numbers from 0 to 1, the same for a seed. */
export function randomOf(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

/** Numbers of records, as often as a Zipf distribution of exponent 0.9 says, and not in the order of how often. */
export function zipfOf(records: number, random: () => number): () => number {
  // The continuous distribution of that exponent, by its inverse.
  const most = records ** 0.1 - 1
  return () => {
    const rank = Math.min(records - 1, Math.floor((random() * most + 1) ** 10 - 1))
    return (rank * 7919 + 13) % records
  }
}
