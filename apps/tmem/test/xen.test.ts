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

test('decode refuses what is none', async () => {
  const folder = temporaryDirectory()
  const short = await tmem(['xen', 'decode', '0400'])
  expect(short).toMatchObject({ code: 2, stdout: '' })
  expect(short.stderr).toBe('tmem: xen decode: a tmem_op of 4.9 and guests of 64 bits has 56 bytes, and here are 2\n')
  const missing = await tmem(['xen', 'decode', join(folder, 'none')])
  expect(missing.code).toBe(2)
  expect(missing.stderr).toContain('is neither hex nor a file that can be read')
  const large = join(folder, 'large')
  writeFileSync(large, Buffer.alloc(70_000))
  expect((await tmem(['xen', 'decode', large])).stderr).toContain('has 70000 bytes, more than 65536')
  const unknown = await tmem(['xen', 'decode', '00', '--release', '4.13'])
  expect(unknown.code).toBe(2)
  expect(unknown.stderr).toMatch(/^tmem: --release: there is no 4\.13; did you mean 4\.\d+\? /)
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
  // Counted, not timed: each notification carries 512 pages.
  expect(virtio['exits-per-512-pages']).toBeLessThanOrEqual(1)
}, 120_000)
