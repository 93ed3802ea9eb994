/**
 * Which mount a path or a descriptor leads to, by the kernel's number for it, never by the text of the path.
 *
 * Nothing here asks a file system anything: a descriptor that only names a place (O_PATH) can be had of a mount whose
 * server is dead, or is this thread.
 *
 * Source: open(2) for O_PATH; proc(5) for /proc/self/fdinfo and /proc/self/mountinfo.
 */
import { closeSync, constants, openSync, readFileSync, readlinkSync } from 'node:fs'

/** A mount of this process's namespace. */
export interface Mount {
  /** The kernel's number: of two mounts on one directory each has its own. */
  readonly id: number
  /** Number of the file system, `MAJOR:MINOR`: what `stat` of a file in it says. */
  readonly device: string
  /** Where it is, as the kernel calls it: without symbolic links. */
  readonly point: string
  /** E.g. `fuse.tmem`. */
  readonly type: string
}

/** What a path leads to. */
export interface Place {
  /** The kernel's own name for it. */
  readonly path: string
  readonly mount: Mount
  /** It is the root of that mount: something is mounted there. */
  readonly isMountPoint: boolean
}

/** Not among the constants of node:fs; the same number wherever Node runs on Linux. */
const onlyPath = 0o10000000

/** What a path leads to. Throws the system's error where it leads nowhere. */
export function placeOf(path: string): Place {
  const descriptor = openSync(path, onlyPath | constants.O_RDONLY)
  try {
    return placeOfDescriptor(descriptor)
  } finally {
    closeSync(descriptor)
  }
}

/** What a descriptor leads to. */
function placeOfDescriptor(descriptor: number): Place {
  const id = Number(/^mnt_id:\s*(\d+)$/m.exec(readFileSync(`/proc/self/fdinfo/${descriptor}`, 'latin1'))?.[1])
  const path = readlinkSync(`/proc/self/fd/${descriptor}`)
  const mount = mounts().find((one) => one.id === id)
  if (mount === undefined) throw new Error(`${path} is in no mount of this process: it was taken away meanwhile`)
  return { path, mount, isMountPoint: mount.point === path }
}

/** All mounts of this process's namespace. */
export function mounts(): Mount[] {
  return readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => {
      const [id, , device, , point] = line.split(' ')
      const [type] = line.slice(line.indexOf(' - ') + 3).split(' ')
      return { id: Number(id), device: device!, point: unescaped(point!), type: type! }
    })
}

/** A path as the kernel's tables have it: blanks, line ends and backslashes are written in octal there. */
export const unescaped = (text: string): string =>
  text.replaceAll(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(Number.parseInt(octal, 8)))

/** `MAJOR:MINOR` of a number that `stat` gives. */
export function deviceText(device: bigint): string {
  const major = ((device >> 8n) & 0xfffn) | ((device >> 32n) & ~0xfffn)
  const minor = (device & 0xffn) | ((device >> 12n) & ~0xffn)
  return `${major}:${minor}`
}
