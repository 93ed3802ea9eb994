/**
 * Rules of processors' own translations: who has to flush before what, and under which lock. With their mutants.
 *
 * Every scenario has a thread on one processor that stores through a translation which it has from before.
 */
import {
  type Actor,
  actor,
  type Check,
  type Edit,
  type RuleEntry,
  requireRule,
  type Scenario,
  type Step,
} from '@tmem/interleave'
import {
  allocatePage,
  clearPte,
  copyFrame,
  createMachine,
  createSpace,
  createTlbWorld,
  dropMapped,
  dropMmapLock,
  enterSwapCache,
  fault,
  flushTlb,
  fork,
  frameOf,
  freeGathered,
  gather,
  getPage,
  handOver,
  load,
  type MachineOptions,
  mayStore,
  mmap,
  mmapLockFree,
  putPage,
  readPte,
  setPte,
  spaceOf,
  store,
  syncOf,
  type TlbWorld,
  takeMmapLock,
  translate,
} from '@tmem/vm-mixedmap'
import { editedRule } from './list.ts'
import { balanced, from } from './world.ts'

/** The state of the scenarios of this file. */
interface World extends TlbWorld {
  /** Small facts: values seen, things done. */
  marks: Record<string, number>
}

interface Registers {
  /** Pages of a gather. */
  pages: number[]
  /** The page that is copied. */
  old: number
  fresh: number
  /** The program jumps to its way out. */
  leave: boolean
}

type TlbStep = Step<World, Registers>

const thread = (name: string, steps: readonly TlbStep[]): Actor<World> =>
  actor<World, Registers>(name, { pages: [], old: -1, fresh: -1, leave: false }, steps)

const step = (
  label: string,
  run: (state: World, me: Registers) => void,
  more: Partial<Omit<TlbStep, 'label' | 'run'>> = {},
): TlbStep => ({ label, run, ...more })

/** Page 0 of space 0 is present, writable, and holds 7; page 8 has an area and nothing in it. */
function prepared(marks: Record<string, number> = {}, kernel: MachineOptions['kernel'] = '2.6.31'): World {
  const machine = createMachine({ memory: { kind: 'flat', frames: 3 }, frames: 3, pteSpecial: true, kernel })
  const space = createSpace(machine)
  for (const first of [0, 8]) mmap(space, { first, pages: 1, write: true, backing: { kind: 'anonymous' } })
  fault(machine, space, 0, 'write')
  frameOf(machine, 0).content = 7
  const made = { ...createTlbWorld(machine, [0, 0, 0]), marks: { written: 0, ...marks } }
  load(made, WRITER, 0)
  return made
}

/** The processor of the thread that stores. */
const WRITER = 2
const OTHER = 1

const lockMmap = (how: 'read' | 'write', who: string): TlbStep =>
  step(`lock mmap_lock (${how})`, (state) => takeMmapLock(state, 0, how, who), {
    when: (state) => mmapLockFree(state, 0, how),
  })

const unlockMmap = (how: 'read' | 'write', who: string, at?: string): TlbStep =>
  step(`unlock mmap_lock (${how})`, (state) => dropMmapLock(state, 0, how, who), at === undefined ? {} : { at })

const lockTables = (who: string, label = 'lock the page tables'): TlbStep =>
  step(
    label,
    (state) => {
      syncOf(state, 0).pageTable = who
    },
    { when: ({ mms }) => mms[0]?.pageTable === '' },
  )

const unlockTables = (who: string, label = 'unlock the page tables', at?: string): TlbStep =>
  step(
    label,
    (state) => {
      requireRule(syncOf(state, 0).pageTable === who, 'lock-holder', `${who} unlocks page tables it has not locked`)
      syncOf(state, 0).pageTable = ''
    },
    at === undefined ? {} : { at },
  )

const flush = (label: string, vpn: number): TlbStep => step(label, (state) => flushTlb(state, 0, vpn, vpn + 1))

/** A thread that stores 9 to page 0 once, if it can; otherwise it faults, and comes back when all this is over. */
const writer = thread('writer', [
  step(
    'stores 9 to page 0',
    (state, me) => {
      me.leave = store(state, WRITER, 0, 9) === 'fault'
      if (!me.leave) state.marks['written'] = 1
    },
    { shows: (_, { leave }) => (leave ? 'faults' : 'stored') },
  ),
])

/** What the process has at page 0 is what was stored there last. */
const nothingLost: Check<World> = {
  name: 'no store is lost',
  check: ({ machine, marks }) => {
    const pfn = translate(machine, spaceOf(machine, 0), 0, 'read')
    if (marks['written'] !== 1 || pfn === null) return null
    const { content } = frameOf(machine, pfn)
    return content === 9 ? null : `9 was stored to page 0, which holds ${content}`
  },
}

const protect = step('clear the write permission', (state) => {
  const pte = readPte(state.machine, spaceOf(state.machine, 0), 0)
  if (pte !== null) pte.writable = false
})

const UNMAP_FLUSH = 'flush page 0'
const FREE = 'free the gathered pages'

/** munmap of page 0. */
const unmapping = (): Scenario<World> => ({
  initial: () => prepared(),
  actors: [
    thread('munmap', [
      lockMmap('write', 'munmap'),
      lockTables('munmap'),
      step('clear the entry, gather the page', (state, { pages }) => gather(state, 0, 0, pages)),
      unlockTables('munmap'),
      flush(UNMAP_FLUSH, 0),
      step(FREE, (state, { pages }) => freeGathered(state, pages)),
      unlockMmap('write', 'munmap'),
    ]),
    writer,
  ],
  atEnd: [balanced],
})

const MOVE_FLUSH = 'flush the old place'

/** mremap moves the entry of page 0 to page 8; a truncate, which takes no mmap_lock, finds it there. */
const moving = (): Scenario<World> => ({
  initial: () => prepared(),
  actors: [
    thread('mremap', [
      lockMmap('write', 'mremap'),
      lockTables('mremap'),
      step('move the entry to page 8', ({ machine }) => {
        const pte = clearPte(machine, spaceOf(machine, 0), 0)
        if (pte !== null) setPte(machine, spaceOf(machine, 0), 8, pte)
      }),
      flush(MOVE_FLUSH, 0),
      unlockTables('mremap'),
      unlockMmap('write', 'mremap'),
    ]),
    thread('truncate', [
      lockTables('truncate'),
      step('clear the entry of page 8, gather the page', (state, { pages }) => gather(state, 0, 8, pages), {
        shows: (_, { pages }) => (pages.length > 0 ? `frame ${pages.join(' ')}` : 'empty'),
      }),
      unlockTables('truncate'),
      flush('flush page 8', 8),
      step(FREE, (state, { pages }) => freeGathered(state, pages)),
    ]),
    writer,
  ],
  atEnd: [balanced],
})

const PENDING = 'flush first, if a flush is pending'
const SAME = 'lock the page tables, is the entry the same?'

/** A write fault of page 0 that copies, as other threads see it. */
function copyingFault(): Actor<World> {
  const table = (state: Readonly<World>) => readPte(state.machine, spaceOf(state.machine, 0), 0)
  return thread('fault', [
    lockMmap('read', 'fault'),
    lockTables('fault'),
    step(
      'look at the entry',
      (state, me) => {
        const pte = table(state)
        me.leave = pte === null || pte.writable
        me.old = pte?.pfn ?? -1
      },
      {
        shows: (_, { leave, old }) => (leave ? 'nothing to do' : `frame ${old}, read-only`),
        jump: { to: 'out', if: (_, me) => me.leave },
      },
    ),
    step(PENDING, (state) => {
      if (syncOf(state, 0).flushPending > 0) flushTlb(state, 0, 0, 1)
    }),
    step('take a reference', ({ machine }, { old }) => getPage(machine, old, 'owner')),
    unlockTables('fault', 'unlock the page tables while copying'),
    step(
      'copy the page',
      ({ machine }, me) => {
        const allocated = allocatePage(machine, 'anonymous')
        if (allocated.kind === 'page') me.fresh = allocated.pfn
        copyFrame(machine, me.old, me.fresh)
      },
      { shows: ({ machine }, { fresh }) => `holds ${machine.frames[fresh]?.content}` },
    ),
    step(
      SAME,
      (state, me) => {
        syncOf(state, 0).pageTable = 'fault'
        me.leave = table(state)?.pfn !== me.old
      },
      {
        when: ({ mms }) => mms[0]?.pageTable === '',
        shows: (_, { leave }) => (leave ? 'no' : 'yes'),
        jump: { to: 'unused', if: (_, me) => me.leave },
      },
    ),
    step(CLEAR, (state) => {
      clearPte(state.machine, spaceOf(state.machine, 0), 0)
      flushTlb(state, 0, 0, 1)
    }),
    step(
      SET,
      ({ machine }, { old, fresh }) => {
        const space = spaceOf(machine, 0)
        setPte(machine, space, 0, { pfn: fresh, special: false, writable: true, dirty: true })
        handOver(machine, fresh, 'owner', 'mapping')
        space.rssAnon++
        dropMapped(machine, space, old)
      },
      { jump: { to: 'put', if: () => true } },
    ),
    step('free the copy', ({ machine }, { fresh }) => void putPage(machine, fresh, 'owner'), { at: 'unused' }),
    step('give the reference back', ({ machine }, { old }) => void putPage(machine, old, 'owner'), { at: 'put' }),
    unlockTables('fault', 'unlock the page tables', 'out'),
    unlockMmap('read', 'fault'),
  ])
}

const CLEAR = 'clear the entry, flush'
const SET = 'set the new entry'

/**
 * The monitor of a userfaultfd lifts the write protection of page 0, which is not protected; kernels from 5.7 to 5.11
 * take the write permission away by that. A fault copies, because the page is in the swap cache as well.
 */
const unprotecting = (): Scenario<World> => ({
  initial: () => {
    const made = prepared({}, '5.9')
    enterSwapCache(made.machine, 0)
    store(made, WRITER, 0, 7)
    return made
  },
  actors: [
    thread('monitor', [
      lockMmap('read', 'monitor'),
      step('one more flush is pending', (state) => {
        syncOf(state, 0).flushPending++
      }),
      lockTables('monitor'),
      protect,
      unlockTables('monitor'),
      flush(UNMAP_FLUSH, 0),
      step('one less is', (state) => {
        syncOf(state, 0).flushPending--
      }),
      unlockMmap('read', 'monitor'),
    ]),
    copyingFault(),
    writer,
  ],
  atEnd: [nothingLost, balanced],
})

/** fork shares page 0 with a child and flushes when it has gone through all areas. */
const forking = (how: 'read' | 'write'): Scenario<World> => ({
  initial: () => {
    const made = prepared()
    store(made, WRITER, 0, 7)
    return made
  },
  actors: [
    thread('fork', [
      lockMmap(how, 'fork'),
      lockTables('fork'),
      step('share the page, read-only', ({ machine }) => void fork(machine, spaceOf(machine, 0))),
      unlockTables('fork'),
      flush(UNMAP_FLUSH, 0),
      unlockMmap(how, 'fork'),
    ]),
    copyingFault(),
    writer,
  ],
  atEnd: [nothingLost, balanced],
})

/** Page 0 is shared with a child, and one processor has a translation for reading. */
function shared(marks: Record<string, number> = {}): World {
  const made = prepared(marks)
  fork(made.machine, spaceOf(made.machine, 0))
  return made
}

/** madvise drops page 0 while a fault copies it; both hold mmap_lock for reading. */
const dropping = (): Scenario<World> => ({
  initial: () => shared(),
  actors: [
    thread('madvise', [
      lockMmap('read', 'madvise'),
      lockTables('madvise'),
      step('clear the entry, gather the page', (state, { pages }) => gather(state, 0, 0, pages)),
      unlockTables('madvise'),
      flush(UNMAP_FLUSH, 0),
      step(FREE, (state, { pages }) => freeGathered(state, pages)),
      unlockMmap('read', 'madvise'),
    ]),
    copyingFault(),
  ],
  atEnd: [balanced],
})

/** One thread stores to the copy as soon as it is mapped; another, with an old translation, reads after that. */
const reading = (): Scenario<World> => ({
  initial: () => shared(),
  actors: [
    copyingFault(),
    thread('store', [
      step(
        'stores 9 to page 0',
        (state) => {
          store(state, OTHER, 0, 9)
          state.marks['written'] = 1
        },
        { when: (state) => mayStore(state, OTHER, 0) },
      ),
    ]),
    thread('reader', [
      step(
        'is told, reads page 0',
        (state) => {
          const seen = load(state, WRITER, 0)
          requireRule(seen === 9 || seen === null, 'old-data', `reads ${seen} after 9 was stored`)
        },
        { when: ({ marks }) => marks['written'] === 1 },
      ),
    ]),
  ],
})

/** mprotect takes the write permission of page 0 away and returns. */
const protecting = (): Scenario<World> => ({
  initial: () => {
    const made = prepared({ returned: 0 })
    store(made, WRITER, 0, 7)
    return made
  },
  actors: [
    thread('mprotect', [
      lockMmap('write', 'mprotect'),
      lockTables('mprotect'),
      protect,
      unlockTables('mprotect'),
      flush(UNMAP_FLUSH, 0),
      unlockMmap('write', 'mprotect'),
      step('return', ({ marks }) => {
        marks['returned'] = 1
      }),
    ]),
    thread('writer', [
      step('stores 9 to page 0', (state) => {
        const stored = store(state, WRITER, 0, 9) === 'stored'
        requireRule(!stored || state.marks['returned'] === 0, 'store-after-mprotect', 'a store succeeds after mprotect')
      }),
    ]),
  ],
})

/** A pager protects a page, keeps what it holds, and drops it; a store in between has to wait for the pager. */
const paging = (): Scenario<World> => ({
  initial: () => {
    const made = prepared({ kept: -1 })
    store(made, WRITER, 0, 7)
    return made
  },
  actors: [
    thread('pager', [
      lockMmap('read', 'pager'),
      lockTables('pager'),
      protect,
      unlockTables('pager'),
      flush(UNMAP_FLUSH, 0),
      unlockMmap('read', 'pager'),
      step(KEEP, (state) => {
        state.marks['kept'] = load(state, 0, 0) ?? -1
      }),
      lockTables('pager', 'lock the page tables to drop the page'),
      step('clear the entry, gather the page', (state, { pages }) => gather(state, 0, 0, pages)),
      unlockTables('pager', 'unlock the page tables after that'),
      flush('flush page 0 again', 0),
      step(FREE, (state, { pages }) => freeGathered(state, pages)),
    ]),
    writer,
  ],
  atEnd: [
    {
      name: 'the store is kept',
      check: ({ marks }) =>
        marks['written'] === 1 && marks['kept'] !== 9 ? `9 was stored, the pager kept ${marks['kept']}` : null,
    },
    balanced,
  ],
})

const KEEP = 'read the page, put it into the store'

const withoutRecheck: Edit<World> = {
  actor: 'fault',
  change: { step: SAME, to: { jump: { to: 'unused', if: () => false } } },
}

export const tlbRules: readonly RuleEntry<World>[] = [
  editedRule(
    'tlb-pages-are-freed-after-the-flush',
    'unmapped pages are gathered and freed after the flush: until then processors reach them',
    from('include/asm-generic/tlb.h, mm/memory.c', '2.6.31'),
    unmapping,
    'they are freed first',
    'use-after-free',
    { actor: 'munmap', move: { step: FREE, before: UNMAP_FLUSH } },
  ),
  editedRule(
    'tlb-mremap-flushes-under-the-page-table-lock',
    'mremap flushes the old place before it unlocks the page tables: on no list, the page may be freed from its new one',
    from('commit eb66ae030829, mm/mremap.c', '4.19'),
    moving,
    'it flushes after that, under mmap_lock, which truncate does not take',
    'use-after-free',
    { actor: 'mremap', move: { step: 'unlock the page tables', before: MOVE_FLUSH } },
  ),
  editedRule(
    'tlb-copy-completes-a-pending-flush',
    'a write fault completes a pending flush before it copies: a store through an old translation would miss the copy',
    from('commit 6ce64428d620, mm/memory.c; report of December 2020', '5.12'),
    unprotecting,
    'it copies first, and its own flush comes after that',
    nothingLost.name,
    { actor: 'fault', without: [PENDING] },
  ),
  {
    name: 'tlb-fork-excludes-faults-until-its-flush',
    rule: 'fork holds mmap_lock for writing until it has flushed what it made read-only: no fault copies before',
    ...from('kernel/fork.c, mm/memory.c', '2.6.31'),
    scenario: () => forking('write'),
    mutant: { breaks: 'it holds it for reading', caughtAs: nothingLost.name, scenario: () => forking('read') },
  },
  editedRule(
    'tlb-copy-looks-at-the-entry-again',
    'a fault that has unlocked the page tables to copy looks at the entry again: the page may be gone',
    from('mm/memory.c', '2.6.31'),
    dropping,
    'it sets the entry in any case',
    balanced.name,
    withoutRecheck,
  ),
  editedRule(
    'tlb-copy-is-mapped-after-the-flush',
    'a copy is mapped only after the old entry was cleared and flushed: else one sees new data and another old',
    from('mm/memory.c', '2.6.31'),
    reading,
    'the flush comes after the new entry',
    'old-data',
    {
      actor: 'fault',
      change: {
        step: CLEAR,
        to: {
          run: ({ machine }) => {
            clearPte(machine, spaceOf(machine, 0), 0)
          },
        },
      },
    },
  ),
  editedRule(
    'tlb-mprotect-flushes-before-it-returns',
    'when mprotect has taken permission away and returned, no store succeeds any more',
    from('mm/mprotect.c', '2.6.31'),
    protecting,
    'it leaves the flush to others',
    'store-after-mprotect',
    { actor: 'mprotect', without: [UNMAP_FLUSH] },
  ),
  editedRule(
    'tlb-pager-reads-after-write-protection',
    'a pager reads a page only after its write-protection has returned, flush included: later stores wait for it',
    from('Documentation/admin-guide/mm/userfaultfd.rst', '5.7'),
    paging,
    'it reads first',
    'the store is kept',
    { actor: 'pager', move: { step: KEEP, before: UNMAP_FLUSH } },
  ),
]
