/**
 * Memory of a Valkey or Redis server: one key for each block, under a name of this life of this borrower, with a lease.
 *
 * `maxmemory` with `noeviction` is the memory that is lent: a server that is full answers so, and the block is refused.
 * A server that evicts by itself is good for pages that may vanish only, and is refused for others.
 *
 * Invariants:
 *  - It is open only while the connection is up, the server has said what it is, and nothing waits longer than the
 *    deadline: who misses it loses the connection, and with it all that was under way there.
 *  - Nothing is sent twice, and nothing waits for a connection: what cannot be sent now fails now. How much is under
 *    way
 *    is the place's business, which bounds it.
 *  - A server that was started anew has lost its content, whatever it may have loaded: what it loaded is older.
 *
 * A key is `prefix:life:key`, the life being 96 random bits. So neither another borrower of the same name nor an
 * earlier life is ever read; what they leave behind ends with its lease, without anybody looking for it.
 *
 * Source: the protocol and the errors (OOM, LOADING, READONLY, NOPERM, WRONGPASS) as Redis 7.0 documents them.
 */
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { checkOptions, type OptionNames, TmemError } from '@tmem/core'
import { type RedisOptions, Valkey } from 'iovalkey'
import type { Borrower, RemoteMemory, RemotePlan } from './remote.ts'

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

const names: OptionNames<ValkeyOptions> = {
  host: true,
  port: 'number?',
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
const lasting = /\b(WRONGPASS|NOAUTH|NOPERM)\b|the user needs|maxmemory-policy|certificate|a replica|of a cluster/i

/** Milliseconds between two attempts to connect: doubled each time, up to the second. */
const firstRetryMs = 50
const lastRetryMs = 3000
/** Milliseconds after which a server that cannot be used yet is asked again. */
const askAgainMs = 200

/**
 * A Valkey or Redis server as a machine to borrow from. Throws `RangeError` or `TypeError` for settings that make no
 * sense.
 */
export function valkey(options: ValkeyOptions): RemotePlan {
  checkOptions('valkey', options, names)
  const { host, port = 6379, prefix = 'tmem', leaseMs = 3_600_000, deadlineMs = 2000, connectMs = 10_000 } = options
  if (typeof host !== 'string' || host === '')
    throw new TypeError('valkey: host is the name of the server; it is missing')
  const within = (name: string, value: number, least: number, most: number): void => {
    if (!Number.isSafeInteger(value) || value < least || value > most)
      throw new RangeError(`valkey: ${name} is ${least} to ${most}, got ${value}`)
  }
  within('port', port, 1, 65_535)
  within('leaseMs', leaseMs, 1000, 7 * 86_400_000)
  within('deadlineMs', deadlineMs, 10, 60_000)
  within('connectMs', connectMs, 10, 3_600_000)
  if (prefix.length < 1 || prefix.length > 64) throw new RangeError('valkey: prefix has 1 to 64 characters')
  const settings = { ...options, host, port, prefix, leaseMs, deadlineMs, connectMs }
  const name = `${host.includes(':') ? `[${host}]` : host}:${port}`
  if (options.password !== undefined && options.passwordFile !== undefined)
    throw new RangeError('valkey: give password or passwordFile, not both')
  return Object.freeze({ name, borrow: (borrower: Borrower) => new ValkeyMemory(name, settings, borrower) })
}

type Settings = ValkeyOptions &
  Required<Pick<ValkeyOptions, 'port' | 'prefix' | 'leaseMs' | 'deadlineMs' | 'connectMs'>>

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
  isOpen = false
  readonly #client: Valkey
  readonly #borrower: Borrower
  readonly #prefix: string
  readonly #deadlineMs: number
  readonly #connectMs: number
  /** Who waits for it to be open. */
  readonly #waiting: Set<Waiter> = new Set()
  readonly #ending: AbortController = new AbortController()
  /** Which connection it is; what was asked on another one does not count. */
  #connection = 0
  /** What is to be asked for at the end of this turn. */
  readonly #gets: Get[] = []
  /** When each question that is under way was asked, and the timer that looks at them. */
  readonly #waitingSince: number[] = []
  #watch: NodeJS.Timeout | undefined
  /** Why the connection was given up, until there is another one. */
  #late: TmemError | undefined
  #closing: Promise<void> | undefined

  constructor(name: string, options: Settings, borrower: Borrower) {
    const { host, port, username, passwordFile, caFile, prefix, leaseMs, deadlineMs, connectMs } = options
    const password =
      passwordFile === undefined ? options.password : readSecret('password', passwordFile).split(/\r?\n/)[0]
    const tls = caFile === undefined ? options.tls === true && {} : { ca: readSecret('certificates', caFile) }
    this.name = name
    this.leaseMs = leaseMs
    this.#borrower = borrower
    this.#deadlineMs = deadlineMs
    this.#connectMs = connectMs
    this.#prefix = `${prefix}:${randomBytes(12).toString('base64url')}:`
    const settings: RedisOptions = {
      host,
      port,
      ...(username === undefined ? {} : { username }),
      ...(password === undefined ? {} : { password }),
      ...(tls === false ? {} : { tls }),
      connectTimeout: deadlineMs,
      disconnectTimeout: 100,
      enableOfflineQueue: false,
      enableReadyCheck: false,
      autoResendUnfulfilledCommands: false,
      maxRetriesPerRequest: 0,
      keepAlive: 10_000,
      retryStrategy: (times) => Math.min(lastRetryMs, firstRetryMs * 2 ** Math.min(times - 1, 10)),
    }
    this.#client = new Valkey(settings)
    this.#client.on('error', (error: Error) => this.#failed(error))
    this.#client.on('close', () => {
      this.#connection++
      this.isOpen = false
    })
    // Nothing but this has been asked on the connection.
    this.#client.on('ready', () => {
      this.#late = undefined
      void this.#greet()
    })
  }

  /** Finds out what the server is, and opens when it can be used. */
  async #greet(): Promise<void> {
    const connection = ++this.#connection
    while (connection === this.#connection && !this.#ending.signal.aborted) {
      try {
        const said = infoOf(await this.#within(this.#client.info()))
        if (connection !== this.#connection) return
        const why = this.#unfit(said)
        if (why === undefined) {
          this.#open(said)
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

  /** Why a server cannot be used now. */
  #unfit(said: ReadonlyMap<string, string>): string | undefined {
    if (said.get('run_id') === undefined) return 'it does not say what it is: the user needs the command INFO'
    if (said.get('loading') === '1') return 'it is loading its data'
    if (said.get('redis_mode') === 'cluster') return 'it is a node of a cluster, which cannot be used yet'
    if (said.get('role') === 'slave') return 'it is a replica: name its primary'
    const policy = said.get('maxmemory_policy')
    if (this.#borrower.persistent && policy !== 'noeviction' && said.get('maxmemory') !== '0')
      return `its maxmemory-policy is ${policy}: it drops pages that may not vanish; set noeviction`
    return undefined
  }

  #open(said: ReadonlyMap<string, string>): void {
    const identity = said.get('run_id')
    const kept = identity === this.identity
    const isFirst = this.identity === undefined
    const limit = Number(said.get('maxmemory'))
    this.identity = identity
    this.freeBytes = limit > 0 ? Math.max(0, limit - Number(said.get('used_memory'))) : Number.POSITIVE_INFINITY
    this.failure = undefined
    this.isOpen = true
    this.#borrower.opened(kept || isFirst)
    for (const { resolve } of this.#waiting) resolve()
    this.#waiting.clear()
  }

  /** Notes why it cannot be used. Who waits is told only what will not pass by itself. */
  #failed(error: unknown): void {
    if (!(error instanceof Error)) throw error
    this.failure = this.#told(error)
    if (!lasting.test(error.message)) return
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
    const pipeline = this.#client.pipeline()
    for (const [n, key] of keys.entries()) {
      const { buffer, byteOffset, length } = blocks[n]!
      pipeline.set(this.#prefix + key, Buffer.from(buffer, byteOffset, length), 'PX', this.leaseMs)
    }
    const replies = await this.#within(pipeline.exec())
    return replies!.map(([error, reply]) => {
      if (error !== null) {
        if (error.message.startsWith('OOM')) return false
        throw this.#told(error)
      }
      if (reply !== 'OK') throw this.#told(new Error(`it answered ${String(reply).slice(0, 100)} to SET`))
      return true
    })
  }

  get(key: number): Promise<Uint8Array | undefined> {
    return new Promise((resolve, reject) => {
      this.#gets.push({ key, resolve, reject })
      // All that is asked for in this turn goes in one message.
      if (this.#gets.length === 1) process.nextTick(() => void this.#sendGets())
    })
  }

  async #sendGets(): Promise<void> {
    const gets = this.#gets.splice(0)
    try {
      this.#mustBeOpen()
      // For keys that have something else than a string, which somebody else has put there, it answers that there is
      // none.
      const blocks = await this.#within(this.#client.mgetBuffer(gets.map(({ key }) => this.#prefix + key)))
      for (const [n, { resolve }] of gets.entries()) resolve(blocks[n] ?? undefined)
    } catch (error) {
      for (const { reject } of gets) reject(error as Error)
    }
  }

  async remove(keys: readonly number[]): Promise<void> {
    this.#mustBeOpen()
    await this.#within(this.#client.unlink(keys.map((key) => this.#prefix + key)))
  }

  async renew(keys: readonly number[]): Promise<readonly boolean[]> {
    this.#mustBeOpen()
    const pipeline = this.#client.pipeline()
    for (const key of keys) pipeline.pexpire(this.#prefix + key, this.leaseMs)
    const replies = await this.#within(pipeline.exec())
    return replies!.map(([error, reply]) => {
      if (error !== null) throw this.#told(error)
      return reply === 1
    })
  }

  #mustBeOpen(): void {
    if (!this.isOpen) throw this.failure ?? this.#told(new Error('it is not connected'))
  }

  /**
   * What is asked, or the error when that takes too long: then the connection is given up, with all that is under way.
   */
  #within<Answer>(asked: Promise<Answer>): Promise<Answer> {
    // Answers come in the order of the questions, so the first that waits has waited longest.
    this.#waitingSince.push(performance.now())
    this.#watch ??= setTimeout(() => this.#look(), this.#deadlineMs)
    return asked.then(
      (answer) => {
        this.#waitingSince.shift()
        return answer
      },
      (error: unknown) => {
        this.#waitingSince.shift()
        throw error instanceof Error ? this.#told(this.#late ?? error) : error
      },
    )
  }

  /** Gives the connection up when somebody has waited too long. */
  #look(): void {
    this.#watch = undefined
    const [since] = this.#waitingSince
    if (since === undefined) return
    const leftMs = since + this.#deadlineMs - performance.now()
    if (leftMs > 0) {
      this.#watch = setTimeout(() => this.#look(), leftMs)
      return
    }
    // Where this process was busy all the while, the answer may be here: it is read first.
    setImmediate(() => {
      if (this.#waitingSince[0] !== since) {
        this.#watch ??= setTimeout(() => this.#look(), 0)
        return
      }
      const late = this.#told(new Error(`no answer within ${this.#deadlineMs} ms`))
      this.#late = late
      this.failure = late
      this.isOpen = false
      // All that is under way is told so when the connection is closed.
      this.#client.disconnect(true)
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
    this.failure = this.#told(new Error('it was closed'))
    for (const { reject } of this.#waiting) reject(this.failure)
    this.#waiting.clear()
    // Between two attempts there is no connection that could end.
    const isConnected = ['ready', 'connect', 'connecting'].includes(this.#client.status)
    const ended = isConnected ? once(this.#client, 'end') : undefined
    this.#client.disconnect()
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

/** What INFO has said, by name. */
function infoOf(text: string): Map<string, string> {
  const said = new Map<string, string>()
  for (const line of text.split('\r\n')) {
    const colon = line.indexOf(':')
    if (colon > 0) said.set(line.slice(0, colon), line.slice(colon + 1))
  }
  return said
}

/** What an error without a message is: several addresses were tried. */
const nameOf = (error: Error): string => ('code' in error ? String(error.code) : error.name)
