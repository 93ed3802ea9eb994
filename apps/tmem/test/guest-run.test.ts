/** `tmem guest run` where it cannot run: what is missing or wrong is told in one line, and nothing is left. */
import { existsSync, mkdirSync, readdirSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { temporaryDirectory, tmem } from './tmem.ts'

test('names what is missing, and the command that installs it', async () => {
  const cache = join(temporaryDirectory(), 'cache')
  const through = ['env', 'PATH=/nowhere']
  const ended = await tmem(['guest', 'run', '--cache', cache], { through })
  expect(ended).toMatchObject({ code: 1, stdout: '' })
  expect(ended.stderr).toMatch(
    /^tmem: the parts of the guest cannot be prepared: qemu-system-x86_64, .* missing; install: apt-get install --no-install-recommends qemu-system-x86 .*\n$/,
  )
  expect(existsSync(cache)).toBe(false)
})

test.each([
  [['--memory', '10MiB'], '--memory: expected whole MiB from 96MiB to 2GiB, got 10MiB'],
  [['--memory', '100000000'], '--memory: expected whole MiB from 96MiB to 2GiB, got 100000000'],
  [['--stack', 'zcash(limit=1MiB)'], 'no layer is named "zcash"; did you mean zcache?'],
  [['--size', '100000000'], '--size: expected whole MiB, at least 1MiB, got 100000000'],
  [
    ['--workload', 'untar'],
    "option '--workload <name>' argument 'untar' is invalid. Allowed choices are hog, reread, tar, compile.",
  ],
])('%j is bad input', async (words, message) => {
  const { code, stdout, stderr } = await tmem(['guest', 'run', ...words])
  expect({ code, stdout }).toEqual({ code: 2, stdout: '' })
  expect(stderr).toContain(message)
})

test('a folder with a space in it is told, and not filled', async (ctx) => {
  const folder = join(temporaryDirectory(), 'a folder')
  mkdirSync(folder)
  const programs = temporaryDirectory()
  for (const name of ['qemu-system-x86_64', 'setpriv', 'apt-get', 'dpkg-deb', 'make', 'gcc'])
    symlinkSync('/bin/false', join(programs, name))
  if (process.arch !== 'x64') ctx.skip('needs x86-64')
  const ended = await tmem(['guest', 'run', '--cache', folder], { through: ['env', `PATH=${programs}`] })
  expect(ended).toMatchObject({ code: 1, stdout: '' })
  expect(ended.stderr).toContain('has a space or colon in it, which building a module does not allow')
})

test('an apt that fails is told in its own words, and leaves nothing that looks whole', async (ctx) => {
  if (process.arch !== 'x64') ctx.skip('needs x86-64')
  const folder = temporaryDirectory()
  const programs = temporaryDirectory()
  for (const name of ['qemu-system-x86_64', 'setpriv', 'dpkg-deb', 'make', 'gcc'])
    symlinkSync('/bin/false', join(programs, name))
  writeFileSync(join(programs, 'apt-get'), '#!/bin/sh\necho "E: the mirror is asleep" >&2\nexit 100\n', { mode: 0o755 })
  const ended = await tmem(['guest', 'run', '--cache', folder], { through: ['env', `PATH=${programs}`] })
  expect(ended).toMatchObject({ code: 1, stdout: '' })
  expect(ended.stderr).toMatch(
    /^tmem: the parts of the guest cannot be prepared: apt-get ended with 100: E: the mirror is asleep$/m,
  )
  expect(readdirSync(folder)).toEqual([])
})
