/**
 * `tmem demo --remote`: a program with eight times the memory that it has. What does not fit rests compressed in
 * memory, then in the memory of two Redis or Valkey servers, then in a file. In the middle one of the servers is
 * killed; a while later it is there again, with nothing in it.
 *
 * Every page is compared with what was last written each time that it is read, and all of them once more at the end.
 * The servers are started for it, on loopback ports, and end with it.
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
/** The program's pages over its frames, and over the bytes of zcache. */
const overcommit = 8
const referencesPerPage = 2
const exponent = 1.1
const writes = 0.3
/** The counter of blocks that came from servers. */
const fetches = 'remote_pers_pages_succ_get'
/** Parts of the work that are done when a server is killed, and when it is there again. */
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
  /**
   * Blocks that came from the other server while one was away, and copies that were made again for the one that came
   * back.
   */
  readonly fetchedMeanwhile: number
  readonly healedCopies: number
  /** Blocks that went to the servers, that came from there, and that are lost there. */
  readonly remoted: number
  readonly fetched: number
  readonly lost: number
  readonly killed: boolean
  readonly comparedBytes: number
  readonly wrongBytes: 0
}

/**
 * Runs the demo and prints what it found. Rejects with `Failed` at the first wrong byte, and where no server can be
 * started.
 */
export async function remoteDemo(options: DemoOptions, terminal: Terminal): Promise<void> {
  if (options.report !== undefined || options.overwrite === true)
    throw new BadInput('--report is for the demo of three machines: leave it out, or leave --remote out')
  const size = options.size ?? defaultBytes
  const pages = Math.floor(size / basePageSize)
  if (pages < minPages)
    throw new BadInput(`--size is ${formatBytes(size)}; at least ${formatBytes(minPages * basePageSize)} are needed`)
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

/** As many pages as are wanted, out of those that there are: each time around they begin at another byte. */
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

/** Kills a server when a part of the work is done, and starts it again later. */
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

  /** The same progress, which is looked at on its way. */
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
        this.#terminal.note(`the server on port ${this.#server.port} is there again, with nothing in it`)
      })
    }
  }

  /** Resolves when nothing is under way any more. */
  async over(): Promise<void> {
    await this.#doing
  }
}

/** Waits until every block has both copies again; longer than it takes to connect, but not for ever. */
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
    `a program of ${formatBytes(settings.memoryBytes)} with ${formatBytes(settings.frameBytes)} of memory, and as cold memory ${formatBytes(settings.zcacheBytes)} of zcache, two servers and a file`,
    `${seconds.toFixed(1)} s, ${count(swapOuts)} swap-outs, ${count(swapIns)} swap-ins`,
    `${count(remoted)} pages went to the servers, ${count(fetched)} came from there; one server was killed meanwhile:`,
    `${count(fetchedMeanwhile)} came from the other one while it was away, ${count(healedCopies)} copies were made again when it was back`,
    `${(comparedBytes / 2 ** 30).toFixed(1)} GiB that were read were compared with what was last written: 0 wrong bytes`,
  ].join('\n')
}
