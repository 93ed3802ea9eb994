/** Where the demo's swap files lie, and that nothing is left of them whatever ends the program. */
import { mkdtempSync, rmSync, statfsSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { formatBytes } from '@tmem/core'
import { BadInput } from '../ending.ts'

/** File systems that keep files in memory: a swap file there swaps memory for memory (tmpfs, ramfs). */
const memoryFileSystems: ReadonlySet<number> = new Set([0x01021994, 0x858458f6])

/** A directory of our own. */
export interface SwapDirectory {
  readonly path: string
  /** Removes it with all that is in it. Also done when the process exits without calling this. */
  remove(): void
}

/**
 * Makes a directory with room for a swap file of that size, in `wanted`, or in the first usual place for temporary
 * files that lies on a disk. Throws `BadInput` when that cannot be.
 */
export function makeSwapDirectory(wanted: string | undefined, bytes: number): SwapDirectory {
  const parent = wanted ?? [tmpdir(), '/var/tmp', process.cwd()].find(isOnDisk) ?? tmpdir()
  const room = roomIn(parent)
  // Besides the pages the file has a header; 1 MiB is for that and for the file system's own.
  if (room < bytes + 2 ** 20)
    throw new BadInput(
      `no space for the swap file: ${parent} has ${formatBytes(room)} free, ${formatBytes(bytes)} are needed; ask for less with --size or name another place with --dir`,
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
    // Not there, or not ours to look at: not usable. The next place is tried.
    return false
  }
}

function roomIn(directory: string): number {
  try {
    const found = statSync(directory, { throwIfNoEntry: false })
    if (found === undefined) throw new Error(`there is no such directory: make it with mkdir -p ${directory}`)
    if (!found.isDirectory()) throw new Error('it is no directory')
    const { bavail, bsize } = statfsSync(directory)
    return bavail * bsize
  } catch (error) {
    throw new BadInput(`cannot make a swap file in ${directory}: ${(error as Error).message}`)
  }
}
