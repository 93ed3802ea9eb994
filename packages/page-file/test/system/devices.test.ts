/** What only root can set up: full disks, block devices, files that the kernel swaps to. */
import { execFileSync, spawn } from 'node:child_process'
import { linkSync, mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, type TestContext, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { PageFile, type PageFileRequest, systemFiles } from '../../src/index.ts'
import { processElsewhere } from '../owners.ts'

let folder: string
let path: string
const undo: (() => void)[] = []
const run = (command: string, ...words: string[]): string => execFileSync(command, words, { encoding: 'utf8' }).trim()

beforeEach(() => {
  folder = mkdtempSync('/var/tmp/page-file-system-')
  path = join(folder, 'pages')
})
afterEach(() => {
  for (const step of undo.splice(0).reverse()) step()
  rmSync(folder, { recursive: true })
})

const content = { name: 'tmem test' }
const request = (more: Partial<PageFileRequest> = {}): PageFileRequest => ({
  path,
  mode: 'ours',
  bytes: 2 ** 22,
  content,
  ...more,
})

function loop(ctx: TestContext, bytes: number): string {
  requires(ctx, { root: true, commands: ['losetup'], paths: ['/dev/loop-control'] })
  const image = join(folder, 'image')
  writeFileSync(image, '')
  truncateSync(image, bytes)
  const device = run('losetup', '-f', '--show', image)
  undo.push(() => run('losetup', '-d', device))
  return device
}

function mounted(...words: string[]): string {
  const point = join(folder, 'mount')
  mkdirSync(point)
  run('mount', ...words, point)
  undo.push(() => run('umount', point))
  return point
}

describe('a full disk', () => {
  const disks = {
    'in memory': (ctx: TestContext) => {
      requires(ctx, { root: true })
      return mounted('-t', 'tmpfs', '-o', 'size=2m', 'none')
    },
    'of blocks': (ctx: TestContext) => {
      const device = loop(ctx, 2 ** 23)
      run('mkfs.ext4', '-q', device)
      return mounted(device)
    },
  }
  for (const [name, disk] of Object.entries(disks))
    test(`${name} fails writes with its reason, and what is there stays`, async (ctx) => {
      const pages = join(disk(ctx), 'pages')
      for (const native of [true, false]) {
        const files = systemFiles({ native })
        const file = PageFile.open(request({ path: pages, bytes: 2 ** 25, files }))
        await expect(file.fill()).rejects.toMatchObject({
          code: 'TMEM_IO',
          message: expect.stringMatching(/more bytes, and \d+ are free/),
        })
        const page = new Uint8Array(131072).fill(7)
        let position = 131072
        let failure: unknown
        for (; failure === undefined; position += page.length)
          await file.write(page, 0, page.length, position).catch((error: unknown) => {
            failure = error
          })
        expect(failure).toMatchObject({ code: 'TMEM_IO', cause: { code: 'ENOSPC' } })
        expect(() => file.writeNow(page, 0, page.length, position)).toThrow(
          expect.objectContaining({ cause: expect.objectContaining({ code: 'ENOSPC' }) }),
        )
        const back = new Uint8Array(131072)
        for (let at = 131072; at < position - page.length; at += page.length) {
          await file.read(back, 0, back.length, at)
          expect(Buffer.compare(back, page)).toBe(0)
        }
        // Room that is given back can be used again.
        if (await file.punch(131072, 4 * 131072)) await file.write(page, 0, page.length, position)
        await file.close()
      }
    })
})

test('a file system without room for the mark leaves no file', (ctx) => {
  requires(ctx, { root: true })
  const point = mounted('-t', 'tmpfs', '-o', 'size=64k', 'none')
  writeFileSync(join(point, 'all'), new Uint8Array(65536))
  expect(() => PageFile.open(request({ path: join(point, 'pages') }))).toThrow(
    expect.objectContaining({ code: 'TMEM_IO', cause: expect.objectContaining({ code: 'ENOSPC' }) }),
  )
  expect(run('ls', point)).toBe('all')
})

describe('a block device', () => {
  test('is refused unless it is asked for, and then claimed and marked', async (ctx) => {
    const device = loop(ctx, 2 ** 22)
    const asked = { path: device, blockDevice: true } as const
    for (const mode of ['ours', 'existing', 'read'] as const)
      expect(() => PageFile.open({ path: device, mode, ...(mode === 'ours' ? { content, bytes: 4096 } : {}) })).toThrow(
        /it is a block device, and using one was not asked for/,
      )
    expect(() =>
      PageFile.open({ ...asked, mode: 'ours', bytes: 4096, content: { ...content, tolerant: true } }),
    ).toThrow(/none of ours/)
    const file = PageFile.open({ ...asked, mode: 'existing', content })
    expect([file.found, file.bytes, file.directIo, file.keep]).toEqual(['other', 2 ** 22, true, true])
    const data = new Uint8Array(300_000).fill(7)
    await file.write(data, 0, data.length, 5000)
    await file.fill()
    await file.sync()
    expect([...file.dataExtents()]).toEqual([[0, 2 ** 22]])
    expect(() => file.resize(8192)).toThrow(/keeps its length/)
    // Another node leads to the same device.
    const node = join(folder, 'node')
    const { rdev } = statSync(device)
    run('mknod', node, 'b', String(rdev >> 8), String(rdev & 255))
    for (const name of [device, node])
      expect(() => PageFile.open({ ...asked, path: name, mode: 'existing' })).toThrow(
        /the device is in use|uses it already/,
      )
    await file.close()
    const again = PageFile.open({ ...asked, mode: 'ours', content, bytes: 4096 })
    expect(again.found).toBe('ours')
    const back = new Uint8Array(300_000)
    await again.read(back, 0, back.length, 5000)
    expect(Buffer.compare(back, data)).toBe(0)
    const given = await again.punch(8192, 4096)
    await again.read(back, 0, 4096, 8192)
    expect(back.subarray(0, 4096).every((byte) => byte === (given ? 0 : 7))).toBe(true)
    expect(() => again.close({ remove: true })).toThrow(/not ours to remove/)
    await again.close()
  })

  test('that is mounted is refused', (ctx) => {
    const device = loop(ctx, 2 ** 23)
    run('mkfs.ext4', '-q', device)
    mounted(device)
    expect(() => PageFile.open({ path: device, blockDevice: true, mode: 'existing' })).toThrow(/the device is in use/)
  })
})

test('a file that is a loop device, by any name, is refused; one that is only read so is not', (ctx) => {
  const device = loop(ctx, 2 ** 22)
  const image = join(folder, 'image')
  linkSync(image, join(folder, 'hard'))
  for (const name of [image, join(folder, 'hard')])
    for (const mode of ['plain', 'existing'] as const)
      expect(() => PageFile.open({ path: name, mode, ...(mode === 'plain' ? { bytes: 2 ** 22 } : {}) })).toThrow(
        `it is the file of ${device}; run losetup -d ${device} first`,
      )
  const reader = join(folder, 'read')
  writeFileSync(reader, '')
  truncateSync(reader, 2 ** 22)
  const other = run('losetup', '-r', '-f', '--show', reader)
  undo.push(() => run('losetup', '-d', other))
  PageFile.open({ path: reader, mode: 'plain', bytes: 2 ** 22, keep: true }).closeNow()
})

test('loop devices that come and go meanwhile are in nobody\u2019s way', async (ctx) => {
  requires(ctx, { root: true, commands: ['losetup'], paths: ['/dev/loop-control'] })
  const image = join(folder, 'image')
  writeFileSync(image, Buffer.alloc(2 ** 20))
  const script = 'for n in $(seq 150); do losetup -d $(losetup -f --show "$0") || exit 1; done'
  const coming = spawn('sh', ['-c', script, image], { stdio: 'ignore' })
  const ended = new Promise((resolve) => coming.once('close', resolve))
  let opens = 0
  while (coming.exitCode === null) {
    PageFile.open({ path, mode: 'plain', bytes: 4096 }).closeNow()
    if (++opens % 20 === 0) await new Promise((resolve) => setImmediate(resolve))
  }
  expect([await ended, opens]).toEqual([0, expect.any(Number)])
}, 60_000)

test.for([
  ['with koffi', true, true],
  ['without', false, false],
  ['one with, one without', true, false],
] as const)('an owner in another network namespace is excluded, %s', async ([, here, there], ctx) => {
  requires(ctx, { root: true, commands: ['unshare'] })
  const other = processElsewhere()
  try {
    const file = PageFile.open(request({ keep: true, files: systemFiles({ native: here }) }))
    expect(await other.open(request(), { native: there })).toMatchObject({
      open: false,
      message: expect.stringContaining(`process ${process.pid} uses it`),
    })
    await file.close()
    const answer = await other.open(request(), { native: there })
    expect(answer).toMatchObject({ open: true, found: 'ours' })
    expect(answer.locks).not.toContain(file.locks[0])
    expect(() => PageFile.open(request({ files: systemFiles({ native: here }) }))).toThrow(/process \d+ uses it/)
    await other.close()
    if (!here || !there) return
    // Without a mark, only what the file itself is locked by tells them apart.
    const image = { path: join(folder, 'image'), mode: 'plain', bytes: 4096 } as const
    const mine = PageFile.open(image)
    expect(await other.open(image)).toMatchObject({
      open: false,
      message: expect.stringMatching(/uses it already/),
    })
    mine.closeNow()
  } finally {
    await other.kill()
    // Its claim is void.
    PageFile.open(request({ files: systemFiles({ native: here }) })).closeNow()
  }
})

describe('a file that the kernel swaps to', () => {
  test('is refused by each name; it may have our mark', async (ctx) => {
    requires(ctx, { root: true, commands: ['swapoff'], paths: ['/proc/swaps'] })
    // A swap header of version 1, for 1023 pages.
    const header = Buffer.alloc(4096)
    header.writeUInt32LE(1, 1024)
    header.writeUInt32LE(1023, 1028)
    header.write('SWAPSPACE2', 4086)
    const swap = { name: 'swap', header }
    const file = PageFile.open(request({ keep: true, content: swap }))
    for (let at = 4096; at < 2 ** 22; at += 4096) file.writeNow(header, 0, 4096, at)
    await file.close()
    run('swapon', path)
    undo.push(() => readFileSync('/proc/swaps', 'latin1').includes(path) && run('swapoff', path))
    linkSync(path, join(folder, 'other name'))
    for (const name of [path, join(folder, 'other name')]) {
      expect(() => PageFile.open(request({ path: name, content: swap }))).toThrow(/run swapoff/)
      expect(() => PageFile.open({ path: name, mode: 'existing' })).toThrow(/run swapoff/)
      expect(() => PageFile.open({ path: name, mode: 'plain', bytes: 4096 })).toThrow(/run swapoff/)
    }
    run('swapoff', path)
    const again = PageFile.open(request({ content: swap }))
    expect(again.found).toBe('ours')
    await again.close()
  })
})
