import { describe, expect, test } from 'vitest'
import {
  type AddressSpace,
  allocatePage,
  attachSegment,
  auditMachine,
  createMachine,
  createSpace,
  detachSegment,
  directoryEntry,
  exitSpace,
  fault,
  findVma,
  fork,
  frameOf,
  getPage,
  getPageUnlessZero,
  highestPfn,
  type Machine,
  type MemoryModel,
  mapHuge,
  mmap,
  mprotect,
  mremap,
  munmap,
  normalPfn,
  type Pte,
  pageOf,
  pfnValid,
  putPage,
  RuleViolation,
  readPte,
  readTable,
  remapPfnRange,
  setPte,
  takeHugePage,
  takePage,
  translate,
  type VmaFlags,
  vmInsertMixed,
  vmInsertPage,
  vmInsertPfn,
  vmNormalPage,
  writeProtectFault,
  zapRange,
} from '../src/index.ts'

const flat = (frames: number): MemoryModel => ({ kind: 'flat', frames })
/** Six frames, the first four with descriptors. */
const machineWith = (pteSpecial: boolean, memory = flat(4), frames = 6): Machine =>
  createMachine({ memory, frames, pteSpecial })
const pte = (pfn: number, special = false): Pte => ({ pfn, special, writable: false, dirty: false })
const device = { kind: 'device' } as const
const anonymous = { kind: 'anonymous' } as const

/** What a rule violation names, or "" if nothing was thrown. */
function ruleOf(action: () => unknown): string {
  try {
    action()
  } catch (error) {
    if (error instanceof RuleViolation) return error.rule
    throw error
  }
  return ''
}

function area(machine: Machine, flags: Partial<VmaFlags>, pages = 4, pgoff = 0) {
  const space = createSpace(machine)
  return { space, vma: mmap(space, { first: 8, pages, pgoff, backing: device, ...flags }) }
}

describe('memory models', () => {
  test('pfn_valid', () => {
    const sparse: MemoryModel = { kind: 'sparse', sectionFrames: 2, present: [true, false, true] }
    const extents: MemoryModel = { kind: 'extents', extents: [{ first: 1, frames: 2 }] }
    const valid = (memory: MemoryModel) => [0, 1, 2, 3, 4, 5, 6].map((pfn) => pfnValid(memory, pfn, 'may-sleep'))
    expect(valid(flat(2))).toEqual([true, true, false, false, false, false, false])
    expect(valid(sparse)).toEqual([true, true, false, false, true, true, false])
    expect(valid(extents)).toEqual([false, true, true, false, false, false, false])
    expect([flat(2), sparse, extents, flat(0)].map(highestPfn)).toEqual([1, 5, 2, -1])
    expect(pfnValid(flat(2), -1, 'atomic')).toBe(false)
  })

  test('a list under a mutex cannot be asked under a spinlock', () => {
    const extents: MemoryModel = { kind: 'extents', extents: [] }
    expect(ruleOf(() => pfnValid(extents, 0, 'atomic'))).toBe('pfn-valid-sleeps')
    // With pte_special nobody has to ask; without it every vm_normal_page of a mixed area would.
    const { vma } = area(machineWith(true), { mixedMap: true })
    expect(vmNormalPage(machineWith(true, extents), vma, 8, pte(5, true)).kind).toBe('none')
    expect(ruleOf(() => vmNormalPage(machineWith(false, extents), vma, 8, pte(5)))).toBe('pfn-valid-sleeps')
  })

  test('segments come and go; not while they are referenced', () => {
    const machine = machineWith(true, { kind: 'extents', extents: [{ first: 0, frames: 2 }] })
    attachSegment(machine, 4, 2)
    takePage(machine, 4, 'file')
    expect(ruleOf(() => detachSegment(machine, 4))).toBe('use-after-free')
    putPage(machine, 4, 'owner')
    detachSegment(machine, 4)
    expect(frameOf(machine, 4).page).toBeNull()
    expect(() => detachSegment(machine, 4)).toThrow(RangeError)
    expect(() => attachSegment(machine, 5, 2)).toThrow(/no frame 6/)
    expect(() => attachSegment(machineWith(true), 4, 1)).toThrow(/has no segments/)
    expect(() => createMachine({ memory: flat(7), frames: 6, pteSpecial: true })).toThrow(/beyond the last one/)
  })
})

describe('references', () => {
  test('double release, release of what is not held, use of what is free', () => {
    const machine = machineWith(true)
    const allocated = allocatePage(machine, 'file')
    expect(allocated).toEqual({ kind: 'page', pfn: 0 })
    expect(ruleOf(() => putPage(machine, 0, 'pin'))).toBe('reference-underflow')
    getPage(machine, 0, 'pin')
    expect(putPage(machine, 0, 'owner')).toBe('still-used')
    expect(putPage(machine, 0, 'pin')).toBe('freed')
    expect(ruleOf(() => putPage(machine, 0, 'pin'))).toBe('reference-underflow')
    expect(ruleOf(() => getPage(machine, 0, 'pin'))).toBe('use-after-free')
    expect(getPageUnlessZero(machine, 0, 'pin')).toBe('free')
    expect(auditMachine(machine)).toEqual([])
  })

  test('a frame beyond the last descriptor, and beyond the last frame', () => {
    const machine = machineWith(true)
    expect(ruleOf(() => getPage(machine, 4, 'pin'))).toBe('no-descriptor')
    expect(() => frameOf(machine, 6)).toThrow(/the last one is 5/)
    expect(() => takePage(machine, 6, 'file')).toThrow(RuleViolation)
    takePage(machine, 1, 'file')
    expect(() => takePage(machine, 1, 'file')).toThrow(/in use/)
  })

  test('a page cannot be freed while an entry maps it', () => {
    const machine = machineWith(true)
    takePage(machine, 0, 'file')
    getPage(machine, 0, 'mapping')
    pageOf(machine, 0).count = 1 // a lost reference
    expect(ruleOf(() => putPage(machine, 0, 'owner'))).toBe('freed-while-mapped')
  })
})

describe('vm_normal_page', () => {
  const shared = { shared: true }
  const cow = { mayWrite: true }
  test.each([
    // with pte_special
    [true, {}, pte(1), 'page'],
    [true, { pfnMap: true }, pte(1), 'page'],
    [true, { mixedMap: true }, pte(1), 'page'],
    [true, {}, pte(5), 'beyond-last-descriptor'],
    [true, { pfnMap: true }, pte(1, true), 'special'],
    [true, { mixedMap: true }, pte(1, true), 'special'],
    [true, { mixedMap: true }, pte(5, true), 'special'],
    [true, {}, pte(1, true), 'special-in-ordinary-area'],
    // without
    [false, { mixedMap: true }, pte(5), 'mixed-without-descriptor'],
    [false, { mixedMap: true }, pte(1), 'page'],
    [false, { pfnMap: true, ...cow }, pte(2), 'linear-frame'],
    [false, { pfnMap: true, ...cow }, pte(1), 'page'],
    [false, { pfnMap: true, ...cow }, pte(5), 'beyond-last-descriptor'],
    [false, { pfnMap: true, ...shared }, pte(1), 'raw-frame'],
    [false, { pfnMap: true, ...shared }, pte(5), 'raw-frame'],
    [false, {}, pte(1), 'page'],
    [false, {}, pte(5), 'beyond-last-descriptor'],
    // MIXEDMAP is asked before PFNMAP: frame 2 is where the linear rule expects it, and still a page.
    [false, { mixedMap: true, pfnMap: true, ...cow }, pte(2), 'page'],
  ] as const)('pte_special %s, area %o, entry %o: %s', (pteSpecial, flags, entry, expected) => {
    const machine = machineWith(pteSpecial)
    const { vma } = area(machine, flags, 4, 2)
    const normal = vmNormalPage(machine, vma, 8, entry)
    expect(normal.kind === 'page' ? 'page' : normal.why).toBe(expected)
  })

  test('a bad entry is reported once, by who acts on it', () => {
    const machine = machineWith(true)
    const { vma } = area(machine, {})
    expect(normalPfn(machine, vma, 8, pte(5))).toBeNull()
    expect(machine.badPtes).toEqual(['page 8: beyond-last-descriptor'])
    expect(auditMachine(machine)).toEqual(['bad pte: page 8: beyond-last-descriptor'])
  })
})

describe('inserting', () => {
  test('vm_insert_page counts, marks the area, and refuses', () => {
    const machine = machineWith(true)
    const { space, vma } = area(machine, shared)
    takePage(machine, 0, 'file')
    expect(vmInsertPage(machine, space, vma, 7, 0)).toBe('-EFAULT')
    expect(vmInsertPage(machine, space, vma, 12, 0)).toBe('-EFAULT')
    expect(vmInsertPage(machine, space, vma, 8, 1)).toBe('-EINVAL')
    expect(vma.insertPage).toBe(false)
    expect(vmInsertPage(machine, space, vma, 8, 0)).toBe('inserted')
    expect([vma.insertPage, space.rssFile, pageOf(machine, 0)]).toMatchObject([true, 1, { count: 2, mapcount: 1 }])
    expect(vmInsertPage(machine, space, vma, 8, 0)).toBe('-EBUSY')
    takePage(machine, 1, 'anonymous')
    expect(vmInsertPage(machine, space, vma, 9, 1)).toBe('-EINVAL')
    expect(() => vmInsertPage(machine, space, vma, 9, 5)).toThrow(/no page descriptor/)
    expect(auditMachine(machine)).toEqual([])
    zapRange(machine, space, 8, 4)
    expect([space.rssFile, pageOf(machine, 0)]).toMatchObject([0, { count: 1, mapcount: 0 }])
  })

  const shared = { shared: true, write: true }

  test('vm_insert_pfn counts nothing, and its rules are fatal', () => {
    const machine = machineWith(false)
    const insert = (flags: Partial<VmaFlags>, pfn: number, vpn = 8) => {
      const { space, vma } = area(machine, flags)
      return vmInsertPfn(machine, space, vma, vpn, pfn)
    }
    expect(insert({ pfnMap: true, shared: true }, 1)).toBe('inserted')
    expect(insert({ mixedMap: true }, 5)).toBe('inserted')
    expect(insert({ mixedMap: true }, 5, 12)).toBe('-EFAULT')
    for (const [flags, pfn] of [
      [{}, 5],
      [{ pfnMap: true, mixedMap: true, shared: true }, 5],
      [{ pfnMap: true, mayWrite: true }, 5],
      [{ mixedMap: true }, 1],
    ] as const) {
      expect(ruleOf(() => insert(flags, pfn))).toBe('insert-pfn-area')
    }
    machine.conflictingPfns.push(5)
    expect(insert({ mixedMap: true }, 5)).toBe('-EINVAL')
    expect(() => insert({ mixedMap: true }, 6)).toThrow(/no frame 6/)
    expect(pageOf(machine, 1).count).toBe(0)
    expect(auditMachine(machine)).toEqual([])
  })

  test('vm_insert_mixed: with pte_special never counted, without it counted if there is a descriptor', () => {
    for (const pteSpecial of [true, false]) {
      const machine = machineWith(pteSpecial)
      const { space, vma } = area(machine, { mixedMap: true })
      takePage(machine, 1, 'file')
      expect(vmInsertMixed(machine, space, vma, 8, 1)).toBe('inserted')
      expect(vmInsertMixed(machine, space, vma, 9, 5)).toBe('inserted')
      expect(vmInsertMixed(machine, space, vma, 9, 5)).toBe('-EBUSY')
      expect(vmInsertMixed(machine, space, vma, 12, 5)).toBe('-EFAULT')
      expect(readPte(machine, space, 8)).toMatchObject({ pfn: 1, special: pteSpecial })
      expect(readPte(machine, space, 9)).toMatchObject({ pfn: 5, special: pteSpecial })
      expect(pageOf(machine, 1).count).toBe(pteSpecial ? 1 : 2)
      expect(auditMachine(machine)).toEqual([])
      zapRange(machine, space, 8, 4)
      expect(pageOf(machine, 1).count).toBe(1)
    }
    const machine = machineWith(true)
    const { space, vma } = area(machine, { pfnMap: true })
    expect(ruleOf(() => vmInsertMixed(machine, space, vma, 8, 5))).toBe('insert-mixed-area')
  })

  test('remap_pfn_range covers a copy-on-write area completely, and remembers where it starts', () => {
    const machine = machineWith(false)
    const cow = area(machine, { mayWrite: true, write: true }, 2)
    expect(remapPfnRange(machine, cow.space, cow.vma, 8, 2, 1)).toBe('-EINVAL')
    expect(cow.vma.pfnMap).toBe(false)
    expect(remapPfnRange(machine, cow.space, cow.vma, 7, 2, 2)).toBe('-EFAULT')
    expect(remapPfnRange(machine, cow.space, cow.vma, 8, 2, 2)).toBe('mapped')
    expect(cow.vma).toMatchObject({ pfnMap: true, io: true, pgoff: 2 })
    expect(fault(machine, cow.space, 8, 'write')).toBe('copied')
    expect(auditMachine(machine)).toEqual([])
    expect(ruleOf(() => remapPfnRange(machine, cow.space, cow.vma, 8, 2, 2))).toBe('remap-occupied')
    const plain = area(machine, { shared: true }, 2, 9)
    expect(remapPfnRange(machine, plain.space, plain.vma, 9, 4, 1)).toBe('mapped')
    expect(plain.vma.pgoff).toBe(9)
    expect(() => remapPfnRange(machine, plain.space, plain.vma, 8, 5, 2)).toThrow(/no frame 6/)
    expect(fault(machine, plain.space, 8, 'read')).toBe('sigbus')
  })

  test('no page table left', () => {
    const machine = createMachine({ memory: flat(4), frames: 6, pteSpecial: true, maxTables: 0 })
    const { space, vma } = area(machine, { mixedMap: true })
    takePage(machine, 0, 'file')
    expect(vmInsertPage(machine, space, vma, 8, 0)).toBe('-ENOMEM')
    expect(vmInsertMixed(machine, space, vma, 8, 5)).toBe('-ENOMEM')
    const other = createSpace(machine)
    mmap(other, { first: 0, pages: 1, backing: anonymous, write: true })
    expect(fault(machine, other, 0, 'write')).toBe('oom')
    expect(auditMachine(machine)).toEqual([])
  })
})

/** A space with one private writable anonymous area of four pages at 8. */
function anonymousSpace(machine: Machine): AddressSpace {
  const space = createSpace(machine)
  mmap(space, { first: 8, pages: 4, backing: anonymous, write: true })
  return space
}

function store(machine: Machine, space: AddressSpace, vpn: number, value: number): string {
  const outcome = fault(machine, space, vpn, 'write')
  const pfn = translate(machine, space, vpn, 'write')
  if (pfn !== null) frameOf(machine, pfn).content = value
  return outcome
}

describe('faults and copies', () => {
  test('fork shares, a store copies, the last user writes in place', () => {
    const machine = machineWith(true)
    const parent = anonymousSpace(machine)
    expect(store(machine, parent, 8, 7)).toBe('mapped')
    const forked = fork(machine, parent)
    const child = (forked as { child: AddressSpace }).child
    expect(translate(machine, parent, 8, 'write')).toBeNull()
    expect(store(machine, child, 8, 9)).toBe('copied')
    expect(frameOf(machine, translate(machine, parent, 8, 'read') as number).content).toBe(7)
    expect(store(machine, parent, 8, 8)).toBe('reused')
    expect(store(machine, parent, 8, 8)).toBe('already')
    expect(auditMachine(machine)).toEqual([])
    exitSpace(machine, parent)
    exitSpace(machine, child)
    expect(machine.frames.filter(({ page }) => page !== null && page.use !== 'free')).toEqual([])
    expect(machine.tables.some(({ live }) => live)).toBe(false)
  })

  test('no area, no permission, nothing behind it, no memory', () => {
    const machine = machineWith(true, flat(1))
    const space = anonymousSpace(machine)
    expect(fault(machine, space, 7, 'read')).toBe('sigsegv')
    expect(store(machine, space, 8, 1)).toBe('mapped')
    expect(fault(machine, space, 9, 'read')).toBe('oom')
    fork(machine, space)
    expect(fault(machine, space, 8, 'write')).toBe('oom')
    mmap(space, { first: 20, pages: 1, backing: device })
    expect(fault(machine, space, 20, 'write')).toBe('sigsegv')
    expect(fault(machine, space, 20, 'read')).toBe('sigbus')
    expect(() => writeProtectFault(machine, space, findVma(space, 20)!, 20)).toThrow(/not mapped/)
    expect(auditMachine(machine)).toEqual([])
  })

  test('a store to a private mapping of a frame without descriptor makes a page', () => {
    for (const pteSpecial of [true, false]) {
      const machine = machineWith(pteSpecial)
      const { space, vma } = area(machine, { mixedMap: true, write: true, mayWrite: true })
      frameOf(machine, 5).content = 3
      vmInsertMixed(machine, space, vma, 8, 5)
      expect(fault(machine, space, 8, 'write')).toBe('copied')
      const copy = translate(machine, space, 8, 'write') as number
      expect(frameOf(machine, copy)).toMatchObject({ content: 3, page: { use: 'anonymous', count: 1 } })
      expect(auditMachine(machine)).toEqual([])
      zapRange(machine, space, 8, 4)
      expect(pageOf(machine, copy).use).toBe('free')
    }
  })

  test('a shared area is made writable without a copy', () => {
    const machine = machineWith(true)
    const { space, vma } = area(machine, { shared: true, mayWrite: true })
    takePage(machine, 0, 'file')
    vmInsertPage(machine, space, vma, 8, 0)
    mprotect(machine, space, 8, 4, true)
    expect(fault(machine, space, 8, 'write')).toBe('made-writable')
    expect(translate(machine, space, 8, 'write')).toBe(0)
  })

  test('fork without a table for the copy gives everything back', () => {
    const machine = createMachine({ memory: flat(4), frames: 4, pteSpecial: true, maxTables: 1 })
    const parent = anonymousSpace(machine)
    store(machine, parent, 8, 1)
    expect(fork(machine, parent)).toEqual({ kind: '-ENOMEM' })
    expect(auditMachine(machine)).toEqual([])
    expect(store(machine, parent, 8, 2)).toBe('already')
  })
})

describe('ranges', () => {
  test('munmap splits areas and keeps the linear rule', () => {
    const machine = machineWith(false, flat(6), 12)
    const space = createSpace(machine)
    const vma = mmap(space, { first: 8, pages: 5, backing: device, write: true })
    expect(remapPfnRange(machine, space, vma, 8, 6, 5)).toBe('mapped')
    munmap(machine, space, 10, 1)
    expect(space.vmas.map(({ first, end, pgoff }) => [first, end, pgoff])).toEqual([
      [8, 10, 6],
      [11, 13, 9],
    ])
    expect(auditMachine(machine)).toEqual([])
    munmap(machine, space, 0, 100)
    expect([space.vmas, machine.tables.some(({ live }) => live)]).toEqual([[], false])
  })

  test('mremap moves entries with their references; mprotect takes permission at once', () => {
    const machine = machineWith(true)
    const space = anonymousSpace(machine)
    store(machine, space, 9, 5)
    expect(mremap(machine, space, 8, 600)).toBe('moved')
    expect([translate(machine, space, 601, 'write'), translate(machine, space, 9, 'read')]).toEqual([0, null])
    expect(mprotect(machine, space, 600, 4, false)).toBe('changed')
    expect(translate(machine, space, 601, 'write')).toBeNull()
    expect(fault(machine, space, 601, 'write')).toBe('sigsegv')
    expect(mprotect(machine, space, 600, 4, true)).toBe('changed')
    expect(store(machine, space, 601, 6)).toBe('reused')
    expect(auditMachine(machine)).toEqual([])
    expect(() => mprotect(machine, space, 601, 1, false)).toThrow(/cuts an area/)
    expect(() => mremap(machine, space, 601, 700)).toThrow(/no area starts/)
    mmap(space, { first: 900, pages: 1, backing: device })
    expect(mprotect(machine, space, 900, 1, true)).toBe('-EACCES')
  })

  test('mremap without a table for the new place leaves the old one', () => {
    const machine = createMachine({ memory: flat(4), frames: 4, pteSpecial: true, maxTables: 1 })
    const space = anonymousSpace(machine)
    store(machine, space, 9, 5)
    expect(mremap(machine, space, 8, 600)).toBe('-ENOMEM')
    expect(space.vmas.map(({ first }) => first)).toEqual([8])
    expect(translate(machine, space, 9, 'write')).toBe(0)
    expect(auditMachine(machine)).toEqual([])
  })

  test('areas do not overlap and are not empty', () => {
    const space = anonymousSpace(machineWith(true))
    expect(() => mmap(space, { first: 11, pages: 2, backing: anonymous })).toThrow(/overlap/)
    expect(() => mmap(space, { first: 20, pages: 0, backing: anonymous })).toThrow(RangeError)
    expect(() => mmap(space, { first: 20.5, pages: 1, backing: anonymous })).toThrow(RangeError)
  })

  test('a table that was freed is not walked', () => {
    const machine = machineWith(true)
    const space = anonymousSpace(machine)
    store(machine, space, 8, 1)
    const entry = directoryEntry(space, 8)
    munmap(machine, space, 8, 4)
    expect(ruleOf(() => readTable(machine, (entry as { table: number }).table, 8))).toBe('freed-table')
  })
})

describe('huge entries', () => {
  test('counted once, on the head; not cut; not mixed with small ones', () => {
    const machine = machineWith(true, flat(1024), 1024)
    takeHugePage(machine, 512, 'file')
    const space = createSpace(machine)
    const vma = mmap(space, { first: 512, pages: 512, backing: device, shared: true, write: true, mayWrite: true })
    expect(mapHuge(machine, space, vma, 512, 512)).toBe('inserted')
    expect(pageOf(machine, 512)).toMatchObject({ count: 2, mapcount: 1 })
    expect(pageOf(machine, 513)).toMatchObject({ count: 0, mapcount: 0, head: 512 })
    expect(space.rssFile).toBe(512)
    expect(translate(machine, space, 700, 'write')).toBe(700)
    expect(mapHuge(machine, space, vma, 512, 512)).toBe('-EBUSY')
    takePage(machine, 0, 'file')
    expect(vmInsertPage(machine, space, vma, 600, 0)).toBe('-EBUSY')
    expect(() => setPte(machine, space, 600, pte(0))).toThrow(/huge entry/)
    expect(() => zapRange(machine, space, 600, 1)).toThrow(/cuts the huge entry/)
    const forked = fork(machine, space)
    expect(pageOf(machine, 512).mapcount).toBe(2)
    expect(auditMachine(machine)).toEqual([])
    exitSpace(machine, (forked as { child: AddressSpace }).child)
    zapRange(machine, space, 512, 512)
    putPage(machine, 512, 'owner')
    expect(pageOf(machine, 700)).toMatchObject({ use: 'free', head: 700 })
    expect(auditMachine(machine)).toEqual([])
  })

  test('alignment and heads', () => {
    const machine = machineWith(true, flat(1024), 1024)
    const space = createSpace(machine)
    const vma = mmap(space, { first: 512, pages: 511, backing: device })
    expect(() => takeHugePage(machine, 5, 'file')).toThrow(/aligned/)
    takePage(machine, 3, 'file')
    expect(() => takeHugePage(machine, 0, 'file')).toThrow(/in use/)
    expect(() => mapHuge(machine, space, vma, 512, 0)).toThrow(/not the head/)
    takeHugePage(machine, 512, 'file')
    expect(() => mapHuge(machine, space, vma, 513, 512)).toThrow(/aligned/)
    expect(mapHuge(machine, space, vma, 512, 512)).toBe('-EFAULT')
  })
})
