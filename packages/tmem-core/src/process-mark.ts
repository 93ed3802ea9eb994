/**
 * Who made a file that may outlive its maker: a process number alone is soon given to somebody else, so the mark has,
 * where the system tells them (Linux's /proc), the time at which the process started and the boot during which it did.
 */
import { readFileSync } from 'node:fs'

/** The process that wrote a mark. */
export interface MarkedProcess {
  readonly pid: number
  /** It still runs, as far as this process can see: one in another container counts as ended. */
  readonly running: boolean
}

/** The mark of this process: printable, without line ends, at most 80 characters. */
export function processMark(): string {
  return `${process.pid} ${startOf(process.pid) ?? '-'} ${boot() ?? '-'}`
}

/** Who wrote that mark; `undefined` when it is none. */
export function markedProcess(mark: string): MarkedProcess | undefined {
  const [, number, start, bootThen] = /^([1-9]\d{0,9}) (\d{1,20}|-) ([0-9a-f-]{1,36})$/.exec(mark) ?? []
  if (number === undefined) return undefined
  const pid = Number(number)
  const bootNow = boot() ?? '-'
  const running = bootThen === bootNow && exists(pid) && (startOf(pid) ?? '-') === start
  return { pid, running }
}

function exists(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    // It is there, and somebody else's.
    return (error as NodeJS.ErrnoException).code === 'EPERM'
  }
}

/** Clock ticks from boot to the start of a process; `undefined` where the system does not tell. */
function startOf(pid: number): string | undefined {
  // The name of the program is in parentheses and may have any characters.
  return contentOf(`/proc/${pid}/stat`)?.split(') ').at(-1)?.split(' ')[19]
}

const boot = (): string | undefined => contentOf('/proc/sys/kernel/random/boot_id')?.trim()

function contentOf(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8')
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    // No such system, no such process, or one that ended while it was read.
    if (code === 'ENOENT' || code === 'ESRCH' || code === 'EACCES') return undefined
    throw error
  }
}
