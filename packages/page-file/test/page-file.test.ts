/** What may be there, what becomes of it, and that nothing is touched which is not ours. */
import { execFileSync, spawnSync } from 'node:child_process'
import {
  chownSync,
  existsSync,
  linkSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { MemoryFiles, PageFile, type PageFileRequest, systemFiles } from '../src/index.ts'

let folder: string
let path: string
beforeEach(() => {
  folder = mkdtempSync('/var/tmp/page-file-')
  path = join(folder, 'pages')
})
afterEach(() => rmSync(folder, { recursive: true }))

const content = { name: 'tmem test' }
const tolerant = { ...content, tolerant: true }
const request = (more: Partial<PageFileRequest> = {}): PageFileRequest => ({
  path,
  mode: 'ours',
  bytes: 65536,
  content,
  keep: true,
  ...more,
})
const modes = ['make', 'ours', 'plain'] as const

/** A kept file of ours with a byte of content in each block, closed. */
async function kept(more: Partial<PageFileRequest> = {}): Promise<void> {
  const file = PageFile.open(request(more))
  await file.write(new Uint8Array(61440).fill(7), 0, 61440, 4096)
  await file.close()
}

const open = (more: Partial<PageFileRequest> = {}): PageFile => PageFile.open(request(more))

/** Opens and closes: what was found. */
const found = (more: Partial<PageFileRequest> = {}): string => {
  const file = open(more)
  file.closeNow()
  return file.found
}

/** Bytes of the file changed by `change`. */
function damage(change: (bytes: Buffer) => void): void {
  const bytes = readFileSync(path)
  change(bytes)
  writeFileSync(path, bytes)
}

describe('a file that is not ours', () => {
  const foreign: readonly (readonly [string, Buffer])[] = [
    ['text', Buffer.from('somebody else wrote this')],
    ['one block', Buffer.alloc(4096, 'x')],
    ['zeros at the start', Buffer.concat([Buffer.alloc(65536), Buffer.from('btrfs')])],
    ['a swap header', Buffer.concat([Buffer.alloc(4086), Buffer.from('SWAPSPACE2'), Buffer.alloc(65536)])],
  ]
  const zeros: readonly (readonly [string, Buffer])[] = [
    ['nothing', Buffer.alloc(0)],
    ['zeros', Buffer.alloc(65536)],
  ]
  test.each(foreign)('is refused by content that would take zeros: %s', (_, bytes) => {
    writeFileSync(path, bytes)
    for (const mode of ['make', 'ours'] as const)
      expect(() => open({ mode, content: tolerant })).toThrow(/none of ours/)
    expect(readFileSync(path)).toEqual(bytes)
  })

  test.each([...foreign, ...zeros])('is refused and stays as it is: %s', (_, bytes) => {
    writeFileSync(path, bytes, { mode: 0o640 })
    const before = lstatSync(path, { bigint: true })
    for (const mode of ['make', 'ours'] as const) {
      expect(() => open({ mode })).toThrow(
        expect.objectContaining({
          code: 'TMEM_IO',
          message: expect.stringMatching(/it is there, and it is none of ours; remove it/),
        }),
      )
    }
    expect(readFileSync(path)).toEqual(bytes)
    expect(lstatSync(path, { bigint: true }).mtimeNs).toBe(before.mtimeNs)
  })

  test('is used when it is asked for, and only the caller writes to it', async () => {
    writeFileSync(path, Buffer.alloc(10_000, 'x'))
    const file = PageFile.open({ path, mode: 'existing' })
    expect([file.found, file.bytes, file.keep]).toEqual(['other', 10_000, true])
    const back = Buffer.alloc(10_000)
    await file.read(back, 0, 10_000, 0)
    expect(back.toString()).toBe('x'.repeat(10_000))
    // Also what lies behind the last whole block, without making the file longer.
    await file.write(Buffer.from('yyy'), 0, 3, 9997)
    await file.write(Buffer.from('zz'), 0, 2, 8191)
    await file.sync()
    await file.close()
    expect(readFileSync(path, 'latin1')).toBe(`${'x'.repeat(8191)}zz${'x'.repeat(9997 - 8193)}yyy`)
    expect(() => file.close({ remove: true })).toThrow(/not ours to remove/)
  })

  test('becomes ours when it is asked for with content', async () => {
    writeFileSync(path, Buffer.alloc(65536, 'x'))
    const file = PageFile.open({ path, mode: 'existing', content, keep: true })
    expect(file.found).toBe('other')
    await file.close()
    expect(found()).toBe('ours')
  })

  test('can be read, while somebody else writes to it, and not written', async () => {
    const writer = open()
    await writer.write(new Uint8Array(10).fill(7), 0, 10, 5000)
    const file = PageFile.open({ path, mode: 'read' })
    const back = new Uint8Array(10)
    await file.read(back, 0, 10, 5000)
    expect(back.every((byte) => byte === 7)).toBe(true)
    expect(() => file.write(back, 0, 10, 5000)).toThrow(/read only/)
    expect(() => file.resize(0)).toThrow(/keeps its length/)
    await expect(file.punch(4096, 4096)).rejects.toThrow(RangeError)
    expect(file.locks).toEqual([])
    await file.close()
    await writer.close()
  })
})

describe('what is no file', () => {
  const makers = {
    directory: () => mkdirSync(path),
    FIFO: () => execFileSync('mkfifo', [path]),
    'symbolic link': () => {
      writeFileSync(join(folder, 'target'), '')
      symlinkSync(join(folder, 'target'), path)
    },
  }
  test.each(Object.entries(makers))('a %s is refused at once', (kind, make) => {
    make()
    const before = readdirSync(folder)
    const is = new RegExp(`it is a ${kind}`)
    for (const mode of ['make', 'ours'] as const) expect(() => open({ mode, content: tolerant })).toThrow(is)
    expect(() => PageFile.open({ path, mode: 'plain', bytes: 0 })).toThrow(is)
    expect(readdirSync(folder)).toEqual(before)
  })

  test.each(['directory', 'FIFO'] as const)('a %s is refused when it is asked for, too', (kind) => {
    makers[kind]()
    for (const mode of ['existing', 'read'] as const)
      expect(() => PageFile.open({ path, mode })).toThrow(new RegExp(`it is a ${kind}`))
  })

  test('a socket and a character device are refused', async () => {
    const server = createServer().listen(path)
    await new Promise((resolve) => server.once('listening', resolve))
    expect(() => open()).toThrow(/it is a socket/)
    server.close()
    for (const mode of ['ours', 'existing'] as const)
      expect(() => PageFile.open(request({ path: '/dev/null', mode }))).toThrow(/it is a character device/)
  })

  test('a link is followed only to a file that is said to be there', async () => {
    await kept()
    symlinkSync(path, join(folder, 'link'))
    const file = PageFile.open({ path: join(folder, 'link'), mode: 'existing' })
    expect(file.bytes).toBe(65536)
    await file.close()
    expect(() => PageFile.open({ path: join(folder, 'none'), mode: 'existing' })).toThrow(
      /there is nothing of that name/,
    )
    symlinkSync(join(folder, 'none'), join(folder, 'dangling'))
    expect(() => open({ path: join(folder, 'dangling') })).toThrow(/symbolic link/)
    expect(existsSync(join(folder, 'none'))).toBe(false)
  })

  test('a folder that does not exist is said to be that', () => {
    expect(() => open({ path: join(folder, 'none', 'pages') })).toThrow(
      /its folder does not exist: make it with mkdir -p .*none$/,
    )
  })
})

describe('a file of ours', () => {
  test('is made with its size and its mark, which people can read, and removed', async () => {
    const file = open({ mode: 'make', keep: false })
    expect([file.found, file.bytes, file.keep]).toEqual(['nothing', 65536, false])
    expect(statSync(path).mode & 0o777).toBe(0o600)
    expect(statSync(path).size).toBe(65536)
    const text = readFileSync(path, 'latin1')
    expect(text).toMatch(new RegExp(`^tmem file 1\ncontent tmem test\nbytes 65536\nkeep no\nprocess ${process.pid} `))
    expect(text.slice(0, 1014)).toBe(text.slice(3072, 4086))
    await file.close()
    expect(readdirSync(folder)).toEqual([])
  })

  test('is kept when asked, found again with its content, and not removed by one that would not keep it', async () => {
    await kept()
    const file = open({ keep: false, bytes: 8192 })
    expect([file.found, file.bytes, file.keep]).toEqual(['ours', 65536, true])
    const back = new Uint8Array(61440)
    await file.read(back, 0, 61440, 4096)
    expect(back.every((byte) => byte === 7)).toBe(true)
    await file.close()
    expect(readFileSync(path, 'latin1')).toMatch(/\nkeep yes\nprocess -\n/)
    expect(() => open({ mode: 'make' })).toThrow(/is to be kept; remove it, or ask/)
    expect(() => open({ content: { name: 'tmem other' } })).toThrow(/it holds tmem test, not tmem other/)
    const last = open()
    await last.close({ remove: true })
    expect(readdirSync(folder)).toEqual([])
  })

  test('has a header of the caller, which stays the caller’s', async () => {
    const header = Buffer.alloc(4096, 'h')
    const file = open({ content: { ...content, header } })
    const part = new Uint8Array(4096)
    await file.read(part, 0, 4096, 0)
    expect(Buffer.from(part.subarray(1024, 3072)).toString()).toBe('h'.repeat(2048))
    expect(Buffer.from(part.subarray(4086)).toString()).toBe('h'.repeat(10))
    await file.write(Buffer.from('closed'), 0, 6, 1024)
    await file.close()
    const again = open({ content: { ...content, header } })
    await again.read(part, 0, 4096, 0)
    expect(Buffer.from(part.subarray(1024, 1032)).toString()).toBe('closedhh')
    await again.close()
  })

  test('gets another length, and its mark says so', async () => {
    await kept()
    const file = open()
    file.resize(131072)
    expect([file.bytes, statSync(path).size]).toEqual([131072, 131072])
    await file.write(new Uint8Array(10).fill(9), 0, 10, 131062)
    file.resize(8192)
    expect(() => file.readNow(new Uint8Array(1), 0, 1, 8192)).toThrow(RangeError)
    await file.close()
    expect(readFileSync(path, 'latin1')).toMatch(/\nbytes 8192\n/)
    expect(statSync(path).size).toBe(8192)
  })

  test('of another user is refused', async (ctx) => {
    requires(ctx, { root: true })
    await kept()
    chownSync(path, 12345, 12345)
    expect(() => open()).toThrow(/it belongs to user 12345, and this is user 0/)
    chownSync(path, 0, 0)
    expect(found()).toBe('ours')
  })

  test('is removed only if it still is that file', async () => {
    const file = open({ mode: 'make', keep: false })
    renameSync(path, join(folder, 'renamed'))
    writeFileSync(path, 'somebody else')
    await file.close()
    expect(readFileSync(path, 'utf8')).toBe('somebody else')
    expect(existsSync(join(folder, 'renamed'))).toBe(true)
  })

  test('without a mark is made or used, and is all the caller’s', async () => {
    const plain = { path, mode: 'plain', bytes: 8192, keep: true } as const
    const file = PageFile.open(plain)
    expect([file.found, file.bytes]).toEqual(['nothing', 8192])
    await file.write(new Uint8Array(8192).fill(7), 0, 8192, 0)
    file.resize(0)
    file.resize(4096)
    await file.close()
    expect(readFileSync(path)).toEqual(Buffer.alloc(4096))
    const again = PageFile.open(plain)
    expect([again.found, again.bytes]).toEqual(['other', 4096])
    await again.close()
  })
})

describe('damage', () => {
  beforeEach(() => kept())
  type Damage = readonly [what: string, change: (bytes: Buffer) => void]
  const small: readonly Damage[] = [
    ['its first 8 bytes', (bytes) => bytes.fill(0xff, 0, 8)],
    ['its first 8 bytes, zeros', (bytes) => bytes.fill(0, 0, 8)],
    ['a bit of the second mark', (bytes) => bytes.writeUInt8(bytes[3100]! ^ 1, 3100)],
    ['no second mark', (bytes) => bytes.fill(0, 3072, 4086)],
  ]
  // What other programs make of it.
  const large: readonly Damage[] = [
    ['a file system that leaves the second mark', (bytes) => bytes.fill(0, 0, 1024).fill(0xef, 1024, 2048)],
    ['a partition table', (bytes) => bytes.fill(0xee, 446, 512)],
    ['something else over the second mark', (bytes) => bytes.fill(0xee, 3072, 4086)],
    ['both marks', (bytes) => bytes.fill(0xff, 0, 8).fill(0xff, 3072, 3080)],
    ['a mark that is mostly another text', (bytes) => bytes.fill('x', 0, 200)],
  ]
  test.each([...small, ...large])('makes it a file that is not ours: %s', (_, change) => {
    damage(change)
    const before = readFileSync(path)
    expect(() => open()).toThrow(/none of ours|its mark is damaged/)
    expect(readFileSync(path)).toEqual(before)
  })

  test.each(small)('is put right for content that says so: %s', (_, change) => {
    damage(change)
    const before = readFileSync(path)
    expect(found({ content: tolerant })).toBe('damaged')
    expect(found()).toBe('ours')
    expect(readFileSync(path).subarray(4096)).toEqual(before.subarray(4096))
  })

  test.each(large)('that is no accident is not put right: %s', (_, change) => {
    damage(change)
    const before = readFileSync(path)
    expect(() => open({ content: tolerant })).toThrow(/none of ours/)
    expect(readFileSync(path)).toEqual(before)
  })

  test('of the content is the caller’s to find', () => {
    damage((bytes) => bytes.fill(0xff, 4096, 65536))
    expect(found()).toBe('ours')
  })

  test.each([0, 100, 65536, 200_000])('a file of %d zeros is ours for content that says so', (length) => {
    writeFileSync(path, '')
    truncateSync(path, length)
    expect(() => open()).toThrow(/none of ours/)
    const file = open({ content: tolerant })
    expect([file.found, file.bytes]).toEqual(['zeros', 65536])
    file.closeNow()
    expect(found()).toBe('ours')
  })

  test('the marks of two times, as a crash may leave them, are ours', () => {
    const before = readFileSync(path).subarray(3072, 4086)
    const file = open()
    damage((bytes) => before.copy(bytes, 3072))
    expect(readFileSync(path).subarray(0, 1014).equals(before)).toBe(false)
    file.closeNow()
    damage((bytes) => before.copy(bytes, 3072))
    expect(found()).toBe('ours')
  })
})

describe('a file to be kept that is not left alone', () => {
  const written = async (): Promise<PageFile> => {
    const file = open({ mode: 'plain', content: undefined! })
    await file.write(new Uint8Array(65536).fill(7), 0, 65536, 0)
    await file.sync()
    return file
  }
  const fails = async (file: PageFile, message: RegExp): Promise<void> => {
    const error = { code: 'TMEM_IO', message: expect.stringMatching(message) }
    await expect(file.sync()).rejects.toMatchObject(error)
    expect(() => file.syncNow()).toThrow(expect.objectContaining(error))
    expect(() => file.checkThere()).toThrow(expect.objectContaining(error))
  }

  test('fails each sync while its name leads elsewhere', async () => {
    const file = await written()
    renameSync(path, `${path}-2`)
    await fails(file, /removed, renamed or replaced it: there is nothing of that name/)
    writeFileSync(path, '')
    await fails(file, /there is another file of that name/)
    renameSync(`${path}-2`, path)
    await file.sync()
    await file.close()
    expect(readFileSync(path)).toEqual(Buffer.alloc(65536, 7))
  })

  test('fails each sync, and writes to its end, while it is shorter than it was', async () => {
    const file = await written()
    truncateSync(path, 5000)
    await fails(file, /somebody has cut it off: it has 5000 bytes, and not 65536/)
    const end = [new Uint8Array(4096), 0, 4096, 61440] as const
    await expect(file.write(...end)).rejects.toThrow(/somebody has cut it off/)
    expect(() => file.writeNow(...end)).toThrow(/somebody has cut it off/)
    expect(file.presentBytes).toBe(5000)
    file.resize(65536)
    await file.write(...end)
    await file.sync()
    await file.close()
  })

  test('nobody is told where it would be removed anyway', async () => {
    const file = open({ mode: 'make', keep: false })
    rmSync(path)
    await file.sync()
    await file.close()
    expect(readdirSync(folder)).toEqual([])
  })
})

test.each(modes)('a claim that is just being given up keeps no file from being made: %s', (mode) => {
  // As of a removed file whose number is that of the new one.
  const files = systemFiles()
  const claim = files.claim.bind(files)
  let refusals = 3
  files.claim = (...words) => (refusals-- > 0 ? undefined : claim(...words))
  open({ mode, files, keep: false, ...(mode === 'plain' ? { content: undefined! } : {}) }).closeNow()
  expect(refusals).toBeLessThan(0)
})

describe('nothing is left behind', () => {
  const failures = ['openDirect', 'syncNow', 'writeNow', 'resize', 'kernelUse', 'claim', 'name'] as const
  test.each(failures)('when %s fails, of what was made', (call) => {
    const files = systemFiles()
    // Of a file that has had no name nothing is asked.
    if (call === 'kernelUse') files.makeUnnamed = () => undefined
    files[call] = () => {
      throw Object.assign(new Error('EIO: it fails'), { code: 'EIO' })
    }
    for (const mode of modes) {
      const more = { mode, files, ...(mode === 'plain' ? { content: undefined! } : {}) }
      if (mode === 'plain' && (call === 'writeNow' || call === 'syncNow')) continue
      expect(() => open(more)).toThrow(
        expect.objectContaining({ code: 'TMEM_IO', message: expect.stringMatching(/EIO: it fails/) }),
      )
      expect(readdirSync(folder)).toEqual([])
    }
    // And the claim is given back.
    expect(found({ mode: 'make' })).toBe('nothing')
  })

  test('when a file system gives no name to what it has made, it is made with one', () => {
    const files = systemFiles()
    files.name = () => 'none'
    open({ files, mode: 'make', keep: false }).closeNow()
    expect(readdirSync(folder)).toEqual([])
    expect(found({ files })).toBe('nothing')
    expect(found()).toBe('ours')
  })

  test('what somebody has put there meanwhile stays', () => {
    const files = systemFiles()
    const name = files.name.bind(files)
    files.name = (...words) => {
      if (!existsSync(path)) writeFileSync(path, 'mine')
      return name(...words)
    }
    expect(() => open({ files, mode: 'make' })).toThrow(/none of ours/)
    expect(readFileSync(path, 'latin1')).toBe('mine')
  })

  test.for([
    ['make', false],
    ['ours', true],
    ['plain', true],
  ] as const)('by a process that is killed while it makes a file: %s', { timeout: 120_000 }, ([mode, keep]) => {
    const how = { mode, keep, ...(mode === 'plain' ? { content: undefined! } : {}) }
    // Before each of the calls that it makes, until it has made it.
    let calls = 0
    for (let isMade = false; !isMade; ) {
      const { signal, status, stderr } = spawnSync(process.execPath, [
        fileURLToPath(new URL('./killed.mjs', import.meta.url)),
        JSON.stringify(request(how)),
        `${++calls}`,
      ])
      expect([signal ?? status, stderr.toString()]).toEqual([expect.toBeOneOf(['SIGKILL', 0]), ''])
      isMade = signal === null
      // At once, and with nothing beside it.
      const after = keep ? (mode === 'plain' ? 'other' : 'ours') : 'leftover'
      expect(['nothing', after]).toContain(found(how))
      expect(readdirSync(folder)).toEqual(keep ? ['pages'] : [])
      rmSync(path, { force: true })
    }
    expect(calls).toBeGreaterThan(6)
  })

  test('when what is there cannot be used, it stays', async () => {
    await kept()
    const before = readFileSync(path)
    const files = systemFiles()
    files.openDirect = () => {
      throw Object.assign(new Error('EIO: it fails'), { code: 'EIO' })
    }
    expect(() => open({ files })).toThrow(/EIO: it fails/)
    expect(readFileSync(path).subarray(4096)).toEqual(before.subarray(4096))
    expect(found()).toBe('ours')
  })

  test('of descriptors', async () => {
    const count = (): number => readdirSync('/proc/self/fd').length
    const before = count()
    for (let n = 0; n < 20; n++) {
      const file = open()
      expect(() => open()).toThrow(/this process uses it already/)
      await file.close()
      expect(() => open({ mode: 'make' })).toThrow(/is to be kept/)
    }
    await new Promise((resolve) => setImmediate(resolve))
    expect(count()).toBe(before)
  })
})

test('a request that makes no sense is refused before anything is looked at', () => {
  const bad: readonly (readonly [object, RegExp])[] = [
    [{ path: '' }, /path/],
    [{ path: 'a\0b' }, /path/],
    [{ bytes: 0 }, /multiple of 4096/],
    [{ bytes: 5000 }, /multiple of 4096/],
    [{ bytes: undefined }, /multiple of 4096/],
    [{ content: undefined }, /needs content/],
    [{ content: { name: '' } }, /printable/],
    [{ content: { name: 'a\nb' } }, /printable/],
    [{ content: { name: 'a', header: new Uint8Array(1) } }, /4096 bytes/],
    [{ mode: 'plain' }, /has no content/],
    [{ mode: 'read' }, /has no content/],
    [{ mode: 'make', blockDevice: true }, /block device/],
  ]
  for (const [more, message] of bad) {
    const files = new MemoryFiles()
    expect(() => open({ files, ...more })).toThrow(message)
    expect(files.content(path)).toBeUndefined()
  }
})

test('hard links do not make two files of one', async () => {
  const file = open({ mode: 'make', keep: false })
  linkSync(path, join(folder, 'second'))
  await file.close()
  // The name that was asked for goes; what has another name now says that nobody wants it.
  expect(readdirSync(folder)).toEqual(['second'])
  expect(found({ path: join(folder, 'second'), mode: 'make', keep: false })).toBe('leftover')
  expect(readdirSync(folder)).toEqual([])
})
