/**
 * Another kernel than this host's swaps to `tmem serve`: a guest of QEMU with 128 MiB, in which a program uses 200 MiB
 * and verifies them, over NBD on a unix socket. What runs is the same as in `tmem bench nbd`, in all tests but the
 * first with half as many pages, of which the same share has no room.
 */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import type { StatsNode } from '@tmem/core'
import { driveWords, type GuestDrive } from '@tmem/guest'
import { describe, expect, onTestFinished, type TestContext, test } from 'vitest'
import { RealServer, serverCommand } from '../../../../packages/ramster/test/server.ts'
import { requires } from '../../../../tools/requires.ts'
import { createBench } from '../../src/bench/frame.ts'
import {
  fullSize,
  type GuestSize,
  guestRows,
  reconnectSeconds,
  type SwapRun,
  type SwapServer,
  serveSwap,
  swappingGuest,
  swapScript,
} from '../../src/bench/guest.ts'
import { Interrupted } from '../../src/ending.ts'
import { silentTerminal } from '../tmem.ts'

const half: GuestSize = { memory: 96, hog: 112 }
const slots = 65536

/** What runs the guest; it ends with the test, whatever comes of that. */
function guest(ctx: TestContext, rounds = 1, size = half): (drive: GuestDrive) => Promise<SwapRun> {
  requires(ctx, {
    commands: ['qemu-system-x86_64', 'setpriv', 'cc'],
    packages: ['linux-image-cloud-amd64', 'busybox-static'],
  })
  const run = swappingGuest(rounds, size)
  if (typeof run === 'string') ctx.skip(run)
  const controller = new AbortController()
  onTestFinished(() => controller.abort())
  return (drive) => run(drive, controller.signal)
}

function temporary(): string {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-test-guest-'))
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

async function serving(...words: Parameters<typeof serveSwap>): Promise<SwapServer> {
  const server = await serveSwap(...words)
  onTestFinished(async () => {
    server.child.kill('SIGKILL')
    await server.ended
  })
  return server
}

interface Figures {
  readonly device: Record<string, number>
  readonly slots: Record<string, number>
}

async function figures(server: SwapServer): Promise<Figures> {
  const [device] = (await server.stats()).devices
  const child = (device as StatsNode).children!.find(({ name }) => name === 'slots')!
  return { device: device!.counters, slots: child.counters } as unknown as Figures
}

/** What a guest says in which every byte was right. */
const rightBytes = ({ hog }: GuestSize): object => ({
  exit: 0,
  console: expect.stringContaining(`${hog * 256} pages, 0 wrong\n`),
})

/**
 * Every byte was right, a good part of the pages went out and came back more than once, and the server's statistics add
 * up.
 */
function right(ran: SwapRun, { device, slots: of }: Figures, size = half): void {
  expect(ran).toMatchObject(rightBytes(size))
  expect(Math.min(ran.swapIns, ran.swapOuts)).toBeGreaterThan(size.hog * 250)
  expect(device).toMatchObject({ disksize: slots * 4096, failed_reads: 0, failed_writes: 0, invalid_io: 0 })
  const used = of['same_filled']! + of['compressed']! + of['backing']!
  expect(used + of['empty']!).toBe(slots)
  expect(of['stored']).toBe(used + of['overwritten']! + of['freed']!)
}

test('the README says of a drive what QEMU gets here', () => {
  const readme = readFileSync(new URL('../../README.md', import.meta.url), 'utf8')
  const drive = { socket: '/run/swap0.sock', exportName: 'swap0', reconnectSeconds }
  const [option, node, device, model] = driveWords(drive, 0)
  expect(readme).toContain(`  ${option} '${node}' \\\n  ${device} ${model}\n`)
  const inGuest = /In the guest:\n\n```sh\n(.*?)```/s.exec(readme)![1]!
  expect(swapScript).toContain(inGuest)
})

describe('a guest that swaps to us', { timeout: 600_000 }, () => {
  test('gets back every byte, and the statistics add up', async (ctx) => {
    const run = guest(ctx, 2, fullSize)
    const server = await serving(temporary(), 'limit=128MiB,zvMaxZsize=2048')
    const ran = await run(server.drive)
    const found = await figures(server)
    right(ran, found, fullSize)
    expect(found.device['num_writes']).toBeGreaterThanOrEqual(ran.swapOuts)
    expect(found.device['num_reads']).toBeGreaterThanOrEqual(ran.swapIns)
    // Of 16 pages the one of noise went to the file; what the guest's kernel has freed it has discarded.
    expect(found.device['bdev_num_writes']).toBeGreaterThan(ran.swapOuts / 32)
    expect(found.device['bdev_num_writes']).toBeLessThan(ran.swapOuts / 8)
    expect(found.slots['freed']).toBeGreaterThan(10_000)
    server.child.kill('SIGTERM')
    expect(await server.ended).toEqual({ code: 0, notes: '' })
  })

  test('with so little memory that most pages go to the file', async (ctx) => {
    const run = guest(ctx)
    const server = await serving(temporary(), 'limit=4MiB,zvMaxZsize=2048')
    const ran = await run(server.drive)
    const found = await figures(server)
    right(ran, found)
    expect(found.device['bdev_num_writes']).toBeGreaterThan(ran.swapOuts / 2)
    expect(found.device['bdev_num_reads']).toBeGreaterThan(ran.swapIns / 2)
  })

  test('over the memory of other machines, one of which dies in the middle', async (ctx) => {
    requires(ctx, { commands: [serverCommand] })
    const run = guest(ctx)
    const [a, b] = [await RealServer.start(), await RealServer.start()]
    for (const one of [a, b]) onTestFinished(() => one.stop())
    const between = ` > ramster(valkey=127.0.0.1:${a.port},valkey2=127.0.0.1:${b.port},size=256MiB)`
    const server = await serving(temporary(), 'limit=8MiB,zvMaxZsize=2048', '', between)
    const ramster = async (): Promise<Record<string, number>> => {
      const all: StatsNode[] = [...(await server.stats()).devices]
      for (const node of all) {
        if (node.name === 'ramster' && 'degraded' in node.counters) return node.counters
        all.push(...node.children)
      }
      throw new Error('ramster has no statistics')
    }
    let over = false
    const running = run(server.drive).finally(() => {
      over = true
    })
    while ((await ramster())['remote_pers_pages_succ_get']! < 2000) {
      expect(over).toBe(false)
      await setTimeout(100)
    }
    await a.kill()
    const ran = await running
    expect(ran).toMatchObject(rightBytes(half))
    expect(Math.min(ran.swapIns, ran.swapOuts)).toBeGreaterThan(5000)
    expect(await ramster()).toMatchObject({ degraded: 1, lost: 0 })
  })

  test('goes on when the server is killed and another one takes its place', async (ctx) => {
    const run = guest(ctx)
    const folder = temporary()
    const start = (): Promise<SwapServer> =>
      serving(folder, 'limit=128MiB,zvMaxZsize=2048', `,snapshot=${folder}/swap0.raw,writethrough`)
    let server = await start()
    let over = false
    const running = run(server.drive).finally(() => {
      over = true
    })
    for (const kills of [1, 2]) {
      // Each time in the middle of what it does: pages have gone out, and come back.
      for (let found = await figures(server); found.device['num_reads']! < 8000; found = await figures(server)) {
        expect({ kills, over }).toEqual({ kills, over: false })
        await setTimeout(100)
      }
      server.child.kill('SIGKILL')
      await server.ended
      server = await start()
    }
    const ran = await running
    const found = await figures(server)
    right(ran, found)
    expect(found.device['num_reads']).toBeGreaterThan(1000)
  })
})

describe('the rows of the bench', { timeout: 600_000 }, () => {
  const inMemory = (): string[] =>
    readdirSync('/dev/shm').filter((name) => name.startsWith(`tmem-bench-guest-${process.pid}-`))

  test('are measured, and nothing is left', async (ctx) => {
    guest(ctx)
    requires(ctx, { commands: ['nbdkit'], paths: ['/dev/shm'] })
    const rows = await guestRows(createBench(silentTerminal(), true), half)
    const seconds = { unit: 's', value: expect.any(Number), reference_value: expect.any(Number) }
    expect(rows).toEqual([
      expect.objectContaining({ name: 'guest-swap', reference: 'raw file on tmpfs', goal: 1.05, ...seconds }),
      expect.objectContaining({ name: 'guest-swap-nbdkit', reference: 'nbdkit memory', ...seconds }),
    ])
    expect(inMemory()).toEqual([])
  })

  test('end when they are interrupted, and nothing is left', async (ctx) => {
    guest(ctx)
    requires(ctx, { paths: ['/dev/shm'] })
    const controller = new AbortController()
    const rows = guestRows(createBench(silentTerminal(controller.signal), true), half)
    while (inMemory().length === 0) await setTimeout(50)
    await setTimeout(1000)
    controller.abort()
    await expect(rows).rejects.toThrow(Interrupted)
    expect(inMemory()).toEqual([])
  })
})
