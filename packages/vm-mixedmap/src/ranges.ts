/**
 * What changes many entries at once: unmapping, the end of a space, fork, mprotect, mremap.
 *
 * Source: mm/memory.c, mm/mremap.c, mm/mprotect.c of 2.6.31 (facts only); commit 70e806e4e645 for fork of pinned pages.
 */
import { becomeMapped, copyFrame, NO_SECONDARY_MMUS, type SecondaryMmus } from './fault.ts'
import { allocatePage, getPage, HUGE_PAGES, natural, pageOf, putPage } from './memory.ts'
import { bookRss, dropMapped, normalPfn, vmNormalHugePage, vmNormalPage } from './normal.ts'
import {
  type AddressSpace,
  type Backing,
  clearPte,
  createSpace,
  directoryEntry,
  findVma,
  freeTables,
  type HugeEntry,
  isCow,
  type Machine,
  mmap,
  offsetOf,
  type Pte,
  setPte,
  type Vma,
} from './space.ts'

/**
 * Unmaps pages first to first + pages - 1 of a space; the areas stay.
 * @throws RangeError if the range cuts a huge entry.
 */
export function zapRange(
  machine: Machine,
  space: AddressSpace,
  first: number,
  pages: number,
  secondary: SecondaryMmus = NO_SECONDARY_MMUS,
): void {
  const end = natural('first', first) + natural('pages', pages)
  secondary.range(space.id, first, end, () => {
    for (const [vpn, entry] of entriesIn(machine, space, first, end)) {
      if (entry.kind === 'huge') zapHuge(machine, space, vpn, first, end)
      else zapPte(machine, space, vpn)
    }
  })
}

/** Unmaps one page: clear, then drop what was accounted. `classify` decides what that is; mutants replace it. */
export function zapPte(
  machine: Machine,
  space: AddressSpace,
  vpn: number,
  classify: typeof vmNormalPage = vmNormalPage,
): void {
  const vma = findVma(space, vpn)
  const pte = clearPte(machine, space, vpn)
  if (pte === null || vma === undefined) return
  const pfn = normalPfn(machine, vma, vpn, pte, classify)
  if (pfn !== null) dropMapped(machine, space, pfn)
}

function zapHuge(machine: Machine, space: AddressSpace, vpn: number, first: number, end: number): void {
  const entry = directoryEntry(space, vpn)
  if (entry?.kind !== 'huge') return
  if (vpn < first || vpn + HUGE_PAGES > end) throw new RangeError(`the range cuts the huge entry at page ${vpn}`)
  const vma = findVma(space, vpn)
  delete space.directory[vpn / HUGE_PAGES]
  if (vma === undefined) return
  const pfn = normalHugePfn(machine, vma, vpn, entry)
  if (pfn === null) return
  bookRss(machine, space, pfn, -HUGE_PAGES)
  putPage(machine, pfn, 'mapping')
}

/** vmNormalHugePage() for actions. */
function normalHugePfn(machine: Machine, vma: Vma, vpn: number, entry: HugeEntry): number | null {
  const normal = vmNormalHugePage(machine, vma, entry)
  if (normal.kind === 'bad-pte') machine.badPtes.push(`page ${vpn}: ${normal.why}`)
  return normal.kind === 'page' ? normal.pfn : null
}

type MappedEntry = { kind: 'pte'; pte: Pte } | HugeEntry

/** Entries in a range, in order of address. A huge entry appears at its first page, also if that is outside. */
export function entriesIn(
  machine: Machine,
  space: AddressSpace,
  first: number,
  end: number,
): [vpn: number, entry: MappedEntry][] {
  return Object.entries(space.directory).flatMap(([index, entry]): [number, MappedEntry][] => {
    const base = Number(index) * HUGE_PAGES
    if (base >= end || base + HUGE_PAGES <= first) return []
    if (entry.kind === 'huge') return [[base, entry]]
    return Object.entries(machine.tables[entry.table]?.entries ?? {})
      .map(([slot, pte]): [number, MappedEntry] => [base + Number(slot), { kind: 'pte', pte }])
      .filter(([vpn]) => vpn >= first && vpn < end)
  })
}

/**
 * Unmaps a range and removes it from the areas, splitting those it cuts; frees page tables that are empty then.
 * Pages outside all areas are no error.
 */
export function munmap(
  machine: Machine,
  space: AddressSpace,
  first: number,
  pages: number,
  secondary: SecondaryMmus = NO_SECONDARY_MMUS,
): void {
  zapRange(machine, space, first, pages, secondary)
  const end = first + pages
  space.vmas = space.vmas.flatMap((vma) => {
    if (vma.end <= first || vma.first >= end) return [vma]
    const left = vma.first < first ? [{ ...vma, end: first }] : []
    const right = vma.end > end ? [{ ...vma, first: end, pgoff: offsetOf(vma, end) }] : []
    return [...left, ...right]
  })
  freeTables(machine, space, first, end)
}

/** Ends a space: everything is unmapped, all areas and tables go. Secondary MMUs are released before (mmu-notifier). */
export function exitSpace(machine: Machine, space: AddressSpace, secondary: SecondaryMmus = NO_SECONDARY_MMUS): void {
  for (const { first, end } of space.vmas) munmap(machine, space, first, end - first, secondary)
}

/**
 * A copy of a space that shares its pages. Private writable entries become read-only on both sides. Special entries are
 * copied and not counted. In kernels from 5.9 a private anonymous page that is pinned is not shared but copied at once:
 * the parent keeps the page, and its entry as it is.
 *
 * -ENOMEM: no page table or page for the copy; what was copied so far is given back.
 * `pinned` tells whether a page is; scenarios that take that question apart from the copying replace it.
 * @throws RangeError if a huge private page is pinned, in these kernels: they split it first, which is not modelled.
 */
export function fork(
  machine: Machine,
  parent: AddressSpace,
  secondary: SecondaryMmus = NO_SECONDARY_MMUS,
  pinned: (pfn: number) => boolean = (pfn) => pageOf(machine, pfn).pins > 0,
): { kind: 'forked'; child: AddressSpace } | { kind: '-ENOMEM' } {
  const child = createSpace(machine)
  child.vmas = parent.vmas.map((vma) => ({ ...vma, backing: copyBacking(vma.backing) }))
  for (const vma of parent.vmas) {
    const failed: number[] = []
    const copy = (): void => {
      for (const [vpn, entry] of entriesIn(machine, parent, vma.first, vma.end)) {
        if (copyEntry(machine, child, vma, vpn, entry, pinned) === '-ENOMEM') failed.push(vpn)
      }
    }
    if (isCow(vma)) secondary.range(parent.id, vma.first, vma.end, copy)
    else copy()
    if (failed.length > 0) {
      exitSpace(machine, child)
      return { kind: '-ENOMEM' }
    }
  }
  return { kind: 'forked', child }
}

function copyBacking(backing: Backing): Backing {
  return backing.kind === 'file' ? { ...backing, pages: [...backing.pages] } : { ...backing }
}

function copyEntry(
  machine: Machine,
  child: AddressSpace,
  vma: Vma,
  vpn: number,
  entry: MappedEntry,
  pinned: (pfn: number) => boolean,
): 'set' | '-ENOMEM' {
  const copiedAtOnce = (pfn: number): boolean =>
    machine.kernel !== '2.6.31' && isCow(vma) && pageOf(machine, pfn).use === 'anonymous' && pinned(pfn)
  if (entry.kind === 'huge') {
    const head = normalHugePfn(machine, vma, vpn, entry)
    if (head !== null && copiedAtOnce(head)) {
      throw new RangeError(`page ${vpn}: fork of a pinned huge page, which splits it, is not modelled`)
    }
    if (isCow(vma)) entry.writable = false
    child.directory[vpn / HUGE_PAGES] = { ...entry }
    if (head === null) return 'set'
    getPage(machine, head, 'mapping')
    if (isCow(vma)) pageOf(machine, head).exclusive = false
    bookRss(machine, child, head, HUGE_PAGES)
    return 'set'
  }
  const { pte } = entry
  const own = normalPfn(machine, vma, vpn, pte)
  if (own !== null && copiedAtOnce(own)) {
    const allocated = allocatePage(machine, 'anonymous')
    if (allocated.kind === 'no-memory') return '-ENOMEM'
    copyFrame(machine, own, allocated.pfn)
    const copy = { pfn: allocated.pfn, special: false, writable: vma.write, dirty: true }
    if (setPte(machine, child, vpn, copy) === '-ENOMEM') {
      putPage(machine, allocated.pfn, 'owner')
      return '-ENOMEM'
    }
    becomeMapped(machine, child, allocated.pfn)
    return 'set'
  }
  const writable = pte.writable && !isCow(vma)
  if (setPte(machine, child, vpn, { ...pte, writable, dirty: false }) === '-ENOMEM') return '-ENOMEM'
  pte.writable = writable
  if (own !== null) {
    getPage(machine, own, 'mapping')
    if (isCow(vma)) pageOf(machine, own).exclusive = false
    bookRss(machine, child, own, 1)
  }
  return 'set'
}

/**
 * Changes the permission of all areas that lie in a range.
 * @throws RangeError if the range cuts an area.
 */
export function mprotect(
  machine: Machine,
  space: AddressSpace,
  first: number,
  pages: number,
  write: boolean,
  secondary: SecondaryMmus = NO_SECONDARY_MMUS,
): 'changed' | '-EACCES' {
  const end = first + pages
  const areas = space.vmas.filter((vma) => vma.first < end && first < vma.end)
  if (areas.some((vma) => vma.first < first || vma.end > end)) throw new RangeError('the range cuts an area')
  if (write && areas.some((vma) => !vma.mayWrite)) return '-EACCES'
  secondary.range(space.id, first, end, () => {
    for (const vma of areas) vma.write = write
    for (const [, entry] of entriesIn(machine, space, first, end)) {
      // Permission is taken at once and given on the next fault, which knows about copy-on-write.
      if (entry.kind === 'pte' && !write) entry.pte.writable = false
    }
  })
  return 'changed'
}

/**
 * Moves a whole area to other addresses; entries move with their references. Secondary MMUs hear of the old range.
 * @throws RangeError if `first` is not the start of an area, the new place is taken, or the area has huge entries.
 */
export function mremap(
  machine: Machine,
  space: AddressSpace,
  first: number,
  to: number,
  secondary: SecondaryMmus = NO_SECONDARY_MMUS,
): 'moved' | '-ENOMEM' {
  const vma = space.vmas.find((one) => one.first === first)
  if (vma === undefined) throw new RangeError(`no area starts at page ${first}`)
  const { end, backing, pgoff, ...flags } = vma
  const entries = entriesIn(machine, space, first, end)
  if (entries.some(([, { kind }]) => kind === 'huge')) throw new RangeError('an area with huge entries cannot move')
  const moved = mmap(space, { ...flags, first: to, pages: end - first, backing, pgoff })
  const state: { outcome: 'moved' | '-ENOMEM' } = { outcome: 'moved' }
  secondary.range(space.id, first, end, () => {
    for (const [vpn] of entries) {
      const pte = clearPte(machine, space, vpn) as Pte
      if (setPte(machine, space, vpn - first + to, pte) === 'set') continue
      state.outcome = '-ENOMEM'
      setPte(machine, space, vpn, pte)
      break
    }
    if (state.outcome === 'moved') return
    for (const [vpn] of entriesIn(machine, space, to, to + end - first)) {
      setPte(machine, space, vpn - to + first, clearPte(machine, space, vpn) as Pte)
    }
  })
  const dropped = state.outcome === 'moved' ? vma : moved
  space.vmas = space.vmas.filter((one) => one !== dropped)
  freeTables(machine, space, dropped.first, dropped.end)
  return state.outcome
}
