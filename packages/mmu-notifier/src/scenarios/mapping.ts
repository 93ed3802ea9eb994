/** Rules of page mapping: vm_normal_page, the insert functions, copy-on-write; with their mutants. */
import { acquire, actor, type Check, type RuleEntry, release, requireRule, type Scenario } from '@tmem/interleave'
import {
  type AddressSpace,
  findVma,
  fork,
  getPage,
  type Machine,
  mmap,
  type NormalPage,
  pfnValid,
  putPage,
  readPte,
  remapPfnRange,
  setPte,
  spaceOf,
  takePage,
  type Vma,
  type VmaFlags,
  vmInsertMixed,
  vmInsertPage,
  vmInsertPfn,
  vmNormalPage,
  writeProtectFault,
  zapPte,
} from '@tmem/vm-mixedmap'
import { editedRule, switchedRule } from './list.ts'
import { balanced, from, step, type World, world } from './world.ts'

const MEMORY = from('mm/memory.c', '2.6.31')
const MIXED = from('mail "VM_MIXEDMAP, pte_special, xip work", N. Piggin, 12 March 2008; mm/memory.c', '2.6.31')

type Classify = typeof vmNormalPage

type Insert = (machine: Machine, space: AddressSpace, vma: Vma, pfn: number) => unknown

/** Two processes that map a frame at page 0 and unmap it again. */
interface Setting {
  readonly pteSpecial: boolean
  readonly area: Partial<VmaFlags>
  /** Frame to map; 0 to 3 have a descriptor (1 is the owner's), 4 and 5 have none. */
  readonly pfn: number
  readonly pgoff?: number
  /** Where; default page 0 of two. */
  readonly vpn?: number
  /** Maps it. */
  readonly insert: Insert
  /** What an unmapper believes an entry to be. */
  readonly classify?: Classify
  /** A store in between, so that a private area makes a copy. */
  readonly store?: 'with-store' | 'without'
}

function mapAndUnmap(setting: Setting, more: readonly Check<World>[] = []): Scenario<World> {
  const { pteSpecial, area, pfn, pgoff = 0, vpn = 0, insert, classify, store = 'without' } = setting
  const process = (id: number) => {
    const where = (state: World): [AddressSpace, Vma] => {
      const space = spaceOf(state.machine, id)
      return [space, findVma(space, 0) as Vma]
    }
    return actor<World>(`process ${id}`, {}, [
      step('map the frame', (state) => void insert(state.machine, ...where(state), pfn), { shows: entryOf(id, vpn) }),
      ...(store === 'without'
        ? []
        : [
            step('store: copy', (state) => void writeProtectFault(state.machine, ...where(state), vpn), {
              shows: entryOf(id, vpn),
            }),
          ]),
      step('unmap', (state) => zapPte(state.machine, where(state)[0], vpn, classify)),
    ])
  }
  return {
    initial: () => {
      const made = world({ pteSpecial, frames: 6, spaces: 2 })
      takePage(made.machine, 1, 'reserved')
      for (const space of made.machine.spaces) {
        mmap(space, { first: 0, pages: 2, pgoff, backing: { kind: 'device' }, ...area })
      }
      return made
    },
    actors: [process(0), process(1)],
    atEnd: [balanced, ...more],
  }
}

function entryOf(id: number, vpn: number = 0): (state: Readonly<World>) => string {
  return ({ machine }) => {
    const pte = readPte(machine, spaceOf(machine, id), vpn)
    return pte === null ? 'empty' : `frame ${pte.pfn}${pte.special ? ' special' : ''}`
  }
}

const page: (pfn: number) => NormalPage = (pfn) => ({ kind: 'page', pfn })
const none: NormalPage = { kind: 'none', why: 'special' }

/** A rule of vm_normal_page: the mutant decides otherwise. */
function decision(
  name: string,
  rule: string,
  setting: Setting,
  breaks: string,
  caughtAs: string,
  mutant: Classify,
  more: readonly Check<World>[] = [],
): RuleEntry<World> {
  return switchedRule(
    name,
    rule,
    MIXED,
    (classify: Classify) => mapAndUnmap({ ...setting, classify }, more),
    vmNormalPage,
    breaks,
    caughtAs,
    mutant,
  )
}

const mixed: Insert = (machine, space, vma, pfn) => vmInsertMixed(machine, space, vma, 0, pfn)
const raw: Insert = (machine, space, vma, pfn) => vmInsertPfn(machine, space, vma, 0, pfn)
const remap: Insert = (machine, space, vma, pfn) => remapPfnRange(machine, space, vma, 0, pfn, 2)
const corrupt =
  (special: boolean): Insert =>
  (machine, space, _vma, pfn) =>
    setPte(machine, space, 0, { pfn, special, writable: false, dirty: false })

/** Bad entries are expected, one per process; nothing else may be wrong. */
function reported(setting: Setting): Scenario<World> {
  return {
    ...mapAndUnmap(setting),
    atEnd: [
      {
        name: 'bad entries are reported',
        check: ({ machine }) => (machine.badPtes.length === 2 ? null : `${machine.badPtes.length} of 2 are`),
      },
    ],
  }
}

/** An insert that leaves something out: what a driver gets that does it by hand. */
const byHand =
  (count: 'counted' | 'not counted', special: boolean): Insert =>
  (machine, space, _vma, pfn) => {
    setPte(machine, space, 0, { pfn, special, writable: false, dirty: false })
    if (count === 'not counted') return
    getPage(machine, pfn, 'mapping')
    space.rssFile++
  }

function insertRule(
  name: string,
  rule: string,
  setting: Setting,
  breaks: string,
  caughtAs: string,
  mutant: Insert,
  area: Partial<VmaFlags> = setting.area,
): RuleEntry<World> {
  return switchedRule(
    name,
    rule,
    MEMORY,
    (part: Pick<Setting, 'insert' | 'area'>) => mapAndUnmap({ ...setting, ...part }),
    { insert: setting.insert, area: setting.area },
    breaks,
    caughtAs,
    { insert: mutant, area },
  )
}

export const mappingRules: readonly RuleEntry<World>[] = [
  decision(
    'special-entry-has-no-page',
    'a special entry of a PFNMAP or MIXEDMAP area has no page',
    { pteSpecial: true, area: { mixedMap: true }, pfn: 5, insert: mixed },
    'the bit is ignored',
    'no-descriptor',
    (_machine, _vma, _vpn, { pfn }) => page(pfn),
  ),
  switchedRule(
    'special-entry-needs-its-area',
    'a special entry in an ordinary area is reported as bad',
    MIXED,
    (classify: Classify) => reported({ pteSpecial: true, area: {}, pfn: 5, insert: corrupt(true), classify }),
    vmNormalPage,
    'it is silently taken for a frame without page',
    'bad entries are reported',
    () => none,
  ),
  switchedRule(
    'frame-beyond-last-descriptor',
    'an ordinary entry whose frame lies beyond the last descriptor is reported as bad and has no page',
    MIXED,
    (classify: Classify) => reported({ pteSpecial: true, area: {}, pfn: 5, insert: corrupt(false), classify }),
    vmNormalPage,
    'its page is looked up all the same',
    'no-descriptor',
    (_machine, _vma, _vpn, { pfn }) => page(pfn),
  ),
  decision(
    'mixed-frame-without-descriptor',
    'without pte_special, an entry of a MIXEDMAP area has no page if pfn_valid is false',
    { pteSpecial: false, area: { mixedMap: true }, pfn: 5, insert: mixed },
    'pfn_valid is not asked',
    'no-descriptor',
    (_machine, _vma, _vpn, { pfn }) => page(pfn),
  ),
  decision(
    'mixed-frame-with-descriptor-is-counted',
    'without pte_special, an entry of a MIXEDMAP area has a page if pfn_valid is true, and it is counted',
    { pteSpecial: false, area: { mixedMap: true }, pfn: 1, insert: mixed },
    'unmapping takes it for uncounted',
    balanced.name,
    () => none,
  ),
  decision(
    'pfnmap-linear-rule',
    'without pte_special, an entry of a PFNMAP area whose frame is where the first one says has no page',
    { pteSpecial: false, area: { mayWrite: true, write: true }, pfn: 1, insert: remap },
    'the rule is not applied',
    'reference-underflow',
    (_machine, _vma, _vpn, { pfn }) => page(pfn),
  ),
  decision(
    'pfnmap-shared-holds-any-frame',
    'without pte_special, no entry of a PFNMAP area that is not copy-on-write has a page',
    { pteSpecial: false, area: { pfnMap: true, shared: true }, pfn: 1, pgoff: 9, insert: raw },
    'only the linear rule is applied',
    'reference-underflow',
    (_machine, vma, vpn, { pfn }) => (pfn === vma.pgoff + vpn - vma.first ? none : page(pfn)),
  ),
  decision(
    'pfnmap-private-copy-has-a-page',
    'without pte_special, an entry of a copy-on-write PFNMAP area off the linear rule is a private copy: a page',
    { pteSpecial: false, area: { mayWrite: true, write: true }, pfn: 4, insert: remap, store: 'with-store' },
    'no entry of the area has a page',
    balanced.name,
    () => none,
  ),
  decision(
    'mixedmap-is-asked-before-pfnmap',
    'MIXEDMAP is asked before PFNMAP: a counted page may lie where the linear rule expects a raw frame',
    { pteSpecial: false, area: { mixedMap: true, pfnMap: true, mayWrite: true }, pfn: 1, pgoff: 1, insert: mixed },
    'PFNMAP is asked first',
    balanced.name,
    (machine, vma, vpn, pte) => vmNormalPage(machine, { ...vma, mixedMap: false }, vpn, pte),
  ),
  insertRule(
    'remap-covers-the-copy-on-write-area',
    'remap_pfn_range of a copy-on-write area covers all of it: the area remembers one first frame',
    {
      pteSpecial: false,
      area: { mayWrite: true, write: true },
      pfn: 1,
      vpn: 1,
      insert: (machine, space, vma, pfn) => remapPfnRange(machine, space, vma, 1, pfn, 1),
    },
    'a part is mapped, and the area takes its frame for that of the first page',
    'reference-underflow',
    (machine, space, vma, pfn) => {
      Object.assign(vma, { pfnMap: true, pgoff: pfn })
      setPte(machine, space, 1, { pfn, special: false, writable: false, dirty: false })
    },
  ),
  insertRule(
    'insert-page-takes-a-reference',
    'vm_insert_page takes a reference and a mapcount, which unmapping gives back',
    {
      pteSpecial: true,
      area: { shared: true },
      pfn: 1,
      insert: (machine, space, vma, pfn) => vmInsertPage(machine, space, vma, 0, pfn),
    },
    'only the entry is written',
    'reference-underflow',
    byHand('not counted', false),
  ),
  switchedRule(
    'insert-page-refuses-free-pages',
    'vm_insert_page refuses a page without references: its owner may have given it back',
    MEMORY,
    (insert: (state: World) => void): Scenario<World> => ({
      initial: () => {
        const made = world({})
        takePage(made.machine, 1, 'file')
        mmap(spaceOf(made.machine, 0), { first: 0, pages: 1, backing: { kind: 'device' } })
        return made
      },
      actors: [
        actor<World>('owner', {}, [step('give the page back', (state) => void putPage(state.machine, 1, 'owner'))]),
        actor<World>('driver', {}, [step('insert the page', insert, { shows: entryOf(0) })]),
      ],
      atEnd: [balanced],
    }),
    (state: World) => {
      const space = spaceOf(state.machine, 0)
      vmInsertPage(state.machine, space, findVma(space, 0) as Vma, 0, 1)
    },
    'it does not look',
    'use-after-free',
    (state: World) => byHand('counted', false)(state.machine, spaceOf(state.machine, 0), {} as Vma, 1),
  ),
  switchedRule(
    'insert-page-refuses-anonymous-pages',
    'vm_insert_page refuses anonymous pages: it accounts for file pages',
    MEMORY,
    (insert: Insert) => {
      const scenario = mapAndUnmap({ pteSpecial: true, area: { shared: true }, pfn: 0, insert })
      return {
        ...scenario,
        initial: () => {
          const made = scenario.initial()
          takePage(made.machine, 0, 'anonymous')
          return made
        },
      }
    },
    (machine: Machine, space: AddressSpace, vma: Vma, pfn: number) => vmInsertPage(machine, space, vma, 0, pfn),
    'it inserts them',
    balanced.name,
    byHand('counted', false),
  ),
  insertRule(
    'insert-pfn-into-mixed-needs-no-descriptor',
    'vm_insert_pfn into a MIXEDMAP area is for frames without descriptor; others are counted when unmapped',
    { pteSpecial: false, area: { mixedMap: true }, pfn: 1, insert: mixed },
    'a frame with descriptor is inserted without being counted',
    'reference-underflow',
    byHand('not counted', false),
  ),
  insertRule(
    'insert-pfn-not-into-copy-on-write-pfnmap',
    'vm_insert_pfn refuses a copy-on-write PFNMAP area: its frames would be taken for private copies',
    { pteSpecial: false, area: { pfnMap: true, shared: true }, pfn: 1, pgoff: 9, insert: raw },
    'the area is private',
    'reference-underflow',
    byHand('not counted', false),
    { pfnMap: true, mayWrite: true },
  ),
  insertRule(
    'insert-mixed-counts-nothing-with-pte-special',
    'with pte_special vm_insert_mixed makes a special entry and counts nothing, even if there is a descriptor',
    { pteSpecial: true, area: { mixedMap: true }, pfn: 1, insert: mixed },
    'it counts, and unmapping does not',
    balanced.name,
    byHand('counted', true),
  ),
  editedRule(
    'entry-is-checked-under-its-lock',
    'that an entry is empty is checked under the lock under which it is written: -EBUSY for the second of two threads',
    MEMORY,
    () => ({
      initial: () => {
        const made = world({ locks: ['page table'] })
        takePage(made.machine, 1, 'file')
        takePage(made.machine, 2, 'file')
        mmap(spaceOf(made.machine, 0), { first: 0, pages: 1, backing: { kind: 'device' } })
        return made
      },
      actors: [1, 2].map((pfn) =>
        actor<World, { empty: boolean }>(`thread ${pfn}`, { empty: false }, [
          acquire('page table', `thread ${pfn}`),
          step<{ empty: boolean }>(
            'is the entry empty?',
            (state, me) => {
              me.empty = readPte(state.machine, spaceOf(state.machine, 0), 0) === null
            },
            { shows: (_, { empty }) => (empty ? 'yes' : '-EBUSY') },
          ),
          step<{ empty: boolean }>(`write frame ${pfn}`, (state, { empty }) => {
            if (empty) byHand('counted', false)(state.machine, spaceOf(state.machine, 0), {} as Vma, pfn)
          }),
          release('page table', `thread ${pfn}`),
        ]),
      ),
      atEnd: [balanced],
    }),
    'the lock is taken after the check',
    balanced.name,
    { actor: 'thread 1', move: { step: 'lock page table', before: 'write frame 1' } },
    { actor: 'thread 2', move: { step: 'lock page table', before: 'write frame 2' } },
  ),
  editedRule(
    'fault-excludes-unmap',
    'a fault holds mmap_sem from looking the area up to writing the entry: the area may be unmapped meanwhile',
    MEMORY,
    () => ({
      initial: () => {
        const made = world({})
        takePage(made.machine, 1, 'file')
        mmap(spaceOf(made.machine, 0), { first: 0, pages: 1, backing: { kind: 'device' } })
        return made
      },
      actors: [
        actor<World, { found: boolean }>('fault', { found: false }, [
          acquire('mmapSem', 'fault'),
          step<{ found: boolean }>(
            'look the area up',
            (state, me) => {
              me.found = findVma(spaceOf(state.machine, 0), 0) !== undefined
            },
            { shows: (_, { found }) => (found ? 'found' : 'SIGSEGV') },
          ),
          step<{ found: boolean }>('insert the page', (state, { found }) => {
            if (found) byHand('counted', false)(state.machine, spaceOf(state.machine, 0), {} as Vma, 1)
          }),
          release('mmapSem', 'fault'),
        ]),
        actor<World>('munmap', {}, [
          acquire('mmapSem', 'munmap'),
          step('unmap the pages', (state) => zapPte(state.machine, spaceOf(state.machine, 0), 0)),
          step('remove the area', (state) => {
            spaceOf(state.machine, 0).vmas = []
          }),
          release('mmapSem', 'munmap'),
        ]),
      ],
      atEnd: [balanced],
    }),
    'it holds nothing',
    balanced.name,
    { actor: 'fault', without: ['lock mmapSem', 'unlock mmapSem'] },
  ),
  switchedRule(
    'pfn-valid-sleeps-on-s390',
    'where pfn_valid has to take a mutex it cannot be asked under the page-table lock: hence pte_special',
    from('commit 7e675137a8e1; arch/s390/mm/vmem.c', '2.6.31'),
    (asked: 'never' | 'under the lock') => ({
      initial: () => {
        const memory = { kind: 'extents', extents: [{ first: 0, frames: 4 }] } as const
        return world({
          memory: { ...memory, extents: [...memory.extents] },
          pteSpecial: asked === 'never',
          frames: 6,
          locks: ['page table', 'segments'],
        })
      },
      actors: [
        actor<World>('unmap', {}, [
          acquire('page table', 'unmap'),
          ...(asked === 'never' ? [] : [acquire('segments', 'unmap')]),
          step('is there a page?', (state) => {
            if (asked !== 'never') pfnValid(state.machine.memory, 5, 'may-sleep')
          }),
          ...(asked === 'never' ? [] : [release('segments', 'unmap')]),
          release('page table', 'unmap'),
        ]),
        actor<World>('detach a segment', {}, [
          acquire('segments', 'detach'),
          acquire('page table', 'detach'),
          step('unmap what maps it', () => {}),
          release('page table', 'detach'),
          release('segments', 'detach'),
        ]),
      ],
    }),
    'never',
    'vm_normal_page asks it',
    'deadlock',
    'under the lock',
  ),
  switchedRule(
    'fork-counts-pages',
    'fork takes a reference and a mapcount for every page that the copy maps',
    MEMORY,
    (lost: 'nothing' | 'a reference'): Scenario<World> => ({
      initial: () => {
        const made = world({ pages: 1 })
        fork(made.machine, spaceOf(made.machine, 0))
        const shared = made.machine.frames[0]?.page
        if (lost !== 'nothing' && shared) Object.assign(shared, { count: 1, mapcount: 1 })
        return made
      },
      actors: [0, 1].map((id) =>
        actor<World>(`process ${id}`, {}, [
          step('unmap', (state) => zapPte(state.machine, spaceOf(state.machine, id), 0)),
        ]),
      ),
      atEnd: [balanced],
    }),
    'nothing',
    'only the entry is copied',
    'reference-underflow',
    'a reference',
  ),
  switchedRule(
    'fork-does-not-count-special-entries',
    'fork copies special entries without counting',
    MEMORY,
    (counted: 'not counted' | 'counted'): Scenario<World> => ({
      initial: () => {
        const made = world({ frames: 6, pteSpecial: true })
        const space = spaceOf(made.machine, 0)
        takePage(made.machine, 1, 'file')
        const vma = mmap(space, { first: 0, pages: 1, mixedMap: true, backing: { kind: 'device' } })
        vmInsertMixed(made.machine, space, vma, 0, 1)
        return made
      },
      actors: [
        actor<World>('parent', {}, [
          step('fork', (state) => {
            fork(state.machine, spaceOf(state.machine, 0))
            if (counted === 'counted') getPage(state.machine, 1, 'mapping')
          }),
          step('unmap', (state) => zapPte(state.machine, spaceOf(state.machine, 0), 0)),
        ]),
        actor<World>('child', {}, [
          step('unmap', (state) => zapPte(state.machine, spaceOf(state.machine, 1), 0), {
            when: ({ machine }) => machine.spaces.length > 1,
          }),
        ]),
      ],
      atEnd: [balanced],
    }),
    'not counted',
    'it counts them',
    balanced.name,
    'counted',
  ),
  editedRule(
    'copy-is-made-before-the-old-page-goes',
    'a copy-on-write fault gives its reference on the old page back only after the copy',
    MEMORY,
    () => ({
      initial: () => {
        const made = world({ pages: 1 })
        fork(made.machine, spaceOf(made.machine, 0))
        return made
      },
      actors: [0, 1].map((id) =>
        actor<World>(`process ${id}`, {}, [
          step('copy the old page', (state) => copyOld(state, id)),
          step('give the old page back', (state) => {
            zapPte(state.machine, spaceOf(state.machine, id), 0)
          }),
        ]),
      ),
      atEnd: [balanced],
    }),
    'it gives it back first',
    'use-after-free',
    ...[0, 1].map((id) => ({
      actor: `process ${id}`,
      move: { step: 'give the old page back', before: 'copy the old page' },
    })),
  ),
]

/** Reads frame 0 for a copy: somebody must hold it. */
function copyOld({ machine }: World, id: number): void {
  const count = machine.frames[0]?.page?.count ?? 0
  requireRule(count > 0, 'use-after-free', `process ${id} copies frame 0, which is free`)
}
