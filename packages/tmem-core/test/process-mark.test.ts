import { spawn } from 'node:child_process'
import { expect, test, vi } from 'vitest'
import { markedProcess, processMark } from '../src/index.ts'

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

test.each(['', 'x', '0 1 a', `${own}\n`, ` ${own}`, `${own} 1`, '12345678901 1 a', '1 1 ../a'])(
  '%j is no mark',
  (text) => {
    expect(markedProcess(text)).toBeUndefined()
  },
)

test('where the system does not tell when a process started, its number has to do', async () => {
  vi.resetModules()
  vi.doMock('node:fs', () => ({
    readFileSync: (path: string) => {
      throw Object.assign(new Error(`ENOENT: ${path}`), { code: 'ENOENT' })
    },
  }))
  try {
    const elsewhere = await import('../src/process-mark.ts')
    expect(elsewhere.processMark()).toBe(`${process.pid} - -`)
    expect(elsewhere.markedProcess(`${process.pid} - -`)).toEqual({ pid: process.pid, running: true })
    expect(elsewhere.markedProcess(own)).toEqual({ pid: process.pid, running: false })
  } finally {
    vi.doUnmock('node:fs')
  }
})
