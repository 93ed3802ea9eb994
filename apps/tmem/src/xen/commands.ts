/** `tmem xen list` and the other commands of a toolstack to a Xen host, over its socket. */
import { link, open as openFile, rm } from 'node:fs/promises'
import { resolve } from 'node:path'
import {
  allClients,
  ClientBit,
  clientInfoLayout,
  isSince,
  parseUuid,
  type Release,
  readField,
  SubOperation as Sub,
  writeField,
} from '@tmem/xen-hypercall'
import { BadInput, Failed } from '../ending.ts'
import type { Terminal } from '../terminal.ts'
import { answerOf, ask, lastPiece, open, write, writePieces } from './socket.ts'

/** Options that all of them have. */
export interface XenOptions {
  readonly control: string
  readonly json?: true
}

const listBytes = 2 ** 20

/** The number of a domain; `all`. Throws `BadInput`. */
function clientOf(text: string): number {
  if (text === 'all') return allClients
  const id = Number(text)
  if (!/^\d+$/.test(text) || id > 32_751)
    throw new BadInput(`bad domain "${text}": expected a number from 0 to 32751, or all`)
  return id
}

function domainOf(text: string): number {
  const id = clientOf(text)
  if (id === allClients)
    throw new BadInput('expected the number of one domain: save, restore, attach and migrate do not take all')
  return id
}

/** The result of a sub-operation, and its buffer. Rejects with `Failed` for a negative one. */
async function control(options: XenOptions, what: string, request: object): Promise<readonly [number, Buffer]> {
  const { result, data } = await ask(options.control, { do: 'control', ...request })
  if (typeof result !== 'number' || result < 0)
    throw new Failed(`${what} was answered ${String(result)}: ${whyOf(result)}`)
  // Zeros at the end of the buffer are not sent.
  const bytes = Buffer.alloc('length' in request ? Number(request.length) : 0)
  if (typeof data === 'string') bytes.set(Buffer.from(data, 'base64').subarray(0, bytes.length))
  return [result, bytes]
}

const whyOf = (result: unknown): string =>
  result === -1 || result === -2 ? 'the domain does not exist, or has no pool yet' : 'see the error numbers of Xen'

/** Prints what the host lists, or its records as JSON. */
export async function list(
  domain: string | undefined,
  options: XenOptions & { long?: true },
  terminal: Terminal,
): Promise<void> {
  const client = clientOf(domain ?? 'all')
  const request = {
    subOperation: Sub.List,
    client,
    arg1: listBytes,
    arg2: Number(options.long === true),
    length: listBytes,
  }
  const [, bytes] = await control(options, 'LIST', request)
  const text = bytes.subarray(0, bytes.indexOf(0)).toString()
  if (options.json !== true) {
    terminal.print(text.trimEnd())
    return
  }
  const records = text.split('\n').filter((line) => line.includes('='))
  terminal.print(JSON.stringify({ records: records.map(recordOf) }))
}

/** A line of LIST: its letter, and its fields by name; one that is repeated is a list. */
function recordOf(line: string): object {
  const record: Record<string, unknown> = { record: line[0] }
  for (const field of line.slice(2).split(',')) {
    const [name, value] = field.split(':') as [string, string]
    const isText = name === 'PT' || name === 'U0' || name === 'U1'
    if (name === 'SC') record[name] = [...((record[name] as number[] | undefined) ?? []), Number(value)]
    else record[name] = isText ? value : Number(value)
  }
  return record
}

/** Freezes or thaws a domain, or all. */
export async function freeze(
  domain: string,
  isFrozen: boolean,
  options: XenOptions,
  terminal: Terminal,
): Promise<void> {
  const client = clientOf(domain)
  await control(options, isFrozen ? 'FREEZE' : 'THAW', { subOperation: isFrozen ? Sub.Freeze : Sub.Thaw, client })
  say(options, terminal, { domain, frozen: isFrozen }, `domain ${domain} is ${isFrozen ? 'frozen' : 'thawed'}`)
}

/** What can be set of a domain. */
export interface SetOptions extends XenOptions {
  readonly weight?: number
  readonly cap?: number
  readonly compress?: 'yes' | 'no'
}

/** Sets weight, cap (up to 4.7) or compression. */
export async function set(domain: string, options: SetOptions, terminal: Terminal): Promise<void> {
  const { weight, cap, compress } = options
  if (weight === undefined && cap === undefined && compress === undefined)
    throw new BadInput('name what to set: --weight, --cap or --compress')
  const client = clientOf(domain)
  const { release } = await ask(options.control, { do: 'info' })
  if (isSince(release as Release, '4.8')) {
    if (cap !== undefined) throw new BadInput(`Xen ${String(release)} has no cap, which 4.8 removed: leave out --cap`)
    const { bytes, fields } = clientInfoLayout
    const request = { subOperation: Sub.GetClientInfo, client, length: bytes }
    const [, info] = await control(options, 'GET_CLIENT_INFO', request)
    const view = new DataView(info.buffer, info.byteOffset)
    if (weight !== undefined) writeField(view, fields.weight, weight)
    if (compress !== undefined) {
      const flags = readField(view, fields.flags) & ~ClientBit.Compress
      writeField(view, fields.flags, flags | (compress === 'yes' ? ClientBit.Compress : 0))
    }
    const data = info.toString('base64')
    await control(options, 'SET_CLIENT_INFO', { subOperation: Sub.SetClientInfo, client, data })
  } else {
    if (weight !== undefined)
      await control(options, 'SET_WEIGHT', { subOperation: Sub.SetWeight, client, arg1: weight })
    if (cap !== undefined) await control(options, 'SET_CAP', { subOperation: Sub.SetCap, client, arg1: cap })
    if (compress !== undefined)
      await control(options, 'SET_COMPRESS', {
        subOperation: Sub.SetCompress,
        client,
        arg1: Number(compress === 'yes'),
      })
  }
  say(options, terminal, { domain, weight, cap, compress }, `domain ${domain} is set`)
}

/** Permits a domain, or all, to share under a uuid; or withdraws that. */
export async function sharedAuth(
  domain: string,
  options: XenOptions & { readonly uuid: string; readonly permit: 'yes' | 'no' },
  terminal: Terminal,
): Promise<void> {
  const uuid = parseUuid(options.uuid)
  if (uuid === undefined)
    throw new BadInput(`bad --uuid "${options.uuid}": expected 32 hex digits, perhaps as 8-4-4-4-12`)
  const permit = options.permit === 'yes'
  const request = { do: 'authorize', client: clientOf(domain), uuid: `0x${uuid.toString(16)}`, permit }
  const { result } = await ask(options.control, request)
  if (typeof result !== 'number' || result < 0)
    throw new Failed(
      `authorising domain ${domain} was answered ${String(result)}: the domain does not exist, or has no free slot`,
    )
  say(
    options,
    terminal,
    { domain, result },
    `domain ${domain} ${permit ? 'may share' : 'may not share'} under ${options.uuid}`,
  )
}

/** Shows how much memory could be freed. */
export async function freeable(options: XenOptions, terminal: Terminal): Promise<void> {
  const [mebibytes] = await control(options, 'QUERY_FREEABLE_MB', { subOperation: Sub.QueryFreeable })
  say(options, terminal, { mebibytes }, `${mebibytes} MiB can be freed`)
}

/** Evicts ephemeral pages until this many bytes are free, and gives the memory back. */
export async function flush(bytes: number, options: XenOptions, terminal: Terminal): Promise<void> {
  const { release } = await ask(options.control, { do: 'info' })
  const kibibytes = Math.ceil(bytes / 1024)
  const value = isSince(release as Release, '4.8') ? { arg2: kibibytes } : { arg1: kibibytes }
  const [freed] = await control(options, 'FLUSH', { subOperation: Sub.Flush, client: allClients, ...value })
  say(options, terminal, { kibibytes: freed }, `${freed} KiB are freed`)
}

/** Saves a domain to a new file, while it stays in service. */
export async function save(domain: string, file: string, options: XenOptions, terminal: Terminal): Promise<void> {
  const id = domainOf(domain)
  const partial = `${file}.${process.pid}.partial`
  // Only the owner may read a guest's memory.
  const handle = await openFile(partial, 'wx', 0o600).catch((error: Error) => {
    throw new BadInput(`${partial} cannot be created: ${error.message}`)
  })
  const full = (error: Error): never => {
    throw new Failed(`${partial} cannot be written and was removed: ${error.message}`)
  }
  try {
    try {
      const { socket, reader } = await open(options.control, { do: 'save', domain: id })
      try {
        // Before the first piece there may be an error.
        for await (const piece of piecesOrError(options.control, reader)) await handle.appendFile(piece).catch(full)
        const { bytes } = await answerOf(options.control, reader)
        await handle.datasync().catch(full)
        // Unlike a rename, a link never replaces a file.
        await link(partial, file).catch((error: Error) => {
          throw new Failed(`${file} cannot be created: ${error.message}`)
        })
        say(options, terminal, { domain, file, bytes }, `domain ${domain} is saved: ${String(bytes)} bytes in ${file}`)
      } finally {
        socket.destroy()
      }
    } finally {
      await handle.close()
    }
  } finally {
    await rm(partial)
  }
}

/** The pieces of a stream. Rejects with `Failed` for an error in their stead, or when they end before. */
async function* piecesOrError(path: string, reader: import('./socket.ts').SocketReader): AsyncGenerator<Buffer> {
  try {
    yield* reader.pieces()
  } catch (error) {
    throw new Failed(`the host at ${path} did not send the whole stream: ${(error as Error).message}`)
  }
}

/** Restores a domain from a file; its guest can then connect. */
export async function restore(domain: string, file: string, options: XenOptions, terminal: Terminal): Promise<void> {
  const id = domainOf(domain)
  const handle = await openFile(file, 'r').catch((error: Error) => {
    throw new BadInput(`${file} cannot be read: ${error.message}`)
  })
  try {
    const { socket, reader } = await open(options.control, { do: 'restore', domain: id })
    try {
      const sent = writePieces(socket, handle.createReadStream({ autoClose: false })).then(() =>
        write(socket, lastPiece),
      )
      // The host may have refused the stream early: its answer decides.
      const [answer] = await Promise.all([answerOf(options.control, reader), sent.catch(() => undefined)])
      const { pools, pages } = answer['restored'] as { pools: number; pages: number }
      say(options, terminal, { domain, pools, pages }, `domain ${domain} is restored: ${pages} pages in ${pools} pools`)
    } finally {
      socket.destroy()
    }
  } finally {
    await handle.close()
  }
}

/** Makes a host serve a virtual machine whose kernel has the module of @tmem/kernel-guest. */
export async function attach(
  domain: string,
  options: XenOptions & { readonly memory: string; readonly doorbell: string },
  terminal: Terminal,
): Promise<void> {
  const memory = resolve(options.memory)
  const doorbell = resolve(options.doorbell)
  await ask(options.control, { do: 'attach', domain: domainOf(domain), memory, doorbell })
  say(options, terminal, { domain, memory, doorbell }, `domain ${domain} is the guest at ${doorbell}`)
}

/** Moves a domain to another host while its guest runs. */
export async function migrate(
  domain: string,
  options: XenOptions & { readonly to: string },
  terminal: Terminal,
): Promise<void> {
  const { restored, bytes, stoppedMs } = await ask(options.control, {
    do: 'migrate',
    domain: domainOf(domain),
    to: options.to,
  })
  const { pools, pages, flushed } = restored as { pools: number; pages: number; flushed: number }
  const words = `${pages} pages in ${pools} pools, ${flushed} flushed meanwhile, ${String(bytes)} bytes`
  say(
    options,
    terminal,
    { domain, pools, pages, flushed, bytes, stoppedMs },
    `domain ${domain} is at ${options.to}: ${words}; it stood still for ${Number(stoppedMs).toFixed(1)} ms`,
  )
}

function say(options: XenOptions, terminal: Terminal, answer: object, words: string): void {
  terminal.print(options.json === true ? JSON.stringify(answer) : words)
}
