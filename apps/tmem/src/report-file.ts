/**
 * The files of --report.
 *
 * Invariant: only an earlier report is overwritten, or any file with --overwrite. The content of the opened file
 * decides, not its name. A new file that could not be written whole is removed.
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

/** The options as they come from the command line. */
export interface ReportOptions {
  /** Path of the report. */
  readonly report?: string
  /** Replace even a file that is not a report. */
  readonly overwrite?: true
}

/** The data of a report, without the fields that all reports share. */
export type ReportContent = ReportData extends infer Each
  ? Each extends unknown
    ? Omit<Each, 'time' | 'machine'>
    : never
  : never

/** Throws `BadInput` if a report could not be written; called before the work begins. */
export function judgeReport({ report, overwrite }: ReportOptions): void {
  if (report === undefined) {
    if (overwrite === true) throw new BadInput('--overwrite needs --report FILE: give both, or neither')
    return
  }
  const path = resolve(report)
  if (!existsSync(path)) {
    if (statSync(dirname(path), { throwIfNoEntry: false })?.isDirectory() !== true)
      throw new BadInput(`--report ${report}: the directory ${dirname(path)} does not exist: make it with mkdir -p`)
    return
  }
  closeSync(openOurs(report, overwrite === true))
}

/** Writes a report. Throws `BadInput` if the file may not be overwritten, `Failed` if it cannot be written. */
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

/** Opens a report for writing. Throws `BadInput` for anything but a report, unless `overwrite` is set. */
function openOurs(report: string, overwrites: boolean): number {
  let file: number
  try {
    // Without O_NONBLOCK, opening a pipe would wait for a reader.
    file = openSync(resolve(report), constants.O_RDWR | constants.O_NONBLOCK)
  } catch (error) {
    throw new BadInput(`--report ${report}: the file exists and cannot be opened: ${(error as Error).message}`)
  }
  try {
    if (!fstatSync(file).isFile())
      throw new BadInput(`--report ${report}: it exists and is not a regular file: name another`)
    const begins = Buffer.alloc(Buffer.byteLength(reportMark))
    const length = readSync(file, begins, 0, begins.length, 0)
    if (begins.toString('utf8', 0, length) !== reportMark && !overwrites)
      throw new BadInput(
        `--report ${report}: the file exists and is not a report: name another file, or add --overwrite`,
      )
    return file
  } catch (error) {
    closeSync(file)
    throw error
  }
}
