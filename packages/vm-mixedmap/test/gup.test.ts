import { describe, expect, test } from 'vitest'
import {
  type AddressSpace,
  auditMachine,
  createMachine,
  createSpace,
  exitSpace,
  fault,
  type GupForm,
  type GupRequest,
  getUserPages,
  getUserPagesFast,
  getUserPagesFastOnly,
  type Machine,
  mapHuge,
  mmap,
  munmap,
  pageOf,
  putUserPages,
  takeHugePage,
  USER_PAGES,
  vmInsertMixed,
} from '../src/index.ts'

/** One space: anonymous pages 8 to 11 (8 and 9 present, 9 read-only by fork), special page 16. */
function setUp(): { machine: Machine; space: AddressSpace } {
  const machine = createMachine({ memory: { kind: 'flat', frames: 8 }, frames: 10, pteSpecial: true })
  const space = createSpace(machine)
  mmap(space, { first: 8, pages: 4, backing: { kind: 'anonymous' }, write: true })
  const raw = mmap(space, { first: 16, pages: 1, backing: { kind: 'device' }, mixedMap: true })
  vmInsertMixed(machine, space, raw, 16, 9)
  fault(machine, space, 8, 'write')
  fault(machine, space, 9, 'write')
  return { machine, space }
}

const request = (vpn: number, pages: number, access: 'read' | 'write' = 'read'): GupRequest => ({
  space: 0,
  vpn,
  pages,
  access,
})

describe.each<GupForm>(['flush-interrupt', 'speculative'])('%s', (form) => {
  test('gives what the slow path gives, or nothing', () => {
    for (const [vpn, pages, access] of [
      [8, 1, 'read'],
      [8, 2, 'write'],
      [8, 4, 'write'],
      [7, 1, 'read'],
      [7, 3, 'read'],
      [16, 1, 'read'],
      [10, 8, 'read'],
    ] as const) {
      const [slow, fast, only] = [setUp(), setUp(), setUp()]
      const expected = getUserPages(slow.machine, request(vpn, pages, access))
      expect(getUserPagesFast(fast.machine, form, request(vpn, pages, access))).toEqual(expected)
      const some = getUserPagesFastOnly(only.machine, form, request(vpn, pages, access))
      expect(expected.kind === 'pages' ? expected.pfns.slice(0, some.length) : []).toEqual(some)
      for (const { machine } of [slow, fast, only]) expect(auditMachine(machine)).toEqual([])
    }
  })

  test('a special entry goes the slow way, which fails', () => {
    const { machine } = setUp()
    expect(getUserPagesFast(machine, form, request(16, 1))).toEqual({ kind: '-EFAULT' })
    expect(getUserPagesFastOnly(machine, form, request(16, 1))).toEqual([])
  })

  test('pages of the fast path are kept when the slow path fails', () => {
    const { machine, space } = setUp()
    munmap(machine, space, 10, 2)
    expect(getUserPagesFast(machine, form, request(8, 4))).toEqual({ kind: 'pages', pfns: [0, 1] })
    expect(getUserPagesFastOnly(machine, form, request(8, 4))).toEqual([0, 1])
    expect(pageOf(machine, 0)).toMatchObject({ count: 3, pins: 2, mapcount: 1 })
    putUserPages(machine, [0, 1, 0, 1])
    expect(auditMachine(machine)).toEqual([])
  })

  test('a pinned page survives its process', () => {
    const { machine, space } = setUp()
    expect(getUserPagesFast(machine, form, request(8, 1))).toEqual({ kind: 'pages', pfns: [0] })
    exitSpace(machine, space)
    expect(pageOf(machine, 0)).toMatchObject({ count: 1, pins: 1, use: 'anonymous' })
    putUserPages(machine, [0])
    expect(pageOf(machine, 0).use).toBe('free')
    expect(() => putUserPages(machine, [0])).toThrow(/does not have/)
  })

  test('addresses that are not of user pages never start the fast path', () => {
    const { machine } = setUp()
    for (const [vpn, pages] of [
      [USER_PAGES - 1, 2],
      [-1, 1],
      [Number.MAX_SAFE_INTEGER, 2],
    ] as const) {
      expect(getUserPagesFast(machine, form, request(vpn, pages))).toEqual({ kind: '-EFAULT' })
      expect(getUserPagesFastOnly(machine, form, request(vpn, pages))).toEqual([])
    }
    expect(() => getUserPagesFast(machine, form, request(8, 0))).toThrow(RangeError)
  })

  test('a huge entry: all references on the head, then on to small entries', () => {
    const machine = createMachine({ memory: { kind: 'flat', frames: 1024 }, frames: 1024, pteSpecial: true })
    takeHugePage(machine, 512, 'file')
    const space = createSpace(machine)
    const vma = mmap(space, { first: 512, pages: 512, backing: { kind: 'device' }, shared: true })
    mapHuge(machine, space, vma, 512, 512)
    mmap(space, { first: 1024, pages: 1, backing: { kind: 'anonymous' } })
    fault(machine, space, 1024, 'read')
    expect(getUserPagesFast(machine, form, request(1021, 4))).toEqual({ kind: 'pages', pfns: [1021, 1022, 1023, 0] })
    expect([pageOf(machine, 512).pins, pageOf(machine, 1022).pins, pageOf(machine, 0).pins]).toEqual([3, 0, 1])
    expect(getUserPagesFastOnly(machine, form, request(1000, 2, 'write'))).toEqual([])
    putUserPages(machine, [1021, 1022, 1023, 0])
    expect(auditMachine(machine)).toEqual([])
  })
})

test('without pte_special there is no fast path', () => {
  const machine = createMachine({ memory: { kind: 'flat', frames: 1 }, frames: 1, pteSpecial: false })
  createSpace(machine)
  expect(() => getUserPagesFast(machine, 'speculative', request(0, 1))).toThrow(/no fast path/)
  expect(getUserPages(machine, request(0, 1))).toEqual({ kind: '-EFAULT' })
})

test('the slow path faults what is missing, and says -EFAULT when it cannot', () => {
  const { machine } = setUp()
  expect(getUserPages(machine, request(8, 4, 'write'))).toMatchObject({ kind: 'pages', pfns: [0, 1, 2, 3] })
  expect(getUserPages(machine, request(16, 1, 'write'))).toEqual({ kind: '-EFAULT' })
  for (let i = 0; i < 4; i++) {
    const more = createSpace(machine)
    mmap(more, { first: 0, pages: 1, backing: { kind: 'anonymous' }, write: true })
    fault(machine, more, 0, 'write')
  }
  expect(machine.frames.filter(({ page }) => page?.use === 'free')).toEqual([])
  const last = createSpace(machine)
  mmap(last, { first: 0, pages: 1, backing: { kind: 'anonymous' }, write: true })
  expect(getUserPages(machine, { space: last.id, vpn: 0, pages: 1, access: 'write' })).toEqual({ kind: '-EFAULT' })
})
