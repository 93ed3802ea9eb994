/** `tmem xen decode`: a raw structure of Xen's tmem interface, or the stream of a saved domain, in words. */
import { closeSync, fstatSync, readFileSync, readSync } from 'node:fs'
import { TmemError } from '@tmem/core'
import {
  type Described,
  type DescribedRecord,
  describe,
  describeStream,
  type Structure,
  streamMark,
} from '@tmem/xen-hypercall'
import pc from 'picocolors'
import { BadInput } from '../ending.ts'
import { openGivenFile } from '../given-file.ts'
import { type Terminal, tableOf } from '../terminal.ts'
import { releaseOf } from './release.ts'

/** Structures have less than 200 bytes: a larger file that is not a stream is a mistake. */
const maxFileBytes = 65_536
const pieceBytes = 65_536

/** Options of the command. */
export interface DecodeOptions {
  /** `undefined`: a stream where it begins as one does, else `op`. */
  readonly as?: Structure | 'stream'
  /** Its name; `undefined`: the default, or the generation that a stream has. */
  readonly release?: string
  readonly bits: '32' | '64'
  readonly json?: true
}

/** Prints what `words` are in hex, or what the file of that name has, raw or in hex. */
export async function decode(words: readonly string[], options: DecodeOptions, terminal: Terminal): Promise<void> {
  // Checked before anything is read.
  releaseOf(options.release)
  const hex = hexOf(words.join(''))
  if (hex !== undefined) return decodeBytes(hex, options, terminal)
  const name = words.join(' ')
  let file: number
  try {
    file = openGivenFile(name)
  } catch (error) {
    throw new BadInput(`xen decode: ${name} is neither hex nor a readable file: ${(error as Error).message}`)
  }
  try {
    const { size } = fstatSync(file)
    if (size > maxFileBytes) {
      const start = Buffer.alloc(4)
      readSync(file, start, 0, 4, 0)
      if (!isStream(start, options))
        throw new BadInput(
          `xen decode: ${name} has ${size} bytes, more than ${maxFileBytes}, and does not begin like a stream`,
        )
      await decodeStream(piecesOf(file), options, terminal)
      return
    }
    const bytes = readFileSync(file)
    await decodeBytes(hexOf(bytes.toString('latin1')) ?? bytes, options, terminal)
  } finally {
    closeSync(file)
  }
}

function* piecesOf(file: number): Generator<Uint8Array> {
  for (let at = 0; ; ) {
    const piece = Buffer.alloc(pieceBytes)
    const bytes = readSync(file, piece, 0, pieceBytes, at)
    if (bytes === 0) return
    at += bytes
    yield piece.subarray(0, bytes)
  }
}

function isStream(bytes: Uint8Array, { as }: DecodeOptions): boolean {
  if (as !== undefined) return as === 'stream'
  return bytes.length >= 4 && new DataView(bytes.buffer, bytes.byteOffset).getInt32(0, true) === streamMark
}

async function decodeBytes(bytes: Uint8Array, options: DecodeOptions, terminal: Terminal): Promise<void> {
  if (isStream(bytes, options)) await decodeStream([bytes], options, terminal)
  else decodeStructure(bytes, options, terminal)
}

function decodeStructure(bytes: Uint8Array, options: DecodeOptions, terminal: Terminal): void {
  const { as, bits, json } = options
  const structure = as === undefined || as === 'stream' ? 'op' : as
  let described: Described
  try {
    described = describe(bytes, { as: structure, release: releaseOf(options.release), bits: bits === '32' ? 32 : 64 })
  } catch (error) {
    if (error instanceof RangeError) throw new BadInput(`xen decode: ${error.message}`)
    throw error
  }
  if (json === true) {
    terminal.print(JSON.stringify(described))
    return
  }
  const rows = described.fields.map(({ name, at, value, words }) => [`${at}`, name, value, words])
  terminal.print(pc.bold(described.title))
  terminal.print(tableOf(['at', 'field', 'value', ''], rows, ['right', 'left', 'left', 'left']))
  const rest = bytes.length - described.bytes
  if (rest > 0) terminal.note(`${rest} more bytes after the structure were not decoded`)
}

/** Prints each record in a line as it is read; as JSON, one document at the end of a whole stream. */
async function decodeStream(source: Iterable<Uint8Array>, options: DecodeOptions, terminal: Terminal): Promise<void> {
  const release = options.release === undefined ? undefined : releaseOf(options.release)
  const records: DescribedRecord[] = []
  let pages = 0
  let bytes = 0
  try {
    if (options.json !== true) terminal.print(pc.bold(line('at', 'record', '')))
    for await (const record of describeStream(source, release)) {
      bytes = record.at + record.bytes
      if (record.name === 'page') pages++
      if (options.json === true) records.push(record)
      else terminal.print(line(`${record.at}`, record.name, record.words))
    }
  } catch (error) {
    if (error instanceof TmemError) throw new BadInput(`xen decode: ${error.message}`)
    throw error
  }
  if (options.json === true) terminal.print(JSON.stringify({ title: 'saved stream', bytes, pages, records }))
  else terminal.note(`${pages} pages in ${bytes} bytes`)
}

const line = (at: string, name: string, words: string): string =>
  `${at.padStart(10)}  ${name.padEnd(20)}  ${words}`.trimEnd()

/** Bytes from hex, perhaps with spaces, line ends, commas and `0x`; `undefined` for any other text. */
function hexOf(text: string): Uint8Array | undefined {
  const digits = text.replaceAll(/\s|,|0x/gi, '')
  return /^([\da-f]{2})+$/i.test(digits) ? new Uint8Array(Buffer.from(digits, 'hex')) : undefined
}
