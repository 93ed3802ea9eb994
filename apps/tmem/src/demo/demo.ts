/**
 * `tmem demo`: the experiment that was proposed on the Linux mailing list in December 2009 to find out what tmem is
 * worth. Three machines do the same work: one with all the memory, one that gives a part of it to tmem, and one that
 * has a swap file instead of that part. How far is the first from the last, and where between them is the second?
 *
 * Source: P. Machek, "Re: Tmem [PATCH 0/5] (Take 3): Transcendent memory", linux-kernel, 18 December 2009.
 */
import { constants } from 'node:buffer'
import { join } from 'node:path'
import type { Curve } from '@tmem/console'
import { basePageSize, compose, formatBytes, type Layer, type PageStore, type StatsNode, TmemError } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { minLimitBytes, zcache } from '@tmem/zcache'
import { BadInput } from '../ending.ts'
import { judgeReport, type ReportOptions, writeReport } from '../report-file.ts'
import type { Terminal } from '../terminal.ts'
import { type Input, readInput } from './input.ts'
import { type MachineLook, runMachine } from './machine.ts'
import { type DemoReport, type MachineReport, type PlaceReport, shown, type TmemReport } from './report.ts'
import { makeSwapDirectory, type SwapDirectory } from './swap-files.ts'
import { Stopwatch, TimedStore, timedPlace } from './timed.ts'
import { createStream } from './workload.ts'

/** Options of the command. */
export interface DemoOptions extends ReportOptions {
  readonly input?: readonly string[]
  readonly size?: number
  readonly budget?: number
  readonly dir?: string
  readonly seed: number
  readonly json?: true
}

const defaultBytes = 256 * 2 ** 20
/** Half of these pages are larger than the smallest zcache. */
const minPages = 256
/** References per page, their skew, and the part of them that are writes. */
const referencesPerPage = 48
const exponent = 1.2
const writes = 0.3

/** Runs the demo and prints its findings. */
export async function demo(options: DemoOptions, terminal: Terminal): Promise<void> {
  judgeReport(options)
  const curves: Curve[] = []
  const report = await runDemo(options, terminal, options.report === undefined ? undefined : curves)
  writeReport(options, { kind: 'demo', demo: report, curves })
  terminal.print(options.json === true ? JSON.stringify(report) : shown(report))
}

/** Runs the demo; fills `curves` with the progress of each machine. */
export async function runDemo(options: DemoOptions, terminal: Terminal, curves?: Curve[]): Promise<DemoReport> {
  checkSizes(options)
  const input = await readInput({ paths: options.input, size: options.size, defaultBytes, minPages }, terminal)
  const memoryBytes = input.pages * basePageSize
  const budgetBytes = options.budget ?? Math.floor(input.pages / 2) * basePageSize
  checkBudget(budgetBytes, memoryBytes)
  const directory = makeSwapDirectory(options.dir, memoryBytes)
  try {
    return await runAll({ input, memoryBytes, budgetBytes, seed: options.seed, directory, curves }, terminal)
  } finally {
    directory.remove()
  }
}

function checkSizes({ size = defaultBytes, budget }: DemoOptions): void {
  if (size < minPages * basePageSize)
    throw new BadInput(
      `--size ${formatBytes(size)} is too small: the demo needs at least ${formatBytes(minPages * basePageSize)}`,
    )
  if (budget !== undefined) checkBudget(budget, size)
  // The input, at most as much again for the running machine, and the stream.
  const needed = 2 * size + (size / basePageSize) * referencesPerPage * Uint32Array.BYTES_PER_ELEMENT
  const available = process.availableMemory()
  if (size > constants.MAX_LENGTH || needed > available)
    throw new BadInput(
      `--size ${formatBytes(size)} is too large: the demo needs a little more than twice as much memory, and this host has ${formatBytes(Math.floor(available / 2 ** 20) * 2 ** 20)}`,
    )
}

function checkBudget(budget: number, memoryBytes: number): void {
  if (budget > memoryBytes - basePageSize)
    throw new BadInput(
      `--budget ${formatBytes(budget)} is too large: tmem gets a part of the ${formatBytes(memoryBytes)} of --size, not all of it`,
    )
  if (budget < minLimitBytes)
    throw new BadInput(`--budget ${formatBytes(budget)} is too small: zcache needs ${formatBytes(minLimitBytes)}`)
}

interface Experiment {
  readonly input: Input
  readonly memoryBytes: number
  readonly budgetBytes: number
  readonly seed: number
  readonly directory: SwapDirectory
  readonly curves: Curve[] | undefined
}

async function runAll(experiment: Experiment, terminal: Terminal): Promise<DemoReport> {
  const { input, memoryBytes, budgetBytes, seed, directory, curves } = experiment
  const { pages, sources } = input
  const references = pages * referencesPerPage
  const stream = createStream({ pages, references, exponent, writes, seed })
  const machines: MachineReport[] = []
  let directIo = true
  let comparedBytes = 0
  const run = async (name: MachineReport['name'], frames: number, layers: readonly Layer[]): Promise<void> => {
    const calls = new Stopwatch()
    const waits = new Stopwatch()
    let woken = false
    const opened = open(
      layers.map((layer) => timedPlace(layer, waits)),
      () => {
        woken = true
      },
    )
    const store = new TimedStore(opened, calls)
    const isWoken = (): boolean => {
      const was = woken
      woken = false
      return was
    }
    const curve = new CurveMaker(name)
    try {
      let stats = store.stats()
      let cpuSeconds = 0
      const atEnd = (): void => {
        stats = store.stats()
        cpuSeconds = (calls.elapsed - waits.elapsed) / 1000
      }
      const { seconds, swapOuts, swapIns, comparedPages } = await runMachine(
        {
          name,
          frames,
          store,
          isWoken,
          input,
          stream,
          ...(curves === undefined ? {} : { onLook: (look) => curve.look(look, opened.stats()) }),
        },
        atEnd,
        terminal,
      )
      comparedBytes += comparedPages * basePageSize
      curves?.push(curve.curve)
      const disk = find(stats, 'frontswap')?.counters ?? noDisk
      const held = find(stats, 'zcache')
      if (counterOf(disk, 'directIo') === 0) directIo = false
      machines.push({
        name,
        seconds,
        slowdown: seconds / (machines[0]?.seconds ?? seconds),
        swapOuts,
        swapIns,
        diskWrites: counterOf(disk, 'diskWrites'),
        diskReads: counterOf(disk, 'diskReads'),
        diskBytes: counterOf(disk, 'diskBytesWritten') + counterOf(disk, 'diskBytesRead'),
        refusals: held === undefined ? {} : refusalsOf(held),
        tmem: held === undefined ? noTmem : tmemOf(held.counters, cpuSeconds),
        places: placesOf(stats),
      })
    } finally {
      await store.close()
    }
  }

  const swapFile = (slots: boolean): Layer =>
    frontswap({ file: join(directory.path, 'swap.img'), sizeBytes: memoryBytes, slots })
  // The machine gets half of the memory and the budget, so that a small budget can be made to overflow.
  const frames = Math.min(Math.ceil(pages / 2), pages - Math.ceil(budgetBytes / basePageSize))
  await run('memory', pages, [memory({ limitBytes: smallestMemory })])
  await run('tmem', frames, [zcache({ limitBytes: budgetBytes }), swapFile(false)])
  // A kernel's swap area.
  await run('swap', frames, [swapFile(true)])

  const [, withTmem, withSwap] = machines as [MachineReport, MachineReport, MachineReport]
  const io = ({ diskReads, diskWrites }: MachineReport): number => diskReads + diskWrites
  const diskIoAvoided = io(withSwap) === 0 ? 0 : Math.max(0, 1 - io(withTmem) / io(withSwap))
  const settings = { seed, memoryBytes, partBytes: frames * basePageSize, budgetBytes, references, directIo }
  // `runMachine` throws at the first wrong byte, so that there was none.
  return { input: { pages, sources }, settings, machines, diskIoAvoided, comparedBytes, wrongBytes: 0 }
}

/** Most points of a curve. */
const maxPoints = 240

/** Makes the curve of a machine from samples of its state. */
class CurveMaker {
  readonly curve: { [Key in keyof Curve]: Curve[Key] extends string ? string : number[] }

  constructor(name: string) {
    const columns = { seconds: [], done: [], swapIns: [], swapOuts: [], diskReads: [], diskWrites: [], memoryBytes: [] }
    this.curve = { name, ...columns }
  }

  look({ seconds, done, swapIns, swapOuts, usedFrames }: MachineLook, stats: StatsNode): void {
    const { curve } = this
    if (done < 1 && done - (curve.done.at(-1) ?? -1) < 1 / maxPoints) return
    const disk = find(stats, 'frontswap')?.counters ?? noDisk
    curve.seconds.push(seconds)
    curve.done.push(done)
    curve.swapIns.push(swapIns)
    curve.swapOuts.push(swapOuts)
    curve.diskReads.push(counterOf(disk, 'diskReads'))
    curve.diskWrites.push(counterOf(disk, 'diskWrites'))
    curve.memoryBytes.push(usedFrames * basePageSize + (find(stats, 'zcache')?.counters['used_bytes'] ?? 0))
  }
}

/** The store of the first machine, which never uses it: all its pages find frames. */
const smallestMemory = 2 ** 20

/** Opens a stack. Throws `BadInput` if the host lacks room for the file or memory. */
function open(layers: readonly Layer[], wake: () => void): PageStore {
  try {
    return compose(layers, { wake })
  } catch (error) {
    if (error instanceof TmemError && (error.code === 'TMEM_IO' || error.code === 'TMEM_NO_MEMORY'))
      throw new BadInput(error.message)
    throw error
  }
}

const noTmem: TmemReport = Object.freeze({ pages: 0, bytes: 0, ratio: 1, cpuSeconds: 0 })

type Counters = Readonly<Record<string, number>>

/** Counters of a machine without a swap file. */
const noDisk: Counters = Object.freeze({
  directIo: 1,
  diskWrites: 0,
  diskReads: 0,
  diskBytesWritten: 0,
  diskBytesRead: 0,
})

/** A counter that must exist: if a layer renamed it, a default of 0 would hide the layer's work. */
function counterOf(counters: Counters, name: string): number {
  const value = counters[name]
  if (value === undefined) throw new Error(`there is no counter ${name} among ${Object.keys(counters).join(', ')}`)
  return value
}

function tmemOf(counters: Counters, cpuSeconds: number): TmemReport {
  const pages = counterOf(counters, 'pages')
  const bytes = counterOf(counters, 'used_bytes')
  return { pages, bytes, ratio: pages === 0 ? 1 : (pages * basePageSize) / bytes, cpuSeconds }
}

/** Puts that zcache refused, by reason. */
const refusalsOf = (zcacheNode: StatsNode): Readonly<Record<string, number>> => find(zcacheNode, 'refused')!.counters

/** Pages and bytes in each place. */
function placesOf(stats: StatsNode): PlaceReport[] {
  const chain = find(stats, 'chain')
  if (chain === undefined) return []
  const places: PlaceReport[] = []
  const same = counterOf(chain.counters, 'same_filled_pages')
  if (same > 0)
    places.push({ name: 'directory', pages: same, bytes: same * counterOf(chain.counters, 'bytes_per_page') })
  for (const { name, counters } of chain.children) {
    const pages = counters['pages']
    if (pages === undefined) continue
    places.push({ name, pages, bytes: counters['used_bytes'] ?? counterOf(counters, 'used_bytes_on_disk') })
  }
  return places
}

function find(node: StatsNode, name: string): StatsNode | undefined {
  if (node.name === name) return node
  for (const child of node.children) {
    const found = find(child, name)
    if (found !== undefined) return found
  }
  return undefined
}
