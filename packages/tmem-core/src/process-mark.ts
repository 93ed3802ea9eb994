/**
 * Who made a file that may outlive its maker: a process number alone is soon given to somebody else, so the mark has,
 * where the system tells them (Linux's /proc), the time at which the process started and the boot during which it did.
 *
 * Source: proc_pid_stat(5); credentials(7) and wait(2) for processes that nobody has waited for.
 */
import { builtin } from './runtime.ts'

/** The process that wrote a mark. */
export interface MarkedProcess {
  readonly pid: number
  /** It still runs, as far as this process can see: one in another container counts as ended. */
  readonly running: boolean
}

/** The mark of this process: printable, without line ends, at most 80 characters. */
export function processMark(): string {
  return `${process.pid} ${statusOf(process.pid)?.start ?? '-'} ${boot() ?? '-'}`
}

/** Who wrote that mark; `undefined` when it is none. */
export function markedProcess(mark: string): MarkedProcess | undefined {
  const [, number, start, bootThen] = /^([1-9]\d{0,9}) (\d{1,20}|-) ([0-9a-f-]{1,36})$/.exec(mark) ?? []
  if (number === undefined) return undefined
  const pid = Number(number)
  const bootNow = boot() ?? '-'
  const running = bootThen === bootNow && processRuns(pid) && (statusOf(pid)?.start ?? '-') === start
  return { pid, running }
}

/**
 * Whether a process of that number runs. One that has ended, and whose parent has not asked how (Linux's state Z), has
 * nothing open and holds nothing any more: it does not run.
 */
export function processRuns(pid: number): boolean {
  try {
    process.kill(pid, 0)
  } catch (error) {
    // It is there, and somebody else's.
    if ((error as NodeJS.ErrnoException).code !== 'EPERM') return false
  }
  const status = statusOf(pid)
  // As long as another thread of it is in the middle of a call, its files are open.
  return status === undefined || !/^[ZXx]$/.test(status.state) || status.threads > 1
}

/**
 * What Linux tells of a process: its state, its threads, and clock ticks from boot to its start. `undefined`: no such
 * system or process.
 */
function statusOf(pid: number): { state: string; threads: number; start: string } | undefined {
  // The name of the program is in parentheses and may have any characters.
  const fields = contentOf(`/proc/${pid}/stat`)?.split(') ').at(-1)?.split(' ')
  return fields === undefined ? undefined : { state: fields[0]!, threads: Number(fields[17]), start: fields[19]! }
}

const boot = (): string | undefined => contentOf('/proc/sys/kernel/random/boot_id')?.trim()

function contentOf(path: string): string | undefined {
  try {
    return builtin<typeof import('node:fs')>('node:fs')?.readFileSync(path, 'utf8')
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    // No such system, no such process, or one that ended while it was read.
    if (code === 'ENOENT' || code === 'ESRCH' || code === 'EACCES') return undefined
    throw error
  }
}
