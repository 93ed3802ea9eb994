/**
 * A guest whose swapped pages rest in a stack of this process: the stack, Xen's interface over it, the guest, and the
 * counters of all three.
 *
 * Invariants: at the end of a run, however it ends, the guest, its files and the stack are gone. A run fails if the
 * guest finds a wrong byte or if the counters differ.
 */
import { compose, type Layer, type StatsNode } from '@tmem/core'
import {
  type AttachCounters,
  type AttachedGuest,
  attachGuest,
  type BootedRun,
  type BootOptions,
  bootGuest,
} from '@tmem/kernel-guest'
import { XenHost } from '@tmem/xen-hypercall'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { Ticking } from '../serve/ticking.ts'
import { ask } from '../xen/socket.ts'

/** The guest and its stack. */
export interface MachineOptions extends Omit<BootOptions, 'signal' | 'swapTo' | 'trace'> {
  readonly layers: readonly Layer[]
  readonly signal: AbortSignal
  readonly lookMicroseconds?: number
  readonly onEvents?: (events: Uint8Array) => void
  /** Called now and then while the guest runs. */
  readonly onCounters?: (counters: Readonly<AttachCounters>) => void
}

/** The result of a run. */
export interface MachineRun extends BootedRun {
  readonly host: Readonly<AttachCounters>
  readonly stats: StatsNode
  /** CPU time of this process, in seconds. */
  readonly hostCpuSeconds: number
}

const domain = 1
const counterMs = 2000

/** Runs a guest to its end. Rejects with `Failed`, `TmemError` or `Interrupted`. */
export async function runMachine(options: MachineOptions): Promise<MachineRun> {
  const { layers, signal, onCounters, lookMicroseconds, onEvents, ...boot } = options
  const before = process.cpuUsage()
  let ticking: Ticking | undefined
  const store = compose(layers, { wake: () => ticking?.wake() })
  const host = new XenHost({ store })
  const ending = new AbortController()
  const end = (): void => ending.abort()
  signal.addEventListener('abort', end)
  let timer: NodeJS.Timeout | undefined
  let broken: Error | undefined
  const onBroken = (error: Error): void => {
    broken ??= error
    end()
  }
  try {
    await store.ready?.()
    ticking = new Ticking(() => store.tick({ pages: 4096 }), onBroken)
    throwIfInterrupted(signal)
    const { memory, doorbell, ended } = bootGuest({ ...boot, trace: onEvents !== undefined, signal: ending.signal })
    const gone = new AbortController()
    // However the guest ended, stop waiting for its doorbell.
    const run = ended.finally(() => gone.abort())
    const look = lookMicroseconds === undefined ? {} : { lookMicroseconds }
    const told = onEvents === undefined ? {} : { onEvents }
    const attaching = attachGuest({ host, domain, memory, doorbell, signal: gone.signal, ...look, ...told }).then(
      (made) => {
        made.ended.catch(onBroken)
        timer = setInterval(() => onCounters?.(made.counters), counterMs)
        return made
      },
      (error: Error) => {
        // The error of a guest that did not start says more than its missing doorbell.
        if (!gone.signal.aborted) onBroken(error)
        return undefined
      },
    )
    let done: BootedRun
    let link: AttachedGuest | undefined
    try {
      done = await run
    } finally {
      link = await attaching
    }
    if (broken !== undefined) throw broken
    if (done.exit !== 0 || link === undefined) throw new Failed(`the guest ended with ${done.exit}: ${lastOf(done)}`)
    const { user, system } = process.cpuUsage(before)
    const result = { ...done, host: link.counters, stats: store.stats(), hostCpuSeconds: (user + system) / 1e6 }
    const mistakes = differences([...hostPairs(result), ...kernelPairs(result)])
    if (mistakes.length > 0) throw new Failed(`the two sides counted differently: ${mistakes.join(', ')}`)
    return result
  } catch (error) {
    throwIfInterrupted(signal)
    throw broken ?? error
  } finally {
    signal.removeEventListener('abort', end)
    clearInterval(timer)
    ticking?.stop()
    host.close()
    await store.close()
  }
}

/** The reason of a kernel panic, or the guest's last lines. */
const lastOf = ({ console }: BootedRun): string =>
  /Kernel panic.*/.exec(console)?.[0] ?? console.trim().split('\n').slice(-4).join(' / ')

/** The guest, and the host that serves it. */
export interface ServedOptions extends Omit<BootOptions, 'signal' | 'swapTo' | 'trace'> {
  /** Socket of a `tmem xen host`, and the guest's domain number there. */
  readonly control: string
  readonly domain: number
  readonly signal: AbortSignal
}

/** Runs a guest that another process serves. Rejects with `Failed` or `Interrupted`. */
export async function runServed({ control, domain, signal, ...boot }: ServedOptions): Promise<BootedRun> {
  const ending = new AbortController()
  const end = (): void => ending.abort()
  signal.addEventListener('abort', end)
  let refused: Error | undefined
  try {
    throwIfInterrupted(signal)
    const { memory, doorbell, ended } = bootGuest({ ...boot, signal: ending.signal })
    const asking = ask(control, { do: 'attach', domain, memory, doorbell }).catch((error: Error) => {
      refused = error
      end()
    })
    let done: BootedRun
    try {
      done = await ended
    } finally {
      await asking
    }
    if (done.exit !== 0) throw new Failed(`the guest ended with ${done.exit}: ${lastOf(done)}`)
    const mistakes = differences(kernelPairs(done))
    if (mistakes.length > 0) throw new Failed(`kernel and module counted differently: ${mistakes.join(', ')}`)
    return done
  } catch (error) {
    throwIfInterrupted(signal)
    throw refused ?? error
  } finally {
    signal.removeEventListener('abort', end)
  }
}

/** One count, as each of two sides has it. */
type Pair = readonly [name: string, ours: number | undefined, theirs: number | undefined]

const differences = (pairs: readonly Pair[]): string[] =>
  pairs
    .filter(([, ours, theirs]) => ours !== theirs)
    .map(([name, ours, theirs]) => `${name} ${ours ?? 'none'} and ${theirs ?? 'none'}`)

/** What the host did and what the module asked for, call by call. */
const hostPairs = ({ host, module }: MachineRun): Pair[] => [
  ['pools', host.pools, module['pools']],
  ['puts', host.puts, module['puts']],
  ['gets', host.gets, module['gets']],
  ['page flushes', host.page_flushes, module['page_flushes']],
  ['object flushes', host.object_flushes, module['object_flushes']],
]

/**
 * The calls that the module received, and the kernel's own counters of its hooks. The kernel does not count the
 * invalidation of a page that is stored again, so that the module may count more.
 */
function kernelPairs({ module, frontswap, cleancache }: BootedRun): Pair[] {
  const { succ_stores: stored, failed_stores: failed, loads, invalidates = 0 } = frontswap
  const { clean_puts: cleanPuts, clean_hits: hits, clean_misses: misses, clean_page_flushes: cleanFlushes } = module
  const flushes = less(module['page_flushes'], cleanFlushes)
  const swapping: Pair[] = [
    ['stores', sum(less(module['puts'], cleanPuts), module['declined']), sum(stored, failed)],
    ['stores that failed', sum(module['refused'], module['declined']), failed],
    ['loads', less(module['gets'], sum(hits, misses)), sum(loads, module['again'])],
    ['invalidations', flushes, Math.max(invalidates, flushes)],
  ]
  if (cleancache['puts'] === undefined) return swapping
  return [
    ...swapping,
    ['cleancache puts', cleanPuts, cleancache['puts']],
    ['cleancache hits', hits, cleancache['succ_gets']],
    ['cleancache misses', misses, cleancache['failed_gets']],
    ['cleancache invalidations', cleanFlushes, cleancache['invalidates']],
  ]
}

const less = (all: number | undefined, part: number | undefined): number => (all ?? 0) - (part ?? 0)

const sum = (...values: readonly (number | undefined)[]): number => values.reduce<number>((all, n) => all + (n ?? 0), 0)
