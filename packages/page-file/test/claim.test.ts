/**
 * One owner at a time: whatever the name, whoever the other one is, however the last one ended. Real files, processes
 * and threads.
 */
import { linkSync, mkdtempSync, readFileSync, renameSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { crc32 } from 'node:zlib'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { PageFile, type PageFileIo, type PageFileRequest, systemFiles } from '../src/index.ts'
import { type Owner, otherProcess, otherThread } from './owners.ts'

let folder: string
let path: string
const owners: Owner[] = []
const started = (owner: Owner): Owner => {
  owners.push(owner)
  return owner
}

beforeEach(() => {
  folder = mkdtempSync('/var/tmp/page-file-claim-')
  path = join(folder, 'pages')
})

afterEach(async () => {
  await Promise.all(owners.splice(0).map((owner) => owner.kill()))
  rmSync(folder, { recursive: true })
})

const request = (more: Partial<PageFileRequest> = {}): PageFileRequest => ({
  path,
  mode: 'ours',
  bytes: 2 ** 20,
  content: { name: 'tmem test' },
  keep: true,
  ...more,
})

async function asSoonAsFree(wanted: PageFileRequest): Promise<PageFile> {
  for (;;) {
    try {
      return PageFile.open(wanted)
    } catch (error) {
      if (!String(error).includes('uses it')) throw error
      await new Promise((resolve) => setImmediate(resolve))
    }
  }
}

/** Ways of claiming: all that there are here, and what is left without koffi. */
const natives = [true, false]

describe.each(natives)('koffi %s', (native) => {
  const files = systemFiles({ native })

  test('the same process is refused, by each name of the file', async () => {
    const file = PageFile.open(request({ files }))
    expect(file.locks).toEqual([expect.stringMatching(/^net:\[\d+\]$/), ...(native ? ['flock'] : [])])
    linkSync(path, join(folder, 'hard'))
    symlinkSync(path, join(folder, 'soft'))
    const says = /this process uses it already/
    expect(() => PageFile.open(request({ files }))).toThrow(says)
    expect(() => PageFile.open(request({ files, path: join(folder, 'hard') }))).toThrow(says)
    expect(() => PageFile.open({ path: join(folder, 'soft'), mode: 'existing', files })).toThrow(says)
    renameSync(path, join(folder, 'renamed'))
    expect(() => PageFile.open(request({ files, path: join(folder, 'renamed') }))).toThrow(says)
    await file.close()
    const again = PageFile.open(request({ files, path: join(folder, 'hard') }))
    expect(again.found).toBe('ours')
    again.closeNow()
  })

  test('a file without a mark has one owner, too', async () => {
    const image = { path, mode: 'plain', bytes: 8192, files } as const
    const file = PageFile.open(image)
    // Without koffi there is no lock that would tell whose it is.
    expect(() => PageFile.open(image)).toThrow(native ? /this process uses it already/ : /somebody uses it already/)
    expect((await started(otherProcess()).open({ ...image, files: undefined! }, { native })).message).toMatch(
      /uses it already/,
    )
    await file.close()
    PageFile.open(image).closeNow()
  })

  test.each(['process', 'thread'])('another %s is refused, and gets it when it is closed', async (kind) => {
    const other = started(kind === 'process' ? otherProcess() : otherThread())
    const file = PageFile.open(request({ files }))
    const refused = await other.open(request(), { native })
    expect(refused).toMatchObject({ open: false, code: 'TMEM_IO' })
    expect(refused.message).toMatch(
      kind === 'process' ? `process ${process.pid} uses it` : /thread 0 of this process uses it/,
    )
    await file.close()
    expect(await other.open(request(), { native })).toMatchObject({ open: true, found: 'ours' })
    const who = kind === 'process' ? /process \d+ uses it/ : /thread \d+ of this process uses it/
    expect(() => PageFile.open(request({ files }))).toThrow(who)
    await other.close()
    PageFile.open(request({ files })).closeNow()
  })

  test.each(['process', 'thread'])(
    'the claim of a %s that was killed while it wrote is void, and its writes are over',
    async (kind) => {
      // Without a mark nothing is written that would wait for the other owner's transfers; and through the cache they
      // are long.
      const long = { path, mode: 'plain', bytes: 2 ** 27, keep: true, through: 'cache' } as const
      const other = started(kind === 'process' ? otherProcess() : otherThread())
      expect(await other.open(long, { native })).toMatchObject({ open: true })
      await other.write()
      expect(() => PageFile.open({ ...long, files })).toThrow(/uses it/)
      const killed = other.kill()
      const file = await asSoonAsFree({ ...long, files })
      const before = readFileSync(path)
      await killed
      await new Promise((resolve) => setTimeout(resolve, 100))
      expect(Buffer.compare(readFileSync(path), before)).toBe(0)
      await file.close()
    },
    60_000,
  )

  test('what a killed process would have removed is taken over', async () => {
    const other = started(otherProcess())
    const temporary = request({ mode: 'make', keep: false })
    expect(await other.open(temporary, { native })).toMatchObject({ open: true, found: 'nothing' })
    expect(() => PageFile.open({ ...temporary, files })).toThrow(/process \d+ uses it/)
    await other.write()
    await other.kill()
    const before = statSync(path).ino
    const file = PageFile.open({ ...temporary, files })
    expect(file.found).toBe('leftover')
    expect(statSync(path).ino).toBe(before)
    expect(
      readFileSync(path)
        .subarray(4096)
        .every((byte) => byte === 0),
    ).toBe(true)
    await file.close()
    expect(() => statSync(path)).toThrow(/ENOENT/)
  })
})

// Each time both try at the same millisecond, in all the states that a file can be in.
test.each([
  ['with koffi', true, true],
  ['without koffi', false, false],
  ['one with, one without', true, false],
])(
  'of two processes that race, %s, exactly one wins',
  async (_, one, other) => {
    const racers = [started(otherProcess()), started(otherProcess())] as const
    const kinds: readonly PageFileRequest[] = [
      request({ mode: 'make', keep: false }),
      request(),
      request(),
      request({ content: { name: 'tmem test', tolerant: true } }),
      request({ mode: 'plain', content: undefined! }),
    ]
    for (let round = 0; round < 200; round++) {
      const kind = kinds[round % kinds.length]!
      // The second of the two that keep finds the file of the first one.
      if (round % kinds.length !== 2) rmSync(path, { force: true })
      const at = Date.now() + 3
      const answers = await Promise.all([
        racers[0].open(kind, { native: one, at }),
        racers[1].open(kind, { native: other, at }),
      ])
      const winners = answers.filter(({ open }) => open).length
      expect({ round, winners, answers }).toMatchObject({ winners: 1 })
      await Promise.all(racers.map((racer) => racer.close()))
    }
  },
  120_000,
)

test('of two threads that race exactly one wins', async () => {
  const racers = [started(otherThread()), started(otherThread())] as const
  for (let round = 0; round < 100; round++) {
    rmSync(path, { force: true })
    const at = Date.now() + 3
    const native = round % 2 === 0
    const answers = await Promise.all(racers.map((racer) => racer.open(request(), { native, at })))
    const winners = answers.filter(({ open }) => open).length
    expect({ round, winners, answers }).toMatchObject({ winners: 1 })
    await Promise.all(racers.map((racer) => racer.close()))
  }
}, 120_000)

test('of six processes that take over what a dead one left exactly one wins', async () => {
  const dead = started(otherProcess())
  await dead.open(request())
  await dead.kill()
  const left = readFileSync(path)
  const racers = Array.from({ length: 6 }, () => started(otherProcess()))
  for (let round = 0; round < 60; round++) {
    writeFileSync(path, left)
    const kind = round % 2 === 0 ? request() : request({ mode: 'plain', content: undefined! })
    const at = Date.now() + 5
    const answers = await Promise.all(
      racers.map((racer, n) => racer.open(kind, { native: round % 3 !== 0 || n % 2 === 0, at })),
    )
    const winners = answers.filter(({ open }) => open).length
    expect({ round, winners, answers }).toMatchObject({ winners: 1 })
    await Promise.all(racers.map((racer) => racer.close()))
  }
}, 120_000)

describe('between a look at the file and its claim', () => {
  /** This machine's files, with something that happens before the first claim. */
  const meanwhile = (happens: () => void): PageFileIo => {
    const files = systemFiles()
    const claim = files.claim.bind(files)
    let first = true
    files.claim = (...words) => {
      if (first) happens()
      first = false
      return claim(...words)
    }
    return files
  }
  /** Opens as another owner does, writes a byte, and closes. */
  const another = (more: Partial<PageFileRequest> = {}): void => {
    const file = PageFile.open(request(more))
    file.writeNow(new Uint8Array([7]), 0, 1, 5000)
    file.closeNow()
  }

  test('its last owner may remove it: then another is made', () => {
    another()
    const file = PageFile.open(request({ files: meanwhile(() => rmSync(path)) }))
    expect(file.found).toBe('nothing')
    expect(statSync(path).size).toBe(2 ** 20)
    file.closeNow()
  })

  test('another owner may have what was just made: then its content stays', () => {
    const tolerant = { name: 'tmem test', tolerant: true }
    const file = PageFile.open(request({ files: meanwhile(() => another({ content: tolerant })) }))
    expect(file.found).toBe('ours')
    file.closeNow()
    expect(readFileSync(path)[5000]).toBe(7)
  })

  test('it may become something else: then it is refused', () => {
    another()
    const files = meanwhile(() => another({ mode: 'existing', content: { name: 'tmem other' } }))
    expect(() => PageFile.open(request({ files }))).toThrow(/it holds tmem other/)
    expect(readFileSync(path)[5000]).toBe(7)
  })
})

describe('without locks', () => {
  /** A system that has neither. */
  const unlocked = (): PageFileIo => {
    const files = systemFiles({ native: false })
    files.claim = () => ({ locks: [], release: () => undefined })
    return files
  }

  test('the mark keeps others away until the file is closed, or the process has ended', async () => {
    const file = PageFile.open(request({ files: unlocked() }))
    expect(() => PageFile.open(request({ files: unlocked() }))).toThrow(/this process uses it already/)
    // One with locks believes the mark of one without.
    expect(() => PageFile.open(request())).toThrow(/this process uses it already/)
    await file.close()
    const other = started(otherProcess())
    await other.open(request())
    expect(() => PageFile.open(request({ files: unlocked() }))).toThrow(/process \d+ uses it/)
    await other.kill()
    PageFile.open(request({ files: unlocked() })).closeNow()
  })

  test('of two that mark it in turn, the second has it', () => {
    const first = unlocked()
    first.pause = (milliseconds) => {
      // While the first one waits, another process writes its mark over the one that is there.
      if (milliseconds !== 5) return
      const descriptor = first.open(path, { write: true, follow: false, exclusive: false })
      const other = readFileSync(path, 'latin1')
        .slice(0, 1024)
        .replace(/^thread \d+$/m, 'thread 77')
      const lines = other.slice(0, other.indexOf('checksum'))
      const text = Buffer.from(
        `${lines}checksum ${crc32(lines).toString(16).padStart(8, '0')}\n`.padEnd(1014, '\0'),
        'latin1',
      )
      first.writeNow(descriptor, text, 0, text.length, 0)
      first.writeNow(descriptor, text, 0, text.length, 3072)
      first.close(descriptor)
    }
    expect(() => PageFile.open(request({ files: first }))).toThrow(/thread 77 of this process uses it/)
  })
})
