/** `tmem guest run`, and a guest whose stack moves to another process while it runs. */
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { bootGuest, type GuestParts, lacksForGuests, prepareParts } from '@tmem/kernel-guest'
import { beforeAll, expect, onTestFinished, type TestContext, test } from 'vitest'
import { temporaryDirectory, tmem } from '../tmem.ts'
import { hosting } from '../xen-guest.ts'

const cache = fileURLToPath(new URL('../../../../.cache/kernel-guest', import.meta.url))
const timeout = 400_000
let parts: GuestParts | undefined

beforeAll(async () => {
  if (lacksForGuests() === undefined) parts = await prepareParts({ cache, onStep: (what) => console.log(what) })
}, 600_000)

function needed(ctx: TestContext): GuestParts {
  if (parts === undefined) ctx.skip(`needs what a guest needs: ${lacksForGuests()}`)
  return parts
}

const left = (): string[] => readdirSync('/dev/shm').filter((name) => name.startsWith('tmem-kernel-guest-'))

test('runs a guest, and all sides count the same', { timeout }, async (ctx) => {
  needed(ctx)
  const words = ['guest', 'run', '--workload', 'hog', '--memory', '96MiB', '--stack', 'zcache(limit=192MiB)']
  const { code, stdout, stderr } = await tmem([...words, '--cache', cache, '--json'])
  expect({ code, stderr }).toMatchObject({ code: 0 })
  const answer = JSON.parse(stdout)
  expect(answer).toMatchObject({ workload: 'hog', wrongBytes: 0, disk: { swapIns: 0, swapOuts: 0 } })
  expect(answer.host.puts).toBe(answer.module.puts)
  expect(answer.host.puts).toBeGreaterThan(10_000)
  expect(stderr).toMatch(/^guest: \d+ pages, 0 wrong$/m)
  expect(left()).toEqual([])
})

test('records what the kernel calls, which the models find possible, and what is altered they do not', {
  timeout,
}, async (ctx) => {
  needed(ctx)
  const file = join(temporaryDirectory(), 'trace')
  const ran = await tmem(['guest', 'run', '--memory', '96MiB', '--cache', cache, '--trace', file])
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
  const first = [...Array(1000).keys()].find((event) => bytes.readUInt16LE(16 + event * 32 + 24) === 1)!
  bytes.writeInt16LE(-12, 16 + first * 32 + 26)
  writeFileSync(file, bytes)
  const altered = await tmem(['explore', '--trace', file])
  expect(altered).toMatchObject({ code: 1 })
  expect(altered.stderr).toMatch(/^tmem: [12] contradictions, the first at event \d+: (load|invalidate)-needs-store\n$/)
  expect(await tmem(['guest', 'run', '--cache', cache, '--trace', file])).toMatchObject({ code: 2 })
  expect(readFileSync(file)).toEqual(bytes)
})

test('ends when it is interrupted, and nothing is left', { timeout }, async (ctx) => {
  needed(ctx)
  const { code, stdout, stderr } = await tmem(['guest', 'run', '--memory', '96MiB', '--cache', cache], {
    async during(running) {
      let said = ''
      running.stderr.on('data', (text: string) => {
        said += text
      })
      while (!/^tmem: {2}[1-9]\d* puts/m.test(said)) await setTimeout(100)
      running.kill('SIGINT')
    },
  })
  expect({ code, stdout }).toEqual({ code: 130, stdout: '' })
  expect(stderr).toMatch(/tmem: interrupted\n$/)
  expect(left()).toEqual([])
})

test('a guest goes on while its stack moves to another process', { timeout }, async (ctx) => {
  const stop = new AbortController()
  const guest = bootGuest({ parts: needed(ctx), workload: 'hog', memoryBytes: '96MiB', signal: stop.signal })
  onTestFinished(async () => {
    stop.abort()
    await guest.ended.catch(() => undefined)
  })
  const [here, there] = await Promise.all([hosting(), hosting()])
  const place = ['--memory', guest.memory, '--doorbell', guest.doorbell]
  const attached = await tmem(['xen', 'attach', '7', ...place, '--control', here.control])
  expect(attached).toEqual({ code: 0, stdout: `domain 7 is the guest at ${guest.doorbell}\n`, stderr: '' })
  /** Pages that a host holds for the guest. */
  const pages = async (control: string): Promise<number> => {
    const { code, stdout } = await tmem(['xen', 'list', '7', '--long', '--json', '--control', control])
    // Its module has not asked for a pool yet.
    if (code !== 0) return 0
    const { records } = JSON.parse(stdout) as { records: Record<string, unknown>[] }
    return Number(records.find(({ record }) => record === 'P')?.['Pc'] ?? 0)
  }
  let isOver = false
  const ended = guest.ended.finally(() => {
    isOver = true
  })
  while ((await pages(here.control)) < 5000 && !isOver) await setTimeout(100)
  const moved = await tmem(['xen', 'migrate', '7', '--json', '--control', here.control, '--to', there.control])
  expect(moved).toMatchObject({ code: 0, stderr: '' })
  expect(JSON.parse(moved.stdout)).toMatchObject({ domain: '7', pools: 1 })
  expect(JSON.parse(moved.stdout).pages).toBeGreaterThan(4000)
  expect(await pages(there.control)).toBeGreaterThan(1000)
  const run = await ended
  expect(run).toMatchObject({ exit: 0 })
  expect(run.console).toMatch(/^\d+ pages, 0 wrong$/m)
  expect(run.module['again']).toBe(0)
})
