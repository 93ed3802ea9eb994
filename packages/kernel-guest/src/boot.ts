/**
 * A guest whose kernel stores its swapped pages in the host's stack, and with cleancache also pages of files. The guest
 * loads the module, turns on swap on a drive, runs a workload that verifies its reads, turns swap off, and prints the
 * counters of its kernel and the module.
 *
 * The memory and doorbell for `attachGuest` are in a directory of their own, which is removed with the guest; after a
 * kill of this process, the next guest removes it.
 */
import { existsSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type ByteAmount, bytesOf, checkOptions } from '@tmem/core'
import { compileHog, type GuestDrive, type GuestRun, initramfs, runGuest, scratchFolder } from '@tmem/guest'
import { compileFiles, compileScript } from './compile.ts'
import type { GuestParts } from './parts.ts'

/**
 * Workloads by name, with what they do. Files are in a tmpfs; where the kernel has cleancache, in an ext4 on a drive of
 * its own.
 */
export const workloads: Readonly<Record<Workload, string>> = Object.freeze({
  hog: 'a program that uses 25 pages for 16 of the memory, and looks at them and writes them in no order',
  reread: 'a file of half as much again as the memory, which is written once and read three times',
  tar: 'files are packed into an archive, removed, unpacked from it, and compared',
  compile: 'a program of many parts is compiled by tcc, linked, and run',
})
export type Workload = 'hog' | 'reread' | 'tar' | 'compile'

/** What a guest is, and does. */
export interface BootOptions {
  readonly parts: GuestParts
  readonly workload: Workload
  /** 96 MiB to 2 GiB. */
  readonly memoryBytes: ByteAmount
  /** How often `hog` goes round (default 1). */
  readonly rounds?: number
  /** `hog` looks at some pages more often than at others, as programs do (default false). */
  readonly skewed?: boolean
  /** The kernel reads 2^n pages at once that were swapped out together, 0 to 5 (default: as Linux does, 3). */
  readonly pageCluster?: number
  /** What the workload uses, in whole MiB (default: see `workloads`). */
  readonly workloadBytes?: ByteAmount
  /**
   * `frontswap` (default): the module is loaded; `disk`: it is not, and pages go to the drive.
   */
  readonly swapTo?: 'frontswap' | 'disk'
  /** What the guest swaps on (default: a file of twice the workload's size on a tmpfs). */
  readonly drive?: GuestDrive
  /** How long a host may be away, or be without a page that it took, before the kernel stops (default 60,000). */
  readonly patienceMs?: number
  /** Flushes are left in the ring, and not waited for (default true). */
  readonly posted?: boolean
  /**
   * Tell the host (`onEvents` of `attachGuest`) what the kernel calls: frontswap, cleancache, and MMU notifiers on the
   * address space of `hog` (default false).
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
  /** `/sys/kernel/debug/frontswap`, and `…/cleancache`: empty without it. */
  readonly frontswap: Readonly<Record<string, number>>
  readonly cleancache: Readonly<Record<string, number>>
  /** Pages that the kernel has read from its drive, and written there, through no hook. */
  readonly swapIns: number
  readonly swapOuts: number
  /** Seconds of the workload, by the guest's clock; and those of them in which its processor had work. */
  readonly workloadSeconds: number
  readonly workloadCpuSeconds: number
  /** What the drives did during the workload: discards are not counted. */
  readonly drives: DriveCounts
  /** KiB that came from the drive of the files in each pass of `reread`; empty where files are in a tmpfs. */
  readonly passKibibytes: readonly number[]
}

/** Requests of drives, and bytes. */
export interface DriveCounts {
  readonly reads: number
  readonly readBytes: number
  readonly writes: number
  readonly writtenBytes: number
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
    skewed: 'flag?',
    pageCluster: 'number?',
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
  if (workload === 'compile' && parts.compiler === undefined)
    throw new RangeError('bootGuest: the workload compile takes parts that were prepared with its compiler')
  const { pageCluster = 3 } = options
  if (!(Number.isInteger(pageCluster) && pageCluster >= 0 && pageCluster <= 5))
    throw new RangeError(`bootGuest: pageCluster is a whole number from 0 to 5, not ${pageCluster}`)
  const factor = workload === 'hog' ? 25 / 16 : 3 / 2
  const isOnDrive = workload !== 'hog' && parts.hasCleancache
  const mebibytes = Math.floor(
    bytesOf('bootGuest', 'workloadBytes', options.workloadBytes ?? memoryBytes * factor) / mebibyte,
  )
  // A guest's memory is mapped, and read by two processes: it belongs on a tmpfs.
  const folder = scratchFolder(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'tmem-kernel-guest-')
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
        ...(workload === 'compile' ? compileFiles(parts.compiler!, mebibytes) : []),
      ],
    })
    const files = drive(folder, 'files.img', mebibytes)
    const run = runGuest({
      kernel: parts.kernel,
      initramfs: root,
      memoryBytes,
      drives: [options.drive ?? drive(folder, 'swap.img', mebibytes), ...(isOnDrive ? [files] : [])],
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

/** A drive: a sparse file, which nobody writes to as long as every page is taken. */
function drive(folder: string, name: string, mebibytes: number): GuestDrive {
  const file = join(folder, name)
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
  'clean_puts',
  'clean_hits',
  'clean_misses',
  'clean_page_flushes',
] as const

/** The kernel discards what it has freed only where it takes the drive for one that does not rotate. */
function scriptOf(options: BootOptions, mebibytes: number): string {
  const { parts, workload, swapTo, rounds = 1, patienceMs = 60_000, posted = true, trace = false } = options
  const { skewed = false, pageCluster = 3 } = options
  const load = `insmod /lib/tmem_guest.ko patience_ms=${patienceMs} posted=${Number(posted)} trace=${Number(trace)} || exit 8
dmesg | grep tmem_guest: | sed 's/^\\[[^]]*\\] //'`
  const hog = `hog ${mebibytes} ${rounds} ${Number(skewed)} ${trace ? '/dev/tmem_trace' : ''}`
  const module = moduleCounters.map((name) => `echo "module ${name} $(cat /sys/module/tmem_guest/parameters/${name})"`)
  const mounting = parts.hasCleancache
    ? '{ mke2fs -F -b 4096 /dev/vdb && mount -t ext4 /dev/vdb /scratch; } >/dev/null'
    : `mount -t tmpfs -o size=${mebibytes + 16}m scratch /scratch`
  return `
mount -t debugfs debug /sys/kernel/debug
for drive in /sys/block/vd*; do echo 0 >$drive/queue/rotational; done
echo ${pageCluster} >/proc/sys/vm/page-cluster
${swapTo === 'frontswap' ? load : ''}
mkswap /dev/vda >/dev/null && swapon -d /dev/vda || exit 7
now() {
  echo "workload $1 seconds $(cut -d' ' -f1 /proc/uptime)"
  echo "workload $1 $(head -n 1 /proc/stat)"
  for drive in /sys/block/vd*; do echo "workload $1 drive $(cat $drive/stat)"; done
}
mounted() { ${mounting}; }
${workload === 'hog' ? `work() { ${hog}; }` : fileScripts[workload](mebibytes)}
now begun
work
code=$?
now ended
swapoff /dev/vda || exit 9
${swapTo === 'frontswap' ? module.join('\n') : ''}
for hook in frontswap cleancache; do
  for name in $(ls /sys/kernel/debug/$hook 2>/dev/null); do
    echo "$hook $name $(cat /sys/kernel/debug/$hook/$name)"
  done
done
sed -n 's/^pswp/vmstat pswp/p' /proc/vmstat
exit $code
`
}

/** Workloads that have files. */
const fileScripts = {
  compile: compileScript,
  /**
   * Pieces of the file differ by their numbers, and lie across pages: no page is there twice. What is compared is its
   * digest, of all that was written against all that is read. Cleancache gets only what was read from a drive: what was
   * written is dropped first.
   */
  reread: (mebibytes: number) => `work() {
  mounted || return 2
  head -c 524288 /dev/urandom >/tmp/noise
  piece=0
  while [ $piece -lt ${mebibytes * 2} ]; do
    echo "piece $piece of the file"
    cat /tmp/noise
    piece=$((piece + 1))
  done | tee /scratch/file | md5sum >/tmp/written
  sync
  echo 3 >/proc/sys/vm/drop_caches
  read_sectors() { [ ! -e /sys/block/vdb ] || awk '{ print $3 }' /sys/block/vdb/stat; }
  wrong=0
  for pass in 1 2 3; do
    before=$(read_sectors)
    md5sum </scratch/file | cmp -s - /tmp/written || wrong=$((wrong + 1))
    [ -z "$before" ] || echo "pass $pass read $((($(read_sectors) - before) / 2)) KiB"
  done
  echo "3 passes, $wrong wrong"
  umount /scratch || return 3
  [ $wrong = 0 ]
}`,
  /** Files and archive together are as large as the workload. */
  tar: (mebibytes: number) => `work() {
  mounted || return 2
  head -c 131072 /dev/urandom >/tmp/noise
  mkdir /scratch/files
  files=0
  while [ $files -lt ${mebibytes * 4} ]; do
    { echo "file $files"; cat /tmp/noise; } >/scratch/files/$files
    files=$((files + 1))
  done
  digests() { (cd /scratch/files && ls | xargs md5sum); }
  digests >/tmp/written
  tar -cf /scratch/archive -C /scratch files && rm -r /scratch/files && tar -xf /scratch/archive -C /scratch || return 4
  digests | cmp -s - /tmp/written && [ $(wc -l </tmp/written) = $files ]
  wrong=$?
  echo "$files files, $wrong wrong"
  umount /scratch || return 3
  return $wrong
}`,
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
  const passes = [...run.console.matchAll(/^pass \d+ read (\d+) KiB$/gm)].map(([, kibibytes]) => Number(kibibytes))
  /** What grew during the workload, in a line of numbers; of several lines of that kind the sum. */
  const grown = (kind: string): number[] => {
    const sums = (when: string): number[] => {
      const lines = [...run.console.matchAll(new RegExp(`^workload ${when} ${kind} +(.*)$`, 'gm'))]
      const numbers = lines.map(([, line]) => line!.trim().split(/ +/).map(Number))
      return (numbers[0] ?? []).map((_, n) => numbers.reduce((sum, line) => sum + line[n]!, 0))
    }
    const begun = sums('begun')
    return sums('ended').map((value, n) => value - begun[n]!)
  }
  const [workloadSeconds = 0] = grown('seconds')
  // Ticks of 10 ms: user, nice, system; idle; waiting for a drive; interrupts.
  const [user = 0, nice = 0, system = 0, , , irq = 0, softirq = 0] = grown('cpu')
  // Requests, merged ones, sectors of 512 bytes, milliseconds; reads, then writes.
  const [reads = 0, , readSectors = 0, , writes = 0, , writtenSectors = 0] = grown('drive')
  return {
    ...run,
    module: found('module'),
    frontswap: found('frontswap'),
    cleancache: found('cleancache'),
    swapIns: vmstat['pswpin'] ?? 0,
    swapOuts: vmstat['pswpout'] ?? 0,
    workloadSeconds,
    workloadCpuSeconds: (user + nice + system + irq + softirq) / 100,
    drives: { reads, readBytes: readSectors * 512, writes, writtenBytes: writtenSectors * 512 },
    passKibibytes: passes,
  }
}
