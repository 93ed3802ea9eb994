/**
 * The log of a server: lines on standard error, as text for people or as JSON (pino).
 *
 * Invariants:
 *  - The server never waits for the reader of its log, who may be swapped out to this very server: a thread of the
 *    runtime writes the lines. At most 256 KiB wait; more lines are dropped and counted.
 *  - A kind of event (level, event, and message without its numbers) has at most ten lines in ten seconds. A line at
 *    their end says how many more events there were. The last 64 kinds are tracked.
 *  - A request that succeeds leaves no line.
 *  - The last events are remembered, even below the level of the log, but not those of `debug`: at most `maxEvents`,
 *    each cut to `maxMessage` characters.
 */
import type { StatsNode } from '@tmem/core'
import pc from 'picocolors'
import pino from 'pino'

export type LogFormat = 'text' | 'json'
/** Levels, from failures of something that is served to details for debugging. */
export type LogLevel = 'error' | 'warn' | 'info' | 'debug'

/** Options of a log. */
export interface LogOptions {
  /** Default: text if standard error is a terminal, else JSON. */
  readonly format?: LogFormat
  /** The lowest level that is written (default `info`). */
  readonly level?: LogLevel
  /** Descriptor to write to, which is closed at the end unless it is standard error (default 2, standard error). */
  readonly descriptor?: number
  /** A monotonic clock in milliseconds (default: time since the start of the process). */
  readonly clock?: () => number
}

/** A remembered event. */
export interface LogEvent {
  /** Counts from 1. */
  readonly number: number
  /** Milliseconds since 1970. */
  readonly time: number
  readonly level: LogLevel
  readonly event: string
  readonly message: string
}

/** Fields of a line in JSON, beside `time`, `level`, `pid`, `event` and `msg`. */
export type LogFields = Readonly<Record<string, string | number | boolean | null>>

const windowMs = 10_000
const maxLines = 10
const maxKinds = 64
const maxWaitingBytes = 256 * 1024
const maxEvents = 64
const maxMessage = 512
/** How long the end of a server waits for the reader of its log. */
const patienceMs = 1000

/** Events of a kind in the ten seconds that began with the first: the number of lines, and of further events. */
interface Kind {
  readonly level: LogLevel
  readonly event: string
  readonly sinceMs: number
  said: number
  more: number
}

export class Log {
  readonly #pino: pino.Logger
  readonly #destination: ReturnType<typeof pino.destination>
  readonly #clock: () => number
  readonly #kinds = new Map<string, Kind>()
  readonly #lines: Record<LogLevel, number> = { error: 0, warn: 0, info: 0, debug: 0 }
  readonly #events: LogEvent[] = []
  #numbered = 0
  #suppressed = 0
  #dropped = 0
  #hasEnded = false

  constructor(options: LogOptions = {}) {
    const { descriptor = 2, level = 'info', clock = () => performance.now() } = options
    const { format = descriptor === 2 && process.stderr.isTTY ? 'text' : 'json' } = options
    this.#clock = clock
    this.#destination = pino.destination({ dest: descriptor, sync: false, maxLength: maxWaitingBytes })
    this.#destination.on('drop', () => {
      this.#dropped++
    })
    // The reader has gone; the server goes on.
    this.#destination.on('error', () => {
      this.#dropped++
    })
    const written = { write: (line: string) => this.#destination.write(format === 'json' ? line : textOf(line)) }
    this.#pino = pino(
      {
        level,
        base: { pid: process.pid },
        timestamp: pino.stdTimeFunctions.isoTime,
        formatters: { level: (label) => ({ level: label }) },
      },
      written,
    )
  }

  /** Something that is served has failed. */
  error(event: string, message: string, fields: LogFields = {}): void {
    this.#say('error', event, message, fields)
  }

  /** Something was refused, is missing, or needs attention. */
  warn(event: string, message: string, fields: LogFields = {}): void {
    this.#say('warn', event, message, fields)
  }

  /** A setting has changed, or something has recovered. */
  info(event: string, message: string, fields: LogFields = {}): void {
    this.#say('info', event, message, fields)
  }

  debug(event: string, message: string, fields: LogFields = {}): void {
    this.#say('debug', event, message, fields)
  }

  /** Remembers an event without a line in the log. */
  remember(level: LogLevel, event: string, message: string): void {
    const text = message.length > maxMessage ? `${message.slice(0, maxMessage)}…` : message
    this.#events.push({ number: ++this.#numbered, time: Date.now(), level, event, message: text })
    if (this.#events.length > maxEvents) this.#events.shift()
  }

  /** The last events, the newest at the end. */
  recent(): LogEvent[] {
    return [...this.#events]
  }

  /** Logs how many events of each kind were suppressed, once their ten seconds are over. Call this now and then. */
  look(): void {
    const now = this.#clock()
    for (const [key, kind] of this.#kinds) if (now - kind.sinceMs >= windowMs) this.#end(key, kind)
  }

  /**
   * Lines by level, events that were counted instead of logged, and lines that were dropped because nobody read them.
   */
  stats(): StatsNode {
    return {
      name: 'log',
      counters: { ...this.#lines, suppressed: this.#suppressed, dropped: this.#dropped },
      children: [],
    }
  }

  /** Writes the rest. Resolves when it is written, or after a second. Later events are dropped and counted. */
  async close(): Promise<void> {
    if (this.#hasEnded) return
    for (const [key, kind] of this.#kinds) this.#end(key, kind)
    this.#hasEnded = true
    let timer: NodeJS.Timeout | undefined
    await Promise.race([
      new Promise((resolve) => {
        this.#destination.once('close', resolve)
        this.#destination.end()
      }),
      new Promise((resolve) => {
        timer = setTimeout(resolve, patienceMs)
      }),
    ])
    clearTimeout(timer)
  }

  #say(level: LogLevel, event: string, message: string, fields: LogFields): void {
    if (level === 'debug' && !this.#pino.isLevelEnabled(level)) return
    const key = `${level} ${event} ${message.replaceAll(/\d+/g, 'N')}`
    const kind = this.#kinds.get(key)
    const now = this.#clock()
    if (kind !== undefined) {
      if (now - kind.sinceMs >= windowMs) this.#end(key, kind)
      else {
        if (kind.said < maxLines) {
          kind.said++
          this.#write(level, event, message, fields)
        } else {
          kind.more++
          if (this.#pino.isLevelEnabled(level)) this.#suppressed++
        }
        return
      }
    }
    for (const [oldest, which] of this.#kinds) {
      if (this.#kinds.size < maxKinds) break
      this.#end(oldest, which)
    }
    this.#kinds.set(key, { level, event, sinceMs: now, said: 1, more: 0 })
    this.#write(level, event, message, fields)
  }

  #end(key: string, { level, event, more }: Kind): void {
    this.#kinds.delete(key)
    if (more > 0)
      this.#write(level, event, `${more} more like it: ${key.slice(level.length + event.length + 2)}`, { more })
  }

  #write(level: LogLevel, event: string, message: string, fields: LogFields): void {
    if (this.#hasEnded) {
      this.#dropped++
      return
    }
    if (level !== 'debug') this.remember(level, event, message)
    if (!this.#pino.isLevelEnabled(level)) return
    this.#lines[level]++
    this.#pino[level]({ event, ...fields }, message)
  }
}

/** A line for people, in the form of the program's other messages. */
function textOf(line: string): string {
  const { level, msg } = JSON.parse(line) as { level: LogLevel; msg: string }
  // A part of the message may come from a client.
  const text = `tmem: ${msg.replaceAll(/\p{Cc}+/gu, ' ')}`
  const painted = { error: pc.red, warn: pc.yellow, info: String, debug: pc.dim }[level](text)
  return `${process.stderr.isTTY ? painted : text}\n`
}
