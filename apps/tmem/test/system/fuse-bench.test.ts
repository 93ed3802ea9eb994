/**
 * The bench that mounts, and swaps to a loop device and to zram: it changes the machine, and has to undo that however
 * it ends.
 */
import { spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { strangeLines, tmem } from '../tmem.ts'

const needs = {
  root: true,
  commands: ['fio', 'cc', 'losetup', 'mkswap', 'swapon', 'swapoff'],
  paths: ['/dev/fuse', '/dev/loop-control', '/dev/zram0', '/sys/fs/cgroup/memory/memory.limit_in_bytes'],
}
const group = '/sys/fs/cgroup/memory/tmem-bench-fuse'
const folder = '/var/tmp/tmem-bench-fuse'
const loops = (): string[] =>
  readdirSync('/sys/block').filter((name) => {
    const backing = `/sys/block/${name}/loop/backing_file`
    return existsSync(backing) && readFileSync(backing, 'utf8').startsWith(folder)
  })
const swapping = (): boolean => {
  const swaps = readFileSync('/proc/swaps', 'utf8')
  return [...loops(), 'zram0'].some((name) => swaps.includes(`/dev/${name} `))
}
const traces = (): object => ({
  group: existsSync(group),
  note: existsSync('/run/tmem-bench-fuse'),
  loops: loops(),
  mounted: readFileSync('/proc/self/mounts', 'utf8').includes(folder),
  folder: existsSync(folder),
  swapping: swapping(),
  disksize: readFileSync('/sys/block/zram0/disksize', 'utf8').trim(),
})
const clean = { group: false, note: false, loops: [], mounted: false, folder: false, swapping: false, disksize: '0' }

/** Ends the program with a signal once it swaps. */
const whileSwapping =
  (signal: NodeJS.Signals) =>
  async (running: { kill(signal: NodeJS.Signals): boolean }): Promise<void> => {
    for (let tries = 0; !swapping(); tries++) {
      if (tries === 1200) throw new Error('it has not begun to swap within two minutes')
      await setTimeout(100)
    }
    running.kill(signal)
  }

test('killed in the middle: the next run undoes what was left, and its own', { timeout: 300_000 }, async (ctx) => {
  requires(ctx, needs)
  if (swapping()) ctx.skip('needs /dev/zram0 for itself')
  const killed = await tmem(['bench', 'fuse', '--quick', '--json'], { during: whileSwapping('SIGKILL') })
  expect(killed.stdout).toBe('')
  expect(traces()).not.toEqual(clean)

  const { code, stdout, stderr } = await tmem(['bench', 'fuse', '--quick', '--json'])
  expect({ code, notes: strangeLines(stderr) }).toEqual({ code: 0, notes: [] })
  for (const part of ['fio: file-read-4k-qd32', 'hog-run']) expect(stderr).toMatch(new RegExp(`^${part}: \\d.*$`, 'm'))
  const { rows } = JSON.parse(stdout) as { rows: { name: string; unit: string; value: number; ratio?: number }[] }
  const row = (name: string) => rows.find((one) => one.name === name)
  for (const name of ['file-read-4k-qd32', 'file-write-4k-qd1', 'loop-compressed-write-4k-qd32', 'hog-run'])
    expect(row(name)).toMatchObject({ value: expect.any(Number), ratio: expect.any(Number) })
  // The parts are the whole.
  const parts = rows.filter(({ unit }) => unit === '% of the run')
  expect(parts).toHaveLength(7)
  expect(parts.reduce((sum, { value }) => sum + value, 0)).toBeCloseTo(100, 0)
  expect(row('hog-write-size')!.value).toBeGreaterThanOrEqual(4096)
  expect(traces()).toEqual(clean)
})

test('interrupted: nothing is left', { timeout: 180_000 }, async (ctx) => {
  requires(ctx, needs)
  if (swapping()) ctx.skip('needs /dev/zram0 for itself')
  const { code, stdout } = await tmem(['bench', 'fuse', '--quick', '--json'], { during: whileSwapping('SIGINT') })
  expect({ code, stdout }).toEqual({ code: 130, stdout: '' })
  expect(traces()).toEqual(clean)
})

test('a process that ends without closing its mount does end, and nothing is left', {
  timeout: 30_000,
}, async (ctx) => {
  requires(ctx, { root: true, paths: ['/dev/fuse'] })
  const mountPoint = mkdtempSync(join(tmpdir(), 'tmem-fuse-exit-'))
  const program = `
    import { fuseServer } from '@tmem/fuse'
    await fuseServer({ mountPoint: ${JSON.stringify(mountPoint)}, root: { kind: 'directory', entries: () => new Map() } })
    setTimeout(() => process.exit(3), 100)`
  const child = spawn(process.execPath, ['--input-type=module', '-e', program], {
    cwd: fileURLToPath(new URL('../../', import.meta.url)),
    stdio: ['ignore', 'inherit', 'inherit'],
    timeout: 10_000,
    killSignal: 'SIGKILL',
  })
  try {
    const [code, signal] = await new Promise<[number | null, string | null]>((resolve) => {
      child.once('exit', (...ended) => resolve(ended))
    })
    expect({ code, signal }).toEqual({ code: 3, signal: null })
    expect(readFileSync('/proc/self/mounts', 'utf8')).not.toContain(mountPoint)
  } finally {
    if (readFileSync('/proc/self/mounts', 'utf8').includes(mountPoint)) spawnSync('umount', ['-l', mountPoint])
    rmSync(mountPoint, { recursive: true })
  }
})
