/** The bench that swaps to zram: it changes the machine, and has to undo that however it ends. */
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { tmem } from '../tmem.ts'

const needs = {
  root: true,
  commands: ['cc', 'mkswap', 'swapon', 'swapoff'],
  paths: ['/dev/userfaultfd', '/dev/zram0', '/sys/fs/cgroup/memory/memory.limit_in_bytes'],
}
const group = '/sys/fs/cgroup/memory/tmem-bench-userfault'
const note = '/run/tmem-bench-userfault.pid'
const swapping = (): boolean => readFileSync('/proc/swaps', 'utf8').includes('/dev/zram0 ')
const traces = (): object => ({
  group: existsSync(group),
  note: existsSync(note),
  swapping: swapping(),
  disksize: readFileSync('/sys/block/zram0/disksize', 'utf8').trim(),
})
const clean = { group: false, note: false, swapping: false, disksize: '0' }

test('killed in the middle: the next run undoes what was left, and its own', { timeout: 180_000 }, async (ctx) => {
  requires(ctx, needs)
  if (swapping()) ctx.skip('needs /dev/zram0 for itself')
  const killed = await tmem(['bench', 'userfault', '--quick', '--json'], {
    during: async (running) => {
      for (let tries = 0; !swapping(); tries++) {
        if (tries === 600) throw new Error('it has not begun to swap within a minute')
        await setTimeout(100)
      }
      running.kill('SIGKILL')
    },
  })
  expect(killed.stdout).toBe('')
  expect(traces()).not.toEqual(clean)

  const { code, stdout } = await tmem(['bench', 'userfault', '--quick', '--json'])
  expect(code).toBe(0)
  const { rows } = JSON.parse(stdout) as { rows: { name: string; value?: number; reference?: string; met?: boolean }[] }
  const row = (name: string) => rows.find((one) => one.name === name)
  for (const name of ['fault-zcache-median', 'fault-zcache-p99', 'resident-access', 'zipf-eighth'])
    expect(row(name)).toMatchObject({ value: expect.any(Number), reference: expect.any(String) })
  expect(row('clean-evictions-compressed-again')).toMatchObject({ value: 0, met: true })
  expect(traces()).toEqual(clean)
})

test('interrupted: nothing is left', { timeout: 120_000 }, async (ctx) => {
  requires(ctx, needs)
  if (swapping()) ctx.skip('needs /dev/zram0 for itself')
  const { code, stdout } = await tmem(['bench', 'userfault', '--quick', '--json'], {
    during: async (running) => {
      for (let tries = 0; !swapping(); tries++) {
        if (tries === 600) throw new Error('it has not begun to swap within a minute')
        await setTimeout(100)
      }
      running.kill('SIGINT')
    },
  })
  expect({ code, stdout }).toEqual({ code: 130, stdout: '' })
  expect(traces()).toEqual(clean)
})

test('a reference that its own group leaves no memory is tried again, and then skipped with the reason', {
  timeout: 180_000,
}, async (ctx) => {
  requires(ctx, { ...needs, paths: [...needs.paths, '/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes'] })
  if (swapping()) ctx.skip('needs /dev/zram0 for itself')
  const { code, stdout } = await tmem(['bench', 'userfault', '--quick', '--json'], {
    during: async (running) => {
      while (running.exitCode === null) {
        try {
          // Memory and swap together: the program does not fit.
          writeFileSync(join(group, 'memory.memsw.limit_in_bytes'), `${64 * 2 ** 20}`)
        } catch {
          // The group is not there, or has more already.
        }
        await setTimeout(5)
      }
    },
  })
  expect(code).toBe(0)
  const { rows } = JSON.parse(stdout) as { rows: { name: string; skipped?: string; value?: number }[] }
  expect(rows.find(({ name }) => name === 'fault-zcache-median')!.skipped).toBe(
    'the reference cannot be had: 3 times the kernel has killed the swapped program, for want of memory in its group',
  )
  expect(rows.find(({ name }) => name === 'fault-zcache-p99')).toMatchObject({ value: expect.any(Number) })
  expect(traces()).toEqual(clean)
})
