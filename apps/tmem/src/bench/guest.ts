/**
 * A Linux guest in QEMU that swaps to us: what it runs, the server it swaps to, and the rows of `tmem bench nbd` about
 * it.
 *
 * The guest has 128 MiB; a program in it uses 200 MiB in no order and verifies them. Ours is `tmem serve` on a unix
 * socket, zcache over a file; the reference is the same guest with a raw image on the same tmpfs as our file, and a
 * second one nbdkit's plain memory, which has the way through QEMU's NBD client in common with us. What is compared is
 * the time from the start of QEMU to its end. A run whose program found one wrong byte, or that did not end, is a
 * failure, not a figure.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { basePageSize, type StatsNode } from '@tmem/core'
import { compileHog, findKernel, type GuestDrive, initramfs, type Kernel, runGuest } from '@tmem/guest'
import { makeSwapDirectory } from '../demo/swap-files.ts'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { type Answers, ask } from '../serve/control.ts'
import { started } from './fio.ts'
import { type Bench, type Row, ratioRow, type Subject, skippedRow } from './frame.ts'

const mebibyte = 2 ** 20
const deviceBytes = 256 * mebibyte
/** What a guest has, and what its program uses, both in MiB. Its kernel keeps about 57 MiB for itself. */
export interface GuestSize {
  readonly memory: number
  readonly hog: number
}
/** That of the rows. */
export const fullSize: GuestSize = Object.freeze({ memory: 128, hog: 200 })
const memoryBytes = fullSize.memory * mebibyte
const timeoutMs = 300_000
/** How long the guest waits for the next server. */
export const reconnectSeconds = 60
const tmpfs = '/dev/shm'

/** What a guest is made of. */
interface Parts {
  readonly kernel: Kernel
  readonly busybox: string
}

const unpacked: string = fileURLToPath(new URL('../../../../.cache/debian/', import.meta.url))
const cloudKernel = 'linux-image-cloud-amd64'

/** What a checkout has for guests (tools/debian-packages.json), or in words what is missing. */
function guestParts(kernelPackage: string = cloudKernel): Parts | string {
  const busybox = join(unpacked, 'busybox-static/bin/busybox')
  const kernel = findKernel(join(unpacked, kernelPackage))
  if (kernel === undefined) return `needs the package ${cloudKernel}, as npm test unpacks it`
  if (!existsSync(busybox)) return 'needs the package busybox-static, as npm test unpacks it'
  const programs = ['qemu-system-x86_64', 'setpriv', 'cc']
  const missing = programs.find((name) => !has(name))
  return missing === undefined ? { kernel, busybox } : `needs the program ${missing}`
}

const has = (program: string): boolean => spawnSync(program, ['--version'], { stdio: 'ignore' }).error === undefined

/** What came of a run. */
export interface SwapRun {
  /**
   * The exit code of the program (0: every byte was right) or of what failed before or after it, or how the guest ended
   * instead.
   */
  readonly exit: number | 'died' | 'timeout'
  readonly console: string
  readonly seconds: number
  /** Pages of 4 KiB that the guest's kernel has read from swap, and written there. */
  readonly swapIns: number
  readonly swapOuts: number
}

/**
 * What the guest does. The kernel discards what it has freed only where it takes the drive for one that does not
 * rotate, and swapoff waits until it has done so.
 */
export const swapScript: string = scriptAfter('')

function scriptAfter(preparation: string, mebibytes: number = fullSize.hog): string {
  return `
set -e
echo 0 >/sys/block/vda/queue/rotational
${preparation}mkswap /dev/vda
swapon -d /dev/vda
set +e
hog ${mebibytes} ROUNDS
code=$?
swapoff /dev/vda || exit 9
grep -E '^pswp(in|out) ' /proc/vmstat
exit $code
`
}

/** Runs a guest that swaps to the drive. Rejects when aborted. */
type SwappingGuest = (drive: GuestDrive, signal?: AbortSignal) => Promise<SwapRun>

/** Returns what runs the guest on a drive, or in words what this machine lacks. */
export function swappingGuest(rounds: number, { memory, hog }: GuestSize = fullSize): SwappingGuest | string {
  const parts = guestParts()
  return typeof parts === 'string' ? parts : guestOf(parts, scriptAfter('', hog), rounds, memory * mebibyte)
}

function guestOf(parts: Parts, script: string, rounds: number, memoryBytes: number): SwappingGuest {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-hog-'))
  let root: Uint8Array
  try {
    const hog = join(folder, 'hog')
    compileHog(hog)
    const files = [{ path: 'bin/hog', data: readFileSync(hog), mode: 0o755 }]
    root = initramfs({ ...parts, script: script.replace('ROUNDS', String(rounds)), files })
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
  return async (drive, signal) => {
    const run = await runGuest({
      kernel: parts.kernel,
      initramfs: root,
      memoryBytes,
      drives: [drive],
      timeoutMs,
      ...(signal === undefined ? {} : { signal }),
    })
    const pages = (name: string): number => Number(new RegExp(`^${name} (\\d+)$`, 'm').exec(run.console)?.[1] ?? 0)
    return { ...run, swapIns: pages('pswpin'), swapOuts: pages('pswpout') }
  }
}

/** A `tmem serve` with one device to swap to. */
export interface SwapServer {
  readonly drive: GuestDrive
  readonly child: ChildProcess
  /** Exit code; what it said on standard error. */
  readonly ended: Promise<{ readonly code: number | null; readonly notes: string }>
  stats(): Promise<Answers['stats']>
}

/**
 * Starts one, whose sockets and file lie in `folder`; `zcache` is in its words, e.g. `limit=64MiB`,
 * and `device` more words of the device, e.g. `,memlimit=64MiB`. With `mount` the drive is a file of a FUSE mount that
 * is made there, which takes root.
 */
export async function serveSwap(
  folder: string,
  zcache: string,
  device: string = '',
  between: string = '',
  mount?: string,
): Promise<SwapServer> {
  const socket = join(folder, 'nbd.sock')
  const control = join(folder, 'control.sock')
  const stack = `zcache(${zcache})${between} > frontswap(file=${folder}/swap.img,size={size})`
  const what = ['--stack', stack, '--device', `name=swap0,size=${deviceBytes}${device}`]
  const served = mount === undefined ? ['--nbd', `unix:${socket}`] : ['--fuse', mount]
  const where = [...served, '--control', control]
  const bin = fileURLToPath(new URL('../../dist/bin.js', import.meta.url))
  const child = spawn(process.execPath, [bin, 'serve', ...what, ...where, '--json'], {
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  let notes = ''
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    notes += text
  })
  const ended = new Promise<{ code: number | null; notes: string }>((resolve) => {
    child.once('close', (code) => resolve({ code, notes }))
  })
  const ready = new Promise<true>((resolve) => child.stdout.once('data', () => resolve(true)))
  const early = await Promise.race([ready, ended])
  if (early !== true) throw new Failed(`tmem serve ended with ${early.code}: ${early.notes.trim()}`)
  return {
    drive: mount === undefined ? { socket, exportName: 'swap0', reconnectSeconds } : { file: join(mount, 'swap0') },
    child,
    ended,
    stats: () => ask(control, 'stats'),
  }
}

/** The rows of `tmem bench nbd` that a guest measures: against the raw file, and against another NBD server. */
export async function guestRows(bench: Bench, size: GuestSize = fullSize): Promise<Row[]> {
  const names = { raw: 'guest-swap', nbdkit: 'guest-swap-nbdkit' }
  const reason = (text: string): Row[] => Object.values(names).map((name) => skippedRow(name, text))
  if (!existsSync(tmpfs)) return reason(`needs ${tmpfs}`)
  const run = swappingGuest(1, size)
  if (typeof run === 'string') return reason(run)
  let drive: GuestDrive = { file: '' }
  let undo: () => Promise<void> | void = () => undefined
  const subject = (begin: (folder: string) => Promise<Begun>): Subject => ({
    async prepare() {
      await undo()
      const folder = mkdtempSync(join(tmpfs, `tmem-bench-guest-${process.pid}-`))
      const remove = (): void => rmSync(folder, { recursive: true, force: true })
      undo = remove
      const begun = await begin(folder)
      drive = begun.drive
      undo = async () => {
        await begun.end()
        remove()
      }
    },
    async run() {
      throwUnlessRight(await run(drive, bench.signal))
    },
  })
  const subjects: Record<string, Subject> = { ours: subject(ours), raw: subject(raw) }
  if (has('nbdkit')) subjects['nbdkit'] = subject(nbdkit)
  try {
    const taken = await bench.measure(names.raw, subjects, { operations: 1, rounds: bench.quick ? 1 : 3, warmup: 0 })
    const seconds = (name: string): number => taken[name]! / 1e9
    return [
      ratioRow(names.raw, 's', seconds('ours'), 'raw file on tmpfs', seconds('raw'), 1.05),
      'nbdkit' in taken
        ? ratioRow(names.nbdkit, 's', seconds('ours'), 'nbdkit memory', seconds('nbdkit'))
        : skippedRow(names.nbdkit, 'needs the program nbdkit'),
    ]
  } catch (error) {
    throwIfInterrupted(bench.signal)
    throw error
  } finally {
    await undo()
  }
}

/** Less than above: both sides wait for a disk. */
const zswapHogMebibytes = 120
/** Share of a guest's memory that its zswap may take. */
const zswapPercent = 25
const enableZswap = `
echo ${zswapPercent} >/sys/module/zswap/parameters/max_pool_percent
echo Y >/sys/module/zswap/parameters/enabled
echo "zswap with $(cat /sys/module/zswap/parameters/compressor) in $(cat /sys/module/zswap/parameters/zpool)"
`
/** One page at a time: what is read ahead is in nobody's figures. */
const onePageAtATime = `
echo 0 >/proc/sys/vm/page-cluster
grep MemTotal: /proc/meminfo
`

/**
 * The rows of `tmem bench tiers` that a guest measures: its kernel's own zswap over a raw image, against the same guest
 * over our stack, which has as much less memory as ours has for compressed pages. Both images lie on the same disk, and
 * both sides go around the host's cache. Pages read are those that came from the disk: the guest counts what zswap has
 * not answered (`pswpin`), the server what its file has.
 */
export async function zswapRows(bench: Bench): Promise<Row[]> {
  const names = ['guest-pages-read', 'guest-time'] as const
  const skipped = (reason: string): Row[] => names.map((name) => skippedRow(name, reason))
  if (bench.quick) return skipped('a quick run boots no guest')
  const kernelPackage = [zswapKernel, cloudKernel].find(hasZswap)
  if (kernelPackage === undefined) {
    const parts = guestParts()
    return skipped(
      typeof parts === 'string'
        ? parts
        : `the kernel ${parts.kernel.release} is built without zswap: unpack ${zswapKernel} into .cache/debian/${zswapKernel}`,
    )
  }
  const parts = guestParts(kernelPackage)
  if (typeof parts === 'string') return skipped(parts)
  const directory = makeSwapDirectory(undefined, deviceBytes)
  const progress = bench.progress('tiers: a guest with zswap, and one over our stack')
  try {
    const file = join(directory.path, 'raw.img')
    writeFileSync(file, '')
    truncateSync(file, deviceBytes)
    const zswap = await guestOf(
      parts,
      scriptAfter(enableZswap + onePageAtATime, zswapHogMebibytes),
      1,
      memoryBytes,
    )({ file, direct: true }, bench.signal)
    throwUnlessRight(zswap)
    progress.at(1, 2)
    const kibibytes = Number(/^MemTotal: +(\d+) kB$/m.exec(zswap.console)![1])
    const poolBytes = Math.floor((kibibytes * 1024 * zswapPercent) / 100 / basePageSize) * basePageSize
    const server = await serveSwap(directory.path, `limit=${poolBytes}`)
    let ours: SwapRun
    let diskReads: number | undefined
    try {
      const run = guestOf(parts, scriptAfter(onePageAtATime, zswapHogMebibytes), 1, memoryBytes - poolBytes)
      ours = await run(server.drive, bench.signal)
      diskReads = firstOf((await server.stats()).devices, 'diskReads')
    } finally {
      await endOf(server)
    }
    throwUnlessRight(ours)
    progress.done()
    const reference = /^zswap with \w+ in \w+$/m.exec(zswap.console)![0].replaceAll(' ', '-')
    return [
      diskReads === undefined
        ? skippedRow(names[0], 'the server has no counter diskReads')
        : ratioRow(names[0], 'pages', diskReads, reference, zswap.swapIns, 1),
      ratioRow(names[1], 's', ours.seconds, reference, zswap.seconds, 1),
    ]
  } catch (error) {
    throwIfInterrupted(bench.signal)
    throw error
  } finally {
    progress.end()
    directory.remove()
  }
}

const zswapKernel = 'linux-image-amd64'

/** True when the kernel of an unpacked package was built with zswap: its configuration lies beside it. */
function hasZswap(kernelPackage: string): boolean {
  const kernel = findKernel(join(unpacked, kernelPackage))
  if (kernel === undefined) return false
  return /^CONFIG_ZSWAP=y$/m.test(readFileSync(join(dirname(kernel.image), `config-${kernel.release}`), 'latin1'))
}

function throwUnlessRight({ exit, console }: SwapRun): void {
  if (exit !== 0) throw new Failed(`the guest ended with ${exit}: ${console.trim().split('\n').slice(-5).join(' / ')}`)
}

/** The counter of the first node that has it. */
function firstOf(nodes: readonly StatsNode[], counter: string): number | undefined {
  for (const { counters, children } of nodes) {
    const found = counters[counter] ?? firstOf(children, counter)
    if (found !== undefined) return found
  }
  return undefined
}

/** Something to swap to, and what ends it. */
interface Begun {
  readonly drive: GuestDrive
  end(): Promise<void> | void
}

async function ours(folder: string): Promise<Begun> {
  const server = await serveSwap(folder, 'limit=128MiB,zvMaxZsize=2048')
  return { drive: server.drive, end: () => endOf(server) }
}

/** Ends it. Rejects with `Failed` when it did not end well. */
export async function endOf({ child, ended }: SwapServer): Promise<void> {
  child.kill('SIGTERM')
  const { code, notes } = await ended
  if (code !== 0) throw new Failed(`tmem serve ended with ${code}: ${notes.trim()}`)
}

async function raw(folder: string): Promise<Begun> {
  const file = join(folder, 'raw.img')
  writeFileSync(file, '')
  truncateSync(file, deviceBytes)
  return { drive: { file }, end: () => undefined }
}

async function nbdkit(folder: string): Promise<Begun> {
  const socket = join(folder, 'nbd.sock')
  const server = await started('nbdkit', ['-f', '-U', socket, 'memory', String(deviceBytes)], socket)
  return { drive: { socket, exportName: '' }, end: () => server.stop() }
}
