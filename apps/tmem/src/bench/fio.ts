/**
 * fio, whose own figures are taken: its start and its end are in none of them. And servers in processes of their own,
 * for it to measure.
 */
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { setTimeout } from 'node:timers/promises'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { type Bench, median, type Row, ratioRow, shownPart } from './frame.ts'

/** What fio does to a device. */
interface Load {
  readonly kind: 'read' | 'write'
  readonly random: boolean
  readonly blockBytes: number
  /** Requests under way at once. */
  readonly depth: number
}

/** On what, and for how long. */
export interface FioTarget {
  /** Parameters that name the engine and the file or export. */
  readonly words: readonly string[]
  readonly sizeBytes: number
  /** What is written: noise, or in each page about half noise and half zeros. */
  readonly half: boolean
  /** Without it: once over the whole device. */
  readonly seconds?: number
}

/** Nanoseconds per request. Rejects with `Failed` and what fio said. */
async function fio(load: Load, { words, sizeBytes, half, seconds }: FioTarget): Promise<number> {
  const child = spawn(
    'fio',
    [
      '--name=bench',
      ...words,
      `--rw=${load.random ? 'rand' : ''}${load.kind}`,
      `--bs=${load.blockBytes}`,
      `--iodepth=${load.depth}`,
      `--size=${sizeBytes}`,
      '--randseed=1',
      '--norandommap',
      '--output-format=json',
      ...(half ? ['--buffer_compress_percentage=50', '--buffer_compress_chunk=4096', '--refill_buffers'] : []),
      ...(seconds === undefined
        ? []
        : ['--time_based', `--runtime=${Math.ceil(seconds * 1000)}ms`, '--ramp_time=200ms']),
    ],
    { stdio: ['ignore', 'pipe', 'pipe'] },
  )
  let output = ''
  let complaint = ''
  child.stdout.on('data', (text: Buffer) => {
    output += text.toString()
  })
  child.stderr.on('data', (text: Buffer) => {
    complaint += text.toString()
  })
  const status = await new Promise<number | null>((resolve) => {
    child.once('close', resolve)
  })
  if (status !== 0) throw new Failed(`fio failed (status ${status}): ${complaint.trim().split('\n').at(-1) ?? ''}`)
  // Before the document fio may have printed a note.
  const answer = JSON.parse(output.slice(output.indexOf('{'))) as FioAnswer
  const { iops } = answer.jobs[0]![load.kind]
  if (!(iops > 0)) throw new Failed(`fio did nothing: ${words.join(' ')}`)
  return 1e9 / iops
}

/** A load that makes a row. */
export interface LoadRow extends Load {
  readonly name: string
  /** Largest ratio of our cost to theirs. */
  readonly goal?: number
}

/** Whom fio measures, and how. */
export interface Comparison {
  readonly ours: FioTarget
  readonly theirs: FioTarget
  /** Name of theirs. */
  readonly reference: string
  readonly loads: readonly LoadRow[]
  readonly rounds: number
}

const filling: Load = { kind: 'write', random: false, blockBytes: 2 ** 20, depth: 4 }

/** Writes both once over, then runs each load on both in turns: rows of medians, in nanoseconds per request. */
export async function comparedByFio(
  bench: Bench,
  { ours, theirs, reference, loads, rounds }: Comparison,
): Promise<Row[]> {
  const targets = [ours, theirs] as const
  for (const target of targets) await fio(filling, target)
  // What a machine does meanwhile comes and goes in seconds: many short rounds meet it more evenly than a few long
  // ones.
  const seconds = bench.quick ? 0.5 : 0.7
  const rows: Row[] = []
  for (const load of loads)
    rows.push(
      await shownPart(bench, `fio: ${load.name}`, async (at) => {
        const taken: [number[], number[]] = [[], []]
        for (let round = 0; round < rounds; round++)
          for (const turn of round % 2 === 0 ? ([0, 1] as const) : ([1, 0] as const)) {
            throwIfInterrupted(bench.signal)
            taken[turn].push(await fio(load, { ...targets[turn], seconds }))
            at(taken[0].length + taken[1].length, 2 * rounds)
          }
        const row = ratioRow(load.name, 'ns/request', median(taken[0]), reference, median(taken[1]), load.goal)
        return [row, `${row.value} ns/request, ${reference} ${row.reference_value}`]
      }),
    )
  return rows
}

/** What is used of fio's JSON document. */
interface FioAnswer {
  readonly jobs: readonly { readonly read: { readonly iops: number }; readonly write: { readonly iops: number } }[]
}

/** A server in a process of its own. */
export interface Started {
  readonly pid: number
  /** Ends it with SIGTERM, and waits. */
  readonly stop: () => Promise<void>
}

/** Starts a server and waits until the file by which it can be reached is there. */
export async function started(command: string, words: readonly string[], sign: string): Promise<Started> {
  const child = spawn(command, words, { stdio: ['ignore', 'ignore', 'pipe'] })
  let said = ''
  child.stderr.on('data', (text: Buffer) => {
    said += text.toString()
  })
  let over = false
  const ended = new Promise<void>((resolve) => {
    const end = (): void => {
      over = true
      resolve()
    }
    child.once('exit', end)
    child.once('error', end)
  })
  const stop = async (): Promise<void> => {
    if (!over) child.kill('SIGTERM')
    await ended
  }
  for (let tries = 0; !existsSync(sign); tries++) {
    if (over || tries > 200) {
      await stop()
      throw new Failed(`${command} did not start: ${said.trim()}`)
    }
    await setTimeout(50)
  }
  return { pid: child.pid!, stop }
}
