/**
 * The memory that the kernel's zram needs for pages: sets a free /dev/zram* to LZ4, writes the pages, reads its
 * counters, and resets it.
 *
 * It changes the machine for a moment: a note in /run is written first, so that a device that a killed run has left
 * full is emptied by the next one; only the device that the note tells of is reset. Everything is done in one go: no
 * signal comes in between.
 */
import {
  closeSync,
  existsSync,
  fsyncSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { processRuns } from '@tmem/core'

const note = '/run/tmem-bench-zcache'
const pageBytes = 4096
/** Pages that are written at once. */
const perWrite = 256

/**
 * Bytes that zram has used for the pages, with what it wastes (`mem_used_total`), or in words why it cannot be asked
 * here.
 */
export function zramBytes(pages: Uint8Array): number | string {
  if (process.platform !== 'linux') return 'needs Linux'
  if (process.getuid?.() !== 0) return 'needs root: it writes to a /dev/zram*'
  const trouble = sweep()
  if (trouble !== undefined) return trouble
  const name = freeDevice()
  if (name === undefined) return 'needs a /dev/zram* with lz4 that nobody uses'
  writeFileSync(note, `${process.pid} ${name}\n`)
  try {
    return filled(name, pages)
  } catch (error) {
    return `/dev/${name} could not be used: ${error instanceof Error ? error.message : String(error)}`
  } finally {
    undo(name)
  }
}

function freeDevice(): string | undefined {
  return readdirSync('/sys/block').find(
    (name) =>
      /^zram\d+$/.test(name) &&
      existsSync(`/dev/${name}`) &&
      setting(name, 'disksize') === '0' &&
      setting(name, 'comp_algorithm').includes('lz4'),
  )
}

const setting = (name: string, key: string): string => readFileSync(`/sys/block/${name}/${key}`, 'utf8').trim()

/** Empties the device that a run that is no more has left. Says why not, when one is still there. */
function sweep(): string | undefined {
  if (!existsSync(note)) return undefined
  const [pid, name] = readFileSync(note, 'utf8').trim().split(' ')
  if (processRuns(Number(pid))) return `another run (process ${pid}) is using /dev/${name}`
  if (name === undefined || !/^zram\d+$/.test(name)) rmSync(note)
  else undo(name)
  return undefined
}

function filled(name: string, pages: Uint8Array): number {
  writeFileSync(`/sys/block/${name}/comp_algorithm`, 'lz4')
  writeFileSync(`/sys/block/${name}/disksize`, `${pages.length}`)
  const file = openSync(`/dev/${name}`, 'r+')
  try {
    for (let at = 0; at < pages.length; )
      at += writeSync(file, pages, at, Math.min(perWrite * pageBytes, pages.length - at), at)
    fsyncSync(file)
    const [stored, , used] = setting(name, 'mm_stat').split(/\s+/).map(Number)
    if (stored === undefined || used === undefined || !(used > 0 && stored <= pages.length))
      throw new Error(`it says that it holds ${stored} bytes in ${used}`)
    return used
  } finally {
    closeSync(file)
  }
}

function undo(name: string): void {
  // Somebody who looks at every new device may still have it open.
  for (let tries = 0; ; tries++)
    try {
      writeFileSync(`/sys/block/${name}/reset`, '1')
      break
    } catch (error) {
      if (tries === 100 || (error as NodeJS.ErrnoException).code !== 'EBUSY') throw error
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20)
    }
  rmSync(note)
}
