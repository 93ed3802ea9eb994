/**
 * The common frame of all bench suites: it measures tmem and a reference in the same run, and makes the rows of the
 * answer.
 *
 * Method: the compared functions run in turns, round by round, so that other work of the machine hits all of them. The
 * one that begins changes from round to round; the first rounds warm up and do not count; a figure is the median of its
 * rounds. A measured function runs all operations of a round in its own loop, without any code of the frame.
 */
import { cpus, release, totalmem } from 'node:os'
import { setImmediate } from 'node:timers/promises'
import { throwIfInterrupted } from '../ending.ts'
import type { Progress, Terminal } from '../terminal.ts'

/** A row of the answer. Names as in the JSON document: a contract. */
export type Row = MeasuredRow | SkippedRow

/** A figure, and what it is compared with. */
export interface MeasuredRow {
  /** Stable name, e.g. `put-new-4k-100k`. */
  readonly name: string
  /** Of `value` and `reference_value`, e.g. `ns/page`. Smaller is better. */
  readonly unit: string
  readonly value: number
  /** What was measured in the same run, e.g. `buffer-copy`. */
  readonly reference?: string
  readonly reference_value?: number
  /** `value / reference_value`: below 1 means that we are cheaper. */
  readonly ratio?: number
  /** The largest ratio, or without a reference the largest value, that is good enough. */
  readonly goal?: number
  readonly met?: boolean
}

/** A row that cannot be measured on this machine. */
export interface SkippedRow {
  readonly name: string
  /** Why, in words. */
  readonly skipped: string
}

/** A figure against a reference of the same run. */
export function ratioRow(
  name: string,
  unit: string,
  value: number,
  reference: string,
  referenceValue: number,
  goal?: number,
): MeasuredRow {
  const ratio = value / referenceValue
  const row = {
    name,
    unit,
    value: rounded(value),
    reference,
    reference_value: rounded(referenceValue),
    ratio: rounded(ratio),
  }
  return goal === undefined ? row : { ...row, goal, met: ratio <= goal }
}

/** A figure that stands for itself, e.g. bytes per page; `goal` is the largest that is good enough. */
export function valueRow(name: string, unit: string, value: number, goal?: number): MeasuredRow {
  const row = { name, unit, value: rounded(value) }
  return goal === undefined ? row : { ...row, goal, met: value <= goal }
}

/** A row that cannot be measured here. */
export function skippedRow(name: string, reason: string): SkippedRow {
  return { name, skipped: reason }
}

const rounded = (value: number): number => Number(value.toPrecision(4))

/** One of the functions that are compared. */
export interface Subject {
  /** Does `operations` operations in its own loop. A promise is awaited within the measured time. */
  readonly run: (operations: number) => void | Promise<void>
  /** Brings things into the state in which `run` begins, before each round and outside of the measured time. */
  readonly prepare?: (operations: number) => void | Promise<void>
}

/** How much is measured. */
export interface MeasureOptions {
  /** Operations of each subject in each round. */
  readonly operations: number
  /** Rounds that are counted; odd. By default 9, or 3 in a quick run. */
  readonly rounds?: number
  /**
   * Rounds before, which are not counted: until the runtime has compiled what is measured (default 5, or 1 in a quick
   * run).
   */
  readonly warmup?: number
}

/** What a suite gets. */
export interface Bench {
  /** True: about a tenth of the work; figures are rougher. */
  readonly quick: boolean
  readonly signal: AbortSignal
  /** Shows how far a part of the work is that is counted, not measured in rounds. */
  progress(label: string): Progress
  /** Median nanoseconds per operation of each subject, measured in turns. `label` is shown meanwhile. */
  measure<Name extends string>(
    label: string,
    subjects: Readonly<Record<Name, Subject>>,
    options: MeasureOptions,
  ): Promise<Record<Name, number>>
}

/** A set of rows that belong together: `tmem bench NAME`. */
export interface Suite {
  readonly name: string
  readonly summary: string
  run(bench: Bench): Promise<readonly Row[]>
}

/** What a suite runs in. `now` is a clock in milliseconds. */
export function createBench(terminal: Terminal, quick: boolean, now: () => number = () => performance.now()): Bench {
  return {
    quick,
    signal: terminal.signal,
    progress: (label) => terminal.progress(label),
    async measure(label, subjects, { operations, rounds = quick ? 3 : 9, warmup = quick ? 1 : 5 }) {
      const names = Object.keys(subjects) as (keyof typeof subjects)[]
      const taken = Object.fromEntries(names.map((name) => [name, [] as number[]])) as Record<
        keyof typeof subjects,
        number[]
      >
      const progress = terminal.progress(label)
      try {
        for (let round = 0; round < warmup + rounds; round++) {
          for (let turn = 0; turn < names.length; turn++) {
            const name = names[(turn + round) % names.length]!
            const subject = subjects[name]
            await subject.prepare?.(operations)
            const start = now()
            const running = subject.run(operations)
            if (running !== undefined) await running
            const elapsed = now() - start
            if (round >= warmup) taken[name].push((elapsed * 1e6) / operations)
            progress.at(round * names.length + turn + 1, (warmup + rounds) * names.length)
            // Lets signals come in.
            await setImmediate()
            throwIfInterrupted(terminal.signal)
          }
        }
        const medians = names.map((name) => [name, median(taken[name])] as const)
        progress.done(medians.map(([name, value]) => `${String(name)} ${rounded(value)} ns`).join(', '))
        return Object.fromEntries(medians) as Record<keyof typeof subjects, number>
      } finally {
        progress.end()
      }
    },
  }
}

/**
 * Does a part of the work that is not measured in rounds, and shows how far it is. `act` gets what is told of that, and
 * answers what the part came to, with that in a few words.
 */
export async function shownPart<Result>(
  bench: Bench,
  label: string,
  act: (at: Progress['at']) => Promise<readonly [Result, string]>,
): Promise<Result> {
  const progress = bench.progress(label)
  try {
    const [value, words] = await act((done, total) => progress.at(done, total))
    progress.done(words)
    return value
  } finally {
    progress.end()
  }
}

/** The middle value; of an even number of values the mean of the two in the middle. */
export function median(values: readonly number[]): number {
  if (values.length === 0) throw new RangeError('the median of nothing')
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2
}

/** What was measured on, as far as it matters for figures. */
export interface MachineDescription {
  readonly cpu: string
  readonly cores: number
  readonly memoryBytes: number
  readonly platform: string
  readonly arch: string
  readonly kernel: string
  readonly node: string
  readonly v8: string
}

/** Describes this machine. */
export function describeMachine(): MachineDescription {
  const cores = cpus()
  return {
    cpu: cores[0]?.model.trim() ?? 'unknown',
    cores: cores.length,
    memoryBytes: totalmem(),
    platform: process.platform,
    arch: process.arch,
    kernel: release(),
    node: process.version,
    v8: process.versions.v8,
  }
}
