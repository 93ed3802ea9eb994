/**
 * What a server says while it serves, to whoever runs it: lines on standard error, as text for a person or as JSON
 * (pino).
 *
 * Invariants:
 *  - Nobody waits for whoever reads the lines, who may be swapped out to what is served here: they are written by one
 *    of the runtime's threads. 256 KiB wait at most; what comes on top of that is dropped, and counted.
 *  - Of one kind of event (level, event, and message but for its numbers) there are at most ten lines in ten seconds.
 *    How many more there were is said at the end of them. The last 64 kinds are known.
 *  - A request that goes well says nothing.
 *  - The last events are remembered, also those that the level keeps from being said: but for what is only for finding
 *    mistakes (`debug`), and never more than `maxEvents`, each cut to `maxMessage` characters.
 */
import type { StatsNode } from '@tmem/core'
import pc from 'picocolors'
import pino from 'pino'

export type LogFormat = 'text' | 'json'
/** From what stops something that is served to what is only said when it is asked for. */
export type LogLevel = 'error' | 'warn' | 'info' | 'debug'

/** How a server says what happens. */
export interface LogOptions {
  /** Default: text where standard error is a terminal, JSON elsewhere. */
  readonly format?: LogFormat
  /** The least that is said (default `info`). */
  readonly level?: LogLevel
  /** Descriptor that is written to, and closed at the end but for standard error's (default 2: standard error). */
  readonly descriptor?: number
  /** Milliseconds, never going back (default: those since the start of the process). */
  readonly clock?: () => number
}

/** Something that happened, as it is remembered. */
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
/** How long the end of a server waits for whoever reads. */
const patienceMs = 1000

/** Events of a kind in the ten seconds that began with the first of them: those that were said, and more. */
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
    // Nobody reads any more; what is served goes on.
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

  /** Something that is served does not work, or does not any more. */
  error(event: string, message: string, fields: LogFields = {}): void {
    this.#say('error', event, message, fields)
  }

  /** Something was refused, is missing, or should be looked at. */
  warn(event: string, message: string, fields: LogFields = {}): void {
    this.#say('warn', event, message, fields)
  }

  /** Somebody changed something, or something is well again. */
  info(event: string, message: string, fields: LogFields = {}): void {
    this.#say('info', event, message, fields)
  }

  debug(event: string, message: string, fields: LogFields = {}): void {
    this.#say('debug', event, message, fields)
  }

  /** Remembers an event that nobody is told of who does not ask. */
  remember(level: LogLevel, event: string, message: string): void {
    const text = message.length > maxMessage ? `${message.slice(0, maxMessage)}…` : message
    this.#events.push({ number: ++this.#numbered, time: Date.now(), level, event, message: text })
    if (this.#events.length > maxEvents) this.#events.shift()
  }

  /** The last events, the newest at the end. */
  recent(): LogEvent[] {
    return [...this.#events]
  }

  /** Says what of each kind was not said, when its time is over: to be called now and then. */
  look(): void {
    const now = this.#clock()
    for (const [key, kind] of this.#kinds) if (now - kind.sinceMs >= windowMs) this.#end(key, kind)
  }

  /** Lines by level; events that were counted instead of being said; lines that were dropped because nobody read. */
  stats(): StatsNode {
    return {
      name: 'log',
      counters: { ...this.#lines, suppressed: this.#suppressed, dropped: this.#dropped },
      children: [],
    }
  }

  /** Says what is left. Resolves when it is written, or after a second. What comes after it is dropped, and counted. */
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

/** A line for a person: as the program says everything else. */
function textOf(line: string): string {
  const { level, msg } = JSON.parse(line) as { level: LogLevel; msg: string }
  // Some of it is a client's words.
  const text = `tmem: ${msg.replaceAll(/\p{Cc}+/gu, ' ')}`
  const painted = { error: pc.red, warn: pc.yellow, info: String, debug: pc.dim }[level](text)
  return `${process.stderr.isTTY ? painted : text}\n`
}
