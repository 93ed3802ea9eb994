/**
 * `tmem bench guest`: a Linux guest that swaps into a stack through its kernel's frontswap hooks, against the same
 * guest that swaps to the same stack over NBD or a file of our FUSE mount, and to a raw file; how often the doorbell
 * rings; and the experiment of December 2009.
 *
 * All guests have Debian's 5.10 kernel, and QEMU emulates their processor (TCG). What is compared is the time from the
 * start of QEMU to its end, boot included, in turns. A run that found a wrong byte, or whose sides counted differently,
 * is a failure, not a figure.
 *
 * The experiment: all the memory; half of it, and as much again for tmem; half of it, and a swap file on a disk that
 * needs 3.4 ms for a request (as QEMU holds it up), as a server's disk of 2009 with 10,000 turns a minute does: 3 ms
 * for half a turn, and a seek within a swap file. With a slower disk no size makes the guest twice as slow: one MiB
 * more, and the kernel gives so many pages away that it reads 2,600.
 * The kernel reads one page at a time, because the program's pages have no order. The mail asks for sizes with which
 * the last is twice as slow as the first; they are looked for first. What is compared is the time of the workload by
 * the guest's clock. Of what tmem takes more than memory does, the host's own work is told apart: the rest is what it
 * costs to leave an emulated machine, and to swap.
 */
import { existsSync, mkdirSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseStack } from '@tmem/core'
import { type GuestDrive, scratchFolder } from '@tmem/guest'
import {
  type BootedRun,
  bootGuest,
  type GuestParts,
  lacksForGuests,
  PartsError,
  prepareParts,
} from '@tmem/kernel-guest'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { type MachineRun, runMachine } from '../guest/machine.ts'
import { defaultCache } from '../guest/run.ts'
import { layerFactories } from '../layers.ts'
import { type Bench, type Row, ratioRow, type Subject, type Suite, shownPart, skippedRow, valueRow } from './frame.ts'
import { endOf, serveSwap } from './guest.ts'

const mebibyte = 2 ** 20
const memoryBytes = 128 * mebibyte
const workloadBytes = 200 * mebibyte
const tmpfs = '/dev/shm'
/** Requests that the disk of the experiment does in a second. */
const diskRequests = 290
const swapNames = [
  'guest-frontswap',
  'guest-frontswap-fuse',
  'guest-frontswap-disk',
  'guest-disk-requests',
  'guest-disk-pages',
] as const
const names2009 = [
  '2009-swap',
  '2009-tmem',
  '2009-requests',
  '2009-bytes',
  '2009-guest-cpu-swap',
  '2009-guest-cpu-tmem',
  '2009-host-cpu-tmem',
  '2009-call',
  '2009-call-host',
] as const
const names = [...swapNames, 'bells-waited', 'bells-posted', 'bells-looked', ...names2009] as const

export const guest: Suite = {
  name: 'guest',
  summary: 'a guest whose kernel swaps through its hooks, over NBD and FUSE, and to a disk',
  async run(bench) {
    const skipped = (reason: string): Row[] => names.map((name) => skippedRow(name, reason))
    const lacks = lacksForGuests() ?? (existsSync(tmpfs) ? undefined : `needs ${tmpfs}`)
    if (lacks !== undefined) return skipped(lacks)
    try {
      return await measured(bench, await parts(bench))
    } catch (error) {
      throwIfInterrupted(bench.signal)
      if (error instanceof PartsError) return skipped(error.message)
      throw error
    }
  },
}

const parts = (bench: Bench): Promise<GuestParts> =>
  shownPart(bench, 'guest: kernel and module', async () => {
    const made = await prepareParts({ cache: defaultCache(), signal: bench.signal })
    return [made, made.kernel.release]
  })

async function measured(bench: Bench, parts: GuestParts): Promise<readonly Row[]> {
  const folder = scratchFolder(tmpfs, 'tmem-bench-kernel-guest-')
  try {
    return [
      ...(await swapRows(bench, parts, folder)),
      ...(await bellRows(bench, parts)),
      ...(await rows2009(bench, parts, folder)),
    ]
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

// ---- Ways to swap -------------------------------------------------------------------------------------------------

async function swapRows(bench: Bench, parts: GuestParts, folder: string): Promise<Row[]> {
  const boot = { parts, workload: 'hog', memoryBytes, workloadBytes, signal: bench.signal } as const
  const zcache = 'limit=128MiB,zvMaxZsize=2048'
  let turn = 0
  let hooks: MachineRun | undefined
  let disk: BootedRun | undefined
  const own = (): string => {
    const path = join(folder, `${turn++}`)
    mkdirSync(path)
    return path
  }
  const serving = async (over: 'nbd' | 'fuse'): Promise<void> => {
    const place = own()
    const mount = join(place, 'mount')
    if (over === 'fuse') mkdirSync(mount)
    const server = await serveSwap(place, zcache, '', '', over === 'fuse' ? mount : undefined)
    try {
      throwUnlessRight(await bootGuest({ ...boot, swapTo: 'disk', drive: server.drive }).ended)
    } finally {
      await endOf(server)
    }
  }
  const subjects: Record<string, Subject> = {
    hooks: {
      run: async () => {
        const text = `zcache(${zcache}) > frontswap(file=${own()}/swap.img,size=256MiB)`
        hooks = await runMachine({ ...boot, layers: parseStack(text, layerFactories) })
      },
    },
    nbd: { run: () => serving('nbd') },
    disk: {
      run: async () => {
        disk = await bootGuest({ ...boot, swapTo: 'disk' }).ended
        throwUnlessRight(disk)
      },
    },
  }
  const lacksFuse = whyNoFuse()
  if (lacksFuse === undefined) subjects['fuse'] = { run: () => serving('fuse') }
  const rounds = bench.quick ? 1 : 3
  const taken = await bench.measure('guest: hooks, NBD, FUSE, a file', subjects, { operations: 1, rounds, warmup: 0 })
  const seconds = (name: string): number => taken[name]! / 1e9
  const raw = 'raw file on tmpfs'
  const [overNbd, overFuse, overDisk, requests, pages] = swapNames
  return [
    ratioRow(overNbd, 's', seconds('hooks'), 'NBD swap', seconds('nbd'), 0.9),
    lacksFuse === undefined
      ? ratioRow(overFuse, 's', seconds('hooks'), 'swap to a file of FUSE', seconds('fuse'))
      : skippedRow(overFuse, lacksFuse),
    ratioRow(overDisk, 's', seconds('hooks'), raw, seconds('disk')),
    ratioRow(requests, 'requests', requestsOf(hooks!), raw, requestsOf(disk!)),
    ratioRow(pages, 'pages', pagesOf(hooks!), raw, pagesOf(disk!)),
  ]
}

/** Why nothing can be mounted here, in words. */
function whyNoFuse(): string | undefined {
  if (process.getuid?.() !== 0) return 'needs root: it mounts'
  return existsSync('/dev/fuse') ? undefined : 'needs /dev/fuse'
}

const requestsOf = ({ drives }: BootedRun): number => drives.reads + drives.writes
const pagesOf = ({ swapIns, swapOuts }: BootedRun): number => swapIns + swapOuts

function throwUnlessRight({ exit, console }: BootedRun): void {
  if (exit !== 0) throw new Failed(`the guest ended with ${exit}: ${console.trim().split('\n').slice(-4).join(' / ')}`)
}

// ---- Bells --------------------------------------------------------------------------------------------------------

/**
 * Bells for each page that was put or got: every call waited for; flushes posted; and the host looks by itself, too.
 */
async function bellRows(bench: Bench, parts: GuestParts): Promise<Row[]> {
  const ways = {
    'bells-waited': { posted: false, lookMicroseconds: 0 },
    'bells-posted': { posted: true, lookMicroseconds: 0 },
    'bells-looked': { posted: true },
  }
  const rows: Row[] = []
  for (const [name, way] of Object.entries(ways)) {
    const bells = await shownPart(bench, `guest: ${name}`, async () => {
      const layers = parseStack('zcache(limit=192MiB)', layerFactories)
      const boot = { parts, workload: 'hog', memoryBytes: 96 * mebibyte, signal: bench.signal, layers } as const
      const { module } = await runMachine({ ...boot, ...way })
      const perPage = module['bells']! / (module['puts']! + module['gets']!)
      return [perPage, `${perPage.toFixed(2)} a page`]
    })
    rows.push(valueRow(name, 'bells/page', bells))
  }
  return rows
}

// ---- 2009 ---------------------------------------------------------------------------------------------------------

const shown = (run: BootedRun): string => `${run.workloadSeconds.toFixed(1)} s, ${requestsOf(run)} requests`

/**
 * Sizes: the program's, in whole MiB as it takes them, and half of the memory. One MiB more of the program can be from
 * no request to thousands, so sizes are told apart by quarters: what is wanting to the next MiB is added to the memory.
 */
interface Sizes {
  readonly mebibytes: number
  readonly halfBytes: number
}

const quarters = 4
const sizesOf = (quarter: number): Sizes => {
  const mebibytes = Math.ceil(quarter / quarters)
  return { mebibytes, halfBytes: 192 * mebibyte + ((mebibytes * quarters - quarter) * mebibyte) / quarters }
}

const sizesText = ({ mebibytes, halfBytes }: Sizes): string =>
  `${mebibytes} MiB in ${(2 * halfBytes) / mebibyte} MiB of memory`

/** Sizes, and two runs with them. */
interface Found {
  readonly sizes: Sizes
  readonly all: BootedRun
  readonly swap: BootedRun
}

async function rows2009(bench: Bench, parts: GuestParts, folder: string): Promise<Row[]> {
  if (bench.quick) return names2009.map((name) => skippedRow(name, 'a quick run does not look for the sizes'))
  const boot = { parts, workload: 'hog', rounds: 64, skewed: true, pageCluster: 0, signal: bench.signal } as const
  const drive = (): GuestDrive => {
    const file = join(folder, 'disk.img')
    rmSync(file, { force: true })
    writeFileSync(file, '')
    truncateSync(file, 768 * mebibyte)
    return { file, requestsPerSecond: diskRequests }
  }
  const done = <Run extends BootedRun>(label: string, run: () => Promise<Run>): Promise<Run> =>
    shownPart(bench, `guest: ${label}`, async () => {
      const ended = await run()
      throwUnlessRight(ended)
      return [ended, shown(ended)]
    })
  const memory = ({ mebibytes, halfBytes }: Sizes): Promise<BootedRun> =>
    done(
      `2009, ${sizesText({ mebibytes, halfBytes })}`,
      () =>
        bootGuest({ ...boot, memoryBytes: 2 * halfBytes, swapTo: 'disk', workloadBytes: mebibytes * mebibyte }).ended,
    )
  /** `undefined`: it takes far too long. */
  const swap = ({ mebibytes, halfBytes }: Sizes, all: BootedRun): Promise<BootedRun | undefined> =>
    shownPart(bench, `guest: 2009, ${mebibytes} MiB in half of it, and a disk`, async () => {
      const timeoutMs = 3000 * all.seconds
      const more = { memoryBytes: halfBytes, workloadBytes: mebibytes * mebibyte, drive: drive(), timeoutMs }
      const ended = await bootGuest({ ...boot, ...more, swapTo: 'disk' }).ended
      if (ended.exit === 'timeout') return [undefined, `not done after ${(timeoutMs / 1000).toFixed(0)} s`]
      throwUnlessRight(ended)
      return [ended, shown(ended)]
    })
  const slower = ({ all, swap }: Found): number => swap.workloadSeconds / all.workloadSeconds
  const away = (one: Found | undefined): number => (one === undefined ? Infinity : Math.abs(slower(one) - 2))
  // More pages, more faults: what is looked for lies between two sizes, and the distance halves.
  let low = 96 * quarters
  let high = 168 * quarters
  let found: Found | undefined
  while (high - low > 1 && away(found) > 0.15) {
    const quarter = Math.floor((low + high) / 2)
    const sizes = sizesOf(quarter)
    const all = await memory(sizes)
    const swapped = await swap(sizes, all)
    const here = swapped === undefined ? undefined : { sizes, all, swap: swapped }
    if (away(here) < away(found)) found = here
    if (here !== undefined && slower(here) < 2) low = quarter
    else high = quarter
  }
  // Beside a guest that hardly swaps, or only swaps, the one with tmem says nothing.
  if (found === undefined || away(found) > 0.3) {
    const nearest =
      found === undefined ? 'none ended in time' : `the nearest takes ${slower(found).toFixed(2)} times as long`
    const why = `no size was found with which a guest that swaps to the disk takes twice as long: ${nearest}`
    return names2009.map((name) => skippedRow(name, why))
  }
  const { sizes, all, swap: swapped } = found
  const { mebibytes, halfBytes } = sizes
  const layers = parseStack(`zcache(limit=${halfBytes})`, layerFactories)
  const tmem = await done(`2009, ${mebibytes} MiB in half of it, and tmem`, () =>
    runMachine({ ...boot, memoryBytes: halfBytes, workloadBytes: mebibytes * mebibyte, layers, drive: drive() }),
  )
  const [swapTime, tmemTime, requests, bytes, swapCpu, tmemCpu, hostCpu, call, callHost] = names2009
  const reference = sizesText(sizes)
  const disk = `swap on a disk of ${diskRequests} requests a second`
  const bytesIn = ({ drives }: BootedRun): number => drives.readBytes + drives.writtenBytes
  const calls = tmem.host.puts + tmem.host.gets
  return [
    ratioRow(swapTime, 's', swapped.workloadSeconds, reference, all.workloadSeconds),
    ratioRow(tmemTime, 's', tmem.workloadSeconds, reference, all.workloadSeconds, 1.15),
    ratioRow(requests, 'requests', requestsOf(tmem), disk, requestsOf(swapped)),
    ratioRow(bytes, 'bytes', bytesIn(tmem), disk, bytesIn(swapped)),
    ratioRow(swapCpu, 's', swapped.workloadCpuSeconds, reference, all.workloadCpuSeconds),
    ratioRow(tmemCpu, 's', tmem.workloadCpuSeconds, reference, all.workloadCpuSeconds),
    valueRow(hostCpu, 's', tmem.hostCpuSeconds),
    valueRow(call, 'µs/call', ((tmem.workloadSeconds - all.workloadSeconds) * 1e6) / calls),
    valueRow(callHost, 'µs/call', tmem.host.busyMicroseconds / calls),
  ]
}
