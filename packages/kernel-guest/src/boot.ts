/**
 * A guest whose kernel keeps its swap pages with us: it loads the module, swaps on a drive, does a workload that verifies
 * what it reads, swaps off, and prints what its kernel and the module have counted.
 *
 * What of it can be attached (`attachGuest`) is in a folder of its own, which goes with it.
 */
import { existsSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type ByteAmount, bytesOf, checkOptions } from '@tmem/core'
import { compileHog, type GuestDrive, type GuestRun, initramfs, runGuest } from '@tmem/guest'
import type { GuestParts } from './parts.ts'

/** Workloads by name, with what they do. */
export const workloads: Readonly<Record<Workload, string>> = Object.freeze({
  hog: 'a program that uses 25 pages for 16 of the memory, and looks at them and writes them in no order',
  reread: 'a file of half as much again as the memory in a tmpfs, which is written once and read three times',
})
export type Workload = 'hog' | 'reread'

/** What a guest is, and does. */
export interface BootOptions {
  readonly parts: GuestParts
  readonly workload: Workload
  /** 96 MiB to 2 GiB. */
  readonly memoryBytes: ByteAmount
  /** How often `hog` goes round (default 1). */
  readonly rounds?: number
  /** What the workload uses, in whole MiB (default: see `workloads`). */
  readonly workloadBytes?: ByteAmount
  /**
   * `frontswap` (default): the module is loaded; `disk`: it is not, and pages go to the drive.
   */
  readonly swapTo?: 'frontswap' | 'disk'
  /** What the guest swaps on (default: a file of the workload's size on a tmpfs). */
  readonly drive?: GuestDrive
  /** How long a host may be away, or be without a page that it took, before the kernel stops (default 60,000). */
  readonly patienceMs?: number
  /** Flushes are left in the ring, and not waited for (default true). */
  readonly posted?: boolean
  /**
   * Tell the host (`onEvents` of `attachGuest`) what the kernel calls: frontswap, and MMU notifiers on the address space
   * of `hog` (default false).
   */
  readonly trace?: boolean
  readonly onConsole?: (text: string) => void
  /** Default: 5 minutes. */
  readonly timeoutMs?: number
  readonly signal?: AbortSignal
}

/** A guest that runs. */
export interface BootedGuest {
  /** For `attachGuest`. QEMU makes both, some time after this was called. */
  readonly memory: string
  readonly doorbell: string
  /** Rejects as `runGuest` does. */
  readonly ended: Promise<BootedRun>
}

/** What came of it. */
export interface BootedRun extends GuestRun {
  /** What the module has counted; empty without it, or where the guest did not come so far. */
  readonly module: Readonly<Record<string, number>>
  /** `/sys/kernel/debug/frontswap`. */
  readonly frontswap: Readonly<Record<string, number>>
  /** Pages that the kernel has read from its drive, and written there, through no hook. */
  readonly swapIns: number
  readonly swapOuts: number
  /** Seconds of the workload, by the guest's clock. */
  readonly workloadSeconds: number
}

const mebibyte = 2 ** 20

/**
 * Boots it. Throws `TypeError` or `RangeError` for options that make no sense, and an Error when the folder or the root
 * directory cannot be made.
 */
export function bootGuest(options: BootOptions): BootedGuest {
  checkOptions('bootGuest', options, {
    parts: 'object',
    workload: 'text',
    memoryBytes: 'bytes',
    rounds: 'number?',
    workloadBytes: 'bytes?',
    swapTo: 'text?',
    drive: 'object?',
    patienceMs: 'number?',
    posted: 'flag?',
    trace: 'flag?',
    onConsole: 'function?',
    timeoutMs: 'number?',
    signal: 'object?',
  })
  const { parts, workload, swapTo = 'frontswap', timeoutMs = 300_000, onConsole, signal } = options
  const memoryBytes = bytesOf('bootGuest', 'memoryBytes', options.memoryBytes)
  if (memoryBytes < 96 * mebibyte || memoryBytes > 2 ** 31)
    throw new RangeError(`bootGuest: memoryBytes must be from 96 MiB to 2 GiB, got ${memoryBytes}`)
  if (!Object.hasOwn(workloads, workload))
    throw new RangeError(`bootGuest: workload is ${Object.keys(workloads).join(' or ')}, not ${workload}`)
  const factor = workload === 'hog' ? 25 / 16 : 3 / 2
  const mebibytes = Math.floor(
    bytesOf('bootGuest', 'workloadBytes', options.workloadBytes ?? memoryBytes * factor) / mebibyte,
  )
  // A guest's memory is mapped, and read by two processes: it belongs on a tmpfs.
  const folder = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), `tmem-kernel-guest-${process.pid}-`))
  const remove = (): void => rmSync(folder, { recursive: true, force: true })
  try {
    const memory = join(folder, 'memory')
    const doorbell = join(folder, 'doorbell')
    const hog = join(folder, 'hog')
    compileHog(hog)
    const root = initramfs({
      kernel: parts.kernel,
      busybox: parts.busybox,
      script: scriptOf({ ...options, swapTo }, mebibytes),
      files: [
        { path: 'bin/hog', data: readFileSync(hog), mode: 0o755 },
        { path: 'lib/tmem_guest.ko', data: readFileSync(parts.module) },
        { path: 'scratch' },
      ],
    })
    const run = runGuest({
      kernel: parts.kernel,
      initramfs: root,
      memoryBytes,
      drives: [options.drive ?? drive(folder, mebibytes)],
      ...(swapTo === 'frontswap' ? { memoryFile: memory, doorbell } : {}),
      // While a host is away nothing else runs in the guest, and its kernel would say so over and over.
      kernelWords: 'rcupdate.rcu_cpu_stall_suppress=1 nowatchdog',
      timeoutMs,
      ...(onConsole === undefined ? {} : { onConsole }),
      ...(signal === undefined ? {} : { signal }),
    })
    return { memory, doorbell, ended: run.then(counted).finally(remove) }
  } catch (error) {
    remove()
    throw error
  }
}

/** Something to swap on: a sparse file, which nobody writes to as long as every page is taken. */
function drive(folder: string, mebibytes: number): GuestDrive {
  const file = join(folder, 'swap.img')
  writeFileSync(file, '', { mode: 0o600 })
  truncateSync(file, Math.max(64, mebibytes * 2) * mebibyte)
  return { file }
}

const moduleCounters = [
  'pools',
  'puts',
  'gets',
  'page_flushes',
  'object_flushes',
  'refused',
  'declined',
  'again',
  'bells',
] as const

/** The kernel discards what it has freed only where it takes the drive for one that does not rotate. */
function scriptOf(options: BootOptions, mebibytes: number): string {
  const { workload, swapTo, rounds = 1, patienceMs = 60_000, posted = true, trace = false } = options
  const load = `insmod /lib/tmem_guest.ko patience_ms=${patienceMs} posted=${Number(posted)} trace=${Number(trace)} || exit 8
dmesg | grep tmem_guest: | sed 's/^\\[[^]]*\\] //'`
  const module = moduleCounters.map((name) => `echo "module ${name} $(cat /sys/module/tmem_guest/parameters/${name})"`)
  return `
mount -t debugfs debug /sys/kernel/debug
echo 0 >/sys/block/vda/queue/rotational
${swapTo === 'frontswap' ? load : ''}
mkswap /dev/vda >/dev/null && swapon -d /dev/vda || exit 7
now() { cut -d' ' -f1 /proc/uptime; }
begun=$(now)
${workload === 'hog' ? `hog ${mebibytes} ${rounds}${trace ? ' /dev/tmem_trace' : ''}` : rereadScript(mebibytes)}
code=$?
echo "workload seconds $begun $(now)"
swapoff /dev/vda || exit 9
${swapTo === 'frontswap' ? module.join('\n') : ''}
for name in loads succ_stores failed_stores invalidates; do
  echo "frontswap $name $(cat /sys/kernel/debug/frontswap/$name)"
done
sed -n 's/^pswp/vmstat pswp/p' /proc/vmstat
exit $code
`
}

/**
 * Pieces of the file differ by their numbers, and lie across pages: no page is there twice. What is compared is its
 * digest, of all that was written against all that is read.
 */
function rereadScript(mebibytes: number): string {
  return `reread() {
  mount -t tmpfs -o size=${mebibytes + 16}m scratch /scratch || return 2
  head -c 524288 /dev/urandom >/tmp/noise
  piece=0
  while [ $piece -lt ${mebibytes * 2} ]; do
    echo "piece $piece of the file"
    cat /tmp/noise
    piece=$((piece + 1))
  done | tee /scratch/file | md5sum >/tmp/written
  wrong=0
  for pass in 1 2 3; do
    md5sum </scratch/file | cmp -s - /tmp/written || wrong=$((wrong + 1))
  done
  echo "3 passes, $wrong wrong"
  umount /scratch || return 3
  [ $wrong = 0 ]
}
reread`
}

/** Takes the counters out of what the guest printed last. */
function counted(run: GuestRun): BootedRun {
  const found = (kind: string): Record<string, number> =>
    Object.fromEntries(
      [...run.console.matchAll(new RegExp(`^${kind} (\\w+) (\\d+)$`, 'gm'))].map(([, name, value]) => [
        name!,
        Number(value),
      ]),
    )
  const vmstat = found('vmstat')
  const [, begun = '0', ended = '0'] = /^workload seconds (\S+) (\S+)$/m.exec(run.console) ?? []
  return {
    ...run,
    module: found('module'),
    frontswap: found('frontswap'),
    swapIns: vmstat['pswpin'] ?? 0,
    swapOuts: vmstat['pswpout'] ?? 0,
    workloadSeconds: Number(ended) - Number(begun),
  }
}
