/** The directory of the demo's swap files, which is removed however the program ends. */
import { mkdtempSync, rmSync, statfsSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { formatBytes } from '@tmem/core'
import { BadInput } from '../ending.ts'

/** File systems that keep files in memory (tmpfs, ramfs), where a swap file would swap memory for memory. */
const memoryFileSystems: ReadonlySet<number> = new Set([0x01021994, 0x858458f6])

/** A new directory. */
export interface SwapDirectory {
  readonly path: string
  /** Removes the directory and its content. The exit of the process does so, too. */
  remove(): void
}

/**
 * Makes a directory with room for a swap file of this size, in `wanted`, or in the first usual place for temporary
 * files that lies on a disk. Throws `BadInput` if that fails.
 */
export function makeSwapDirectory(wanted: string | undefined, bytes: number): SwapDirectory {
  const parent = wanted ?? [tmpdir(), '/var/tmp', process.cwd()].find(isOnDisk) ?? tmpdir()
  const room = roomIn(parent)
  // 1 MiB for the header of the file and the metadata of the file system.
  if (room < bytes + 2 ** 20)
    throw new BadInput(
      `no space for the swap file: ${parent} has ${formatBytes(room)} free, the demo needs ${formatBytes(bytes)}; lower --size, or name another directory with --dir`,
    )
  let path: string
  try {
    path = mkdtempSync(join(parent, 'tmem-'))
  } catch (error) {
    throw new BadInput(`cannot make a swap file in ${parent}: ${(error as Error).message}`)
  }
  const removeNow = (): void => rmSync(path, { recursive: true, force: true })
  process.on('exit', removeNow)
  return {
    path,
    remove() {
      removeNow()
      process.off('exit', removeNow)
    },
  }
}

function isOnDisk(path: string): boolean {
  try {
    return statSync(path).isDirectory() && !memoryFileSystems.has(statfsSync(path).type)
  } catch {
    // Missing or not accessible: try the next one.
    return false
  }
}

function roomIn(directory: string): number {
  try {
    const found = statSync(directory, { throwIfNoEntry: false })
    if (found === undefined) throw new Error(`the directory does not exist: make it with mkdir -p ${directory}`)
    if (!found.isDirectory()) throw new Error('it is not a directory')
    const { bavail, bsize } = statfsSync(directory)
    return bavail * bsize
  } catch (error) {
    throw new BadInput(`cannot make a swap file in ${directory}: ${(error as Error).message}`)
  }
}
