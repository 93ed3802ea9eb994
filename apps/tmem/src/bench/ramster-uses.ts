/**
 * The cost of remote memory for its users, for `tmem bench ramster`: a program whose pages return from other machines
 * instead of a swap file, and a block device over them. Both are reported without a goal.
 */
import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { mixedCorpus } from '@tmem/codecs/bench'
import { compose, type Layer } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { ramster, valkey } from '@tmem/ramster'
import { Swapper } from '@tmem/swapper'
import { zcache } from '@tmem/zcache'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { comparedByFio, type FioTarget, started } from './fio.ts'
import { type Bench, type Row, ratioRow, skippedRow } from './frame.ts'

const MiB = 2 ** 20
const pageBytes = 4096

/** A server that lends, as far as these rows need one. */
interface Lender {
  readonly port: number
}

const machinesOf = (lenders: readonly Lender[]): ReturnType<typeof valkey>[] =>
  lenders.map(({ port }) => valkey({ host: '127.0.0.1', port }))

/**
 * A program with an eighth of its pages in frames and about half of what they shrink to in zcache: first it writes all
 * of them, then it uses a quarter at a time: the newest and the oldest, which it reads, and one from the middle, of
 * which it writes three in ten. Whole time, with other machines between zcache and a swap file (O_DIRECT), and with the
 * file alone. Every page that is read is compared.
 */
export async function hotSetRow(bench: Bench, lenders: readonly Lender[]): Promise<Row> {
  const pages = bench.quick ? 4096 : 32_768
  const source = mixedCorpus(pages).pages
  const folder = mkdtempSync(join(tmpdir(), 'tmem-bench-ramster-'))
  const limitBytes = (pages / 4) * pageBytes
  let files = 0
  const file = (): Layer => frontswap({ file: join(folder, `swap${files++}`), sizeBytes: pages * pageBytes })
  const machines = (): Layer => ramster({ machines: machinesOf(lenders), sizeBytes: 512 * MiB })
  const program = (below: () => readonly Layer[]) => ({
    run: () => usePages(bench, source, [zcache({ limitBytes }), ...below()]),
  })
  try {
    const ns = await bench.measure(
      'ramster: a program whose pages come back',
      {
        remote: program(() => [machines(), file()]),
        file: program(() => [file()]),
      },
      { operations: 1, rounds: bench.quick ? 1 : 3, warmup: 0 },
    )
    return ratioRow('hot-set', 's', ns.remote / 1e9, 'swap-file-direct', ns.file / 1e9)
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}

async function usePages(bench: Bench, source: readonly Uint8Array[], stack: readonly Layer[]): Promise<void> {
  const pages = source.length
  const store = compose(stack)
  let memory: Swapper | undefined
  try {
    await store.ready?.()
    memory = new Swapper({ pages, frames: pages / 8, store })
    const version = new Uint32Array(pages)
    const now = (page: number): Uint8Array => source[(page + version[page]! * 61) % pages]!
    const into = Buffer.alloc(pageBytes)
    let steps = 0
    const settle = async (): Promise<void> => {
      if (++steps % 256 !== 0) return
      store.tick({ pages: 256 })
      await setImmediate()
      throwIfInterrupted(bench.signal)
    }
    for (let page = 0; page < pages; page++) {
      await memory.write(page, 0, now(page))
      await settle()
    }
    let seed = 12_345
    const random = (): number => {
      seed ^= seed << 13
      seed ^= seed >>> 17
      seed ^= seed << 5
      return (seed >>> 0) / 2 ** 32
    }
    for (const [first, writes] of [
      [pages - pages / 4, 0],
      [0, 0],
      [pages / 2, 0.3],
    ] as const)
      for (let n = 0; n < 2 * pages; n++) {
        const page = first + Math.floor((random() * pages) / 4)
        if (random() < writes) {
          version[page]!++
          const wait = memory.write(page, 0, now(page))
          if (wait !== undefined) await wait
        } else {
          const wait = memory.read(page, 0, into)
          if (wait !== undefined) await wait
          if (into.compare(now(page)) !== 0) throw new Failed(`bench ramster: page ${page} is not what was written`)
        }
        await settle()
      }
  } finally {
    memory?.close()
    await store.close()
  }
}

/** Random reads of a block device whose pages are on other machines, over NBD, against nbdkit's memory. */
export async function nbdRow(bench: Bench, lenders: readonly Lender[]): Promise<Row> {
  const name = 'nbd-read-4k-qd32'
  const missing = ['fio', 'nbdkit'].find((command) => spawnSync(command, ['--version'], { stdio: 'ignore' }).error)
  if (missing !== undefined) return skippedRow(name, `needs the program ${missing}`)
  const folder = mkdtempSync(join(tmpdir(), 'tmem-bench-ramster-'))
  const sizeBytes = (bench.quick ? 32 : 256) * MiB
  const [ours, theirs] = [await freePort(), await freePort()]
  const server = fileURLToPath(new URL('../../dist/bench/nbd-server.js', import.meta.url))
  const sign = (whose: string): string => join(folder, whose)
  const ports = lenders.map(({ port }) => `${port}`)
  const processes: { readonly stop: () => Promise<void> }[] = []
  try {
    const words = [server, 'remote', `${sizeBytes}`, sign('ours'), `${ours}`, ...ports]
    processes.push(await started(process.execPath, words, sign('ours')))
    const nbdkit = ['-f', '-i', '127.0.0.1', '-p', `${theirs}`, '-P', sign('theirs'), 'memory', `${sizeBytes}`]
    processes.push(await started('nbdkit', nbdkit, sign('theirs')))
    const target = (port: number): FioTarget => ({
      words: ['--ioengine=nbd', `--uri=nbd://127.0.0.1:${port}`],
      sizeBytes,
      half: true,
    })
    const [row] = await comparedByFio(bench, {
      ours: target(ours),
      theirs: target(theirs),
      reference: 'nbdkit memory over TCP',
      loads: [{ name, kind: 'read', random: true, blockBytes: pageBytes, depth: 32 }],
      rounds: bench.quick ? 3 : 7,
    })
    return row!
  } finally {
    for (const { stop } of processes) await stop()
    rmSync(folder, { recursive: true, force: true })
  }
}

/** A port that nobody listens on. */
async function freePort(): Promise<number> {
  const probe = createServer().listen(0, '127.0.0.1')
  await new Promise((resolve) => probe.once('listening', resolve))
  const address = probe.address()
  await new Promise((resolve) => probe.close(resolve))
  if (address === null || typeof address === 'string') throw new Failed('bench ramster: no port is free')
  return address.port
}

/** Names of the rows. */
export const useNames: readonly string[] = Object.freeze(['hot-set', 'nbd-read-4k-qd32'])
