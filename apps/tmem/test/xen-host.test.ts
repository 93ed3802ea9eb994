/**
 * Hosts as processes: what a toolstack asks of them, domains that are saved and restored, and one that moves while it
 * runs.
 */
import { readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { temporaryDirectory, tmem } from './tmem.ts'
import { hosting, SocketGuest } from './xen-guest.ts'

const persistent = 0x01000001
const ephemeral = 0x01000000
const [put, get, flushPage] = [4, 5, 6]

/** Fills a page so that it says which it is, and does not shrink to nothing. */
function fill(page: Uint8Array, key: number, version: number): void {
  const words = new Uint32Array(page.buffer, page.byteOffset, 1024)
  for (let n = 0; n < 1024; n++)
    words[n] = n < 512 ? Math.imul(key + 1, 2_654_435_761) ^ Math.imul(n, version) : version
}

test('a domain moves to another process while its guest puts, gets and flushes: no page is lost, none comes back', async () => {
  const [here, there] = await Promise.all([hosting(), hosting()])
  let guest = await SocketGuest.connect(here.control, 5)
  expect(await guest.newPool(persistent)).toBe(0)
  expect(await guest.newPool(ephemeral)).toBe(1)
  const pages = 2000
  /** By page: the version that was stored last; 0: there is none. */
  const versions = new Uint32Array(pages)
  const wanted = new Uint8Array(4096)
  const answers = { stored: 0, refused: 0, hits: 0, misses: 0, flushed: 0 }
  let version = 0
  let moves = 0
  const operate = async (page: number, command: number): Promise<void> => {
    if (command === put) fill(guest.page, page, ++version)
    const result = await guest.call(command, 0, page % 16, page)
    if (result === undefined) {
      // The guest finds itself on the other machine, and does again what was not answered.
      moves++

      guest = await SocketGuest.connect(there.control, 5)
      await operate(page, command)
      return
    }
    if (command === put) {
      versions[page] = result === 1 ? version : 0
      answers[result === 1 ? 'stored' : 'refused']++
    } else if (command === flushPage) {
      versions[page] = 0
      answers.flushed++
    } else if (versions[page] === 0) {
      if (result === 1) throw new Error(`page ${page} has come back`)
      answers.misses++
    } else {
      fill(wanted, page, versions[page]!)
      if (result !== 1 || Buffer.compare(guest.page, wanted) !== 0) throw new Error(`page ${page} is lost: ${result}`)
      answers.hits++
    }
  }
  for (let page = 0; page < pages; page++) await operate(page, put)
  expect(answers.stored).toBe(pages)

  let isMoving = true
  const migrating = tmem(['xen', 'migrate', '5', '--json', '--control', here.control, '--to', there.control]).finally(
    () => {
      isMoving = false
    },
  )
  let state = 17
  const any = (below: number): number => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) % below
  }
  let during = 0
  const onlyGets = answers.hits
  while (isMoving || during < 500) {
    await operate(any(pages), [put, get, get, get, flushPage][any(5)]!)
    during++
  }
  const { code, stdout, stderr } = await migrating
  expect([code, stderr]).toEqual([0, ''])
  expect(moves).toBe(1)
  const answer = JSON.parse(stdout) as { pages: number; pools: number; flushed: number }
  expect(answer.pools).toBe(2)
  expect(answer.pages).toBeGreaterThan(0)
  expect(answers.hits).toBeGreaterThan(onlyGets)
  // Byte for byte, each page; and what was flushed or refused is not there.
  for (let page = 0; page < pages; page++) await operate(page, get)
  // It is no longer here, and goes on there.
  const lists = await Promise.all(
    [here, there].map(({ control }) => tmem(['xen', 'list', '--json', '--control', control])),
  )
  const clients = lists.map(({ stdout: text }) =>
    (JSON.parse(text) as { records: { record: string; CI: number }[] }).records.filter(({ record }) => record === 'C'),
  )
  expect(clients[0]).toEqual([])
  expect(clients[1]).toMatchObject([{ CI: 5, fr: 0 }])
  for (let page = 0; page < 100; page++) await operate(page, put)
  expect(answers.refused + answers.flushed).toBeGreaterThan(0)
  guest.close()
  expect(await Promise.all([here.stop(), there.stop()])).toEqual([0, 0])
}, 120_000)

test('a domain that cannot be moved goes on where it is', async () => {
  const [here, there] = await Promise.all([hosting(), hosting()])
  const guest = await SocketGuest.connect(here.control, 5)
  const migrate = (to: string): ReturnType<typeof tmem> =>
    tmem(['xen', 'migrate', '5', '--control', here.control, '--to', to])
  expect(await migrate(there.control)).toMatchObject({ code: 1, stderr: expect.stringContaining('nothing to move') })
  await guest.newPool(persistent)
  guest.page.fill(7)
  expect(await guest.call(put, 0, 1, 1)).toBe(1)
  const other = await SocketGuest.connect(there.control, 5)
  expect(await migrate(there.control)).toMatchObject({
    code: 1,
    stderr: expect.stringContaining('there is a domain 5 already'),
  })
  expect(await migrate('/nowhere/xen.sock')).toMatchObject({ code: 1, stderr: expect.stringContaining('no host at') })
  guest.page.fill(8)
  expect(await guest.call(put, 0, 1, 2)).toBe(1)
  expect(await guest.call(get, 0, 1, 1)).toBe(1)
  expect(guest.page[0]).toBe(7)
  other.close()
  guest.close()
})

test('a domain is saved and restored; what is there is not overwritten, what is cut leaves nothing', async () => {
  const folder = temporaryDirectory()
  const file = join(folder, 'domain')
  const here = await hosting('--release', '4.5')
  const at = ['--control', here.control]
  const guest = await SocketGuest.connect(here.control, 5)
  // It is no server of devices, though it knows what info is.
  expect(await tmem(['stat', ...at])).toMatchObject({
    code: 1,
    stderr: expect.stringContaining('is not that of tmem serve'),
  })
  await guest.newPool(persistent)
  for (let index = 0; index < 20; index++) {
    guest.page.fill(index)
    expect(await guest.call(put, 0, 1, index)).toBe(1)
  }
  const saved = await tmem(['xen', 'save', '5', file, ...at])
  expect([saved.code, saved.stderr]).toEqual([0, ''])
  const bytes = readFileSync(file)
  // A guest's memory is nobody else's to read.
  expect(statSync(file).mode & 0o777).toBe(0o600)
  expect(saved.stdout).toContain(`${bytes.length} bytes in ${file}`)
  const told = await tmem(['xen', 'decode', file])
  expect([told.code, told.stderr]).toEqual([0, `20 pages in ${bytes.length} bytes\n`])
  expect(told.stdout).toMatch(
    /^ +0 {2}head {18}Xen 4\.0 to 4\.7: version 1, up to 16 pools; client: compress, weight 0, cap 0$/m,
  )
  expect(told.stdout).toMatch(/^ +32 {2}pool {18}pool 0: persistent, private, .*; up to 20 pages$/m)
  expect(told.stdout.match(/^ +\d+ {2}page {18}pool 0, object 1, index \d+$/gm)?.length).toBe(20)
  expect(await tmem(['xen', 'save', '5', file, ...at])).toMatchObject({
    code: 1,
    stderr: expect.stringContaining('EEXIST'),
  })
  expect(readFileSync(file).equals(bytes)).toBe(true)
  expect(await tmem(['xen', 'save', '9', join(folder, 'none'), ...at])).toMatchObject({
    code: 1,
    stderr: expect.stringContaining('there is no domain 9'),
  })
  // What does not fit is no saved domain: neither a part of it, nor one whose last write was short.
  for (const blocks of [10, 72]) {
    const through = ['bash', '-c', `ulimit -f ${blocks}; exec "$@"`, 'bash']
    const { code, stderr } = await tmem(['xen', 'save', '5', join(folder, 'short'), ...at], { through })
    expect([code, stderr]).toEqual([
      1,
      expect.stringMatching(/^tmem: .* cannot be written and was removed: .*EFBIG[^\n]*\n$/),
    ])
  }
  expect(readdirSync(folder)).toEqual(['domain'])
  // The guest goes on.
  expect(await guest.call(put, 0, 1, 99)).toBe(1)

  expect(await tmem(['xen', 'restore', '5', file, ...at])).toMatchObject({
    code: 1,
    stderr: expect.stringContaining('there is a domain 5 already'),
  })
  const cut = join(folder, 'cut')
  writeFileSync(cut, bytes.subarray(0, 10_000))
  const answer = await tmem(['xen', 'restore', '6', cut, ...at])
  expect(answer.code).toBe(1)
  expect(answer.stderr).toContain('ends in page 3 of 20 of pool 0')
  const half = await tmem(['xen', 'decode', '--json', cut])
  expect([half.code, half.stdout]).toEqual([2, ''])
  expect(half.stderr).toMatch(/^tmem: xen decode: the saved stream ends in page 3 of 20 of pool 0 \(byte 10000\)\n$/)
  const restored = await tmem(['xen', 'restore', '6', file, '--json', ...at])
  expect(JSON.parse(restored.stdout)).toEqual({ domain: '6', pools: 1, pages: 20 })
  const twin = await SocketGuest.connect(here.control, 6)
  for (let index = 0; index < 20; index++) {
    expect(await twin.call(get, 0, 1, index)).toBe(1)
    expect(twin.page[4095]).toBe(index)
  }
  expect(await twin.call(get, 0, 1, 99)).toBe(0)
  guest.close()
  twin.close()
  expect(await here.stop()).toBe(0)
}, 60_000)

test.each([{ release: '4.5' }, { release: '4.9' }])(
  'a toolstack, Xen $release',
  async ({ release }) => {
    const here = await hosting('--release', release, '--max', '64KiB')
    const xen = (...words: string[]): ReturnType<typeof tmem> => tmem(['xen', ...words, '--control', here.control])
    const guest = await SocketGuest.connect(here.control, 5)
    await guest.newPool(persistent)
    await guest.newPool(ephemeral)
    guest.page.fill(3)
    guest.page[1] = 9
    expect(await guest.call(put, 0, 1, 1)).toBe(1)
    expect((await xen('freeze', '5')).stdout).toBe('domain 5 is frozen\n')
    expect(await guest.call(put, 0, 1, 2)).toBe(-1000)
    expect((await xen('thaw', 'all')).code).toBe(0)
    expect(await guest.call(put, 0, 1, 2)).toBe(1)
    expect((await xen('set', '5', '--weight', '250', '--compress', 'no')).code).toBe(0)
    const cap = await xen('set', '5', '--cap', '7')
    expect(cap.code).toBe(release === '4.5' ? 0 : 2)
    const { stdout } = await xen('list', '5', '--long')
    expect(stdout).toContain(`C=CI:5,ww:250,${release === '4.5' ? 'ca:7,' : ''}co:0,fr:0,`)
    expect(stdout).toContain('P=CI:5,PI:0,PT:PP,U0:0,U1:0,Pc:2,')
    expect((await xen('shared-auth', '5', '--uuid', '01234567-89ab-cdef-0123-456789abcdef')).code).toBe(0)
    expect((await xen('shared-auth', '5', '--uuid', '0')).stderr).toContain('bad --uuid "0"')
    for (let index = 0; index < 64; index++) {
      // Pages that do not shrink are the most that there is to free.
      guest.page.forEach((_, n) => {
        guest.page[n] = Math.imul(n * 64 + index, 2_654_435_761) >>> 24
      })
      expect(await guest.call(put, 1, 1, index)).toBe(1)
    }
    expect((await xen('freeable')).stdout).toMatch(/^0 MiB can be freed\n$/)
    const freed = JSON.parse((await xen('flush', '64KiB', '--json')).stdout) as { kibibytes: number }
    expect(freed.kibibytes).toBeGreaterThanOrEqual(64)
    expect(await xen('freeze', '77')).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('the domain does not exist'),
    })
    expect(await xen('freeze', 'x')).toMatchObject({ code: 2, stderr: expect.stringContaining('bad domain "x"') })
    // A guest that stores without bound is refused.
    let answer: number | undefined = 1
    for (let index = 100; answer === 1 && index < 200; index++) answer = await guest.call(put, 0, 1, index)
    expect(answer).toBe(-12)
    guest.close()
    expect(await here.stop()).toBe(0)
  },
  60_000,
)

test('a host that cannot be is told in one line', async () => {
  await expect(hosting('--stack', 'zcash(limit=1MiB)')).rejects.toThrow('did you mean zcache?')
  const { code, stderr } = await tmem(['xen', 'list', '--control', '/nowhere/xen.sock'])
  expect(code).toBe(1)
  expect(stderr).toMatch(/^tmem: no host at \/nowhere\/xen.sock .*start one with tmem xen host/)
})
