import { expect, test } from 'vitest'
import { readsOf } from '../src/bench/cleancache.ts'

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
    '10 +++ exited with 0 +++',
  ].join('\n')
  expect(readsOf(trace)).toEqual([
    { path: '/w/src/a.ts', position: 0, length: 512 },
    { path: '/w/b.d.ts', position: 0, length: 9000 },
    { path: '/w/src/a.ts', position: 512, length: 100 },
    { path: '/w/b.d.ts', position: 4096, length: 50 },
    { path: '/w/src/a.ts', position: 0, length: 612 },
  ])
})
