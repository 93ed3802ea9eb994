import { expect, test } from 'vitest'
import { HistoryFailure, runHistory, simulate, Workshop } from '../src/index.ts'
import { planted } from './planted.ts'
import { found } from './seeds.ts'

test('a history is the same each time, in the last detail', async () => {
  const workshop = new Workshop()
  const linesOf = async (history: number): Promise<readonly string[]> => {
    const lines: string[] = []
    const report = await runHistory(9, history, { workshop, trace: (line) => lines.push(line) })
    return [...lines, JSON.stringify(report)]
  }
  const first = [await linesOf(1), await linesOf(2), await linesOf(3)]
  // In another order, in memory that others have used.
  expect([await linesOf(3), await linesOf(1), await linesOf(2)]).toEqual([first[2], first[0], first[1]])
  expect(first[0]).not.toEqual(first[1])
})

test('a run of some hundred histories finds no wrong answer, and no promise that nobody handles', async () => {
  const report = await simulate({ seed: 2, histories: 300 })
  expect(report.failure).toBeUndefined()
  expect(report).toMatchObject({ seed: 2, histories: 300 })
  // Every kind of fault has happened.
  expect(Object.entries(report.faults).filter(([, times]) => times === 0)).toEqual([])
})

test('a wrong answer names its history, which gives it again', async () => {
  const bug = planted.find(({ name }) => name.startsWith('a flush leaves'))!
  const undo = bug.plant()
  try {
    const { failure, histories } = await simulate({ seed: 1, first: bug.first })
    expect(failure).toBeDefined()
    expect(failure!.history).toBe(bug.first + histories - 1)
    const { message, operation } = failure!
    const again = await simulate({ seed: 1, first: failure!.history, histories: 1 })
    expect(again.failure).toMatchObject({ message, operation })
  } finally {
    undo()
  }
})

test('what stops a history is its cause', async () => {
  const undo = planted[0]!.plant()
  try {
    const { failure } = await simulate({ seed: 1, first: planted[0]!.first })
    const error: unknown = await runHistory(1, failure!.history).catch((reason: unknown) => reason)
    expect(error).toBeInstanceOf(HistoryFailure)
    expect(error).toMatchObject({ seed: 1, history: failure!.history, operation: failure!.operation })
  } finally {
    undo()
  }
})

test('a run ends when it is told to', async () => {
  const ending = new AbortController()
  const reports: number[] = []
  const report = await simulate({
    seed: 3,
    signal: ending.signal,
    onProgress: ({ histories }) => {
      reports.push(histories)
      ending.abort()
    },
  })
  expect(report.histories).toBe(reports[0]! + 1)
  expect(await simulate({ seed: 3, seconds: 0 })).toMatchObject({ histories: 0, operations: 0 })
})

test.each(found)('once wrong: $what', async ({ seed, history }) => {
  await expect(runHistory(seed, history)).resolves.toBeDefined()
})
