/**
 * Rules of memory that a device or a hypervisor shares with the kernel: DAX blocks, device-private pages (HMM), and the
 * private memory of guests (guest_memfd). With their mutants.
 *
 * The state is one page and what is known of it: only the order of actions and the locks are modelled here, not the page
 * tables, which are those of the other files.
 */
import {
  type Actor,
  acquire,
  actor,
  edited,
  type HasLocks,
  type RuleEntry,
  release,
  requireRule,
  type Scenario,
  type Step,
} from '@tmem/interleave'
import { from, type Origin } from './world.ts'

/** One page of a DAX file, of a device, or of a guest. */
interface World extends HasLocks {
  /** The page belongs to whoever the scenario is about; false: it was freed, and somebody else may have it. */
  owned: boolean
  /** Entries of processes that map it. */
  mapped: number
  /** References besides those of the entries (get_user_pages, a fault that is under way). */
  pins: number
  /** Where the process's data is. */
  place: 'system' | 'device'
  /** The guest's memory is private, or shared with its host. */
  attribute: 'private' | 'shared'
  /** Mapped into the guest, as what: '' for not. */
  guest: '' | 'private' | 'shared'
  /** Ranges between invalidate_begin and invalidate_end, and how many have ended. */
  invalidating: number
  sequence: number
  /** The page descriptors of the device's memory exist. */
  descriptors: boolean
}

interface Registers {
  sequence: number
  attribute: string
  has: boolean
}

type DeviceStep = Step<World, Registers>

const page = (more: Partial<World> = {}): World => ({
  owned: true,
  mapped: 0,
  pins: 0,
  place: 'system',
  attribute: 'private',
  guest: '',
  invalidating: 0,
  sequence: 0,
  descriptors: true,
  locks: { invalidate: '', mmu: '', page: '' },
  ...more,
})

const thread = (name: string, steps: readonly DeviceStep[]): Actor<World> =>
  actor<World, Registers>(name, { sequence: -1, attribute: '', has: false }, steps)

const step = (
  label: string,
  run: (state: World, me: Registers) => void,
  more: Partial<Omit<DeviceStep, 'label' | 'run'>> = {},
): DeviceStep => ({ label, run, ...more })

/** A rule: the steps that the mutant leaves out, moves or changes. */
function rule(
  name: string,
  text: string,
  origin: Origin,
  scenario: () => Scenario<World>,
  breaks: string,
  caughtAs: string,
  ...edits: Parameters<typeof edited<World>> extends [unknown, ...infer Edits] ? Edits : never
): RuleEntry<World> {
  return {
    name,
    rule: text,
    ...origin,
    scenario,
    mutant: { breaks, caughtAs, scenario: () => edited(scenario(), ...edits) },
  }
}

const usable = (state: World, who: string): void =>
  requireRule(state.owned, 'use-after-free', `${who} uses a page that was freed`)

// ---------------------------------------------------------------------------------------------------------------
// DAX: the pages of a file are the blocks of its device

const DAX = from('fs/dax.c (dax_layout_busy_page), commit 5fac7408d828', '4.18')
const UNMAP = 'unmap the block everywhere'
const BUSY = 'wait until nobody has a reference'

const truncate = (): Actor<World> =>
  thread('truncate', [
    acquire('invalidate', 'truncate'),
    step(UNMAP, (state) => {
      state.mapped = 0
    }),
    step(BUSY, () => {}, { when: ({ pins }) => pins === 0 }),
    step('free the block', (state) => {
      state.owned = false
    }),
    release('invalidate', 'truncate'),
  ])

/** Direct I/O pins the mapped block with the lockless walk, and lets a device write to it. */
const directIo = (): Actor<World> =>
  thread('direct I/O', [
    step(
      'pin the block, if it is mapped',
      (state, me) => {
        me.has = state.mapped > 0
        if (me.has) state.pins++
      },
      { shows: (_, { has }) => (has ? 'pinned' : 'not mapped'), jump: { to: 'end', if: (_, { has }) => !has } },
    ),
    step('the device writes to it', (state) => usable(state, 'the device')),
    step('unpin', (state) => {
      state.pins--
    }),
  ])

const pinned = (): Scenario<World> => ({ initial: () => page({ mapped: 1 }), actors: [directIo(), truncate()] })

/** A fault looks its block up and maps it, under the lock that truncate holds. */
const faulting = (): Scenario<World> => ({
  initial: page,
  actors: [
    thread('fault', [
      acquire('invalidate', 'fault'),
      step('look for the block', (state, me) => {
        me.has = state.owned
      }),
      step('map it', (state, { has }) => {
        if (has) state.mapped++
      }),
      release('invalidate', 'fault'),
    ]),
    truncate(),
  ],
  atEnd: [
    {
      name: 'no free block mapped',
      check: ({ owned, mapped }) => (owned || mapped === 0 ? null : 'a free block is mapped'),
    },
  ],
})

// ---------------------------------------------------------------------------------------------------------------
// Device-private pages

const HMM = from('mm/memory.c (do_swap_page), mm/migrate_device.c', '4.14')
const RACE = from('commit 16ce101db85d, mm/memory.c', '6.1')
const MEMREMAP = from('mm/memremap.c (memunmap_pages)', '4.5')
const TAKE = 'under the page-table lock: a device-private entry? take a reference'
const BUSY_CHECK = 'any other reference?'
const DRAIN = 'wait until all references are gone'

/** A processor touches a page whose data is on the device: the driver brings it back. */
const faultBack = (name: string): Actor<World> =>
  thread(name, [
    step(
      TAKE,
      (state, me) => {
        me.has = state.place === 'device'
        if (me.has) state.pins++
      },
      { shows: (_, { has }) => (has ? 'yes' : 'no'), jump: { to: 'load', if: (_, { has }) => !has } },
    ),
    acquire('page', name),
    step('the driver copies it back, if nobody did', (state) => {
      requireRule(state.owned, 'use-after-free', `${name} hands the driver a page of the device that was freed`)
      state.place = 'system'
    }),
    release('page', name),
    step('give the reference back, the last frees the page of the device', (state) => {
      if (state.pins > 0) state.pins--
      if (state.pins === 0) state.owned = false
    }),
    step(
      'load',
      (state) => requireRule(state.place === 'system', 'lost-page', 'zeros are loaded: the data is elsewhere'),
      {
        at: 'load',
      },
    ),
  ])

const twoFaults = (): Scenario<World> => ({
  initial: () => page({ place: 'device' }),
  actors: [faultBack('cpu 0'), faultBack('cpu 1')],
})

/** A driver moves a page of the system to its device, while direct I/O uses it. */
const migrating = (): Scenario<World> => ({
  initial: () => page({ mapped: 1 }),
  actors: [
    directIo(),
    thread('migrate', [
      step('replace the entry, flush', (state) => {
        state.mapped = 0
      }),
      step(
        BUSY_CHECK,
        ({ pins }, me) => {
          me.has = pins > 0
        },
        { shows: (_, { has }) => (has ? 'yes: give up' : 'no'), jump: { to: 'undo', if: (_, { has }) => has } },
      ),
      step(
        'copy to the device, free the page of the system',
        (state) => {
          state.place = 'device'
          state.owned = false
        },
        { jump: { to: 'end', if: () => true } },
      ),
      step(
        'put the entry back',
        (state) => {
          state.mapped = 1
        },
        { at: 'undo' },
      ),
    ]),
  ],
  atEnd: [
    {
      name: 'the page can be reached',
      check: ({ place, mapped }) => (place === 'device' || mapped === 1 ? null : 'no entry leads to the page'),
    },
  ],
})

/** A driver goes away, and the page descriptors of its memory with it. */
const unplugging = (): Scenario<World> => ({
  initial: () => page({ place: 'device', mapped: 1 }),
  actors: [
    directIo(),
    thread('driver', [
      step('no new references: unmap', (state) => {
        state.mapped = 0
      }),
      step(DRAIN, () => {}, { when: ({ pins }) => pins === 0 }),
      step('free the page descriptors', (state) => {
        state.descriptors = false
      }),
    ]),
  ],
  invariants: [
    {
      name: 'descriptors outlive references',
      check: ({ descriptors, pins }) => (descriptors || pins === 0 ? null : `${pins} references to no descriptor`),
    },
  ],
})

// ---------------------------------------------------------------------------------------------------------------
// Private memory of guests

const GMEM = from('virt/kvm/guest_memfd.c', '6.8')
const ATTRIBUTES = from('virt/kvm/kvm_main.c (kvm_vm_set_mem_attributes)', '6.8')
const CHECK = 'under mmu_lock: none active, sequence unchanged?'
const ZAP = 'drop what the guest has mapped'
const FREE = 'free the page of the file'
const BEGIN = 'invalidate_begin'
const FINISH = 'invalidate_end: the sequence, the count'

/** A fault of the guest: which memory it is, the page, and the check before it is mapped. */
const guestFault = (): Actor<World> =>
  thread('vcpu', [
    step(
      'read the sequence',
      (state, me) => {
        me.sequence = state.sequence
      },
      { at: 'again' },
    ),
    step(
      'private or shared? find the page',
      (state, me) => {
        me.attribute = state.attribute
        me.has = state.owned
      },
      {
        shows: (_, { attribute, has }) => (has ? attribute : 'no page'),
        jump: { to: 'end', if: (_, { has }) => !has },
      },
    ),
    acquire('mmu', 'vcpu'),
    step(
      CHECK,
      (state, me) => {
        me.has = state.invalidating === 0 && state.sequence === me.sequence
      },
      { shows: (_, { has }) => (has ? 'yes' : 'no: retry'), jump: { to: 'unlock', if: (_, { has }) => !has } },
    ),
    step('map it', (state, { attribute }) => {
      state.guest = attribute === 'private' ? 'private' : 'shared'
    }),
    step(
      'unlock mmu_lock',
      (state) => {
        state.locks['mmu'] = ''
      },
      { at: 'unlock', jump: { to: 'again', if: (_, { has }) => !has } },
    ),
  ])

/** What changes memory under the guest, between invalidate_begin and invalidate_end. */
const invalidating = (name: string, change: readonly DeviceStep[]): Actor<World> => {
  const locked = { when: ({ locks }: Readonly<World>) => locks['mmu'] === '' }
  return thread(name, [
    step(
      BEGIN,
      (state) => {
        state.invalidating++
      },
      locked,
    ),
    step(
      ZAP,
      (state) => {
        state.guest = ''
      },
      locked,
    ),
    ...change,
    step(
      FINISH,
      (state) => {
        state.sequence++
        state.invalidating--
      },
      locked,
    ),
  ])
}

const punching = (): Scenario<World> => ({
  initial: () => page({ guest: 'private' }),
  actors: [
    guestFault(),
    invalidating('punch a hole', [
      step(FREE, (state) => {
        state.owned = false
      }),
    ]),
  ],
  invariants: [
    {
      name: 'no free page in the guest',
      check: ({ owned, guest }) => (owned || guest === '' ? null : 'the guest has a free page'),
    },
  ],
})

const CONVERT = 'the attribute becomes shared'

const converting = (): Scenario<World> => ({
  initial: () => page({ guest: 'private' }),
  actors: [
    guestFault(),
    invalidating('convert', [
      step(CONVERT, (state) => {
        state.attribute = 'shared'
      }),
    ]),
  ],
  atEnd: [
    {
      name: 'the guest has what its attribute says',
      check: ({ guest, attribute }) =>
        guest === '' || guest === attribute ? null : `${guest} is mapped, ${attribute} is set`,
    },
  ],
})

export const deviceRules: readonly RuleEntry<World>[] = [
  rule(
    'dax-truncate-waits-for-pins',
    'a block of a DAX file is freed only when nobody has a reference on it: a device would write to another file',
    DAX,
    pinned,
    'it is freed at once',
    'use-after-free',
    { actor: 'truncate', without: [BUSY] },
  ),
  rule(
    'dax-unmaps-before-it-looks-at-pins',
    'the block is unmapped before its references are looked at: no new one can come after that',
    DAX,
    pinned,
    'it is unmapped after that',
    'use-after-free',
    { actor: 'truncate', move: { step: BUSY, before: UNMAP } },
  ),
  rule(
    'dax-fault-excludes-truncate',
    'a fault holds the lock of truncate from looking for its block to mapping it',
    from('fs/dax.c; mm/filemap.c (invalidate_lock)', '5.15'),
    faulting,
    'it takes no lock',
    'no free block mapped',
    { actor: 'fault', without: ['lock invalidate', 'unlock invalidate'] },
  ),
  rule(
    'dax-long-pins-are-refused',
    'a pin without a foreseeable end is refused for DAX files: truncate would wait for ever',
    from('commit 2bb6d2837083, mm/gup.c', '4.15'),
    () => ({
      initial: () => page({ mapped: 1 }),
      actors: [
        thread('RDMA', [step('pin the block for long', (_, me) => void Object.assign(me, { has: false }))]),
        truncate(),
      ],
    }),
    'it gets its pin and never gives it back',
    'deadlock',
    {
      actor: 'RDMA',
      change: {
        step: 'pin the block for long',
        to: {
          run: (state) => {
            if (state.mapped > 0) state.pins++
          },
        },
      },
    },
  ),
  rule(
    'hmm-device-entry-is-faulted-back',
    'an entry for a device-private page is not empty: the driver is asked to bring the page back',
    HMM,
    () => ({ initial: () => page({ place: 'device' }), actors: [faultBack('cpu 0')] }),
    'it is taken for empty',
    'lost-page',
    { actor: 'cpu 0', change: { step: TAKE, to: { jump: { to: 'load', if: () => true } } } },
  ),
  rule(
    'hmm-fault-holds-the-device-page',
    'a fault takes its reference on a device-private page under the page-table lock: another may have it moved and freed',
    RACE,
    twoFaults,
    'it takes none',
    'use-after-free',
    {
      actor: 'cpu 1',
      change: {
        step: TAKE,
        to: {
          run: ({ place }, me) => Object.assign(me, { has: place === 'device' }),
          jump: { to: 'load', if: (_, me) => !(me as Registers).has },
        },
      },
    },
  ),
  rule(
    'hmm-migration-gives-up-on-pins',
    'a page with other references is not migrated to a device: whoever has it goes on using it',
    HMM,
    migrating,
    'nobody looks',
    'use-after-free',
    { actor: 'migrate', without: [BUSY_CHECK] },
  ),
  rule(
    'hmm-entry-goes-before-the-count',
    'the entry is replaced before the references are looked at: a lockless pin can come until then',
    HMM,
    migrating,
    'the references are looked at first',
    'use-after-free',
    { actor: 'migrate', move: { step: BUSY_CHECK, before: 'replace the entry, flush' } },
  ),
  rule(
    'hmm-page-map-outlives-references',
    'the page descriptors of a device are freed only when all references on its pages are gone',
    MEMREMAP,
    unplugging,
    'they are freed at once',
    'descriptors outlive references',
    { actor: 'driver', without: [DRAIN] },
  ),
  rule(
    'gmem-hole-is-dropped-before-it-is-freed',
    'when a hole is punched the guest loses its mappings before the page is freed',
    GMEM,
    punching,
    'the page is freed first',
    'no free page in the guest',
    { actor: 'punch a hole', move: { step: FREE, before: ZAP } },
  ),
  rule(
    'gmem-fault-checks-before-it-maps',
    'a fault of the guest maps what it found only if nothing was invalidated since',
    GMEM,
    punching,
    'it does not look',
    'no free page in the guest',
    { actor: 'vcpu', change: { step: CHECK, to: { run: () => {}, jump: { to: 'unlock', if: () => false } } } },
  ),
  rule(
    'gmem-attributes-change-inside-a-range',
    'memory becomes shared between begin and end: a fault that saw it private must not map it so afterwards',
    ATTRIBUTES,
    converting,
    'it becomes shared after the end',
    'the guest has what its attribute says',
    { actor: 'convert', move: { step: FINISH, before: CONVERT } },
  ),
  rule(
    'dax-truncate-keeps-its-lock-until-it-has-freed',
    'truncate holds its lock until the block is freed: a fault in between would map it again',
    from('fs/dax.c; mm/filemap.c (invalidate_lock)', '5.15'),
    faulting,
    'it unlocks before that',
    'no free block mapped',
    { actor: 'truncate', move: { step: 'unlock invalidate', before: 'free the block' } },
  ),
  rule(
    'hmm-page-map-takes-no-new-references',
    'a device that goes away first makes sure that no new references come, then waits for those that there are',
    MEMREMAP,
    unplugging,
    'it waits first',
    'descriptors outlive references',
    { actor: 'driver', move: { step: DRAIN, before: 'no new references: unmap' } },
  ),
  rule(
    'hmm-failed-migration-restores-the-entry',
    'a migration to a device that gives up puts the entry back',
    HMM,
    migrating,
    'it forgets to',
    'the page can be reached',
    { actor: 'migrate', change: { step: 'put the entry back', to: { run: () => {} } } },
  ),
  rule(
    'gmem-begin-comes-before-the-drop',
    'the range is active before the mappings are dropped: a fault in between would map the page again',
    GMEM,
    punching,
    'the mappings are dropped first',
    'no free page in the guest',
    { actor: 'punch a hole', move: { step: ZAP, before: BEGIN } },
  ),
  rule(
    'gmem-end-raises-the-sequence',
    'the end of a range raises the sequence: a fault that found its page before the range must see it',
    GMEM,
    punching,
    'only the count drops',
    'no free page in the guest',
    {
      actor: 'punch a hole',
      change: {
        step: FINISH,
        to: {
          run: (state) => {
            state.invalidating--
          },
        },
      },
    },
  ),
  rule(
    'gmem-sequence-is-read-before-the-attribute',
    'a fault reads the sequence before it asks whether memory is private: the answer may change after that',
    ATTRIBUTES,
    converting,
    'it asks first',
    'the guest has what its attribute says',
    { actor: 'vcpu', move: { step: 'private or shared? find the page', before: 'read the sequence' } },
  ),
  rule(
    'gmem-check-is-under-mmu-lock',
    'count and sequence are checked under the lock under which the page is mapped',
    GMEM,
    punching,
    'the lock is taken after that',
    'no free page in the guest',
    { actor: 'vcpu', move: { step: 'lock mmu', before: 'map it' } },
  ),
  rule(
    'gmem-conversion-drops-what-is-mapped',
    'a conversion drops what the guest has mapped: it would go on using private memory that is shared now',
    ATTRIBUTES,
    converting,
    'it only changes the attribute',
    'the guest has what its attribute says',
    { actor: 'convert', without: [ZAP] },
  ),
]
