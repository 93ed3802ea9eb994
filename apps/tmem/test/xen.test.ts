/** `tmem xen decode`, and the benches of the interface and of the channel, as a user runs them. */
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { defaultRelease, releases } from '@tmem/xen-hypercall'
import { expect, test } from 'vitest'
import { temporaryDirectory, tmem } from './tmem.ts'

/** PUT_PAGE into pool 3: object 42, index 7, frame 9. */
const put = `04000000 03000000 2a00000000000000 ${'00'.repeat(16)} 07000000 ${'00'.repeat(12)} 0900000000000000`

test('decode says what a structure is, from words, from hex in a file, and from raw bytes', async () => {
  const folder = temporaryDirectory()
  const hex = join(folder, 'put.hex')
  const raw = join(folder, 'put.bin')
  writeFileSync(hex, `${put}\n`)
  writeFileSync(raw, Buffer.from(put.replaceAll(' ', ''), 'hex'))
  const answers = await Promise.all([put.split(' '), [hex], [raw]].map((words) => tmem(['xen', 'decode', ...words])))
  for (const { code, stdout, stderr } of answers) {
    expect([code, stderr]).toEqual([0, ''])
    expect(stdout).toBe(answers[0]!.stdout)
    expect(stdout).toContain('tmem_op of 4.9, guests of 64 bits: PUT_PAGE\n')
    expect(stdout).toMatch(/ 8 {2}oid .* object 42\n/)
    expect(stdout).toMatch(/32 {2}index .* 7\n/)
  }
  const { stdout } = await tmem(['xen', 'decode', '--json', '--release', '4.2', raw])
  expect(JSON.parse(stdout)).toMatchObject({
    title: 'tmem_op of 4.2, guests of 64 bits: PUT_PAGE',
    bytes: 56,
    fields: [
      { name: 'cmd', at: 0, value: '0x4', words: 'PUT_PAGE' },
      { name: 'pool_id', at: 4, value: '0x3', words: '3' },
      { name: 'oid', at: 8, value: '0x2a 0x0 0x0', words: 'object 42' },
      { name: 'index' },
      { name: 'tmem_offset' },
      { name: 'pfn_offset' },
      { name: 'len' },
      { name: 'cmfn', at: 48, value: '0x9', words: 'number of a frame' },
    ],
  })
})

test('decode says what a stream has, from words and from files of any size; as JSON when it is whole', async () => {
  const folder = temporaryDirectory()
  // Of 4.9: a client with a persistent pool of 40 pages of one object.
  const word = (...values: number[]): Buffer => Buffer.from(Uint32Array.from(values).buffer)
  const pages = Array.from({ length: 40 }, (_, n) =>
    Buffer.concat([word(5, 0, 0, 0, 0, 0, n), Buffer.alloc(4096, n + 1)]),
  )
  const none = 0xffffffff
  const head = word(0xfffffffb, 1, 16, 1, 1, 250, none, 0x01000001, 0, 40, 0, 0, 0, 0, 0)
  const stream = Buffer.concat([head, ...pages, word(none, 0xfffffffa, 0, 5, 0, 0, 0, 0, 0, 3, none)])
  const file = join(folder, 'saved')
  writeFileSync(file, stream)
  const { code, stdout, stderr } = await tmem(['xen', 'decode', '--json', file])
  expect([code, stderr]).toEqual([0, ''])
  const told = JSON.parse(stdout) as { title: string; bytes: number; pages: number; records: object[] }
  expect(told).toMatchObject({ title: 'saved stream', bytes: stream.length, pages: 40 })
  expect(told.records.length).toBe(46)
  expect(told.records[0]).toEqual({
    name: 'head',
    at: 0,
    bytes: 28,
    words: 'Xen 4.8 and later: version 1, 1 of up to 16 pools; client: frozen, weight 250',
  })
  expect(told.records[2]).toEqual({ name: 'page', at: 60, bytes: 4124, words: 'pool 0, object 5, index 0' })
  const inWords = await tmem(['xen', 'decode', '--json', '--as', 'stream', head.toString('hex')])
  expect([inWords.code, inWords.stdout]).toEqual([2, ''])
  expect(inWords.stderr).toBe('tmem: xen decode: the saved stream ends in page 1 of 40 of pool 0 (byte 60)\n')
  // What is whole is told before the mistake.
  writeFileSync(file, stream.subarray(0, 60 + 2 * 4124 + 7))
  const cut = await tmem(['xen', 'decode', file])
  expect(cut.code).toBe(2)
  expect(cut.stdout.match(/ page +pool 0, object 5, index/g)?.length).toBe(2)
  expect(cut.stderr).toContain('ends in page 3 of 40 of pool 0')
  const old = await tmem(['xen', 'decode', '--release', '4.5', file])
  expect(old).toMatchObject({ code: 2, stderr: expect.stringContaining('is of Xen 4.8 or later, not of 4.5') })
})

test('decode refuses what is none', async () => {
  const folder = temporaryDirectory()
  const short = await tmem(['xen', 'decode', '0400'])
  expect(short).toMatchObject({ code: 2, stdout: '' })
  expect(short.stderr).toBe('tmem: xen decode: a tmem_op of 4.9 and guests of 64 bits has 56 bytes, and here are 2\n')
  const missing = await tmem(['xen', 'decode', join(folder, 'none')])
  expect(missing.code).toBe(2)
  expect(missing.stderr).toContain('is neither hex nor a readable file')
  const large = join(folder, 'large')
  writeFileSync(large, Buffer.alloc(70_000))
  expect((await tmem(['xen', 'decode', large])).stderr).toContain(
    'has 70000 bytes, more than 65536, and does not begin like a stream',
  )
  const unknown = await tmem(['xen', 'decode', '00', '--release', '4.13'])
  expect(unknown.code).toBe(2)
  expect(unknown.stderr).toMatch(/^tmem: --release: unknown release 4\.13; did you mean 4\.\d+\? /)
  const { stdout: help } = await tmem(['xen', 'host', '--help'])
  expect(help.replaceAll(/\s+/g, ' ')).toContain(`4.0 to ${releases.at(-1)} (default: ${defaultRelease})`)
})

test('the benches measure each row', async () => {
  const rows = async (suite: string): Promise<Record<string, number>> => {
    const { code, stdout } = await tmem(['bench', suite, '--quick', '--json'])
    expect(code).toBe(0)
    const { rows } = JSON.parse(stdout) as { rows: { name: string; value: number }[] }
    return Object.fromEntries(rows.map(({ name, value }) => [name, value]))
  }
  const xen = await rows('xen')
  expect(Object.keys(xen)).toEqual([
    'hypercall-put-memory',
    'hypercall-get-memory',
    'hypercall-put-zcache',
    'hypercall-get-zcache',
    'list-1000-domains',
  ])
  const virtio = await rows('virtio')
  expect(Object.keys(virtio)).toEqual([
    'put-512-per-exit',
    'get-512-per-exit',
    'put-1-per-exit',
    'get-1-per-exit',
    'exits-per-512-pages',
  ])
  expect([...Object.values(xen), ...Object.values(virtio)].every((value) => value > 0)).toBe(true)
  // Counted, not timed: 512 pages are one notification, and one interrupt, at most; fewer where both sides look in
  // time.
  expect(virtio['exits-per-512-pages']).toBeLessThanOrEqual(2)
}, 120_000)
