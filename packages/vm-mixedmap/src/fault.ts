/**
 * Faults and copy-on-write, and what the primary page tables tell secondary MMUs. A machine keeps the rule of one
 * kernel (`CowKernel`) for when a store to a private page may write in place.
 *
 * Source: mm/memory.c of 2.6.31 (facts only); commits 09854ba94c6a, 70e806e4e645 and 6c287605fd56.
 */
import { allocatePage, frameOf, getPage, HUGE_PAGES, handOver, leaveSwapCache, pageOf, putPage } from './memory.ts'
import { directlyWritable, dropMapped, normalPfn } from './normal.ts'
import {
  type AddressSpace,
  clearPte,
  directoryEntry,
  findVma,
  type Machine,
  offsetOf,
  type Pte,
  readPte,
  setPte,
  type Vma,
} from './space.ts'

// ---------------------------------------------------------------------------------------------------------------
// Secondary MMUs

/**
 * What the primary page tables tell secondary MMUs (@tmem/mmu-notifier implements it).
 * - range: entries of pages first to end - 1 change inside `change`, and pages are freed inside it.
 * - page: `change` clears one entry and flushes the TLB; the page is freed only after this has returned.
 */
export interface SecondaryMmus {
  range(space: number, first: number, end: number, change: () => void): void
  page(space: number, vpn: number, change: () => void): void
}

/** No secondary MMU is registered. */
export const NO_SECONDARY_MMUS: SecondaryMmus = {
  range: (_space, _first, _end, change) => change(),
  page: (_space, _vpn, change) => change(),
}

// ---------------------------------------------------------------------------------------------------------------
// Faults, copy-on-write

export type Access = 'read' | 'write'

/**
 * - mapped: a page was mapped. - already: another thread was faster, the entry is good.
 * - copied, reused, made-writable: a store to a read-only entry was made possible.
 * - sigsegv: no area, or no permission. - sigbus: nothing is behind the address. - oom: no frame, or no table.
 */
export type FaultOutcome = 'mapped' | 'already' | 'copied' | 'reused' | 'made-writable' | 'sigsegv' | 'sigbus' | 'oom'

/**
 * A page fault in an anonymous, file or device area. An area unmapped during the fault is answered with "sigsegv": the
 * fault looks its area up again under the lock. XIP areas: xipFault() of xip.ts.
 * @throws RangeError for an XIP area.
 */
export function fault(
  machine: Machine,
  space: AddressSpace,
  vpn: number,
  access: Access,
  secondary: SecondaryMmus = NO_SECONDARY_MMUS,
): FaultOutcome {
  const vma = findVma(space, vpn)
  if (vma === undefined || (access === 'write' && !vma.write)) return 'sigsegv'
  return handleFault(machine, space, vma, vpn, access, secondary)
}

/**
 * The part of a fault that does not ask whether the access is allowed (handle_mm_fault): a debugger may store to a
 * private area that is read-only. What it stores to is a copy, whose entry stays read-only.
 * @throws RangeError for an XIP area.
 */
export function handleFault(
  machine: Machine,
  space: AddressSpace,
  vma: Vma,
  vpn: number,
  access: Access,
  secondary: SecondaryMmus = NO_SECONDARY_MMUS,
): FaultOutcome {
  if (vma.backing.kind === 'xip') throw new RangeError(`page ${vpn} is of an XIP file; use xipFault()`)
  const present = resolvePresent(machine, space, vma, vpn, access, secondary)
  if (present !== 'absent') return present
  if (vma.backing.kind === 'device') return 'sigbus'
  const cached = vma.backing.kind === 'file' ? vma.backing.pages[offsetOf(vma, vpn)] : null
  if (cached === undefined) return 'sigbus'
  if (cached !== null && (access === 'read' || vma.shared)) {
    const writable = directlyWritable(vma) && access === 'write'
    const outcome = setPte(machine, space, vpn, { pfn: cached, special: false, writable, dirty: access === 'write' })
    if (outcome === '-ENOMEM') return 'oom'
    getPage(machine, cached, 'mapping')
    space.rssFile++
    return 'mapped'
  }
  const allocated = allocatePage(machine, 'anonymous')
  if (allocated.kind === 'no-memory') return 'oom'
  if (cached !== null) copyFrame(machine, cached, allocated.pfn)
  const pte = { pfn: allocated.pfn, special: false, writable: vma.write, dirty: access === 'write' }
  if (setPte(machine, space, vpn, pte) === '-ENOMEM') {
    putPage(machine, allocated.pfn, 'owner')
    return 'oom'
  }
  becomeMapped(machine, space, allocated.pfn)
  return 'mapped'
}

/** The part of a fault that all areas share: an entry is there, good or in need of copy-on-write. */
export function resolvePresent(
  machine: Machine,
  space: AddressSpace,
  vma: Vma,
  vpn: number,
  access: Access,
  secondary: SecondaryMmus = NO_SECONDARY_MMUS,
): FaultOutcome | 'absent' {
  const entry = directoryEntry(space, vpn)
  if (entry?.kind === 'huge') {
    if (access === 'read' || entry.writable) return 'already'
    throw new RangeError(`page ${vpn}: copy-on-write of huge entries is not modelled`)
  }
  const pte = readPte(machine, space, vpn)
  if (pte === null) return 'absent'
  if (access === 'read' || pte.writable) return 'already'
  return writeProtectFault(machine, space, vma, vpn, secondary)
}

/**
 * A store to a read-only entry (do_wp_page): shared areas make the entry writable; a private area writes in place to an
 * anonymous page that the rule of the machine's kernel lets it have (claimPage()), or copies. The copy of a frame
 * without descriptor is a page with one. The entry becomes writable only if the area is: a debugger may store to one
 * that is not.
 * @throws RangeError if nothing is mapped.
 */
export function writeProtectFault(
  machine: Machine,
  space: AddressSpace,
  vma: Vma,
  vpn: number,
  secondary: SecondaryMmus = NO_SECONDARY_MMUS,
): FaultOutcome {
  const pte = readPte(machine, space, vpn)
  if (pte === null) throw new RangeError(`page ${vpn} is not mapped`)
  if (vma.shared) {
    // No secondary MMU is told: more permission than it knows of does no harm.
    Object.assign(pte, { writable: true, dirty: true })
    return 'made-writable'
  }
  const old = normalPfn(machine, vma, vpn, pte)
  if (old !== null && claimPage(machine, old) === 'claimed') {
    Object.assign(pte, { writable: vma.write, dirty: true })
    return 'reused'
  }
  return copyPage(machine, space, vma, vpn, { writable: vma.write, dirty: true }, secondary)
}

/**
 * Whether the space of an entry may write to a private page in place. It is asked with the page and its entry locked;
 * in a kernel that answers "claimed", the page has left the swap cache, or bears its mark, afterwards.
 */
export function claimPage(machine: Machine, pfn: number): 'claimed' | 'shared' {
  const page = pageOf(machine, pfn)
  if (page.use !== 'anonymous') return 'shared'
  const leave = (): void => {
    if (page.swap !== null && !page.swap.writeback) leaveSwapCache(machine, pfn)
  }
  switch (machine.kernel) {
    case '2.6.31': {
      if (page.mapcount + (page.swap?.slots ?? 0) !== 1) return 'shared'
      leave()
      return 'claimed'
    }
    case '5.9':
      return page.count === 1 ? 'claimed' : 'shared'
    case '5.19':
      if (page.exclusive) return 'claimed'
      if (page.swap?.slots === 0) leave()
      page.exclusive = page.count === 1
      return page.exclusive ? 'claimed' : 'shared'
  }
}

/**
 * What a pin for reading does first in kernels from 5.19: an anonymous page that others may have as well is copied, so
 * that the pin and the process will not part ways at the next store. The entry stays read-only.
 * @throws RangeError if nothing is mapped.
 */
export function unsharePage(
  machine: Machine,
  space: AddressSpace,
  vma: Vma,
  vpn: number,
  secondary: SecondaryMmus = NO_SECONDARY_MMUS,
): 'copied' | 'reused' | 'oom' {
  const pte = readPte(machine, space, vpn)
  if (pte === null) throw new RangeError(`page ${vpn} is not mapped`)
  const old = normalPfn(machine, vma, vpn, pte)
  if (old === null || !mustUnshare(machine, old) || claimPage(machine, old) === 'claimed') return 'reused'
  return copyPage(machine, space, vma, vpn, { writable: false, dirty: true }, secondary)
}

/** Whether a page must be made exclusive before it is pinned for reading. */
export function mustUnshare(machine: Machine, pfn: number): boolean {
  const { use, exclusive } = pageOf(machine, pfn)
  return machine.kernel === '5.19' && use === 'anonymous' && !exclusive
}

function copyPage(
  machine: Machine,
  space: AddressSpace,
  vma: Vma,
  vpn: number,
  flags: { readonly writable: boolean; readonly dirty: boolean },
  secondary: SecondaryMmus,
): 'copied' | 'oom' {
  const pte = readPte(machine, space, vpn) as Pte
  const old = normalPfn(machine, vma, vpn, pte)
  const allocated = allocatePage(machine, 'anonymous')
  if (allocated.kind === 'no-memory') return 'oom'
  copyFrame(machine, pte.pfn, allocated.pfn)
  // Clear, flush, notify, and only then the new entry: nobody may still write to the old page through a stale entry
  // when the new one becomes visible.
  secondary.page(space.id, vpn, () => {
    clearPte(machine, space, vpn)
  })
  setPte(machine, space, vpn, { pfn: allocated.pfn, special: false, ...flags })
  becomeMapped(machine, space, allocated.pfn)
  if (old !== null) dropMapped(machine, space, old)
  return 'copied'
}

/** An anonymous page that was just allocated belongs to the one entry that maps it. */
export function becomeMapped(machine: Machine, space: AddressSpace, pfn: number): void {
  handOver(machine, pfn, 'owner', 'mapping')
  pageOf(machine, pfn).exclusive = machine.kernel === '5.19'
  space.rssAnon++
}

/** Copies what a frame holds; either may be without descriptor. */
export function copyFrame(machine: Machine, from: number, to: number): void {
  const { content, tail } = frameOf(machine, from)
  Object.assign(frameOf(machine, to), { content, tail })
}

/** The frame that a processor reaches through the page tables, or null (it would fault). */
export function translate(machine: Machine, space: AddressSpace, vpn: number, access: Access): number | null {
  const entry = directoryEntry(space, vpn)
  if (entry?.kind === 'huge') return access === 'read' || entry.writable ? entry.pfn + (vpn % HUGE_PAGES) : null
  const pte = readPte(machine, space, vpn)
  return pte !== null && (access === 'read' || pte.writable) ? pte.pfn : null
}
