/**
 * A short soak of the program finds nothing; of a program that is broken, it finds what is; Ctrl-C leaves nothing
 * behind.
 */
import { readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { soak } from '@tmem/soak'
import { expect, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { ask } from '../../src/serve/control.ts'
import { bin } from '../serving.ts'
import { temporaryDirectory, tmem } from '../tmem.ts'

const isMounted = (folder: string): boolean => readFileSync('/proc/self/mountinfo', 'utf8').includes(folder)

test('half a minute: nothing is wrong', { timeout: 180_000 }, async (ctx) => {
  requires(ctx, { root: true, paths: ['/dev/fuse'] })
  const { code, stdout, stderr } = await tmem(['soak', '--minutes', '0.5', '--seed', '13', '--json'])
  expect([code, stderr]).toEqual([0, expect.stringMatching(/^soaking \(seed 13\): \d+ servers\n$/)])
  const report = JSON.parse(stdout)
  expect(report.failure).toBeUndefined()
  for (const count of [
    'lives',
    'kills',
    'refusedStarts',
    'mounts',
    'reads',
    'writes',
    'trims',
    'flushes',
    'knobs',
    'quiets',
  ])
    expect([count, report[count]]).toEqual([count, expect.toSatisfy((times: number) => times > 0)])
})

test.for([
  ['image', 'wrong bytes', /^(image|through), byte \d+: expected .*, found .* \(after a start\)$/],
  ['write', 'wrong bytes', /^(plain|image|through), byte \d+: expected version \d+/],
  ['descriptors', 'growth', /descriptors are open with nobody there, \d+ were at first$/],
] as const)('a server that is broken is found: %s', { timeout: 300_000 }, async ([how, kind, message], ctx) => {
  requires(ctx, { root: true, paths: ['/dev/fuse'] })
  const breaker = fileURLToPath(new URL('../broken-server.mjs', import.meta.url))
  const folder = temporaryDirectory()
  const { failure } = await soak({
    program: ['env', `BREAK=${how}`, process.execPath, '--import', breaker, bin],
    ask: (control, request) => ask(control, request.do as 'knobs', request as never),
    seconds: 120,
    seed: 5,
    folder,
  })
  expect(failure).toMatchObject({ kind, message: expect.stringMatching(message) })
  expect([readdirSync(folder), isMounted(folder)]).toEqual([[], false])
})

test('Ctrl-C ends it with a report and 130, and leaves nothing', { timeout: 120_000 }, async (ctx) => {
  requires(ctx, { root: true, paths: ['/dev/fuse'] })
  const folder = temporaryDirectory()
  const through = ['env', `TMPDIR=${folder}`]
  const { code, stdout } = await tmem(['soak', '--minutes', '5', '--seed', '1', '--json'], {
    through,
    during: async (running) => {
      // Clients are at work: something of theirs is in an image.
      const written = (name: string): number =>
        statSync(join(folder, name, 'through.img'), { throwIfNoEntry: false })?.blocks ?? 0
      while (running.exitCode === null && !readdirSync(folder).some(written)) await setTimeout(50)
      running.kill('SIGINT')
    },
  })
  expect([code, JSON.parse(stdout).seed]).toEqual([130, 1])
  expect([readdirSync(folder), isMounted(folder)]).toEqual([[], false])
})
