/**
 * `tmem bench nbd`: our NBD server against nbdkit, both driven by fio over a unix socket in the same run.
 *
 * Plain memory is `memoryDevice` against nbdkit's memory plugin. Compressed is ramzswap over zcache against the same plugin with
 * `allocator=zstd`; fio then writes blocks of which about half is random and half is zeros. All devices are written once before
 * anything is measured, and fio's own figures are taken: its start is in none of them. Each server has a process of its own.
 */
import { spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { type Bench, median, type Row, ratioRow, type Suite, skippedRow } from './frame.ts'

/** The suite. */
export const nbd: Suite = {
  name: 'nbd',
  summary: 'block devices over NBD on a unix socket, driven by fio, against nbdkit',
  run: nbdRows,
}

const deviceBytes = 256 * 2 ** 20

/** What fio does: a row. */
interface Load {
  readonly name: string
  readonly kind: 'read' | 'write'
  readonly random: boolean
  readonly blockBytes: number
  readonly depth: number
  /** Largest ratio of our cost to theirs. */
  readonly goal: number
}

const random = { random: true, blockBytes: 4096 } as const
const sequential = { random: false, blockBytes: 2 ** 20, depth: 4, goal: 1.1 } as const
const plainLoads: readonly Load[] = Object.freeze([
  { name: 'plain-read-4k-qd32', kind: 'read', ...random, depth: 32, goal: 0.7 },
  { name: 'plain-write-4k-qd32', kind: 'write', ...random, depth: 32, goal: 0.85 },
  { name: 'plain-read-4k-qd1', kind: 'read', ...random, depth: 1, goal: 1.1 },
  { name: 'plain-write-4k-qd1', kind: 'write', ...random, depth: 1, goal: 1.2 },
  { name: 'plain-read-1m', kind: 'read', ...sequential },
  { name: 'plain-write-1m', kind: 'write', ...sequential },
])
const compressedLoads: readonly Load[] = Object.freeze([
  { name: 'compressed-write-4k-qd32', kind: 'write', ...random, depth: 32, goal: 0.15 },
  { name: 'compressed-write-4k-qd1', kind: 'write', ...random, depth: 1, goal: 0.4 },
  { name: 'compressed-read-4k-qd32', kind: 'read', ...random, depth: 32, goal: 0.8 },
])

async function nbdRows(bench: Bench): Promise<Row[]> {
  const missing = ['fio', 'nbdkit'].find((command) => spawnSync(command, ['--version'], { stdio: 'ignore' }).error)
  if (missing !== undefined)
    return [...plainLoads, ...compressedLoads].map(({ name }) => skippedRow(name, `needs the program ${missing}`))
  const folder = mkdtempSync(join(tmpdir(), 'tmem-bench-nbd-'))
  try {
    return [
      ...(await compared(bench, folder, 'plain', 'nbdkit memory', [], plainLoads)),
      ...(await compared(bench, folder, 'compressed', 'nbdkit memory zstd', ['allocator=zstd'], compressedLoads)),
    ]
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

/** Runs the loads on both servers in turns. */
async function compared(
  bench: Bench,
  folder: string,
  kind: 'plain' | 'compressed',
  reference: string,
  settings: readonly string[],
  loads: readonly Load[],
): Promise<Row[]> {
  const ours = join(folder, `${kind}.sock`)
  const theirs = join(folder, `${kind}-nbdkit.sock`)
  const server = new URL('./nbd-server.js', import.meta.url)
  const processes = [
    await started(process.execPath, [server.pathname, kind, String(deviceBytes), ours], ours),
    await started('nbdkit', ['-f', '-U', theirs, 'memory', String(deviceBytes), ...settings], theirs),
  ]
  try {
    const rows: Row[] = []
    const filled: Load = { name: 'fill', kind: 'write', random: false, blockBytes: 2 ** 20, depth: 4, goal: 0 }
    for (const socket of [ours, theirs]) await fio(socket, filled, kind, undefined)
    const rounds = bench.quick ? 3 : 7
    const seconds = bench.quick ? 0.5 : 1.5
    for (const load of loads) {
      const taken: [number[], number[]] = [[], []]
      for (let round = 0; round < rounds; round++)
        for (const turn of round % 2 === 0 ? [0, 1] : [1, 0]) {
          throwIfInterrupted(bench.signal)
          taken[turn]!.push(await fio(turn === 0 ? ours : theirs, load, kind, seconds))
        }
      rows.push(ratioRow(load.name, 'ns/request', median(taken[0]), reference, median(taken[1]), load.goal))
    }
    return rows
  } finally {
    for (const stop of processes) await stop()
  }
}

/** Starts a server and waits until its socket is there; returns what ends it. */
async function started(command: string, words: readonly string[], socket: string): Promise<() => Promise<void>> {
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
  for (let tries = 0; !existsSync(socket); tries++) {
    if (over || tries > 200) {
      await stop()
      throw new Failed(`${command} did not start: ${said.trim()}`)
    }
    await setTimeout(50)
  }
  return stop
}

/** Nanoseconds per request. Without `seconds`: once over the whole device. */
async function fio(socket: string, load: Load, kind: string, seconds: number | undefined): Promise<number> {
  const words = [
    '--name=bench',
    '--ioengine=nbd',
    `--uri=nbd+unix:///?socket=${socket}`,
    `--rw=${load.random ? 'rand' : ''}${load.kind}`,
    `--bs=${load.blockBytes}`,
    `--iodepth=${load.depth}`,
    `--size=${deviceBytes}`,
    '--randseed=1',
    '--norandommap',
    '--output-format=json',
    ...(kind === 'compressed' ? ['--buffer_compress_percentage=50', '--buffer_compress_chunk=4096'] : []),
    ...(kind === 'compressed' ? ['--refill_buffers'] : []),
    ...(seconds === undefined ? [] : ['--time_based', `--runtime=${Math.ceil(seconds * 1000)}ms`, '--ramp_time=200ms']),
  ]
  const child = spawn('fio', words, { stdio: ['ignore', 'pipe', 'pipe'] })
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
  if (!(iops > 0)) throw new Failed(`fio did nothing: ${load.name}`)
  return 1e9 / iops
}

/** What is used of fio's JSON document. */
interface FioAnswer {
  readonly jobs: readonly { readonly read: { readonly iops: number }; readonly write: { readonly iops: number } }[]
}
