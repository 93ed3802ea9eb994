/** Whose rule of copy-on-write a machine keeps, and huge entries without descriptors. */
import { describe, expect, test } from 'vitest'
import {
  type AddressSpace,
  auditMachine,
  type CowKernel,
  createMachine,
  createSpace,
  enterSwapCache,
  fault,
  findVma,
  fork,
  frameOf,
  getUserPages,
  getUserPagesFast,
  getUserPagesFastOnly,
  gupSlowProgram,
  leaveSwapCache,
  type Machine,
  mmap,
  munmap,
  pageOf,
  putUserPages,
  readPte,
  runProgram,
  slowGupRegisters,
  takePage,
  translate,
  vmInsertHugePfn,
  vmNormalHugePage,
  writeProtectFault,
} from '../src/index.ts'

const KERNELS: readonly CowKernel[] = ['2.6.31', '5.9', '5.19']
const READ = { space: 0, vpn: 0, pages: 1, access: 'read' } as const
const WRITE = { ...READ, access: 'write' } as const

/** A process with one private page, written to. */
function process(kernel: CowKernel, frames = 4): { machine: Machine; parent: AddressSpace } {
  const machine = createMachine({ memory: { kind: 'flat', frames }, frames, pteSpecial: true, kernel })
  const parent = createSpace(machine)
  mmap(parent, { first: 0, pages: 1, write: true, backing: { kind: 'anonymous' } })
  fault(machine, parent, 0, 'write')
  return { machine, parent }
}

function protect(machine: Machine, space: AddressSpace): void {
  const pte = readPte(machine, space, 0)
  if (pte !== null) pte.writable = false
}

const store = (machine: Machine, space: AddressSpace) => writeProtectFault(machine, space, findVma(space, 0)!, 0)

describe('a store to a read-only private page', () => {
  test.each(KERNELS)('%s: of a process alone, in place', (kernel) => {
    const { machine, parent } = process(kernel)
    protect(machine, parent)
    expect(store(machine, parent)).toBe('reused')
    expect(auditMachine(machine)).toEqual([])
  })

  test.each([
    ['2.6.31', 'reused'],
    ['5.9', 'copied'],
    ['5.19', 'reused'],
  ] as const)('%s: pinned: %s', (kernel, outcome) => {
    const { machine, parent } = process(kernel)
    expect(getUserPages(machine, READ)).toEqual({ kind: 'pages', pfns: [0] })
    protect(machine, parent)
    expect(store(machine, parent)).toBe(outcome)
    putUserPages(machine, [0])
    expect(auditMachine(machine)).toEqual([])
  })

  test.each(KERNELS)('%s: the other mapper is gone, but has kept a pin', (kernel) => {
    const { machine, parent } = process(kernel)
    fork(machine, parent)
    const pinned = getUserPages(machine, { ...READ, space: 1 })
    munmap(machine, machine.spaces[1]!, 0, 1)
    expect(store(machine, parent)).toBe(kernel === '5.9' ? 'copied' : 'reused')
    const seen = pinned.kind === 'pages' ? pinned.pfns[0] : -1
    // The leak of CVE-2020-29374: only the first rule lets the pin see what the parent writes now.
    expect(seen === translate(machine, parent, 0, 'write')).toBe(kernel === '2.6.31')
  })

  test.each([
    ['2.6.31', 0, false, 'reused', false],
    ['2.6.31', 0, true, 'reused', true],
    ['2.6.31', 1, false, 'copied', true],
    ['5.9', 0, false, 'copied', true],
    ['5.19', 0, false, 'reused', false],
    ['5.19', 0, true, 'copied', true],
    ['5.19', 1, false, 'copied', true],
  ] as const)(
    '%s: in the swap cache with %i swap entries, writeback %s',
    (kernel, slots, writeback, outcome, stays) => {
      const { machine, parent } = process(kernel)
      protect(machine, parent)
      enterSwapCache(machine, 0, slots)
      const page = pageOf(machine, 0)
      page.exclusive = false // as after a page came back from swap
      page.swap!.writeback = writeback
      expect(store(machine, parent)).toBe(outcome)
      expect(page.swap !== null).toBe(stays)
      if (stays) leaveSwapCache(machine, 0)
      expect(auditMachine(machine)).toEqual([])
    },
  )

  test('the swap cache holds a page once', () => {
    const { machine } = process('2.6.31')
    enterSwapCache(machine, 0)
    expect(() => enterSwapCache(machine, 0)).toThrow(/already/)
    expect(leaveSwapCache(machine, 0)).toBe('still-used')
    expect(() => leaveSwapCache(machine, 0)).toThrow(/not in the swap cache/)
  })
})

describe('fork of a pinned page', () => {
  test.each(KERNELS)('%s', (kernel) => {
    const { machine, parent } = process(kernel)
    frameOf(machine, 0).content = 7
    getUserPages(machine, WRITE)
    fork(machine, parent)
    const child = translate(machine, machine.spaces[1]!, 0, 'read')!
    expect(child === 0).toBe(kernel === '2.6.31')
    expect(frameOf(machine, child).content).toBe(7)
    // The parent writes where the device does, unless the page was shared.
    if (translate(machine, parent, 0, 'write') === null) store(machine, parent)
    expect(translate(machine, parent, 0, 'write') === 0).toBe(kernel !== '2.6.31')
    putUserPages(machine, [0])
    expect(auditMachine(machine)).toEqual([])
  })

  test('without a page for the copy nothing is left behind', () => {
    const { machine, parent } = process('5.9', 1)
    getUserPages(machine, WRITE)
    expect(fork(machine, parent)).toEqual({ kind: '-ENOMEM' })
    expect(translate(machine, parent, 0, 'write')).toBe(0)
    putUserPages(machine, [0])
    expect(auditMachine(machine)).toEqual([])
  })
})

test('5.19: a pin for reading makes a shared page exclusive first; the fast path leaves that to the slow one', () => {
  for (const form of ['speculative', 'flush-interrupt'] as const) {
    const { machine, parent } = process('5.19')
    fork(machine, parent)
    expect(getUserPagesFastOnly(machine, form, READ)).toEqual([])
    const got = getUserPagesFast(machine, form, READ)
    expect(got).toEqual({ kind: 'pages', pfns: [1] })
    expect(store(machine, parent)).toBe('reused')
    expect(getUserPagesFastOnly(machine, form, READ)).toEqual([1])
    putUserPages(machine, [1, 1])
    expect(auditMachine(machine)).toEqual([])
  }
})

test('a special huge entry has no page for anybody, and is counted by nobody', () => {
  const options = { memory: { kind: 'flat', frames: 2 }, frames: 1024, pteSpecial: true } as const
  const machine = createMachine({ ...options, memory: { ...options.memory }, hugeSpecial: true })
  const space = createSpace(machine)
  const area = mmap(space, {
    first: 0,
    pages: 1024,
    write: true,
    shared: true,
    pfnMap: true,
    backing: { kind: 'device' },
  })
  expect(vmInsertHugePfn(machine, space, area, 512, 512)).toBe('inserted')
  expect(vmInsertHugePfn(machine, space, area, 512, 512)).toBe('-EBUSY')
  expect(vmInsertHugePfn(machine, space, area, 1024, 512)).toBe('-EFAULT')
  expect(() => vmInsertHugePfn(machine, space, area, 1, 512)).toThrow(/aligned/)
  const entry = space.directory[1]!
  expect(entry.kind === 'huge' && vmNormalHugePage(machine, area, entry)).toEqual({ kind: 'none', why: 'special' })
  expect(translate(machine, space, 515, 'write')).toBe(515)
  const request = { space: 0, vpn: 515, pages: 1, access: 'write' } as const
  for (const form of ['speculative', 'flush-interrupt'] as const) {
    expect(getUserPagesFastOnly(machine, form, request)).toEqual([])
    expect(getUserPagesFast(machine, form, request)).toEqual({ kind: '-EFAULT' })
  }
  fork(machine, space)
  expect(auditMachine(machine)).toEqual([])
  munmap(machine, space, 0, 1024)
  expect(auditMachine(machine)).toEqual([])

  area.pfnMap = false
  expect(() => vmInsertHugePfn(machine, space, area, 0, 0)).toThrow(/PFNMAP/)
  const older = createMachine({ ...options, memory: { ...options.memory } })
  expect(() => vmInsertHugePfn(older, createSpace(older), area, 0, 0)).toThrow(/no special bit/)
  expect(() => createMachine({ ...options, pteSpecial: false, hugeSpecial: true })).toThrow(/needs pteSpecial/)
})

describe('a private file mapping', () => {
  /** Page 0 of the file is frame 3 and holds 7; the area has two pages, the file one. */
  function mapped(flags: { write: boolean; shared?: boolean; mayWrite?: boolean }) {
    const machine = createMachine({ memory: { kind: 'flat', frames: 4 }, frames: 4, pteSpecial: true })
    takePage(machine, 3, 'file')
    frameOf(machine, 3).content = 7
    const space = createSpace(machine)
    const vma = mmap(space, { first: 0, pages: 2, backing: { kind: 'file', pages: [3] }, ...flags })
    return { machine, space, vma }
  }

  test('shows the page cache until the first store, which copies', () => {
    const { machine, space } = mapped({ write: true })
    expect(fault(machine, space, 0, 'read')).toBe('mapped')
    expect([translate(machine, space, 0, 'read'), translate(machine, space, 0, 'write')]).toEqual([3, null])
    expect(fault(machine, space, 0, 'write')).toBe('copied')
    expect(frameOf(machine, translate(machine, space, 0, 'write')!).content).toBe(7)
    expect(fault(machine, space, 1, 'read')).toBe('sigbus')
    expect(auditMachine(machine)).toEqual([])
    munmap(machine, space, 0, 2)
    expect(pageOf(machine, 3).count).toBe(1)
    expect(fault(machine, space, 0, 'write')).toBe('sigsegv')
    expect(auditMachine(machine)).toEqual([])
  })

  test('a store to a page that is not there copies at once, a shared one does not', () => {
    const own = mapped({ write: true })
    expect(fault(own.machine, own.space, 0, 'write')).toBe('mapped')
    expect(translate(own.machine, own.space, 0, 'write')).toBe(0)
    const shared = mapped({ write: true, shared: true })
    expect(fault(shared.machine, shared.space, 0, 'write')).toBe('mapped')
    expect(translate(shared.machine, shared.space, 0, 'write')).toBe(3)
    expect([auditMachine(own.machine), auditMachine(shared.machine)]).toEqual([[], []])
  })

  test.each(['remembers-the-copy', 'forgets-the-write'] as const)(
    'a forced store to a read-only area gets a copy if nobody interferes: %s',
    (forced) => {
      const { machine, space } = mapped({ write: false, mayWrite: true })
      const request = { space: 0, vpn: 0, access: 'write' } as const
      const got = runProgram(gupSlowProgram(request, forced), { machine }, slowGupRegisters())
      expect(got).toMatchObject({ result: 'page', pfn: 0 })
      expect(translate(machine, space, 0, 'write')).toBe(null)
      putUserPages(machine, [0])
      expect(auditMachine(machine)).toEqual([])
      for (const vpn of [1, 2]) {
        const none = runProgram(gupSlowProgram({ ...request, vpn }, forced), { machine }, slowGupRegisters())
        expect(none.result).toBe('-EFAULT')
      }
    },
  )

  test('a shared read-only area cannot be forced', () => {
    const { machine } = mapped({ write: false, shared: true })
    const got = runProgram(gupSlowProgram({ space: 0, vpn: 0, access: 'write' }), { machine }, slowGupRegisters())
    expect(got.result).toBe('-EFAULT')
  })
})
