/**
 * Memory of a Valkey or Redis server, or of a cluster: one key with a lease for each block, under a prefix of this life
 * of the borrower.
 *
 * `maxmemory` with `noeviction` is the memory that is lent: a server that is full answers so, and the block is refused.
 * A server that evicts keys on its own takes only ephemeral pages, and is refused for persistent ones.
 *
 * Invariants:
 *  - The memory is open only while the connection is up, the server has identified itself, and no answer is overdue: a
 *    missed deadline ends the connection and all its pending requests.
 *  - No request waits for a connection: one that cannot be sent now fails now. The place bounds the pending requests.
 *  - A restarted server counts as empty, even if it has loaded older data.
 *  - A cluster is one machine. It is open while all of its slots are served. Acknowledged blocks may be lost when a
 *    replica takes over or a primary restarts. So it reports `some` if the slots have other servers than before, or the
 *    same ones after a restart. Two clusters are the same if their servers of the lowest id are.
 *
 * A key is `prefix:life:key`, the life being 96 random bits. So blocks of another borrower with the same name, or of an
 * earlier life, are never read; they end with their leases.
 *
 * Source: the protocol and the errors (OOM, LOADING, READONLY, NOPERM, WRONGPASS) as Redis 7.0 documents them.
 */
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { checkOptions, type OptionNames, TmemError } from '@tmem/core'
import { type Connection, closed, clusterConnection, reasonOf, type Said, serverConnection } from './connection.ts'
import type { Borrower, Kept, RemoteMemory, RemotePlan } from './remote.ts'

/** How to reach a server, and what is asked of it. */
export interface ValkeyOptions {
  /** Name or address of the server. An IPv6 address without brackets. */
  readonly host: string
  /** Port (default: 6379). */
  readonly port?: number
  /** User of an ACL, and password (default: none). */
  readonly username?: string
  readonly password?: string
  /** Path of a file that has the password, read when the stack is opened: its first line. */
  readonly passwordFile?: string
  /** TLS (default: only with `caFile`). */
  readonly tls?: boolean
  /** Path of a file with the certificates (PEM) of those who may vouch for the server (default: Node's own list). */
  readonly caFile?: string
  /** What keys begin with: 1 to 64 characters (default: `tmem`). An ACL can give a user these keys only. */
  readonly prefix?: string
  /**
   * Milliseconds after which the server drops a block that was not renewed: 1 s to 7 days (default: 1 hour). It is
   * renewed three times as often while this process runs. One that stands still for longer has lost what is there.
   */
  readonly leaseMs?: number
  /** Milliseconds that an answer may take: 10 to 60,000 (default: 2000). */
  readonly deadlineMs?: number
  /** Milliseconds after which `ready` gives up: 10 to 3,600,000 (default: 10,000). It is tried on all the same. */
  readonly connectMs?: number
}

/** How to reach a cluster; the rest as for a server. */
export interface ValkeyClusterOptions extends Omit<ValkeyOptions, 'host' | 'port'> {
  /** Some of its servers, 1 to 16: the others are asked for. It can be reached while one of them answers. */
  readonly nodes: readonly { readonly host: string; readonly port?: number }[]
}

const commonNames: Omit<OptionNames<ValkeyOptions>, 'host' | 'port'> = {
  username: 'text?',
  password: 'text?',
  passwordFile: 'text?',
  tls: 'flag?',
  caFile: 'text?',
  prefix: 'text?',
  leaseMs: 'number?',
  deadlineMs: 'number?',
  connectMs: 'number?',
}

/** What does not pass by itself. */
const lasting =
  /\b(WRONGPASS|NOAUTH|NOPERM)\b|the user needs|maxmemory-policy|certificate|a replica|of a cluster|no cluster/i

const mostNodes = 16
/** Milliseconds after which a machine is asked again how it is. */
const askHowMs = 1000
/** Milliseconds after which a server that cannot be used yet is asked again. */
const askAgainMs = 200

/**
 * A Valkey or Redis server as a machine to borrow from. Throws `RangeError` or `TypeError` for settings that make no
 * sense.
 */
export function valkey(options: ValkeyOptions): RemotePlan {
  checkOptions('valkey', options, { ...commonNames, host: true, port: 'number?' })
  const { host, port = 6379 } = options
  checkAddress('valkey', host, port)
  const settings = settingsOf('valkey', options)
  const name = addressText(host, port)
  return Object.freeze({
    name,
    borrow: (borrower: Borrower) =>
      new ValkeyMemory(name, settings, borrower, (redis) => serverConnection({ ...redis, host, port })),
  })
}

/**
 * A cluster of Valkey or Redis servers as one machine to borrow from. It is one copy, however many replicas it has: a
 * write that it has acknowledged is lost when a replica takes over that had not got it yet. Throws `RangeError` or
 * `TypeError` for settings that make no sense.
 */
export function valkeyCluster(options: ValkeyClusterOptions): RemotePlan {
  checkOptions('valkeyCluster', options, { ...commonNames, nodes: true })
  if (!Array.isArray(options.nodes) || options.nodes.length < 1 || options.nodes.length > mostNodes)
    throw new RangeError(`valkeyCluster: nodes is a list of 1 to ${mostNodes} servers`)
  const nodes = options.nodes.map((node) => {
    checkOptions('valkeyCluster: a node', node, { host: true, port: 'number?' })
    const { host, port = 6379 } = node
    checkAddress('valkeyCluster', host, port)
    return { host, port }
  })
  const settings = settingsOf('valkeyCluster', options)
  const name = `cluster ${addressText(nodes[0]!.host, nodes[0]!.port)}`
  return Object.freeze({
    name,
    borrow: (borrower: Borrower) =>
      new ValkeyMemory(name, settings, borrower, (redis) => clusterConnection(nodes, redis)),
  })
}

type Settings = Omit<ValkeyOptions, 'host' | 'port'> &
  Required<Pick<ValkeyOptions, 'prefix' | 'leaseMs' | 'deadlineMs' | 'connectMs'>>

/** The settings that do not say where. */
function settingsOf(layer: string, options: Omit<ValkeyOptions, 'host' | 'port'>): Settings {
  const { prefix = 'tmem', leaseMs = 3_600_000, deadlineMs = 2000, connectMs = 10_000 } = options
  within(layer, 'leaseMs', leaseMs, 1000, 7 * 86_400_000)
  within(layer, 'deadlineMs', deadlineMs, 10, 60_000)
  within(layer, 'connectMs', connectMs, 10, 3_600_000)
  if (prefix.length < 1 || prefix.length > 64) throw new RangeError(`${layer}: prefix has 1 to 64 characters`)
  if (options.password !== undefined && options.passwordFile !== undefined)
    throw new RangeError(`${layer}: give password or passwordFile, not both`)
  return { ...options, prefix, leaseMs, deadlineMs, connectMs }
}

function checkAddress(layer: string, host: unknown, port: number): void {
  if (typeof host !== 'string' || host === '')
    throw new TypeError(`${layer}: host is the name of the server; it is missing`)
  within(layer, 'port', port, 1, 65_535)
}

function within(layer: string, name: string, value: number, least: number, most: number): void {
  if (!Number.isSafeInteger(value) || value < least || value > most)
    throw new RangeError(`${layer}: ${name} is ${least} to ${most}, got ${value}`)
}

const addressText = (host: string, port: number): string => `${host.includes(':') ? `[${host}]` : host}:${port}`

/** Somebody who waits for it to be open. */
interface Waiter {
  readonly resolve: () => void
  readonly reject: (error: Error) => void
}

/** A block that somebody asks for. */
interface Get {
  readonly key: number
  readonly resolve: (block: Uint8Array | undefined) => void
  readonly reject: (error: Error) => void
}

class ValkeyMemory implements RemoteMemory {
  readonly name: string
  readonly leaseMs: number
  identity: string | undefined
  failure: Error | undefined
  freeBytes: number = Number.POSITIVE_INFINITY
  excessBytes = 0
  isOpen = false
  readonly #connection: Connection
  readonly #borrower: Borrower
  readonly #prefix: string
  readonly #deadlineMs: number
  readonly #connectMs: number
  /** Who waits for it to be open. */
  readonly #waiting: Set<Waiter> = new Set()
  readonly #ending: AbortController = new AbortController()
  /** Which connection it is; what was asked on another one does not count. */
  #times = 0
  /** Servers by their lives, when it was opened last; and when it is asked again how it is. */
  #lives: string | undefined
  #how: NodeJS.Timeout | undefined
  /** What is to be asked for at the end of this turn. */
  readonly #gets: Get[] = []
  /** When each question that is under way was asked, and the timer that looks at them. */
  readonly #underWay: Set<{ readonly since: number }> = new Set()
  #watch: NodeJS.Timeout | undefined
  /** Why the connection was given up, until there is another one. */
  #late: TmemError | undefined
  #closing: Promise<void> | undefined

  constructor(
    name: string,
    options: Settings,
    borrower: Borrower,
    connect: (options: Parameters<typeof clusterConnection>[1]) => Connection,
  ) {
    const { username, passwordFile, caFile, prefix, leaseMs, deadlineMs, connectMs } = options
    const password =
      passwordFile === undefined ? options.password : readSecret('password', passwordFile).split(/\r?\n/)[0]
    const tls = caFile === undefined ? options.tls === true && {} : { ca: readSecret('certificates', caFile) }
    this.name = name
    this.leaseMs = leaseMs
    this.#borrower = borrower
    this.#deadlineMs = deadlineMs
    this.#connectMs = connectMs
    this.#prefix = `${prefix}:${randomBytes(12).toString('base64url')}:`
    this.#connection = connect({
      ...(username === undefined ? {} : { username }),
      ...(password === undefined ? {} : { password }),
      ...(tls === false ? {} : { tls }),
      connectTimeout: deadlineMs,
    })
    const { client } = this.#connection
    client.on('error', (error: Error) => this.#failed(error))
    client.on('close', () => {
      this.#times++
      this.isOpen = false
    })
    // Nothing but this has been asked on the connection.
    client.on('ready', () => {
      this.#late = undefined
      void this.#greet()
    })
  }

  /** Finds out what the server is, and opens when it can be used. */
  async #greet(): Promise<void> {
    const times = ++this.#times
    clearTimeout(this.#how)
    while (times === this.#times && !this.#ending.signal.aborted) {
      try {
        const said = await this.#within(this.#connection.ask())
        if (times !== this.#times) return
        const why = this.#unfit(said)
        if (why === undefined) {
          this.#open(said)
          this.#askHowLater()
          return
        }
        this.#failed(new Error(why))
      } catch (error) {
        this.#failed(error)
      }
      try {
        await sleep(askAgainMs, undefined, { signal: this.#ending.signal })
      } catch (error) {
        // It is being closed.
        if (!this.#ending.signal.aborted) throw error
      }
    }
  }

  #askHowLater(): void {
    if (!this.#ending.signal.aborted) this.#how = setTimeout(() => void this.#askHow(), askHowMs).unref()
  }

  /** Finds out whether it is as it was: what it has left, and whether all of its servers are still the same. */
  async #askHow(): Promise<void> {
    const times = this.#times
    try {
      const said = await this.#within(this.#connection.ask())
      if (times !== this.#times) return
      const why = this.#unfit(said)
      if (why === undefined) this.#open(said)
      else {
        this.isOpen = false
        this.#failed(new Error(why))
        // It is asked until it can be used again.
        void this.#greet()
        return
      }
    } catch (error) {
      this.#failed(error)
      if (times !== this.#times) return
    }
    this.#askHowLater()
  }

  /** Why a machine cannot be used now. */
  #unfit({ servers, isCluster, problem }: Said): string | undefined {
    if (problem !== undefined) return problem
    for (const said of servers) {
      if (said.get('run_id') === undefined) return 'it does not say what it is: the user needs the command INFO'
      if (said.get('loading') === '1') return 'it is loading its data'
      if (!isCluster && said.get('redis_mode') === 'cluster')
        return 'it is a node of a cluster: name it so (cluster=HOST:PORT)'
      if (isCluster && said.get('redis_mode') !== 'cluster')
        return 'it is no cluster: name it as a server (valkey=HOST:PORT)'
      if (said.get('role') === 'slave')
        return isCluster ? 'a primary has just become a replica' : 'it is a replica: name its primary'
      const policy = said.get('maxmemory_policy')
      if (this.#borrower.persistent && policy !== 'noeviction' && said.get('maxmemory') !== '0')
        return `its maxmemory-policy is ${policy}: it drops pages that may not vanish; set noeviction`
    }
    return undefined
  }

  #open({ servers, identity }: Said): void {
    const lives = servers
      .map((said) => said.get('run_id')!)
      .toSorted()
      .join(' ')
    const kept = this.#keptSince(lives, servers.length > 1 || identity !== servers[0]!.get('run_id'))
    this.#lives = lives
    this.identity = identity
    // Keys are spread evenly: where there is least is what counts.
    let least = Number.POSITIVE_INFINITY
    let excess = 0
    for (const said of servers) {
      const limit = Number(said.get('maxmemory'))
      if (limit === 0) continue
      const left = limit - Number(said.get('used_memory'))
      least = Math.min(least, Math.max(0, left))
      excess += Math.max(0, -left)
    }
    this.freeBytes = least * servers.length
    this.excessBytes = excess
    this.failure = undefined
    const wasOpen = this.isOpen
    this.isOpen = true
    if (!wasOpen || kept !== 'all') this.#borrower.opened(kept)
    if (excess > 0) this.#borrower.pressed()
    for (const { resolve } of this.#waiting) resolve()
    this.#waiting.clear()
  }

  /** What is there of what was put before; `isCluster`: of a server that is another one now others may have it. */
  #keptSince(lives: string, isCluster: boolean): Kept {
    if (this.#lives === undefined || this.#lives === lives) return 'all'
    return isCluster ? 'some' : 'nothing'
  }

  /** Notes why it cannot be used. Who waits is told only what will not pass by itself. */
  #failed(error: unknown): void {
    if (!(error instanceof Error)) throw error
    const reason = reasonOf(error)
    // Why it ended was told before.
    if (reason.message === closed && this.failure !== undefined) return
    this.failure = this.#told(reason)
    if (!lasting.test(reason.message)) return
    for (const { reject } of this.#waiting) reject(this.failure)
    this.#waiting.clear()
  }

  #told(error: Error): TmemError {
    if (error instanceof TmemError) return error
    return new TmemError('TMEM_IO', `ramster: ${this.name}: ${error.message || nameOf(error)}`, {
      layer: 'ramster',
      cause: error,
    })
  }

  async ready(): Promise<void> {
    if (this.isOpen) return
    const timer = new AbortController()
    let waiter: Waiter | undefined
    const opened = new Promise<void>((resolve, reject) => {
      waiter = { resolve, reject }
      this.#waiting.add(waiter)
    })
    const late = sleep(this.#connectMs, undefined, { signal: timer.signal }).then(() => {
      throw this.failure ?? this.#told(new Error(`no answer within ${this.#connectMs} ms`))
    })
    try {
      await Promise.race([opened, late])
    } finally {
      this.#waiting.delete(waiter!)
      timer.abort()
      // Its own end is no news.
      late.catch((error: unknown) => {
        if (!(error instanceof Error)) throw error
      })
    }
  }

  async put(keys: readonly number[], blocks: readonly Uint8Array[]): Promise<readonly boolean[]> {
    this.#mustBeOpen()
    const named = keys.map((key) => this.#prefix + key)
    const replies = await this.#within(this.#connection.set(named, blocks, this.leaseMs))
    return replies.map((reply) => {
      if (reply instanceof Error) {
        if (reply.message.startsWith('OOM')) return false
        throw this.#told(reply)
      }
      if (reply !== 'OK') throw this.#told(new Error(`it answered ${String(reply).slice(0, 100)} to SET`))
      return true
    })
  }

  get(key: number): Promise<Uint8Array | undefined> {
    return new Promise((resolve, reject) => {
      this.#gets.push({ key, resolve, reject })
      // All that is asked for in this turn goes together.
      if (this.#gets.length === 1) process.nextTick(() => this.#sendGets())
    })
  }

  #sendGets(): void {
    const { getsAtOnce } = this.#connection
    const gets = this.#gets.splice(0)
    for (let n = 0; n < gets.length; n += getsAtOnce) void this.#ask(gets.slice(n, n + getsAtOnce))
  }

  async #ask(gets: readonly Get[]): Promise<void> {
    try {
      this.#mustBeOpen()
      const blocks = await this.#within(this.#connection.get(gets.map(({ key }) => this.#prefix + key)))
      for (const [n, { resolve, reject }] of gets.entries()) {
        const block = blocks[n]
        if (block instanceof Error) reject(this.#told(block))
        else resolve(block ?? undefined)
      }
    } catch (error) {
      for (const { reject } of gets) reject(error as Error)
    }
  }

  async remove(keys: readonly number[]): Promise<void> {
    this.#mustBeOpen()
    await this.#within(this.#connection.unlink(keys.map((key) => this.#prefix + key)))
  }

  async renew(keys: readonly number[]): Promise<readonly boolean[]> {
    this.#mustBeOpen()
    const named = keys.map((key) => this.#prefix + key)
    const replies = await this.#within(this.#connection.renew(named, this.leaseMs))
    return replies.map((reply) => {
      if (reply instanceof Error) throw this.#told(reply)
      return reply === 1
    })
  }

  #mustBeOpen(): void {
    if (!this.isOpen) throw this.failure ?? this.#told(new Error('it is not connected'))
  }

  /**
   * What is asked, or the error when that takes too long: then the connection is given up, with all that is under way.
   */
  async #within<Answer>(asked: Promise<Answer>): Promise<Answer> {
    const question = { since: performance.now() }
    this.#underWay.add(question)
    this.#watch ??= setTimeout(() => this.#look(), this.#deadlineMs)
    try {
      return await asked
    } catch (error) {
      // The event that says so may still be to come.
      if (this.#connection.client.status !== 'ready') this.isOpen = false
      throw error instanceof Error ? this.#told(this.#late ?? error) : error
    } finally {
      this.#underWay.delete(question)
    }
  }

  /** Gives the connection up when somebody has waited too long. */
  #look(): void {
    this.#watch = undefined
    const [first] = this.#underWay
    if (first === undefined) return
    const leftMs = first.since + this.#deadlineMs - performance.now()
    if (leftMs > 0) {
      this.#watch = setTimeout(() => this.#look(), leftMs)
      return
    }
    // Where this process was busy all the while, the answer may be here: it is read first.
    setImmediate(() => {
      if (!this.#underWay.has(first)) {
        this.#watch ??= setTimeout(() => this.#look(), 0)
        return
      }
      const late = this.#told(new Error(`no answer within ${this.#deadlineMs} ms`))
      this.#late = late
      this.failure = late
      this.isOpen = false
      // All that is under way is told so when the connection is closed.
      this.#connection.client.disconnect(true)
    })
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    this.isOpen = false
    this.#ending.abort()
    clearTimeout(this.#watch)
    clearTimeout(this.#how)
    this.failure = this.#told(new Error('it was closed'))
    for (const { reject } of this.#waiting) reject(this.failure)
    this.#waiting.clear()
    const { client } = this.#connection
    // Between two attempts there is no connection that could end.
    const isConnected = ['ready', 'connect', 'connecting'].includes(client.status)
    const ended = isConnected ? once(client, 'end') : undefined
    client.disconnect()
    await ended
  }
}

/** Reads a file with what is needed to connect. Throws `TmemError` (`TMEM_IO`). */
function readSecret(what: string, path: string): string {
  try {
    return readFileSync(path, 'utf8')
  } catch (error) {
    throw new TmemError('TMEM_IO', `ramster: cannot read the ${what} in ${path}: ${(error as Error).message}`, {
      layer: 'ramster',
      cause: error,
    })
  }
}

/** What an error without a message is: several addresses were tried. */
const nameOf = (error: Error): string => ('code' in error ? String(error.code) : error.name)
