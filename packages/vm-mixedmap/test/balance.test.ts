/**
 * Random operations on spaces, against a model that knows nothing of references: per space, which value each page must
 * show. After every step all accounts must balance; in the end, when all is unmapped, nothing may be left.
 */
import { strictEqual } from 'node:assert'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import {
  type AddressSpace,
  auditMachine,
  auditXip,
  type CowKernel,
  createMachine,
  createSpace,
  createXipFile,
  createXipFilesystem,
  exitSpace,
  fault,
  fileOf,
  findVma,
  fork,
  frameOf,
  getUserPages,
  getUserPagesFast,
  mmap,
  mprotect,
  mremap,
  munmap,
  offsetOf,
  putUserPages,
  remapPfnRange,
  translate,
  type XipWorld,
  xipFault,
  xipMmap,
  xipRead,
  xipTruncate,
  xipWrite,
  zapRange,
} from '../src/index.ts'

type Operation =
  | { kind: 'mmap' | 'xip' | 'xip-private' | 'remap'; space: number; vpn: number; pages: number }
  | {
      kind: 'load' | 'store' | 'munmap' | 'protect' | 'allow' | 'move' | 'gup'
      space: number
      vpn: number
      pages: number
    }
  | { kind: 'fork' | 'exit' | 'write' | 'truncate' | 'unpin' | 'zap'; space: number; vpn: number; pages: number }

const operation: fc.Arbitrary<Operation> = fc.record({
  kind: fc.constantFrom(
    ...(['mmap', 'mmap', 'mmap', 'xip', 'xip-private', 'remap', 'load', 'load', 'load', 'load'] as const),
    ...(['store', 'store', 'store', 'store', 'store', 'store', 'munmap', 'fork', 'fork', 'fork'] as const),
    ...(['protect', 'allow', 'move', 'gup', 'exit', 'write', 'truncate', 'unpin', 'zap'] as const),
  ),
  space: fc.nat(4),
  vpn: fc.nat(5),
  pages: fc.integer({ min: 1, max: 4 }),
})

/** Frames 0 to 23 are memory, 24 to 29 blocks, 30 to 33 a device. */
function createWorld(pteSpecial: boolean, blocksHaveDescriptors: boolean, kernel: CowKernel): XipWorld {
  const memory = { kind: 'flat', frames: blocksHaveDescriptors ? 30 : 24 } as const
  const machine = createMachine({ memory, frames: 34, pteSpecial, kernel, maxTables: 6 })
  const fs = createXipFilesystem(machine, { first: 24, blocks: 6 })
  createXipFile({ machine, fs }, 3 * 4096)
  return { machine, fs }
}

class Run {
  readonly world: XipWorld
  /** What private pages must show: "space:vpn" to value. Shared and device pages are asked of their owner. */
  readonly values = new Map<string, number>()
  readonly pins: number[] = []
  readonly done: Record<string, number>
  next = 100

  constructor(pteSpecial: boolean, blocksHaveDescriptors: boolean, kernel: CowKernel, done: Record<string, number>) {
    this.done = done
    this.world = createWorld(pteSpecial, blocksHaveDescriptors, kernel)
    for (let i = 0; i < 2; i++) createSpace(this.world.machine)
    for (let pfn = 30; pfn < 34; pfn++) frameOf(this.world.machine, pfn).content = pfn
  }

  fault(space: AddressSpace, vpn: number, access: 'read' | 'write'): number | null {
    const { machine } = this.world
    for (let tries = 0; tries < 3; tries++) {
      const pfn = translate(machine, space, vpn, access)
      if (pfn !== null && findVma(space, vpn) !== undefined) return pfn
      const xip = findVma(space, vpn)?.backing.kind === 'xip'
      const outcome = xip ? xipFault(this.world, space.id, vpn, access) : fault(machine, space, vpn, access)
      if (['sigsegv', 'sigbus', 'oom'].includes(outcome)) return null
    }
    throw new Error(`page ${vpn} of space ${space.id} cannot be faulted`)
  }

  /** What a load must see, null if the model cannot know that it works. */
  expected(space: AddressSpace, vpn: number): number {
    const own = this.values.get(`${space.id}:${vpn}`)
    if (own !== undefined) return own
    const vma = findVma(space, vpn)
    if (vma?.backing.kind === 'xip') {
      const read = xipRead(this.world, fileOf(this.world.fs, 0), offsetOf(vma, vpn))
      return read.kind === 'read' ? read.value : -1
    }
    return vma?.backing.kind === 'device' ? 30 + (vpn - (vma.first - (vma.pgoff - 30))) : 0
  }

  forget(space: AddressSpace, first: number, pages: number): void {
    for (let vpn = first; vpn < first + pages; vpn++) this.values.delete(`${space.id}:${vpn}`)
  }

  free(space: AddressSpace, vpn: number, pages: number): boolean {
    return !space.vmas.some((vma) => vpn < vma.end && vma.first < vpn + pages)
  }

  apply({ kind, space: id, vpn, pages }: Operation): void {
    const { machine, fs } = this.world
    const space = machine.spaces[id]
    if (space === undefined) return
    this.done[kind] = (this.done[kind] ?? 0) + (space.rssAnon > 0 ? 1 : 0)
    const file = fileOf(fs, 0)
    switch (kind) {
      case 'mmap':
        if (this.free(space, vpn, pages))
          mmap(space, { first: vpn, pages, backing: { kind: 'anonymous' }, write: true })
        return
      case 'xip':
        if (this.free(space, vpn, pages)) xipMmap(space, file, { first: vpn, pages, shared: true, write: true })
        return
      case 'xip-private':
        if (this.free(space, vpn, pages)) xipMmap(space, file, { first: vpn, pages, write: true })
        return
      case 'remap': {
        if (!this.free(space, vpn, pages)) return
        const vma = mmap(space, { first: vpn, pages, backing: { kind: 'device' }, write: true })
        if (remapPfnRange(machine, space, vma, vpn, 30, pages) !== 'mapped') munmap(machine, space, vpn, pages)
        return
      }
      case 'load': {
        const pfn = this.fault(space, vpn, 'read')
        if (pfn !== null) strictEqual(frameOf(machine, pfn).content, this.expected(space, vpn))
        return
      }
      case 'store': {
        const pfn = this.fault(space, vpn, 'write')
        if (pfn === null) return
        strictEqual(frameOf(machine, pfn).content, this.expected(space, vpn))
        frameOf(machine, pfn).content = this.next
        if (findVma(space, vpn)?.shared !== true) this.values.set(`${id}:${vpn}`, this.next)
        this.next++
        return
      }
      case 'munmap':
        munmap(machine, space, vpn, pages)
        this.forget(space, vpn, pages)
        return
      case 'zap': {
        // Only what can be faulted in again with the same content.
        const vma = findVma(space, vpn)
        if (vma?.backing.kind !== 'xip' || this.values.has(`${id}:${vpn}`)) return
        zapRange(machine, space, vpn, 1)
        return
      }
      case 'protect':
      case 'allow': {
        const vma = findVma(space, vpn)
        if (vma !== undefined) mprotect(machine, space, vma.first, vma.end - vma.first, kind === 'allow')
        return
      }
      case 'move': {
        const vma = findVma(space, vpn)
        if (vma === undefined || !this.free(space, 600 + vpn, vma.end - vma.first)) return
        const { first, end } = vma
        if (mremap(machine, space, first, 600 + vpn) !== 'moved') return
        for (let at = first; at < end; at++) {
          const value = this.values.get(`${id}:${at}`)
          if (value !== undefined) this.values.set(`${id}:${at - first + 600 + vpn}`, value)
        }
        this.forget(space, first, end - first)
        return
      }
      case 'fork': {
        if (machine.spaces.length > 7) return
        const forked = fork(machine, space)
        if (forked.kind === '-ENOMEM') return
        for (const [key, value] of this.values) {
          const [owner, at] = key.split(':')
          if (Number(owner) === id) this.values.set(`${forked.child.id}:${at}`, value)
        }
        return
      }
      case 'exit':
        exitSpace(machine, space)
        for (const key of this.values.keys()) if (key.startsWith(`${id}:`)) this.values.delete(key)
        return
      case 'gup': {
        // The slow path of this test cannot fault XIP areas.
        if (space.vmas.some((vma) => vma.backing.kind === 'xip')) return
        const form = vpn % 2 === 0 ? 'speculative' : 'flush-interrupt'
        const request = { space: id, vpn, pages, access: 'read' } as const
        const got = machine.pteSpecial ? getUserPagesFast(machine, form, request) : getUserPages(machine, request)
        if (got.kind === 'pages') this.pins.push(...got.pfns)
        return
      }
      case 'unpin':
        putUserPages(machine, this.pins.splice(0, pages))
        return
      case 'write':
        xipWrite(this.world, file, vpn % 5, this.next++)
        return
      case 'truncate': {
        // Private copies beyond the new end go, too.
        const kept = vpn % 5
        for (const one of machine.spaces) {
          for (const vma of one.vmas) {
            if (vma.backing.kind !== 'xip') continue
            for (let at = vma.first; at < vma.end; at++) if (offsetOf(vma, at) >= kept) this.forget(one, at, 1)
          }
        }
        xipTruncate(this.world, file, kept * 4096)
      }
    }
  }

  finish(): void {
    const { machine } = this.world
    for (const space of machine.spaces) exitSpace(machine, space)
    putUserPages(machine, this.pins)
    const left = machine.frames.slice(0, 24).filter(({ page }) => page?.use !== 'free')
    // The zero page is the file's for ever.
    strictEqual(left.length, 1)
    strictEqual(
      machine.tables.some(({ live }) => live),
      false,
    )
  }
}

test.each([
  [true, false, '2.6.31'],
  [true, true, '5.9'],
  [true, false, '5.19'],
  [false, false, '2.6.31'],
  [false, true, '2.6.31'],
] as const)('pte_special %s, blocks with descriptors %s, kernel %s', (pteSpecial, blocksHaveDescriptors, kernel) => {
  // How often each operation met a space with anonymous pages: a property that never gets there says nothing.
  const done: Record<string, number> = {}
  fc.assert(
    fc.property(fc.array(operation, { minLength: 60, maxLength: 120 }), (operations) => {
      const run = new Run(pteSpecial, blocksHaveDescriptors, kernel, done)
      for (const one of operations) {
        run.apply(one)
        expect(auditMachine(run.world.machine)).toEqual([])
        expect(auditXip(run.world)).toEqual([])
      }
      run.finish()
      expect(auditMachine(run.world.machine)).toEqual([])
    }),
    { seed: 2008, numRuns: 120 },
  )
  expect(Math.min(...Object.values(done))).toBeGreaterThan(40)
})
