/** `tmem guest run`: a Linux guest that swaps into a stack of this process through the hooks of its kernel. */
import { closeSync, openSync, rmSync, writeSync } from 'node:fs'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { formatBytes, parseStack } from '@tmem/core'
import {
  type AttachCounters,
  type BootedRun,
  type GuestParts,
  PartsError,
  prepareParts,
  traceHead,
  type Workload,
} from '@tmem/kernel-guest'
import { BadInput, Failed, throwIfInterrupted } from '../ending.ts'
import { layersWith } from '../layers.ts'
import { type Terminal, tableOf } from '../terminal.ts'
import { type MachineRun, runMachine, runServed } from './machine.ts'

/** Options of the command. */
export interface GuestRunOptions {
  readonly workload: Workload
  readonly memory: number
  /** Memory that the workload uses, in bytes (default: see `workloads` of @tmem/kernel-guest). */
  readonly size?: number
  readonly kernelWithCleancache?: true
  /** Default: `defaultStack`. */
  readonly stack?: string
  readonly modules?: readonly string[]
  /** Socket of a `tmem xen host` that serves the guest instead of this process, and the guest's domain number there. */
  readonly control?: string
  readonly domain: number
  readonly cache?: string
  /** How long the guest waits for its host, in seconds. */
  readonly patience: number
  /** False: the guest waits for each flush. */
  readonly posted: boolean
  /** A new file for a trace of the kernel's calls. */
  readonly trace?: string
  readonly json?: true
}

/** The stack without --stack. */
export const defaultStack = 'zcache(limit=128MiB)'

/** The directory of the guest's parts without --cache. */
export const defaultCache = (): string =>
  join(process.env['XDG_CACHE_HOME'] ?? join(homedir(), '.cache'), 'tmem', 'kernel-guest')

/** Prepares the missing parts and reports each step. Rejects with `Failed` or `Interrupted`. */
async function partsFor(options: GuestRunOptions, terminal: Terminal): Promise<GuestParts> {
  const { cache = defaultCache(), kernelWithCleancache: cleancache = false, workload } = options
  const compiler = workload === 'compile'
  const onStep = (what: string): void => terminal.note(`guest: ${what}`)
  try {
    return await prepareParts({ cache, cleancache, compiler, signal: terminal.signal, onStep })
  } catch (error) {
    throwIfInterrupted(terminal.signal)
    if (error instanceof PartsError) throw new Failed(`the parts of the guest cannot be prepared: ${error.message}`)
    if ((error as NodeJS.ErrnoException).syscall !== undefined)
      throw new Failed(`the parts of the guest cannot be prepared: ${(error as Error).message}`)
    throw error
  }
}

/** Runs a guest and prints the counters of kernel, module and host. */
export async function guestRun(options: GuestRunOptions, terminal: Terminal): Promise<void> {
  if (options.memory < 96 * 2 ** 20 || options.memory > 2 ** 31 || options.memory % 2 ** 20 !== 0)
    throw new BadInput(`--memory: expected whole MiB from 96MiB to 2GiB, got ${formatBytes(options.memory)}`)
  if (options.size !== undefined && (options.size < 2 ** 20 || options.size % 2 ** 20 !== 0))
    throw new BadInput(`--size: expected whole MiB, at least 1MiB, got ${formatBytes(options.size)}`)
  const { control, stack = defaultStack, trace: tracePath } = options
  if (
    control !== undefined &&
    (options.stack !== undefined || options.modules !== undefined || tracePath !== undefined)
  )
    throw new BadInput('--control: the host there has its own stack; leave out --stack, --modules and --trace')
  const layers = control === undefined ? parseStack(stack, await layersWith(options.modules)) : []
  const parts = await partsFor(options, terminal)
  const boot = {
    parts,
    workload: options.workload,
    memoryBytes: options.memory,
    ...(options.size === undefined ? {} : { workloadBytes: options.size }),
    patienceMs: options.patience * 1000,
    posted: options.posted,
    signal: terminal.signal,
    onConsole: linesTo((line) => terminal.note(`guest: ${line}`)),
  }
  let run: BootedRun & Partial<MachineRun>
  if (control !== undefined) run = await runServed({ ...boot, control, domain: options.domain })
  else {
    const trace = tracePath === undefined ? undefined : new TraceFile(tracePath)
    const onCounters = (counters: AttachCounters): void => terminal.note(`tmem:  ${counted(counters)}`)
    const onEvents = trace === undefined ? {} : { onEvents: (events: Uint8Array) => trace.append(events) }
    try {
      run = await runMachine({ ...boot, layers, onCounters, ...onEvents })
    } catch (error) {
      trace?.remove()
      throw error
    }
    trace?.close()
  }
  const { module, frontswap, cleancache, host, swapIns, swapOuts, drives, passKibibytes } = run
  const { seconds, workloadSeconds, workloadCpuSeconds, hostCpuSeconds, stats } = run
  const who = control === undefined ? { stack } : { control, domain: options.domain }
  const answer = {
    workload: options.workload,
    memoryBytes: options.memory,
    ...who,
    wrongBytes: 0,
    seconds,
    workloadSeconds,
    workloadCpuSeconds,
    hostCpuSeconds,
    kernel: frontswap,
    cleancache,
    module,
    host,
    disk: { swapIns, swapOuts, ...drives },
    passKibibytes,
    stats,
  }
  terminal.print(options.json === true ? JSON.stringify(answer) : shown(run))
}

const counted = ({ puts, gets, page_flushes, refused }: AttachCounters): string =>
  `${puts} puts, ${gets} gets, ${page_flushes} flushes, ${refused} refused`

function shown(run: BootedRun & Partial<MachineRun>): string {
  const { module, frontswap, cleancache, host, drives, passKibibytes } = run
  const { seconds, workloadSeconds, workloadCpuSeconds, hostCpuSeconds } = run
  const cell = (value: number | undefined): string => (value === undefined ? '-' : value.toLocaleString('en'))
  /** The sum over frontswap and cleancache. */
  const both = (one: number | undefined, other: number | undefined): string => cell((one ?? 0) + (other ?? 0))
  const stores = (frontswap['succ_stores'] ?? 0) + (frontswap['failed_stores'] ?? 0)
  const cleanGets = (cleancache['succ_gets'] ?? 0) + (cleancache['failed_gets'] ?? 0)
  const rows = [
    ['puts', both(stores, cleancache['puts']), cell(module['puts']), cell(host?.puts)],
    ['of these refused', cell(frontswap['failed_stores']), cell(module['refused']), '-'],
    ['gets', both(frontswap['loads'], cleanGets), cell(module['gets']), cell(host?.gets)],
    [
      'flushes of pages',
      both(frontswap['invalidates'], cleancache['invalidates']),
      cell(module['page_flushes']),
      cell(host?.page_flushes),
    ],
    ['flushes of objects', '-', cell(module['object_flushes']), cell(host?.object_flushes)],
    ...(cleancache['puts'] === undefined
      ? []
      : [
          ['puts of cleancache', cell(cleancache['puts']), cell(module['clean_puts']), '-'],
          ['gets of cleancache that hit', cell(cleancache['succ_gets']), cell(module['clean_hits']), '-'],
        ]),
    ['bells', '-', cell(module['bells']), cell(host?.bells)],
    ['reads of drives', cell(drives.reads), '-', '-'],
    ['bytes read', formatBytes(drives.readBytes), '-', '-'],
    ['writes to drives', cell(drives.writes), '-', '-'],
    ['bytes written', formatBytes(drives.writtenBytes), '-', '-'],
  ]
  const clock = `${workloadSeconds.toFixed(2)} s (${workloadCpuSeconds.toFixed(2)} s of CPU) for the workload by the guest's clock`
  const times = `${seconds.toFixed(2)} s in all, ${clock}`
  const cpu = hostCpuSeconds === undefined ? '' : `; ${hostCpuSeconds.toFixed(2)} s of CPU for the host`
  const passes = passKibibytes.map((kibibytes, n) => `pass ${n + 1}: ${kibibytes} KiB`).join(', ')
  return [
    tableOf(['', 'kernel', 'module', 'host'], rows),
    '',
    `Every byte was right. ${times}${cpu}.`,
    ...(passes === '' ? [] : [`Read from the drive of the file: ${passes}.`]),
    'The kernel does not count the invalidation of a page that is stored again: modules may count more flushes of pages.',
  ].join('\n')
}

/** A new file for a trace. Throws `BadInput` if the file exists or cannot be created. */
class TraceFile {
  readonly #path: string
  readonly #file: number

  constructor(path: string) {
    this.#path = path
    try {
      this.#file = openSync(path, 'wx', 0o600)
    } catch (error) {
      throw new BadInput(`--trace: ${path} cannot be created: ${(error as Error).message}`)
    }
    this.append(traceHead)
  }

  /** Throws `Failed` if the file cannot be written, e.g. on a full disk. */
  append(bytes: Uint8Array): void {
    try {
      for (let done = 0; done < bytes.length; ) done += writeSync(this.#file, bytes, done)
    } catch (error) {
      throw new Failed(`${this.#path} cannot be written: ${(error as Error).message}`)
    }
  }

  close(): void {
    closeSync(this.#file)
  }

  remove(): void {
    this.close()
    rmSync(this.#path)
  }
}

/** Splits a stream of text into lines and skips blank ones. */
function linesTo(take: (line: string) => void): (text: string) => void {
  let rest = ''
  return (text) => {
    const lines = `${rest}${text}`.split('\n')
    rest = lines.pop()!
    for (const line of lines) if (line.trim() !== '') take(line)
  }
}
