import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import {
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  statfsSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { systemAllocator, TmemError } from '@tmem/core'
import { expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { SwapArea, type SwapAreaOptions } from '../src/index.ts'
import { page, testFolder } from './device.ts'

const folder = testFolder()
const open = (options: SwapAreaOptions): SwapArea => SwapArea.open(options, systemAllocator)
const run = (command: string, ...parameters: string[]): string =>
  execFileSync(command, parameters, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] })

/** What opening says, and that it says so with the code for the outside world. */
function refusal(options: SwapAreaOptions): string {
  try {
    open(options)
  } catch (error) {
    if (error instanceof TmemError && error.code === 'TMEM_IO') return error.message
    throw error
  }
  return 'it was opened'
}

test('the file has its whole size from the start, and the header of a Linux swap area', async (ctx) => {
  requires(ctx, { commands: ['file'] })
  const file = folder.file()
  const area = open({ file, sizeBytes: 300 * 4096 })
  const { size, blocks, mode } = statSync(file)
  expect([size, mode & 0o777]).toEqual([301 * 4096, 0o600])
  expect(blocks * 512).toBeGreaterThanOrEqual(size)
  const header = readFileSync(file).subarray(0, 4096)
  expect(header.toString('latin1', 4086)).toBe('SWAPSPACE2')
  expect([header.readUInt32LE(1024), header.readUInt32LE(1028), header.readUInt32LE(1032)]).toEqual([1, 300, 0])
  const said = run('file', file)
  expect(said).toMatch(/Linux.*swap file.*version 1/)
  expect(said).toContain('size 300 pages')
  await area.close()
  expect(existsSync(file)).toBe(false)
})

test('pages go around the cache of the operating system where the file system lets them', async (ctx) => {
  const file = folder.file()
  const area = open({ file, sizeBytes: 64 * 4096 })
  const isMemory = statfsSync(folder.path).type === 0x01021994
  if (isMemory) ctx.skip('needs a temporary folder on a disk')
  expect(area.directIo).toBe(true)
  const slot = area.allocate(3)
  const large = new Uint8Array(3 * 4096).map((_, n) => n * 3)
  expect(area.write(slot, large)).toBe(true)
  // What the device has, seen by somebody else.
  expect(
    readFileSync(file)
      .subarray(slot * 4096, (slot + 3) * 4096)
      .equals(large),
  ).toBe(true)
  const into = new Uint8Array(3 * 4096)
  expect(await area.read(slot, into)).toBe(true)
  expect(into).toEqual(large)
  await area.close()
})

test('blocking reads need neither the pool of threads nor the event loop', async () => {
  const file = folder.file()
  const area = open({ file, sizeBytes: 64 * 4096, blockingReads: true })
  const slot = area.allocate(2)
  expect(area.write(slot, page(5, 8192))).toBe(true)
  const into = page(0, 8192)
  let answer: boolean | undefined
  const reading = area.read(slot, into).then((read) => {
    answer = read
  })
  // Microtasks only.
  for (let n = 0; n < 50; n++) await Promise.resolve()
  expect(answer).toBe(true)
  expect(into).toEqual(page(5, 8192))
  await reading
  truncateSync(file, 4096)
  await expect(area.read(slot, into)).rejects.toMatchObject({ code: 'TMEM_IO' })
  await area.close()
})

test('tmpfs takes O_DIRECT and ignores it: directIo says no', async (ctx) => {
  requires(ctx, { paths: ['/dev/shm'] })
  if (statfsSync('/dev/shm').type !== 0x01021994) ctx.skip('needs a tmpfs at /dev/shm')
  const area = open({ file: `/dev/shm/tmem-test-${process.pid}.img`, sizeBytes: 8 * 4096 })
  try {
    expect(area.directIo).toBe(false)
    const slot = area.allocate(1)
    area.write(slot, page(4))
    const into = page(0)
    expect(await area.read(slot, into)).toBe(true)
    expect(into).toEqual(page(4))
  } finally {
    await area.close()
  }
})

test('what is there already is left alone', () => {
  const file = folder.file()
  writeFileSync(file, 'precious')
  expect(refusal({ file, sizeBytes: 8192 })).toContain('exists already')
  const link = folder.file()
  symlinkSync(file, link)
  expect(refusal({ file: link, sizeBytes: 8192 })).toContain('exists already')
  expect(refusal({ file, sizeBytes: 8192, existing: true })).toContain('no swap header')
  expect(refusal({ file: folder.path, sizeBytes: 8192, existing: true })).toContain('neither a file nor a block device')
  expect(refusal({ file: '/dev/null', sizeBytes: 8192, existing: true })).toContain('neither a file nor a block device')
  expect(refusal({ file: join(folder.path, 'no', 'where'), sizeBytes: 8192 })).toContain('ENOENT')
  expect(refusal({ file: join(folder.path, 'nowhere'), sizeBytes: 8192, existing: true })).toContain('ENOENT')
  expect(readFileSync(file, 'utf8')).toBe('precious')
})

test('what a killed process has left makes way for the next, and nothing else does', async () => {
  const file = folder.file()
  const area = open({ file, sizeBytes: 8192 })
  expect(refusal({ file, sizeBytes: 8192 })).toContain(`process ${process.pid} made it, and uses it`)
  const left = readFileSync(file)
  await area.close()
  const text = left.toString('latin1')
  const line = text.slice(0, text.indexOf('\n'))
  // The same process number under another start is a process that has ended.
  const start = line.split(' ').at(-2)!
  left.write(line.replace(` ${start} `, ` ${'7'.repeat(start.length)} `), 0, 'latin1')
  const spoilt = [
    left.subarray(0, 4095),
    Buffer.concat([left.subarray(0, 4086), Buffer.from('SWAPSPACE1')]),
    Buffer.concat([Buffer.from('T'), left.subarray(1)]),
  ]
  for (const bytes of spoilt) {
    writeFileSync(file, bytes)
    expect(refusal({ file, sizeBytes: 8192 })).toContain('exists already')
    expect(readFileSync(file).equals(bytes)).toBe(true)
  }
  writeFileSync(file, left)
  const link = folder.file()
  symlinkSync(file, link)
  expect(refusal({ file: link, sizeBytes: 8192 })).toContain('exists already')
  const next = open({ file, sizeBytes: 16 * 4096 })
  expect(statSync(file).size).toBe(17 * 4096)
  await next.close()
  expect(existsSync(file)).toBe(false)
  const kept = open({ file, sizeBytes: 8192, keep: true })
  await kept.close()
  expect(readFileSync(file)[0]).toBe(0)
  expect(refusal({ file, sizeBytes: 8192 })).toContain('exists already')
})

test('more than the disk has is refused before a byte is written, and nothing is left behind', (ctx) => {
  const { bavail, bsize } = statfsSync(folder.path)
  // Well above what is free: others may free some meanwhile.
  const sizeBytes = Math.ceil((bavail * bsize * 1.5) / 4096) * 4096 + 2 ** 30
  if (sizeBytes > 2 ** 38 - 4096) ctx.skip('the disk has more free space than an area can have')
  const before = folder.files()
  // Memory for the tables of so many slots is not what is tried here: untouched pages cost nothing.
  const message = refusal({ file: folder.file(), sizeBytes })
  expect(message).toMatch(/it needs \d+ bytes, and \d+ are free/)
  expect(folder.files()).toEqual(before)
})

/**
 * Mounts in a mount namespace that ends with this process, however it ends. Answers the path at which the mounts of
 * that namespace are seen.
 */
async function confined(script: string): Promise<{ root: string; end: () => Promise<void> }> {
  const holder = spawn('unshare', ['--mount', '--propagation', 'private', 'sh', '-ec', `${script}\necho ready\ncat`])
  const ended = new Promise<void>((resolve) => {
    holder.once('exit', () => resolve())
  })
  let errors = ''
  holder.stderr.on('data', (text: Buffer) => {
    errors += text.toString()
  })
  const [said] = await Promise.race([once(holder.stdout, 'data'), ended.then(() => [errors])])
  expect(String(said)).toBe('ready\n')
  return {
    root: `/proc/${holder.pid}/root`,
    end: () => {
      holder.stdin.end()
      return ended
    },
  }
}

test('a disk that fills up while the file is made: refused, and nothing is left behind', async (ctx) => {
  requires(ctx, { root: true, commands: ['unshare', 'mount', 'losetup', 'mkfs.ext2'], paths: ['/dev/loop-control'] })
  const at = join(folder.path, 'mounted')
  mkdirSync(at)
  // A file system of 64 MiB on a disk that has 4: the books say that there is room.
  const { root, end } = await confined(`
    mount -t tmpfs -o size=4m tmpfs ${at}
    truncate -s 64M ${at}/disk
    mkfs.ext2 -q ${at}/disk
    mkdir ${at}/inner
    mount -o loop ${at}/disk ${at}/inner`)
  try {
    const file = join(root, at, 'inner', 'swap.img')
    expect(refusal({ file, sizeBytes: 16 * 2 ** 20 })).toMatch(/cannot be written: E(IO|NOSPC)/)
    expect(existsSync(file)).toBe(false)
    expect(refusal({ file, sizeBytes: 128 * 2 ** 20 })).toContain('are free')
  } finally {
    await end()
  }
})

test('an area made with mkswap is used as it is, and stays', async (ctx) => {
  requires(ctx, { commands: ['mkswap', 'file'] })
  const file = folder.file()
  writeFileSync(file, '')
  truncateSync(file, 64 * 4096)
  // A hole is no place for a page.
  run('mkswap', '-q', '-L', 'mine', file)
  expect(refusal({ file, sizeBytes: 64 * 4096, existing: true })).toContain('64 pages')
  const area = open({ file, sizeBytes: 63 * 4096, existing: true })
  expect(statSync(file).blocks * 512).toBeGreaterThanOrEqual(64 * 4096)
  const slot = area.allocate(1)
  area.write(slot, page(1))
  await area.close()
  expect(run('file', file)).toContain('LABEL=mine')
  truncateSync(file, 32 * 4096)
  expect(refusal({ file, sizeBytes: 63 * 4096, existing: true })).toContain('fewer than')
})

test('headers that cannot be trusted are refused', () => {
  const file = folder.file()
  const header = (change: (page: Buffer) => void): void => {
    const content = Buffer.alloc(16 * 4096)
    content.write('SWAPSPACE2', 4086)
    content.writeUInt32LE(1, 1024)
    content.writeUInt32LE(15, 1028)
    change(content)
    writeFileSync(file, content)
  }
  const existing = { file, sizeBytes: 8 * 4096, existing: true }
  header((content) => content.writeUInt32LE(2, 1024))
  expect(refusal(existing)).toContain('another version')
  header((content) => content.writeUInt32LE(3, 1032))
  expect(refusal(existing)).toContain('bad pages')
  header((content) => content.write('SWAP-SPACE', 4086))
  expect(refusal(existing)).toContain('no swap header')
  header((content) => content.writeUInt32LE(0xffffffff, 1028))
  expect(refusal({ ...existing, sizeBytes: 20 * 4096 })).toMatch(/pages of 4096 bytes|fewer than/)
  writeFileSync(file, 'short')
  expect(refusal(existing)).toContain('no swap header')
})

test('what the system swaps to is refused, and so is a device that is in use', (ctx) => {
  requires(ctx, { root: true, commands: ['mkswap', 'swapon', 'swapoff'] })
  const file = folder.file()
  writeFileSync(file, Buffer.alloc(40 * 4096), { mode: 0o600 })
  run('mkswap', '-q', file)
  try {
    run('swapon', file)
  } catch (error) {
    ctx.skip(`needs a kernel that swaps to a file here: ${error instanceof Error ? error.message : ''}`)
  }
  try {
    expect(refusal({ file, sizeBytes: 8 * 4096, existing: true })).toContain('the system swaps to it')
  } finally {
    run('swapoff', file)
  }
})

test('the system takes our file as swap', async (ctx) => {
  requires(ctx, { root: true, commands: ['swapon', 'swapoff'] })
  const file = folder.file()
  const area = open({ file, sizeBytes: 40 * 4096, keep: true })
  await area.close()
  try {
    run('swapon', file)
  } catch (error) {
    ctx.skip(`needs a kernel that swaps to a file here: ${error instanceof Error ? error.message : ''}`)
  }
  try {
    expect(readFileSync('/proc/swaps', 'utf8')).toContain(file)
  } finally {
    run('swapoff', file)
  }
})

test('a block device is used directly, one user at a time', async (ctx) => {
  requires(ctx, { root: true, commands: ['losetup', 'mkswap'], paths: ['/dev/loop-control'] })
  const file = folder.file()
  writeFileSync(file, Buffer.alloc(256 * 4096))
  run('mkswap', '-q', file)
  const device = run('losetup', '--find', '--show', file).trim()
  let area: SwapArea
  try {
    area = open({ file: device, sizeBytes: 200 * 4096, existing: true })
  } finally {
    // While it is open it only goes when the last one closes it, however that comes about.
    run('losetup', '--detach', device)
  }
  expect(area.directIo).toBe(true)
  expect(refusal({ file: device, sizeBytes: 200 * 4096, existing: true })).toContain('in use')
  const slot = area.allocate(2)
  area.write(slot, page(3, 8192))
  const into = page(0, 8192)
  expect(await area.read(slot, into)).toBe(true)
  expect(into).toEqual(page(3, 8192))
  await area.close()
  expect(existsSync(device)).toBe(true)
})

test('close removes only the file that it made', async () => {
  const file = folder.file()
  const area = open({ file, sizeBytes: 8192 })
  renameSync(file, `${file}.moved`)
  writeFileSync(file, 'somebody else')
  await area.close()
  expect(readFileSync(file, 'utf8')).toBe('somebody else')
  const kept = open({ file: `${file}.kept`, sizeBytes: 8192, keep: true })
  await kept.close()
  expect(statSync(`${file}.kept`).size).toBe(3 * 4096)
  const gone = open({ file: `${file}.gone`, sizeBytes: 8192 })
  renameSync(`${file}.gone`, `${file}.elsewhere`)
  await gone.close()
  expect(existsSync(`${file}.elsewhere`)).toBe(true)
})

test('a file that was cut short under us: a read is an error, not other bytes', async () => {
  const file = folder.file()
  const area = open({ file, sizeBytes: 16 * 4096 })
  const slot = area.allocate(1)
  area.write(slot, page(5))
  truncateSync(file, 4096)
  const into = page(1)
  await expect(area.read(slot, into)).rejects.toMatchObject({ code: 'TMEM_IO' })
  expect(into).toEqual(page(1))
  await area.close()
})
