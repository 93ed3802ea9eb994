/** Folders that a killed process left behind are taken away by the next one, and nothing else is. */
import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { processMark } from '@tmem/core'
import { expect, onTestFinished, test } from 'vitest'
import { scratchFolder } from '../src/index.ts'

function parentFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-test-'))
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

const program = (parent: string): string[] => [
  '--input-type=module',
  '-e',
  `import { scratchFolder } from ${JSON.stringify(new URL('../dist/index.js', import.meta.url))}
   console.log(scratchFolder(${JSON.stringify(parent)}, 'ours-'))
   process.stdin.resume()`,
]

test('what a killed process left is gone, what a running one uses is not', async () => {
  const parent = parentFolder()
  const running = spawn(process.execPath, program(parent), { stdio: ['pipe', 'pipe', 'inherit'] })
  onTestFinished(() => void running.kill('SIGKILL'))
  const used = String((await once(running.stdout, 'data'))[0]).trim()
  const dead = spawnSync(process.execPath, program(parent), { input: '', encoding: 'utf8' }).stdout.trim()
  expect(existsSync(dead)).toBe(true)
  const own = scratchFolder(parent, 'ours-')
  expect(
    readdirSync(parent)
      .map((name) => join(parent, name))
      .sort(),
  ).toEqual([own, used].sort())
  running.kill('SIGKILL')
  await once(running, 'exit')
  scratchFolder(parent, 'ours-')
  expect(existsSync(used)).toBe(false)
})

test('what has no mark of ours, another name, or is no folder stays', () => {
  const parent = parentFolder()
  const dead = processMark().replace(/^\d+ \d+/, '4194303 1')
  const made = (name: string, mark?: string): string => {
    mkdirSync(join(parent, name))
    if (mark !== undefined) writeFileSync(join(parent, name, 'tmem-process'), mark)
    return name
  }
  const stays = [made('ours-1'), made('ours-2', 'hello'), made('ours-3', processMark()), made('others-4', dead)]
  writeFileSync(join(parent, 'ours-5'), dead)
  symlinkSync(join(parent, 'others-4'), join(parent, 'ours-6'))
  made('ours-7', dead)
  const own = scratchFolder(parent, 'ours-')
  const expected = [...stays, 'ours-5', 'ours-6'].map((name) => join(parent, name))
  expect(
    readdirSync(parent)
      .map((name) => join(parent, name))
      .sort(),
  ).toEqual([...expected, own].sort())
  expect(existsSync(join(parent, 'others-4/tmem-process'))).toBe(true)
})
