import { expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { readsOf } from '../src/bench/cleancache.ts'
import type { MeasuredRow, Row } from '../src/bench/frame.ts'
import { strangeLines, tmem } from './tmem.ts'

test('the reads of a build out of the lines of strace', () => {
  const trace = [
    '10 openat(AT_FDCWD</w>, "src/a.ts", O_RDONLY|O_CLOEXEC) = 3</w/src/a.ts>',
    '10 read(3</w/src/a.ts>, ""..., 512) = 512',
    '11 openat(AT_FDCWD</w>, "b.d.ts", O_RDONLY) = 4</w/b.d.ts>',
    '10 read(3</w/src/a.ts>,  <unfinished ...>',
    '11 read(4</w/b.d.ts>, ""..., 9000) = 9000',
    '10 <... read resumed>""..., 384) = 100',
    '10 read(3</w/src/a.ts>, "", 284) = 0',
    '11 pread64(4</w/b.d.ts>, ""..., 50, 4096) = 50',
    '11 read(5</usr/lib/libc.so.6>, ""..., 832) = 832',
    '11 read(6<pipe:[77]>, ""..., 10) = 10',
    '10 openat(AT_FDCWD</w>, "src/a.ts", O_RDONLY|O_CLOEXEC) = 3</w/src/a.ts>',
    '10 read(3</w/src/a.ts>, ""..., 612) = 612',
    String.raw`11 openat(AT_FDCWD</w>, "Pr\303\274fung/"..., O_RDONLY) = 4</w/Pr\303\274fung/a\76b.ts>`,
    String.raw`11 read(4</w/Pr\303\274fung/a\76b.ts>, ""..., 9) = 9`,
    '10 +++ exited with 0 +++',
  ].join('\n')
  expect(readsOf(trace)).toEqual([
    { path: '/w/src/a.ts', position: 0, length: 512 },
    { path: '/w/b.d.ts', position: 0, length: 9000 },
    { path: '/w/src/a.ts', position: 512, length: 100 },
    { path: '/w/b.d.ts', position: 4096, length: 50 },
    { path: '/w/src/a.ts', position: 0, length: 612 },
    { path: '/w/Prüfung/a>b.ts', position: 0, length: 9 },
  ])
})

test('tmem bench cleancache --quick --json: a working set and a real build, from real files', {
  timeout: 120_000,
}, async (ctx) => {
  requires(ctx, { commands: ['strace'] })
  const { code, stdout, stderr } = await tmem(['bench', 'cleancache', '--quick', '--json'])
  expect({ code, notes: strangeLines(stderr) }).toEqual({ code: 0, notes: [] })
  const document = JSON.parse(stdout) as { suite: string; quick: boolean; machine: object; rows: readonly Row[] }
  expect(document).toMatchObject({ suite: 'cleancache', quick: true, machine: { node: process.version } })
  // Where files cannot be read around the system's cache a row of its own says why.
  const rows = document.rows.filter(({ name }) => !name.endsWith('-direct'))
  expect(rows.map((row) => ('skipped' in row ? `${row.name}: ${row.skipped}` : row.name))).toEqual([
    'reread-3x-from-file',
    'reread-3x-from-file-plain',
    'reread-3x-time',
    'reread-3x-tmem-per-saved-read',
    'replay-tsc-reads',
    'replay-tsc-pages',
    'replay-tsc-time',
    'replay-tsc-puts-per-saved-read',
    'replay-tsc-tmem-per-saved-read',
    'replay-tsc-tmem-at-300-saved-reads-per-second',
    'replay-tsc-tmem-at-300-saved-requests-per-second',
  ])
  const row = (name: string): MeasuredRow => rows.find((one) => one.name === name) as MeasuredRow
  // Numbers of pages are no times: they come out alike on every machine.
  expect(row('reread-3x-from-file')).toMatchObject({ goal: 10, met: true })
  expect(row('reread-3x-from-file-plain').value).toBeGreaterThan(80)
  expect(row('replay-tsc-reads').ratio).toBeLessThan(0.5)
  expect(row('replay-tsc-pages').reference_value).toBeGreaterThan(300)
  expect(row('replay-tsc-puts-per-saved-read').value).toBeGreaterThan(0)
  const timed = rows.map(({ name }) => name).filter((name) => /time|per-saved|second/.test(name))
  expect(timed).toHaveLength(7)
  for (const name of timed) expect(row(name).value).toBeGreaterThan(0)
})
