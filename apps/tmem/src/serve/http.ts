/**
 * The web console of a server. It shows the answers of the control socket, made once for all open pages.
 *
 * Invariant: while no page is open, the console neither asks the kernel nor collects statistics. It still watches for
 * places that begin to refuse, for pages that are opened later.
 */
import { randomUUID } from 'node:crypto'
import { closeSync, fstatSync } from 'node:fs'
import { type Console, type ConsoleState, type ConsoleSwap, serveConsole } from '@tmem/console'
import type { StatsNode } from '@tmem/core'
import type { Ramzswap } from '@tmem/ramzswap'
import { BadInput, Failed } from '../ending.ts'
import { openGivenFile, readGivenFile } from '../given-file.ts'
import type { Answers, Info } from './control.ts'
import { isLoopback } from './endpoints.ts'
import { type Knob, knobsOf, type Turned } from './knobs.ts'
import type { Log } from './log.ts'
import { usesBy } from './swap.ts'

/** The options as they come from the command line. */
export interface HttpOptions {
  /** `tcp:PORT`, on the loopback, or `tcp:HOST:PORT`. */
  readonly http?: string
  /** File with the token that permits its bearer to set knobs. */
  readonly httpToken?: string
}

/** The address of a console, and the token for its knobs. */
export interface HttpPlan {
  readonly host: string
  readonly port: number
  readonly token: string | undefined
  /** Whether other machines can reach the console. */
  readonly isOpen: boolean
}

const maxTokenBytes = 4096
const leastToken = 16

/** Checks the options; `undefined` without a console. Throws `BadInput`. */
export function httpPlanOf({ http, httpToken }: HttpOptions): HttpPlan | undefined {
  if (http === undefined) {
    if (httpToken !== undefined) throw new BadInput('--http-token is for the console: add --http tcp:127.0.0.1:8780')
    return undefined
  }
  const [, named = '127.0.0.1', port] = /^tcp:(?:(.+):)?(\d{1,5})$/.exec(http) ?? []
  if (port === undefined || Number(port) > 65535)
    throw new BadInput(`bad --http "${http}": expected tcp:PORT (on the loopback) or tcp:HOST:PORT`)
  const host = named.replaceAll(/^\[|\]$/g, '')
  return {
    host,
    port: Number(port),
    token: httpToken === undefined ? undefined : tokenIn(httpToken),
    isOpen: !isLoopback(host),
  }
}

/** The token in a file that only its owner can read. Throws `BadInput`. */
function tokenIn(path: string): string {
  let token: string
  try {
    const file = openGivenFile(path)
    try {
      if ((fstatSync(file).mode & 0o077) !== 0) throw new Error('others can read or write it: chmod 600')
    } finally {
      closeSync(file)
    }
    token = readGivenFile(path, maxTokenBytes).toString().trim()
  } catch (error) {
    throw new BadInput(`--http-token ${path}: ${(error as Error).message}`)
  }
  if (token.length < leastToken || !/^[\x21-\x7e]+$/.test(token))
    throw new BadInput(
      `--http-token ${path}: expected a line of at least ${leastToken} letters and digits, such as openssl rand -hex 16 prints`,
    )
  return token
}

/** A device, as the console needs it. */
export interface ShownDevice extends Turned {
  stats(): StatsNode
}

/** The parts that the console shows. */
export interface ConsoleParts {
  readonly info: Info
  readonly devices: readonly ShownDevice[]
  readonly servers: readonly { stats(): StatsNode }[]
  readonly log: Log
  /** Sets a knob, and logs that it was set here. */
  readonly turn: (device: string, name: string, knob: Knob, value: string) => Promise<string>
  /** Where the page with a byte of a device is. Throws for an offset outside of the device. */
  readonly explain: (device: string, offset: number) => Answers['explain']
}

/** Serves a console. Rejects with `Failed` if it cannot listen. */
export async function webConsole(plan: HttpPlan, parts: ConsoleParts): Promise<Console> {
  const { info, devices, servers, log, turn, explain } = parts
  const run = randomUUID()
  const swaps = new KernelSwap(info, log)
  const state = (): ConsoleState => {
    const used = swaps.seen()
    return {
      atMs: performance.now(),
      server: {
        pid: info.pid,
        run,
        stack: info.stack,
        nbd: info.nbd,
        fuse: info.fuse,
        writable: plan.token !== undefined,
      },
      devices: devices.map((opened) => {
        const { device, users } = opened
        return {
          name: device.name,
          stats: opened.stats(),
          knobs: Object.fromEntries([...knobsOf(opened)].map(([name, knob]) => [name, knob.read()])),
          users: users.counts(),
          swap: used?.get(device.name) ?? null,
          ages: device.ages() ?? null,
        }
      }),
      servers: servers.map((server) => server.stats()),
      events: log.recent(),
    }
  }
  const found = (name: string): Turned => {
    const device = devices.find(({ device: one }) => one.name === name)
    if (device === undefined) throw new Error(`there is no device ${name}`)
    return device
  }
  try {
    return await serveConsole({
      host: plan.host,
      port: plan.port,
      ...(plan.token === undefined ? {} : { token: plan.token }),
      subject: {
        state,
        turn: async (device, name, value) => {
          const knob = knobsOf(found(device)).get(name)
          if (knob === undefined) throw new Error(`there is no knob ${name}`)
          return turn(device, name, knob, value)
        },
        explain: (device, offset) => ({ ...explain(device, offset) }),
      },
      onError: (error) => log.error('console.failed', `a page of the console was not answered: ${error.message}`),
    })
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException
    const advice = code === 'EADDRINUSE' ? ': another process listens there, name another port' : ''
    throw new Failed(`the console cannot listen on ${plan.host}, port ${plan.port}: ${message}${advice}`)
  }
}

/** How old the kernel's last answer may be. */
const staleMs = 2000

/**
 * The kernel's swap areas on the devices. Only other programs can ask for them, so that answers are kept for a while.
 */
class KernelSwap {
  readonly #info: Info
  readonly #log: Log
  #swaps: ReadonlyMap<string, ConsoleSwap> | undefined
  #askedMs = Number.NEGATIVE_INFINITY
  #isAsking = false

  constructor(info: Info, log: Log) {
    this.#info = info
    this.#log = log
  }

  /** The last answer, by device; asks again if it is old. */
  seen(): ReadonlyMap<string, ConsoleSwap> | undefined {
    if (this.#info.fuse !== null && !this.#isAsking && performance.now() - this.#askedMs > staleMs) void this.#ask()
    return this.#swaps
  }

  async #ask(): Promise<void> {
    this.#isAsking = true
    try {
      const uses = await usesBy(
        this.#info,
        this.#info.devices.map(({ name }) => name),
      )
      const swaps = new Map<string, ConsoleSwap>()
      for (const [name, of] of uses) {
        const swap = of.find((use) => use.swap !== undefined)?.swap
        if (swap !== undefined) swaps.set(name, swap)
      }
      this.#swaps = swaps
    } catch (error) {
      this.#swaps = undefined
      this.#log.warn('console.swap', `the swap areas of the kernel are not known: ${(error as Error).message}`)
    } finally {
      this.#askedMs = performance.now()
      this.#isAsking = false
    }
  }
}

/** Notes which places of a device begin to refuse pages, and which have not refused for a while. */
export class RefusalWatch {
  readonly #device: Ramzswap
  readonly #log: Log
  readonly #before = new Map<number, { refused: number; quiet: number; refuses: boolean }>()

  constructor(device: Ramzswap, log: Log) {
    this.#device = device
    this.#log = log
  }

  /** Call this every second. */
  look(): void {
    const { name } = this.#device
    for (const [number, { name: place, refused }] of this.#device.usage().places.entries()) {
      const before = this.#before.get(number) ?? { refused, quiet: 0, refuses: false }
      const more = refused - before.refused
      const quiet = more > 0 ? 0 : before.quiet + 1
      let { refuses } = before
      if (more > 0 && !refuses) {
        this.#log.remember('warn', 'place.refuses', `${name}: ${place} has begun to refuse pages`)
        refuses = true
      } else if (refuses && quiet >= quietLooks) {
        this.#log.remember('info', 'place.takes', `${name}: ${place} has not refused a page for ${quietLooks} seconds`)
        refuses = false
      }
      this.#before.set(number, { refused, quiet, refuses })
    }
  }
}

/** Looks without a refusal after which a place counts as taking pages again. */
const quietLooks = 10
