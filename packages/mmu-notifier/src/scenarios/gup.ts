/** Rules of lockless get_user_pages, with their mutants. */
import { type Actor, actor, type Check, type RuleEntry, requireRule, type Scenario, type Step } from '@tmem/interleave'
import {
  allocatePage,
  clearPte,
  copyFrame,
  createMachine,
  createSpace,
  directoryEntry,
  dropMapped,
  fork,
  frameOf,
  type GupForm,
  type GupRegisters,
  type GupRequest,
  getPage,
  getUserPages,
  gupFastProgram,
  gupRegisters,
  HUGE_PAGES,
  handOver,
  mapHuge,
  mmap,
  munmap,
  NO_SECONDARY_MMUS,
  pageOf,
  putPage,
  readPte,
  remapPfnRange,
  spaceOf,
  takeHugePage,
  takePage,
  translate,
  USER_PAGES,
  vmInsertHugePfn,
  vmInsertMixed,
} from '@tmem/vm-mixedmap'
import { createNotifiers, V13_COMPLETE } from '../notifier.ts'
import { editedRule, switchedRule } from './list.ts'
import {
  balanced,
  from,
  inlined,
  onlyWhen,
  setMark,
  space0,
  step,
  type VmStep,
  vm,
  type World,
  world,
} from './world.ts'

const X86 = from('arch/x86/mm/gup.c', '2.6.31')
const SPECULATIVE = from('arch/s390/mm/gup.c; mm/gup.c of recent kernels', '3.6')

const request = (more: Partial<GupRequest> = {}): GupRequest => ({
  space: 0,
  vpn: 0,
  pages: 1,
  access: 'read',
  ...more,
})

const registers = (me: object): GupRegisters => me as GupRegisters

/** What was pinned must be what the process had at the address: pages that hold 7. */
const use = step<GupRegisters>(
  'use the pages',
  (state, { pfns }) => {
    for (const pfn of pfns) {
      const { content } = frameOf(state.machine, pfn)
      requireRule(content === 7, 'wrong-page', `frame ${pfn} holds ${content}: it is somebody else's`)
    }
  },
  { shows: (_, { pfns, result }) => (pfns.length > 0 ? `frames ${pfns.join(' ')}` : result) },
)

const gup = (form: GupForm, more: Partial<GupRequest> = {}, fallback: 'slow-path' | 'never' = 'never'): Actor<World> =>
  actor<World, GupRegisters>('gup', gupRegisters(), [
    ...inlined(gupFastProgram(form, 0, request(more), fallback), 'fast'),
    use,
  ])

/** Waits until every processor has acknowledged the flush, or (the same test) until no lockless walk is running. */
const acknowledged = (label: string): VmStep =>
  step(label, () => {}, { when: ({ cpus }) => cpus.every(({ interruptsOff }) => !interruptsOff) })

const FLUSH = 'flush: every cpu acknowledges'
const GRACE = 'wait for a grace period'

const clear: VmStep = step(
  'clear the entry',
  (state, me) => {
    me.pfn = clearPte(state.machine, space0(state), 0)?.pfn ?? -1
  },
  { shows: (_, { pfn }) => `frame ${pfn}` },
)

const free: VmStep = step(
  'free the page',
  (state, me) => {
    if (me.pfn >= 0) dropMapped(state.machine, space0(state), me.pfn)
  },
  { shows: ({ machine }, { pfn }) => `count ${machine.frames[pfn]?.page?.count}` },
)

/** Another process gets the first free page, and writes 99 to it. */
const reuse: VmStep = step('another process gets a page', (state) => {
  const allocated = allocatePage(state.machine, 'anonymous')
  if (allocated.kind === 'page') frameOf(state.machine, allocated.pfn).content = 99
})

const gupAndUnmap = (form: GupForm): Scenario<World> => ({
  initial: () => world({ pages: 1 }),
  actors: [
    gup(form),
    vm('unmap', form === 'flush-interrupt' ? [clear, acknowledged(FLUSH), free, reuse] : [clear, free, reuse]),
  ],
  atEnd: [balanced],
})

/** A raw frame at page 8, mapped special; four ordinary frames, frame 5 without descriptor. */
function rawWorld(pteSpecial: boolean): World {
  const made = world({ frames: 6, pteSpecial })
  const space = spaceOf(made.machine, 0)
  const area = mmap(space, { first: 0, pages: 1, backing: { kind: 'device' }, mixedMap: pteSpecial })
  if (pteSpecial) vmInsertMixed(made.machine, space, area, 0, 5)
  else remapPfnRange(made.machine, space, area, 0, 5, 1)
  return made
}

/** Raw frames 0 to 511, mapped by a special huge entry; no frame has a descriptor but 512. */
function rawHugeWorld(): World {
  const memory = { kind: 'sparse', sectionFrames: 512, present: [false, true] } as const
  const options = { memory: { ...memory, present: [...memory.present] }, frames: 1024 }
  const made = world({ ...options, pteSpecial: true, hugeSpecial: true })
  const area = mmap(space0(made), { first: 0, pages: 512, backing: { kind: 'device' }, pfnMap: true, shared: true })
  vmInsertHugePfn(made.machine, space0(made), area, 0, 0)
  return made
}

/**
 * Page 0 is mapped by a huge entry. Of its 512 frames only the first exists: states stay small, and only page 0 is
 * used.
 */
export function mapOneHuge({ machine }: World, pfn: number): void {
  const space = spaceOf(machine, 0)
  space.directory[0] = { kind: 'huge', pfn, special: false, writable: true, dirty: false }
  handOver(machine, pfn, 'owner', 'mapping')
  space.rssAnon += HUGE_PAGES
}

/** Gives an address to everybody who pinned it: the frame that the process has there. */
export const pinIsMapped: Check<World> = {
  name: 'pin and process agree',
  check: ({ machine, marks }) => {
    const [pinned, mapped] = [marks['pinned'] ?? -1, translate(machine, spaceOf(machine, 0), 0, 'read')]
    return pinned < 0 || pinned === mapped ? null : `frame ${pinned} is pinned, the process has frame ${mapped}`
  },
}

export const keepPin: Step<World, GupRegisters> = step<GupRegisters>('keep the pin', (state, { pfns }) => {
  state.marks['pinned'] = pfns[0] ?? -1
})

/** khugepaged takes the page table away, and moves its one page to the huge page at frame 3. */
export const collapse: VmStep[] = [
  step('clear the directory entry, flush', (state) => {
    delete space0(state).directory[0]
  }),
  step(
    'any other reference?',
    (state, me) => {
      const { count, mapcount } = pageOf(state.machine, 0)
      me.failed = count !== mapcount
    },
    { shows: (_, { failed }) => (failed ? 'yes: give up' : 'no'), jump: { to: 'undo', if: (_, me) => me.failed } },
  ),
  step('copy the data', ({ machine }) => {
    takePage(machine, 3, 'anonymous')
    copyFrame(machine, 0, 3)
  }),
  step(
    'map the huge page, free the small one',
    (state) => {
      const { machine } = state
      delete machine.tables[0]?.entries[0]
      dropMapped(machine, space0(state), 0)
      mapOneHuge(state, 3)
    },
    { jump: { to: 'end', if: () => true } },
  ),
  step(
    'put the table back',
    (state) => {
      space0(state).directory[0] = { kind: 'table', table: 0 }
    },
    { at: 'undo' },
  ),
]

/** A huge page at 0 of a space of its own machine. */
function hugeWorld(): World {
  const machine = createMachine({ memory: { kind: 'flat', frames: 512 }, frames: 512, pteSpecial: true })
  takeHugePage(machine, 0, 'file')
  frameOf(machine, 3).content = 7
  const space = createSpace(machine)
  const area = mmap(space, { first: 0, pages: 512, backing: { kind: 'device' }, shared: true })
  mapHuge(machine, space, area, 0, 0)
  return { ...world({}), machine, notifiers: createNotifiers(machine, V13_COMPLETE) }
}

const pinsAre: Check<World> = {
  name: 'no lost pin',
  check: ({ machine, marks }) => {
    const pins = machine.frames.reduce((sum, { page }) => sum + (page?.pins ?? 0), 0)
    return pins === marks['returned'] ? null : `${pins} pins for ${marks['returned']} pages returned`
  },
}

/** A 64-bit entry that is read and written in two halves; 0 is "not present". */
const halves = { lowHalf: 1, highHalf: 1 }

interface Halves {
  low: number
  high: number
}

const paeReader: Actor<World> = actor<World, Halves>('gup', { low: 0, high: 0 }, [
  step('interrupts off', (state) => {
    const cpu = state.cpus[0]
    if (cpu !== undefined) cpu.interruptsOff = true
  }),
  step<Halves>(
    'read the low half',
    (state, me) => {
      me.low = state.marks['lowHalf'] ?? 0
    },
    { at: 'low', shows: (_, { low }) => String(low) },
  ),
  step<Halves>(
    'read the high half',
    (state, me) => {
      me.high = state.marks['highHalf'] ?? 0
    },
    { shows: (_, { high }) => String(high) },
  ),
  step<Halves>('read the low half again', () => {}, {
    shows: ({ marks }, { low }) => (marks['lowHalf'] === low ? 'unchanged' : 'changed: retry'),
    jump: { to: 'low', if: ({ marks }, { low }) => marks['lowHalf'] !== low },
  }),
  step<Halves>('use the entry', (_, { low, high }) => {
    requireRule(low === 0 || low === high, 'torn-entry', `the halves ${low} and ${high} are of different entries`)
  }),
  step('interrupts on', (state) => {
    const cpu = state.cpus[0]
    if (cpu !== undefined) cpu.interruptsOff = false
  }),
])

/** Replaces entry 1 by entry 2 as the rules want it: not present first, flush, high half, low half. */
const paeWriter = (from: number, to: number): VmStep[] => [
  step(`clear the low half of ${from}`, setMark('lowHalf', 0)),
  step(`clear the high half of ${from}`, setMark('highHalf', 0)),
  acknowledged(`${FLUSH} (${from})`),
  step(`set the high half of ${to}`, setMark('highHalf', to)),
  step(`set the low half of ${to}`, setMark('lowHalf', to)),
]

const pae = (): Scenario<World> => ({
  initial: () => world({ marks: { ...halves } }),
  actors: [paeReader, vm('change', paeWriter(1, 2))],
})

export const gupRules: readonly RuleEntry<World>[] = [
  editedRule(
    'gup-interrupts-are-off',
    'the fast path walks with interrupts off, so that a flush is not acknowledged before it has its references',
    X86,
    () => gupAndUnmap('flush-interrupt'),
    'interrupts stay on',
    'use-after-free',
    { actor: 'gup', without: ['fast: interrupts off'] },
  ),
  editedRule(
    'gup-pages-are-freed-after-the-flush',
    'a page is freed only when every processor has acknowledged the flush',
    X86,
    () => gupAndUnmap('flush-interrupt'),
    'the unmapper does not wait',
    'use-after-free',
    { actor: 'unmap', without: [FLUSH] },
  ),
  editedRule(
    'gup-special-entries-go-slow',
    'a special entry stops the fast path',
    X86,
    () => ({ initial: () => rawWorld(true), actors: [gup('flush-interrupt', {}, 'slow-path')], atEnd: [balanced] }),
    'the bit is ignored',
    'no-descriptor',
    {
      actor: 'gup',
      change: {
        step: 'fast: present, allowed, not special?',
        to: {
          run: (_, me) => {
            registers(me).stopped = registers(me).pfn < 0
          },
        },
      },
    },
  ),
  switchedRule(
    'gup-needs-pte-special',
    'without pte_special an entry does not say whether there is a page: such architectures have no fast path',
    X86,
    (path: 'slow' | 'fast'): Scenario<World> => ({
      initial: () => rawWorld(false),
      actors: [
        path === 'fast'
          ? gup('flush-interrupt')
          : actor<World, GupRegisters>('gup', gupRegisters(), [
              step<GupRegisters>(
                'slow path under mmap_sem',
                ({ machine }, me) => {
                  const got = getUserPages(machine, request())
                  me.result = got.kind
                },
                { shows: (_, { result }) => result },
              ),
            ]),
      ],
      atEnd: [balanced],
    }),
    'slow',
    'it has one',
    'no-descriptor',
    'fast',
  ),
  editedRule(
    'gup-speculative-reference-not-from-zero',
    'without the flush interrupt a reference is taken only if the page has one already',
    SPECULATIVE,
    () => gupAndUnmap('speculative'),
    'it is taken in any case',
    'use-after-free',
    {
      actor: 'gup',
      change: {
        step: 'fast: take a reference if it has one',
        to: {
          run: (state, me) => {
            getPage(state.machine, registers(me).pfn, 'pin')
            registers(me).pfns.push(registers(me).pfn)
          },
        },
      },
    },
  ),
  editedRule(
    'gup-reads-the-entry-again',
    'after a speculative reference the entry is read again, and the reference dropped if it has changed',
    SPECULATIVE,
    () => gupAndUnmap('speculative'),
    'it is not',
    'wrong-page',
    { actor: 'gup', change: { step: 'fast: read the entry again', to: { run: () => {} } } },
  ),
  editedRule(
    'gup-reads-the-directory-again',
    'after a speculative reference the directory is read again: a collapse takes tables away whose entries stay',
    from('commit 70cbc3cc78a9, mm/gup.c', '6.1'),
    () => ({
      initial: () => world({ pages: 1, marks: { pinned: -1 } }),
      actors: [
        actor<World, GupRegisters>('gup', gupRegisters(), [
          ...inlined(gupFastProgram('speculative', 0, request(), 'never'), 'fast'),
          keepPin,
        ]),
        vm('collapse', collapse),
      ],
      atEnd: [pinIsMapped, balanced],
    }),
    'only the entry is',
    pinIsMapped.name,
    { actor: 'gup', without: ['fast: read the directory again'] },
  ),
  editedRule(
    'gup-reads-the-huge-entry-again',
    'after a speculative reference on a huge page its entry is read again',
    from('mm/gup.c', '6.1'),
    () => ({
      initial: () => {
        const made = world({ frames: 1, memory: { kind: 'flat', frames: 1 } })
        mmap(space0(made), { first: 0, pages: 512, backing: { kind: 'anonymous' }, write: true })
        takePage(made.machine, 0, 'anonymous')
        frameOf(made.machine, 0).content = 7
        mapOneHuge(made, 0)
        return made
      },
      actors: [
        gup('speculative'),
        vm('unmap', [
          step('clear the huge entry', (state) => {
            delete space0(state).directory[0]
          }),
          step('free the huge page', ({ machine }) => {
            spaceOf(machine, 0).rssAnon -= HUGE_PAGES
            putPage(machine, 0, 'mapping')
          }),
          reuse,
        ]),
      ],
      atEnd: [balanced],
    }),
    'it is not',
    'wrong-page',
    { actor: 'gup', change: { step: 'fast: read the directory again, huge entry', to: { run: () => {} } } },
  ),
  editedRule(
    'gup-special-huge-entries-go-slow',
    'a special huge entry stops the fast path, and has no page for the slow one',
    from('commits ae3c99e650da, 6857be5fecae, 3c8e44c9b369, mm/gup.c', '6.12'),
    () => ({ initial: rawHugeWorld, actors: [gup('speculative', { vpn: 3 }, 'slow-path')], atEnd: [balanced] }),
    'the bit is ignored',
    'no-descriptor',
    {
      actor: 'gup',
      change: {
        step: 'fast: read the directory',
        to: {
          run: (state, me) => {
            const entry = directoryEntry(space0(state), 3)
            registers(me).huge = entry?.kind === 'huge' ? entry.pfn : -1
          },
        },
      },
    },
  ),
  editedRule(
    'gup-tables-are-freed-after-a-grace-period',
    'a page table is freed only when no lockless walk can be in it',
    SPECULATIVE,
    () => ({
      initial: () => world({ pages: 1 }),
      actors: [
        gup('speculative'),
        vm('munmap', [
          clear,
          free,
          step('take the table out of the directory', (state) => {
            delete space0(state).directory[0]
          }),
          acknowledged(GRACE),
          step('free the table', ({ machine }) => {
            const table = machine.tables[0]
            if (table !== undefined) table.live = false
          }),
        ]),
      ],
      atEnd: [balanced],
    }),
    'it is freed at once',
    'freed-table',
    { actor: 'munmap', without: [GRACE] },
  ),
  editedRule(
    'gup-write-needs-a-writable-entry',
    'for writing the entry must be writable: a read-only one may be shared',
    X86,
    () => ({
      initial: () => {
        const made = world({ pages: 1 })
        fork(made.machine, spaceOf(made.machine, 0))
        return made
      },
      actors: [
        actor<World, GupRegisters>('gup', gupRegisters(), [
          ...inlined(gupFastProgram('flush-interrupt', 0, request({ access: 'write' })), 'fast'),
          step<GupRegisters>('write 9 through the pin', (state, { pfns }) => {
            for (const pfn of pfns) frameOf(state.machine, pfn).content = 9
          }),
        ]),
        vm('child', [
          step('reads the page', (state) => {
            const pfn = readPte(state.machine, spaceOf(state.machine, 1), 0)?.pfn ?? -1
            const { content } = frameOf(state.machine, pfn)
            requireRule(content === 7, 'written-through-share', `the child sees ${content}`)
          }),
        ]),
      ],
      atEnd: [balanced],
    }),
    'permission is not looked at',
    'written-through-share',
    {
      actor: 'gup',
      change: {
        step: 'fast: present, allowed, not special?',
        to: {
          run: (_, me) => {
            registers(me).stopped = registers(me).pfn < 0 || registers(me).special
          },
        },
      },
    },
  ),
  editedRule(
    'gup-huge-references-on-the-head',
    'a huge entry takes its references by one addition on the head page',
    X86,
    () => ({
      initial: hugeWorld,
      actors: [gup('flush-interrupt', { vpn: 3 })],
      atEnd: [
        {
          name: 'pinned huge page stays',
          check: ({ machine }) => {
            const pinned = pageOf(machine, 0).pins
            return pinned === 1 ? null : `the head has ${pinned} pins`
          },
        },
      ],
    }),
    'they are taken on the page asked for, which has no count of its own',
    'use-after-free',
    {
      actor: 'gup',
      change: {
        step: 'fast: huge entry: one addition on the head',
        to: { run: (state) => getPage(state.machine, 3, 'pin') },
      },
    },
  ),
  editedRule(
    'gup-pae-reads-the-low-half-again',
    'an entry of two halves is read low, high, low again, and once more if it has changed',
    X86,
    pae,
    'the low half is not read again',
    'torn-entry',
    { actor: 'gup', without: ['read the low half again'] },
  ),
  switchedRule(
    'gup-pae-needs-a-flush-between-entries',
    'an entry never goes from one present value to another without a flush: the halves could not be told apart',
    X86,
    (change: 'with flush' | 'direct') => ({
      ...pae(),
      actors: [
        paeReader,
        vm(
          'change',
          change === 'with flush'
            ? [...paeWriter(1, 2), ...paeWriter(2, 3)]
            : [
                step('set the high half of 2', setMark('highHalf', 2)),
                step('set the low half of 2', setMark('lowHalf', 2)),
              ],
        ),
      ],
    }),
    'with flush',
    'it changes directly',
    'torn-entry',
    'direct',
  ),
  editedRule(
    'gup-pin-checks-the-fork-sequence',
    'a pin for writing checks the write-protect sequence after the walk: fork may have decided to share the page',
    from('commit 57efa1fe5957, mm/gup.c', '5.11'),
    forkAndPin,
    'it does not',
    'pinned page is private',
    { actor: 'pin', without: ['has the sequence moved?'] },
  ),
  editedRule(
    'gup-keeps-what-the-fast-path-has',
    'pages of the fast path are kept; an error of the slow path is returned only if there is none',
    X86,
    () => ({
      initial: () => {
        const made = world({ pages: 2, marks: { returned: 0 } })
        munmap(made.machine, spaceOf(made.machine, 0), 1, 1)
        return made
      },
      actors: [
        actor<World, GupRegisters>('gup', gupRegisters(), [
          ...inlined(gupFastProgram('flush-interrupt', 0, request({ pages: 2 })), 'fast'),
          step<GupRegisters>(
            'return',
            (state, { pfns, result }) => {
              state.marks['returned'] = result === 'pages' ? pfns.length : 0
            },
            { shows: (_, { result, pfns }) => (result === 'pages' ? `${pfns.length} pages` : result) },
          ),
        ]),
        vm('other', [step('works', () => {})]),
      ],
      atEnd: [pinsAre, balanced],
    }),
    'the error is returned, and the references are forgotten',
    'no lost pin',
    {
      actor: 'gup',
      change: {
        step: 'fast: slow path for the rest',
        to: {
          run: (_, me) => {
            registers(me).result = '-EFAULT'
          },
        },
      },
    },
  ),
  switchedRule(
    'gup-irq-variant-never-falls-back',
    'the variant for interrupt context gives what it has and never takes mmap_sem',
    X86,
    (fallback: 'never' | 'slow-path'): Scenario<World> => {
      const idle = ({ marks }: Readonly<World>): boolean => marks['interrupt'] === 0
      const lock = step('lock mmap_sem', (state) => {
        state.locks.mmapSem = 'munmap'
      })
      const unlock = step('unlock mmap_sem', (state) => {
        state.locks.mmapSem = ''
      })
      return {
        initial: () => world({ pages: 1, marks: { interrupt: 0 } }),
        actors: [
          actor<World, GupRegisters>('interrupt', gupRegisters(), [
            step('interrupt arrives', setMark('interrupt', 1)),
            ...inlined(gupFastProgram('flush-interrupt', 0, request({ pages: 2 }), fallback), 'fast'),
            step('return from interrupt', setMark('interrupt', 0)),
          ]),
          vm(
            'munmap, same cpu',
            onlyWhen([{ ...lock, when: ({ locks }) => locks.mmapSem === '' }, clear, free, unlock], idle),
          ),
        ],
        atEnd: [balanced],
      }
    },
    'never',
    'it waits for mmap_sem, which the interrupted thread holds',
    'deadlock',
    'slow-path',
  ),
  editedRule(
    'gup-checks-the-address-range',
    'a range that wraps around or is not of user pages goes to the slow path at once',
    X86,
    () => ({
      initial: () => {
        const made = world({})
        // A kernel page, mapped above the user's part of the same tables.
        takePage(made.machine, 2, 'reserved')
        frameOf(made.machine, 2).content = 66
        made.machine.tables.push({
          live: true,
          entries: { 0: { pfn: 2, special: false, writable: true, dirty: false } },
        })
        spaceOf(made.machine, 0).directory[USER_PAGES / 512] = { kind: 'table', table: 0 }
        return made
      },
      actors: [gup('flush-interrupt', { vpn: USER_PAGES })],
    }),
    'it walks the tables, and finds a page of the kernel',
    'wrong-page',
    { actor: 'gup', change: { step: 'fast: is the range one of user pages?', to: { run: () => {} } } },
  ),
]

/**
 * A pin for writing against fork: fork raises the sequence, looks whether the page is pinned, and shares or copies it.
 * The pin takes its reference without a lock, and drops it if the sequence has moved.
 */
function forkAndPin(): Scenario<World> {
  interface Pin {
    sequence: number
    pfn: number
    pinned: boolean
  }
  const sequence = ({ marks }: Readonly<World>): number => marks['sequence'] ?? 0
  return {
    initial: () => world({ pages: 1, marks: { sequence: 0 }, kernel: '5.9' }),
    actors: [
      actor<World, Pin>('pin', { sequence: 0, pfn: -1, pinned: false }, [
        step<Pin>(
          'read the sequence',
          (state, me) => {
            me.sequence = sequence(state)
          },
          { shows: (_, me) => String(me.sequence), jump: { to: 'end', if: (_, me) => me.sequence % 2 === 1 } },
        ),
        step<Pin>(
          'read the entry',
          (state, me) => {
            const pte = readPte(state.machine, space0(state), 0)
            me.pfn = pte?.writable === true ? pte.pfn : -1
          },
          {
            shows: (_, { pfn }) => (pfn < 0 ? 'read-only: slow path' : `frame ${pfn}`),
            jump: { to: 'end', if: (_, { pfn }) => pfn < 0 },
          },
        ),
        step<Pin>('pin the page', (state, me) => {
          getPage(state.machine, me.pfn, 'pin')
          me.pinned = true
        }),
        step<Pin>(
          'has the sequence moved?',
          (state, me) => {
            if (sequence(state) === me.sequence) return
            putPage(state.machine, me.pfn, 'pin')
            me.pinned = false
          },
          { shows: (_, { pinned }) => (pinned ? 'no' : 'yes: drop the pin') },
        ),
      ]),
      vm('fork', [
        step('sequence becomes odd', (state) => {
          state.marks['sequence'] = sequence(state) + 1
        }),
        step(
          'is the page pinned?',
          (state, me) => {
            me.failed = pageOf(state.machine, 0).pins > 0
          },
          { shows: (_, { failed }) => (failed ? 'yes' : 'no') },
        ),
        step('share it, or copy it', (state, me) => {
          fork(state.machine, space0(state), NO_SECONDARY_MMUS, () => me.failed)
        }),
        step('sequence becomes even', (state) => {
          state.marks['sequence'] = sequence(state) + 1
        }),
      ]),
    ],
    atEnd: [
      balanced,
      {
        name: 'pinned page is private',
        check: ({ machine }) => {
          const { pins, mapcount } = pageOf(machine, 0)
          return pins === 0 || mapcount === 1
            ? null
            : 'the pinned page is shared: a store would copy it away from the pin'
        },
      },
    ],
  }
}
