/** `tmem guest run`, and a guest whose stack moves to another process while it runs. */
import type { ChildProcessWithoutNullStreams } from 'node:child_process'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { lacksForGuests, prepareParts } from '@tmem/kernel-guest'
import { beforeAll, expect, type TestContext, test } from 'vitest'
import { type Ended, temporaryDirectory, tmem } from '../tmem.ts'
import { hosting } from '../xen-guest.ts'

const cache = fileURLToPath(new URL('../../../../.cache/kernel-guest', import.meta.url))
const timeout = 400_000
const lacks = lacksForGuests()

beforeAll(async () => {
  if (lacks === undefined) await prepareParts({ cache, onStep: (what) => console.log(what) })
}, 600_000)

function needed(ctx: TestContext): void {
  if (lacks !== undefined) ctx.skip(`needs what a guest needs: ${lacks}`)
}

const prefix = 'tmem-kernel-guest-'

/** Runs `tmem guest run`; what of it is left at the end. A later `--size` is the one that counts. */
async function run(
  words: readonly string[],
  during: (running: ChildProcessWithoutNullStreams) => Promise<void> = async () => undefined,
): Promise<Ended & { left: string[] }> {
  let pid: number | undefined
  const ended = await tmem(['guest', 'run', '--memory', '96MiB', '--size', '110MiB', '--cache', cache, ...words], {
    during: (running) => {
      pid = running.pid
      return during(running)
    },
  })
  const left = readdirSync('/dev/shm').filter((name) => name.startsWith(`${prefix}${pid}-`))
  return { ...ended, left }
}

test('runs a guest, and all sides count the same', { timeout }, async (ctx) => {
  needed(ctx)
  const { code, stdout, stderr, left } = await run(['--workload', 'hog', '--stack', 'zcache(limit=192MiB)', '--json'])
  expect({ code, stderr, left }).toMatchObject({ code: 0, left: [] })
  const answer = JSON.parse(stdout)
  expect(answer).toMatchObject({ workload: 'hog', wrongBytes: 0, disk: { swapIns: 0, swapOuts: 0 } })
  expect(answer.host.puts).toBe(answer.module.puts)
  expect(answer.host.puts).toBeGreaterThan(5000)
  expect(stderr).toMatch(/^guest: \d+ pages, 0 wrong$/m)
})

test('records what the kernel calls, which the models find possible, and what is altered they do not', {
  timeout,
}, async (ctx) => {
  needed(ctx)
  const file = join(temporaryDirectory(), 'trace')
  const ran = await run(['--trace', file])
  expect(ran).toMatchObject({ code: 0 })
  const checked = await tmem(['explore', '--trace', file, '--json'])
  expect(checked).toMatchObject({ code: 0, stderr: '' })
  const report = JSON.parse(checked.stdout)
  expect(report.contradictions).toEqual([])
  expect(report.seconds).toBeGreaterThan(1)
  expect(report.kinds.start).toBe(report.kinds.end)
  expect(report.kinds.load).toBeGreaterThan(5000)
  expect(report.singlePages).toBeGreaterThan(5000)
  // The first store was refused, it says now.
  const bytes = readFileSync(file)
  let first = 0
  while (bytes.readUInt16LE(16 + first * 32 + 24) !== 1) first++
  bytes.writeInt16LE(-12, 16 + first * 32 + 26)
  writeFileSync(file, bytes)
  const altered = await tmem(['explore', '--trace', file])
  expect(altered).toMatchObject({ code: 1 })
  expect(altered.stderr).toMatch(/^tmem: \d+ contradictions, the first at event \d+: (load|invalidate)-needs-store\n$/)
  expect(await run(['--trace', file])).toMatchObject({ code: 2, left: [] })
  // Byte by byte toEqual would take gigabytes.
  expect(readFileSync(file).equals(bytes)).toBe(true)
})

test('what a run that was killed left is taken away by the next', { timeout }, async (ctx) => {
  needed(ctx)
  const killed = await run([], async (running) => {
    await puts(running)
    running.kill('SIGKILL')
  })
  expect(killed).toMatchObject({ code: null, left: [expect.stringContaining(prefix)] })
  // Its doorbell is nobody's; a run that ends soon is enough.
  const control = join(temporaryDirectory(), 'nobody.sock')
  expect(await run(['--control', control])).toMatchObject({ code: 1, left: [] })
  expect(readdirSync('/dev/shm')).not.toContain(killed.left[0])
})

/** Waits until the guest has put something. */
async function puts(running: ChildProcessWithoutNullStreams): Promise<void> {
  let said = ''
  running.stderr.on('data', (text: string) => {
    said += text
  })
  while (!/^tmem: {2}[1-9]\d* puts/m.test(said)) {
    if (running.exitCode !== null) throw new Error(`it ended with ${running.exitCode}: ${said}`)
    await setTimeout(100)
  }
}

test('ends when it is interrupted, and nothing is left', { timeout }, async (ctx) => {
  needed(ctx)
  const { code, stdout, stderr, left } = await run([], async (running) => {
    await puts(running)
    running.kill('SIGINT')
  })
  expect({ code, stdout, left }).toEqual({ code: 130, stdout: '', left: [] })
  expect(stderr).toMatch(/tmem: interrupted\n$/)
})

test('a guest goes on while its stack moves to another process', { timeout }, async (ctx) => {
  needed(ctx)
  const [here, there] = await Promise.all([hosting(), hosting()])
  const served = ['--control', here.control, '--domain', '7', '--size', '130MiB']
  let isOver = false
  const running = run(['--json', ...served]).finally(() => {
    isOver = true
  })
  /** Pages that a host holds for the guest. */
  const pages = async (control: string): Promise<number> => {
    const { code, stdout } = await tmem(['xen', 'list', '7', '--long', '--json', '--control', control])
    // Its module has not asked for a pool yet.
    if (code !== 0) return 0
    const { records } = JSON.parse(stdout) as { records: Record<string, unknown>[] }
    return Number(records.find(({ record }) => record === 'P')?.['Pc'] ?? 0)
  }
  while ((await pages(here.control)) < 5000 && !isOver) await setTimeout(100)
  const moved = await tmem(['xen', 'migrate', '7', '--json', '--control', here.control, '--to', there.control])
  expect(moved).toMatchObject({ code: 0, stderr: '' })
  expect(JSON.parse(moved.stdout)).toMatchObject({ domain: '7', pools: 1 })
  expect(JSON.parse(moved.stdout).pages).toBeGreaterThan(4000)
  expect(await pages(there.control)).toBeGreaterThan(1000)
  const { code, stdout, stderr } = await running
  expect({ code, stderr }).toMatchObject({ code: 0 })
  expect(stderr).toMatch(/^guest: \d+ pages, 0 wrong$/m)
  expect(JSON.parse(stdout)).toMatchObject({ wrongBytes: 0, domain: 7, module: { again: 0 } })
})

test('boots a kernel with cleancache, whose files come from the stack', { timeout: 2_000_000 }, async (ctx) => {
  needed(ctx)
  const words = ['--kernel-with-cleancache', '--workload', 'reread', '--stack', 'zcache(limit=192MiB)', '--json']
  const { code, stdout, stderr, left } = await run(words)
  const lacks = /^tmem: the parts of the guest cannot be prepared: (.*)$/m.exec(stderr)?.[1]
  if (lacks !== undefined) ctx.skip(`needs a kernel with cleancache: ${lacks}`)
  expect({ code, stderr, left }).toMatchObject({ code: 0, left: [] })
  const answer = JSON.parse(stdout)
  expect(answer.cleancache.puts).toBe(answer.module.clean_puts)
  expect(answer.cleancache.succ_gets).toBeGreaterThan(20_000)
  expect(answer.passKibibytes[0]).toBeGreaterThan(100_000)
  expect(answer.passKibibytes[2]).toBeLessThan(1024)
})

test('without a host there the guest is ended at once, and it is told', { timeout }, async (ctx) => {
  needed(ctx)
  const control = join(temporaryDirectory(), 'nobody.sock')
  const { code, stdout, stderr, left } = await run(['--control', control])
  expect({ code, stdout, left }).toEqual({ code: 1, stdout: '', left: [] })
  expect(stderr).toMatch(/^tmem: no host at .*nobody\.sock \(.*ENOENT/m)
})
