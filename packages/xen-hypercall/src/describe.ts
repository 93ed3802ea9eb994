/** Raw structures, and saved streams, in words, for people: what each field is, and what is wrong with it. */
import { checkOptions } from '@tmem/core'
import {
  allClients,
  type Bits,
  ClientBit,
  Command,
  clientInfoLayout,
  defaultRelease,
  type Field,
  handleLayout,
  interfaceVersion,
  invalidObject,
  isSince,
  type Layout,
  maxPools,
  OldClientBit,
  operationLayouts,
  PoolBit,
  pageSizeShift,
  poolInfoLayout,
  type Release,
  readField,
  readObject,
  readUuid,
  SubOperation,
  sysctlHead,
  sysctlLayout,
  sysctlTmem,
  versionShift,
} from './abi.ts'
import { readStream, type StreamHead, type StreamRecord, type StreamSource } from './saved-stream.ts'

/** Structures that can be described. `op`: a `tmem_op`, whose command says which arm it has. */
export const structures = ['op', 'sysctl', 'handle', 'client', 'pool'] as const
export type Structure = (typeof structures)[number]

export interface DescribeOptions {
  readonly as?: Structure
  readonly release?: Release
  readonly bits?: Bits
}

/** A field in words. */
export interface DescribedField {
  readonly name: string
  /** Bytes from the start. */
  readonly at: number
  /** Its number, in hex. */
  readonly value: string
  /** What that means; may be empty. */
  readonly words: string
}

export interface Described {
  /** What it is, in words. */
  readonly title: string
  readonly bytes: number
  readonly fields: readonly DescribedField[]
}

const newClientBits = { frozen: ClientBit.Frozen, compress: ClientBit.Compress, migrating: ClientBit.Migrating }
const oldClientBits = { compress: OldClientBit.Compress, 'frozen before': OldClientBit.FrozenBefore }

/** Describes the structure at the start of `bytes`. Throws `RangeError` when it is too short. */
export function describe(bytes: Uint8Array, options: DescribeOptions = {}): Described {
  checkOptions('describe', options, { as: 'text?', release: 'text?', bits: 'number?' })
  const { as = 'op', release = defaultRelease, bits = 64 } = options
  const raw = new Uint8Array(bytes)
  const view = new DataView(raw.buffer)
  const need = (layout: Layout, what: string): void => {
    if (raw.length >= layout.bytes) return
    throw new RangeError(`${what} has ${layout.bytes} bytes, and here are ${raw.length}`)
  }
  const told = (title: string, layout: Layout, words: (name: string, field: Field) => string): Described => {
    const fields = Object.entries(layout.fields).map(([name, field]) => ({
      name,
      at: field.at,
      value: hexOf(view, field),
      words: words(name, field),
    }))
    return { title, bytes: layout.bytes, fields }
  }
  switch (as) {
    case 'handle': {
      const layout = handleLayout(release)
      need(layout, `a handle of ${release}`)
      return told(`tmem_handle of ${release}`, layout, (name, field) =>
        name === 'oid' ? objectWords(view, field) : `${readField(view, field)}`,
      )
    }
    case 'client':
      need(clientInfoLayout, 'client information')
      return told('client information', clientInfoLayout, (name, field) => {
        const value = readField(view, field)
        if (name === 'flags') return namesOf(value, newClientBits)
        return name === 'maxpools' && value > maxPools ? `${value}: more than ${maxPools}` : `${value}`
      })
    case 'pool':
      need(poolInfoLayout, 'pool information')
      return told('pool information', poolInfoLayout, (name, field) => {
        if (name === 'uuid') return uuidText(readUuid(view, field))
        const value = readField(view, field)
        if (name === 'flags') return flagWords(value & ~4, release) + ((value & 4) === 0 ? '' : ', auth')
        return `${value}`
      })
    case 'sysctl': {
      need({ ...sysctlHead, bytes: sysctlHead.fields.body.at + sysctlLayout.bytes }, 'a sysctl with its body')
      const at = sysctlHead.fields.body.at
      const fields: Record<string, Field> = {
        sysctl: sysctlHead.fields.cmd,
        interface_version: sysctlHead.fields.interface_version,
      }
      for (const [name, field] of Object.entries(sysctlLayout.fields)) fields[name] = { ...field, at: field.at + at }
      const version = interfaceVersion(release)
      const layout = { bytes: at + sysctlLayout.bytes, fields }
      return told(`xen_sysctl of ${release}`, layout, (name, field) => {
        const value = readField(view, field)
        if (name === 'sysctl') return value === sysctlTmem ? 'tmem_op' : `not tmem's, which is ${sysctlTmem}`
        if (name === 'interface_version')
          return value === version ? `that of ${release}` : `-EACCES: ${release} has ${version ?? 'no such sysctl'}`
        if (name === 'cmd') return subOperationName(value, release)
        if (name === 'pad') return value === 0 ? '' : '-EINVAL: must be 0'
        return operationWords(name, view, field, release)
      })
    }
    default: {
      const { creat, ctrl, gen } = operationLayouts(release, bits)
      need(gen, `a tmem_op of ${release} and guests of ${bits} bits`)
      const command = view.getUint32(0, true)
      const isCreat = command === Command.NewPool || command === Command.Auth || command === Command.RestoreNew
      const layout: Layout = isCreat ? creat : command === Command.Control && ctrl !== undefined ? ctrl : gen
      const title = `tmem_op of ${release}, guests of ${bits} bits: ${commandName(command, release)}`
      return told(title, layout, (name, field) => {
        const value = readField(view, field)
        if (name === 'cmd') return commandName(command, release)
        if (name === 'subop') return subOperationName(value, release)
        if (name === 'uuid') return uuidText(readUuid(view, field))
        if (name === 'flags') {
          if (command === Command.Auth) return value === 1 ? 'authorise' : 'withdraw'
          return flagWords(value, release)
        }
        if (isCreat && name === 'arg1') return command === Command.NewPool ? '' : `domain ${value}`
        return operationWords(name, view, field, release)
      })
    }
  }
}

/** A record of a saved stream in words. */
export interface DescribedRecord {
  /** What it is, in a word or two. */
  readonly name: string
  /** Bytes from the start of the stream, and how many it has. */
  readonly at: number
  readonly bytes: number
  /** What it says. */
  readonly words: string
}

/**
 * Describes a saved stream, record by record: of `release`, or of the generation that its head has. Throws `TmemError`
 * (`TMEM_CORRUPT`) where it is cut or wrong, after what was whole before.
 */
export async function* describeStream(source: StreamSource, release?: Release): AsyncGenerator<DescribedRecord, void> {
  let head: StreamHead | undefined
  for await (const record of readStream(source, release === undefined ? {} : { release })) {
    if (record.kind === 'head') head = record
    const { kind: name, at, bytes } = record
    yield { name, at, bytes, words: recordWords(record, head!.release) }
  }
}

function recordWords(record: StreamRecord, release: Release): string {
  switch (record.kind) {
    case 'head': {
      const { version, maxPools: most, pools, flags, weight, cap } = record
      const bits = isSince(release, '4.8') ? newClientBits : oldClientBits
      const many = pools === undefined ? `up to ${most} pools` : `${pools} of up to ${most} pools`
      const rest = cap === undefined ? '' : `, cap ${cap}`
      return `${generationOf(release)}: version ${version}, ${many}; client: ${namesOf(flags, bits)}, weight ${weight}${rest}`
    }
    case 'pool': {
      const { poolId, flags, pages, uuid } = record
      const shared = (flags & PoolBit.Shared) === 0 ? '' : `, uuid ${uuidText(uuid)}`
      return `pool ${poolId}: ${flagWords(flags & ~4, release)}; up to ${pages} pages${shared}`
    }
    case 'page':
    case 'flushed':
      return `pool ${record.poolId}, object ${record.object}, index ${record.index}`
    case 'no more pages':
      return 'fewer pages came than the pool had'
    case 'end of pools':
    case 'flushed pages':
    case 'end of flushed pages':
      return ''
  }
}

/** Releases that write the same stream. */
function generationOf(release: Release): string {
  if (release === '4.0.0') return 'Xen 4.0.0'
  return isSince(release, '4.8') ? 'Xen 4.8 and later' : 'Xen 4.0 to 4.7'
}

function operationWords(name: string, view: DataView, field: Field, release: Release): string {
  const value = readField(view, field)
  switch (name) {
    case 'pool_id':
      return value >>> 0 < maxPools ? `${value}` : `${value}: -ENODEV, there are ${maxPools} slots`
    case 'cli_id':
      return value === allClients ? 'all domains' : `domain ${value}`
    case 'oid':
      return objectWords(view, field)
    case 'cmfn':
      return 'number of a frame'
    case 'buf':
    case 'buffer':
      return 'address of a buffer'
    case 'tmem_offset':
    case 'pfn_offset':
    case 'len':
      return isSince(release, '4.4') && value !== 0 ? 'ignored' : `${value}`
    default:
      return `${value}`
  }
}

function hexOf(view: DataView, { at, bytes, count = 1 }: Field): string {
  const words: string[] = []
  for (let n = 0; n < count && at + n * bytes + bytes <= view.byteLength; n++)
    words.push((bytes === 8 ? view.getBigUint64(at + n * 8, true) : view.getUint32(at + n * 4, true)).toString(16))
  return words.map((word) => `0x${word}`).join(' ')
}

function objectWords(view: DataView, field: Field): string {
  const object = readObject(view, field)
  return object === invalidObject ? 'all ones: no object' : `object ${object}`
}

/** A uuid as the tools write it: the first 16 digits are the high half. */
export function uuidText(uuid: bigint): string {
  const digits = uuid.toString(16).padStart(32, '0')
  const parts = [8, 12, 16, 20].map((to, n) => digits.slice([0, 8, 12, 16][n], to))
  return [...parts, digits.slice(20)].join('-')
}

/** Reads a uuid as the tools write it, with or without its hyphens; `undefined`: that is none. */
export function parseUuid(text: string): bigint | undefined {
  const isUuid = /^[\da-f]{8}(-?)[\da-f]{4}\1[\da-f]{4}\1[\da-f]{4}\1[\da-f]{12}$/i.test(text)
  return isUuid ? BigInt(`0x${text.replaceAll('-', '')}`) : undefined
}

function namesOf(value: number, bits: Readonly<Record<string, number>>): string {
  const names = Object.entries(bits).filter(([, bit]) => (value & bit) !== 0)
  const rest = names.reduce((left, [, bit]) => left & ~bit, value) >>> 0
  const words = names.map(([name]) => name)
  if (rest !== 0) words.push(`0x${rest.toString(16)}, which has no name`)
  return words.length === 0 ? 'none' : words.join(', ')
}

/** Flags of NEW_POOL in words, with why they would be refused. */
function flagWords(flags: number, release: Release): string {
  const isFirst = release === '4.0.0'
  const version = flags >>> versionShift
  const order = (flags >>> pageSizeShift) & 0xf
  const isPersistent = (flags & PoolBit.Persistent) !== 0
  const isShared = (flags & PoolBit.Shared) !== 0
  const words = [
    isPersistent ? 'persistent' : 'ephemeral',
    isShared ? 'shared' : 'private',
    `pages of ${4 << order} KiB`,
  ]
  words.push(`version ${version}`)
  const wrong: string[] = []
  if (version !== (isFirst ? 0 : 1)) wrong.push(`version must be ${isFirst ? 0 : 1}`)
  if (isPersistent && isShared && isSince(release, '4.5')) wrong.push('shared and persistent')
  if (order !== 0) wrong.push('pages of another size')
  if (!isFirst && (flags & PoolBit.Precompressed) !== 0) wrong.push('precompressed')
  if (!isFirst && (flags & PoolBit.Reserved) !== 0) wrong.push('a reserved bit')
  return words.join(', ') + (wrong.length === 0 ? '' : `; -EPERM: ${wrong.join(', ')}`)
}

const upper = (name: string): string => name.replace(/(?<=[a-z])(?=[A-Z])/g, '_').toUpperCase()

function commandName(command: number, release: Release): string {
  const name = Object.entries(Command).find(([, number]) => number === command)?.[0]
  if (name === undefined) return `unknown command ${command}: ${isSince(release, '4.4') ? '-ENOSYS' : 'answered 0'}`
  const text = name === 'Exchange' ? 'XCHG' : upper(name)
  const isPart = command === Command.NewPage || (command >= Command.Read && command <= Command.Exchange)
  if (isPart && isSince(release, '4.4')) return `${text}: -ENOSYS since 4.4`
  if (command === Command.Control && isSince(release, '4.6')) return `${text}: -EOPNOTSUPP since 4.6`
  if (command > 100 && isSince(release, '4.9')) return `${text}: -EOPNOTSUPP since 4.9`
  return text
}

/** Names that a number has had only up to 4.7, only from 4.8 on, only from 4.9 on. */
const upTo47 = new Set(['SetWeight', 'SetCap', 'SetCompress'])
const since48 = new Set(['GetClientInfo', 'SetClientInfo', 'GetPools'])
const since49 = new Set(['SetPools', 'SetAuth'])

function subOperationName(number: number, release: Release): string {
  const name = Object.entries(SubOperation).find(([key, value]) => {
    if (value !== number) return false
    if (upTo47.has(key) || (value >= 11 && value <= 18 && key !== 'SetAuth')) return !isSince(release, '4.8')
    if (since48.has(key)) return isSince(release, '4.8')
    return !since49.has(key) || isSince(release, '4.9')
  })?.[0]
  return name === undefined ? `unknown sub-operation ${number}: -1` : upper(name)
}
