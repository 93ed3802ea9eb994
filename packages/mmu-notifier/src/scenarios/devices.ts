/**
 * Rules of memory that a device shares with the kernel: the blocks of DAX files, and device-private pages (HMM). With
 * their mutants.
 */
import { type Actor, acquire, type RuleEntry, release, requireRule, type Scenario } from '@tmem/interleave'
import { directIo, page, type Registers, rule, step, thread, type World } from './page.ts'
import { from } from './world.ts'

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

const HMM = from(
  'commits 5042db43cc26, 8763cb45ab96: mm/memory.c (do_swap_page), mm/migrate.c (5.18 on: mm/migrate_device.c)',
  '4.14',
)
const RACE = from('commit 16ce101db85d, mm/memory.c', '6.1')
const MEMREMAP = from('commit 5c2c2587b132: kernel/memremap.c (5.3 on: mm/memremap.c, memunmap_pages)', '4.5')
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
]
