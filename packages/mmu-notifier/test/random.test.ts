/**
 * Random operations of the VM and of three clients: after every step no secondary entry is dangling or stale, all
 * references balance, and hooks are as many as a count of the operations says.
 */

import {
  auditMachine,
  createMachine,
  createSpace,
  exitSpace,
  fault,
  findVma,
  fork,
  mmap,
  mprotect,
  munmap,
  runProgram,
  translate,
} from '@tmem/vm-mixedmap'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import {
  addClient,
  clientOf,
  createNotifiers,
  danglingSptes,
  deliverMessages,
  type FaultWorld,
  faultRegisters,
  gruFaultProgram,
  kvmFaultProgram,
  type PatchShape,
  RANGES_ONLY,
  register,
  releaseMm,
  secondaryMmus,
  staleSptes,
  V13_COMPLETE,
  type XpmemClient,
  xpmemExport,
} from '../src/index.ts'

const PAGES = 6
const operation = fc.record({
  kind: fc.constantFrom(
    ...(['load', 'store', 'store', 'munmap', 'mmap', 'fork', 'protect', 'allow', 'answer'] as const),
    ...(['kvm', 'kvm-write', 'gru', 'xpmem', 'kvm', 'gru', 'xpmem'] as const),
  ),
  vpn: fc.nat(PAGES - 1),
  pages: fc.integer({ min: 1, max: 3 }),
})

function setUp(shape: PatchShape): FaultWorld {
  const machine = createMachine({ memory: { kind: 'flat', frames: 40 }, frames: 40, pteSpecial: true })
  createSpace(machine)
  const world = { machine, notifiers: createNotifiers(machine, shape), locks: { kvm: '', gru: '', xpmem: '' } }
  for (const kind of ['kvm', 'gru', 'xpmem'] as const) register(world, addClient(world, kind, 0))
  return world
}

test.each([
  ['invalidate_page kept', V13_COMPLETE],
  ['ranges only', RANGES_ONLY],
] as const)('%s', (_, shape) => {
  const met: Record<string, number> = {}
  fc.assert(
    fc.property(fc.array(operation, { minLength: 40, maxLength: 80 }), (operations) => {
      const world = setUp(shape)
      const { machine, notifiers } = world
      const space = machine.spaces[0]!
      const secondary = secondaryMmus(world)
      let [ranges, copies] = [0, 0]
      for (const { kind, vpn, pages } of operations) {
        met[kind] = (met[kind] ?? 0) + (notifiers.clients.some(({ sptes }) => Object.keys(sptes).length > 0) ? 1 : 0)
        const area = findVma(space, vpn)
        switch (kind) {
          case 'mmap':
            if (area === undefined) mmap(space, { first: vpn, pages: 1, backing: { kind: 'anonymous' }, write: true })
            break
          case 'load':
            fault(machine, space, vpn, 'read', secondary)
            break
          case 'store':
            if (fault(machine, space, vpn, 'write', secondary) === 'copied') copies++
            break
          case 'munmap':
            munmap(machine, space, vpn, pages, secondary)
            ranges++
            break
          case 'fork': {
            ranges += space.vmas.length
            const forked = fork(machine, space, secondary)
            // One child at a time; its exit is none of this space's notifiers' business.
            if (forked.kind === 'forked' && pages > 1) exitSpace(machine, forked.child)
            if (machine.spaces.length > 6) for (const child of machine.spaces.slice(1)) exitSpace(machine, child)
            break
          }
          case 'protect':
          case 'allow':
            if (area === undefined) break
            mprotect(machine, space, area.first, area.end - area.first, kind === 'allow', secondary)
            ranges++
            break
          case 'kvm':
          case 'kvm-write': {
            const before = translate(machine, space, vpn, 'read')
            const access = kind === 'kvm' ? 'read' : 'write'
            // A look-up that copies does so without telling: only where nothing has to be copied.
            if (access === 'write' && before !== null && translate(machine, space, vpn, 'write') === null) break
            runProgram(kvmFaultProgram(0, vpn, { access }), world, faultRegisters())
            break
          }
          case 'gru':
            runProgram(gruFaultProgram(1, vpn, 'process'), world, faultRegisters())
            break
          case 'xpmem':
            if (clientOf(world, 2).sptes[vpn] === undefined) xpmemExport(world, 2, vpn)
            break
          case 'answer':
            deliverMessages(machine, clientOf(world, 2) as XpmemClient)
        }
        deliverMessages(machine, clientOf(world, 2) as XpmemClient)
        expect(danglingSptes(world)).toEqual([])
        expect(staleSptes(world)).toEqual([])
        expect(auditMachine(machine)).toEqual([])
      }
      const { invalidatePage, invalidateRangeStart, invalidateRangeEnd } = notifiers.hooks
      const single = shape.singlePage === 'invalidate-page'
      expect([invalidatePage, invalidateRangeStart]).toEqual(single ? [copies, ranges] : [0, ranges + copies])
      expect(invalidateRangeEnd).toBe(invalidateRangeStart)
      releaseMm(world, 0)
      deliverMessages(machine, clientOf(world, 2) as XpmemClient)
      for (const one of machine.spaces) exitSpace(machine, one)
      expect(machine.frames.filter(({ page }) => page?.use !== 'free')).toEqual([])
    }),
    { seed: 2008, numRuns: 100 },
  )
  // A property that never meets a client with entries says nothing.
  expect(Math.min(...Object.values(met))).toBeGreaterThan(50)
})
