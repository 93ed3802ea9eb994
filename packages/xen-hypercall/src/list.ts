/**
 * The text of LIST: one record per line, made of named fields.
 *
 * Invariant: the text and the zero behind it fit the length that was given, and no line is cut. DEVIATION: Xen wrote
 * the line of a client also past the end of the buffer; here it is dropped as the others are. What we do not have
 * (trees of nodes, contents shared by pages, cycles) is printed as 0.
 *
 * Source: the reference notes on the ABI, §4.
 */
import { allClients } from './abi.ts'
import { type Client, ephemeralPages, type XenPool } from './clients.ts'
import type { XenHost } from './host.ts'

type Pairs = readonly (readonly [string, number | string | bigint])[]

const fields = (pairs: Pairs): string => pairs.map(([name, value]) => `${name}:${value}`).join(',')

/** Lines that fit in `length` bytes with a zero behind the last. */
class Lines {
  readonly #parts: string[] = []
  readonly #length: number
  #bytes = 0

  constructor(length: number) {
    this.#length = length
  }

  /** Adds a line; false: it does not fit. */
  add(line: string): boolean {
    const bytes = line.length + 1
    if (this.#bytes + bytes >= this.#length) return false
    this.#parts.push(line, '\n')
    this.#bytes += bytes
    return true
  }

  get text(): Uint8Array {
    return new TextEncoder().encode(this.#parts.join(''))
  }
}

/** The text of a client, or of all and the host, in at most `length` bytes; `undefined`: there is no such client. */
export function listText(host: XenHost, id: number, length: number, isLong: boolean): Uint8Array | undefined {
  const lines = new Lines(length)
  if (id !== allClients) {
    const client = host.clients.get(id)
    if (client === undefined) return undefined
    listClient(host, client, isLong, lines)
    return lines.text
  }
  lines.add(globalLine(host, isLong))
  let head: string | undefined
  for (const [slot, pool] of host.shared.entries()) {
    if (pool === undefined) continue
    const own = `S=SI:${slot},${typeOf(pool)},${uuidOf(pool)}`
    // The original put each further line together behind the first one's head, and showed that again.
    const shown = host.isOriginal && head !== undefined ? head : own
    head ??= own
    const sharers = pool.users.map((client) => `,SC:${client.id}`).join('')
    if (!lines.add(`${shown}${sharers}${isLong ? `,${poolStatistics(pool)}` : ''}`)) break
  }
  for (const client of host.clients.values()) listClient(host, client, isLong, lines)
  if (host.isSince('4.4')) lines.add('T')
  return lines.text
}

function globalLine(host: XenHost, isLong: boolean): string {
  const { counters } = host
  const { Tt, Te, Cf, Af, Pf, Lm, Et, Ea, Rt, Ra, Rx, Fp, Ep } = counters
  const names = { Tt, Te, Cf, Af, Pf, Ta: Math.floor(host.freed / 4096), Lm, Et, Ea, Rt, Ra, Rx, Fp }
  const short = `G=${fields(Object.entries(names))}`
  if (!isLong) return short
  let ephemeral = 0
  let objects = 0
  let pages = 0
  const pools = new Set<XenPool>()
  for (const client of host.clients.values()) for (const pool of client.slots) if (pool !== undefined) pools.add(pool)
  for (const pool of pools) {
    const census = pool.census()
    objects += census.objects
    pages += census.pages
    if (!pool.isPersistent) ephemeral += census.pages
  }
  counters.Em = Math.max(counters.Em, ephemeral)
  counters.Om = Math.max(counters.Om, objects)
  counters.Pm = Math.max(counters.Pm, pages)
  const { Em, Om, Pm } = counters
  const long: Pairs = [
    ['Ec', ephemeral],
    ['Em', Em],
    ['Oc', objects],
    ['Om', Om],
    ['Nc', 0],
    ['Nm', 0],
    ['Pc', pages],
    ['Pm', Pm],
  ]
  if (host.release === '4.0.0') return `${short},${fields(long)}`
  const rest: Pairs = [
    ['Fc', pages],
    ['Fm', Pm],
    ['Sc', 0],
    ['Sm', 0],
    ['Ep', Ep],
    ['Gd', 0],
    ['Zt', 0],
    ['Gz', 0],
  ]
  return `${short},${fields([...long, ...rest])}`
}

function listClient(host: XenHost, client: Client, isLong: boolean, lines: Lines): void {
  const cap: Pairs = host.isSince('4.8') ? [] : [['ca', client.cap]]
  const short: Pairs = [
    ['CI', client.id],
    ['ww', client.weight],
    ...cap,
    ['co', Number(client.compress)],
    ['fr', Number(client.isFrozen)],
    ['Tc', 0],
    ['Ge', client.ephemeralGets],
    ['Pp', client.persistentPuts],
    ['Gp', client.persistentGets],
  ]
  let line = `C=${fields(short)}`
  if (isLong) {
    const now = ephemeralPages(client)
    client.maxEphemeral = Math.max(client.maxEphemeral, now)
    const long: Pairs = [
      ['Ec', now],
      ['Em', client.maxEphemeral],
      ['cp', 0],
      ['cb', 0],
      ['cn', 0],
      ['cm', client.noMemory],
    ]
    line += `,${fields(long)}`
  }
  if (!lines.add(line)) return
  for (const [slot, pool] of client.slots.entries()) {
    if (pool === undefined) continue
    const short = `P=CI:${client.id},PI:${slot},${typeOf(pool)},${uuidOf(pool)}`
    if (!lines.add(isLong ? `${short},${poolStatistics(pool)}` : short)) return
  }
}

const typeOf = (pool: XenPool): string => `PT:${pool.isPersistent ? 'P' : 'E'}${pool.isShared ? 'S' : 'P'}`

const uuidOf = ({ uuid }: XenPool): string =>
  `U0:${BigInt.asUintN(64, uuid).toString(16)},U1:${(uuid >> 64n).toString(16)}`

function poolStatistics(pool: XenPool): string {
  const { pages, objects } = pool.census()
  const { ps, pt, pd, pr, px, gs, gt, fs, ft, os, ot } = pool.counters
  return fields(
    Object.entries({
      Pc: pages,
      Pm: Math.max(pool.maxPages, pages),
      Oc: objects,
      Om: Math.max(pool.maxObjects, objects),
      Nc: 0,
      Nm: 0,
      ps,
      pt,
      pd,
      pr,
      px,
      gs,
      gt,
      fs,
      ft,
      os,
      ot,
    }),
  )
}
