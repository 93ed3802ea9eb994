/**
 * Machines, address spaces, areas (vmas) and the entries of page tables.
 *
 * Addresses are virtual page numbers (vpn, units of 4 KiB). A page table has two levels: a directory whose entries are
 * tables of 512 entries, or huge entries that map 512 pages (2 MiB).
 *
 * Invariants, here and in the files beside it: an entry that vmNormalPage() calls a page holds one reference and one
 * mapcount on it, and one unit of the space's rss; any other entry holds nothing. auditMachine() checks this for a
 * whole machine.
 *
 * Every function is one atomic action of a kernel (what happens under the page-table lock), or a sequence of such
 * actions run by itself; the scenarios of @tmem/mmu-notifier take the sequences apart.
 *
 * When a store to a private page may write in place, and what fork does with a pinned page, has changed twice since
 * 2.6.31. A machine keeps the rule of one kernel (CowKernel): the rules are mixed in none.
 *
 * Source: mm/memory.c of 2.6.31 (facts only); the files beside this one name their own.
 */
import { checkOptions } from '@tmem/core'
import { createFrames, type Frame, HUGE_PAGES, highestPfn, type MemoryModel, natural, requireRule } from './memory.ts'

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
