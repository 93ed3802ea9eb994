/** Structures in words. */
import { expect, test } from 'vitest'
import { describe, parseUuid, type Structure, uuidText } from '../src/index.ts'
import { bytesOf, vectors } from './vectors.ts'

const wordsOf = (name: string): Record<string, string> => {
  const vector = vectors.find((one) => one.name.startsWith(name))!
  const isArm = vector.kind === 'creat' || vector.kind === 'ctrl' || vector.kind === 'gen'
  const as: Structure = isArm ? 'op' : (vector.kind as Structure)
  let bytes = bytesOf(vector)
  // A vector has the body of a sysctl only.
  if (as === 'sysctl') bytes = Uint8Array.from([24, 0, 0, 0, 0xf, 0, 0, 0, ...bytes])
  const { fields } = describe(bytes, { as, release: vector.release, bits: vector.bits })
  return Object.fromEntries(fields.map(({ name: field, words }) => [field, words]))
}

test('every vector has words', () => {
  expect(wordsOf('NEW_POOL')).toMatchObject({
    cmd: 'NEW_POOL',
    uuid: 'fedcba98-7654-3210-0123-456789abcdef',
    flags: 'ephemeral, shared, pages of 4 KiB, version 1',
  })
  expect(wordsOf('RESTORE_NEW')).toMatchObject({ cmd: 'RESTORE_NEW', pool_id: '3', arg1: 'domain 5' })
  expect(wordsOf('PUT_PAGE, all')).toMatchObject({ cmd: 'PUT_PAGE', len: 'ignored', cmfn: 'number of a frame' })
  expect(wordsOf('GET_PAGE')).toMatchObject({ pool_id: '-1: -ENODEV, there are 16 slots', oid: 'object 42' })
  expect(wordsOf('CONTROL: LIST')).toMatchObject({ subop: 'LIST', cli_id: 'all domains' })
  expect(wordsOf('CONTROL: RESTORE_PUT')).toMatchObject({ subop: 'RESTORE_PUT_PAGE', cli_id: 'domain 7' })
  expect(wordsOf('CONTROL of 4.0.0')).toMatchObject({ subop: 'FREEZE', oid: 'object 17' })
  expect(wordsOf('a handle of')).toMatchObject({ pool_id: '1', index: '2', oid: 'object 3' })
  expect(wordsOf('sysctl')).toMatchObject({
    sysctl: 'tmem_op',
    interface_version: 'that of 4.9',
    cmd: 'RESTORE_PUT_PAGE',
    cli_id: 'domain 5',
  })
  expect(wordsOf('client')).toMatchObject({ flags: 'frozen, compress', weight: '250' })
  expect(wordsOf('pool')).toMatchObject({
    n_pages: '8589934592',
    flags: 'persistent, private, pages of 4 KiB, version 1',
  })
})

test('what is wrong is said', () => {
  const op = new Uint8Array(56)
  const view = new DataView(op.buffer)
  view.setUint32(0, 1, true)
  view.setUint32(24, 0x00000117, true)
  expect(describe(op).fields.find(({ name }) => name === 'flags')!.words).toBe(
    'persistent, shared, pages of 8 KiB, version 0; -EPERM: version must be 1, shared and persistent, pages of another size, precompressed, a reserved bit',
  )
  view.setUint32(0, 8, true)
  expect(describe(op).title).toContain('READ: -ENOSYS since 4.4')
  expect(describe(op, { release: '4.2' }).title).toMatch(/: READ$/)
  view.setUint32(0, 101, true)
  expect(describe(op).title).toContain('AUTH: -EOPNOTSUPP since 4.9')
  view.setUint32(0, 99, true)
  expect(describe(op).title).toContain('unknown command 99: -ENOSYS')
  expect(() => describe(op.subarray(0, 51), { bits: 32 })).toThrow('has 52 bytes, and here are 51')
  expect(() => describe(op, { as: 'sysctl' })).toThrow('has 64 bytes, and here are 56')
})

test('uuids as the tools write them', () => {
  const text = '01234567-89ab-cdef-0f1e-2d3c4b5a6978'
  expect(uuidText(parseUuid(text)!)).toBe(text)
  expect(parseUuid(text.replaceAll('-', '').toUpperCase())).toBe(parseUuid(text))
  for (const bad of ['', '0', text.slice(1), `${text}0`, text.replace('-', ''), text.replace('a', 'g')])
    expect(parseUuid(bad)).toBeUndefined()
})
