/** A mount as programs see it. All of them are other processes: one that waits for its own server waits for ever. */
import { execFile, spawn } from 'node:child_process'
import {
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  rmdirSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { constants, tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { type BlockDevice, TmemError } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { type Ramzswap, ramzswap } from '@tmem/ramzswap'
import { zcache } from '@tmem/zcache'
import { afterEach, beforeAll, describe, expect, test, vi } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import {
  type FuseDirectory,
  type FuseNode,
  type FuseServer,
  fuseServer,
  mounts,
  namedApart,
  placeOf,
  statisticsTree,
} from '../src/index.ts'

const needs = { root: true, paths: ['/dev/fuse'] }
const sizeBytes = 8 * 2 ** 20
const { ENXIO } = constants.errno
const cleanups: (() => Promise<void> | void)[] = []

/** Takes away what killed runs have left: mounts of ours, in folders of these tests, whose server is dead. */
beforeAll(async () => {
  const place = join(realpathSync(tmpdir()), 'fuse-mount-')
  for (const { type, point } of mounts()) {
    if (type !== 'fuse.tmem' || !point.startsWith(place)) continue
    // Asked by a process of its own: a server that only hangs is waited for there.
    const { stderr } = await run('stat', '--file-system', point)
    if (!stderr.includes('not connected')) continue
    await run('umount', point)
    rmdirSync(point)
  }
})

afterEach(async () => {
  for (const undo of cleanups.splice(0).reverse()) await undo()
})

interface Ended {
  readonly code: number
  readonly stdout: Buffer
  readonly stderr: string
}

/** Runs a program, for at most ten seconds. */
function run(command: string, ...words: string[]): Promise<Ended> {
  return new Promise((resolve) => {
    execFile(command, words, { encoding: 'buffer', timeout: 10_000, maxBuffer: 2 ** 26 }, (error, stdout, stderr) => {
      resolve({ code: error === null ? 0 : Number(error.code ?? -1), stdout, stderr: stderr.toString() })
    })
  })
}

function device(): Ramzswap {
  const folder = mkdtempSync(join(tmpdir(), 'fuse-swap-'))
  cleanups.push(() => rmSync(folder, { recursive: true }))
  const made = ramzswap({
    name: 'disk',
    sizeBytes,
    stack: [
      zcache({ limitBytes: 2 ** 22, zvMaxZsize: 2048 }),
      frontswap({ file: join(folder, 'swap.img'), sizeBytes }),
    ],
  })
  cleanups.push(() => made.close())
  return made
}

const directory = (entries: Record<string, FuseNode>): FuseDirectory => ({
  kind: 'directory',
  entries: () => new Map(Object.entries(entries)),
})

async function mounted(
  root: FuseDirectory,
  more: object = {},
): Promise<{ server: FuseServer; at: (path: string) => string }> {
  const mountPoint = mkdtempSync(join(tmpdir(), 'fuse-mount-'))
  cleanups.push(() => rmdirSync(mountPoint))
  const server = await fuseServer({ mountPoint, root, ...more })
  cleanups.push(() => server.close())
  return { server, at: (path) => join(mountPoint, path) }
}

/** Bytes of which every other page does not compress. */
function corpus(length: number): Buffer {
  const bytes = Buffer.alloc(length)
  let state = 1
  for (let i = 0; i < length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    bytes[i] = (i & 4096) === 0 ? state >>> 24 : (i >>> 5) & 0xff
  }
  return bytes
}

function fileWith(bytes: Uint8Array): string {
  const folder = mkdtempSync(join(tmpdir(), 'fuse-data-'))
  cleanups.push(() => rmSync(folder, { recursive: true }))
  const file = join(folder, 'data')
  writeFileSync(file, bytes)
  return file
}

describe('a device as a file', () => {
  test.for([
    ['through the page cache', 'conv=notrunc,fsync', 'bs=64k', 0] as const,
    ['with direct I/O in large requests', 'conv=notrunc oflag=direct', 'bs=1M', 0] as const,
    ['with direct I/O page by page, in busy turns', 'conv=notrunc oflag=direct', 'bs=4k', 50] as const,
  ])('is written and read back, %s', async ([, flags, block, busyTurns], ctx) => {
    requires(ctx, needs)
    const disk = device()
    const { server, at } = await mounted(directory({ disk: { kind: 'device', device: disk } }), { busyTurns })
    const bytes = corpus(2 ** 21)
    const written = await run('dd', `if=${fileWith(bytes)}`, `of=${at('disk')}`, block, ...flags.split(' '))
    expect(written).toMatchObject({ code: 0 })
    const direct = flags.includes('direct') ? ['iflag=direct'] : []
    const read = await run('dd', `if=${at('disk')}`, block, 'count=2M', 'iflag=count_bytes', ...direct)
    expect(read).toMatchObject({ code: 0 })
    expect(Buffer.compare(read.stdout, bytes)).toBe(0)
    expect(disk.ramzswapStats()).toMatchObject({ bdev_num_writes: 256, failed_writes: 0, invalid_io: 0 })
    const { counters } = server.stats()
    expect(counters).toMatchObject({ bytes_written: 2 ** 21, errors: 0, in_flight: 0 })
  })

  test('has its size, is not cut, and takes whole blocks only', async (ctx) => {
    requires(ctx, needs)
    const disk = device()
    const { at, server } = await mounted(directory({ disk: { kind: 'device', device: disk } }))
    expect((await run('stat', '-c', '%s %a %F', at('disk'))).stdout.toString()).toBe('8388608 600 regular file\n')
    expect((await run('truncate', '-s', '0', at('disk'))).stderr).toContain('Operation not permitted')
    expect((await run('dd', 'if=/dev/zero', `of=${at('disk')}`, 'bs=100', 'count=1', 'conv=notrunc')).stderr).toContain(
      'Invalid argument',
    )
    const over = await run('dd', 'if=/dev/zero', `of=${at('disk')}`, 'bs=4k', 'seek=2048', 'count=1', 'conv=notrunc')
    expect(over.stderr).toContain('No space left on device')
    await disk.write(0, corpus(8192))
    const odd = await run('dd', `if=${at('disk')}`, 'bs=1', 'skip=4090', 'count=10')
    expect(odd.stdout).toEqual(corpus(8192).subarray(4090, 4100))
    const direct = await run('dd', `if=${at('disk')}`, 'bs=100', 'skip=40', 'count=3', 'iflag=direct')
    expect(direct.stdout).toEqual(corpus(8192).subarray(4000, 4300))
    expect(server.stats().counters['errors']).toBe(0)
    expect((await run('dd', `if=${at('disk')}`, 'bs=4k', 'skip=2048')).stdout.length).toBe(0)
  })

  test('holes are discards, zeroed ranges are zeros', async (ctx) => {
    requires(ctx, { ...needs, commands: ['fallocate'] })
    const disk = device()
    const { at } = await mounted(directory({ disk: { kind: 'device', device: disk } }))
    await disk.write(0, corpus(4 * 4096))
    expect((await run('fallocate', '-p', '-o', '0', '-l', '8192', at('disk'))).code).toBe(0)
    expect(disk.ramzswapStats().notify_free).toBe(2)
    expect((await run('fallocate', '-z', '-n', '-o', '8192', '-l', '4096', at('disk'))).code).toBe(0)
    expect(disk.ramzswapStats().notify_free).toBe(2)
    const left = new Uint8Array(4 * 4096)
    await disk.read(0, left)
    expect(Buffer.compare(left, corpus(4 * 4096).fill(0, 0, 3 * 4096))).toBe(0)
  })

  test('errors of the device reach the program with their number, and others go on', async (ctx) => {
    requires(ctx, needs)
    const disk = device()
    const error = Object.assign(new Error('no'), { code: 'EIO' })
    const broken: BlockDevice = {
      ...bound(disk),
      read: () => Promise.reject(error),
      write: () => {
        throw Object.assign(new Error('full'), { code: 'ENOSPC' })
      },
    }
    const errors: unknown[] = []
    const { at, server } = await mounted(
      directory({ disk: { kind: 'device', device: disk }, broken: { kind: 'device', device: broken } }),
      { onError: (one: unknown) => errors.push(one) },
    )
    expect((await run('dd', `if=${at('broken')}`, 'bs=4k', 'count=1', 'iflag=direct')).stderr).toContain(
      'Input/output error',
    )
    const full = await run(
      'dd',
      'if=/dev/zero',
      `of=${at('broken')}`,
      'bs=4k',
      'count=1',
      'conv=notrunc',
      'oflag=direct',
    )
    expect(full.stderr).toContain('No space left on device')
    expect((await run('dd', `if=${at('disk')}`, 'bs=4k', 'count=1')).code).toBe(0)
    expect(errors.length).toBe(server.stats().counters['errors'])
    expect(errors.length).toBeGreaterThanOrEqual(2)
  })
})

describe('a device as a file that programs know', () => {
  test('holes are seen, and copied as such', async (ctx) => {
    requires(ctx, { ...needs, commands: ['python3'] })
    const disk = device()
    const { at } = await mounted(directory({ disk: { kind: 'device', device: disk } }))
    const folder = mkdtempSync(join(tmpdir(), 'fuse-copy-'))
    cleanups.push(() => rmSync(folder, { recursive: true }))
    const blocksOfCopy = async (name: string, whole: Buffer): Promise<number> => {
      const copy = join(folder, name)
      expect(await run('cp', '--sparse=auto', at('disk'), copy)).toMatchObject({ code: 0, stderr: '' })
      expect(Buffer.compare(readFileSync(copy), whole)).toBe(0)
      return statSync(copy).blocks
    }
    expect(await blocksOfCopy('empty', Buffer.alloc(sizeBytes))).toBe(0)
    const part = corpus(3 * 4096)
    await disk.write(5 * 4096, part)
    await disk.write(100 * 4096, part.subarray(0, 4096))
    const whole = Buffer.alloc(sizeBytes)
    whole.set(part, 5 * 4096)
    whole.set(part.subarray(0, 4096), 100 * 4096)
    expect(await blocksOfCopy('some', whole)).toBe(4 * 8)
    const seeks = `
import os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
def seek(at, what):
    try: return os.lseek(file, at, what)
    except OSError as error: return error.errno
for at in (0, 5 * 4096 + 7, 8 * 4096, 101 * 4096, ${sizeBytes - 1}, ${sizeBytes}):
    print(at, seek(at, os.SEEK_DATA), seek(at, os.SEEK_HOLE))`
    expect((await run('python3', '-c', seeks, at('disk'))).stdout.toString().split('\n').slice(0, -1)).toEqual(
      [
        [0, 5 * 4096, 0],
        [5 * 4096 + 7, 5 * 4096 + 7, 8 * 4096],
        [8 * 4096, 100 * 4096, 8 * 4096],
        [101 * 4096, ENXIO, 101 * 4096],
        [sizeBytes - 1, ENXIO, sizeBytes - 1],
        [sizeBytes, ENXIO, ENXIO],
      ].map((row) => row.join(' ')),
    )
    expect((await run('stat', '-c', '%b', at('disk'))).stdout.toString()).toBe(`${4 * 8}\n`)
  })

  test('what cannot be is refused with its reason, and nothing is done in silence', async (ctx) => {
    requires(ctx, needs)
    const disk = device()
    const coded = (code: string): Error => Object.assign(new Error(code), { code })
    const failing = (error: Error): FuseNode => ({
      kind: 'text',
      read: () => '',
      write: () => {
        throw error
      },
    })
    const { at, server } = await mounted(
      directory({
        disk: { kind: 'device', device: disk },
        text: { kind: 'text', read: () => 'text\n' },
        busy: failing(new TmemError('TMEM_IO', 'it is in use', { cause: coded('EBUSY') })),
        none: failing(new TmemError('TMEM_UNSUPPORTED', 'there is none')),
        full: failing(new TmemError('TMEM_IO', 'a page', { cause: new Error('a flight', { cause: coded('ENOSPC') }) })),
        // Of a file that is used for it: nothing to whoever has this one open.
        other: failing(new TmemError('TMEM_IO', 'the disk', { cause: coded('EBADF') })),
      }),
    )
    const said = async (...words: string[]): Promise<string> => {
      const { code, stderr } = await run('sh', '-c', `cd ${at('.')} && ${words.join(' ')}`)
      return code === 0 ? 'done' : stderr.trim().split(': ').at(-1)!
    }
    for (const [words, reason] of [
      ['echo 1 | dd of=busy', 'Device or resource busy'],
      ['echo 1 | dd of=none', 'Operation not supported'],
      ['echo 1 | dd of=full', 'No space left on device'],
      ['echo 1 | dd of=other', 'Input/output error'],
      ['dd if=/dev/zero of=text count=1', 'Permission denied'],
      ['chmod 666 disk', 'Operation not permitted'],
      ['chown 1 disk', 'Operation not permitted'],
      ['touch -m disk', 'Operation not permitted'],
      ['touch new', 'Operation not permitted'],
      ['mkdir new', 'Operation not permitted'],
      ['rm -f text', 'Operation not permitted'],
      ['mv text other', 'Operation not permitted'],
      ['ln text other2', 'Operation not permitted'],
      ['ln -s text new', 'Operation not permitted'],
      ['truncate -s 0 disk', 'Operation not permitted'],
      ['test -r text -a ! -w text -a ! -x text -a -w disk -a -x .', 'done'],
    ] as const)
      expect([words, await said(words)]).toEqual([words, expect.stringContaining(reason)])
    expect(server.stats().counters['errors']).toBe(4)
    await disk.close()
  })
})

describe.each(['the event loop', 'a thread'])('requests that %s waits for', (who) => {
  /** Takes away what the runtime does not document. */
  const prepare = (): void => {
    if (who !== 'a thread') return
    const taken = vi.spyOn(process as unknown as { binding(name: string): unknown }, 'binding')
    taken.mockImplementation(() => {
      throw new Error('not here')
    })
    cleanups.push(() => taken.mockRestore())
  }

  test('one after the other, and many at once', async (ctx) => {
    requires(ctx, needs)
    prepare()
    for (const busyTurns of [0, 20]) {
      const disk = device()
      const { at, server } = await mounted(directory({ disk: { kind: 'device', device: disk } }), { busyTurns })
      const bytes = corpus(2 ** 20)
      const source = join(mkdtempSync(join(tmpdir(), 'fuse-source-')), 'bytes')
      cleanups.push(() => rmSync(join(source, '..'), { recursive: true }))
      writeFileSync(source, bytes)
      const direct = [`of=${at('disk')}`, 'oflag=direct', 'conv=notrunc']
      expect((await run('dd', `if=${source}`, 'bs=4k', ...direct)).code).toBe(0)
      const all = Array.from({ length: 8 }, () => run('dd', `if=${at('disk')}`, 'bs=4k', 'count=256', 'iflag=direct'))
      for (const { stdout } of await Promise.all(all)) expect(stdout.equals(bytes)).toBe(true)
      expect(server.stats().counters).toMatchObject({ write: 256, in_flight: 0 })
    }
  })

  test('wait until there is a buffer when there are more than buffers, and all are answered', async (ctx) => {
    requires(ctx, needs)
    prepare()
    const disk = device()
    await disk.write(0, corpus(2 ** 20))
    const gates: (() => void)[] = []
    const slow: BlockDevice = {
      ...bound(disk),
      read: (at, into) => new Promise<void>((open) => gates.push(open)).then(() => disk.read(at, into)),
    }
    const { at, server } = await mounted(directory({ slow: { kind: 'device', device: slow } }))
    const readers = Array.from({ length: 20 }, (_, n) =>
      run('dd', `if=${at('slow')}`, 'bs=4k', `skip=${n}`, 'count=1', 'iflag=direct'),
    )
    while (server.stats().counters['in_flight'] !== 16) await setTimeout(10)
    expect(gates.length).toBe(16)
    // Some of the readers may not even have begun.
    const pump = setInterval(() => {
      for (const open of gates.splice(0)) open()
    }, 10)
    cleanups.push(() => clearInterval(pump))
    for (const [n, { stdout }] of (await Promise.all(readers)).entries())
      expect(stdout).toEqual(corpus(2 ** 20).subarray(n * 4096, (n + 1) * 4096))
  })
})

describe('texts', () => {
  test('the statistics are directories and files, of the moment', async (ctx) => {
    requires(ctx, needs)
    const disk = device()
    const { at } = await mounted(directory({ stats: statisticsTree(() => disk.stats()) }))
    await disk.write(0, corpus(4096 * 4))
    expect((await run('cat', at('stats/num_writes'))).stdout.toString()).toBe('4\n')
    await disk.write(0, corpus(4096 * 4))
    expect((await run('cat', at('stats/num_writes'))).stdout.toString()).toBe('8\n')
    expect((await run('cat', at('stats/slots/compressed'), at('stats/chain/zcache/pages'))).stdout.toString()).toBe(
      '2\n2\n',
    )
    const list = (await run('find', at('stats'), '-type', 'f')).stdout.toString().trim().split('\n')
    expect(list.length).toBeGreaterThan(100)
    expect((await run('cat', ...list)).stdout.toString().split('\n').length).toBe(list.length + 1)
    expect((await run('cat', at('stats/none'))).stderr).toContain('No such file or directory')
    expect((await run('sh', '-c', `echo 1 > ${at('stats/num_writes')}`)).code).not.toBe(0)
  })

  test('a knob takes a line; what it throws reaches the writer', async (ctx) => {
    requires(ctx, needs)
    let value = 'first'
    const knob: FuseNode = {
      kind: 'text',
      read: () => `${value}\n`,
      write: (text) => {
        if (text === 'bad') throw new RangeError('bad')
        if (text === 'slow') return Promise.resolve().then(() => (value = 'slow'))
        value = text
        return undefined
      },
    }
    const { at } = await mounted(directory({ knob }))
    expect((await run('sh', '-c', `echo next > ${at('knob')} && cat ${at('knob')}`)).stdout.toString()).toBe('next\n')
    expect((await run('sh', '-c', `echo slow > ${at('knob')} && cat ${at('knob')}`)).stdout.toString()).toBe('slow\n')
    expect((await run('sh', '-c', `printf bad | dd of=${at('knob')}`)).stderr).toContain('Invalid argument')
    expect(value).toBe('slow')
  })

  test('sections of one name are numbered', () => {
    const stats = {
      name: 'a',
      counters: { n: 1 },
      children: [
        { name: 'b/c', counters: { x: 1 }, children: [] },
        { name: 'b/c', counters: {}, children: [] },
      ],
    }
    const tree = statisticsTree(() => stats)
    expect([...tree.entries().keys()]).toEqual(['n', 'b_c', 'b_c.2'])
    const texts = ['a', 'a.2', 'a', 'n/a', 'n_a', '..'].map((name, n): [string, FuseNode] => [
      name,
      { kind: 'text', read: () => String(n) },
    ])
    expect([...namedApart(texts).keys()]).toEqual(['a', 'a.2', 'a.3', 'n_a', 'n_a.2', '_'])
  })
})

describe('the mount', () => {
  test('is not taken away while a file of it is in use; the server goes on', async (ctx) => {
    requires(ctx, needs)
    const { at, server } = await mounted(directory({ disk: { kind: 'device', device: device() } }))
    const holder = spawn('tail', ['-f', at('disk')], { stdio: ['ignore', 'pipe', 'ignore'] })
    await new Promise((resolve) => holder.stdout.once('data', resolve))
    try {
      await expect(server.close()).rejects.toMatchObject({ code: 'TMEM_IO', cause: { code: 'EBUSY' } })
      expect((await run('dd', `if=${at('disk')}`, 'bs=4k', 'count=1')).code).toBe(0)
    } finally {
      holder.kill('SIGKILL')
      await new Promise((resolve) => holder.once('exit', resolve))
    }
    await server.close()
    await server.close()
    await server.ended
    expect(readFileSync('/proc/self/mounts', 'utf8')).not.toContain(server.mountPoint)
  })

  test('is told by its number, whatever leads to it: links, bind mounts, another mount over it', async (ctx) => {
    requires(ctx, { ...needs, commands: ['mount', 'umount'] })
    const disk = device()
    const folder = mkdtempSync(join(tmpdir(), 'fuse-place-'))
    cleanups.push(() => rmSync(folder, { recursive: true }))
    for (const name of ['real', 'copy']) mkdirSync(join(folder, name))
    symlinkSync('real', join(folder, 'link'))
    const server = await fuseServer({
      mountPoint: join(folder, 'link'),
      root: directory({ disk: { kind: 'device', device: disk } }),
    })
    cleanups.push(() => server.close())
    expect(server.mountPoint).toBe(join(realpathSync(folder), 'real'))
    expect(placeOf(join(folder, 'link'))).toMatchObject({
      path: server.mountPoint,
      mount: { type: 'fuse.tmem', device: server.device },
    })
    const { stdout } = await run('stat', '-c', '%Hd:%Ld', join(folder, 'real', 'disk'))
    expect(stdout.toString()).toBe(`${server.device}\n`)

    // Through a bind mount it is as open as through the mount itself, and the mount stays.
    expect((await run('mount', '--bind', join(folder, 'real'), join(folder, 'copy'))).code).toBe(0)
    cleanups.push(() => void run('umount', join(folder, 'copy')))
    const holder = spawn('tail', ['-f', join(folder, 'copy', 'disk')], { stdio: ['ignore', 'pipe', 'ignore'] })
    await new Promise((resolve) => holder.stdout.once('data', resolve))
    expect(server.opens(disk)).toBe(1)
    await expect(server.close()).rejects.toMatchObject({ cause: { code: 'EBUSY' } })
    holder.kill('SIGKILL')
    await new Promise((resolve) => holder.once('exit', resolve))
    expect(await server.opensNow(disk)).toBe(0)

    // What somebody has mounted over it is not ours to take away.
    expect((await run('mount', '-t', 'tmpfs', 'other', join(folder, 'real'))).code).toBe(0)
    await expect(server.close()).rejects.toThrow('something is mounted over')
    expect((await run('umount', join(folder, 'real'))).code).toBe(0)
    expect((await run('cat', join(folder, 'real', 'disk'))).code).toBe(0)

    await server.close()
    expect(mounts().some(({ point }) => point === server.mountPoint)).toBe(false)
    expect((await run('cat', join(folder, 'copy', 'disk'))).stderr).toMatch(/not connected|No such device/)
    expect((await run('umount', join(folder, 'copy'))).code).toBe(0)
  })

  test('of two servers that begin on one directory one has it', async (ctx) => {
    requires(ctx, needs)
    const folder = mkdtempSync(join(tmpdir(), 'fuse-place-'))
    cleanups.push(() => rmSync(folder, { recursive: true }))
    mkdirSync(join(folder, 'real'))
    symlinkSync('real', join(folder, 'link'))
    for (let round = 0; round < 5; round++) {
      const both = await Promise.allSettled(
        ['real', 'link'].map((name) => fuseServer({ mountPoint: join(folder, name), root: directory({}) })),
      )
      const servers = both.flatMap((one) => (one.status === 'fulfilled' ? [one.value] : []))
      const reasons = both.flatMap((one) => (one.status === 'rejected' ? [String(one.reason)] : []))
      const point = join(realpathSync(folder), 'real')
      const count = mounts().filter((mount) => mount.point === point).length
      for (const server of servers) await server.close()
      expect([count, reasons]).toEqual([1, [expect.stringMatching(/mounted on .* already/)]])
    }
  })

  test('a device that may not be opened answers EBUSY', async (ctx) => {
    requires(ctx, needs)
    let mayOpen = false
    const { at } = await mounted(directory({ disk: { kind: 'device', device: device(), mayOpen: () => mayOpen } }))
    expect((await run('cat', at('disk'))).stderr).toContain('Device or resource busy')
    mayOpen = true
    expect((await run('cat', at('disk'))).code).toBe(0)
  })

  test('ends when somebody else unmounts it', async (ctx) => {
    requires(ctx, needs)
    const { server } = await mounted(directory({}))
    expect((await run('umount', server.mountPoint)).code).toBe(0)
    await server.ended
  })

  test('refuses a place that cannot be used, and leaves nothing', async (ctx) => {
    requires(ctx, needs)
    await expect(fuseServer({ mountPoint: '/nowhere/at/all', root: directory({}) })).rejects.toMatchObject({
      code: 'TMEM_IO',
    })
    const { server } = await mounted(directory({}))
    await expect(fuseServer({ mountPoint: server.mountPoint, root: directory({}) })).rejects.toThrow(
      /mounted on .* already/,
    )
    await expect(fuseServer({ mountPoint: tmpdir(), root: directory({}), busyTurns: -1 })).rejects.toThrow(RangeError)
  })
})

/** The methods of a device as properties, so that some can be replaced. */
function bound(disk: Ramzswap): BlockDevice {
  return {
    name: disk.name,
    sizeBytes: disk.sizeBytes,
    blockSize: disk.blockSize,
    preferredBlockSize: disk.preferredBlockSize,
    readOnly: false,
    read: (at, into) => disk.read(at, into),
    write: (at, bytes) => disk.write(at, bytes),
    discard: (at, length) => disk.discard(at, length),
    zero: (at, length) => disk.zero(at, length),
    flush: () => disk.flush(),
    map: (at, length, report) => disk.map(at, length, report),
    stats: () => disk.stats(),
    close: () => disk.close(),
  }
}
