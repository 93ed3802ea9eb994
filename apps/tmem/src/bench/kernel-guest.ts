/**
 * `tmem bench guest`: a Linux guest that swaps into a stack through its kernel's frontswap hooks, against the same guest
 * that swaps to the same stack over NBD, and to a raw file; how often the doorbell rings; and the experiment of December
 * 2009.
 *
 * All guests have Debian's 5.10 kernel. What is compared is the time from the start of QEMU to its end, boot included,
 * in turns. A run that found a wrong byte, or whose sides counted differently, is a failure, not a figure.
 *
 * The experiment: all the memory; half of it, and as much again for tmem; half of it, and a swap file on a disk of 500
 * requests a second (as QEMU holds it up). The mail asks for sizes with which the last is twice as slow as the first;
 * they are looked for first. What is compared is the time of the workload by the guest's clock.
 */
import { existsSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseStack } from '@tmem/core'
import type { GuestDrive } from '@tmem/guest'
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
import { type Bench, type Row, ratioRow, type Suite, shownPart, skippedRow, valueRow } from './frame.ts'
import { endOf, serveSwap } from './guest.ts'

const mebibyte = 2 ** 20
const memoryBytes = 128 * mebibyte
const workloadBytes = 200 * mebibyte
const tmpfs = '/dev/shm'
/** Requests that the disk of the experiment does in a second. */
const diskRequests = 500
const names = [
  'guest-frontswap',
  'guest-frontswap-disk',
  'guest-disk-pages',
  'bells-waited',
  'bells-posted',
  'bells-looked',
  '2009-swap',
  '2009-tmem',
] as const

export const guest: Suite = {
  name: 'guest',
  summary: 'a guest whose kernel swaps through its hooks, over NBD, and to a disk',
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
  const folder = mkdtempSync(join(tmpfs, `tmem-bench-kernel-guest-${process.pid}-`))
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
    rmSync(path, { recursive: true, force: true })
    return mkdtempSync(`${path}-`)
  }
  const subjects = {
    hooks: {
      run: async () => {
        const text = `zcache(${zcache}) > frontswap(file=${own()}/swap.img,size=256MiB)`
        hooks = await runMachine({ ...boot, layers: parseStack(text, layerFactories) })
      },
    },
    nbd: {
      run: async () => {
        const server = await serveSwap(own(), zcache)
        try {
          throwUnlessRight(await bootGuest({ ...boot, swapTo: 'disk', drive: server.drive }).ended)
        } finally {
          await endOf(server)
        }
      },
    },
    disk: {
      run: async () => {
        disk = await bootGuest({ ...boot, swapTo: 'disk' }).ended
        throwUnlessRight(disk)
      },
    },
  }
  const rounds = bench.quick ? 1 : 3
  const taken = await bench.measure('guest: hooks, NBD, a file', subjects, { operations: 1, rounds, warmup: 0 })
  return [
    ratioRow('guest-frontswap', 's', taken.hooks / 1e9, 'NBD swap', taken.nbd / 1e9, 0.9),
    ratioRow('guest-frontswap-disk', 's', taken.hooks / 1e9, 'raw file on tmpfs', taken.disk / 1e9),
    ratioRow('guest-disk-pages', 'pages', pagesOf(hooks!), 'raw file on tmpfs', pagesOf(disk!)),
  ]
}

const pagesOf = ({ swapIns, swapOuts }: BootedRun): number => swapIns + swapOuts

function throwUnlessRight({ exit, console }: BootedRun): void {
  if (exit !== 0) throw new Failed(`the guest ended with ${exit}: ${console.trim().split('\n').slice(-4).join(' / ')}`)
}

// ---- Bells --------------------------------------------------------------------------------------------------------

/** Bells for each page that was put or got: every call waited for; flushes posted; and the host looks by itself, too. */
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

async function rows2009(bench: Bench, parts: GuestParts, folder: string): Promise<Row[]> {
  const rows = ['2009-swap', '2009-tmem'] as const
  if (bench.quick) return rows.map((name) => skippedRow(name, 'a quick run does not look for the sizes'))
  const whole = 192 * mebibyte
  const half = whole / 2
  const boot = { parts, workload: 'hog', rounds: 2, signal: bench.signal } as const
  const drive = (): GuestDrive => {
    const file = join(folder, 'disk.img')
    rmSync(file, { force: true })
    writeFileSync(file, '')
    truncateSync(file, whole * 2)
    return { file, requestsPerSecond: diskRequests }
  }
  const seconds = async (label: string, run: () => Promise<BootedRun>): Promise<number> =>
    shownPart(bench, `guest: ${label}`, async () => {
      const done = await run()
      throwUnlessRight(done)
      return [done.workloadSeconds, `${done.workloadSeconds.toFixed(1)} s`]
    })
  const memory = (mebibytes: number): Promise<number> =>
    seconds(
      `2009, ${mebibytes} MiB in all the memory`,
      () => bootGuest({ ...boot, memoryBytes: whole, swapTo: 'disk', workloadBytes: mebibytes * mebibyte }).ended,
    )
  const swap = (mebibytes: number): Promise<number> =>
    seconds(
      `2009, ${mebibytes} MiB in half, and a disk`,
      () =>
        bootGuest({ ...boot, memoryBytes: half, swapTo: 'disk', workloadBytes: mebibytes * mebibyte, drive: drive() })
          .ended,
    )
  // More pages, more faults: what is looked for lies between two sizes, and the distance halves.
  let low = 48
  let high = 128
  let found = { mebibytes: low, all: 1, swap: 1 }
  for (let step = 0; step < 5; step++) {
    const mebibytes = Math.round((low + high) / 2)
    const here = { mebibytes, all: await memory(mebibytes), swap: await swap(mebibytes) }
    if (Math.abs(here.swap / here.all - 2) < Math.abs(found.swap / found.all - 2)) found = here
    if (Math.abs(here.swap / here.all - 2) < 0.2) break
    if (here.swap / here.all < 2) low = mebibytes
    else high = mebibytes
  }
  const layers = parseStack(`zcache(limit=${half})`, layerFactories)
  const { mebibytes } = found
  const tmem = await seconds(`2009, ${mebibytes} MiB in half, and tmem`, () =>
    runMachine({ ...boot, memoryBytes: half, workloadBytes: mebibytes * mebibyte, layers, drive: drive() }),
  )
  return [
    ratioRow(rows[0], 's', found.swap, `${mebibytes} MiB in all the memory`, found.all),
    ratioRow(rows[1], 's', tmem, `${mebibytes} MiB in all the memory`, found.all, 1.15),
  ]
}
