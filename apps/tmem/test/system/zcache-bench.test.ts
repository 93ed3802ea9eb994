/** The bench that asks zram: it uses a device, and has to empty it however it ends. */
import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { expect, onTestFinished, type TestContext, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { tmem } from '../tmem.ts'

const note = '/run/tmem-bench-zcache'
const setting = (name: string): string => `/sys/block/zram0/${name}`
const disksize = (): string => readFileSync(setting('disksize'), 'utf8').trim()

interface Shown {
  readonly name: string
  readonly ratio?: number
  readonly skipped?: string
}

async function rowsOf(): Promise<Map<string, Shown>> {
  const { code, stdout } = await tmem(['bench', 'zcache', '--quick', '--json'])
  expect(code).toBe(0)
  const { rows } = JSON.parse(stdout) as { rows: Shown[] }
  return new Map(rows.map((row) => [row.name, row]))
}

function freeDevice(ctx: TestContext): void {
  requires(ctx, { root: true, paths: ['/dev/zram0'] })
  if (disksize() !== '0' || existsSync(note)) ctx.skip('needs /dev/zram0 for itself')
}

test('what a killed run has left is emptied, and so is what this run needs', { timeout: 120_000 }, async (ctx) => {
  freeDevice(ctx)
  onTestFinished(() => {
    writeFileSync(setting('reset'), '1')
    rmSync(note, { force: true })
  })
  const { pid } = spawnSync('true')
  writeFileSync(note, `${pid} zram0\n`)
  writeFileSync(setting('disksize'), `${2 ** 20}`)
  const rows = await rowsOf()
  expect(rows.get('bytes-for-corpus')?.ratio).toBeGreaterThan(0.5)
  expect([...rows.keys()].filter((name) => name.startsWith('bytes-for-corpus-cold-'))).toHaveLength(1)
  expect({ disksize: disksize(), note: existsSync(note) }).toEqual({ disksize: '0', note: false })
})

test('while another run uses a device, the rows say so', { timeout: 120_000 }, async (ctx) => {
  freeDevice(ctx)
  onTestFinished(() => rmSync(note, { force: true }))
  writeFileSync(note, `${process.pid} zram0\n`)
  const rows = await rowsOf()
  expect(rows.get('bytes-for-corpus')?.skipped).toBe(`another run (process ${process.pid}) is using /dev/zram0`)
  expect(existsSync(note)).toBe(true)
})
