/** Memory of other machines as a layer of a stack: its settings, judged before anything is reached. */
import {
  type ByteAmount,
  bytesOf,
  checkOptions,
  type Layer,
  type LayerContext,
  type LayerFactory,
  maxEntries,
  maxPageSize,
  type OptionValue,
  type PlaceTraits,
} from '@tmem/core'
import { openRamster, unitBytes } from './place.ts'
import type { RemotePlan } from './remote.ts'
import { valkey } from './valkey.ts'

/** Settings of ramster. */
export interface RamsterOptions {
  /**
   * The machines: 1 to 8. With one, only pages that may vanish go there; with more, those that may not go to two of
   * them. They must share nothing: not the computer, not the server.
   */
  readonly machines: readonly RemotePlan[]
  /** Bytes of blocks that it holds, copies not counted: 1 MiB to 256 GiB. Takes 1 % of it as memory here. */
  readonly sizeBytes: ByteAmount
}

const minSizeBytes = 2 ** 20
const maxSizeBytes = 2 ** 38
const mostMachines = 8
/** Blocks that are asked for in one message: what 1 MiB of pages consists of. */
const readsAtOnce = 256

/**
 * Blocks in the memory of other machines. Throws `TypeError` for unknown options, `RangeError` for settings that make
 * no sense.
 */
export function ramster(options: RamsterOptions): Layer {
  checkOptions('ramster', options, { machines: true, sizeBytes: true })
  const { machines } = options
  const sizeBytes = bytesOf('ramster', 'sizeBytes', options.sizeBytes)
  if (!Array.isArray(machines) || machines.length < 1 || machines.length > mostMachines)
    throw new RangeError(`ramster: machines is a list of 1 to ${mostMachines} machines`)
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < minSizeBytes || sizeBytes > maxSizeBytes)
    throw new RangeError(`ramster: sizeBytes is ${minSizeBytes} to ${maxSizeBytes}, got ${sizeBytes}`)
  const persistent = machines.length > 1
  const traits: PlaceTraits = Object.freeze({
    persistent,
    ephemeral: true,
    waits: true,
    survives: 'nothing',
    rawOnly: false,
    capacity: Math.min(maxEntries, Math.floor(sizeBytes / 2048)),
    // A machine may be full, or away.
    reservedBytes: 0,
    maxPageSize,
    readsAtOnce,
  })
  return Object.freeze({
    name: 'ramster',
    place: {
      traits,
      open: (context: LayerContext) =>
        openRamster({ traits, machines, sizeBytes: Math.floor(sizeBytes / unitBytes) * unitBytes }, context),
    },
  })
}

/** `ramster(valkey=10.0.0.5:6379,valkey2=10.0.0.6:6379)` in the text of a stack. */
export const ramsterFactory: LayerFactory = Object.freeze({
  name: 'ramster',
  summary: 'memory of other machines, lent by Valkey or Redis servers',
  options: Object.freeze({
    valkey: { kind: 'text', summary: 'a server: HOST:PORT, [IPV6]:PORT, or HOST (port 6379)', required: true },
    valkey2: { kind: 'text', summary: 'a second, independent one: without it only pages that may vanish go there' },
    valkey3: { kind: 'text', summary: 'a third one: two of them have each page' },
    size: {
      kind: 'bytes',
      summary: 'bytes of blocks that it holds (default: 4GiB)',
      minimum: minSizeBytes,
      maximum: maxSizeBytes,
    },
    user: { kind: 'text', summary: 'user of an ACL (default: none)' },
    passwordFile: { kind: 'text', summary: 'path of a file with the password (default: none)' },
    tls: { kind: 'flag', summary: 'use TLS (default: only with caFile)' },
    caFile: { kind: 'text', summary: 'path of the certificates of those who may vouch for the servers' },
    prefix: { kind: 'text', summary: 'what keys begin with (default: tmem)' },
    lease: {
      kind: 'integer',
      summary: 'seconds after which a server drops what is not renewed (default: 3600)',
      minimum: 1,
      maximum: 604_800,
    },
  } as const),
  create: (options: Readonly<Record<string, OptionValue>>): Layer => {
    const { size = 2 ** 32, user, passwordFile, tls, caFile, prefix, lease } = options
    const more = {
      ...(user === undefined ? {} : { username: String(user) }),
      ...(passwordFile === undefined ? {} : { passwordFile: String(passwordFile) }),
      ...(tls === undefined ? {} : { tls: tls === true }),
      ...(caFile === undefined ? {} : { caFile: String(caFile) }),
      ...(prefix === undefined ? {} : { prefix: String(prefix) }),
      ...(lease === undefined ? {} : { leaseMs: Number(lease) * 1000 }),
    }
    const servers = ['valkey', 'valkey2', 'valkey3'].filter((name) => options[name] !== undefined)
    const machines = servers.map((name) => valkey({ ...addressOf(name, String(options[name])), ...more }))
    return ramster({ machines, sizeBytes: Number(size) })
  },
})

/** Host and port of a server. Throws `RangeError` for what is none. */
function addressOf(option: string, text: string): { host: string; port: number } {
  const [, inBrackets, bare, port] = /^(?:\[([0-9a-fA-F:.%]+)\]|([^:\s[\]]+))(?::(\d{1,5}))?$/.exec(text) ?? []
  const host = inBrackets ?? bare
  if (host === undefined)
    throw new RangeError(`${option} is HOST:PORT, [IPV6]:PORT or HOST, got ${JSON.stringify(text)}`)
  return { host, port: port === undefined ? 6379 : Number(port) }
}
