/** `tmem xen decode`: a raw structure of Xen's tmem interface in words. */
import { type Described, describe, type Structure } from '@tmem/xen-hypercall'
import pc from 'picocolors'
import { BadInput } from '../ending.ts'
import { readGivenFile } from '../given-file.ts'
import { type Terminal, tableOf } from '../terminal.ts'
import { releaseOf } from './release.ts'

/** Structures have less than 200 bytes: who names a larger file means something else. */
const maxFileBytes = 65_536

/** Options of the command. */
export interface DecodeOptions {
  readonly as: Structure
  /** Its name; `undefined`: the default. */
  readonly release?: string
  readonly bits: '32' | '64'
  readonly json?: true
}

/** Prints the structure that `words` are in hex, or that the file of that name has, raw or in hex. */
export function decode(words: readonly string[], options: DecodeOptions, terminal: Terminal): void {
  const release = releaseOf(options.release)
  const bytes = hexOf(words.join('')) ?? bytesOfFile(words)
  let described: Described
  try {
    described = describe(bytes, { as: options.as, release, bits: options.bits === '32' ? 32 : 64 })
  } catch (error) {
    if (error instanceof RangeError) throw new BadInput(`xen decode: ${error.message}`)
    throw error
  }
  if (options.json === true) {
    terminal.print(JSON.stringify(described))
    return
  }
  const rows = described.fields.map(({ name, at, value, words }) => [`${at}`, name, value, words])
  terminal.print(pc.bold(described.title))
  terminal.print(tableOf(['at', 'field', 'value', ''], rows, ['right', 'left', 'left', 'left']))
  const rest = bytes.length - described.bytes
  if (rest > 0) terminal.note(`${rest} bytes after it are not looked at`)
}

/** Bytes in hex, perhaps with spaces, line ends, commas, `0x`; `undefined`: that is no hex. */
function hexOf(text: string): Uint8Array | undefined {
  const digits = text.replaceAll(/\s|,|0x/gi, '')
  return /^([\da-f]{2})+$/i.test(digits) ? new Uint8Array(Buffer.from(digits, 'hex')) : undefined
}

function bytesOfFile(words: readonly string[]): Uint8Array {
  const name = words.join(' ')
  let bytes: Buffer
  try {
    bytes = readGivenFile(name, maxFileBytes)
  } catch (error) {
    throw new BadInput(`xen decode: ${name} is neither hex nor a file that can be read: ${(error as Error).message}`)
  }
  return hexOf(bytes.toString('latin1')) ?? bytes
}
