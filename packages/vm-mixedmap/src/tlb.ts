/**
 * Processors with translations of their own (TLBs), and what keeps them in step with the page tables: the flush, the
 * page-table lock, the lock of the address space (mmap_lock, mmap_sem before 5.8), and the gathering of pages that are
 * freed after the flush.
 *
 * A processor that has used a translation goes on using it until it is flushed, whatever the tables say. So between
 * making an entry weaker and the end of the flush nobody may act on the new entry (free, copy or reuse the page),
 * unless a lock keeps him out or he completes the flush first.
 *
 * Invariants: a processor reaches no free page (access() throws); a gathered page has the gather's reference until it
 * is freed; mmap_lock has one writer or any number of readers.
 *
 * All state is plain data. A flush is one step here: a processor answers it at once, because none has its interrupts
 * off; gup.ts has those.
 *
 * Source: mm/memory.c, include/asm-generic/tlb.h, mm/mremap.c, mm/mprotect.c of 2.6.31; mm/userfaultfd.c of 5.9;
 * include/linux/mm_types.h (mm_tlb_flush_pending) of 4.14 and later.
 */
import type { Access } from './fault.ts'
import { frameOf, handOver, putPage, RuleViolation, requireRule } from './memory.ts'
import { normalPfn } from './normal.ts'
import { clearPte, findVma, type Machine, readPte, spaceOf } from './space.ts'

/** A translation that a processor has used and keeps. */
export interface TlbEntry {
  pfn: number
  writable: boolean
}

export interface Processor {
  /** The address space it runs in. */
  space: number
  /** By virtual page number. */
  tlb: Record<string, TlbEntry>
}

/** The locks of one address space, and its flushes. Same index as the machine's spaces. */
export interface MmSync {
  /** Who holds mmap_lock for reading. */
  readers: string[]
  /** Who holds it for writing; "" for nobody. */
  writer: string
  /** Who holds the page-table lock (one for all tables); "" for nobody. */
  pageTable: string
  /** Changes whose flush is still to come (mm_tlb_flush_pending). */
  flushPending: number
}

export interface TlbWorld {
  machine: Machine
  processors: Processor[]
  mms: MmSync[]
}

/** Processors without translations, each running in the space given, and free locks for all spaces of the machine. */
export function createTlbWorld(machine: Machine, runningIn: readonly number[]): TlbWorld {
  return {
    machine,
    processors: runningIn.map((space) => ({ space: spaceOf(machine, space).id, tlb: {} })),
    mms: machine.spaces.map(() => ({ readers: [], writer: '', pageTable: '', flushPending: 0 })),
  }
}

/** @throws RangeError if there is no such space. */
export function syncOf({ mms }: TlbWorld, space: number): MmSync {
  const found = mms[space]
  if (found === undefined) throw new RangeError(`there is no address space ${space}`)
  return found
}

/**
 * The frame that a processor reaches: through the translation that it has, if that allows the access, else through the
 * tables, and then it keeps what it found. null: it would fault.
 * @throws RuleViolation "use-after-free" if it reaches a free page.
 */
export function access(world: TlbWorld, processor: number, vpn: number, kind: Access): number | null {
  const cpu = world.processors[processor]
  if (cpu === undefined) throw new RangeError(`there is no processor ${processor}`)
  const allows = (entry: TlbEntry | null): entry is TlbEntry => entry !== null && (kind === 'read' || entry.writable)
  const kept = cpu.tlb[vpn] ?? null
  const found = allows(kept) ? kept : readPte(world.machine, spaceOf(world.machine, cpu.space), vpn)
  if (!allows(found)) return null
  const { pfn, writable } = found
  cpu.tlb[vpn] = { pfn, writable }
  if (frameOf(world.machine, pfn).page?.count === 0) {
    throw new RuleViolation('use-after-free', `processor ${processor} ${kind}s frame ${pfn}, which is free`)
  }
  return pfn
}

/** A load: what the page holds, or null for a fault. */
export function load(world: TlbWorld, processor: number, vpn: number): number | null {
  const pfn = access(world, processor, vpn, 'read')
  return pfn === null ? null : frameOf(world.machine, pfn).content
}

/** A store to a page. */
export function store(world: TlbWorld, processor: number, vpn: number, value: number): 'stored' | 'fault' {
  const pfn = access(world, processor, vpn, 'write')
  if (pfn === null) return 'fault'
  frameOf(world.machine, pfn).content = value
  return 'stored'
}

/** Whether a store would find a translation that allows it. Changes nothing. */
export function mayStore({ machine, processors }: Readonly<TlbWorld>, processor: number, vpn: number): boolean {
  const cpu = processors[processor]
  if (cpu === undefined) return false
  return cpu.tlb[vpn]?.writable === true || readPte(machine, spaceOf(machine, cpu.space), vpn)?.writable === true
}

/** Flushes pages first to end - 1 from all processors that run in a space; they have answered when it returns. */
export function flushTlb({ processors }: TlbWorld, space: number, first: number, end: number): void {
  for (const cpu of processors) {
    if (cpu.space !== space) continue
    for (const vpn of Object.keys(cpu.tlb).map(Number)) if (vpn >= first && vpn < end) delete cpu.tlb[vpn]
  }
}

/**
 * Unmaps a page into a gather: the entry and its mapcount go at once, the reference stays until freeGathered(), which
 * has to come after the flush. Call it under the page-table lock.
 */
export function gather(world: TlbWorld, space: number, vpn: number, pages: number[]): void {
  const { machine } = world
  const owner = spaceOf(machine, space)
  const vma = findVma(owner, vpn)
  const pte = clearPte(machine, owner, vpn)
  if (pte === null || vma === undefined) return
  const pfn = normalPfn(machine, vma, vpn, pte)
  if (pfn === null) return
  handOver(machine, pfn, 'mapping', 'owner')
  if (frameOf(machine, pfn).page?.use === 'anonymous') owner.rssAnon--
  else owner.rssFile--
  pages.push(pfn)
}

/** Gives the references of a gather back. */
export function freeGathered({ machine }: TlbWorld, pages: number[]): void {
  for (const pfn of pages.splice(0)) putPage(machine, pfn, 'owner')
}

/** Whether mmap_lock can be taken: for reading with other readers, for writing alone. */
export function mmapLockFree(world: Readonly<TlbWorld>, space: number, how: 'read' | 'write'): boolean {
  const { readers, writer } = world.mms[space] as MmSync
  return writer === '' && (how === 'read' || readers.length === 0)
}

/** Takes mmap_lock, which must be free for it. */
export function takeMmapLock(world: TlbWorld, space: number, how: 'read' | 'write', who: string): void {
  if (!mmapLockFree(world, space, how)) throw new RangeError(`mmap_lock of space ${space} is not free`)
  const sync = syncOf(world, space)
  if (how === 'write') sync.writer = who
  else sync.readers = [...sync.readers, who].toSorted()
}

/** Gives mmap_lock back. @throws RuleViolation "lock-holder" if it is somebody else's. */
export function dropMmapLock(world: TlbWorld, space: number, how: 'read' | 'write', who: string): void {
  const sync = syncOf(world, space)
  const holds = how === 'write' ? sync.writer === who : sync.readers.includes(who)
  requireRule(holds, 'lock-holder', `${who} gives back mmap_lock (${how}), which it does not hold`)
  if (how === 'write') sync.writer = ''
  else sync.readers = sync.readers.filter((one) => one !== who)
}
