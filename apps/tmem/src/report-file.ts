/**
 * Reports of commands, as files.
 *
 * Invariant: what is written over is a report of ours, or what the user has said may be written over; told by what
 * stands in the very file that is opened, whatever it is called. A file that could not be written whole and was not
 * there before is taken away again.
 */
import {
  closeSync,
  constants,
  existsSync,
  fstatSync,
  ftruncateSync,
  openSync,
  readSync,
  rmSync,
  statSync,
  writeSync,
} from 'node:fs'
import { dirname, resolve } from 'node:path'
import { type ReportData, reportMark, reportPage } from '@tmem/console'
import { describeMachine } from './bench/frame.ts'
import { BadInput, Failed } from './ending.ts'

/** As it comes from the command line. */
export interface ReportOptions {
  /** Where a report goes. */
  readonly report?: string
  /** Also over a file that is none. */
  readonly overwrite?: true
}

/** What a report is about, without what all of them have. */
export type ReportContent = ReportData extends infer Each
  ? Each extends unknown
    ? Omit<Each, 'time' | 'machine'>
    : never
  : never

/** Throws `BadInput` when a report could not be written there, before the work that it would be about. */
export function judgeReport({ report, overwrite }: ReportOptions): void {
  if (report === undefined) {
    if (overwrite === true) throw new BadInput('--overwrite is for --report FILE')
    return
  }
  const path = resolve(report)
  if (!existsSync(path)) {
    if (statSync(dirname(path), { throwIfNoEntry: false })?.isDirectory() !== true)
      throw new BadInput(`--report ${report}: there is no directory ${dirname(path)}: make it with mkdir -p`)
    return
  }
  closeSync(openOurs(report, overwrite === true))
}

/** Writes a report. Throws `BadInput` for a file that may not be written over, `Failed` when it cannot be written. */
export function writeReport({ report, overwrite }: ReportOptions, content: ReportContent): void {
  if (report === undefined) return
  const bytes = Buffer.from(reportPage({ ...content, time: Date.now(), machine: describeMachine() } as ReportData))
  const path = resolve(report)
  let file: number
  let isNew = true
  try {
    file = openSync(path, 'wx')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST')
      throw new Failed(`the report cannot be written: ${(error as Error).message}`)
    file = openOurs(report, overwrite === true)
    isNew = false
  }
  try {
    for (let done = 0; done < bytes.length; ) done += writeSync(file, bytes, done, bytes.length - done, done)
    ftruncateSync(file, bytes.length)
  } catch (error) {
    if (isNew) rmSync(path, { force: true })
    throw new Failed(`the report ${report} cannot be written: ${(error as Error).message}`)
  } finally {
    closeSync(file)
  }
}

/** Opens a report for writing. Throws `BadInput` for anything else, unless it may be written over. */
function openOurs(report: string, overwrites: boolean): number {
  let file: number
  try {
    // Opening a pipe would wait for who reads from it.
    file = openSync(resolve(report), constants.O_RDWR | constants.O_NONBLOCK)
  } catch (error) {
    throw new BadInput(`--report ${report}: it is there, and cannot be opened: ${(error as Error).message}`)
  }
  try {
    if (!fstatSync(file).isFile()) throw new BadInput(`--report ${report}: it is there, and no file: name another`)
    const begins = Buffer.alloc(Buffer.byteLength(reportMark))
    const length = readSync(file, begins, 0, begins.length, 0)
    if (begins.toString('utf8', 0, length) !== reportMark && !overwrites)
      throw new BadInput(`--report ${report}: it is there, and no report: name another file, or add --overwrite`)
    return file
  } catch (error) {
    closeSync(file)
    throw error
  }
}
