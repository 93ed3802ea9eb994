import { expect, test } from 'vitest'
import {
  access,
  auditMachine,
  createMachine,
  createSpace,
  createTlbWorld,
  dropMmapLock,
  fault,
  flushTlb,
  frameOf,
  freeGathered,
  gather,
  load,
  mayStore,
  mmap,
  mmapLockFree,
  pageOf,
  readPte,
  spaceOf,
  store,
  syncOf,
  type TlbWorld,
  takeMmapLock,
} from '../src/index.ts'

/** Processors 0 and 1 run in space 0, processor 2 in space 1; page 5 of both spaces is present. */
function prepared(): TlbWorld {
  const machine = createMachine({ memory: { kind: 'flat', frames: 4 }, frames: 4, pteSpecial: true })
  for (let id = 0; id < 2; id++) {
    const space = createSpace(machine)
    mmap(space, { first: 5, pages: 1, write: true, backing: { kind: 'anonymous' } })
    fault(machine, space, 5, 'write')
    frameOf(machine, id).content = 10 + id
  }
  return createTlbWorld(machine, [0, 0, 1])
}

test('a processor keeps its translation until it is flushed, whatever the tables say', () => {
  const world = prepared()
  const { machine } = world
  expect([load(world, 0, 5), load(world, 2, 5), load(world, 0, 6)]).toEqual([10, 11, null])
  readPte(machine, spaceOf(machine, 0), 5)!.writable = false
  expect([mayStore(world, 0, 5), mayStore(world, 1, 5)]).toEqual([true, false])
  expect([store(world, 0, 5, 20), store(world, 1, 5, 30)]).toEqual(['stored', 'fault'])
  expect(load(world, 1, 5)).toBe(20)
  flushTlb(world, 1, 5, 6)
  flushTlb(world, 0, 6, 7)
  expect(store(world, 0, 5, 21)).toBe('stored')
  flushTlb(world, 0, 5, 6)
  expect(store(world, 0, 5, 22)).toBe('fault')
  expect(load(world, 0, 5)).toBe(21)
})

test('a translation for reading is looked up again for a store', () => {
  const world = prepared()
  const pte = readPte(world.machine, spaceOf(world.machine, 0), 5)!
  pte.writable = false
  expect(load(world, 0, 5)).toBe(10)
  pte.writable = true
  expect(store(world, 0, 5, 9)).toBe('stored')
  expect(world.processors[0]!.tlb).toEqual({ 5: { pfn: 0, writable: true } })
})

test('a gathered page is freed by freeGathered(), and reaching it after that is a bug', () => {
  const world = prepared()
  const { machine } = world
  load(world, 0, 5)
  const pages: number[] = []
  gather(world, 0, 5, pages)
  gather(world, 0, 5, pages)
  expect(pages).toEqual([0])
  expect(pageOf(machine, 0)).toMatchObject({ count: 1, mapcount: 0 })
  expect(auditMachine(machine)).toEqual([])
  expect([load(world, 0, 5), load(world, 1, 5)]).toEqual([10, null])
  freeGathered(world, pages)
  expect(pages).toEqual([])
  expect(() => access(world, 0, 5, 'read')).toThrow('processor 0 reads frame 0, which is free')
  flushTlb(world, 0, 5, 6)
  expect(access(world, 0, 5, 'read')).toBe(null)
  expect(auditMachine(machine)).toEqual([])
})

test('mmap_lock has one writer, or readers', () => {
  const world = prepared()
  takeMmapLock(world, 0, 'read', 'a')
  takeMmapLock(world, 0, 'read', 'b')
  expect([mmapLockFree(world, 0, 'read'), mmapLockFree(world, 0, 'write'), mmapLockFree(world, 1, 'write')]).toEqual([
    true,
    false,
    true,
  ])
  expect(() => takeMmapLock(world, 0, 'write', 'c')).toThrow(/not free/)
  expect(() => dropMmapLock(world, 0, 'read', 'c')).toThrow(/does not hold/)
  dropMmapLock(world, 0, 'read', 'a')
  dropMmapLock(world, 0, 'read', 'b')
  takeMmapLock(world, 0, 'write', 'c')
  expect(mmapLockFree(world, 0, 'read')).toBe(false)
  expect(() => dropMmapLock(world, 0, 'write', 'a')).toThrow(/does not hold/)
  dropMmapLock(world, 0, 'write', 'c')
  expect(syncOf(world, 0)).toEqual({ readers: [], writer: '', pageTable: '', flushPending: 0 })
  expect(() => syncOf(world, 2)).toThrow(/no address space 2/)
})
