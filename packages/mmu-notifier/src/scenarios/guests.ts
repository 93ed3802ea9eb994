/**
 * Rules of the private memory of guests (guest_memfd; protected guests of s390): mapping it into the guest while it is
 * being taken away, conversion between private and shared, and holes punched while a device holds pages. With their
 * mutants.
 */
import { type Actor, acquire, type RuleEntry, requireRule, type Scenario } from '@tmem/interleave'
import { type DeviceStep, page, rule, step, thread, usable, type World } from './page.ts'
import { from } from './world.ts'

const GMEM = from('commit a7800aa80ea4: virt/kvm/guest_memfd.c (kvm_gmem_punch_hole)', '6.8')
const ATTRIBUTES = from('commit 5a475554db1e: virt/kvm/kvm_main.c (kvm_vm_set_mem_attributes)', '6.8')
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

// ---------------------------------------------------------------------------------------------------------------
// Shared pages that somebody holds

const POSTED = from(
  'kvm_gmem_convert_should_proceed of "KVM: guest_memfd: Introduce ... CONVERT_SHARED/PRIVATE ioctls", May 2025',
  '6.15 (posted, not merged)',
)
const SECURE = from('commit 214d9bbcd3a6: arch/s390/kernel/uv.c (make_secure_pte)', '5.7')
const UNMAP = 'unmap it from the host'
const COUNT = 'any other reference?'
const FREEZE = 'freeze the count, if there is no other reference'
const ACCESSIBLE = 'make it accessible'
const OUT = 'take the page out of the file'
const PUT = 'give the reference back'

/** A reference goes; the last one of a page that no file has frees it. */
const put = (state: World): void => {
  state.pins--
  if (state.pins === 0 && !state.inFile) free(state)
}

/** The page is given back to the host, whose it is from then on. */
const free = (state: World): void => {
  state.owned = false
  state.attribute = 'shared'
}

/** Direct I/O of the host to memory that it shares with the guest. */
const device = (before: readonly DeviceStep[] = []): Actor<World> =>
  thread('direct I/O', [
    step(
      'pin the page, if it is mapped and its count is not frozen',
      (state, me) => {
        me.has = state.mapped > 0 && !state.frozen
        if (me.has) state.pins++
      },
      { shows: (_, { has }) => (has ? 'pinned' : 'no'), jump: { to: 'end', if: (_, { has }) => !has } },
    ),
    ...before,
    step('the device writes to it', (state) => {
      usable(state, 'the device')
      requireRule(state.attribute === 'shared', 'private-memory', 'the device writes to private memory of the guest')
    }),
    step(PUT, put),
  ])

/** guest_memfd: the same page becomes private. */
const inPlace = (): Scenario<World> => ({
  initial: () => page({ mapped: 1, attribute: 'shared' }),
  actors: [
    device(),
    thread('convert', [
      step(UNMAP, (state) => {
        state.mapped = 0
      }),
      step(
        COUNT,
        ({ pins }, me) => {
          me.has = pins > 0
        },
        { shows: (_, { has }) => (has ? 'yes: -EAGAIN' : 'no'), jump: { to: 'end', if: (_, { has }) => has } },
      ),
      step('the memory becomes private', (state) => {
        state.attribute = 'private'
      }),
    ]),
  ],
})

/** s390: the page stays mapped in the host, which may export it again when somebody wants to pin it. */
const secure = (): Scenario<World> => ({
  initial: () => page({ mapped: 1, attribute: 'shared' }),
  actors: [
    device([
      step(ACCESSIBLE, (state) => {
        state.attribute = 'shared'
      }),
    ]),
    thread('make secure', [
      step(
        FREEZE,
        (state, me) => {
          me.has = state.pins === 0
          state.frozen = me.has
        },
        { shows: (_, { has }) => (has ? 'frozen' : '-EBUSY'), jump: { to: 'end', if: (_, { has }) => !has } },
      ),
      step('the page becomes secure', (state) => {
        state.attribute = 'private'
      }),
      step('unfreeze the count', (state) => {
        state.frozen = false
      }),
    ]),
  ],
})

const holeWhilePinned = (): Scenario<World> => ({
  initial: () => page({ mapped: 1, attribute: 'shared' }),
  actors: [
    device(),
    thread('punch a hole', [
      step(UNMAP, (state) => {
        state.mapped = 0
      }),
      step(OUT, (state) => {
        state.inFile = false
        if (state.pins === 0) free(state)
      }),
    ]),
  ],
})

/** A fault of the guest has its page, and makes it private, while the hole is punched. */
const holeWhilePreparing = (): Scenario<World> => ({
  initial: () => page({ attribute: 'shared' }),
  actors: [
    thread('vcpu', [
      step(
        'find the page in the file, take a reference',
        (state, me) => {
          me.has = state.inFile
          if (me.has) state.pins++
        },
        { shows: (_, { has }) => (has ? 'yes' : 'no'), jump: { to: 'end', if: (_, { has }) => !has } },
      ),
      step('prepare it: it becomes private', (state) => {
        state.attribute = 'private'
      }),
      step(PUT, put),
    ]),
    thread('punch a hole', [
      step(OUT, (state) => {
        state.inFile = false
        if (state.pins === 0) free(state)
      }),
    ]),
  ],
  invariants: [
    {
      name: 'a free page is the host’s',
      check: ({ owned, attribute }) => (owned || attribute === 'shared' ? null : 'the host gets a page still private'),
    },
  ],
})

/** A device has shared memory mapped for DMA; the memory becomes private, and shared again, by way of two files. */
const twoFiles = (): Scenario<World> => ({
  initial: () => page({ attribute: 'shared', dma: 0 }),
  actors: [
    thread('device', [
      step('write by DMA', ({ dma, current }) =>
        requireRule(dma < 0 || dma === current, 'stale-page', 'the device writes to a page that the guest has no more'),
      ),
    ]),
    thread('VMM', [
      step('the memory becomes private', (state) => {
        state.attribute = 'private'
      }),
      step('unmap it from the device', (state) => {
        state.dma = -1
      }),
      step('punch a hole in the shared file', (state) => {
        state.current++
      }),
      step('the memory becomes shared', (state) => {
        state.attribute = 'shared'
      }),
      step('map it for the device, if it is not', (state) => {
        if (state.dma < 0) state.dma = state.current
      }),
    ]),
  ],
})

export const guestRules: readonly RuleEntry<World>[] = [
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
  rule(
    'gmem-conversion-gives-up-on-pins',
    'shared memory does not become private while somebody has a reference on it: a device would go on writing to it',
    POSTED,
    inPlace,
    'nobody looks',
    'private-memory',
    { actor: 'convert', without: [COUNT] },
  ),
  rule(
    'gmem-conversion-unmaps-before-it-counts',
    'the host loses its mapping before the references are looked at: a lockless pin can come until then',
    POSTED,
    inPlace,
    'the references are looked at first',
    'private-memory',
    { actor: 'convert', move: { step: COUNT, before: UNMAP } },
  ),
  rule(
    'gmem-count-is-frozen-while-secured',
    'a page that stays mapped in the host becomes secure while its count is frozen: no lockless pin comes in between',
    SECURE,
    secure,
    'the count is only looked at',
    'private-memory',
    {
      actor: 'make secure',
      change: {
        step: FREEZE,
        to: {
          run: ({ pins }, me) => Object.assign(me, { has: pins === 0 }),
          jump: { to: 'end', if: (_, me) => !(me as { has: boolean }).has },
        },
      },
    },
  ),
  rule(
    'gmem-pin-makes-secure-pages-accessible',
    'who pins a secure page makes it accessible (it is exported, encrypted) before a device may touch it',
    from('commit f28d43636d6f: mm/gup.c (arch_make_page_accessible)', '5.7'),
    secure,
    'it is used as it is',
    'private-memory',
    { actor: 'direct I/O', without: [ACCESSIBLE] },
  ),
  rule(
    'gmem-hole-leaves-pinned-pages',
    'a hole takes the page out of the file; it is freed when the last reference goes, not before',
    from('commit a7800aa80ea4: virt/kvm/guest_memfd.c (truncate_inode_pages_range); mm/truncate.c', '6.8'),
    holeWhilePinned,
    'it is freed at once',
    'use-after-free',
    {
      actor: 'punch a hole',
      change: {
        step: OUT,
        to: {
          run: (state) => {
            state.inFile = false
            free(state)
          },
        },
      },
    },
  ),
  rule(
    'gmem-page-is-the-hosts-when-it-is-freed',
    'what makes a page private is taken back when it is freed, not when the hole is punched: a fault may still have it',
    from('commit a90764f0e4ed: virt/kvm/guest_memfd.c (kvm_gmem_free_folio)', '6.11'),
    holeWhilePreparing,
    'it is taken back when the hole is punched',
    'a free page is the host’s',
    {
      actor: 'punch a hole',
      change: {
        step: OUT,
        to: {
          run: (state) => {
            state.inFile = false
            state.attribute = 'shared'
            if (state.pins === 0) state.owned = false
          },
        },
      },
    },
    {
      actor: 'vcpu',
      change: {
        step: PUT,
        to: {
          run: (state) => {
            state.pins--
            if (state.pins === 0 && !state.inFile) state.owned = false
          },
        },
      },
    },
  ),
  rule(
    'gmem-device-unmaps-before-the-hole',
    'the mapping of a device goes before the shared page is given up: what is shared there later is another page',
    from('QEMU, commit 5d6483edaa92: system/ram-block-attributes.c', '6.8 (QEMU 10.1)'),
    twoFiles,
    'the device keeps its mapping',
    'stale-page',
    { actor: 'VMM', without: ['unmap it from the device'] },
  ),
]
