/**
 * Rules of copy-on-write against references: who may write in place, what fork, migration, collapse and split do with a
 * page that somebody holds. With their mutants. Each scenario keeps the rule of one kernel.
 */
import { type Actor, actor, type Check, type RuleEntry, requireRule, type Scenario } from '@tmem/interleave'
import {
  clearPte,
  copyFrame,
  dropMapped,
  enterSwapCache,
  type ForcedWrite,
  fault,
  findVma,
  fork,
  frameOf,
  type GupRegisters,
  getPage,
  getUserPages,
  gupFastProgram,
  gupRegisters,
  gupSlowProgram,
  handOver,
  leaveSwapCache,
  mmap,
  munmap,
  NO_SECONDARY_MMUS,
  pageOf,
  putPage,
  readPte,
  type SlowGupRegisters,
  setPte,
  slowGupRegisters,
  spaceOf,
  takePage,
  translate,
  writeProtectFault,
  zapRange,
} from '@tmem/vm-mixedmap'
import { collapse, keepPin, mapOneHuge, pinIsMapped } from './gup.ts'
import { editedRule, switchedRule } from './list.ts'
import {
  balanced,
  from,
  inlined,
  space0,
  step,
  type VmStep,
  vm,
  type World,
  type WorldOptions,
  world,
} from './world.ts'

type Kernel = NonNullable<WorldOptions['kernel']>

/** Page 0 of space 0 holds 7; "pinned" is the frame that somebody holds. */
const one = (kernel: Kernel): World => world({ pages: 1, marks: { pinned: -1 }, kernel })

/** The same after a fork: space 1 is the child. */
function forked(kernel: Kernel): World {
  const made = one(kernel)
  fork(made.machine, space0(made))
  return made
}

/** A store of the process to page 0, with the fault that it needs. */
const stores = (value: number, space = 0): VmStep =>
  step(
    `stores ${value} to page 0`,
    ({ machine }, me) => {
      const owner = spaceOf(machine, space)
      if (translate(machine, owner, 0, 'write') === null) fault(machine, owner, 0, 'write')
      me.pfn = translate(machine, owner, 0, 'write') ?? -1
      if (me.pfn >= 0) frameOf(machine, me.pfn).content = value
    },
    { shows: (_, { pfn }) => `frame ${pfn}` },
  )

const pins = (access: 'read' | 'write'): VmStep =>
  step(
    `pins page 0 to ${access} it`,
    (state, me) => {
      const got = getUserPages(state.machine, { space: 0, vpn: 0, pages: 1, access })
      me.pfn = got.kind === 'pages' ? (got.pfns[0] as number) : -1
      state.marks['pinned'] = me.pfn
    },
    { shows: (_, { pfn }) => `frame ${pfn}` },
  )

const WRITE_PROTECT = 'takes the write permission of the entry away'

/** Soft-dirty tracking, or mprotect there and back: the entry becomes read-only, the area stays writable. */
const protector: Actor<World> = vm('tracker', [
  step(WRITE_PROTECT, (state) => {
    const pte = readPte(state.machine, space0(state), 0)
    if (pte !== null) pte.writable = false
  }),
])

/** The child of space 0 sees what the page held when it was forked. */
const childKeeps: Check<World> = {
  name: 'the child keeps its data',
  check: ({ machine }) => {
    const child = machine.spaces[1]
    const pfn = child === undefined ? null : translate(machine, child, 0, 'read')
    const content = pfn === null ? 7 : frameOf(machine, pfn).content
    return content === 7 ? null : `the child sees ${content}`
  },
}

/** A private, read-only mapping of a file whose only page is frame 3, and holds 7. */
function fileWorld(): World {
  const made = world({})
  takePage(made.machine, 3, 'file')
  frameOf(made.machine, 3).content = 7
  mmap(space0(made), { first: 0, pages: 1, mayWrite: true, backing: { kind: 'file', pages: [3] } })
  return made
}

const forcedWrite = (forced: ForcedWrite): Scenario<World> => ({
  initial: fileWorld,
  actors: [
    actor<World, SlowGupRegisters>('/proc/self/mem', slowGupRegisters(), [
      ...inlined(gupSlowProgram({ space: 0, vpn: 0, access: 'write' }, forced), 'slow'),
      step<SlowGupRegisters>('write 9 through the reference, give it back', ({ machine }, { pfn }) => {
        if (pfn < 0) return
        frameOf(machine, pfn).content = 9
        putPage(machine, pfn, 'pin')
      }),
    ]),
    vm('madvise', [step('drop the page', (state) => zapRange(state.machine, space0(state), 0, 1))]),
  ],
  atEnd: [
    {
      name: 'the file is not written to',
      check: ({ machine }) => {
        const { content } = frameOf(machine, 3)
        return content === 7 ? null : `the read-only file holds ${content}`
      },
    },
    balanced,
  ],
})

const FORK = 'forks'
const REUSE_CHECK = 'any other reference?'

/** Replaces the entry of page 0 by a migration entry, moves the page to frame 3. */
const migration: VmStep[] = [
  step('replace the entry by a migration entry, flush', (state, me) => {
    me.pfn = clearPte(state.machine, space0(state), 0)?.pfn ?? -1
    state.marks['migrating'] = me.pfn
  }),
  step(
    REUSE_CHECK,
    ({ machine }, me) => {
      const { count, mapcount } = pageOf(machine, me.pfn)
      me.failed = count !== mapcount
    },
    { shows: (_, { failed }) => (failed ? 'yes: give up' : 'no'), jump: { to: 'undo', if: (_, me) => me.failed } },
  ),
  step('copy the page', ({ machine }, { pfn }) => {
    takePage(machine, 3, 'anonymous')
    copyFrame(machine, pfn, 3)
  }),
  step(
    'map the new page, free the old one',
    (state, { pfn }) => {
      const { machine } = state
      setPte(machine, space0(state), 0, { pfn: 3, special: false, writable: true, dirty: true })
      handOver(machine, 3, 'owner', 'mapping')
      space0(state).rssAnon++
      dropMapped(machine, space0(state), pfn)
      state.marks['migrating'] = -1
    },
    { jump: { to: 'end', if: () => true } },
  ),
  step(
    'put the entry back',
    (state, { pfn }) => {
      setPte(state.machine, space0(state), 0, { pfn, special: false, writable: true, dirty: true })
      state.marks['migrating'] = -1
    },
    { at: 'undo' },
  ),
]

const fastPin: Actor<World> = actor<World, GupRegisters>('gup', gupRegisters(), [
  ...inlined(gupFastProgram('speculative', 0, { space: 0, vpn: 0, pages: 1, access: 'read' }, 'never'), 'fast'),
  keepPin,
])

const migrating = (): World => world({ pages: 1, marks: { pinned: -1, migrating: -1 } })

/** A page table with two pages, which are one compound page: a huge page in small. Page 1 is used and pinned. */
function compound(): World {
  const made = world({ pages: 2, marks: { pinned: -1 } })
  const { machine } = made
  const [head, tail] = [pageOf(machine, 0), pageOf(machine, 1)]
  Object.assign(head, { count: 1, mapcount: 0, owners: 1 })
  Object.assign(tail, { count: 0, mapcount: 0, head: 0 })
  delete machine.tables[0]?.entries[0]
  delete machine.tables[0]?.entries[1]
  space0(made).rssAnon = 0
  delete space0(made).directory[0]
  mapOneHuge(made, 0)
  return made
}

/** Splits the compound page of frames 0 and 1 and maps them by small entries. */
const split: VmStep[] = [
  step('replace the huge entry by migration entries, flush', (state) => {
    delete space0(state).directory[0]
  }),
  step(
    REUSE_CHECK,
    ({ machine }, me) => {
      me.failed = pageOf(machine, 0).count !== 1
    },
    { shows: (_, { failed }) => (failed ? 'yes: give up' : 'no'), jump: { to: 'undo', if: (_, me) => me.failed } },
  ),
  step(
    'each page counts for itself',
    (state) => {
      const { machine } = state
      Object.assign(pageOf(machine, 1), { head: 1, count: 1, mapcount: 1 })
      space0(state).directory[0] = { kind: 'table', table: 0 }
      space0(state).rssAnon = 2
      for (const pfn of [0, 1]) {
        setPte(machine, space0(state), pfn, { pfn, special: false, writable: true, dirty: true })
      }
    },
    { jump: { to: 'end', if: () => true } },
  ),
  step(
    'put the huge entry back',
    (state) => {
      space0(state).directory[0] = { kind: 'huge', pfn: 0, special: false, writable: true, dirty: true }
    },
    { at: 'undo' },
  ),
]

export const cowRules: readonly RuleEntry<World>[] = [
  switchedRule(
    'cow-forced-store-remembers-the-copy',
    'a forced store to a private read-only area asks for the copy until it has it: the copy may be dropped meanwhile',
    from('commit 19be0eaffa3a (CVE-2016-5195), mm/gup.c', '4.9'),
    forcedWrite,
    'remembers-the-copy',
    'after the copy it asks for any entry, and gets that of the page cache',
    'the file is not written to',
    'forgets-the-write',
  ),
  switchedRule(
    'cow-reuse-counts-references',
    'a store writes in place only if nobody else has a reference: who unmaps a page may have kept one',
    from('commit 09854ba94c6a (CVE-2020-29374), mm/memory.c', '5.9'),
    (kernel: Kernel): Scenario<World> => ({
      initial: () => forked(kernel),
      actors: [
        vm('child', [
          step('takes a reference to read page 0', ({ machine }, me) => {
            const got = getUserPages(machine, { space: 1, vpn: 0, pages: 1, access: 'read' })
            me.pfn = got.kind === 'pages' ? (got.pfns[0] as number) : -1
          }),
          step('unmaps it', ({ machine }) => munmap(machine, spaceOf(machine, 1), 0, 1)),
          step('reads through the reference', ({ machine }, { pfn }) => {
            const { content } = frameOf(machine, pfn)
            requireRule(content === 7, 'leak', `the child reads ${content}, which the parent has stored after the fork`)
          }),
        ]),
        vm('parent', [stores(9)]),
      ],
      atEnd: [balanced],
    }),
    '5.9',
    'mapcount and swap entries are counted, as in 2.6.31',
    'leak',
    '2.6.31',
  ),
  {
    name: 'cow-fork-copies-pinned-pages',
    rule: 'fork copies a pinned page at once: shared, the next store of the process would leave the pin its old page',
    ...from('commits 70e806e4e645, d042035eaf5f, mm/memory.c', '5.9'),
    scenario: () => pinnedFork(true),
    mutant: { breaks: 'it shares it like any other', caughtAs: pinIsMapped.name, scenario: () => pinnedFork(false) },
  },
  switchedRule(
    'cow-exclusive-page-is-reused',
    'a store to a page marked exclusive writes in place, whoever else holds it: a pin and the process stay together',
    from('commit 6c287605fd56, mm/memory.c', '5.19'),
    (kernel: Kernel): Scenario<World> => ({
      initial: () => one(kernel),
      actors: [vm('process', [pins('write'), stores(9)]), protector],
      atEnd: [pinIsMapped, balanced],
    }),
    '5.19',
    'references are counted, as in 5.9: the pin itself forces a copy',
    pinIsMapped.name,
    '5.9',
  ),
  editedRule(
    'cow-pin-for-reading-unshares-first',
    'who pins a page for reading makes it exclusive first: otherwise the next store copies it away from the pin',
    from('commit 31cc5bc4af70 and those around it, mm/gup.c', '5.19'),
    () => ({
      initial: () => forked('5.19'),
      actors: [vm('process', [pins('read'), stores(9)]), vm('child', [stores(8, 1)])],
      atEnd: [pinIsMapped, balanced],
    }),
    'the shared page is pinned',
    pinIsMapped.name,
    {
      actor: 'process',
      change: {
        step: 'pins page 0 to read it',
        to: {
          run: (state) => {
            const pfn = readPte(state.machine, space0(state), 0)?.pfn ?? -1
            getPage(state.machine, pfn, 'pin')
            state.marks['pinned'] = pfn
          },
        },
      },
    },
  ),
  editedRule(
    'cow-fork-takes-the-mark-away',
    'fork takes the exclusive mark from a page that it shares: otherwise a store writes what the child sees',
    from('commit 6c287605fd56, mm/memory.c, include/linux/rmap.h', '5.19'),
    () => ({
      initial: () => one('5.19'),
      actors: [
        vm('process', [step(FORK, ({ machine }) => void fork(machine, spaceOf(machine, 0))), stores(9)]),
        protector,
      ],
      atEnd: [childKeeps, balanced],
    }),
    'the mark stays',
    childKeeps.name,
    {
      actor: 'process',
      change: {
        step: FORK,
        to: {
          run: ({ machine }) => {
            fork(machine, spaceOf(machine, 0))
            pageOf(machine, 0).exclusive = true
          },
        },
      },
    },
  ),
  editedRule(
    'cow-swap-entries-are-users',
    'a page in the swap cache is written in place only if no swap entry stands for it: another process will map it',
    from('mm/swapfile.c, mm/memory.c', '2.6.31'),
    () => ({
      initial: () => {
        const made = forked('2.6.31')
        // The child's entry went to swap, the page is still in the cache.
        const child = spaceOf(made.machine, 1)
        clearPte(made.machine, child, 0)
        enterSwapCache(made.machine, 0, 1)
        dropMapped(made.machine, child, 0)
        return made
      },
      actors: [
        vm('parent', [stores(9)]),
        vm('child', [
          step('swaps page 0 in from the cache', ({ machine }) => {
            const child = spaceOf(machine, 1)
            setPte(machine, child, 0, { pfn: 0, special: false, writable: false, dirty: false })
            getPage(machine, 0, 'mapping')
            child.rssAnon++
            leaveSwapCache(machine, 0)
          }),
        ]),
      ],
      atEnd: [childKeeps, balanced],
    }),
    'only the mapcount is looked at',
    childKeeps.name,
    {
      actor: 'parent',
      change: {
        step: 'stores 9 to page 0',
        to: {
          run: ({ machine }) => {
            const pte = readPte(machine, spaceOf(machine, 0), 0)
            const vma = findVma(spaceOf(machine, 0), 0)
            if (pte === null || vma === undefined) return
            if (pageOf(machine, pte.pfn).mapcount === 1) pte.writable = true
            else writeProtectFault(machine, spaceOf(machine, 0), vma, 0)
            frameOf(machine, translate(machine, spaceOf(machine, 0), 0, 'write') as number).content = 9
          },
        },
      },
    },
  ),
  editedRule(
    'migration-gives-up-on-references',
    'a page with a reference besides those of its entries is not migrated: whoever has it goes on using the old one',
    from('mm/migrate.c', '2.6.31'),
    () => ({ initial: migrating, actors: [fastPin, vm('migrate', migration)], atEnd: [pinIsMapped, balanced] }),
    'nobody looks',
    pinIsMapped.name,
    { actor: 'migrate', without: [REUSE_CHECK] },
  ),
  editedRule(
    'migration-entry-makes-faults-wait',
    'a fault that finds a migration entry waits for the page: the entry is not empty',
    from('mm/migrate.c, mm/memory.c', '2.6.31'),
    () => ({
      initial: migrating,
      actors: [
        vm('process', [
          step(
            'loads page 0',
            (state) => {
              if (translate(state.machine, space0(state), 0, 'read') === null) {
                fault(state.machine, space0(state), 0, 'read')
              }
              const pfn = translate(state.machine, space0(state), 0, 'read') as number
              const { content } = frameOf(state.machine, pfn)
              requireRule(content === 7, 'lost-page', `page 0 holds ${content}, not 7`)
            },
            { when: ({ marks }) => marks['migrating'] === -1 },
          ),
        ]),
        vm('migrate', migration),
      ],
      atEnd: [balanced],
    }),
    'it takes it for empty and maps a page of zeros',
    'lost-page',
    { actor: 'process', change: { step: 'loads page 0', to: { when: () => true } } },
  ),
  editedRule(
    'collapse-gives-up-on-references',
    'a page with a reference besides that of its entry is not collapsed into a huge one',
    from('mm/huge_memory.c', '2.6.38'),
    () => ({
      initial: () => world({ pages: 1, marks: { pinned: -1 } }),
      actors: [fastPin, vm('collapse', collapse)],
      atEnd: [pinIsMapped, balanced],
    }),
    'nobody looks',
    pinIsMapped.name,
    { actor: 'collapse', without: [REUSE_CHECK] },
  ),
  editedRule(
    'split-gives-up-on-references',
    'a huge page with a reference besides that of its entry is not split: the reference is on the head for any page',
    from('mm/huge_memory.c', '4.5'),
    () => ({
      initial: compound,
      actors: [
        actor<World, GupRegisters>('gup', gupRegisters(), [
          ...inlined(gupFastProgram('speculative', 0, { space: 0, vpn: 1, pages: 1, access: 'read' }, 'never'), 'fast'),
          step<GupRegisters>('give the page back', ({ machine }, { pfns }) => {
            for (const pfn of pfns) putPage(machine, pageOf(machine, pfn).head, 'pin')
          }),
        ]),
        vm('split', split),
      ],
      atEnd: [balanced],
    }),
    'nobody looks, and the reference is given back to a page that has none',
    'reference-underflow',
    { actor: 'split', without: [REUSE_CHECK] },
  ),
]

/** A process pins page 0 for a device and stores to it; another thread forks. */
function pinnedFork(early: boolean): Scenario<World> {
  return {
    initial: () => one('5.9'),
    actors: [
      vm('process', [pins('write'), stores(9)]),
      vm('thread', [
        step(FORK, ({ machine }) => {
          if (early) fork(machine, spaceOf(machine, 0))
          else fork(machine, spaceOf(machine, 0), NO_SECONDARY_MMUS, () => false)
        }),
      ]),
    ],
    atEnd: [pinIsMapped, balanced],
  }
}
