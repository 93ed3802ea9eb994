/** Guests of tests: booted, served by a stack of this process, and judged. */
import { fileURLToPath } from 'node:url'
import { compose, type Layer, type PageStore } from '@tmem/core'
import { XenHost } from '@tmem/xen-hypercall'
import { expect, onTestFinished, type TestContext } from 'vitest'
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
  PartsError,
  prepareParts,
} from '../../src/index.ts'

const cache = fileURLToPath(new URL('../../../../.cache/kernel-guest', import.meta.url))
const memoryBytes = 96 * 2 ** 20
export const workloadBytes = 110 * 2 ** 20

/** Parts of guests, or what is missing; made before the tests. */
export async function preparedParts(cleancache: boolean): Promise<GuestParts | string> {
  const lacks = lacksForGuests()
  if (lacks !== undefined) return lacks
  try {
    return await prepareParts({ cache, cleancache, compiler: true, onStep: (what) => console.log(what) })
  } catch (error) {
    if (error instanceof PartsError && cleancache) return `a kernel with cleancache: ${error.message}`
    throw error
  }
}

export function booted(
  ctx: TestContext,
  parts: GuestParts | string | undefined,
  more: Partial<BootOptions> = {},
): BootedGuest {
  if (typeof parts !== 'object') ctx.skip(`needs what a guest needs: ${parts}`)
  const stop = new AbortController()
  const guest = bootGuest({ parts, workload: 'hog', memoryBytes, workloadBytes, signal: stop.signal, ...more })
  onTestFinished(async () => {
    stop.abort()
    await guest.ended.catch(() => undefined)
  })
  return guest
}

/** Serves a guest to its end over a stack. */
export async function served(
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

/** What a guest was, and who served it. */
export interface Served {
  readonly run: BootedRun
  readonly link: { readonly counters: AttachedGuest['counters'] }
}

/** The workload was right, and the kernel, the module and the host have counted the same. */
export function right({ run, link }: Served): void {
  expect(run).toMatchObject({ exit: 0 })
  expect(run.console).toMatch(/^\d+ (pages|passes|files|parts), 0 wrong$/m)
  const { module, frontswap: kernel } = run
  const { pools, puts, gets, page_flushes, object_flushes } = link.counters
  expect({ pools, puts, gets, page_flushes, object_flushes }).toEqual({
    pools: module['pools'],
    puts: module['puts'],
    gets: module['gets'],
    page_flushes: module['page_flushes'],
    object_flushes: module['object_flushes'],
  })
  const clean = { puts: module['clean_puts']!, hits: module['clean_hits']!, misses: module['clean_misses']! }
  expect(kernel['succ_stores']! + kernel['failed_stores']!).toBe(puts - clean.puts + module['declined']!)
  expect(kernel['failed_stores']).toBe(module['refused']! + module['declined']!)
  expect(kernel['loads']).toBe(gets - clean.hits - clean.misses - module['again']!)
  // The kernel does not count the invalidation of a page that is stored again.
  const cleanFlushes = module['clean_page_flushes']!
  expect(page_flushes - cleanFlushes).toBeGreaterThanOrEqual(kernel['invalidates']!)
  if (run.cleancache['puts'] !== undefined)
    expect(run.cleancache).toEqual({
      puts: clean.puts,
      succ_gets: clean.hits,
      failed_gets: clean.misses,
      invalidates: cleanFlushes,
    })
}
