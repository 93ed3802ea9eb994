/**
 * The commands of Redis that a cache has: how each reads its arguments, and what it answers.
 *
 * Each is one step for all clients, but for those of several keys, which are read and written one key after the other.
 *
 * Source: redis.io, "Commands".
 */
import { Buffer } from 'node:buffer'
import { maxKeyBytes } from './records.ts'
import type { Connection } from './resp-connection.ts'
import type { Argument } from './resp-parser.ts'

/** Longest life, in milliseconds: what is more could not be kept. */
export const maxTtl: number = 2 ** 47
/** The version whose commands are meant. */
export const version = '7.0.0'

/** Why a command is not done, as its client is told: the first word is the kind of error. */
export class Refusal extends Error {}

/** What commands work with. Keys that are none throw `Refusal`. */
export interface Service {
  look<T>(key: Argument, use: (value: Uint8Array | undefined, left: number) => T): T | Promise<T>
  /** Stores a value for so many milliseconds. Throws `Refusal` where it does not; the key has no value then. */
  store(key: Argument, value: Argument, ttl?: number): void
  remove(key: Argument): boolean
  clear(): void
  entries(): number
  settings(): ReadonlyMap<string, string>
  report(): string
  fail(error: Error): void
}

interface Command {
  /** Arguments, its name among them; negative: at least so many. */
  readonly arity: number
  /** It takes values: one that is too large comes as `undefined`. */
  readonly isWrite?: boolean
  /** Answers. A promise where that takes its time. Throws, or rejects with, `Refusal`. */
  readonly work: (service: Service, connection: Connection, request: readonly Buffer[]) => unknown
}

const longestName = 16

/** By name. */
const commands: ReadonlyMap<string, Command> = new Map<string, Command>([
  ['GET', { arity: 2, work: (service, to, [, key]) => service.look(key, (value) => to.bulk(value)) }],
  ['SET', { arity: -3, isWrite: true, work: set }],
  ['SETEX', { arity: 4, isWrite: true, work: setFor(1000) }],
  ['PSETEX', { arity: 4, isWrite: true, work: setFor(1) }],
  ['MGET', { arity: -2, work: getMany }],
  ['MSET', { arity: -3, isWrite: true, work: setMany }],
  ['DEL', { arity: -2, work: remove }],
  ['UNLINK', { arity: -2, work: remove }],
  ['EXISTS', { arity: -2, work: count }],
  ['TTL', { arity: 2, work: left((ms) => Math.floor((ms + 500) / 1000)) }],
  ['PTTL', { arity: 2, work: left(Math.floor) }],
  ['EXPIRE', { arity: 3, work: expire(1000) }],
  ['PEXPIRE', { arity: 3, work: expire(1) }],
  ['PERSIST', { arity: 2, work: persist }],
  [
    'STRLEN',
    { arity: 2, work: (service, to, [, key]) => service.look(key, (value) => to.integer(value?.length ?? 0)) },
  ],
  ['DBSIZE', { arity: 1, work: (service, to) => to.integer(service.entries()) }],
  ['FLUSHALL', { arity: -1, work: clear }],
  ['FLUSHDB', { arity: -1, work: clear }],
  ['PING', { arity: -1, work: ping }],
  ['ECHO', { arity: 2, work: (_, to, [, text]) => to.bulk(text) }],
  ['SELECT', { arity: 2, work: select }],
  ['CLIENT', { arity: -2, work: client }],
  ['COMMAND', { arity: -1, work: (_, to) => to.array(0) }],
  ['INFO', { arity: -1, work: (service, to) => to.text(service.report()) }],
  ['CONFIG', { arity: -2, work: config }],
  ['HELLO', { arity: -1, work: hello }],
  ['QUIT', { arity: -1, work: quit }],
  // How a browser's requests begin that a page has it send here: what follows is not the user's.
  ['POST', { arity: -1, work: leave }],
  ['HOST:', { arity: -1, work: leave }],
])

/**
 * Does what a request says, and answers. A promise where that takes its time. Throws, or rejects with, `Refusal`, and
 * what the cache throws.
 */
export function perform(service: Service, connection: Connection, request: readonly Argument[]): unknown {
  const [first] = request
  const name = first === undefined || first.length > longestName ? '' : first.toString('latin1').toUpperCase()
  const command = commands.get(name)
  if (command === undefined) throw new Refusal(`ERR unknown command ${quoted(first)}`)
  const { arity, work, isWrite = false } = command
  if (arity < 0 ? request.length < -arity : request.length !== arity)
    throw new Refusal(`ERR wrong number of arguments for '${name.toLowerCase()}' command`)
  if (!isWrite && request.includes(undefined)) throw new Refusal('ERR an argument, or the whole request, is too large')
  return work(service, connection, request as readonly Buffer[])
}

function set(service: Service, to: Connection, request: readonly Argument[]): unknown {
  const [, key, value] = request
  let ttl: number | undefined
  let condition: 'NX' | 'XX' | undefined
  let isGet = false
  let keeps = false
  for (let n = 3; n < request.length; n++) {
    const option = upper(request[n])
    if ((option === 'NX' || option === 'XX') && condition === undefined) condition = option
    else if (option === 'GET') isGet = true
    else if (option === 'KEEPTTL' && ttl === undefined) keeps = true
    else if ((option === 'EX' || option === 'PX') && ttl === undefined && !keeps && n + 1 < request.length)
      ttl = lifetime(request[++n], option === 'EX' ? 1000 : 1, 'set')
    else throw new Refusal('ERR syntax error')
  }
  if (condition === undefined && !isGet && !keeps) {
    service.store(key, value, ttl)
    to.ok()
    return undefined
  }
  return service.look(key, (old, remaining) => {
    const isThere = old !== undefined
    const isSet = condition === undefined || (condition === 'XX') === isThere
    if (isSet) service.store(key, value, keeps && isThere ? remaining : ttl)
    if (isGet || !isSet) to.bulk(isGet ? old : undefined)
    else to.ok()
  })
}

function setFor(unit: number): Command['work'] {
  return (service, to, [name, key, time, value]) => {
    service.store(key, value, lifetime(time, unit, name!.toString('latin1').toLowerCase()))
    to.ok()
  }
}

function setMany(service: Service, to: Connection, request: readonly Argument[]): void {
  if (request.length % 2 === 0) throw new Refusal("ERR wrong number of arguments for 'mset' command")
  for (let n = 1; n < request.length; n += 2) keyOf(request[n])
  try {
    for (let n = 1; n < request.length; n += 2) service.store(request[n], request[n + 1])
  } catch (error) {
    // All of them or none.
    for (let n = 1; n < request.length; n += 2) service.remove(request[n])
    throw error
  }
  to.ok()
}

function getMany(service: Service, to: Connection, [, ...keys]: readonly Buffer[]): unknown {
  for (const key of keys) keyOf(key)
  to.array(keys.length)
  const read = (key: Buffer): unknown => (to.isGone ? undefined : service.look(key, (value) => to.bulk(value)))
  // The answer has begun: a value that cannot be had is an error in it.
  const failed = (error: Error): void => {
    to.error(`ERR ${error.message}`)
    service.fail(error)
  }
  return inTurn(keys, (key) => settled(() => read(key), failed), to)
}

function count(service: Service, to: Connection, [, ...keys]: readonly Buffer[]): unknown {
  return counted(keys, to, (key, add) =>
    service.look(key, (value) => {
      if (value !== undefined) add()
    }),
  )
}

function remove(service: Service, to: Connection, [, ...keys]: readonly Buffer[]): unknown {
  for (const key of keys) keyOf(key)
  // Whether there is a value is known once it was read; where that fails, it goes all the same.
  return counted(keys, to, (key, add) => {
    const drop = (): void => {
      if (service.remove(key)) add()
    }
    const look = (): unknown =>
      service.look(key, (value) => {
        if (value !== undefined) drop()
      })
    return settled(look, (error) => {
      drop()
      service.fail(error)
    })
  })
}

/** Answers how often `work` has called `add`. */
function counted(keys: readonly Buffer[], to: Connection, work: (key: Buffer, add: () => void) => unknown): unknown {
  let sum = 0
  const add = (): void => {
    sum++
  }
  const waits = inTurn(keys, (key) => work(key, add), to)
  if (waits !== undefined) return waits.then(() => to.integer(sum))
  to.integer(sum)
  return undefined
}

/** Does something that may fail, at once or later. */
function settled(work: () => unknown, failed: (error: Error) => void): unknown {
  try {
    const waits = work()
    return waits instanceof Promise ? waits.catch(failed) : undefined
  } catch (error) {
    failed(error as Error)
    return undefined
  }
}

/** Does something for each key, one after the other, and waits where one has to. */
function inTurn(keys: readonly Buffer[], work: (key: Buffer) => unknown, to: Connection): Promise<void> | undefined {
  for (let n = 0; n < keys.length; n++) {
    const waits = work(keys[n]!) ?? to.drained()
    if (waits instanceof Promise) return rest(waits, keys.slice(n + 1), work, to)
  }
  return undefined
}

async function rest(
  first: Promise<unknown>,
  keys: readonly Buffer[],
  work: (key: Buffer) => unknown,
  to: Connection,
): Promise<void> {
  await first
  for (const key of keys) {
    const waits = work(key) ?? to.drained()
    if (waits instanceof Promise) await waits
  }
}

/** How long an entry lives, of milliseconds that are left. */
function left(unit: (ms: number) => number): Command['work'] {
  return (service, to, [, key]) =>
    service.look(key, (value, ms) => {
      to.integer(value === undefined ? -2 : ms === Number.POSITIVE_INFINITY ? -1 : unit(ms))
    })
}

function expire(unit: number): Command['work'] {
  return (service, to, [name, key, time]) => {
    const ms = milliseconds(time, unit, name!.toString('latin1').toLowerCase())
    return service.look(key, (value) => {
      if (value === undefined) return to.integer(0)
      if (ms <= 0) service.remove(key)
      else service.store(key, value as Buffer, ms)
      return to.integer(1)
    })
  }
}

function persist(service: Service, to: Connection, [, key]: readonly Buffer[]): unknown {
  return service.look(key, (value, ms) => {
    if (value === undefined || ms === Number.POSITIVE_INFINITY) return to.integer(0)
    service.store(key, value as Buffer, Number.POSITIVE_INFINITY)
    return to.integer(1)
  })
}

function clear(service: Service, to: Connection, [, ...options]: readonly Buffer[]): void {
  if (options.length > 1 || options.some((option) => !['ASYNC', 'SYNC'].includes(upper(option))))
    throw new Refusal('ERR syntax error')
  service.clear()
  to.ok()
}

function ping(_: Service, to: Connection, request: readonly Buffer[]): void {
  if (request.length > 2) throw new Refusal("ERR wrong number of arguments for 'ping' command")
  if (request.length === 1) to.line('+PONG')
  else to.bulk(request[1])
}

function select(_: Service, to: Connection, [, number]: readonly Buffer[]): void {
  if (wholeNumber(number) !== 0) throw new Refusal('ERR DB index is out of range')
  to.ok()
}

function client(_: Service, to: Connection, request: readonly Buffer[]): void {
  const [, what, name] = request
  const command = upper(what)
  const arity = { ID: 2, GETNAME: 2, SETNAME: 3, SETINFO: 4 }[command]
  if (arity === undefined) throw new Refusal(`ERR unknown subcommand ${quoted(what)}`)
  if (request.length !== arity)
    throw new Refusal(`ERR wrong number of arguments for 'client|${command.toLowerCase()}' command`)
  if (command === 'ID') to.integer(to.id)
  else if (command === 'GETNAME') to.bulk(to.name === '' ? undefined : Buffer.from(to.name, 'latin1'))
  else {
    if (command === 'SETNAME') to.name = clientName(name!)
    to.ok()
  }
}

const longestClientName = 256

function clientName(name: Buffer): string {
  const text = name.toString('latin1')
  if (/[^!-~]/.test(text) || text.length > longestClientName)
    throw new Refusal('ERR Client names cannot contain spaces, newlines or special characters.')
  return text
}

function config(service: Service, to: Connection, [, what, ...patterns]: readonly Buffer[]): void {
  if (upper(what) !== 'GET' || patterns.length === 0) throw new Refusal(`ERR unknown subcommand ${quoted(what)}`)
  const names = patterns.map((pattern) => upper(pattern).toLowerCase())
  const found = [...service.settings()].filter(([name]) => names.includes(name) || names.includes('*'))
  to.map(found.length)
  for (const [name, value] of found) {
    to.text(name)
    to.text(value)
  }
}

function hello(_: Service, to: Connection, request: readonly Buffer[]): void {
  const protocol = request.length === 1 ? to.protocol : wholeNumber(request[1])
  if (protocol === undefined) throw new Refusal('ERR Protocol version is not an integer or out of range')
  if (protocol !== 2 && protocol !== 3) throw new Refusal('NOPROTO unsupported protocol version')
  let name: string | undefined
  for (let n = 2; n < request.length; n += 2) {
    const option = upper(request[n])
    if (option === 'AUTH') throw new Refusal('ERR there are no passwords here: leave AUTH away')
    if (option !== 'SETNAME' || n + 1 === request.length) throw new Refusal(`ERR Syntax error in HELLO`)
    name = clientName(request[n + 1]!)
  }
  to.protocol = protocol
  to.name = name ?? to.name
  to.map(7)
  for (const [key, value] of Object.entries({ server: 'tmem', version, proto: protocol, id: to.id })) {
    to.text(key)
    if (typeof value === 'number') to.integer(value)
    else to.text(value)
  }
  for (const text of ['mode', 'standalone', 'role', 'master', 'modules']) to.text(text)
  to.array(0)
}

function quit(_: Service, to: Connection): void {
  to.ok()
  to.quit()
}

function leave(_: Service, to: Connection): void {
  to.error('ERR this is no server of HTTP')
  to.quit()
}

// ---- Arguments ------------------------------------------------------------------------------------------------------

/** A key. Throws `Refusal`. */
export function keyOf(key: Argument): Buffer {
  if (key !== undefined && key.length <= maxKeyBytes) return key
  throw new Refusal(`ERR a key has at most ${maxKeyBytes} bytes`)
}

const upper = (word: Argument): string =>
  word === undefined || word.length > longestName ? '' : word.toString('latin1').toUpperCase()

/** What a client said, as an error can repeat it. */
const quoted = (word: Argument): string => `'${word === undefined ? '' : word.subarray(0, 128).toString('latin1')}'`

/** A whole number as Redis reads one; `undefined`: it is none. */
function wholeNumber(word: Argument): number | undefined {
  const text = word === undefined || word.length > 20 ? '' : word.toString('latin1')
  return /^(?:0|-?[1-9]\d*)$/.test(text) ? Number(text) : undefined
}

/** A time in milliseconds. Throws `Refusal`. */
function milliseconds(word: Argument, unit: number, command: string): number {
  const number = wholeNumber(word)
  if (number === undefined) throw new Refusal('ERR value is not an integer or out of range')
  if (Math.abs(number) * unit > maxTtl) throw new Refusal(`ERR invalid expire time in '${command}' command`)
  return number * unit
}

/** The same, of a value that is to live. */
function lifetime(word: Argument, unit: number, command: string): number {
  const ms = milliseconds(word, unit, command)
  if (ms <= 0) throw new Refusal(`ERR invalid expire time in '${command}' command`)
  return ms
}
