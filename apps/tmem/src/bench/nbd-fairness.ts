/**
 * How long a client that asks for little waits beside one that asks for all it can get: the 99th percentile of its 4
 * KiB reads, one each millisecond, alone and beside each hostile pattern, in turns in the same run: each round measures
 * it alone once, and then beside each of them.
 *
 * Server, hostile client and the light one each have a process of their own. The device is ramzswap over zcache, 1 GiB,
 * of which the first 64 MiB are written.
 *
 * What is measured is the server. A hostile client that sends large writes uses a processor of its own, and on two
 * processors the light client then waits for the system's turns: 11.9 times as long, where 1.1 is what the server
 * takes. So server and light client have a processor as soon as they want one (SCHED_FIFO, chrt), and the hostile
 * client what is left. Where that may not be set, those turns are in the figures.
 */
import { spawn, spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { started } from './fio.ts'
import { type Bench, median, type Row, ratioRow, shownPart } from './frame.ts'
import { BenchClient, hostilePatterns } from './nbd-client.ts'

const deviceBytes = 2 ** 30
const writtenBytes = 2 ** 26
const pageBytes = 4096
/** Beside a hostile client at most so many times the 99th percentile alone. */
const goal = 10

/** Rows `fairness-PATTERN`, in microseconds. */
export async function fairnessRows(bench: Bench): Promise<Row[]> {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-bench-nbd-'))
  const socket = join(folder, 'fairness.sock')
  const server = fileURLToPath(new URL('./nbd-server.js', import.meta.url))
  const process_ = await started(process.execPath, [server, 'compressed', String(deviceBytes), socket], socket)
  const isAhead = comesFirst(process_.pid, 10) && comesFirst(process.pid, 20)
  try {
    const light = await BenchClient.connect(socket)
    const page = new Uint8Array(2 ** 18)
    for (let at = 0; at < page.length; at++) page[at] = at % 2 === 0 ? Math.imul(at, 2654435761) >>> 24 : 0
    for (let at = 0; at < writtenBytes; at += page.length) await light.write(at, page)
    const reads = bench.quick ? 300 : 1000
    await latencies(light, reads)
    const patterns = Object.keys(hostilePatterns)
    const rounds = bench.quick ? 3 : 5
    const rows = await shownPart(bench, 'fairness', async (at) => {
      const alone: number[] = []
      const besides = patterns.map((): number[] => [])
      for (let round = 0; round < rounds; round++) {
        alone.push(await latencies(light, reads))
        for (const [n, pattern] of patterns.entries()) {
          besides[n]!.push(await beside(socket, pattern, () => latencies(light, reads)))
          at(round * patterns.length + n + 1, rounds * patterns.length)
          throwIfInterrupted(bench.signal)
        }
      }
      const each = patterns.map((pattern, n) =>
        ratioRow(`fairness-${pattern}`, 'us p99', median(besides[n]!), 'alone', median(alone), goal),
      )
      return [
        each,
        `${isAhead ? '' : 'with the turns of the system: '}alone ${median(alone).toFixed()} us p99, beside hostile ${each.map(({ value }) => value.toFixed()).join(', ')}`,
      ]
    })
    light.close()
    return rows
  } finally {
    if (isAhead) spawnSync('chrt', ['--all-tasks', '--other', '--pid', '0', String(process.pid)])
    await process_.stop()
    rmSync(folder, { recursive: true, force: true })
  }
}

/**
 * Whether a process has a processor as soon as it wants one from now on; its children have not. All of its threads: the
 * garbage collector's are waited for.
 */
const comesFirst = (pid: number, priority: number): boolean =>
  spawnSync('chrt', ['--all-tasks', '--reset-on-fork', '--fifo', '--pid', String(priority), String(pid)]).status === 0

/** Runs `measure` while a hostile client in a process of its own is at work. */
async function beside(socket: string, pattern: string, measure: () => Promise<number>): Promise<number> {
  const program = fileURLToPath(new URL('./nbd-hostile.js', import.meta.url))
  const child = spawn(process.execPath, [program, socket, pattern], { stdio: ['ignore', 'pipe', 'inherit'] })
  const ended = new Promise<void>((resolve) => {
    child.once('exit', () => resolve())
  })
  try {
    const begun = await Promise.race([
      new Promise<boolean>((resolve) => child.stdout.once('data', () => resolve(true))),
      ended.then(() => false),
    ])
    if (!begun) throw new Failed(`bench nbd: the hostile client for ${pattern} ended`)
    // Until all that it may have under way is under way.
    await setTimeout(200)
    return await measure()
  } finally {
    child.kill('SIGKILL')
    await ended
  }
}

/** The 99th percentile of so many reads, in microseconds. */
async function latencies(light: BenchClient, reads: number): Promise<number> {
  const taken: number[] = []
  for (let n = 0; n < reads; n++) {
    const began = performance.now()
    await light.read((n * 64 * pageBytes) % writtenBytes, pageBytes)
    taken.push((performance.now() - began) * 1000)
    await setTimeout(1)
  }
  return taken.sort((a, b) => a - b)[Math.floor(reads * 0.99)]!
}
