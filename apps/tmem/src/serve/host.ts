/** How this host's kernel uses the files of a mount: loop devices over the files, and swap on the loop devices. */
import { type ChildProcess, execFile } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { totalmem } from 'node:os'
import { basename, dirname, join } from 'node:path'
import { type Allocator, type OpenProgress, residentAllocator, systemAllocator } from '@tmem/core'
import { deviceText, type Mount, mounts, placeOf, unescaped } from '@tmem/fuse'
import { memoryLimits, type ReadText } from '@tmem/zcache'
import { Failed } from '../ending.ts'

/** A small text file of the system, or `undefined` when there is none. */
export const readText: ReadText = (path) => {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    // Whatever the reason, the value is unknown.
    return undefined
  }
}

/** Below this much free memory a host swaps before tmem could help. */
export const headroomBytes: number = 256 * 2 ** 20

/**
 * The part of a control group's limit that a server needs beyond its memory at the start: its heap grows, young objects
 * alone take up to 48 MiB, and a process over the limit is killed.
 */
const growthBytes = 64 * 2 ** 20

/** Bytes of memory that programs can take before this host swaps; `undefined` if the system does not say. */
export function availableBytes(): number | undefined {
  if (!existsSync('/proc/meminfo')) return undefined
  const [, kilobytes] = /^MemAvailable:\s+(\d+) kB$/m.exec(readFileSync('/proc/meminfo', 'utf8')) ?? []
  return kilobytes === undefined ? undefined : Number(kilobytes) * 1024
}

/** Takes memory before it is needed, if the host can spare it. */
export interface AheadMemory {
  /** Makes layers allocate all their memory when they open. */
  readonly allocator: Allocator
  /**
   * Called once the layers are open: makes the kernel back their memory with pages, and all later memory. Throws
   * `Failed` if the host cannot spare it: instead of failing, the kernel would kill a process.
   */
  settle(): void
}

const mebibytes = (bytes: number): string => `${Math.floor(bytes / 2 ** 20)}MiB`

/**
 * The bytes that can be taken now without making the host or a control group of this process short of memory, and which
 * of them has least to spare.
 */
function spareBytes(): { spare: number; by: string } {
  let least = { spare: (availableBytes() ?? Number.POSITIVE_INFINITY) - headroomBytes, by: 'this host' }
  for (const { group, limitBytes, leftBytes } of memoryLimits(readText)) {
    const spare = leftBytes - growthBytes
    if (spare < least.spare)
      least = { spare, by: `the control group ${group}, whose limit is ${mebibytes(limitBytes)},` }
  }
  return least
}

/**
 * Throws `Failed` for limits that this host could not keep even if nothing else ran. A server of files takes all memory
 * at the start, and `aheadMemory` then checks what the host can spare at that moment.
 */
export function judgeLimits(bytes: number): void {
  let most = { bytes: totalmem() - headroomBytes, by: `this host has ${mebibytes(totalmem())}` }
  for (const { group, limitBytes } of memoryLimits(readText))
    if (limitBytes - growthBytes < most.bytes)
      most = {
        bytes: limitBytes - growthBytes,
        by: `the control group ${group} has a limit of ${mebibytes(limitBytes)}`,
      }
  if (bytes > most.bytes)
    throw new Failed(
      `the stacks may take ${mebibytes(bytes)} of memory, but ${most.by}: set limits of at most ${mebibytes(Math.max(0, most.bytes))} in all`,
    )
}

/** The bit of CAP_SYS_ADMIN in the kernel's sets of capabilities. */
const sysAdmin = 21n

/** Throws `Failed` for a process that may mount nothing: what it would hear first is of a folder or a socket. */
export function judgeMounting(directory: string): void {
  const [, effective] = /^CapEff:\s+([\da-f]+)$/m.exec(readText('/proc/self/status') ?? '') ?? []
  if (effective === undefined || ((BigInt(`0x${effective}`) >> sysAdmin) & 1n) === 1n) return
  throw new Failed(
    `to mount on ${directory} takes root (CAP_SYS_ADMIN), and this is user ${process.geteuid?.()} without that: run it as root, or serve over NBD (--nbd, in a file nbd) instead of a mount`,
  )
}

export function aheadMemory(): AheadMemory {
  const taken: Uint8Array[] = []
  let isSettled = false
  return {
    allocator: {
      ahead: true,
      allocate: (bytes, site) => {
        if (isSettled) return residentAllocator.allocate(bytes, site)
        const memory = systemAllocator.allocate(bytes, site)
        if (memory !== undefined) taken.push(new Uint8Array(memory))
        return memory
      },
    },
    settle: () => {
      const bytes = taken.reduce((sum, { length }) => sum + length, 0)
      const { spare, by } = spareBytes()
      if (bytes > spare)
        throw new Failed(
          `the stacks may take ${mebibytes(bytes)} of memory, but ${by} can spare ${mebibytes(Math.max(0, spare))} now: ` +
            'set smaller limits',
        )
      for (const memory of taken)
        for (let at = 0; at < memory.length; at += 4096) {
          const same = memory[at]!
          memory[at] = same
        }
      taken.length = 0
      isSettled = true
    },
  }
}

/** A file that the kernel uses as a block device, and the uses of that device. */
export interface LoopUse {
  /** E.g. `/dev/loop0`. */
  readonly loop: string
  /** Inode of the file; `undefined` if the server of its file system is dead. */
  readonly inode: number | undefined
  /** Bytes that are swapped to the device; `undefined` if it is not active swap. */
  readonly swap: { readonly sizeBytes: number; readonly usedBytes: number; readonly priority: number } | undefined
  /** Where the device is mounted, and which block devices are built on it. */
  readonly mountedOn: readonly string[]
  readonly holders: readonly string[]
}

/**
 * Loop devices over files of one file system (`MAJOR:MINOR`), identified by device and inode as the kernel reports
 * them. The name of a file, which may have several, decides nothing.
 *
 * The file system must be served meanwhile, as another process reads the attributes of its files. Rejects with
 * `Failed`.
 */
export async function loopsOver(fileSystem: string): Promise<LoopUse[]> {
  return (await loops()).filter(({ device }) => device === fileSystem).map(useOf)
}

/**
 * Loop devices over files of a mount whose server is dead and does not answer, found by the mount in the kernel's name
 * of the file.
 */
export async function loopsOverDead(mount: Mount): Promise<LoopUse[]> {
  return (await loops())
    .filter(({ device, file }) =>
      device === undefined ? mountIdOf(dirname(file)) === mount.id : device === mount.device,
    )
    .map(useOf)
}

function mountIdOf(path: string): number | undefined {
  try {
    return placeOf(path).mount.id
  } catch (error) {
    // The file is in no mount of this process.
    if (error instanceof Error && 'code' in error) return undefined
    throw error
  }
}

interface Loop {
  readonly name: string
  readonly file: string
  readonly device: string | undefined
  readonly inode: number | undefined
}

/** How long losetup may take to report the file of a loop device. */
const loopPatienceMs = 5000
const loopColumns = 'NAME,BACK-MAJ:MIN,BACK-INO,BACK-FILE'

/**
 * Asks for each device separately, because the server of its file must answer: a device whose server hangs is skipped
 * and does not delay the others.
 */
async function loops(): Promise<Loop[]> {
  const names = namesIn('/sys/block').filter((name) => existsSync(`/sys/block/${name}/loop/backing_file`))
  return (await Promise.all(names.map(loopOf))).flat()
}

async function loopOf(name: string): Promise<Loop[]> {
  const path = join('/dev', name)
  let text: string | undefined
  try {
    text = await toolWithin(loopPatienceMs, 'losetup', '--list', '--json', '--output', loopColumns, path)
  } catch (error) {
    // The device may have been removed meanwhile.
    if (!existsSync(`/sys/block/${name}/loop/backing_file`)) return []
    throw error
  }
  if (text === undefined || text === '') return []
  const { loopdevices } = JSON.parse(text) as { loopdevices: readonly Record<string, string | number | null>[] }
  return loopdevices.map((one) => {
    const [device, inode] = [one['back-maj:min'], one['back-ino']]
    return {
      name: basename(String(one['name'])),
      file: String(one['back-file']),
      device: device === null ? undefined : String(device).trim(),
      inode: inode === null ? undefined : Number(inode),
    }
  })
}

function useOf({ name, inode }: Loop): LoopUse {
  const folder = `/sys/block/${name}`
  // The device may have partitions.
  const parts = ['', ...namesIn(folder).filter((part) => part.startsWith(name))].map((part) => join(folder, part))
  const numbers = parts.map((part) => textOf(join(part, 'dev'))).filter((number) => number !== undefined)
  const swaps = activeSwaps()
  return {
    loop: join('/dev', name),
    inode,
    swap: numbers.map((number) => swaps.get(number)).find((one) => one !== undefined),
    mountedOn: mounts()
      .filter(({ device }) => numbers.includes(device))
      .map(({ point }) => point),
    holders: parts.flatMap((part) => namesIn(join(part, 'holders'))),
  }
}

const namesIn = (folder: string): string[] => (existsSync(folder) ? readdirSync(folder) : [])
const textOf = (file: string): string | undefined => (existsSync(file) ? readFileSync(file, 'utf8').trim() : undefined)

/** By number of the block device, `MAJOR:MINOR`. */
function activeSwaps(): Map<string, NonNullable<LoopUse['swap']>> {
  const swaps = new Map<string, NonNullable<LoopUse['swap']>>()
  for (const line of readFileSync('/proc/swaps', 'utf8').split('\n').slice(1)) {
    const [path, , size, used, priority] = line.split(/\s+/)
    if (path === undefined || path === '') continue
    const stat = statSync(unescaped(path), { bigint: true, throwIfNoEntry: false })
    if (stat?.isBlockDevice() === true)
      swaps.set(deviceText(stat.rdev), {
        sizeBytes: Number(size) * 1024,
        usedBytes: Number(used) * 1024,
        priority: Number(priority),
      })
  }
  return swaps
}

/** The uses that must end before a loop device can be freed, in words. */
export function useText({ loop, swap, mountedOn, holders }: LoopUse): string {
  const what = [
    ...(swap === undefined ? [] : ['which is active swap']),
    ...mountedOn.map((point) => `which is mounted on ${point}`),
    ...holders.map((holder) => `on which /dev/${holder} is built`),
  ]
  return [loop, ...what].join(', ')
}

/** The commands that end a use, in order. */
export const endingOf = ({ loop, swap, mountedOn }: LoopUse): string[] => [
  ...mountedOn.map((point) => `umount ${point}`),
  ...(swap === undefined ? [] : [`swapoff ${loop}`]),
  `losetup -d ${loop}`,
]

/**
 * Runs a program to its end and resolves to its standard output. Rejects with `Failed`, with its error output, if it
 * fails or is missing.
 */
export const tool = (command: string, ...words: string[]): Promise<string> => started(command, words).output

/** The same; `undefined` if the program takes longer than `patienceMs`. It is then killed, and not waited for. */
async function toolWithin(ms: number, command: string, ...words: string[]): Promise<string | undefined> {
  const { child, output } = started(command, words)
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<undefined>((resolve) => {
    timer = setTimeout(() => {
      // In an uninterruptible call, the process stays until the server that it waits for has ended.
      child.kill('SIGKILL')
      child.stdout?.destroy()
      child.stderr?.destroy()
      child.unref()
      resolve(undefined)
    }, ms)
  })
  try {
    return await Promise.race([output, late])
  } finally {
    clearTimeout(timer)
  }
}

function started(command: string, words: readonly string[]): { child: ChildProcess; output: Promise<string> } {
  // Swap tools are in directories that the PATH of a plain user lacks.
  const env = { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`, LC_ALL: 'C' }
  let child: ChildProcess
  const output = new Promise<string>((resolve, reject) => {
    child = execFile(command, words, { env }, (error, stdout, stderr) => {
      if (error === null) resolve(stdout.trim())
      else reject(new Failed(`${[command, ...words].join(' ')} failed: ${stderr.trim() || error.message}`))
    })
  })
  return { child: child!, output }
}

/** Milliseconds between two looks at how much is still swapped out. */
const offMs = 250

/** Ends swapping to a loop device; `onProgress` learns how much has come back. Rejects with `Failed`. */
async function swapOff({ loop, swap }: LoopUse, onProgress: OpenProgress | undefined): Promise<void> {
  const total = swap!.usedBytes
  const number = deviceText(statSync(loop, { bigint: true }).rdev)
  const looking = setInterval(() => {
    const left = activeSwaps().get(number)?.usedBytes ?? 0
    onProgress?.(`bringing back what is swapped to ${loop}`, Math.max(0, total - left), total)
  }, offMs)
  try {
    await tool('swapoff', loop)
  } catch (error) {
    // The system may have ended it already, at its shutdown.
    if (activeSwaps().has(number)) throw error
  } finally {
    clearInterval(looking)
  }
}

/**
 * Ends a use if it is swap, or none; `onProgress` learns how much of the swapped data has come back. Rejects with
 * `Failed` for any other use of the loop device.
 */
export async function release(use: LoopUse, onProgress?: OpenProgress): Promise<void> {
  const { loop, swap, mountedOn, holders } = use
  if (mountedOn.length + holders.length > 0) throw new Failed(`in use by ${useText(use)}: end that first`)
  if (swap !== undefined) await swapOff(use, onProgress)
  await tool('losetup', '-d', loop)
}

/**
 * Ends swapping to the files of a file system, that of the lowest priority first, and frees their loop devices. Rejects
 * with `Failed` for other uses of them.
 */
export async function drain(fileSystem: string, onProgress?: OpenProgress): Promise<void> {
  const priority = ({ swap }: LoopUse): number => swap?.priority ?? -1
  const uses = await loopsOver(fileSystem)
  for (const use of uses.toSorted((a, b) => priority(a) - priority(b))) await release(use, onProgress)
  // The kernel frees the file of a loop device a moment after losetup -d.
  for (let tries = 0; (await loopsOver(fileSystem)).length > 0; tries++) {
    if (tries === 50) throw new Failed('the kernel does not free a loop device: see losetup')
    await new Promise((resolve) => setTimeout(resolve, 100))
  }
}
