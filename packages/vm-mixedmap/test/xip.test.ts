import { describe, expect, test } from 'vitest'
import {
  auditMachine,
  auditXip,
  createMachine,
  createSpace,
  createXipFile,
  createXipFilesystem,
  directAccess,
  fileOf,
  frameOf,
  mountXip,
  munmap,
  readPte,
  runSharedImage,
  spaceOf,
  structPageSaving,
  translate,
  unmapZeroPage,
  type XipWorld,
  xipFault,
  xipMmap,
  xipRead,
  xipTruncate,
  xipWrite,
} from '../src/index.ts'

/** Eight frames, four with descriptors; blocks 4 to 6 without; a file of three pages. */
function world(options: { pteSpecial?: boolean; readOnly?: boolean; descriptors?: number } = {}): XipWorld {
  const { pteSpecial = true, readOnly = false, descriptors = 4 } = options
  const machine = createMachine({ memory: { kind: 'flat', frames: descriptors }, frames: 8, pteSpecial })
  const fs = createXipFilesystem(machine, { first: 4, blocks: 3, readOnly })
  createXipFile({ machine, fs }, 3 * 4096)
  return { machine, fs }
}

const content = ({ machine }: XipWorld, space: number, vpn: number): number | null => {
  const pfn = translate(machine, spaceOf(machine, space), vpn, 'read')
  return pfn === null ? null : frameOf(machine, pfn).content
}

const sound = (one: XipWorld): string[] => [...auditXip(one), ...auditMachine(one.machine)]

describe('files', () => {
  test('read and write, holes, the end', () => {
    const one = world()
    const file = fileOf(one.fs, 0)
    expect(xipRead(one, file, 1)).toEqual({ kind: 'read', value: 0 })
    expect(one.fs.freeBlocks).toEqual([4, 5, 6])
    expect(xipWrite(one, file, 1, 42)).toBe('written')
    expect(xipRead(one, file, 1)).toEqual({ kind: 'read', value: 42 })
    expect(file.blocks).toEqual([-1, 4])
    expect(xipRead(one, file, 3)).toEqual({ kind: '-EINVAL' })
    expect(xipWrite(one, file, 4, 1)).toBe('written')
    expect(file.bytes).toBe(5 * 4096)
    expect(xipWrite(one, file, 0, 1)).toBe('written')
    expect(xipWrite(one, file, 2, 1)).toBe('failed')
    expect(sound(one)).toEqual([])
    expect(() => fileOf(one.fs, 1)).toThrow(RangeError)
    expect(() => xipRead(one, file, -1)).toThrow(RangeError)
  })

  test('truncate clears the tail of a block, frees the rest, and unmaps it first', () => {
    const one = world()
    const file = fileOf(one.fs, 0)
    const space = createSpace(one.machine)
    xipMmap(space, file, { first: 0, pages: 3, shared: true, write: true })
    for (const offset of [0, 1, 2]) xipWrite(one, file, offset, offset + 1)
    for (const vpn of [0, 1, 2]) expect(xipFault(one, 0, vpn, 'read')).toBe('mapped')
    for (const frame of one.machine.frames) frame.tail = 9
    xipTruncate(one, file, 4096 + 100)
    expect([frameOf(one.machine, 4).tail, frameOf(one.machine, 5).tail]).toEqual([9, 0])
    expect([content(one, 0, 1), content(one, 0, 2)]).toEqual([2, null])
    expect([file.blocks, one.fs.freeBlocks]).toEqual([[4, 5], [6]])
    expect(xipFault(one, 0, 2, 'read')).toBe('sigbus')
    expect(sound(one)).toEqual([])
    // A hole at the new end has no tail to clear.
    xipTruncate(one, file, 3 * 4096)
    xipTruncate(one, file, 2 * 4096 + 1)
    expect(file.blocks).toEqual([4, 5])
  })
})

describe('faults', () => {
  test.each([true, false])('with pte_special %s', (pteSpecial) => {
    const one = world({ pteSpecial, descriptors: 5 })
    const file = fileOf(one.fs, 0)
    const [shared, reader, cow] = [createSpace(one.machine), createSpace(one.machine), createSpace(one.machine)]
    xipMmap(shared, file, { first: 0, pages: 4, shared: true, write: true })
    xipMmap(reader, file, { first: 0, pages: 4, shared: true })
    xipMmap(cow, file, { first: 0, pages: 4, write: true })
    // Holes: readers see zeros; a store to a private mapping copies them.
    expect(xipFault(one, reader.id, 0, 'read')).toBe('mapped')
    expect(xipFault(one, cow.id, 0, 'read')).toBe('mapped')
    expect(xipFault(one, cow.id, 1, 'write')).toBe('mapped')
    expect(xipFault(one, cow.id, 1, 'write')).toBe('copied')
    expect([content(one, reader.id, 0), content(one, cow.id, 1)]).toEqual([0, 0])
    expect(one.machine.frames[file.zeroPfn]?.page).toMatchObject({ mapcount: 2 })
    expect(sound(one)).toEqual([])
    // A store to a shared mapping fills the hole; nobody sees the zero page any more.
    expect(xipFault(one, shared.id, 0, 'write')).toBe('mapped')
    frameOf(one.machine, file.blocks[0] as number).content = 7
    expect([content(one, reader.id, 0), content(one, cow.id, 0)]).toEqual([null, null])
    expect(xipFault(one, reader.id, 0, 'read')).toBe('mapped')
    expect(xipFault(one, cow.id, 0, 'write')).toBe('mapped')
    expect(xipFault(one, cow.id, 0, 'write')).toBe('copied')
    expect([content(one, reader.id, 0), content(one, cow.id, 0)]).toEqual([7, 7])
    expect(sound(one)).toEqual([])
    // A shared writable mapping fills a hole even when it only reads; that is what 2.6.31 does.
    expect(xipFault(one, shared.id, 2, 'read')).toBe('mapped')
    expect(file.blocks[2]).toBe(5)
    expect(xipFault(one, shared.id, 2, 'write')).toBe('already')
    for (const space of [shared, reader, cow]) munmap(one.machine, space, 0, 4)
    expect(sound(one)).toEqual([])
  })

  test('outside, without permission, beyond the end, no block left', () => {
    const one = world()
    const file = fileOf(one.fs, 0)
    const space = createSpace(one.machine)
    xipMmap(space, file, { first: 0, pages: 4, shared: true })
    expect(xipFault(one, 0, 9, 'read')).toBe('sigsegv')
    expect(xipFault(one, 0, 0, 'write')).toBe('sigsegv')
    expect(xipFault(one, 0, 3, 'read')).toBe('sigbus')
    one.fs.freeBlocks = []
    const writer = createSpace(one.machine)
    xipMmap(writer, file, { first: 0, pages: 4, shared: true, write: true })
    expect(xipFault(one, writer.id, 0, 'write')).toBe('sigbus')
    expect(one.fs.locks.sparse).toBe('')
    expect(sound(one)).toEqual([])
  })

  test('two threads fault at once: the second finds the entry in use and is content', () => {
    const one = world()
    xipMmap(createSpace(one.machine), fileOf(one.fs, 0), { first: 0, pages: 3 })
    expect([xipFault(one, 0, 0, 'read'), xipFault(one, 0, 0, 'read')]).toEqual(['mapped', 'already'])
  })

  test('a read-only file system never fills holes', () => {
    const one = world({ readOnly: true })
    xipMmap(createSpace(one.machine), fileOf(one.fs, 0), { first: 0, pages: 3, shared: true, write: true })
    expect(xipFault(one, 0, 0, 'read')).toBe('mapped')
    expect(one.fs.freeBlocks).toHaveLength(3)
    expect(xipWrite(one, fileOf(one.fs, 0), 0, 1)).toBe('failed')
  })

  test('a dirty zero page is a broken rule', () => {
    const one = world()
    const space = createSpace(one.machine)
    xipMmap(space, fileOf(one.fs, 0), { first: 0, pages: 3 })
    xipFault(one, 0, 0, 'read')
    readPte(one.machine, space, 0)!.dirty = true
    expect(() => unmapZeroPage(one, fileOf(one.fs, 0), 0)).toThrow(/dirty/)
  })
})

describe('devices', () => {
  test('direct_access', () => {
    const device = { directAccess: 'supported', firstPfn: 4, sectors: 20 } as const
    expect(directAccess(device, 8)).toEqual({ kind: 'frame', pfn: 5 })
    expect(directAccess(device, 9)).toEqual({ kind: '-EINVAL' })
    expect(directAccess(device, 16)).toEqual({ kind: '-ERANGE' })
    expect(directAccess(null, 0)).toEqual({ kind: '-ENODEV' })
    expect(directAccess({ ...device, directAccess: 'missing' }, 0)).toEqual({ kind: '-ENODEV' })
    expect(mountXip(device)).toEqual({ kind: 'xip' })
    expect(mountXip({ ...device, directAccess: 'missing' })).toMatchObject({ kind: 'without-xip' })
  })
})

describe('what descriptors cost', () => {
  test('100 guests that share one image of 1 GiB', () => {
    const saving = structPageSaving({ guests: 100, imageBytes: 2 ** 30 })
    expect(saving).toEqual({
      imagePages: 262_144,
      descriptors: 26_214_400,
      bytes: 1_468_006_400,
      ofImage: 1.3671875,
      breakEvenGuests: 74,
    })
    expect(structPageSaving({ guests: 100, imageBytes: 2 ** 30, descriptorBytes: 64 }).ofImage).toBe(1.5625)
    expect(structPageSaving({ guests: 73, imageBytes: 4096 }).ofImage).toBeLessThan(1)
    expect(structPageSaving({ guests: 74, imageBytes: 1 }).ofImage).toBeGreaterThanOrEqual(1)
    expect(() => structPageSaving({ guests: 0, imageBytes: 1 })).toThrow(RangeError)
  })

  test('the same in a running model: every guest reads the whole image, with and without', () => {
    const options = { guests: 100, imagePages: 16 }
    expect(runSharedImage({ ...options, descriptors: 'for-the-image-too' })).toEqual({
      imageDescriptors: 1600,
      ownDescriptors: 400,
      pagesRead: 1600,
    })
    expect(runSharedImage({ ...options, descriptors: 'only-for-own-memory' })).toEqual({
      imageDescriptors: 0,
      ownDescriptors: 400,
      pagesRead: 1600,
    })
    expect(() => runSharedImage({ guests: 1, imagePages: 513, descriptors: 'for-the-image-too' })).toThrow(RangeError)
  })
})
