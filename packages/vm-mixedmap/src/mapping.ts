/**
 * Address spaces, areas (vmas) and page tables: which entry has a page descriptor behind it, how entries come and go,
 * and who counts.
 *
 * Addresses are virtual page numbers (vpn, units of 4 KiB). A page table has two levels: a directory whose entries are
 * tables of 512 entries, or huge entries that map 512 pages (2 MiB).
 *
 * Invariants: an entry that vmNormalPage() calls a page holds one reference and one mapcount on it, and one unit of the
 * space's rss; any other entry holds nothing. auditMachine() checks this for a whole machine.
 *
 * Every function here is one atomic action of a kernel (what happens under the page-table lock), or a sequence of such
 * actions run by itself; the scenarios of @tmem/mmu-notifier take the sequences apart.
 *
 * When a store to a private page may write in place, and what fork does with a pinned page, has changed twice since. A
 * machine keeps the rule of one kernel (CowKernel): the rules are mixed in none.
 *
 * Source: mm/memory.c, mm/mremap.c, mm/mprotect.c of 2.6.31 (facts only); commit 7e675137a8e1 for pte_special; commits
 * 09854ba94c6a, 70e806e4e645 and 6c287605fd56 for the later rules of copy-on-write; 6857be5fecae for special huge entries.
 */
import { checkOptions } from '@tmem/core'
import {
  allocatePage,
  type Context,
  createFrames,
  type Frame,
  frameOf,
  getPage,
  HUGE_PAGES,
  handOver,
  highestPfn,
  leaveSwapCache,
  type MemoryModel,
  natural,
  pageOf,
  pfnValid,
  putPage,
  RuleViolation,
  requireRule,
} from './memory.ts'

/** A 4 KiB entry that is present. */
export interface Pte {
  pfn: number
  /** The software bit that says: there is no page to account. Always false without pte_special. */
  special: boolean
  writable: boolean
  dirty: boolean
}

export interface PageTable {
  /** False once it was freed; walking it then is a bug. */
  live: boolean
  /** Entries by slot, 0 to 511. A slot without an entry is empty. */
  entries: Record<string, Pte>
}

/** An entry of the directory. A huge entry is special only where the machine has the bit (`hugeSpecial`). */
export type DirectoryEntry = { kind: 'table'; table: number } | HugeEntry

/** An entry that maps 512 pages. */
export interface HugeEntry {
  kind: 'huge'
  pfn: number
  /** There are no pages to account. */
  special: boolean
  writable: boolean
  dirty: boolean
}

/**
 * Whose rule of copy-on-write a machine keeps.
 * - 2.6.31: a store writes in place if the page has one user by mapcount and swap entries; references of get_user_pages
 *   are not looked at, and fork shares pinned pages like any other.
 * - 5.9: it writes in place if the page has one reference, of whatever kind; fork copies a pinned page at once.
 *   (5.11 added the sequence that a lockless pin checks: gup-pin-checks-the-fork-sequence in @tmem/mmu-notifier.)
 * - 5.19: it writes in place if the page is marked exclusive, or has one reference, which marks it. Fork takes the mark
 *   away, but copies a pinned page at once; whoever pins an anonymous page for reading gives it the mark first.
 */
export type CowKernel = '2.6.31' | '5.9' | '5.19'

/**
 * What stands behind an area, and answers its faults. `file`: pages of the page cache by their offset in the file;
 * beyond them is its end.
 */
export type Backing =
  | { kind: 'anonymous' }
  | { kind: 'device' }
  | { kind: 'xip'; file: number }
  | { kind: 'file'; pages: number[] }

export interface VmaFlags {
  write: boolean
  /** May be made writable (VM_MAYWRITE). */
  mayWrite: boolean
  shared: boolean
  pfnMap: boolean
  mixedMap: boolean
  /** Set by vmInsertPage(). */
  insertPage: boolean
  /** Set by remapPfnRange(). */
  io: boolean
}

/** An area of an address space: pages first to end - 1. */
export interface Vma extends VmaFlags {
  first: number
  end: number
  /** Page offset in the file; for a copy-on-write area of remapPfnRange() its first frame number. */
  pgoff: number
  backing: Backing
}

export interface AddressSpace {
  id: number
  vmas: Vma[]
  directory: Record<string, DirectoryEntry>
  rssFile: number
  rssAnon: number
}

export interface Machine {
  /** Whether the architecture has the special bit in its entries (x86, s390, powerpc in 2.6.31). */
  readonly pteSpecial: boolean
  /** Whether huge entries have the bit as well: some architectures, kernels of 2024 and later. */
  readonly hugeSpecial: boolean
  readonly kernel: CowKernel
  memory: MemoryModel
  frames: Frame[]
  tables: PageTable[]
  /** Live page tables that can exist; the next one fails with -ENOMEM. */
  maxTables: number
  /** Frames whose memory type conflicts with another mapping: inserting them fails with -EINVAL. */
  conflictingPfns: number[]
  spaces: AddressSpace[]
  /** Reports of entries that cannot be right. */
  badPtes: string[]
}

export interface MachineOptions {
  readonly memory: MemoryModel
  /** Physical frames, at least as many as have descriptors. */
  readonly frames: number
  readonly pteSpecial: boolean
  /** Default false. */
  readonly hugeSpecial?: boolean
  /** Default "2.6.31". */
  readonly kernel?: CowKernel
  /** Default 64. */
  readonly maxTables?: number
}

/**
 * @throws RangeError if the memory model has descriptors for frames that do not exist, or huge entries have a bit that
 * small ones do not have.
 */
export function createMachine(options: MachineOptions): Machine {
  checkOptions('createMachine', options, {
    memory: 'object',
    frames: 'number',
    pteSpecial: 'flag',
    hugeSpecial: 'flag?',
    kernel: 'text?',
    maxTables: 'number?',
  })
  const { memory, frames, pteSpecial, hugeSpecial = false, kernel = '2.6.31', maxTables = 64 } = options
  if (hugeSpecial && !pteSpecial) throw new RangeError('hugeSpecial needs pteSpecial')
  if (highestPfn(memory) >= frames) throw new RangeError(`descriptors for frames beyond the last one, ${frames - 1}`)
  return {
    pteSpecial,
    hugeSpecial,
    kernel,
    memory,
    frames: createFrames(memory, frames),
    tables: [],
    maxTables: natural('maxTables', maxTables),
    conflictingPfns: [],
    spaces: [],
    badPtes: [],
  }
}

export function createSpace(machine: Machine): AddressSpace {
  const space: AddressSpace = { id: machine.spaces.length, vmas: [], directory: {}, rssFile: 0, rssAnon: 0 }
  machine.spaces.push(space)
  return space
}

/** @throws RangeError if there is no such space. */
export function spaceOf(machine: Machine, id: number): AddressSpace {
  const space = machine.spaces[id]
  if (space === undefined) throw new RangeError(`there is no address space ${id}`)
  return space
}

/** An area to make; what is left out is false, pgoff 0. `mayWrite` follows `write` unless given. */
export interface VmaSpec extends Partial<VmaFlags> {
  readonly first: number
  readonly pages: number
  readonly pgoff?: number
  readonly backing: Backing
}

/** Adds an area. @throws RangeError if it is empty or overlaps another one. */
export function mmap(space: AddressSpace, spec: VmaSpec): Vma {
  const { first, pages, pgoff = 0, backing, ...flags } = spec
  natural('first', first)
  natural('pages', pages, 1)
  const end = first + pages
  if (space.vmas.some((vma) => first < vma.end && vma.first < end)) {
    throw new RangeError(`pages ${first} to ${end - 1} overlap another area of space ${space.id}`)
  }
  const vma: Vma = {
    first,
    end,
    pgoff: natural('pgoff', pgoff),
    backing,
    write: false,
    mayWrite: flags.write ?? false,
    shared: false,
    pfnMap: false,
    mixedMap: false,
    insertPage: false,
    io: false,
    ...flags,
  }
  space.vmas.push(vma)
  space.vmas.sort((a, b) => a.first - b.first)
  return vma
}

/** The area that holds a page, or undefined for an address outside all areas. */
export function findVma(space: AddressSpace, vpn: number): Vma | undefined {
  return space.vmas.find((vma) => vpn >= vma.first && vpn < vma.end)
}

/** A copy-on-write mapping: may be made writable, and is not shared. */
export function isCow(vma: Vma): boolean {
  return vma.mayWrite && !vma.shared
}

/** The page offset in the file behind an area's page. */
export function offsetOf(vma: Vma, vpn: number): number {
  return vma.pgoff + vpn - vma.first
}

// ---------------------------------------------------------------------------------------------------------------
// Entries

/** The directory entry over a page, or undefined. */
export function directoryEntry(space: AddressSpace, vpn: number): DirectoryEntry | undefined {
  return space.directory[Math.floor(vpn / HUGE_PAGES)]
}

/**
 * The entry of a page in a certain table; null if it is empty.
 * @throws RuleViolation "freed-table" if the table was freed.
 */
export function readTable(machine: Machine, table: number, vpn: number): Pte | null {
  const found = machine.tables[table]
  requireRule(found?.live === true, 'freed-table', `table ${table} is walked after it was freed`)
  return found?.entries[vpn % HUGE_PAGES] ?? null
}

/** The 4 KiB entry of a page; null if it is empty or part of a huge entry. */
export function readPte(machine: Machine, space: AddressSpace, vpn: number): Pte | null {
  const entry = directoryEntry(space, vpn)
  return entry?.kind === 'table' ? readTable(machine, entry.table, vpn) : null
}

/** Writes an entry, allocating a table if needed. Accounts nothing. */
export function setPte(machine: Machine, space: AddressSpace, vpn: number, pte: Pte): 'set' | '-ENOMEM' {
  let entry = directoryEntry(space, vpn)
  if (entry === undefined) {
    if (machine.tables.filter(({ live }) => live).length >= machine.maxTables) return '-ENOMEM'
    entry = { kind: 'table', table: machine.tables.length }
    machine.tables.push({ live: true, entries: {} })
    space.directory[Math.floor(vpn / HUGE_PAGES)] = entry
  }
  if (entry.kind === 'huge') throw new RangeError(`page ${vpn} is mapped by a huge entry`)
  const table = machine.tables[entry.table] as PageTable
  table.entries[vpn % HUGE_PAGES] = pte
  return 'set'
}

/** Empties an entry and says what was there. Accounts nothing. */
export function clearPte(machine: Machine, space: AddressSpace, vpn: number): Pte | null {
  const pte = readPte(machine, space, vpn)
  const entry = directoryEntry(space, vpn)
  if (entry?.kind === 'table') delete machine.tables[entry.table]?.entries[vpn % HUGE_PAGES]
  return pte
}

/** Frees the tables over pages first to end - 1 that are empty. A kernel waits for lockless walkers first (gup.ts). */
export function freeTables(machine: Machine, space: AddressSpace, first: number, end: number): void {
  for (let vpn = first; vpn < end; vpn = (Math.floor(vpn / HUGE_PAGES) + 1) * HUGE_PAGES) {
    const entry = directoryEntry(space, vpn)
    if (entry?.kind !== 'table') continue
    const table = machine.tables[entry.table] as PageTable
    if (Object.keys(table.entries).length > 0) continue
    table.live = false
    delete space.directory[Math.floor(vpn / HUGE_PAGES)]
  }
}

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
function directlyWritable(vma: Vma): boolean {
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

function bookRss(machine: Machine, space: AddressSpace, pfn: number, pages: number): void {
  if (pageOf(machine, pfn).use === 'anonymous') space.rssAnon += pages
  else space.rssFile += pages
}

/** Takes a page that an entry mapped out of the accounts of its space, and gives the entry's reference back. */
export function dropMapped(machine: Machine, space: AddressSpace, pfn: number): 'still-used' | 'freed' {
  bookRss(machine, space, pfn, -1)
  return putPage(machine, pfn, 'mapping')
}

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
function becomeMapped(machine: Machine, space: AddressSpace, pfn: number): void {
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

// ---------------------------------------------------------------------------------------------------------------
// Whole ranges

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
function entriesIn(
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

// ---------------------------------------------------------------------------------------------------------------
// The balance

/**
 * Everything that does not add up in a machine; empty when all is well. References are owners + pins + mapcount;
 * mapcount is the number of entries that map the page; rss is what the entries of a space map.
 */
export function auditMachine(machine: Machine): string[] {
  const problems: string[] = []
  const mapped = new Map<number, number>()
  for (const space of machine.spaces) {
    const rss = { anonymous: 0, file: 0 }
    const count = (pfn: number, pages: number): void => {
      mapped.set(pfn, (mapped.get(pfn) ?? 0) + 1)
      rss[pageOf(machine, pfn).use === 'anonymous' ? 'anonymous' : 'file'] += pages
    }
    for (const [vpn, entry] of entriesIn(machine, space, 0, Number.MAX_SAFE_INTEGER)) {
      const vma = findVma(space, vpn)
      if (vma === undefined) problems.push(`space ${space.id}: page ${vpn} is mapped outside all areas`)
      else if (entry.kind === 'huge') {
        const normal = vmNormalHugePage(machine, vma, entry)
        if (normal.kind === 'page') count(normal.pfn, HUGE_PAGES)
      } else {
        const normal = vmNormalPage(machine, vma, vpn, entry.pte, 'may-sleep')
        if (normal.kind === 'page') count(normal.pfn, 1)
      }
    }
    if (rss.anonymous !== space.rssAnon)
      problems.push(`space ${space.id}: rssAnon ${space.rssAnon}, not ${rss.anonymous}`)
    if (rss.file !== space.rssFile) problems.push(`space ${space.id}: rssFile ${space.rssFile}, not ${rss.file}`)
  }
  machine.frames.forEach(({ page }, pfn) => {
    if (page === null) return
    const expected = mapped.get(pfn) ?? 0
    if (page.mapcount !== expected) problems.push(`frame ${pfn}: mapcount ${page.mapcount}, mapped ${expected} times`)
    const sum = page.owners + page.pins + page.mapcount
    if (page.exclusive && page.mapcount > 1) problems.push(`frame ${pfn}: exclusive, and mapped ${expected} times`)
    if (page.count !== sum) problems.push(`frame ${pfn}: count ${page.count}, held ${sum} times`)
    if (page.head === pfn && (page.use === 'free') !== (page.count === 0)) {
      problems.push(`frame ${pfn}: ${page.use} with count ${page.count}`)
    }
  })
  return [...problems, ...machine.badPtes.map((text) => `bad pte: ${text}`)]
}
