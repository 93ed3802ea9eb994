/**
 * How many hooks the VM calls for a workload, in both shapes of the April 2008 patch sets: the number behind the claim
 * that a callback for single pages "halves the number of hooks" whenever the VM deals with single pages.
 *
 * The workloads run on the page tables of @tmem/vm-mixedmap; what is counted is what these call.
 *
 * Source: mail "[PATCH 00 of 12] mmu notifier #v13", A. Arcangeli, 22 April 2008; call sites of 2.6.31.
 */
import {
  clearPte,
  createMachine,
  createSpace,
  createXipFile,
  createXipFilesystem,
  dropMapped,
  exitSpace,
  fault,
  fork,
  type Machine,
  mmap,
  mprotect,
  mremap,
  munmap,
  type SecondaryMmus,
  unmapZeroPage,
  xipFault,
  xipMmap,
} from '@tmem/vm-mixedmap'
import { addClient } from './clients.ts'
import {
  createNotifiers,
  type HookCounts,
  type NotifierWorld,
  type PatchShape,
  register,
  secondaryMmus,
} from './notifier.ts'

/** What the VM does, each time to `pages` pages. */
export type WorkloadName = 'cow-faults' | 'reclaim' | 'xip-sparse' | 'fork' | 'munmap' | 'mprotect' | 'mremap' | 'mixed'

export const WORKLOADS: readonly WorkloadName[] = [
  'cow-faults',
  'reclaim',
  'xip-sparse',
  'fork',
  'munmap',
  'mprotect',
  'mremap',
  'mixed',
]

export interface HookReport extends HookCounts {
  readonly workload: WorkloadName
  readonly pages: number
  /** invalidate_page, range_start and range_end together. */
  readonly hooks: number
}

/**
 * Runs a workload with KVM and GRU registered, and counts.
 * - cow-faults: stores to pages shared by fork, one fault each. - reclaim: pages unmapped one by one through the
 *   reverse map. - xip-sparse: zero pages of a file unmapped one by one. - fork, munmap, mprotect, mremap: one call on
 *   all pages. - mixed: all of them.
 * @throws RangeError unless 1 <= pages <= 500.
 */
export function countHooks(shape: PatchShape, workload: WorkloadName, pages: number): HookReport {
  if (!Number.isSafeInteger(pages) || pages < 1 || pages > 500) throw new RangeError('pages must be 1 to 500')
  const parts: readonly WorkloadName[] =
    workload === 'mixed' ? WORKLOADS.filter((name) => name !== 'mixed') : [workload]
  const sum: Record<string, number> = {}
  for (const part of parts) {
    for (const [name, value] of Object.entries(countOne(shape, part, pages))) sum[name] = (sum[name] ?? 0) + value
  }
  const counts = sum as unknown as HookCounts
  const hooks = counts.invalidatePage + counts.invalidateRangeStart + counts.invalidateRangeEnd
  return { workload, pages, hooks, ...counts }
}

function countOne(shape: PatchShape, workload: Exclude<WorkloadName, 'mixed'> | 'mixed', pages: number): HookCounts {
  const frames = 3 * pages + 1
  const machine = createMachine({ memory: { kind: 'flat', frames }, frames: frames + pages, pteSpecial: true })
  const space = createSpace(machine)
  const world: NotifierWorld = { machine, notifiers: createNotifiers(machine, shape) }
  for (const kind of ['kvm', 'gru'] as const) register(world, addClient(world, kind, space.id))
  run(world, machine, workload, pages, secondaryMmus(world))
  return world.notifiers.hooks
}

function run(
  world: NotifierWorld,
  machine: Machine,
  workload: WorkloadName,
  pages: number,
  secondary: SecondaryMmus,
): void {
  const space = machine.spaces[0]
  if (space === undefined) return
  const all = Array.from({ length: pages }, (_, vpn) => vpn)
  if (workload === 'xip-sparse') {
    const fs = createXipFilesystem(machine, { first: machine.frames.length - pages, blocks: pages })
    const file = createXipFile({ machine, fs }, pages * 4096)
    xipMmap(space, file, { first: 0, pages })
    for (const vpn of all) xipFault({ machine, fs }, space.id, vpn, 'read')
    for (const vpn of all) unmapZeroPage({ machine, fs }, file, vpn, secondary)
    return
  }
  mmap(space, { first: 0, pages, backing: { kind: 'anonymous' }, write: true })
  for (const vpn of all) fault(machine, space, vpn, 'write')
  switch (workload) {
    case 'cow-faults': {
      const forked = fork(machine, space) // its own hooks are the workload "fork"
      for (const vpn of all) fault(machine, space, vpn, 'write', secondary)
      if (forked.kind === 'forked') exitSpace(machine, forked.child)
      return
    }
    case 'reclaim':
      for (const vpn of all) {
        const pte = { pfn: -1 }
        secondary.page(space.id, vpn, () => {
          pte.pfn = clearPte(machine, space, vpn)?.pfn ?? -1
        })
        dropMapped(machine, space, pte.pfn)
      }
      return
    case 'fork':
      fork(machine, space, secondary)
      return
    case 'munmap':
      munmap(machine, space, 0, pages, secondary)
      return
    case 'mprotect':
      mprotect(machine, space, 0, pages, false, secondary)
      return
    case 'mremap':
      mremap(machine, space, 0, 1024, secondary)
      return
    case 'mixed':
      throw new RangeError('"mixed" is the sum of the others')
  }
}
