/**
 * The bytes that fill the demo's pages: real ones, from files.
 *
 * Files follow one another without padding, which would look like memory that compresses well. If the input is larger
 * than the demo, pieces are taken from it at even distances, so that a small demo sees the same mixture as a large one.
 * Directories are read in the order of their names, without following links and without `.git` and `.cache`.
 */
import {
  closeSync,
  existsSync,
  lstatSync,
  openSync,
  readdirSync,
  readSync,
  realpathSync,
  type Stats,
  statSync,
} from 'node:fs'
import { dirname, join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { basePageSize, formatBytes } from '@tmem/core'
import { BadInput, throwIfInterrupted } from '../ending.ts'
import type { Terminal } from '../terminal.ts'

/** A source of the bytes. */
export interface Source {
  readonly path: string
  /** Bytes taken from this source. */
  readonly bytes: number
}

/** Pages of real bytes. */
export interface Input {
  readonly pages: number
  /** `pages` × 4096 bytes. */
  readonly bytes: Buffer
  readonly sources: readonly Source[]
}

/** Which bytes to read, and how many. */
export interface InputRequest {
  /** Files and directories of the user (default: this machine's Node.js and this program). */
  readonly paths?: readonly string[] | undefined
  /** Exact number of bytes (default: as many as the files have, up to `defaultBytes`). */
  readonly size?: number | undefined
  /** Most bytes if the user names no size. */
  readonly defaultBytes: number
  /** Fewest pages for a useful demo. */
  readonly minPages: number
}

/** Reads the input. Throws `BadInput` if a path cannot be read or the input is too small. */
export async function readInput(request: InputRequest, terminal: Terminal): Promise<Input> {
  const { paths, size, defaultBytes, minPages } = request
  const progress = terminal.progress('reading input')
  try {
    const files = await listFiles(paths, terminal.signal)
    const found = files.reduce((sum, file) => sum + file.size, 0)
    const pages = Math.floor(Math.min(size ?? defaultBytes, found) / basePageSize)
    checkEnough(request, found, pages, minPages)
    const bytes = Buffer.alloc(pages * basePageSize)
    const reader = new Reader(files, paths !== undefined)
    for (let at = 0; at < bytes.length; at += blockBytes) {
      const end = Math.min(at + blockBytes, bytes.length)
      if (!reader.read(Math.floor((at / bytes.length) * found), bytes, at, end))
        throw new BadInput('the input became shorter while it was read: run the demo again')
      if (at % (256 * blockBytes) !== 0) continue
      progress.at(at, bytes.length)
      await setImmediate()
      throwIfInterrupted(terminal.signal)
    }
    return { pages, bytes, sources: reader.sources() }
  } finally {
    progress.end()
  }
}

function checkEnough({ paths, size }: InputRequest, found: number, pages: number, minPages: number): void {
  const subject =
    paths === undefined ? 'Node.js and this program have' : `${paths.join(', ')} ${paths.length === 1 ? 'has' : 'have'}`
  const advice = 'name more with --input'
  if (size !== undefined && found < size)
    throw new BadInput(
      `the input is too small: ${subject} ${found} bytes, --size is ${formatBytes(size)}; ${advice} or lower --size`,
    )
  if (pages < minPages)
    throw new BadInput(
      `the input is too small: ${subject} ${found} bytes, the demo needs ${formatBytes(minPages * basePageSize)}; ${advice}`,
    )
}

/** A file, and the index of the path that led to it. */
interface InputFile {
  readonly path: string
  readonly size: number
  readonly source: string
}

async function listFiles(paths: readonly string[] | undefined, signal: AbortSignal): Promise<InputFile[]> {
  const files: InputFile[] = []
  for (const source of paths ?? ownFiles())
    for (const file of filesUnder(source, paths !== undefined)) {
      files.push({ ...file, source })
      if (files.length % 1024 !== 0) continue
      await setImmediate()
      throwIfInterrupted(signal)
    }
  return files
}

/** Bytes that are taken in one piece. */
const blockBytes = 4 * basePageSize

/** All files as one, read from front to back. */
class Reader {
  readonly #files: readonly InputFile[]
  readonly #strict: boolean
  readonly #taken = new Map<string, number>()
  /** The current file, and where it begins. */
  #number = 0
  #begin = 0

  constructor(files: readonly InputFile[], strict: boolean) {
    this.#files = files
    this.#strict = strict
  }

  /** Fills `into` from `at` to `end` with the bytes from `position` on. False if the files end first. */
  read(position: number, into: Buffer, at: number, end: number): boolean {
    let from = position
    for (let to = at; to < end; ) {
      let file = this.#files[this.#number]
      while (file !== undefined && this.#begin + file.size <= from) {
        this.#begin += file.size
        file = this.#files[++this.#number]
      }
      if (file === undefined) return false
      const got = this.#readFile(file, from - this.#begin, into, to, end)
      to += got
      // The file became shorter, or is gone: go on with the next.
      from = to < end ? this.#begin + file.size : from + got
    }
    return true
  }

  sources(): Source[] {
    return [...this.#taken].map(([path, bytes]) => ({ path, bytes }))
  }

  #readFile(file: InputFile, position: number, into: Buffer, at: number, end: number): number {
    let got = 0
    try {
      const descriptor = openSync(file.path, 'r')
      try {
        for (let read = -1; read !== 0 && at + got < end; got += read)
          read = readSync(descriptor, into, at + got, end - at - got, position + got)
      } finally {
        closeSync(descriptor)
      }
    } catch (error) {
      if (this.#strict) throw cannotRead(file.path, error)
    }
    if (got > 0) this.#taken.set(file.source, (this.#taken.get(file.source) ?? 0) + got)
    return got
  }
}

/** This machine's Node.js installation, and the checkout (or installed package) of this program. */
function ownFiles(): string[] {
  const node = realpathSync(process.execPath)
  const prefix = dirname(dirname(node))
  const parts = ['lib/node_modules', 'include/node', 'share/doc/node', 'share/doc/nodejs'].map((part) =>
    join(prefix, part),
  )
  const own = dirname(dirname(dirname(fileURLToPath(import.meta.url))))
  const checkout = dirname(dirname(own))
  return [node, ...parts, existsSync(join(checkout, 'pnpm-workspace.yaml')) ? checkout : own].filter((path) =>
    existsSync(path),
  )
}

/** All regular files at or under a path. `strict`, for the user's paths: anything that cannot be read is bad input. */
function* filesUnder(path: string, strict: boolean): Generator<Omit<InputFile, 'source'>> {
  let found: Stats
  try {
    found = statSync(path)
  } catch (error) {
    if (!strict) return
    throw cannotRead(path, error)
  }
  if (found.isFile()) yield { path, size: found.size }
  else if (found.isDirectory()) yield* filesIn(path, strict)
  else if (strict) throw new BadInput(`cannot use --input ${path}: it is neither a file nor a directory`)
}

function* filesIn(directory: string, strict: boolean): Generator<Omit<InputFile, 'source'>> {
  let names: string[]
  try {
    names = readdirSync(directory).sort()
  } catch (error) {
    if (!strict) return
    throw cannotRead(directory, error)
  }
  for (const name of names) {
    if (name === '.git' || name === '.cache') continue
    const path = join(directory, name)
    const found = lstatSync(path, { throwIfNoEntry: false })
    if (found?.isDirectory()) yield* filesIn(path, strict)
    else if (found?.isFile()) yield { path, size: found.size }
  }
}

const cannotRead = (path: string, error: unknown): BadInput =>
  new BadInput(`cannot read --input ${path}: ${(error as Error).message}`)
