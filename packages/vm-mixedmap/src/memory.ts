/**
 * Physical memory: frames with and without a page descriptor, and the models that say which are which.
 *
 * A frame is 4 KiB of memory, named by its frame number (pfn, from 0). A page descriptor (struct page) holds the
 * reference count and the number of page-table entries that map the frame; memory that is not managed by the kernel
 * (a device, a flash chip, a segment shared by virtual machines) can be mapped without having descriptors at all.
 * What a frame holds is modelled as two small numbers: what its first part and what its tail says.
 *
 * Invariants, checked by auditMachine() of balance.ts: count = owners + pins + mapcount for every page; a page in use
 * "free" has count 0; mapcount is the number of entries that map it.
 *
 * All state is plain data (no classes, no functions), so that it can be copied, compared and explored.
 *
 * Source: include/linux/mm.h, mm/sparse.c, arch/s390/mm/vmem.c of 2.6.31; mail "VM_MIXEDMAP, pte_special, xip work",
 * N. Piggin, 12 March 2008.
 */

/** Bytes of a page and of a frame. */
export const PAGE_BYTES = 4096

/** Pages that one huge entry (2 MiB) maps. */
export const HUGE_PAGES = 512

/**
 * A rule of the modelled system was broken: what a kernel would answer with BUG or with corrupted memory. The explorer
 * of @tmem/interleave recognises it by its name and `rule`.
 */
export class RuleViolation extends Error {
  override readonly name = 'RuleViolation'
  /** Which rule: a short stable name. */
  readonly rule: string
  constructor(rule: string, message: string) {
    super(message)
    this.rule = rule
  }
}

/** Throws a RuleViolation unless the condition holds. */
export function requireRule(condition: boolean, rule: string, message: string): void {
  if (!condition) throw new RuleViolation(rule, message)
}

/**
 * Which frames have a descriptor.
 * - flat: all frames from 0 to `frames` - 1.
 * - sparse: whole sections of `sectionFrames` frames, those marked present.
 * - extents: a list of extents that come and go at run time; the list is under a mutex, so asking may sleep (s390).
 */
export type MemoryModel =
  | { kind: 'flat'; frames: number }
  | { kind: 'sparse'; sectionFrames: number; present: boolean[] }
  | { kind: 'extents'; extents: Extent[] }

export interface Extent {
  first: number
  frames: number
}

/** Whether the caller may sleep: not under a spinlock (page-table lock) and not with interrupts off. */
export type Context = 'may-sleep' | 'atomic'

export type PageUse = 'free' | 'anonymous' | 'file' | 'reserved'

/** The page descriptor of a frame. */
export interface Page {
  /** References: owners + pins + mapcount. */
  count: number
  /** Page-table entries that map the page and are accounted. */
  mapcount: number
  /** References of whoever put the page there (a file, a driver, an allocation not mapped yet). */
  owners: number
  /** References taken by get_user_pages. Short looks and long pins (FOLL_PIN) are not told apart. */
  pins: number
  use: PageUse
  /** The page is mapped by one entry only, and may be written there (PG_anon_exclusive; kernels from 5.19). */
  exclusive: boolean
  /** Not null: the page is in the swap cache, which is one of its owners. */
  swap: SwapCache | null
  /** Frame number of the first page of the compound page; a single page names itself. */
  head: number
}

/** What the swap cache knows of a page. */
export interface SwapCache {
  /** Swap entries in page tables that stand for this page. */
  slots: number
  /** The page is being written out, so it cannot leave the cache. */
  writeback: boolean
}

export interface Frame {
  /** null: memory without a descriptor. */
  page: Page | null
  /** Stands for the bytes of the frame. */
  content: number
  /** Stands for the bytes after the end of a file that ends inside the page. */
  tail: number
}

/**
 * pfn_valid: whether a descriptor exists, and counting references on it is safe.
 * @throws RuleViolation "pfn-valid-sleeps" when the memory model has to take a mutex and the caller may not sleep.
 */
export function pfnValid(memory: MemoryModel, pfn: number, context: Context): boolean {
  switch (memory.kind) {
    case 'flat':
      return pfn >= 0 && pfn < memory.frames
    case 'sparse':
      return pfn >= 0 && memory.present[Math.floor(pfn / memory.sectionFrames)] === true
    case 'extents':
      requireRule(context === 'may-sleep', 'pfn-valid-sleeps', `pfn_valid(${pfn}) takes a mutex under a spinlock`)
      return memory.extents.some(({ first, frames }) => pfn >= first && pfn < first + frames)
  }
}

/** The last frame with a descriptor, -1 if there is none. A kernel keeps this number; no lock is needed to read it. */
export function highestPfn(memory: MemoryModel): number {
  switch (memory.kind) {
    case 'flat':
      return memory.frames - 1
    case 'sparse':
      return (memory.present.lastIndexOf(true) + 1) * memory.sectionFrames - 1
    case 'extents':
      return Math.max(-1, ...memory.extents.map(({ first, frames }) => first + frames - 1))
  }
}

/** Physical frames 0 to `frames` - 1, all free, content 0. Those the memory model covers have a descriptor. */
export function createFrames(memory: MemoryModel, frames: number): Frame[] {
  natural('frames', frames)
  return Array.from({ length: frames }, (_, pfn) => ({
    page: pfnValid(memory, pfn, 'may-sleep') ? freePage(pfn) : null,
    content: 0,
    tail: 0,
  }))
}

/** Where frames are kept. */
export interface HasFrames {
  memory: MemoryModel
  frames: Frame[]
}

/**
 * Attaches a memory segment with descriptors for its frames (s390: a segment of the hypervisor). Needs the "extents"
 * memory model. Changes the list, so a kernel calls it with the mutex held.
 * @throws RangeError for another memory model or frames that do not exist.
 */
export function attachSegment(memory: HasFrames, first: number, frames: number): void {
  const extents = extentsOf(memory)
  for (let pfn = first; pfn < first + frames; pfn++) frameOf(memory, pfn).page ??= freePage(pfn)
  extents.push({ first, frames })
}

/**
 * Detaches a segment that attachSegment() attached.
 * @throws RangeError if there is none at `first`.
 * @throws RuleViolation "use-after-free" if one of its pages is still referenced.
 */
export function detachSegment(memory: HasFrames, first: number): void {
  const extents = extentsOf(memory)
  const index = extents.findIndex((extent) => extent.first === first)
  const extent = extents[index]
  if (extent === undefined) throw new RangeError(`no segment is attached at frame ${first}`)
  for (let pfn = first; pfn < first + extent.frames; pfn++) {
    const frame = frameOf(memory, pfn)
    requireRule(frame.page?.count === 0, 'use-after-free', `frame ${pfn} is detached with references`)
    frame.page = null
  }
  extents.splice(index, 1)
}

function extentsOf({ memory }: HasFrames): Extent[] {
  if (memory.kind !== 'extents') throw new RangeError(`memory model "${memory.kind}" has no segments`)
  return memory.extents
}

function freePage(pfn: number): Page {
  return { count: 0, mapcount: 0, owners: 0, pins: 0, use: 'free', exclusive: false, swap: null, head: pfn }
}

/** @throws RangeError if there is no such frame. */
export function frameOf({ frames }: HasFrames, pfn: number): Frame {
  const frame = frames[pfn]
  if (frame === undefined) throw new RangeError(`there is no frame ${pfn}; the last one is ${frames.length - 1}`)
  return frame
}

/**
 * The descriptor of a frame.
 * @throws RuleViolation "no-descriptor" if it has none: a kernel would compute an address inside no array.
 */
export function pageOf(memory: HasFrames, pfn: number): Page {
  const page = memory.frames[pfn]?.page ?? null
  if (page === null) throw new RuleViolation('no-descriptor', `frame ${pfn} has no page descriptor`)
  return page
}

/** Which reference: an owner's, a pin's, or that of a page-table entry (which is also counted in mapcount). */
export type Holder = 'owner' | 'pin' | 'mapping'

/** A free page that somebody got, or that there is none. */
export type Allocation = { kind: 'page'; pfn: number } | { kind: 'no-memory' }

/** Takes the first free page, with one reference of an owner. Its content is cleared. */
export function allocatePage(memory: HasFrames, use: Exclude<PageUse, 'free'>): Allocation {
  const pfn = memory.frames.findIndex(({ page }) => page !== null && page.use === 'free')
  if (pfn < 0) return { kind: 'no-memory' }
  takePage(memory, pfn, use)
  return { kind: 'page', pfn }
}

/**
 * Takes a certain free page, with one reference of an owner.
 * @throws RangeError if it is not free.
 */
export function takePage(memory: HasFrames, pfn: number, use: Exclude<PageUse, 'free'>): void {
  const page = pageOf(memory, pfn)
  if (page.use !== 'free') throw new RangeError(`frame ${pfn} is in use (${page.use})`)
  Object.assign(page, { use, count: 1, owners: 1, head: pfn })
  Object.assign(frameOf(memory, pfn), { content: 0, tail: 0 })
}

/**
 * Makes 512 free, adjacent, aligned pages one compound page with one reference of an owner, on the head.
 * @throws RangeError if they are not free or not aligned.
 */
export function takeHugePage(memory: HasFrames, pfn: number, use: Exclude<PageUse, 'free'>): void {
  if (pfn % HUGE_PAGES !== 0) throw new RangeError(`frame ${pfn} is not aligned to ${HUGE_PAGES} frames`)
  const all = Array.from({ length: HUGE_PAGES }, (_, i) => pfn + i)
  const used = all.find((at) => pageOf(memory, at).use !== 'free')
  if (used !== undefined) throw new RangeError(`frame ${used} is in use (${pageOf(memory, used).use})`)
  for (const at of all) {
    Object.assign(pageOf(memory, at), { use, head: pfn })
    Object.assign(frameOf(memory, at), { content: 0, tail: 0 })
  }
  Object.assign(pageOf(memory, pfn), { count: 1, owners: 1 })
}

/**
 * Takes references.
 * @throws RuleViolation "use-after-free" if the page has none: it may be somebody else's at any moment;
 * "no-descriptor" if the frame has no descriptor.
 */
export function getPage(memory: HasFrames, pfn: number, holder: Holder, references = 1): void {
  const page = pageOf(memory, pfn)
  requireRule(page.count > 0, 'use-after-free', `a reference is taken on frame ${pfn}, which is free`)
  page.count += references
  book(page, holder, references)
}

/** Takes a reference only if the page has one already (get_page_unless_zero). */
export function getPageUnlessZero(memory: HasFrames, pfn: number, holder: Holder): 'taken' | 'free' {
  if (pageOf(memory, pfn).count === 0) return 'free'
  getPage(memory, pfn, holder)
  return 'taken'
}

/**
 * Gives a reference back; the last one frees the page (of a compound page: all of it).
 * @throws RuleViolation "reference-underflow" if this holder has none; "freed-while-mapped" if the last reference goes
 * while an entry maps the page; "no-descriptor" if the frame has no descriptor.
 */
export function putPage(memory: HasFrames, pfn: number, holder: Holder): 'still-used' | 'freed' {
  const page = pageOf(memory, pfn)
  requireRule(
    page.count > 0 && held(page, holder) > 0,
    'reference-underflow',
    `frame ${pfn} gives back a reference (${holder}) that it does not have`,
  )
  page.count--
  book(page, holder, -1)
  if (page.count > 0) return 'still-used'
  requireRule(page.mapcount === 0, 'freed-while-mapped', `frame ${pfn} is freed while ${page.mapcount} entries map it`)
  for (let at = pfn; at < memory.frames.length && memory.frames[at]?.page?.head === pfn; at++) {
    Object.assign(pageOf(memory, at), { use: 'free', exclusive: false, head: at })
  }
  return 'freed'
}

/**
 * Puts a page into the swap cache, which holds a reference on it. `slots`: the swap entries that stand for it.
 * @throws RangeError if it is there already.
 */
export function enterSwapCache(memory: HasFrames, pfn: number, slots = 0): void {
  const page = pageOf(memory, pfn)
  if (page.swap !== null) throw new RangeError(`frame ${pfn} is in the swap cache already`)
  getPage(memory, pfn, 'owner')
  page.swap = { slots: natural('slots', slots), writeback: false }
}

/** Takes a page out of the swap cache, and gives the cache's reference back. @throws RangeError if it is not there. */
export function leaveSwapCache(memory: HasFrames, pfn: number): 'still-used' | 'freed' {
  const page = pageOf(memory, pfn)
  if (page.swap === null) throw new RangeError(`frame ${pfn} is not in the swap cache`)
  page.swap = null
  return putPage(memory, pfn, 'owner')
}

/** The references of one owner change hands: an allocated page is now held by the entry that maps it. */
export function handOver(memory: HasFrames, pfn: number, from: Holder, to: Holder): void {
  const page = pageOf(memory, pfn)
  requireRule(held(page, from) > 0, 'reference-underflow', `frame ${pfn} has no reference of kind ${from}`)
  book(page, from, -1)
  book(page, to, 1)
}

function held(page: Page, holder: Holder): number {
  switch (holder) {
    case 'owner':
      return page.owners
    case 'pin':
      return page.pins
    case 'mapping':
      return page.mapcount
  }
}

function book(page: Page, holder: Holder, references: number): void {
  switch (holder) {
    case 'owner':
      page.owners += references
      return
    case 'pin':
      page.pins += references
      return
    case 'mapping':
      page.mapcount += references
  }
}

/** @throws RangeError unless the value is an integer of at least `least`. */
export function natural(name: string, value: number, least = 0): number {
  if (!Number.isSafeInteger(value) || value < least) {
    throw new RangeError(`${name} must be an integer of at least ${least}, not ${value}`)
  }
  return value
}

/**
 * One step of a program of this package, in the shape that @tmem/interleave explores: atomic, with an optional guard
 * and an optional jump to a named step ("end" ends the program).
 */
export interface ProgramStep<W extends object, L extends object> {
  readonly label: string
  readonly at?: string
  when?(world: Readonly<W>, me: Readonly<L>): boolean
  run(world: W, me: L): void
  readonly jump?: { readonly to: string; if(world: Readonly<W>, me: Readonly<L>): boolean }
  readonly touches?: { readonly reads?: readonly string[]; readonly writes?: readonly string[] }
  shows?(world: Readonly<W>, me: Readonly<L>): string
}

/**
 * Runs a program with nobody else around.
 * @throws RangeError if it has to wait: nobody will ever wake it.
 */
export function runProgram<W extends object, L extends object>(
  steps: readonly ProgramStep<W, L>[],
  world: W,
  me: L,
): L {
  for (let at = 0; at < steps.length; ) {
    const { label, when, run, jump } = bound(steps[at] as ProgramStep<W, L>)
    if (!when(world, me)) throw new RangeError(`"${label}" waits for ever`)
    run(world, me)
    const to = jump(world, me)
    at = to === null ? at + 1 : to === 'end' ? steps.length : steps.findIndex((step) => step.at === to)
    if (at < 0) throw new RangeError(`"${label}" jumps to "${to}", which no step is named`)
  }
  return me
}

function bound<W extends object, L extends object>(step: ProgramStep<W, L>) {
  return {
    label: step.label,
    when: (world: W, me: L) => step.when?.(world, me) ?? true,
    run: (world: W, me: L) => step.run(world, me),
    jump: (world: W, me: L) => (step.jump?.if(world, me) ? step.jump.to : null),
  }
}
