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
import type { Duplex } from 'node:stream'
import { checkOptions, type OptionNames, type StatsNode } from '@tmem/core'
import type { Cache } from './cache.ts'
import { maxKeyBytes } from './records.ts'
import { keyOf, maxTtl, perform, Refusal, type Service, version } from './resp-commands.ts'
import { Connection } from './resp-connection.ts'
import { type Argument, RequestParser } from './resp-parser.ts'

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
const leastWorkBytes = 16 * 2 ** 20

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
      const waits = perform(this.#service, connection, request)
      return waits instanceof Promise ? waits.catch((error: unknown) => this.#fail(connection, error)) : undefined
    } catch (error) {
      this.#fail(connection, error)
      return undefined
    }
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
