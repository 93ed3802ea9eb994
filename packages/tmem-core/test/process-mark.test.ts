import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { expect, test, vi } from 'vitest'
import { markedProcess, processMark, processRuns } from '../src/index.ts'

const own = processMark()

test('this process runs, under its own mark', () => {
  expect(markedProcess(own)).toEqual({ pid: process.pid, running: true })
})

test('a process that ended does not run, nor does one whose number was given to another', async () => {
  const child = spawn(process.execPath, ['-e', ''])
  const pid = child.pid!
  await new Promise((resolve) => child.once('exit', resolve))
  const [, start, boot] = own.split(' ')
  expect(markedProcess(`${pid} ${start} ${boot}`)).toEqual({ pid, running: false })
  expect(markedProcess(`${process.pid} 1 ${boot}`)).toEqual({ pid: process.pid, running: false })
  const other = '01234567-89ab-cdef-0123-456789abcdef'
  expect(markedProcess(`${process.pid} ${start} ${other}`)).toEqual({ pid: process.pid, running: false })
})

test.runIf(process.platform === 'linux')(
  'a process that ended does not run, also while nobody has asked how',
  async () => {
    // What the shell becomes has a child of which it knows nothing.
    const parent = spawn('sh', ['-c', 'sleep 60 & echo $!; exec sleep 60'], { stdio: ['ignore', 'pipe', 'inherit'] })
    try {
      const [said] = (await once(parent.stdout, 'data')) as [Buffer]
      const pid = Number(said.toString())
      const start = readFileSync(`/proc/${pid}/stat`, 'latin1').split(') ')[1]!.split(' ')[19]
      await vi.waitFor(() => expect(readFileSync(`/proc/${parent.pid}/comm`, 'latin1')).toBe('sleep\n'))
      process.kill(pid)
      await vi.waitFor(() => expect(readFileSync(`/proc/${pid}/stat`, 'latin1')).toMatch(/\) Z /))
      expect(processRuns(pid)).toBe(false)
      expect(markedProcess(`${pid} ${start} ${own.split(' ')[2]}`)).toEqual({ pid, running: false })
      expect(processRuns(parent.pid!)).toBe(true)
    } finally {
      parent.kill()
    }
  },
)

test.each(['', 'x', '0 1 a', `${own}\n`, ` ${own}`, `${own} 1`, '12345678901 1 a', '1 1 ../a'])(
  '%j is no mark',
  (text) => {
    expect(markedProcess(text)).toBeUndefined()
  },
)

test('where the system does not tell when a process started, its number has to do', async () => {
  vi.resetModules()
  const readFileSync = (path: string): never => {
    throw Object.assign(new Error(`ENOENT: ${path}`), { code: 'ENOENT' })
  }
  vi.doMock('../src/runtime.ts', () => ({ builtin: () => ({ readFileSync }) }))
  try {
    const elsewhere = await import('../src/process-mark.ts')
    expect(elsewhere.processMark()).toBe(`${process.pid} - -`)
    expect(elsewhere.markedProcess(`${process.pid} - -`)).toEqual({ pid: process.pid, running: true })
    expect(elsewhere.markedProcess(own)).toEqual({ pid: process.pid, running: false })
  } finally {
    vi.doUnmock('../src/runtime.ts')
  }
})
