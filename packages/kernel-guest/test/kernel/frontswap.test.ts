/**
 * Real guests: Debian's 5.10 kernel swaps through its frontswap hooks and our module into stacks of ours. Every
 * workload verifies what it reads.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { connect, createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { compose } from '@tmem/core'
import { refuse } from '@tmem/faults'
import { frontswap } from '@tmem/frontswap'
import { XenHost } from '@tmem/xen-hypercall'
import { zcache } from '@tmem/zcache'
import { afterEach, beforeAll, describe, expect, onTestFinished, test } from 'vitest'
import { type AttachedGuest, attachGuest, type BootedGuest, type GuestParts } from '../../src/index.ts'
import { booted, preparedParts, right, served } from './guests.ts'

let parts: GuestParts | string | undefined
beforeAll(async () => {
  parts = await preparedParts(false)
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

const enough = [zcache({ limitBytes: 2 ** 28 })]

describe('a guest', { timeout: 400_000 }, () => {
  test('swaps a hog into a stack, and nothing to its disk', async (ctx) => {
    const guest = booted(ctx, parts)
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
    const done = await served(booted(ctx, parts, { workload: 'reread' }), enough)
    right(done)
    expect(done.run).toMatchObject({ swapIns: 0, swapOuts: 0 })
    expect(done.link.counters.gets).toBeGreaterThan(5000)
  })

  test('packs and unpacks files of a tmpfs', async (ctx) => {
    const done = await served(booted(ctx, parts, { workload: 'tar' }), enough)
    right(done)
    expect(done.run).toMatchObject({ swapIns: 0, swapOuts: 0 })
    expect(done.link.counters.gets).toBeGreaterThan(2000)
  })

  test('compiles a program whose parts are in a tmpfs, and runs it', async (ctx) => {
    const done = await served(booted(ctx, parts, { workload: 'compile' }), enough)
    right(done)
    expect(done.run).toMatchObject({ swapIns: 0, swapOuts: 0 })
    expect(done.link.counters.gets).toBeGreaterThan(1000)
  })

  test('waits for pages that have sunk to a file', async (ctx) => {
    const file = join(temporary(), 'swap.img')
    const layers = [zcache({ limitBytes: 2 ** 23 }), frontswap({ file, sizeBytes: 2 ** 28 })]
    const done = await served(booted(ctx, parts), layers)
    right(done)
    expect(done.run).toMatchObject({ swapIns: 0, swapOuts: 0 })
    expect(done.link.counters.waited).toBeGreaterThan(1000)
  })

  test('asks for each flush when they are not posted', async (ctx) => {
    const done = await served(booted(ctx, parts, { posted: false }), enough, undefined, { lookMicroseconds: 0 })
    right(done)
    const { puts, gets, page_flushes } = done.link.counters
    expect(done.run.module['bells']).toBeGreaterThan((puts + gets + page_flushes) / 2)
  })

  test('writes to its disk what is refused', async (ctx) => {
    const done = await served(booted(ctx, parts), [refuse({ every: 3 }), ...enough])
    right(done)
    const { puts } = done.link.counters
    expect(done.run.module['refused']).toBe(Math.floor(puts / 3))
    expect(done.run.swapOuts).toBe(done.run.module['refused'])
    expect(done.run.swapIns).toBeGreaterThan(0)
  })

  test('stands still while the host is slow, and loses nothing', async (ctx) => {
    let pauses = 0
    const done = await served(booted(ctx, parts), enough, async (link) => {
      for (const puts of [2000, 6000]) {
        while (link.counters.puts < puts) await setTimeout(20)
        const goOn = await link.pause()
        const { puts: before } = link.counters
        await setTimeout(1000)
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
    const guest = booted(ctx, parts)
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
    const guest = booted(ctx, parts, { patienceMs: 2000 })
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
    const guest = booted(ctx, parts, { patienceMs: 2000 })
    const host = await hostProcess(guest)
    await untilGets(host, 1000)
    await killed(host)
    const run = await guest.ended
    expect(run.exit).toBe('died')
    expect(run.console).toContain('Kernel panic - not syncing: tmem_guest: no answer from the host for 2000 ms')
  })
})

/** A doorbell between a guest and its host that can be cut. */
async function relay(doorbell: string): Promise<{ path: string; cut: () => void }> {
  const path = join(temporary(), 'doorbell')
  const sockets = new Set<Socket>()
  const server = createServer((near) => {
    const far = connect(doorbell)
    for (const [from, to] of [
      [near, far],
      [far, near],
    ] as const) {
      sockets.add(from)
      from.pipe(to)
      from.on('error', () => to.destroy())
      from.on('close', () => to.destroy())
    }
  })
  server.listen(path)
  await once(server, 'listening')
  const cut = (): void => {
    for (const socket of sockets) socket.destroy()
    sockets.clear()
  }
  onTestFinished(() => {
    cut()
    server.close()
  })
  return { path, cut }
}

describe('a guest whose link is cut', { timeout: 400_000 }, () => {
  test('waits, and goes on when there is another one', async (ctx) => {
    const guest = booted(ctx, parts)
    const store = compose(enough)
    const host = new XenHost({ store })
    try {
      const { path, cut } = await relay(guest.doorbell)
      const place = { host, domain: 1, memory: guest.memory }
      const links: AttachedGuest[] = []
      for (const gets of [2000, 2000]) {
        const link = await attached({ ...place, doorbell: path }, guest)
        links.push(link)
        while (link.counters.gets < gets) await setTimeout(20)
        cut()
        await link.ended
        const { gets: before } = link.counters
        await setTimeout(1000)
        expect(link.counters.gets).toBe(before)
      }
      links.push(await attached({ ...place, doorbell: path }, guest))
      const run = await guest.ended
      expect(run).toMatchObject({ exit: 0, swapIns: 0, swapOuts: 0 })
      const names = ['pools', 'puts', 'gets', 'page_flushes', 'object_flushes'] as const
      const sums = Object.fromEntries(
        names.map((name) => [name, links.reduce((sum, { counters }) => sum + counters[name], 0)]),
      )
      expect(run.module).toMatchObject({ ...sums, again: 0 })
    } finally {
      host.close()
      await store.close()
    }
  })

  test('stops, and says so, when none comes', async (ctx) => {
    const guest = booted(ctx, parts, { patienceMs: 2000 })
    const { path, cut } = await relay(guest.doorbell)
    const meanwhile = async (link: AttachedGuest): Promise<void> => {
      while (link.counters.gets < 1000) await setTimeout(20)
      cut()
    }
    await waitFor(guest.doorbell, guest)
    const { run } = await served({ ...guest, doorbell: path }, enough, meanwhile)
    expect(run.exit).toBe('died')
    expect(run.console).toContain('Kernel panic - not syncing: tmem_guest: no answer from the host for 2000 ms')
  })
})

/** The relay takes connections before the guest does. */
async function waitFor(doorbell: string, guest: BootedGuest): Promise<void> {
  const over = guest.ended.then((run) => Promise.reject(new Error(`the guest ended with ${run.exit}: ${run.console}`)))
  over.catch(() => undefined)
  while (!existsSync(doorbell)) await Promise.race([setTimeout(20), over])
}

async function attached(options: Parameters<typeof attachGuest>[0], guest: BootedGuest): Promise<AttachedGuest> {
  await waitFor(guest.doorbell, guest)
  return attachGuest(options)
}
