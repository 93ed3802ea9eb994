/**
 * Guests whose kernel has cleancache: files of an ext4 are read from their drive once, and then from a stack of ours.
 * The kernel is compiled the first time.
 */
import { refuse } from '@tmem/faults'
import { zcache } from '@tmem/zcache'
import { beforeAll, describe, expect, test } from 'vitest'
import { checkTrace, type GuestParts, traceHead } from '../../src/index.ts'
import { booted, preparedParts, right, served, workloadBytes } from './guests.ts'

let parts: GuestParts | string | undefined
beforeAll(async () => {
  parts = await preparedParts(true)
}, 1_800_000)

const enough = [zcache({ limitBytes: 2 ** 28 })]

describe('a guest with cleancache', { timeout: 400_000 }, () => {
  test('reads a file from its drive once, and then from the stack', async (ctx) => {
    const events: Uint8Array[] = [traceHead]
    const guest = booted(ctx, parts, { workload: 'reread', trace: true })
    const done = await served(guest, enough, undefined, { onEvents: (those) => events.push(those.slice()) })
    right(done)
    const [first, ...others] = done.run.passKibibytes
    expect(first).toBeGreaterThan((workloadBytes / 1024) * 0.99)
    // The file system's own blocks are no pages of a file.
    expect(others).toHaveLength(2)
    for (const kibibytes of others) expect(kibibytes).toBeLessThan(1024)
    const { cleancache, module } = done.run
    // In the first pass every page of the file misses.
    const pages = cleancache['failed_gets']!
    expect(pages).toBeGreaterThanOrEqual(workloadBytes / 4096)
    // What was still in the kernel's memory from the pass before needs no get.
    expect(cleancache['succ_gets']).toBeGreaterThan(pages)
    expect(cleancache['succ_gets']).toBeLessThanOrEqual(2 * pages)
    expect(cleancache['puts']).toBeGreaterThan(pages)
    // A put waits in the ring.
    expect(module['bells']).toBeLessThan(cleancache['puts']! + module['gets']!)
    const report = checkTrace(Buffer.concat(events))
    expect(report.contradictions).toEqual([])
    expect(report.kinds).toMatchObject({ cleanPut: cleancache['puts'], cleanFs: 1 })
    expect(report.kinds['cleanGet']).toBe(module['clean_hits']! + module['clean_misses']!)
  })

  test('gets no wrong byte from a stack that refuses and forgets', async (ctx) => {
    const layers = [refuse({ every: 3 }), zcache({ limitBytes: 2 ** 24 })]
    const done = await served(booted(ctx, parts, { workload: 'tar', posted: false }), layers)
    right(done)
    expect(done.run.cleancache['failed_gets']).toBeGreaterThan(0)
  })

  test('swaps through frontswap, too', async (ctx) => {
    const done = await served(booted(ctx, parts), enough)
    right(done)
    expect(done.run).toMatchObject({ swapIns: 0, swapOuts: 0 })
    expect(done.link.counters.puts).toBeGreaterThan(5000)
  })
})
