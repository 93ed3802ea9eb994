/**
 * The paging itself runs in processes of its own (`scenarios.mjs`, from the built package, since worker threads cannot
 * load TypeScript): a thread that waits for a page for ever can only be ended from outside.
 */
import { execFile } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { beforeAll, describe, expect, test, vi } from 'vitest'
import { requires } from '../../../tools/requires.ts'

const packageFolder = fileURLToPath(new URL('../', import.meta.url))
/** A child that has not answered by then is ended, and its test fails. */
const patience = 60_000
vi.setConfig({ testTimeout: patience + 5000 })
const userfaultfd = { root: true, paths: ['/dev/userfaultfd'] }

type Counters = Readonly<Record<string, number>>

interface Ended {
  readonly code: number | string | null
  readonly stdout: string
  readonly stderr: string
}

/**
 * Runs Node, without background compilation: Node 20 aborts, seldom, when any worker ends while a function of it is
 * being compiled (`(data.first) != nullptr` in node_platform.cc), which happens to processes that end as soon as these.
 */
function node(flags: readonly string[], input = ''): Promise<Ended> {
  return new Promise((resolve) => {
    const options = { cwd: packageFolder, timeout: patience, killSignal: 'SIGKILL' as const, encoding: 'utf8' as const }
    const child = execFile(
      process.execPath,
      ['--no-concurrent-recompilation', ...flags],
      options,
      (error, stdout, stderr) => {
        const code = error === null ? 0 : (error.code ?? error.signal ?? null)
        resolve({ code, stdout, stderr })
      },
    )
    child.stdin?.end(input)
  })
}

/** Runs a scenario that is to end well; its answer. */
async function scenario<T = unknown>(name: string, argument = '', flags: readonly string[] = []): Promise<T> {
  const { code, stdout, stderr } = await node([...flags, 'test/scenarios.mjs', name, argument])
  if (code !== 0) throw new Error(`scenario ${name} ended with ${code}: ${stderr}${stdout}`)
  return JSON.parse(stdout)
}

/** A folder on a disk, where the swap file has to wait for its reads. */
async function inFolder<T>(use: (folder: string) => Promise<T>): Promise<T> {
  const folder = mkdtempSync(join(tmpdir(), 'userfault-'))
  try {
    return await use(folder)
  } finally {
    rmSync(folder, { recursive: true })
  }
}

beforeAll(() => {
  const source = new URL('../src/', import.meta.url)
  const newest = Math.max(...readdirSync(source).map((file) => statSync(new URL(file, source)).mtimeMs))
  const built = statSync(new URL('../dist/.tsbuildinfo', import.meta.url), { throwIfNoEntry: false })?.mtimeMs
  if (built === undefined || built < newest)
    throw new Error('the scenarios run what was built, which is older than the sources: npm run build')
})

describe('pages come and go', () => {
  test('a region 8 times its limit: random reads and writes, every byte verified, the limit kept', async (ctx) => {
    requires(ctx, userfaultfd)
    const { wrong, written, mostKiB, stats, after } = await scenario<{
      wrong: number
      written: number
      mostKiB: number
      stats: { counters: Counters; children: [{ counters: Counters }] }
      after: number
    }>('pages')
    expect({ wrong, written, after }).toEqual({ wrong: 0, written: 65536, after: 0 })
    const { counters, children } = stats
    // As the kernel counts it, not as we do.
    expect(mostKiB).toBeLessThanOrEqual(32 * 1024)
    expect(mostKiB).toBeGreaterThan(31 * 1024)
    expect(counters.residentMax).toBeLessThanOrEqual(counters.limit)
    expect(counters.evictions).toBeGreaterThan(100_000)
    // What must add up.
    expect(counters.evictions).toBe(counters.cleanDrops + counters.stores)
    expect(counters.zeroFills + counters.loads).toBe(counters.resident + counters.evictions)
    expect(counters.missingFaults).toBeGreaterThanOrEqual(counters.zeroFills + counters.loads)
    expect(counters.limitExceeded).toBe(0)
    const below = children[0].counters
    expect(below.stored).toBe(counters.stores)
    expect(below.hits).toBe(counters.loads)
    expect(below.pages).toBe(below.stored - below.flushed)
  })

  test('no store of two threads is lost while pages are evicted under it', async (ctx) => {
    requires(ctx, userfaultfd)
    const { wrong, wrongThere, writeFaults, stores } = await scenario<Counters>('increments')
    expect({ wrong, wrongThere }).toEqual({ wrong: 0, wrongThere: 0 })
    expect(writeFaults).toBeGreaterThan(1000)
    expect(stores).toBeGreaterThan(1000)
  })

  test('a clean page is never compressed again; the first store to it makes its copy invalid', async (ctx) => {
    requires(ctx, userfaultfd)
    const { wrong, count, before, read, written } = await scenario<{
      wrong: number
      count: number
      before: Counters
      read: Counters
      written: Counters
    }>('clean')
    expect(wrong).toBe(0)
    expect(before.stores).toBe(count)
    // Three passes in which every page was evicted and none was written.
    expect(read.evictions - before.evictions).toBe(3 * count)
    expect(read.stores).toBe(before.stores)
    expect([read.stored, read.encoded]).toEqual([before.stored, before.encoded])
    expect(read.live).toBe(count)
    expect(written.writeFaults - read.writeFaults).toBe(count)
    expect(written.stored).toBe(written.stores)
    expect(written.live).toBe(count - written.dirty)
  })

  test('faults of system calls, of native code and of the pool of threads are answered, too', async (ctx) => {
    requires(ctx, userfaultfd)
    const bytes = 128 * 4096
    expect(await inFolder((folder) => scenario('native', folder))).toEqual({
      hash: true,
      write: true,
      compare: true,
      zip: true,
      readBytes: bytes,
      read: true,
      poolBytes: bytes,
      pool: true,
      random: true,
      wrong: 0,
    })
  })

  test('garbage collection under pressure in both threads', async (ctx) => {
    requires(ctx, userfaultfd)
    const { wrong, evictions } = await scenario<Counters>('garbage', '', ['--expose-gc', '--max-semi-space-size=1'])
    expect(wrong).toBe(0)
    expect(evictions).toBeGreaterThan(5000)
  })

  test('child processes are started meanwhile', async (ctx) => {
    requires(ctx, userfaultfd)
    const eight = <T>(value: T): T[] => new Array<T>(8).fill(value)
    expect(await scenario('children')).toEqual({ wrong: 0, said: eight('42'), codes: eight(0) })
  })

  test('two buffers, two pagers', async (ctx) => {
    requires(ctx, userfaultfd)
    expect(await scenario('two')).toEqual({ wrong: 0 })
  })

  test('in a worker thread, closed or not before it ends', async (ctx) => {
    requires(ctx, userfaultfd)
    for (const end of ['close', 'leave']) {
      const { wrong, evictions, code } = await scenario<Counters>('worker', end)
      expect({ end, wrong, code }).toEqual({ end, wrong: 0, code: 0 })
      expect(evictions).toBeGreaterThan(500)
    }
  })

  test('both threads stay on one processor while that is asked for', async (ctx) => {
    requires(ctx, userfaultfd)
    const { before, during, after } = await scenario<Record<'before' | 'during' | 'after', string>>('cpu')
    expect({ during, after }).toEqual({ during: '0', after: before })
  })
})

describe('a store that refuses', () => {
  test('for good: pages stay, nothing is lost, the limit is reported as exceeded', async (ctx) => {
    requires(ctx, userfaultfd)
    const { wrong, stats, trimmed, kib } = await scenario<{
      wrong: number
      stats: Counters
      trimmed: number
      kib: number
    }>('refused')
    expect({ wrong, trimmed }).toEqual({ wrong: 0, trimmed: 0 })
    expect(stats.exceededPages).toBe(stats.resident - stats.limit)
    expect(stats.exceededPages).toBeGreaterThan(1000)
    expect(stats.limitExceeded).toBeGreaterThan(1000)
    expect(stats.refusedNoMemory).toBeGreaterThan(1000)
    expect(kib).toBe(stats.resident * 4)
  })

  test('for a while: the limit is kept again afterwards', async (ctx) => {
    requires(ctx, userfaultfd)
    const { wrong, most, stats } = await scenario<{ wrong: number; most: number; stats: Counters }>('moody')
    expect(wrong).toBe(0)
    expect(most).toBeGreaterThan(100)
    expect(stats.refusedPolicy).toBe(2900)
    expect(stats.exceededPages).toBe(0)
    expect(stats.resident).toBeLessThanOrEqual(stats.limit)
  })
})

test('a transfer is refused, or where Node cannot refuse it, is a copy that is right, and takes nothing away', async (ctx) => {
  requires(ctx, userfaultfd)
  const { clone, post, left, wrong } = await scenario<Readonly<Record<string, unknown>>>('transfer')
  const refuses = Number(process.versions.node.split('.')[0]) >= 21
  expect([clone, post]).toEqual(refuses ? ['DataCloneError', 'DataCloneError'] : ['copied', 'copied'])
  expect([left, wrong]).toEqual([2 ** 20, 0])
})

test('trim gives back what it says', async (ctx) => {
  requires(ctx, userfaultfd)
  const { stats, ...numbers } = await scenario<{ stats: Counters }>('trim')
  const [some, rest] = [100 * 4096, 900 * 4096]
  expect(numbers).toEqual({ wrong: 0, some, nothing: 0, rest, before: 4000, afterSome: 3600, after: 0 })
  expect(stats).toMatchObject({ trimmed: 1000, resident: 0, stores: 1000 })
})

interface Deferred {
  readonly wrong: number
  readonly unread: number
  readonly stats: Counters
  /** Of the swap file of the stack. */
  readonly moves?: Counters
}

describe('pages for which the store has to wait', () => {
  test('many threads wait at once, for a layer that lives on the event loop', async (ctx) => {
    requires(ctx, userfaultfd)
    const { wrong, unread, stats } = await inFolder((folder) =>
      scenario<Deferred>('deferred', `slow(delay=1)|${folder}`),
    )
    expect({ wrong, unread }).toEqual({ wrong: 0, unread: 0 })
    expect(stats.deferredLoads).toBeGreaterThan(2000)
  })

  test("a swap file, while every thread of the runtime's pool waits for a page of it", async (ctx) => {
    requires(ctx, userfaultfd)
    const { wrong, unread, stats } = await inFolder((folder) =>
      scenario<Deferred>('deferred', `frontswap(file=${join(folder, 'swap.img')},size=8MiB)|${folder}`),
    )
    expect({ wrong, unread }).toEqual({ wrong: 0, unread: 0 })
    expect(stats.deferredLoads).toBeGreaterThan(2000)
  })

  test('cold pages go from zcache to a swap file when the stack asks for it, between faults', async (ctx) => {
    requires(ctx, userfaultfd)
    const { wrong, unread, stats, moves } = await inFolder((folder) =>
      scenario<Deferred>(
        'deferred',
        `zcache(limit=512KiB) > frontswap(file=${join(folder, 'swap.img')},size=8MiB)|${folder}`,
      ),
    )
    expect({ wrong, unread }).toEqual({ wrong: 0, unread: 0 })
    expect(stats.deferredLoads).toBeGreaterThan(100)
    const { flights, forced_flights, frames, reads } = moves!
    expect(flights! - forced_flights!).toBeGreaterThan(0)
    expect(frames).toBeGreaterThan(500)
    expect(reads).toBeGreaterThan(100)
  })
})

describe('the end', () => {
  test('closed while other threads use it: they go on, with zeros', async (ctx) => {
    requires(ctx, userfaultfd)
    for (const stack of ['zcache(limit=16MiB)', 'slow(delay=1)'])
      expect(await scenario('close', stack)).toMatchObject({ errors: ['TMEM_CLOSED', 'TMEM_CLOSED'] })
  })

  test('a stack that cannot be closed', async (ctx) => {
    requires(ctx, userfaultfd)
    expect(await scenario('clinging')).toEqual({
      code: 'TMEM_IO',
      message: expect.stringContaining('the door is stuck'),
    })
  })

  test('a closed buffer that is dropped gives its addresses back', async (ctx) => {
    requires(ctx, userfaultfd)
    const { grownKiB } = await scenario<Counters>('collected', '', ['--expose-gc'])
    // Five buffers of 1 GiB.
    expect(grownKiB).toBeLessThan(1024 * 1024)
  })

  test.for([
    ['a layer throws', 'deadly(at=50,how=throw)', 'the layer is broken'],
    ['the thread exits', 'deadly(at=50,how=exit)', "the pager's thread has ended"],
    ['the thread runs out of memory', 'deadly(at=50,how=oom)', "the pager's thread has ended"],
    ['the store loses a page', 'forgetful', 'the stack has lost page'],
    ['a page cannot be read', 'unreadable', 'the disk is gone'],
  ] as const)('the pager dies (%s): the process ends with a message', async ([, stack, reason], ctx) => {
    requires(ctx, userfaultfd)
    const { code, stdout, stderr } = await node(['--max-old-space-size=48', 'test/scenarios.mjs', 'death', stack])
    expect({ code, stdout }).toEqual({ code: 70, stdout: '' })
    expect(stderr).toMatch(/^tmem userfault: .*this process ends now/m)
    expect(stderr).toContain(reason)
  })

  test.for([
    ['by itself', 'end', 0, /^$/],
    ['by process.exit, with a thread of the pool in a fault', 'call', 3, /^$/],
    ['by an error', 'throw', 1, /^Error: on purpose$/m],
  ] as const)('the process ends %s, with an open buffer: as it would without', async ([, way, expected, said], ctx) => {
    requires(ctx, userfaultfd)
    const { code, stdout, stderr } = await node(['test/scenarios.mjs', 'exit', way])
    // The content is there until the last handler has run.
    expect({ code, stdout }).toEqual({ code: expected, stdout: '{"wrong":0}' })
    expect(stderr).toMatch(said)
  })
})

test('mistakes', async (ctx) => {
  requires(ctx, userfaultfd)
  expect(await scenario('mistakes')).toMatchObject({
    fine: 'opened',
    data: 'opened',
    'no bytes': expect.stringMatching(/^RangeError .*multiple of 4096/),
    'odd bytes': expect.stringMatching(/^RangeError .*multiple of 4096/),
    'too many bytes': expect.stringMatching(/^RangeError /),
    'few resident': expect.stringMatching(/^RangeError .*from 262144/),
    cpu: expect.stringMatching(/^RangeError .*processor/),
    'absent cpu': expect.stringMatching(/^TmemError TMEM_UNSUPPORTED .*processor 8000/),
    text: expect.stringMatching(/^TmemError TMEM_BAD_STACK_TEXT .*did you mean zcache/),
    'no factory': expect.stringContaining('exports no layer factory'),
    'no module': expect.stringContaining('Cannot find module'),
    trim: 'RangeError',
    // Nothing that was opened is left behind.
    descriptors: 0,
  })
})

describe('a machine that cannot do it says why', () => {
  const because = (why: string): object => ({
    why: expect.stringContaining(why),
    code: 'TMEM_UNSUPPORTED',
    same: true,
  })

  test('not Linux, not a known processor', async () => {
    expect(await scenario('unsupported', 'platform')).toEqual(because('this is darwin'))
    expect(await scenario('unsupported', 'arch')).toEqual(because('this is s390x'))
  })

  test('koffi without a library for it', async () => {
    expect(await scenario('unsupported', '', ['--import', './test/no-koffi.mjs'])).toEqual(because('koffi'))
  })

  test('without privileges', async (ctx) => {
    requires(ctx, userfaultfd)
    if (readFileSync('/proc/sys/vm/unprivileged_userfaultfd', 'utf8').trim() !== '0')
      ctx.skip('needs vm.unprivileged_userfaultfd=0')
    const answer = await scenario('unsupported', 'privileges')
    expect(answer).toEqual(because('vm.unprivileged_userfaultfd=1'))
    expect(answer).toEqual(because('/dev/userfaultfd: EACCES'))
  })
})

test('the example of the README works', async (ctx) => {
  requires(ctx, userfaultfd)
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /```ts\n([\s\S]*?)```/.exec(readme)![1]!
  const { code: status, stdout, stderr } = await node(['--input-type=module', '-'], code)
  expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
  expect(stdout).toMatch(/^page 9999 holds 9999, 64 MiB of 1024 in memory, \d+ MiB in zcache\n$/)
})
