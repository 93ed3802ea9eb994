/** Sealing as a layer of a stack: its settings, judged before anything is opened, and its key. */
import { hkdfSync, randomBytes } from 'node:crypto'
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs'
import {
  checkOptions,
  isSlow,
  type Layer,
  type LayerContext,
  type LayerFactory,
  type OptionValue,
  type Place,
  type PlaceTraits,
  TmemError,
} from '@tmem/core'
import { keyBytes, SealedPlace } from './sealed-place.ts'

/** Settings of `seal`. */
export interface SealOptions {
  /**
   * Path of a file with a secret of 32 to 4096 bytes, read when the stack is opened (default: the system's random
   * numbers). Each start derives a key of its own from it.
   */
  readonly keyFile?: string
}

const leastSecretBytes = 32
const mostSecretBytes = 4096

/**
 * Encrypts and authenticates the blocks of the place below, which waits (a file, another machine): AES-256-GCM under a
 * key of this start. A block that was altered, cut, exchanged with another one or is an older one of the same page is
 * `TMEM_CORRUPT`, and never bytes. Takes 15 bytes of memory for each block that the place may have, and 32 bytes of the
 * place for each that it has.
 *
 * Throws `TypeError` for unknown options. Opening throws `TmemError`: `TMEM_IO` for a file that cannot be read or has
 * too little in it, `TMEM_NO_MEMORY`.
 */
export function seal(options: SealOptions = {}): Layer {
  checkOptions('seal', options, { keyFile: 'text?' })
  const { keyFile } = options
  return Object.freeze({
    name: 'seal',
    planPlace,
    wrapPlace: (next: Place, context: LayerContext) => {
      if (!isSlow(next))
        throw new TmemError('TMEM_BAD_STACK', `seal cannot stand above ${next.name}`, { layer: 'seal' })
      return new SealedPlace(next, keyOfThisStart(keyFile), context)
    },
  })
}

function planPlace(below: PlaceTraits): PlaceTraits | string {
  if (!below.waits) return 'its blocks do not leave the process'
  if (below.rawOnly) return 'it takes pages as they are, which sealed ones are not'
  // Which block of a page is the newest is known here only, and only as long as this process lives.
  if (below.survives !== 'nothing') return 'it survives this process, and the key of this start does not'
  return below
}

/** `seal(keyFile=/etc/tmem.key)` in the text of a stack. */
export const sealFactory: LayerFactory = Object.freeze({
  name: 'seal',
  summary: 'encrypts and authenticates the blocks of the place below',
  options: Object.freeze({
    keyFile: { kind: 'text', summary: 'path of a file with a secret of 32 to 4096 bytes (default: random numbers)' },
  } as const),
  create: ({ keyFile }: Readonly<Record<string, OptionValue>>): Layer =>
    seal(keyFile === undefined ? {} : { keyFile: String(keyFile) }),
})

/** A key that no other start has, so that numbers may begin at 1 each time. */
function keyOfThisStart(keyFile: string | undefined): Uint8Array {
  if (keyFile === undefined) return randomBytes(keyBytes)
  const secret = readSecret(keyFile)
  const key = new Uint8Array(hkdfSync('sha256', secret, randomBytes(32), 'tmem seal', keyBytes))
  secret.fill(0)
  return key
}

function readSecret(path: string): Uint8Array {
  let secret: Buffer
  try {
    // Opening a pipe would wait for who writes to it.
    const file = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)
    try {
      if (!fstatSync(file).isFile()) throw new Error('it is no file')
      const buffer = Buffer.alloc(mostSecretBytes + 1)
      secret = buffer.subarray(0, readSync(file, buffer))
    } finally {
      closeSync(file)
    }
  } catch (error) {
    throw secretError(path, (error as Error).message, error)
  }
  if (secret.length < leastSecretBytes || secret.length > mostSecretBytes)
    throw secretError(
      path,
      `it has ${secret.length > mostSecretBytes ? 'more than 4096' : secret.length} bytes, and a secret has ${leastSecretBytes} to ${mostSecretBytes}`,
    )
  return secret
}

const secretError = (path: string, why: string, cause?: unknown): TmemError =>
  new TmemError('TMEM_IO', `seal: cannot read the secret in ${path}: ${why}`, {
    layer: 'seal',
    ...(cause === undefined ? {} : { cause }),
  })
