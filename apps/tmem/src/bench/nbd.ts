/**
 * `tmem bench nbd`: our NBD server against nbdkit, both driven by fio over a unix socket in the same run.
 *
 * Plain memory is `memoryDevice` against nbdkit's memory plugin. Compressed is ramzswap over zcache against the same
 * plugin with `allocator=zstd`; fio then writes blocks of which about half is random and half is zeros. All devices are
 * written once before anything is measured, and fio's own figures are taken: its start is in none of them. Each server
 * has a process of its own. How fair ours is to a client beside a hostile one is measured in nbd-fairness.ts.
 */
import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { mixedCorpus } from '@tmem/codecs/bench'
import { frontswap } from '@tmem/frontswap'
import { ramzswap } from '@tmem/ramzswap'
import { zcache } from '@tmem/zcache'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { comparedByFio, type FioTarget, type LoadRow, started } from './fio.ts'
import { type Bench, type Row, ratioRow, type Suite, skippedRow } from './frame.ts'
import { guestRows } from './guest.ts'
import { fairnessRows } from './nbd-fairness.ts'
import { zramBytes } from './zram-use.ts'

/** The suite. */
export const nbd: Suite = {
  name: 'nbd',
  summary: 'block devices over NBD on a unix socket, driven by fio, against nbdkit',
  run: nbdRows,
}

const deviceBytes = 256 * 2 ** 20

const random = { random: true, blockBytes: 4096 } as const
const sequential = { random: false, blockBytes: 2 ** 20, depth: 4, goal: 1.1 } as const
const plainLoads: readonly LoadRow[] = Object.freeze([
  { name: 'plain-read-4k-qd32', kind: 'read', ...random, depth: 32, goal: 0.7 },
  { name: 'plain-write-4k-qd32', kind: 'write', ...random, depth: 32, goal: 0.85 },
  { name: 'plain-read-4k-qd1', kind: 'read', ...random, depth: 1, goal: 1.1 },
  { name: 'plain-write-4k-qd1', kind: 'write', ...random, depth: 1, goal: 1.2 },
  { name: 'plain-read-1m', kind: 'read', ...sequential },
  { name: 'plain-write-1m', kind: 'write', ...sequential },
])
const compressedLoads: readonly LoadRow[] = Object.freeze([
  { name: 'compressed-write-4k-qd32', kind: 'write', ...random, depth: 32, goal: 0.15 },
  { name: 'compressed-write-4k-qd1', kind: 'write', ...random, depth: 1, goal: 0.4 },
  { name: 'compressed-read-4k-qd32', kind: 'read', ...random, depth: 32, goal: 0.8 },
])

async function nbdRows(bench: Bench): Promise<Row[]> {
  return [...(await fioRows(bench)), ...(await fairnessRows(bench)), ...(await guestRows(bench))]
}

async function fioRows(bench: Bench): Promise<Row[]> {
  return [...(await serverRows(bench)), ...(await corpusRows(bench))]
}

/** What fio measures. */
export async function serverRows(bench: Bench): Promise<Row[]> {
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

/**
 * Memory for the pages of `tmem bench zcache` on a device: zcache, which keeps also what does not shrink, over a file,
 * which gets nothing. The kernel does not count zram's tables of pages and handles, our stores count theirs: the chunks
 * alone compare like with like.
 */
async function corpusRows(bench: Bench): Promise<Row[]> {
  const name = 'compressed-bytes-for-corpus'
  const { bytes, pageBytes } = mixedCorpus(bench.quick ? 32_768 : 49_152)
  const zram = zramBytes(bytes)
  if (typeof zram === 'string') return [skippedRow(name, zram)]
  const sizeBytes = bytes.length
  const folder = mkdtempSync(join(tmpdir(), 'tmem-bench-nbd-'))
  const device = ramzswap({
    name: 'corpus',
    sizeBytes,
    stack: [zcache({ limitBytes: sizeBytes }), frontswap({ file: join(folder, 'backing'), sizeBytes })],
  })
  try {
    const into = new Uint8Array(pageBytes)
    for (let at = 0; at < sizeBytes; at += 256 * pageBytes) {
      await device.write(at, bytes.subarray(at, at + 256 * pageBytes))
      await setImmediate()
      throwIfInterrupted(bench.signal)
    }
    const { mem_used_total, bdev_num_writes } = device.ramzswapStats()
    if (bdev_num_writes > 0) throw new Failed(`bench nbd: ${bdev_num_writes} pages went to the file`)
    for (let at = 0; at < sizeBytes; at += pageBytes) {
      await device.read(at, into)
      if (Buffer.compare(into, bytes.subarray(at, at + pageBytes)) !== 0)
        throw new Failed(`bench nbd: the page at ${at} is not what was written`)
    }
    const chain = device.stats().children.find(({ name: section }) => section === 'chain')!
    const tables = chain.children.find(({ name: place }) => place === 'zcache')!.counters
    const reference = 'zram-lz4-mem-used-total'
    return [
      ratioRow(name, 'bytes', mem_used_total, reference, zram, 1),
      ratioRow('compressed-chunks-for-corpus', 'bytes', mem_used_total - tables['metadata_bytes']!, reference, zram),
    ]
  } finally {
    await device.close()
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
  loads: readonly LoadRow[],
): Promise<Row[]> {
  const ours = join(folder, `${kind}.sock`)
  const theirs = join(folder, `${kind}-nbdkit.sock`)
  const server = fileURLToPath(new URL('./nbd-server.js', import.meta.url))
  const processes = [
    await started(process.execPath, [server, kind, String(deviceBytes), ours], ours),
    await started('nbdkit', ['-f', '-U', theirs, 'memory', String(deviceBytes), ...settings], theirs),
  ]
  try {
    const target = (socket: string): FioTarget => ({
      words: ['--ioengine=nbd', `--uri=nbd+unix:///?socket=${socket}`],
      sizeBytes: deviceBytes,
      half: kind === 'compressed',
    })
    const rounds = bench.quick ? 3 : 7
    return await comparedByFio(bench, { ours: target(ours), theirs: target(theirs), reference, loads, rounds })
  } finally {
    for (const { stop } of processes) await stop()
  }
}
