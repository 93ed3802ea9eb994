/**
 * get_user_pages without locks: the fast path walks the page tables of a process while they may change, and takes
 * references on what it finds.
 *
 * Two reasons why that can be safe:
 * - flush-interrupt (x86): the walker has interrupts off; whoever frees a page or a table first flushes the TLB of all
 *   processors that use the space, by an interrupt that must be acknowledged.
 * - speculative: tables are freed after a grace period; the walker takes a reference only if the page has one, and then
 *   looks again at every level that somebody may have cleared: at the entry, and at the directory, because a collapse
 *   into a huge page takes a whole table away and leaves its entries as they are (commit 70cbc3cc78a9, 6.1).
 *
 * Invariants: the fast path gives what the slow path would give, or nothing. Special entries always go the slow way,
 * because only the area says what they mean and the walker has no lock to look it up. No reference is taken on a page
 * that has none.
 *
 * Source: arch/x86/mm/gup.c of 2.6.31; arch/s390/mm/gup.c of 3.6; mm/gup.c of recent kernels (facts only).
 */
import { type FaultOutcome, fault, handleFault, mustUnshare, unsharePage } from './fault.ts'
import {
  getPage,
  getPageUnlessZero,
  HUGE_PAGES,
  natural,
  type ProgramStep,
  pageOf,
  putPage,
  runProgram,
} from './memory.ts'
import { vmNormalHugePage, vmNormalPage } from './normal.ts'
import {
  type AddressSpace,
  type DirectoryEntry,
  directoryEntry,
  findVma,
  isCow,
  type Machine,
  readPte,
  readTable,
  spaceOf,
  type Vma,
} from './space.ts'

export type GupForm = 'flush-interrupt' | 'speculative'

/** What is asked for. */
export interface GupRequest {
  readonly space: number
  readonly vpn: number
  readonly pages: number
  readonly access: 'read' | 'write'
}

/** Frames with a reference (pin) on each, or why there is none. */
export type GupResult = { kind: 'pages'; pfns: number[] } | { kind: '-EFAULT' }

/**
 * User pages are those below this number; an address range that reaches it, or wraps around, is left to the slow path.
 */
export const USER_PAGES: number = 2 ** 35

/** How a fault is answered; fault() of fault.ts unless the space has XIP areas. */
export type FaultHandler = (
  machine: Machine,
  space: AddressSpace,
  vpn: number,
  access: 'read' | 'write',
) => FaultOutcome

/**
 * The slow path, under mmap_sem: looks the area up, faults what is missing, takes references. Gives what it could get;
 * -EFAULT only if nothing: no area, no permission, an entry without page.
 */
export function getUserPages(
  machine: Machine,
  { space: id, vpn: first, pages, access }: GupRequest,
  handler: FaultHandler = fault,
): GupResult {
  const space = spaceOf(machine, id)
  const pfns: number[] = []
  for (let vpn = first; vpn < first + natural('pages', pages, 1); vpn++) {
    const pfn = slowPage(machine, space, vpn, access, handler)
    if (pfn === null) break
    getPage(machine, pageOf(machine, pfn).head, 'pin')
    pfns.push(pfn)
  }
  return pfns.length === 0 ? { kind: '-EFAULT' } : { kind: 'pages', pfns }
}

function slowPage(
  machine: Machine,
  space: AddressSpace,
  vpn: number,
  access: 'read' | 'write',
  handler: FaultHandler,
): number | null {
  const vma = findVma(space, vpn)
  if (vma === undefined || (access === 'write' && !vma.write)) return null
  // A fault may map read-only first and copy at the second try; more than two are never needed.
  for (let tries = 0; ; tries++) {
    const found = followPage(machine, space, vma, vpn, { write: access === 'write', copied: false })
    if (found.kind === 'page') return found.pfn
    if (found.kind === 'no-page') return null
    if (found.kind === 'unshare') {
      if (unsharePage(machine, space, vma, vpn) === 'oom') return null
      continue
    }
    if (tries === 2) return null
    switch (handler(machine, space, vpn, access)) {
      case 'sigsegv':
      case 'sigbus':
      case 'oom':
        return null
      case 'mapped':
      case 'already':
      case 'copied':
      case 'reused':
      case 'made-writable':
        break
    }
  }
}

/** What the walk of the slow path finds at an address. */
type Followed = { kind: 'page'; pfn: number } | { kind: 'no-page' } | { kind: 'fault' } | { kind: 'unshare' }

/**
 * follow_page: under the page-table lock.
 * @param want.copied the caller forces a store to an area that is read-only, and the fault has copied the page for it:
 * a dirty entry will do, though it is not writable (FOLL_COW).
 */
function followPage(
  machine: Machine,
  space: AddressSpace,
  vma: Vma,
  vpn: number,
  want: { readonly write: boolean; readonly copied: boolean },
): Followed {
  const huge = directoryEntry(space, vpn)
  if (huge?.kind === 'huge' && (!want.write || huge.writable)) {
    const normal = vmNormalHugePage(machine, vma, huge)
    return normal.kind === 'page' ? { kind: 'page', pfn: huge.pfn + (vpn % HUGE_PAGES) } : { kind: 'no-page' }
  }
  const pte = readPte(machine, space, vpn)
  if (pte === null || !(!want.write || pte.writable || (want.copied && pte.dirty))) return { kind: 'fault' }
  const normal = vmNormalPage(machine, vma, vpn, pte)
  if (normal.kind !== 'page') return { kind: 'no-page' }
  if (!want.write && !pte.writable && mustUnshare(machine, normal.pfn)) return { kind: 'unshare' }
  return { kind: 'page', pfn: normal.pfn }
}

export interface SlowGupRegisters {
  /** The frame that has been pinned, -1 for none. */
  pfn: number
  /** A writable entry is asked for. */
  write: boolean
  /** The fault has made a copy for a forced store. */
  copied: boolean
  result: '' | 'page' | '-EFAULT'
}

export function slowGupRegisters(): SlowGupRegisters {
  return { pfn: -1, write: false, copied: false, result: '' }
}

/**
 * What the slow path does when a fault has copied a page for a store to an area that stays read-only.
 * - remembers-the-copy: it asks for a dirty entry from now on (commit 19be0eaffa3a, 4.9).
 * - forgets-the-write: it asks for any entry (2.6.22 to 4.8).
 */
export type ForcedWrite = 'remembers-the-copy' | 'forgets-the-write'

/**
 * The slow path for one page as a program: it holds mmap_sem for reading all the time, so whoever holds it for reading
 * as well may come between two steps. A store is forced: a debugger may store to a private area that is read-only.
 */
export function gupSlowProgram(
  { space: id, vpn, access }: Omit<GupRequest, 'pages'>,
  forced: ForcedWrite = 'remembers-the-copy',
): ProgramStep<{ machine: Machine }, SlowGupRegisters>[] {
  const areaOf = (machine: Machine): Vma | undefined => findVma(spaceOf(machine, id), vpn)
  return [
    {
      label: 'may the area be accessed?',
      touches: { reads: ['machine.spaces'] },
      run: ({ machine }, me) => {
        const vma = areaOf(machine)
        me.write = access === 'write'
        if (vma === undefined || (me.write && !vma.write && !isCow(vma))) me.result = '-EFAULT'
      },
      jump: { to: 'end', if: (_, { result }) => result !== '' },
    },
    {
      label: 'follow the page, take a reference',
      at: 'again',
      touches: { writes: ['machine'] },
      run: ({ machine }, me) => {
        const found = followPage(machine, spaceOf(machine, id), areaOf(machine) as Vma, vpn, me)
        if (found.kind === 'no-page') me.result = '-EFAULT'
        if (found.kind !== 'page') return
        getPage(machine, pageOf(machine, found.pfn).head, 'pin')
        Object.assign(me, { pfn: found.pfn, result: 'page' })
      },
      shows: (_, { pfn, result }) => (result === 'page' ? `frame ${pfn}` : result === '' ? 'fault' : result),
      jump: { to: 'end', if: (_, { result }) => result !== '' },
    },
    {
      label: 'fault it in',
      touches: { writes: ['machine'] },
      run: ({ machine }, me) => {
        const [space, vma] = [spaceOf(machine, id), areaOf(machine) as Vma]
        if (followPage(machine, space, vma, vpn, me).kind === 'unshare') {
          if (unsharePage(machine, space, vma, vpn) === 'oom') me.result = '-EFAULT'
          return
        }
        const outcome = handleFault(machine, space, vma, vpn, me.write ? 'write' : 'read')
        if (outcome === 'sigbus' || outcome === 'oom' || outcome === 'sigsegv') me.result = '-EFAULT'
        if ((outcome !== 'copied' && outcome !== 'reused') || vma.write) return
        if (forced === 'remembers-the-copy') me.copied = true
        else me.write = false
      },
      shows: (_, { write, copied, result }) => result || (copied ? 'copied' : write ? 'for a store' : 'for a load'),
      jump: { to: 'again', if: (_, { result }) => result === '' },
    },
  ]
}

/** Gives the references of a result back. */
export function putUserPages(machine: Machine, pfns: readonly number[]): void {
  for (const pfn of pfns) putPage(machine, pageOf(machine, pfn).head, 'pin')
}

// ---------------------------------------------------------------------------------------------------------------
// The fast path as a program

/** A processor, as far as the fast path cares. */
export interface Cpu {
  interruptsOff: boolean
}

export interface GupWorld {
  machine: Machine
  cpus: Cpu[]
  /** Who holds mmap_sem, "" for nobody. */
  locks: { mmapSem: string }
}

export interface GupRegisters {
  pfns: number[]
  /** Table being walked, -1 for none. */
  table: number
  /** Head frame of a huge entry, -1 for none. */
  huge: number
  /** References taken on it. */
  taken: number
  /** What was read from the entry. */
  pfn: number
  special: boolean
  writable: boolean
  /** The lockless part has ended. */
  stopped: boolean
  /** "" until it is known. */
  result: '' | 'pages' | '-EFAULT'
}

export function gupRegisters(): GupRegisters {
  return {
    pfns: [],
    table: -1,
    huge: -1,
    taken: 0,
    pfn: -1,
    special: false,
    writable: false,
    stopped: false,
    result: '',
  }
}

export type GupStep = ProgramStep<GupWorld, GupRegisters>

/**
 * The fast path on one processor of a machine with pte_special.
 * @param fallback "slow-path": what is missing is asked of getUserPages() under mmap_sem. "never": the variant for
 * callers that may not sleep; it gives what it has, possibly nothing, and no error.
 */
export function gupFastProgram(
  form: GupForm,
  cpu: number,
  request: GupRequest,
  fallback: 'slow-path' | 'never' = 'slow-path',
): GupStep[] {
  const { space, vpn: first, pages, access } = request
  const next = (me: GupRegisters): number => first + me.pfns.length
  const processor = (world: GupWorld): Cpu => world.cpus[cpu] as Cpu
  const outside = first < 0 || first + pages > USER_PAGES || first + pages < first
  const stop = (_: Readonly<GupWorld>, me: Readonly<GupRegisters>): boolean => me.stopped
  /** The entry of the directory, if the walk can go on there. */
  const directory = (machine: Machine, vpn: number): DirectoryEntry | undefined => {
    const entry = directoryEntry(spaceOf(machine, space), vpn)
    if (entry?.kind !== 'huge') return entry
    return !entry.special && (access === 'read' || entry.writable) ? entry : undefined
  }
  /** A pin for reading that only the slow path can make (kernels from 5.19). */
  const unshares = (machine: Machine, { pfn, writable }: GupRegisters): boolean =>
    !writable && mustUnshare(machine, pfn)
  const giveBack = (machine: Machine, me: GupRegisters): void => {
    putPage(machine, me.pfns.pop() as number, 'pin')
    me.stopped = true
  }
  const take: GupStep[] =
    form === 'flush-interrupt'
      ? [
          {
            label: 'take the reference',
            touches: { reads: ['machine.memory'], writes: ['machine.frames'] },
            run: ({ machine }, me) => {
              getPage(machine, me.pfn, 'pin')
              me.pfns.push(me.pfn)
            },
            shows: (_, { pfn }) => `frame ${pfn}`,
            jump: { to: 'walk', if: (_, me) => me.pfns.length < pages },
          },
        ]
      : [
          {
            label: 'take a reference if it has one',
            touches: { writes: ['machine.frames'] },
            run: ({ machine }, me) => {
              if (getPageUnlessZero(machine, me.pfn, 'pin') === 'taken') me.pfns.push(me.pfn)
              else me.stopped = true
            },
            shows: (_, { stopped, pfn }) => (stopped ? `frame ${pfn} is free` : `frame ${pfn}`),
            jump: { to: 'stop', if: stop },
          },
          {
            label: 'read the directory again',
            touches: { reads: ['machine.spaces'], writes: ['machine.frames'] },
            run: ({ machine }, me) => {
              const entry = directory(machine, next(me) - 1)
              if (entry?.kind !== 'table' || entry.table !== me.table) giveBack(machine, me)
            },
            shows: (_, { stopped }) => (stopped ? 'changed: give it back' : 'unchanged'),
            jump: { to: 'stop', if: stop },
          },
          {
            label: 'read the entry again',
            touches: { reads: ['machine.tables', 'machine.kernel'], writes: ['machine.frames'] },
            run: ({ machine }, me) => {
              const pte = readTable(machine, me.table, next(me) - 1)
              const same = pte?.pfn === me.pfn && pte.special === me.special && pte.writable === me.writable
              if (same && !unshares(machine, me)) return
              giveBack(machine, me)
            },
            shows: (_, { stopped }) => (stopped ? 'changed: give it back' : 'unchanged'),
            jump: { to: 'walk', if: (_, me) => !me.stopped && me.pfns.length < pages },
          },
        ]
  const hugeAgain: GupStep[] =
    form === 'flush-interrupt'
      ? []
      : [
          { label: 'after a small entry', touches: {}, run: () => {}, jump: { to: 'stop', if: () => true } },
          {
            label: 'read the directory again, huge entry',
            at: 'huge again',
            touches: { reads: ['machine.spaces'], writes: ['machine.frames'] },
            run: ({ machine }, me) => {
              const entry = directory(machine, next(me) - 1)
              if (me.stopped || (entry?.kind === 'huge' && entry.pfn === me.huge)) return
              for (let i = 0; i < me.taken; i++) {
                me.pfns.pop()
                putPage(machine, me.huge, 'pin')
              }
              me.stopped = true
            },
            shows: (_, { stopped }) => (stopped ? 'changed: give it back' : 'unchanged'),
            jump: { to: 'huge done', if: () => true },
          },
        ]
  return [
    {
      label: 'is the range one of user pages?',
      touches: {},
      run: (_, me) => {
        me.stopped = outside
      },
      jump: { to: 'rest', if: stop },
    },
    {
      label: 'interrupts off',
      touches: { writes: [`cpus.${cpu}`] },
      run: (world) => {
        processor(world).interruptsOff = true
      },
    },
    {
      label: 'read the directory',
      at: 'walk',
      touches: { reads: ['machine.spaces'] },
      run: ({ machine }, me) => {
        const entry = directory(machine, next(me))
        me.table = entry?.kind === 'table' ? entry.table : -1
        me.huge = entry?.kind === 'huge' ? entry.pfn : -1
        me.stopped = me.table < 0 && me.huge < 0
      },
      jump: { to: 'stop', if: stop },
    },
    {
      label: 'huge entry: one addition on the head',
      touches: { reads: ['machine.memory'], writes: ['machine.frames'] },
      run: ({ machine }, me) => {
        if (me.huge < 0) return
        const inEntry = next(me) % HUGE_PAGES
        const count = Math.min(HUGE_PAGES - inEntry, pages - me.pfns.length)
        // A flush by interrupt waits for this walk, so the page cannot have been freed.
        if (form === 'speculative' && pageOf(machine, me.huge).count === 0) {
          me.stopped = true
          return
        }
        getPage(machine, me.huge, 'pin', count)
        for (let i = 0; i < count; i++) me.pfns.push(me.huge + inEntry + i)
        me.taken = count
      },
      jump: { to: form === 'speculative' ? 'huge again' : 'huge done', if: (_, { huge }) => huge >= 0 },
    },
    {
      label: 'read the entry',
      touches: { reads: ['machine.tables'] },
      run: ({ machine }, me) => {
        const pte = readTable(machine, me.table, next(me))
        me.pfn = pte?.pfn ?? -1
        me.special = pte?.special ?? false
        me.writable = pte?.writable ?? false
      },
      shows: (_, { pfn, special }) => (pfn < 0 ? 'empty' : `frame ${pfn}${special ? ' special' : ''}`),
    },
    {
      label: 'present, allowed, not special?',
      touches: { reads: ['machine.kernel', 'machine.frames'] },
      run: ({ machine }, me) => {
        me.stopped = me.pfn < 0 || me.special || (access === 'write' && !me.writable) || unshares(machine, me)
      },
      shows: (_, { stopped }) => (stopped ? 'no' : 'yes'),
      jump: { to: 'stop', if: stop },
    },
    ...take,
    ...hugeAgain,
    { label: 'end of the walk', touches: {}, run: () => {}, jump: { to: 'stop', if: () => true } },
    {
      label: 'after a huge entry',
      at: 'huge done',
      touches: {},
      run: (_, me) => {
        me.stopped ||= me.pfns.length === pages
      },
      jump: { to: 'walk', if: (_, me) => !me.stopped },
    },
    {
      label: 'interrupts on',
      at: 'stop',
      touches: { writes: [`cpus.${cpu}`] },
      run: (world) => {
        processor(world).interruptsOff = false
      },
    },
    {
      label: 'is anything missing?',
      at: 'rest',
      touches: {},
      run: (_, me) => {
        if (me.pfns.length === pages || fallback === 'never') me.result = 'pages'
      },
      jump: { to: 'end', if: (_, me) => me.result !== '' },
    },
    {
      label: 'lock mmap_sem',
      touches: { writes: ['locks'] },
      when: ({ locks }) => locks.mmapSem === '',
      run: ({ locks }) => {
        locks.mmapSem = `cpu ${cpu}`
      },
    },
    {
      label: 'slow path for the rest',
      touches: { writes: ['machine'] },
      run: ({ machine }, me) => {
        const rest = { space, vpn: next(me), pages: pages - me.pfns.length, access }
        const slow = getUserPages(machine, rest)
        if (slow.kind === 'pages') me.pfns.push(...slow.pfns)
        me.result = me.pfns.length > 0 ? 'pages' : '-EFAULT'
      },
      shows: (_, { result, pfns }) => (result === 'pages' ? `frames ${pfns.join(' ')}` : result),
    },
    {
      label: 'unlock mmap_sem',
      touches: { writes: ['locks'] },
      run: ({ locks }) => {
        locks.mmapSem = ''
      },
    },
  ]
}

/**
 * get_user_pages_fast with nobody else around.
 * @throws RangeError if the request is not of at least one page, or the machine has no pte_special: then an entry does
 * not say whether there is a page behind it, and such architectures have no fast path.
 */
export function getUserPagesFast(machine: Machine, form: GupForm, request: GupRequest): GupResult {
  return runFast(machine, form, request, 'slow-path')
}

/** The variant for callers that may not sleep: what the fast path finds, possibly nothing; never an error. */
export function getUserPagesFastOnly(machine: Machine, form: GupForm, request: GupRequest): number[] {
  const result = runFast(machine, form, request, 'never')
  return result.kind === 'pages' ? result.pfns : []
}

function runFast(machine: Machine, form: GupForm, request: GupRequest, fallback: 'slow-path' | 'never'): GupResult {
  natural('pages', request.pages, 1)
  if (!machine.pteSpecial) throw new RangeError('without pte_special there is no fast path; use getUserPages()')
  const world = { machine, cpus: [{ interruptsOff: false }], locks: { mmapSem: '' } }
  const { result, pfns } = runProgram(gupFastProgram(form, 0, request, fallback), world, gupRegisters())
  return result === '-EFAULT' ? { kind: '-EFAULT' } : { kind: 'pages', pfns }
}
