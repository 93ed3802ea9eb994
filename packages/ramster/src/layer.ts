/** Memory of other machines as a layer of a stack: its settings, checked before any connection. */
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
import { Lenders } from './lenders.ts'
import { openRamster, unitBytes } from './place.ts'
import type { RemotePlan } from './remote.ts'
import { valkey, valkeyCluster } from './valkey.ts'

/** Settings of ramster. */
export interface RamsterOptions {
  /**
   * The machines: 1 to 8. With one, only pages that may vanish go there; with more, those that may not go to two of
   * them. They must share nothing: not the computer, not the server. As `Lenders` they can be added and taken out
   * later.
   */
  readonly machines: readonly RemotePlan[] | Lenders
  /** Bytes of blocks that it holds, copies not counted: 1 MiB to 256 GiB. Takes 1 % of it as memory here. */
  readonly sizeBytes: ByteAmount
  /**
   * Milliseconds that a read of a page which may not vanish waits while every machine that has it is away: 0 to
   * 3,600,000 (default: 10,000). Then it fails, and the page stays.
   */
  readonly waitMs?: number
  /** Pages come up by themselves while the memory above is less than half full (default: false). */
  readonly repatriate?: boolean
}

/** A ramster, and its machines. */
export interface RamsterLayer extends Layer {
  readonly lenders: Lenders
  /** The machines that a text names, with the settings of the others: `valkey=…` or `cluster=…`, as in a stack. */
  readonly planOf?: (text: string) => RemotePlan
}

const minSizeBytes = 2 ** 20
const maxSizeBytes = 2 ** 38
const mostWaitMs = 3_600_000
/** Blocks that are asked for in one message: what 1 MiB of pages consists of. */
const readsAtOnce = 256

/**
 * Blocks in the memory of other machines. Throws `TypeError` for unknown options, `RangeError` for settings that make
 * no sense.
 */
export function ramster(options: RamsterOptions): RamsterLayer {
  checkOptions('ramster', options, { machines: true, sizeBytes: true, waitMs: 'number?', repatriate: 'flag?' })
  const { machines, waitMs = 10_000, repatriate = false } = options
  const sizeBytes = bytesOf('ramster', 'sizeBytes', options.sizeBytes)
  const lenders = machines instanceof Lenders ? machines : new Lenders(machines)
  if (!Number.isSafeInteger(sizeBytes) || sizeBytes < minSizeBytes || sizeBytes > maxSizeBytes)
    throw new RangeError(`ramster: sizeBytes is ${minSizeBytes} to ${maxSizeBytes}, got ${sizeBytes}`)
  if (!Number.isSafeInteger(waitMs) || waitMs < 0 || waitMs > mostWaitMs)
    throw new RangeError(`ramster: waitMs is 0 to ${mostWaitMs}, got ${waitMs}`)
  const { persistent } = lenders
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
    lenders,
    place: {
      traits,
      open: (context: LayerContext) =>
        openRamster(
          { traits, lenders, sizeBytes: Math.floor(sizeBytes / unitBytes) * unitBytes, waitMs, repatriate },
          context,
        ),
    },
  })
}

/**
 * `ramster(valkey=10.0.0.5:6379,valkey2=10.0.0.6:6379)` in the text of a stack; or
 * `ramster(cluster=10.0.1.1:6379+10.0.1.2:6379,cluster2=10.0.2.1:6379)`.
 */
export const ramsterFactory: LayerFactory = Object.freeze({
  name: 'ramster',
  summary: 'memory of other machines, lent by Valkey or Redis servers',
  options: Object.freeze({
    valkey: { kind: 'text', summary: 'a server: HOST:PORT, [IPV6]:PORT, or HOST (port 6379)' },
    valkey2: { kind: 'text', summary: 'a second, independent one: without it only pages that may vanish go there' },
    valkey3: { kind: 'text', summary: 'a third one: two of them have each page' },
    cluster: { kind: 'text', summary: 'a cluster, which counts as one machine: some of its servers, with + between' },
    cluster2: { kind: 'text', summary: 'a second one, which shares no server with the first' },
    cluster3: { kind: 'text', summary: 'a third one' },
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
    wait: {
      kind: 'integer',
      summary: 'seconds that a read waits while every machine that has the page is away; then it fails (default: 10)',
      minimum: 0,
      maximum: mostWaitMs / 1000,
    },
    repatriate: { kind: 'flag', summary: 'bring pages back while the memory above is half empty (default: no)' },
  } as const),
  create: (options: Readonly<Record<string, OptionValue>>): Layer => {
    const { size = 2 ** 32, user, passwordFile, tls, caFile, prefix, lease, wait, repatriate } = options
    const more = {
      ...(user === undefined ? {} : { username: String(user) }),
      ...(passwordFile === undefined ? {} : { passwordFile: String(passwordFile) }),
      ...(tls === undefined ? {} : { tls: tls === true }),
      ...(caFile === undefined ? {} : { caFile: String(caFile) }),
      ...(prefix === undefined ? {} : { prefix: String(prefix) }),
      ...(lease === undefined ? {} : { leaseMs: Number(lease) * 1000 }),
    }
    const planOf = (option: string, text: string): RemotePlan =>
      option.startsWith('cluster')
        ? valkeyCluster({ nodes: text.split('+').map((one) => addressOf(option, one)), ...more })
        : valkey({ ...addressOf(option, text), ...more })
    const named = [1, 2, 3].flatMap((n) => ['valkey', 'cluster'].map((kind) => (n === 1 ? kind : `${kind}${n}`)))
    const machines = named.filter((name) => options[name] !== undefined)
    if (machines.length === 0)
      throw new RangeError('name a server (valkey=HOST:PORT) or a cluster (cluster=HOST:PORT) that lends memory')
    const layer = ramster({
      machines: machines.map((name) => planOf(name, String(options[name]))),
      sizeBytes: Number(size),
      ...(wait === undefined ? {} : { waitMs: Number(wait) * 1000 }),
      ...(repatriate === undefined ? {} : { repatriate: repatriate === true }),
    })
    return Object.freeze({
      ...layer,
      planOf: (text: string) => {
        const [, option, address] = /^(valkey|cluster)=(.+)$/.exec(text) ?? []
        if (option === undefined || address === undefined)
          throw new RangeError(`a machine is valkey=HOST:PORT or cluster=HOST:PORT, got ${JSON.stringify(text)}`)
        return planOf(option, address)
      },
    })
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
