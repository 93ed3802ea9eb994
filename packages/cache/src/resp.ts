/**
 * A cache for clients of Redis: a strict subset of its protocol, in RESP2 and RESP3, on connections that somebody else
 * accepts.
 *
 * What a command says is what Redis says, as far as a cache can: an entry may go at any time, and there are no
 * transactions, scripts, lists of keys or further databases. A command that is not here is an error. Commands of a
 * connection are answered one after the other in their order. Each of them is one step for all others, but for those of
 * several keys, which are read and written one key after the other.
 *
 * A write that is refused, for want of room or because a value is too large, is an error, and none of the keys that it
 * would have written has a value then: neither the new one nor an older one. (A command that was wrong has written
 * nothing, and changes nothing.)
 *
 * What clients make the server hold is bounded: connections, a request, and all requests and answers on their way
 * together; where these are over their bound the connection that holds most ends. While a client does not read its
 * answers, nothing more of its is read or done.
 *
 * Nobody is asked who they are: whoever reaches the socket may read, write and empty the cache.
 *
 * Source: redis.io, "Commands" and "Redis serialization protocol specification".
 */
import { Buffer } from 'node:buffer'
import type { Duplex } from 'node:stream'
import { checkOptions, type OptionNames, type StatsNode } from '@tmem/core'
import type { Cache } from './cache.ts'
import { maxKeyBytes } from './records.ts'
import { type Argument, ProtocolError, RequestParser } from './resp-parser.ts'

/** Settings of a server. */
export interface RespServerOptions {
  /** What is served. Its keys are bytes: a string as key is another one. It has no codec, and stays its owner's. */
  readonly cache: Cache<Uint8Array>
  /** Milliseconds that a value lives of which a command says nothing (default: until its room is needed). */
  readonly ttl?: number
  /** Connections at once (default 1024). */
  readonly connections?: number
  /** Told of what is no mistake of a client: a place of the cache that fails. */
  readonly onError?: (error: Error) => void
  /** Told why a connection was sent away, or ended from our side. */
  readonly onRefused?: (why: string) => void
}

const optionNames: OptionNames<RespServerOptions> = {
  cache: 'object',
  ttl: 'any?',
  connections: 'any?',
  onError: 'function?',
  onRefused: 'function?',
}

const defaultConnections = 1024
/** Bytes of a request beside its largest value: as many keys as it may have arguments, of a usual length. */
const besideValue = 8 * 2 ** 20
/** Bytes of answers that are put together before they are written. */
const answerBytes = 16 * 1024
/** What a connection may hold without being looked at. */
const smallBytes = 64 * 1024
const leastWorkBytes = 16 * 2 ** 20
/** Longest life, in milliseconds: what is more could not be kept. */
const maxTtl: number = 2 ** 47
/** The version whose commands are meant. */
const version = '7.0.0'

/**
 * Bytes that requests and answers of all clients take at most, beside the cache's own memory, where a value has
 * `largestBytes` at most (`CacheStats.largestBytes`).
 */
export function respWorkBytes(largestBytes: number): number {
  return Math.max(leastWorkBytes, 4 * largestBytes)
}

/** See the head of the file. */
export class RespServer {
  readonly #cache: Cache<Uint8Array>
  readonly #ttl: number
  readonly #most: number
  readonly #onError: (error: Error) => void
  readonly #onRefused: (why: string) => void
  readonly #connections: Set<Connection> = new Set()
  #isClosed = false
  #lastId = 0
  readonly #counts = {
    accepted: 0,
    refused_connections: 0,
    overloads: 0,
    commands: 0,
    errors: 0,
    protocol_errors: 0,
    refused_large: 0,
    refused_room: 0,
  }

  /** Throws `TypeError` and `RangeError` for options that make no sense. The cache is ready (`Cache.ready`). */
  constructor(options: RespServerOptions) {
    checkOptions('RespServer', options, optionNames)
    const { cache, ttl = Number.POSITIVE_INFINITY, connections = defaultConnections } = options
    const { onError = () => {}, onRefused = () => {} } = options
    if (!(ttl > 0 && (ttl <= maxTtl || ttl === Number.POSITIVE_INFINITY)))
      throw new RangeError(`RespServer: ttl is a number of milliseconds above 0, got ${ttl}`)
    if (!(Number.isSafeInteger(connections) && connections > 0))
      throw new RangeError(`RespServer: connections is a number of connections above 0, got ${connections}`)
    this.#cache = cache
    this.#ttl = ttl
    this.#most = connections
    this.#onError = onError
    this.#onRefused = onRefused
  }

  /**
   * Serves a connection until one side ends it; the socket is the server's from then on. It should be open on our side
   * after its client has ended its own (`allowHalfOpen`), so that what it asked for before is answered.
   */
  accept(socket: Duplex): void {
    if (this.#isClosed) {
      socket.destroy()
      return
    }
    if (this.#connections.size >= this.#most) {
      this.#counts.refused_connections++
      this.#onRefused(`there are ${this.#most} connections`)
      socket.on('error', () => socket.destroy())
      socket.end('-ERR max number of clients reached\r\n', () => socket.destroy())
      return
    }
    this.#counts.accepted++
    const { largestBytes } = this.#cache.stats()
    const limits = { argumentBytes: Math.max(largestBytes, maxKeyBytes), requestBytes: largestBytes + besideValue }
    const connection: Connection = new Connection(socket, ++this.#lastId, new RequestParser(limits), {
      run: (request) => this.#run(connection, request),
      failed: (why) => {
        this.#counts.protocol_errors++
        this.#onRefused(`protocol error: ${why}`)
      },
      weigh: () => this.#weigh(respWorkBytes(largestBytes)),
    })
    this.#connections.add(connection)
    socket.once('close', () => this.#connections.delete(connection))
  }

  /** What was counted. */
  stats(): StatsNode {
    let heldBytes = 0
    for (const connection of this.#connections) heldBytes += connection.heldBytes
    return {
      name: 'resp',
      counters: { connections: this.#connections.size, held_bytes: heldBytes, ...this.#counts },
      children: [],
    }
  }

  /**
   * Ends all connections: answers that can be handed over at once are, and nothing more is read. The cache stays open.
   * Idempotent.
   */
  async close(): Promise<void> {
    this.#isClosed = true
    await Promise.all(Array.from(this.#connections, (connection) => connection.close()))
  }

  /** Ends connections that hold most while all together hold more than they may. */
  #weigh(most: number): void {
    let sum = 0
    for (const { heldBytes } of this.#connections) sum += heldBytes
    while (sum > most) {
      let heaviest: Connection | undefined
      for (const connection of this.#connections)
        if (heaviest === undefined || connection.heldBytes > heaviest.heldBytes) heaviest = connection
      this.#counts.overloads++
      this.#onRefused(`of ${sum} bytes of requests and answers it held ${heaviest!.heldBytes}`)
      sum -= heaviest!.heldBytes
      this.#connections.delete(heaviest!)
      heaviest!.destroy()
    }
  }

  /** Does what a request says, and answers. A promise, which never rejects, where that takes its time. */
  #run(connection: Connection, request: readonly Argument[]): Promise<void> | undefined {
    this.#counts.commands++
    try {
      const waits = this.#do(connection, request)
      return waits instanceof Promise ? waits.catch((error: unknown) => this.#fail(connection, error)) : undefined
    } catch (error) {
      this.#fail(connection, error)
      return undefined
    }
  }

  #do(connection: Connection, request: readonly Argument[]): unknown {
    const [first] = request
    const name = first === undefined || first.length > longestName ? '' : first.toString('latin1').toUpperCase()
    const command = commands.get(name)
    if (command === undefined) throw new Refusal(`ERR unknown command ${quoted(first)}`)
    const { arity, work, isWrite = false } = command
    if (arity < 0 ? request.length < -arity : request.length !== arity)
      throw new Refusal(`ERR wrong number of arguments for '${name.toLowerCase()}' command`)
    if (!isWrite && request.includes(undefined))
      throw new Refusal('ERR an argument, or the whole request, is too large')
    return work(this.#service, connection, request as readonly Buffer[])
  }

  /** Answers that a request has failed. */
  #fail(connection: Connection, error: unknown): void {
    // What it was asked for before it was closed needs no answer any more.
    if (this.#isClosed) return
    this.#counts.errors++
    if (error instanceof Refusal) connection.error(error.message)
    else {
      const { message } = error as Error
      connection.error(`ERR ${message}`)
      this.#onError(error as Error)
    }
  }

  /** What commands work with. */
  readonly #service: Service = {
    look: (key, use) => this.#cache.look(keyOf(key), use),
    store: (key, value, ttl = this.#ttl) => this.#store(key, value, ttl),
    remove: (key) => this.#cache.delete(keyOf(key)),
    clear: () => this.#cache.clear(),
    entries: () => this.#cache.stats().entries,
    settings: () => new Map([['maxmemory', String(this.#cache.stats().limitBytes)]]),
    report: () => this.#report(),
    fail: (error) => {
      if (!this.#isClosed) this.#onError(error)
    },
  }

  #store(key: Argument, value: Argument, ttl: number): void {
    if (value === undefined) {
      this.#cache.delete(keyOf(key))
      this.#counts.refused_large++
      throw new Refusal(
        `ERR a value has at most ${this.#cache.stats().largestBytes} bytes, and this one, or the whole request, is too large; the key has no value now`,
      )
    }
    if (this.#cache.set(keyOf(key), value, ttl === Number.POSITIVE_INFINITY ? noOptions : { ttl })) return
    this.#counts.refused_room++
    throw new Refusal(`OOM no room for a value of ${value.length} bytes; the key has no value now`)
  }

  /** What INFO says, in the words of Redis. */
  #report(): string {
    const { entries, hits, misses, evictions, memoryBytes, limitBytes } = this.#cache.stats()
    const { accepted, refused_connections: refused, commands: done } = this.#counts
    const missed = Object.values(misses).reduce((sum, count) => sum + count, 0) - misses.deferred
    return [
      '# Server',
      `redis_version:${version}`,
      'redis_mode:standalone',
      'server_name:tmem',
      '# Clients',
      `connected_clients:${this.#connections.size}`,
      `maxclients:${this.#most}`,
      '# Memory',
      `used_memory:${memoryBytes}`,
      `maxmemory:${limitBytes}`,
      '# Persistence',
      'loading:0',
      '# Stats',
      `total_connections_received:${accepted}`,
      `rejected_connections:${refused}`,
      `total_commands_processed:${done}`,
      `keyspace_hits:${hits}`,
      `keyspace_misses:${missed}`,
      `evicted_keys:${evictions.room}`,
      `expired_keys:${evictions.expired}`,
      '# Replication',
      'role:master',
      '# Keyspace',
      `db0:keys=${entries}`,
      '',
    ].join('\r\n')
  }
}

const noOptions = Object.freeze({})

/** Why a command is not done, as its client is told: the first word is the kind of error. */
class Refusal extends Error {}

/** What a connection needs of its server. */
interface Host {
  run(request: readonly Argument[]): Promise<void> | undefined
  failed(why: string): void
  weigh(): void
}

/** A client: reads requests, writes answers. */
class Connection {
  readonly id: number
  name = ''
  /** Version of the protocol: 2 or 3. */
  protocol = 2
  readonly #socket: Duplex
  readonly #parser: RequestParser
  readonly #host: Host
  readonly #answers: Buffer = Buffer.allocUnsafe(answerBytes)
  #used = 0
  /** A command is at work, or its answers wait to be read. */
  #isBusy = false
  /** The client has ended its side. */
  #isEnded = false
  /** Nothing more is answered. */
  #isOver = false

  constructor(socket: Duplex, id: number, parser: RequestParser, host: Host) {
    this.id = id
    this.#socket = socket
    this.#parser = parser
    this.#host = host
    // Whoever asked may go away at any time.
    socket.on('error', () => socket.destroy())
    socket.on('data', (chunk: Buffer) => {
      // Behind an error it is read no more; until its client has noticed, what comes is passed over.
      if (this.#isOver) return
      parser.push(chunk)
      this.#proceed()
    })
    socket.on('end', () => {
      this.#isEnded = true
      if (!this.#isBusy) this.quit()
    })
  }

  get heldBytes(): number {
    return this.#parser.heldBytes + this.#socket.writableLength
  }

  /** Nobody reads its answers any more. */
  get isGone(): boolean {
    return this.#socket.destroyed
  }

  destroy(): void {
    this.#isOver = true
    this.#socket.destroy()
  }

  /** Resolves once it has ended. */
  close(): Promise<void> {
    return new Promise((resolve) => {
      if (this.#socket.closed) resolve()
      this.#socket.once('close', () => resolve())
      this.flush()
      this.#isOver = true
      if (this.#isBusy || this.#socket.writableLength > 0) this.#socket.destroy()
      else this.#socket.end(() => this.#socket.destroy())
    })
  }

  /** Ends it behind the answers so far. */
  quit(): void {
    if (this.#isOver) return
    this.flush()
    this.#isOver = true
    this.#parser.done()
    this.#socket.end()
    this.#socket.resume()
  }

  // ---- Answers ----------------------------------------------------------------------------------------------------

  /** A line; of printable ASCII. */
  line(text: string): void {
    if (this.#used + text.length + 2 > answerBytes) this.flush()
    this.#used += this.#answers.write(text, this.#used, 'latin1')
    this.#answers[this.#used++] = 13
    this.#answers[this.#used++] = 10
  }

  ok(): void {
    this.line('+OK')
  }

  error(text: string): void {
    this.line(`-${text.replaceAll(/[^\x20-\x7e]/g, '?').slice(0, 1024)}`)
  }

  integer(value: number): void {
    this.line(`:${value}`)
  }

  array(length: number): void {
    this.line(`*${length}`)
  }

  /** Pairs follow. */
  map(pairs: number): void {
    this.line(this.protocol === 3 ? `%${pairs}` : `*${pairs * 2}`)
  }

  /** Bytes, which stay as they are; `undefined`: there are none. */
  bulk(value: Uint8Array | undefined): void {
    if (value === undefined) {
      this.line(this.protocol === 3 ? '_' : '$-1')
      return
    }
    this.line(`$${value.length}`)
    if (this.#used + value.length + 2 <= answerBytes) {
      this.#answers.set(value, this.#used)
      this.#used += value.length
    } else {
      this.flush()
      if (!this.#isOver) this.#socket.write(value)
    }
    this.line('')
  }

  text(text: string): void {
    this.bulk(Buffer.from(text))
  }

  flush(): void {
    if (this.#used > 0 && !this.#isOver) this.#socket.write(Buffer.from(this.#answers.subarray(0, this.#used)))
    this.#used = 0
  }

  /** Resolves when the client has read, or is gone; `undefined`: it has. */
  drained(): Promise<void> | undefined {
    const socket = this.#socket
    if (!socket.writableNeedDrain) return undefined
    this.#host.weigh()
    if (socket.destroyed) return undefined
    return new Promise((resolve) => {
      const settle = (): void => {
        socket.off('drain', settle)
        socket.off('close', settle)
        resolve()
      }
      socket.on('drain', settle)
      socket.on('close', settle)
    })
  }

  // ---- Requests ---------------------------------------------------------------------------------------------------

  /** Does what has come, as far as that goes at once. */
  #proceed(): void {
    const parser = this.#parser
    try {
      while (!this.#isOver) {
        const request = parser.next()
        if (request === undefined) break
        const waits = this.#host.run(request) ?? this.drained()
        if (waits !== undefined) {
          this.#wait(waits)
          return
        }
        parser.done()
      }
    } catch (error) {
      if (!(error instanceof ProtocolError)) throw error
      this.#host.failed(error.message)
      this.error(`ERR Protocol error: ${error.message}`)
      this.quit()
    }
    if (this.#isOver) return
    this.flush()
    const waits = this.drained()
    if (waits !== undefined) this.#wait(waits)
    else if (this.#isEnded) this.quit()
    else {
      if (this.heldBytes > smallBytes) this.#host.weigh()
      this.#socket.resume()
    }
  }

  /** Reads and does nothing until then. */
  #wait(waits: Promise<void>): void {
    this.#isBusy = true
    this.flush()
    this.#socket.pause()
    void waits.then(() => {
      this.#isBusy = false
      this.#parser.done()
      if (this.#socket.destroyed) this.#isOver = true
      else this.#proceed()
    })
  }
}

// ---- Commands -------------------------------------------------------------------------------------------------------

/** What commands work with. Keys that are none throw `Refusal`. */
interface Service {
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
function keyOf(key: Argument): Buffer {
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
