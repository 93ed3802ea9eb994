/**
 * vm_normal_page, and the functions that insert entries: which entry has a page descriptor behind it, and who counts
 * it.
 *
 * Source: mm/memory.c of 2.6.31 (facts only); commits 7e675137a8e1 for pte_special, 6857be5fecae for special huge
 * entries.
 */
import {
  type Context,
  frameOf,
  getPage,
  HUGE_PAGES,
  highestPfn,
  natural,
  pageOf,
  pfnValid,
  putPage,
  RuleViolation,
  requireRule,
} from './memory.ts'
import {
  type AddressSpace,
  directoryEntry,
  type HugeEntry,
  isCow,
  type Machine,
  type Pte,
  readPte,
  setPte,
  type Vma,
} from './space.ts'

// ---------------------------------------------------------------------------------------------------------------
// vm_normal_page

/** What is behind an entry: a page that may be accounted, nothing of the kind, or an entry that cannot be right. */
export type NormalPage =
  | { kind: 'page'; pfn: number }
  | { kind: 'none'; why: 'special' | 'mixed-without-descriptor' | 'linear-frame' | 'raw-frame' }
  | { kind: 'bad-pte'; why: 'special-in-ordinary-area' | 'beyond-last-descriptor' }

/**
 * Whether an entry has a page descriptor that the VM may touch.
 *
 * `context` matters only without pte_special and with a memory model that must sleep to answer pfn_valid. Callers hold
 * the page-table lock, so it is "atomic" for all but audits.
 * @throws RuleViolation "pfn-valid-sleeps" in that case.
 */
export function vmNormalPage(
  machine: Machine,
  vma: Vma,
  vpn: number,
  pte: Pte,
  context: Context = 'atomic',
): NormalPage {
  if (machine.pteSpecial) {
    if (pte.special) {
      return vma.pfnMap || vma.mixedMap
        ? { kind: 'none', why: 'special' }
        : { kind: 'bad-pte', why: 'special-in-ordinary-area' }
    }
    return checkedPage(machine, pte)
  }
  // MIXEDMAP first: a mixed area may hold frames that the linear rule of PFNMAP would take for raw ones. It skips the
  // check against the last descriptor, as 2.6.31 does: pfn_valid has answered already.
  if (vma.mixedMap) {
    return pfnValid(machine.memory, pte.pfn, context)
      ? { kind: 'page', pfn: pte.pfn }
      : { kind: 'none', why: 'mixed-without-descriptor' }
  }
  if (vma.pfnMap) {
    if (pte.pfn === vma.pgoff + (vpn - vma.first)) return { kind: 'none', why: 'linear-frame' }
    if (!isCow(vma)) return { kind: 'none', why: 'raw-frame' }
  }
  return checkedPage(machine, pte)
}

/**
 * vm_normal_page for a huge entry: the head of its pages, or none. Without the bit at this level an entry of a PFNMAP
 * area is taken for raw frames, because nothing else could be told from it.
 */
export function vmNormalHugePage(machine: Machine, vma: Vma, entry: HugeEntry): NormalPage {
  if (machine.hugeSpecial && entry.special) {
    return vma.pfnMap || vma.mixedMap
      ? { kind: 'none', why: 'special' }
      : { kind: 'bad-pte', why: 'special-in-ordinary-area' }
  }
  return vma.pfnMap ? { kind: 'none', why: 'raw-frame' } : checkedPage(machine, entry)
}

function checkedPage(machine: Machine, { pfn }: { readonly pfn: number }): NormalPage {
  return pfn > highestPfn(machine.memory) ? { kind: 'bad-pte', why: 'beyond-last-descriptor' } : { kind: 'page', pfn }
}

/** vmNormalPage() for actions: a bad entry is reported to the machine, and has no page. */
export function normalPfn(
  machine: Machine,
  vma: Vma,
  vpn: number,
  pte: Pte,
  classify: typeof vmNormalPage = vmNormalPage,
): number | null {
  const normal = classify(machine, vma, vpn, pte)
  if (normal.kind === 'bad-pte') machine.badPtes.push(`page ${vpn}: ${normal.why}`)
  return normal.kind === 'page' ? normal.pfn : null
}

// ---------------------------------------------------------------------------------------------------------------
// Inserting

export type InsertOutcome = 'inserted' | '-EFAULT' | '-EINVAL' | '-EBUSY' | '-ENOMEM'

/**
 * vm_insert_page: maps a page that somebody owns, and accounts it (reference, reverse map, rss). Marks the area as one
 * with inserted pages.
 *
 * -EFAULT: outside the area; -EINVAL: the page is free or anonymous; -EBUSY: something is mapped there; -ENOMEM.
 * On every error nothing has changed but the area's mark.
 * @throws RangeError if the frame has no descriptor: there is no page to insert.
 */
export function vmInsertPage(machine: Machine, space: AddressSpace, vma: Vma, vpn: number, pfn: number): InsertOutcome {
  const { page } = frameOf(machine, pfn)
  if (page === null) throw new RangeError(`frame ${pfn} has no page descriptor; insert it with vmInsertPfn()`)
  if (!inside(vma, vpn)) return '-EFAULT'
  if (page.count === 0) return '-EINVAL'
  vma.insertPage = true
  if (page.use === 'anonymous') return '-EINVAL'
  const outcome = insert(machine, space, vpn, { pfn, special: false, writable: directlyWritable(vma), dirty: false })
  if (outcome !== 'inserted') return outcome
  getPage(machine, pfn, 'mapping')
  space.rssFile++
  return 'inserted'
}

/**
 * vm_insert_pfn: maps a frame without accounting it.
 *
 * -EFAULT, -EBUSY, -ENOMEM as vmInsertPage(); -EINVAL: the frame's memory type conflicts with another mapping.
 * @throws RuleViolation "insert-pfn-area" unless the area is exactly one of PFNMAP and MIXEDMAP, PFNMAP not
 * copy-on-write, MIXEDMAP only for frames without descriptor: vmNormalPage() would later take the frame for a page.
 */
export function vmInsertPfn(machine: Machine, space: AddressSpace, vma: Vma, vpn: number, pfn: number): InsertOutcome {
  frameOf(machine, pfn)
  const fatal = (why: string): never => {
    throw new RuleViolation('insert-pfn-area', `frame ${pfn} at page ${vpn}: ${why}`)
  }
  if (vma.pfnMap === vma.mixedMap) fatal('the area must be one of PFNMAP and MIXEDMAP')
  if (vma.pfnMap && isCow(vma)) fatal('a PFNMAP area must not be copy-on-write')
  if (vma.mixedMap && pfnValid(machine.memory, pfn, 'may-sleep')) fatal('a MIXEDMAP area takes it as a page')
  if (!inside(vma, vpn)) return '-EFAULT'
  if (machine.conflictingPfns.includes(pfn)) return '-EINVAL'
  return insertSpecial(machine, space, vma, vpn, pfn)
}

/**
 * vm_insert_mixed: maps a frame into a MIXEDMAP area. With pte_special the entry is special and nothing is counted,
 * even for a frame with descriptor: the owner must keep the frame until it is unmapped. Without pte_special a frame
 * with descriptor is inserted as vmInsertPage() does.
 * @throws RuleViolation "insert-mixed-area" if the area is not MIXEDMAP.
 */
export function vmInsertMixed(
  machine: Machine,
  space: AddressSpace,
  vma: Vma,
  vpn: number,
  pfn: number,
): InsertOutcome {
  frameOf(machine, pfn)
  requireRule(vma.mixedMap, 'insert-mixed-area', `the area of page ${vpn} is not MIXEDMAP`)
  if (!inside(vma, vpn)) return '-EFAULT'
  if (!machine.pteSpecial && pfnValid(machine.memory, pfn, 'may-sleep')) {
    return vmInsertPage(machine, space, vma, vpn, pfn)
  }
  return insertSpecial(machine, space, vma, vpn, pfn)
}

/**
 * remap_pfn_range: maps adjacent frames into an area, which becomes PFNMAP. A copy-on-write area has to be covered
 * completely (-EINVAL otherwise) and remembers its first frame number as pgoff, so that copies can be told from frames.
 * @throws RuleViolation "remap-occupied" if something is mapped there already.
 */
export function remapPfnRange(
  machine: Machine,
  space: AddressSpace,
  vma: Vma,
  vpn: number,
  pfn: number,
  pages: number,
): 'mapped' | '-EFAULT' | '-EINVAL' | '-ENOMEM' {
  frameOf(machine, pfn + natural('pages', pages, 1) - 1)
  if (!inside(vma, vpn) || !inside(vma, vpn + pages - 1)) return '-EFAULT'
  if (isCow(vma)) {
    if (vpn !== vma.first || pages !== vma.end - vma.first) return '-EINVAL'
    vma.pgoff = pfn
  }
  vma.pfnMap = true
  vma.io = true
  for (let i = 0; i < pages; i++) {
    requireRule(readPte(machine, space, vpn + i) === null, 'remap-occupied', `page ${vpn + i} is mapped already`)
    if (insertSpecial(machine, space, vma, vpn + i, pfn + i) === '-ENOMEM') return '-ENOMEM'
  }
  return 'mapped'
}

/**
 * Maps a compound page of 512 pages by one huge entry, accounted once, on the head. Both addresses must be aligned.
 * @throws RangeError if they are not, or the frame is not the head of a compound page.
 */
export function mapHuge(machine: Machine, space: AddressSpace, vma: Vma, vpn: number, pfn: number): InsertOutcome {
  if (vpn % HUGE_PAGES !== 0) throw new RangeError(`page ${vpn} is not aligned to ${HUGE_PAGES} pages`)
  if (pfn % HUGE_PAGES !== 0 || pageOf(machine, pfn + 1).head !== pfn) {
    throw new RangeError(`frame ${pfn} is not the head of a huge page`)
  }
  if (!inside(vma, vpn) || !inside(vma, vpn + HUGE_PAGES - 1)) return '-EFAULT'
  if (directoryEntry(space, vpn) !== undefined) return '-EBUSY'
  getPage(machine, pfn, 'mapping')
  space.directory[vpn / HUGE_PAGES] = {
    kind: 'huge',
    pfn,
    special: false,
    writable: directlyWritable(vma),
    dirty: false,
  }
  bookRss(machine, space, pfn, HUGE_PAGES)
  return 'inserted'
}

/**
 * Maps 512 frames, with or without descriptors, by one special huge entry (vmf_insert_pfn_pmd of 2024). Nothing is
 * counted. Both addresses must be aligned.
 * @throws RangeError if they are not, or the machine has no special bit in huge entries.
 * @throws RuleViolation "insert-pfn-area" unless the area is PFNMAP and not copy-on-write.
 */
export function vmInsertHugePfn(
  machine: Machine,
  space: AddressSpace,
  vma: Vma,
  vpn: number,
  pfn: number,
): InsertOutcome {
  if (!machine.hugeSpecial) throw new RangeError('huge entries of this machine have no special bit')
  if (vpn % HUGE_PAGES !== 0 || pfn % HUGE_PAGES !== 0) {
    throw new RangeError(`page ${vpn} and frame ${pfn} must be aligned to ${HUGE_PAGES} pages`)
  }
  frameOf(machine, pfn + HUGE_PAGES - 1)
  requireRule(vma.pfnMap && !isCow(vma), 'insert-pfn-area', `the area of page ${vpn} must be PFNMAP and not copied`)
  if (!inside(vma, vpn) || !inside(vma, vpn + HUGE_PAGES - 1)) return '-EFAULT'
  if (directoryEntry(space, vpn) !== undefined) return '-EBUSY'
  const writable = directlyWritable(vma)
  space.directory[vpn / HUGE_PAGES] = { kind: 'huge', pfn, special: true, writable, dirty: false }
  return 'inserted'
}

function inside(vma: Vma, vpn: number): boolean {
  return vpn >= vma.first && vpn < vma.end
}

/** Private areas map everything read-only at first, so that the first store makes a copy. */
export function directlyWritable(vma: Vma): boolean {
  return vma.write && vma.shared
}

function insertSpecial(machine: Machine, space: AddressSpace, vma: Vma, vpn: number, pfn: number): InsertOutcome {
  return insert(machine, space, vpn, {
    pfn,
    special: machine.pteSpecial,
    writable: directlyWritable(vma),
    dirty: false,
  })
}

function insert(machine: Machine, space: AddressSpace, vpn: number, pte: Pte): InsertOutcome {
  const entry = directoryEntry(space, vpn)
  if (entry?.kind === 'huge' || readPte(machine, space, vpn) !== null) return '-EBUSY'
  return setPte(machine, space, vpn, pte) === 'set' ? 'inserted' : '-ENOMEM'
}

/** Adds pages to the rss of a space, or takes them from it: those of the kind that the frame's page is. */
export function bookRss(machine: Machine, space: AddressSpace, pfn: number, pages: number): void {
  if (pageOf(machine, pfn).use === 'anonymous') space.rssAnon += pages
  else space.rssFile += pages
}

/** Takes a page that an entry mapped out of the accounts of its space, and gives the entry's reference back. */
export function dropMapped(machine: Machine, space: AddressSpace, pfn: number): 'still-used' | 'freed' {
  bookRss(machine, space, pfn, -1)
  return putPage(machine, pfn, 'mapping')
}
