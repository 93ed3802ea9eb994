/**
 * Archives in the "newc" form of cpio, which the Linux kernel unpacks into its first root directory.
 *
 * Source: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. An entry is a header of 110 bytes
 * (a magic number and 13 fields of 8 hexadecimal digits), its name with a NUL, and its data; header with name, and
 * data, each end on a multiple of 4 bytes. Everything is root's and from 1970: the same entries give the same bytes.
 */

/** What an archive holds: a file, a link, a device, or (with none of the three) a directory. */
export interface CpioEntry {
  /** Relative, without `.` and `..`. Directories above it need not be entries themselves. */
  readonly path: string
  /** Permissions: by default 0o755, and 0o644 for a file. */
  readonly mode?: number
  readonly data?: Uint8Array | string
  /** Target of a symbolic link. */
  readonly link?: string
  /** Major and minor number of a character device. */
  readonly device?: readonly [number, number]
}

const trailer = 'TRAILER!!!'
const types = Object.freeze({ directory: 0o040000, file: 0o100000, link: 0o120000, device: 0o020000 })

/**
 * The archive. Throws RangeError for a path that is not as it must be, or is there twice, or is below something other
 * than a directory.
 */
export function cpio(entries: readonly CpioEntry[]): Uint8Array {
  const all = new Map<string, CpioEntry>()
  for (const entry of entries) {
    const parts = entry.path.split('/')
    if (entry.path === trailer || /\0/.test(entry.path) || parts.some((part) => /^\.{0,2}$/.test(part)))
      throw new RangeError(`bad path ${JSON.stringify(entry.path)}: expected a relative one without . and ..`)
    if (all.has(entry.path)) throw new RangeError(`${entry.path} is there twice`)
    all.set(entry.path, entry)
  }
  for (const { path } of entries)
    for (let end = path.indexOf('/'); end >= 0; end = path.indexOf('/', end + 1)) {
      const above = path.slice(0, end)
      if (!all.has(above)) all.set(above, { path: above })
      if (typeOf(all.get(above)!) !== 'directory') throw new RangeError(`${above} is not a directory`)
    }
  // What is above a path has a shorter path, and so comes before it.
  const sorted = [...all.values()].sort((a, b) => a.path.length - b.path.length)
  const records = sorted.flatMap((entry, n) => {
    const type = typeOf(entry)
    const mode = entry.mode ?? (type === 'file' ? 0o644 : 0o755)
    return record(entry.path, n + 1, types[type] | mode, entry.link ?? entry.data ?? '', entry.device)
  })
  return Buffer.concat([...records, ...record(trailer, 0, 0, '')])
}

function typeOf({ data, link, device }: CpioEntry): keyof typeof types {
  return data !== undefined ? 'file' : link !== undefined ? 'link' : device !== undefined ? 'device' : 'directory'
}

function record(
  path: string,
  inode: number,
  mode: number,
  data: Uint8Array | string,
  [major, minor]: readonly [number, number] = [0, 0],
): Uint8Array[] {
  const content = typeof data === 'string' ? Buffer.from(data) : data
  const name = `${path}\0`
  // inode, mode, uid, gid, links, time, size, device, of the device itself, size of the name, check sum (of another
  // form)
  const fields = [inode, mode, 0, 0, 1, 0, content.length, 0, 0, major, minor, Buffer.byteLength(name), 0]
  const header = Buffer.from(`070701${fields.map((field) => field.toString(16).padStart(8, '0')).join('')}${name}`)
  return [header, padding(header.length), content, padding(content.length)]
}

const padding = (length: number): Uint8Array => new Uint8Array(-length & 3)
