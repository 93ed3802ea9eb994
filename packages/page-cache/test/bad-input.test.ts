/**
 * Bad input and faults, with the real thing: other processes, real inodes, a file system that is full. Each through the
 * cache of the operating system and around it. The same with faults injected: page-cache.test.ts, model.test.ts.
 */
import { execFileSync } from 'node:child_process'
import {
  closeSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readFileSync,
  statfsSync,
  statSync,
  unlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { Cleancache, tmemBackend } from '@tmem/cleancache'
import { compose, type Layer, Tmem } from '@tmem/core'
import { discard, refuse } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { describe, expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { type CachedFile, DirectReads, PageCache, pageCacheFacts } from '../src/index.ts'
import { testFolder } from './timed-io.ts'

const path = testFolder()
const pageSize = 4096
const optIn = (): { facts: ReturnType<typeof pageCacheFacts> } => ({ facts: pageCacheFacts('test', pageSize) })
/** Longer than two changes can have the same time. */
const settle = (): Promise<void> => setTimeout(35)

function pattern(bytes: number, seed: number): Buffer {
  const buffer = Buffer.alloc(bytes, seed)
  for (let at = 0; at + 4 <= bytes; at += 128) buffer.writeUInt32LE((at + seed) >>> 0, at)
  return buffer
}
/** Another process does something to a file. */
const elsewhere = (script: string, ...args: readonly string[]): void =>
  void execFileSync(process.execPath, [
    '-e',
    `const fs = require('fs'); const [name, ...args] = process.argv.slice(1); ${script}`,
    ...args,
  ])

const script = fileURLToPath(new URL('real-faults.mjs', import.meta.url))
const stacks: readonly [name: string, layers: () => readonly Layer[]][] = [
  ['memory', () => [memory({ limitBytes: 2 ** 20 })]],
  ['a store that refuses everything', () => [refuse({ every: 1 }), memory({ limitBytes: 2 ** 20 })]],
  ['a store that loses every page', () => [discard({ mode: 'lose' })]],
]
const ways = stacks.flatMap(([name, layers]) =>
  (['ordinary', 'direct'] as const).map((mode) => [mode, name, layers] as const),
)

describe.each(ways)('%s reads, over %s', (mode, _name, layers) => {
  let files = 0
  function setup(content: Buffer): { cache: PageCache; cleancache: Cleancache; name: string } {
    const cleancache = new Cleancache()
    cleancache.register(tmemBackend(new Tmem(compose(layers(), { check: 'model' })), 1))
    const io = mode === 'direct' ? { io: new DirectReads() } : {}
    const name = path(`${mode}-${_name.length}-${files++}`)
    writeFileSync(name, content)
    return { cache: new PageCache({ sizeBytes: 16 * pageSize, cleancache, optIn, ...io }), cleancache, name }
  }
  /** The whole file, through a cache that is too small for it. */
  async function whole(file: CachedFile): Promise<Buffer> {
    const into = Buffer.alloc(64 * pageSize)
    const { bytesRead } = await file.read(into, 0, into.length, 0)
    return into.subarray(0, bytesRead)
  }

  test('a file that another process changes, shortens, lengthens', async () => {
    const { cache, name } = setup(pattern(40 * pageSize, 1))
    const file = await cache.open(name)
    await settle()
    for (let round = 0; round < 2; round++) expect((await whole(file)).equals(pattern(40 * pageSize, 1))).toBe(true)
    elsewhere(`fs.writeFileSync(name, fs.readFileSync(name).fill(9, 5000, 9000))`, name)
    expect((await whole(file)).equals(pattern(40 * pageSize, 1).fill(9, 5000, 9000))).toBe(true)
    elsewhere(`fs.truncateSync(name, 70001)`, name)
    expect(
      (await whole(file)).equals(
        pattern(40 * pageSize, 1)
          .fill(9, 5000, 9000)
          .subarray(0, 70_001),
      ),
    ).toBe(true)
    await settle()
    await whole(file)
    elsewhere(`fs.truncateSync(name, 100000)`, name)
    const longer = Buffer.alloc(100_000)
    pattern(40 * pageSize, 1)
      .fill(9, 5000, 9000)
      .copy(longer, 0, 0, 70_001)
    expect((await whole(file)).equals(longer)).toBe(true)
    await cache.close()
  })

  test('a file that is unlinked and made again: another one, also with the same inode', async () => {
    const { cache, name } = setup(pattern(20 * pageSize, 1))
    const held = await cache.open(name)
    await settle()
    await whole(held)
    unlinkSync(name)
    writeFileSync(name, pattern(20 * pageSize, 2))
    // Who has the old one open goes on with the old one.
    expect((await whole(held)).equals(pattern(20 * pageSize, 1))).toBe(true)
    await held.close()
    // Nobody has it open: its inode is free, and given to the next one (by ext4 each time).
    let seed = 2
    const inodes = new Set<number>()
    for (let round = 0; round < 4; round++) {
      inodes.add(statSync(name).ino)
      const file = await cache.open(name)
      expect((await whole(file)).equals(pattern(20 * pageSize, seed))).toBe(true)
      await settle()
      expect((await whole(file)).equals(pattern(20 * pageSize, seed))).toBe(true)
      await file.close()
      cache.dropCaches()
      seed++
      unlinkSync(name)
      writeFileSync(name, pattern(20 * pageSize, seed))
    }
    expect(inodes.size).toBeLessThan(statfsSync(name).type === 0xef53 ? 4 : 5)
    await cache.close()
  })

  test('reads at and past the end, of an empty file, and at the end of the world', async () => {
    const { cache, name } = setup(pattern(5 * pageSize + 7, 1))
    const file = await cache.open(name, 'r+')
    await settle()
    const into = Buffer.alloc(100, 0xee)
    const read = async (position: number): Promise<number> => (await file.read(into, 0, 100, position)).bytesRead
    const end = 5 * pageSize + 7
    for (let round = 0; round < 2; round++) {
      expect(await read(end - 3)).toBe(3)
      expect(into.subarray(3).equals(Buffer.alloc(97, 0xee))).toBe(true)
      into.fill(0xee)
      for (const position of [end, end + 1, 6 * pageSize, 1000 * pageSize, 2 ** 40, Number.MAX_SAFE_INTEGER - 100])
        expect(await read(position)).toBe(0)
      expect(into.equals(Buffer.alloc(100, 0xee))).toBe(true)
    }
    await file.truncate(0)
    expect([await read(0), await read(1)]).toEqual([0, 0])
    await cache.close()
  })

  test('a hole reads as zeros, is not put, and what is written into it by others is seen', async () => {
    const { cache, cleancache, name } = setup(Buffer.alloc(0))
    const descriptor = openSync(name, 'r+')
    ftruncateSync(descriptor, 30 * pageSize)
    writeSync(descriptor, pattern(pageSize, 3), 0, pageSize, 25 * pageSize)
    const file = await cache.open(name)
    await settle()
    const wanted = Buffer.alloc(30 * pageSize)
    pattern(pageSize, 3).copy(wanted, 25 * pageSize)
    for (let round = 0; round < 2; round++) expect((await whole(file)).equals(wanted)).toBe(true)
    cache.dropCaches()
    // Of each round, the one page that is no hole.
    expect(cleancache.counters.puts).toBeLessThanOrEqual(2)
    writeSync(descriptor, pattern(pageSize, 4), 0, pageSize, 4 * pageSize)
    closeSync(descriptor)
    pattern(pageSize, 4).copy(wanted, 4 * pageSize)
    expect((await whole(file)).equals(wanted)).toBe(true)
    await cache.close()
  })
})

describe.each(['ordinary', 'direct'])('%s reads, with faults of the system itself', (mode) => {
  test('a file system that is full: the write says so, nothing is lost, and succeeds when there is room', (ctx) => {
    requires(ctx, { root: true, commands: ['unshare'] })
    const folder = path(`full-${mode}`)
    mkdirSync(folder)
    // In a mount namespace of its own: it is gone with the process.
    const command = 'mount -t tmpfs -o size=256k none "$1" && exec "$0" "$2" full "$1" "$3"'
    const out = execFileSync('unshare', ['-m', 'sh', '-c', command, process.execPath, folder, script, mode], {
      encoding: 'utf8',
    })
    expect(JSON.parse(out)).toEqual({
      pages: 32,
      second: 'ENOSPC',
      readBack: true,
      third: 'done',
      onDisk: true,
      close: 'done',
    })
    expect(readFileSync('/proc/mounts', 'utf8')).not.toContain(folder)
  })

  test('a file that may not be read: EACCES, and no trace of it', (ctx) => {
    requires(ctx, { root: true })
    const folder = path(`forbidden-${mode}`)
    mkdirSync(folder, { mode: 0o755 })
    const out = execFileSync(process.execPath, [script, 'forbidden', folder, mode], { encoding: 'utf8' })
    expect(JSON.parse(out)).toEqual({ open: 'EACCES', allowed: 'done', bytes: true })
  })
})
