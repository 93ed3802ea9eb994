/** Archives, as busybox unpacks them, and as a small reader of our own sees what is only there for kernels. */
import { execFileSync } from 'node:child_process'
import { lstatSync, mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { unpacked } from '../../../tools/debian-packages.mjs'
import { requires } from '../../../tools/requires.ts'
import { type CpioEntry, cpio } from '../src/index.ts'

interface Seen {
  readonly path: string
  readonly mode: number
  readonly data: string
  readonly device: readonly number[]
}

/** The entries of an archive, in its order, without the last one. */
function read(archive: Uint8Array): Seen[] {
  const bytes = Buffer.from(archive)
  const seen: Seen[] = []
  let at = 0
  for (;;) {
    expect(bytes.toString('latin1', at, at + 6)).toBe('070701')
    const fields = Array.from({ length: 13 }, (_, n) =>
      Number.parseInt(bytes.toString('latin1', at + 6 + 8 * n, at + 14 + 8 * n), 16),
    )
    const [inode, mode, uid, gid, links, time, size, , , major, minor, nameSize, sum] = fields as [number, ...number[]]
    expect({ uid, gid, links, time, sum }).toEqual({ uid: 0, gid: 0, links: 1, time: 0, sum: 0 })
    const dataAt = (at + 110 + nameSize! + 3) & ~3
    const path = bytes.toString('utf8', at + 110, at + 109 + nameSize!)
    expect(bytes[at + 109 + nameSize!]).toBe(0)
    at = (dataAt + size! + 3) & ~3
    if (path === 'TRAILER!!!') break
    expect(inode).toBe(seen.length + 1)
    seen.push({ path, mode: mode!, data: bytes.toString('latin1', dataAt, dataAt + size!), device: [major!, minor!] })
  }
  expect(at).toBe(bytes.length)
  return seen
}

describe('an archive', () => {
  test('has each kind of entry, and what is above it first', () => {
    const archive = cpio([
      { path: 'bin/sh', link: 'busybox' },
      { path: 'dev/console', device: [5, 1], mode: 0o600 },
      { path: 'bin/busybox', data: new Uint8Array([1, 2, 3]), mode: 0o755 },
      { path: 'tmp', mode: 0o1777 },
      { path: 'a/b/é', data: 'é' },
    ])
    const plain = { data: '', device: [0, 0] }
    expect(read(archive)).toEqual([
      { ...plain, path: 'a', mode: 0o040755 },
      { ...plain, path: 'tmp', mode: 0o041777 },
      { ...plain, path: 'bin', mode: 0o040755 },
      { ...plain, path: 'dev', mode: 0o040755 },
      { ...plain, path: 'a/b', mode: 0o040755 },
      { ...plain, path: 'a/b/é', mode: 0o100644, data: Buffer.from('é').toString('latin1') },
      { ...plain, path: 'bin/sh', mode: 0o120755, data: 'busybox' },
      { ...plain, path: 'dev/console', mode: 0o020600, device: [5, 1] },
      { ...plain, path: 'bin/busybox', mode: 0o100755, data: '\x01\x02\x03' },
    ])
  })

  test.each(['', '/etc', 'a//b', 'a/', './a', 'a/../b', 'a\0b', 'TRAILER!!!'])('refuses the path %j', (path) => {
    expect(() => cpio([{ path, data: '' }])).toThrow(RangeError)
  })

  test('refuses what is there twice, and what is below a file', () => {
    const twice: CpioEntry[] = [{ path: 'a' }, { path: 'a', data: '' }]
    expect(() => cpio(twice)).toThrow('a is there twice')
    expect(() =>
      cpio([
        { path: 'a/b', data: '' },
        { path: 'a', data: '' },
      ]),
    ).toThrow('a is not a directory')
  })
})

function described(path: string): object {
  const state = lstatSync(path)
  if (state.isSymbolicLink()) return { link: readlinkSync(path) }
  return { mode: state.mode & 0o777, data: state.isDirectory() ? 'a directory' : readFileSync(path, 'latin1') }
}

test('busybox unpacks what was put in', { timeout: 60_000 }, (ctx) => {
  requires(ctx, { packages: ['busybox-static'] })
  const part = fc.stringMatching(/^[a-zA-Z0-9 _-]{1,9}$/)
  const path = fc.array(part, { minLength: 1, maxLength: 3 }).map((parts) => parts.join('/'))
  const mode = fc.integer({ min: 0, max: 0o777 }).map((bits) => bits | 0o700)
  const entry = fc.oneof(
    fc.record({ path, mode, data: fc.uint8Array({ maxLength: 9000, size: 'max' }) }),
    fc.record({ path, link: part.map((name) => `nowhere/${name}`) }),
    fc.record({ path, mode }),
  )
  // Nothing below a file or a link.
  const tree = fc
    .uniqueArray(entry, { selector: ({ path: own }) => own, maxLength: 8 })
    .map((entries) =>
      entries.filter(
        (one) => !entries.some((file) => ('data' in file || 'link' in file) && one.path.startsWith(`${file.path}/`)),
      ),
    )
  fc.assert(
    fc.property(tree, (entries) => {
      const folder = mkdtempSync(join(tmpdir(), 'tmem-cpio-'))
      try {
        const busybox = join(unpacked('busybox-static'), 'bin/busybox')
        execFileSync(busybox, ['cpio', '-i', '-d'], {
          cwd: folder,
          input: cpio(entries),
          stdio: ['pipe', 'ignore', 'pipe'],
        })
        const above = entries.flatMap(({ path: own }) =>
          own.split('/').map((_, n, parts) => parts.slice(0, n + 1).join('/')),
        )
        expect(new Set(readdirSync(folder, { recursive: true, encoding: 'utf8' }))).toEqual(new Set(above))
        const found = entries.map(({ path: own }) => described(join(folder, own)))
        expect(found).toEqual(
          entries.map((one) =>
            'link' in one
              ? { link: one.link }
              : { mode: one.mode, data: 'data' in one ? Buffer.from(one.data).toString('latin1') : 'a directory' },
          ),
        )
      } finally {
        rmSync(folder, { recursive: true, force: true })
      }
    }),
    { seed: 6, numRuns: 60 },
  )
})
