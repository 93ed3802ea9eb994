/**
 * A Linux guest in QEMU that swaps to us: what it runs, the server it swaps to, and the rows of `tmem bench nbd` about it.
 *
 * The guest has 128 MiB; a program in it uses 200 MiB in no order and verifies them. Ours is `tmem serve` on a unix socket, zcache over a
 * file; the reference is the same guest with a raw image on the same tmpfs as our file, and a second one nbdkit's plain memory, which has the
 * way through QEMU's NBD client in common with us. What is compared is the time from the start of QEMU to its end. A run whose program found one wrong byte, or that did not end, is a failure, not a figure.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { compileHog, findKernel, type GuestDrive, initramfs, type Kernel, runGuest } from '@tmem/guest'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { type Answers, ask } from '../serve/control.ts'
import { started } from './fio.ts'
import { type Bench, type Row, ratioRow, type Subject, skippedRow } from './frame.ts'

const mebibyte = 2 ** 20
const deviceBytes = 256 * mebibyte
const memoryBytes = 128 * mebibyte
const hogMebibytes = 200
const timeoutMs = 300_000
/** How long the guest waits for the next server. */
export const reconnectSeconds = 60
const tmpfs = '/dev/shm'

/** What a guest is made of. */
interface Parts {
  readonly kernel: Kernel
  readonly busybox: string
}

/** What a checkout has for guests (tools/debian-packages.json), or in words what is missing. */
function guestParts(): Parts | string {
  const unpacked = fileURLToPath(new URL('../../../../.cache/debian/', import.meta.url))
  const busybox = join(unpacked, 'busybox-static/bin/busybox')
  const kernel = findKernel(join(unpacked, 'linux-image-cloud-amd64'))
  if (kernel === undefined) return 'needs the package linux-image-cloud-amd64, as npm test unpacks it'
  if (!existsSync(busybox)) return 'needs the package busybox-static, as npm test unpacks it'
  const programs = ['qemu-system-x86_64', 'setpriv', 'cc']
  const missing = programs.find((name) => !has(name))
  return missing === undefined ? { kernel, busybox } : `needs the program ${missing}`
}

const has = (program: string): boolean => spawnSync(program, ['--version'], { stdio: 'ignore' }).error === undefined

/** What came of a run. */
export interface SwapRun {
  /** The exit code of the program (0: every byte was right) or of what failed before or after it, or how the guest ended instead. */
  readonly exit: number | 'died' | 'timeout'
  readonly console: string
  readonly seconds: number
  /** Pages of 4 KiB that the guest's kernel has read from swap, and written there. */
  readonly swapIns: number
  readonly swapOuts: number
}

/**
 * What the guest does. The kernel discards what it has freed only where it takes the drive for one that does not rotate, and swapoff waits
 * until it has done so.
 */
export const swapScript: string = `
set -e
echo 0 >/sys/block/vda/queue/rotational
mkswap /dev/vda
swapon -d /dev/vda
set +e
hog ${hogMebibytes} ROUNDS
code=$?
swapoff /dev/vda || exit 9
grep -E '^pswp(in|out) ' /proc/vmstat
exit $code
`

/** Returns what runs the guest on a drive, or in words what this machine lacks. Rejects when aborted. */
export function swappingGuest(
  rounds: number,
): ((drive: GuestDrive, signal?: AbortSignal) => Promise<SwapRun>) | string {
  const parts = guestParts()
  if (typeof parts === 'string') return parts
  const folder = mkdtempSync(join(tmpdir(), 'tmem-hog-'))
  let root: Uint8Array
  try {
    const hog = join(folder, 'hog')
    compileHog(hog)
    const files = [{ path: 'bin/hog', data: readFileSync(hog), mode: 0o755 }]
    root = initramfs({ ...parts, script: swapScript.replace('ROUNDS', String(rounds)), files })
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
 * and `device` more words of the device, e.g. `,memlimit=64MiB`.
 */
export async function serveSwap(folder: string, zcache: string, device: string = ''): Promise<SwapServer> {
  const socket = join(folder, 'nbd.sock')
  const control = join(folder, 'control.sock')
  const stack = `zcache(${zcache}) > frontswap(file=${folder}/swap.img,size={size})`
  const what = ['--stack', stack, '--device', `name=swap0,size=${deviceBytes}${device}`]
  const where = ['--nbd', `unix:${socket}`, '--control', control]
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
    drive: { socket, exportName: 'swap0', reconnectSeconds },
    child,
    ended,
    stats: () => ask(control, 'stats'),
  }
}

/** The rows of `tmem bench nbd` that a guest measures: against the raw file, and against another NBD server. */
export async function guestRows(bench: Bench): Promise<Row[]> {
  const names = { raw: 'guest-swap', nbdkit: 'guest-swap-nbdkit' }
  const reason = (text: string): Row[] => Object.values(names).map((name) => skippedRow(name, text))
  if (!existsSync(tmpfs)) return reason(`needs ${tmpfs}`)
  const run = swappingGuest(1)
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
      const { exit, console } = await run(drive, bench.signal)
      if (exit !== 0)
        throw new Failed(`the guest ended with ${exit}: ${console.trim().split('\n').slice(-5).join(' / ')}`)
    },
  })
  const subjects: Record<string, Subject> = { ours: subject(ours), raw: subject(raw) }
  if (has('nbdkit')) subjects['nbdkit'] = subject(nbdkit)
  try {
    const taken = await bench.measure(names.raw, subjects, { operations: 1, rounds: bench.quick ? 1 : 5, warmup: 0 })
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

/** Something to swap to, and what ends it. */
interface Begun {
  readonly drive: GuestDrive
  end(): Promise<void> | void
}

async function ours(folder: string): Promise<Begun> {
  const { drive, child, ended } = await serveSwap(folder, 'limit=128MiB,zvMaxZsize=2048')
  const end = async (): Promise<void> => {
    child.kill('SIGTERM')
    const { code, notes } = await ended
    if (code !== 0) throw new Failed(`tmem serve ended with ${code}: ${notes.trim()}`)
  }
  return { drive, end }
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
