/**
 * `tmem demo --remote`: a program that uses eight times the memory of its machine. Pages that find no frame rest
 * compressed in memory, then in the memory of two Redis or Valkey servers, then in a file. In the middle of the work
 * one server is killed; a while later it comes back empty.
 *
 * Each read compares the page with what was last written to it, and at the end all pages are compared once more. The
 * demo starts the servers on loopback ports, and ends them.
 */
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { basePageSize, compose, formatBytes, type PageStore, type StatsNode } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { ramster, valkey } from '@tmem/ramster'
import { minLimitBytes, zcache } from '@tmem/zcache'
import { BadInput, Failed, throwIfInterrupted } from '../ending.ts'
import { LendingServer, lackingServer } from '../lending-server.ts'
import type { Terminal } from '../terminal.ts'
import type { DemoOptions } from './demo.ts'
import { type Input, readInput } from './input.ts'
import { runMachine } from './machine.ts'
import { makeSwapDirectory } from './swap-files.ts'
import { createStream } from './workload.ts'

const defaultBytes = 512 * 2 ** 20
const minPages = 2048
/** Ratio of the program's pages to its frames, and to the bytes of zcache. */
const overcommit = 8
const referencesPerPage = 2
const exponent = 1.1
const writes = 0.3
/** The counter of blocks that came from servers. */
const fetches = 'remote_pers_pages_succ_get'
/** The part of the work that is done when a server is killed, and when it comes back. */
const killedAt = 0.4
const backAt = 0.6

/** What the demo found. Names as in its JSON document. */
export interface RemoteReport {
  readonly settings: {
    readonly seed: number
    readonly memoryBytes: number
    readonly frameBytes: number
    readonly zcacheBytes: number
    readonly references: number
  }
  readonly seconds: number
  readonly swapOuts: number
  readonly swapIns: number
  /** Blocks read from the other server while one was away, and copies made again for the server that came back. */
  readonly fetchedMeanwhile: number
  readonly healedCopies: number
  /** Blocks that went to the servers, came from them, and were lost on them. */
  readonly remoted: number
  readonly fetched: number
  readonly lost: number
  readonly killed: boolean
  readonly comparedBytes: number
  readonly wrongBytes: 0
}

/**
 * Runs the demo and prints its findings. Rejects with `Failed` at the first wrong byte, and if no server can be
 * started.
 */
export async function remoteDemo(options: DemoOptions, terminal: Terminal): Promise<void> {
  if (options.report !== undefined || options.overwrite === true)
    throw new BadInput('--report is for the demo of three machines: leave out --report or --remote')
  const size = options.size ?? defaultBytes
  const pages = Math.floor(size / basePageSize)
  if (pages < minPages)
    throw new BadInput(
      `--size ${formatBytes(size)} is too small: the demo needs at least ${formatBytes(minPages * basePageSize)}`,
    )
  const zcacheBytes = options.budget ?? Math.floor(size / overcommit)
  if (zcacheBytes < minLimitBytes)
    throw new BadInput(`--budget ${formatBytes(zcacheBytes)} is too small: zcache needs ${formatBytes(minLimitBytes)}`)
  const input = tiled(
    await readInput({ paths: options.input, defaultBytes: Math.min(size, 64 * 2 ** 20), minPages: 256 }, terminal),
    pages,
  )
  const directory = makeSwapDirectory(options.dir, size)
  const servers: LendingServer[] = []
  try {
    for (let n = 0; n < 2; n++) {
      const server = await LendingServer.start()
      if (server === undefined) throw new Failed(`the demo ${lackingServer}`)
      servers.push(server)
    }
    const report = await run(
      { input, zcacheBytes, seed: options.seed, file: join(directory.path, 'swap.img') },
      servers,
      terminal,
    )
    terminal.print(options.json === true ? JSON.stringify(report) : shown(report))
  } finally {
    for (const server of servers) await server.stop()
    directory.remove()
  }
}

/** As many pages as wanted, made by repeating the given ones; each repetition begins at another byte. */
function tiled({ bytes, sources }: Input, pages: number): Input {
  const all = Buffer.alloc(pages * basePageSize)
  for (let at = 0, round = 0; at < all.length; round++) at += bytes.copy(all, at, (round * 517) % basePageSize)
  return { pages, bytes: all, sources }
}

interface Experiment {
  readonly input: Input
  readonly zcacheBytes: number
  readonly seed: number
  readonly file: string
}

async function run(
  { input, zcacheBytes, seed, file }: Experiment,
  servers: readonly LendingServer[],
  terminal: Terminal,
): Promise<RemoteReport> {
  const { pages } = input
  const memoryBytes = pages * basePageSize
  const references = pages * referencesPerPage
  const stream = createStream({ pages, references, exponent, writes, seed })
  let woken = false
  const machines = servers.map(({ port }) => valkey({ host: '127.0.0.1', port }))
  const layers = [
    zcache({ limitBytes: zcacheBytes }),
    ramster({ machines, sizeBytes: memoryBytes }),
    frontswap({ file, sizeBytes: memoryBytes }),
  ]
  const store = compose(layers, {
    wake: () => {
      woken = true
    },
  })
  const isWoken = (): boolean => {
    const was = woken
    woken = false
    return was
  }
  const trouble = new Trouble(servers[0]!, () => ramsterOf(store).counters[fetches]!, terminal)
  try {
    await store.ready!()
    const frames = Math.floor(pages / overcommit)
    const watched = { ...terminal, progress: (label: string) => trouble.watched(terminal.progress(label)) }
    const machine = { name: 'remote', frames, store, isWoken, input, stream }
    const { seconds, swapOuts, swapIns, comparedPages } = await runMachine(machine, () => undefined, watched)
    await trouble.over()
    await healed(store, terminal.signal)
    const { counters } = ramsterOf(store)
    return {
      settings: { seed, memoryBytes, frameBytes: frames * basePageSize, zcacheBytes, references },
      seconds,
      swapOuts,
      swapIns,
      fetchedMeanwhile: trouble.fetchedMeanwhile,
      healedCopies: counters['healed_copies']!,
      remoted: counters['pers_pages_remoted']!,
      fetched: counters[fetches]!,
      lost: counters['lost']!,
      killed: trouble.hasKilled,
      comparedBytes: comparedPages * basePageSize,
      // `runMachine` throws at the first wrong byte.
      wrongBytes: 0,
    }
  } finally {
    await trouble.over()
    await store.close()
  }
}

/** Kills a server at one point of the work, and starts it again at a later one. */
class Trouble {
  hasKilled = false
  fetchedMeanwhile = 0
  readonly #server: LendingServer
  readonly #fetched: () => number
  readonly #terminal: Terminal
  #stage = 0
  #doing: Promise<unknown> = Promise.resolve()

  constructor(server: LendingServer, fetched: () => number, terminal: Terminal) {
    this.#server = server
    this.#fetched = fetched
    this.#terminal = terminal
  }

  /** Passes progress on, and acts on it. */
  watched(progress: ReturnType<Terminal['progress']>): ReturnType<Terminal['progress']> {
    return {
      at: (done, total) => {
        progress.at(done, total)
        this.#look(done / total)
      },
      done: (result) => progress.done(result),
      end: () => progress.end(),
    }
  }

  #look(part: number): void {
    if (this.#stage === 0 && part >= killedAt) {
      this.#stage = 1
      this.hasKilled = true
      this.#terminal.note(`the server on port ${this.#server.port} is killed`)
      this.#doing = this.#doing.then(async () => {
        await this.#server.kill()
        this.fetchedMeanwhile = -this.#fetched()
      })
    } else if (this.#stage === 1 && part >= backAt) {
      this.#stage = 2
      this.#doing = this.#doing.then(async () => {
        this.fetchedMeanwhile += this.#fetched()
        await this.#server.restart()
        this.#terminal.note(`the server on port ${this.#server.port} is back, and empty`)
      })
    }
  }

  /** Resolves when kill and restart are done. */
  async over(): Promise<void> {
    await this.#doing
  }
}

/** Waits until every block has both copies again, for a bounded time. */
async function healed(store: PageStore, signal: AbortSignal): Promise<void> {
  for (let tries = 0; tries < 300; tries++) {
    store.tick({ pages: 64 })
    const { degraded, one_copy_only: lacking } = ramsterOf(store).counters
    if (degraded === 0 && lacking === 0) return
    await setTimeout(100)
    throwIfInterrupted(signal)
  }
}

const ramsterOf = (store: PageStore): StatsNode => find(store.stats(), 'ramster')!

function find(node: StatsNode, name: string): StatsNode | undefined {
  return node.name === name
    ? node
    : node.children.map((child) => find(child, name)).find((found) => found !== undefined)
}

function shown(report: RemoteReport): string {
  const { settings, seconds, swapOuts, swapIns, remoted, fetched, fetchedMeanwhile, healedCopies, comparedBytes } =
    report
  const count = (value: number): string => value.toLocaleString('en-US')
  return [
    `a program of ${formatBytes(settings.memoryBytes)} with ${formatBytes(settings.frameBytes)} of memory; behind it ${formatBytes(settings.zcacheBytes)} of zcache, two servers and a file`,
    `${seconds.toFixed(1)} s, ${count(swapOuts)} swap-outs, ${count(swapIns)} swap-ins`,
    `${count(remoted)} pages went to the servers, ${count(fetched)} came from them; one server was killed for a while:`,
    `${count(fetchedMeanwhile)} came from the other server meanwhile, ${count(healedCopies)} copies were made again after it came back`,
    `${(comparedBytes / 2 ** 30).toFixed(1)} GiB of reads were compared with what was last written: 0 wrong bytes`,
  ].join('\n')
}
