/** What this host's kernel does with the files of a mount: loop devices over them, and swap on those. */
import { execFile } from 'node:child_process'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { type Allocator, residentAllocator, systemAllocator } from '@tmem/core'
import { memoryLimits, type ReadText } from '@tmem/zcache'
import { Failed } from '../ending.ts'

/** A small text file of the system, or `undefined` when there is none. */
export const readText: ReadText = (path) => {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    // Whatever the reason is, the host does not tell.
    return undefined
  }
}

/** Below this much free memory a host swaps before tmem could help. */
export const headroomBytes: number = 256 * 2 ** 20

/**
 * What a server needs of a control group's limit beside what it has taken when it begins to serve: its heap grows,
 * young objects alone have up to 48 MiB, and what is over the limit is killed.
 */
const growthBytes = 64 * 2 ** 20

/** Bytes of memory that programs can have before this host swaps; `undefined` where the system does not tell. */
export function availableBytes(): number | undefined {
  if (!existsSync('/proc/meminfo')) return undefined
  const [, kilobytes] = /^MemAvailable:\s+(\d+) kB$/m.exec(readFileSync('/proc/meminfo', 'utf8')) ?? []
  return kilobytes === undefined ? undefined : Number(kilobytes) * 1024
}

/** Memory that is there before it is needed, if the host can spare it. */
export interface AheadMemory {
  /** Layers take all they may ever need when they open. */
  readonly allocator: Allocator
  /**
   * Once they are open: has the kernel give what they took, and what is taken from now on. Throws `Failed` when the
   * host cannot spare it: more than there is would not fail, but have the kernel kill somebody.
   */
  settle(): void
}

const mebibytes = (bytes: number): string => `${Math.floor(bytes / 2 ** 20)}MiB`

/**
 * What may be taken now so that neither the host nor a control group of this process is short of memory; and who has
 * least to spare.
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
          `the stacks may take ${mebibytes(bytes)} of memory, and ${by} can spare ${mebibytes(Math.max(0, spare))} now: ` +
            'give smaller limits',
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

/** A file that the kernel uses as a block device. */
export interface LoopUse {
  /** E.g. `/dev/loop0`. */
  readonly loop: string
  readonly file: string
  /** What the kernel swaps to it, or undefined when it does not. Bytes. */
  readonly swap: { readonly sizeBytes: number; readonly usedBytes: number; readonly priority: number } | undefined
}

/** Loop devices over files below a directory. */
export function loopsBelow(directory: string): LoopUse[] {
  const swaps = activeSwaps()
  const uses: LoopUse[] = []
  for (const name of existsSync('/sys/block') ? readdirSync('/sys/block') : []) {
    const note = `/sys/block/${name}/loop/backing_file`
    if (!existsSync(note)) continue
    const file = readFileSync(note, 'utf8').trimEnd()
    if (!file.startsWith(`${directory}/`)) continue
    const loop = join('/dev', name)
    uses.push({ loop, file, swap: swaps.get(loop) })
  }
  return uses
}

function activeSwaps(): Map<string, NonNullable<LoopUse['swap']>> {
  const swaps = new Map<string, NonNullable<LoopUse['swap']>>()
  for (const line of readFileSync('/proc/swaps', 'utf8').split('\n').slice(1)) {
    const [path, , size, used, priority] = line.split(/\s+/)
    if (path !== undefined && path !== '')
      swaps.set(path, { sizeBytes: Number(size) * 1024, usedBytes: Number(used) * 1024, priority: Number(priority) })
  }
  return swaps
}

/**
 * Runs a program to its end; its standard output. Rejects with `Failed` and what it said when it fails or is not there.
 */
export function tool(command: string, ...words: string[]): Promise<string> {
  return new Promise((resolve, reject) => {
    // Swap tools live where the PATH of a plain user does not look.
    const env = { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin`, LC_ALL: 'C' }
    execFile(command, words, { env }, (error, stdout, stderr) => {
      if (error === null) resolve(stdout.trim())
      else reject(new Failed(`${[command, ...words].join(' ')} failed: ${stderr.trim() || error.message}`))
    })
  })
}

/** Ends swapping to the files below a directory and frees their loop devices, in this order. */
export async function drain(directory: string): Promise<void> {
  for (const { loop, swap } of loopsBelow(directory)) {
    if (swap !== undefined) await tool('swapoff', loop)
    await tool('losetup', '-d', loop)
  }
  // The kernel lets go of a loop device's file a moment after it was told to.
  for (let tries = 0; loopsBelow(directory).length > 0; tries++) {
    if (tries === 50) throw new Failed(`loop devices over ${directory} are still in use: is one of them mounted?`)
    await new Promise((resolve) => setTimeout(resolve, 100))
  }
}
