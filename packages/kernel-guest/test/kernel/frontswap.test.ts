/**
 * Real guests: Debian's 5.10 kernel swaps through its frontswap hooks and our module into stacks of ours. Every workload
 * verifies what it reads.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { compose, type Layer, type PageStore } from '@tmem/core'
import { refuse } from '@tmem/faults'
import { frontswap } from '@tmem/frontswap'
import { XenHost } from '@tmem/xen-hypercall'
import { zcache } from '@tmem/zcache'
import { afterEach, beforeAll, describe, expect, onTestFinished, type TestContext, test } from 'vitest'
import {
  type AttachedGuest,
  type AttachOptions,
  attachGuest,
  type BootedGuest,
  type BootedRun,
  type BootOptions,
  bootGuest,
  type GuestParts,
  lacksForGuests,
  prepareParts,
} from '../../src/index.ts'

const cache = fileURLToPath(new URL('../../../../.cache/kernel-guest', import.meta.url))
const memoryBytes = 96 * 2 ** 20
const workloadBytes = '110MiB'
let parts: GuestParts | undefined
let lacks: string | undefined

beforeAll(async () => {
  lacks = lacksForGuests()
  if (lacks === undefined) parts = await prepareParts({ cache, onStep: (what) => console.log(what) })
}, 600_000)

const children = new Set<ChildProcess>()
afterEach(() => {
  for (const child of children) child.kill('SIGKILL')
  children.clear()
})

function temporary(): string {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-test-'))
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

function booted(ctx: TestContext, more: Partial<BootOptions> = {}): BootedGuest {
  if (parts === undefined) ctx.skip(`needs what a guest needs: ${lacks}`)
  const stop = new AbortController()
  const guest = bootGuest({ parts, workload: 'hog', memoryBytes, workloadBytes, signal: stop.signal, ...more })
  onTestFinished(async () => {
    stop.abort()
    await guest.ended.catch(() => undefined)
  })
  return guest
}

/** Serves a guest to its end over a stack. */
async function served(
  guest: BootedGuest,
  layers: readonly Layer[],
  meanwhile: (link: AttachedGuest) => Promise<void> = async () => undefined,
  more: Partial<AttachOptions> = {},
): Promise<{ run: BootedRun; link: AttachedGuest }> {
  const store: PageStore = compose(layers)
  const host = new XenHost({ store })
  const ticks = setIntervalOf(() => store.tick({ pages: 1024 }))
  try {
    const place = { memory: guest.memory, doorbell: guest.doorbell, signal: AbortSignal.timeout(20_000) }
    const link = await attachGuest({ host, domain: 1, ...place, ...more })
    const [run] = await Promise.all([guest.ended, meanwhile(link), link.ended])
    return { run, link }
  } finally {
    clearInterval(ticks)
    host.close()
    await store.close()
  }
}

const setIntervalOf = (act: () => void): NodeJS.Timeout => globalThis.setInterval(act, 20)

/** The workload was right, and the kernel, the module and the host have counted the same. */
function right({ run, link }: { run: BootedRun; link: AttachedGuest }): void {
  expect(run).toMatchObject({ exit: 0 })
  expect(run.console).toMatch(/^\d+ (pages|passes), 0 wrong$/m)
  const { module, frontswap: kernel } = run
  const { pools, puts, gets, page_flushes, object_flushes } = link.counters
  expect({ pools, puts, gets, page_flushes, object_flushes }).toEqual({
    pools: module['pools'],
    puts: module['puts'],
    gets: module['gets'],
    page_flushes: module['page_flushes'],
    object_flushes: module['object_flushes'],
  })
  expect(kernel['succ_stores']! + kernel['failed_stores']!).toBe(puts + module['declined']!)
  expect(kernel['failed_stores']).toBe(module['refused']! + module['declined']!)
  expect(kernel['loads']).toBe(gets - module['again']!)
  // The kernel does not count the invalidation of a page that is stored again.
  expect(page_flushes).toBeGreaterThanOrEqual(kernel['invalidates']!)
}

const enough = [zcache({ limitBytes: 2 ** 28 })]

describe('a guest', { timeout: 400_000 }, () => {
  test('swaps a hog into a stack, and nothing to its disk', async (ctx) => {
    const guest = booted(ctx)
    const done = await served(guest, enough)
    right(done)
    expect(existsSync(dirname(guest.memory))).toBe(false)
    expect(done.run).toMatchObject({ swapIns: 0, swapOuts: 0 })
    expect(done.link.counters.puts).toBeGreaterThan(5000)
    expect(done.link.counters.gets).toBeGreaterThan(5000)
    // Flushes are in the ring already when the next call rings.
    expect(done.run.module['bells']).toBeLessThan(done.link.counters.puts + done.link.counters.gets)
  })

  test('swaps a file of a tmpfs, and reads it again and again', async (ctx) => {
    const done = await served(booted(ctx, { workload: 'reread' }), enough)
    right(done)
    expect(done.run).toMatchObject({ swapIns: 0, swapOuts: 0 })
    expect(done.link.counters.gets).toBeGreaterThan(5000)
  })

  test('waits for pages that have sunk to a file', async (ctx) => {
    const file = join(temporary(), 'swap.img')
    const layers = [zcache({ limitBytes: 2 ** 23 }), frontswap({ file, sizeBytes: 2 ** 28 })]
    const done = await served(booted(ctx), layers)
    right(done)
    expect(done.run).toMatchObject({ swapIns: 0, swapOuts: 0 })
    expect(done.link.counters.waited).toBeGreaterThan(1000)
  })

  test('asks for each flush when they are not posted', async (ctx) => {
    const done = await served(booted(ctx, { posted: false }), enough, undefined, { lookMicroseconds: 0 })
    right(done)
    const { puts, gets, page_flushes } = done.link.counters
    expect(done.run.module['bells']).toBeGreaterThan((puts + gets + page_flushes) / 2)
  })

  test('writes to its disk what is refused', async (ctx) => {
    const done = await served(booted(ctx), [refuse({ every: 3 }), ...enough])
    right(done)
    const { puts } = done.link.counters
    expect(done.run.module['refused']).toBe(Math.floor(puts / 3))
    expect(done.run.swapOuts).toBe(done.run.module['refused'])
    expect(done.run.swapIns).toBeGreaterThan(0)
  })

  test('stands still while the host is slow, and loses nothing', async (ctx) => {
    let pauses = 0
    const done = await served(booted(ctx), enough, async (link) => {
      for (const puts of [2000, 6000]) {
        while (link.counters.puts < puts) await setTimeout(20)
        const goOn = await link.pause()
        const { puts: before } = link.counters
        await setTimeout(3000)
        expect(link.counters.puts).toBe(before)
        goOn()
        pauses++
      }
    })
    right(done)
    expect(pauses).toBe(2)
  })
})

/** A host in another process. */
interface Process {
  readonly child: ChildProcess
  /** Pages that it began with. */
  readonly restored: number
  /** What it counted last. */
  counters(): { readonly puts: number; readonly gets: number }
}

async function hostProcess(guest: BootedGuest, saved?: string): Promise<Process> {
  const script = fileURLToPath(new URL('host-process.mjs', import.meta.url))
  const words = [script, guest.memory, guest.doorbell, ...(saved === undefined ? [] : [saved])]
  const child = spawn(process.execPath, words, { stdio: ['ignore', 'pipe', 'inherit'] })
  children.add(child)
  let counters = { puts: 0, gets: 0 }
  const lines = createInterface(child.stdout)
  const first = await new Promise<string>((resolve, reject) => {
    lines.once('line', resolve)
    child.once('exit', (code) => reject(new Error(`the host ended with ${code}`)))
  })
  lines.on('line', (line) => {
    counters = JSON.parse(line)
  })
  return { child, restored: JSON.parse(first).restored, counters: () => counters }
}

async function killed({ child }: Process): Promise<void> {
  const ended = new Promise((resolve) => child.once('exit', resolve))
  child.kill('SIGKILL')
  await ended
  children.delete(child)
}

async function untilGets(host: Process, gets: number): Promise<void> {
  while (host.counters().gets < gets) await setTimeout(20)
}

describe('a guest whose host is killed', { timeout: 400_000 }, () => {
  test('goes on with the next one, which has its pages from a file', async (ctx) => {
    const guest = booted(ctx)
    const saved = join(temporary(), 'saved')
    let host = await hostProcess(guest, saved)
    expect(host.restored).toBe(0)
    for (const gets of [3000, 1000]) {
      await untilGets(host, gets)
      await killed(host)
      await setTimeout(500)
      host = await hostProcess(guest, saved)
      expect(host.restored).toBeGreaterThan(1000)
    }
    const run = await guest.ended
    expect(run).toMatchObject({ exit: 0, swapIns: 0, swapOuts: 0 })
    expect(run.console).toMatch(/^\d+ pages, 0 wrong$/m)
    expect(run.module['refused']).toBe(0)
  })

  test('stops, and says which page is lost, where the next one has none', async (ctx) => {
    const guest = booted(ctx, { patienceMs: 2000 })
    const host = await hostProcess(guest)
    await untilGets(host, 1000)
    await killed(host)
    await hostProcess(guest)
    const run = await guest.ended
    expect(run.exit).toBe('died')
    expect(run.console).toMatch(
      /Kernel panic - not syncing: tmem_guest: the host has lost the page at offset \d+ of swap area 0 \(it answers -19\)/,
    )
    expect(run.console).not.toContain('wrong')
  })

  test('stops, and says so, where nobody comes', async (ctx) => {
    const guest = booted(ctx, { patienceMs: 2000 })
    const host = await hostProcess(guest)
    await untilGets(host, 1000)
    await killed(host)
    const run = await guest.ended
    expect(run.exit).toBe('died')
    expect(run.console).toContain('Kernel panic - not syncing: tmem_guest: no answer from the host for 2000 ms')
  })
})
