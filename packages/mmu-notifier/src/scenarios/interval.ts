/** Rules of interval notifiers (5.5 and later), with their mutants. */
import { acquire, actor, type RuleEntry, release, requireRule, type Scenario, type Step } from '@tmem/interleave'
import { putPage } from '@tmem/vm-mixedmap'
import { clientRangeEnd, clientRangeStart, dropSptes, kvmFaultProgram, lookUp } from '../clients.ts'
import {
  clientOf,
  type IntervalMm,
  intervalApply,
  intervalBegin,
  intervalCallback,
  intervalFinish,
  intervalFree,
  intervalInsert,
  intervalReadBegin,
  intervalReadRetry,
  intervalRemove,
  mmOf,
  subscriptionOf,
} from '../notifier.ts'
import { editedRule, switchedRule } from './list.ts'
import {
  balanced,
  callback,
  clearStep,
  device,
  freeStep,
  from,
  noDangling,
  noStale,
  secondaryScenario,
  step,
  type VmStep,
  vm,
  type World,
  world,
} from './world.ts'

const SOURCE = from('mm/mmu_notifier.c', '5.5')
const DANGLING = noDangling.name

/** The spinlock of the subscriptions: it covers the sequence, the number of active ranges, and both queues. */
const LOCK = 'subscriptions'
const unlocked = ({ locks }: Readonly<World>): boolean => locks[LOCK] === ''

const interval = (state: World): IntervalMm => mmOf(state, 0).interval

/** Space 0 with one subscription over its pages; the mappings of its user are kept in client 0. */
function subscribed(pages = 1, marks: Record<string, number> = {}): World {
  const made = world({ clients: ['kvm'], pages, marks: { id: 0, ...marks }, locks: [LOCK] })
  mmOf(made, 0).list = []
  intervalInsert(interval(made), 0, pages)
  return made
}

const shows = ({ notifiers }: Readonly<World>): string => `sequence ${notifiers.mms[0]?.interval.sequence}`

/** A part of another program that holds the lock for one step only. */
const begin = (vpn: number): VmStep =>
  step('start', (state) => void intervalBegin(interval(state), vpn, vpn + 1), { shows, when: unlocked })

const RAISE = 'end: the sequence'
const APPLY = 'end: what was queued'

/** The end of a range, in the steps that whoever does not take the lock can see. */
const end = (thread = 'unmap'): Step<World>[] => [
  acquire(LOCK, thread),
  step(RAISE, (state) => void intervalFinish(interval(state)), { shows }),
  // The lock is held, so the sequence is even exactly if this end, or nobody, had to raise it.
  step(APPLY, (state) => {
    if (interval(state).sequence % 2 === 0) intervalApply(interval(state))
  }),
  release(LOCK, thread),
]

/** The VM unmaps one page; the callback runs under the user's lock. */
function unmap(vpn: number, thread = 'unmap'): VmStep[] {
  return [
    begin(vpn),
    callback('callback: store the sequence, drop', 'kvm', (state, client) => {
      intervalCallback(interval(state), 0)
      dropSptes(client, vpn, vpn + 1)
    }),
    clearStep(vpn),
    freeStep(),
    ...end(thread),
  ]
}

interface Registers {
  sequence: number
  wait: boolean
  pfn: number
  retry: boolean
}

/** The user's fault: read_begin, wait, look the page up, lock, read_retry, install. */
function reader(vpn: number, before: readonly ReturnType<typeof step<Registers>>[] = []) {
  return actor<World, Registers>('fault', { sequence: -1, wait: false, pfn: -1, retry: false }, [
    ...before,
    step<Registers>(
      'read_begin',
      (state, me) => {
        const begun = intervalReadBegin(interval(state), state.marks['id'] ?? 0)
        me.sequence = begun.sequence
        me.wait = begun.wait === 'wait'
      },
      { at: 'again', shows: (_, { sequence, wait }) => `${sequence}${wait ? ', wait' : ''}` },
    ),
    step<Registers>('wait for another sequence', () => {}, {
      when: ({ notifiers }, { wait, sequence }) => !wait || notifiers.mms[0]?.interval.sequence !== sequence,
    }),
    step<Registers>(
      'look the page up (may sleep)',
      (state, me) => {
        me.pfn = lookUp(state.machine, 0, vpn, 'read')
      },
      { shows: (_, { pfn }) => `frame ${pfn}` },
    ),
    acquire('kvm', 'fault'),
    step<Registers>(
      'read_retry?',
      (state, me) => {
        me.retry = intervalReadRetry(interval(state), state.marks['id'] ?? 0, me.sequence) === 'retry'
      },
      { shows: (_, { retry }) => (retry ? 'retry' : 'valid'), jump: { to: 'unlock', if: (_, { retry }) => retry } },
    ),
    step<Registers>('install the entry', (state, { pfn }) => {
      clientOf(state, 0).sptes[vpn] = { pfn, writable: false, young: true }
    }),
    {
      ...step<Registers>('unlock the user', (state) => {
        state.locks['kvm'] = ''
      }),
      at: 'unlock',
    },
    step<Registers>('put the page', (state, { pfn }) => void putPage(state.machine, pfn, 'pin'), {
      jump: { to: 'again', if: (_, { retry }) => retry },
    }),
  ])
}

const faultAndUnmap = (): Scenario<World> => secondaryScenario(subscribed, [reader(0), vm('unmap', unmap(0))])

/** A second subscription is made while another thread unmaps, and used at once. */
function insertDuring(insert: (state: World) => number): Scenario<World> {
  return secondaryScenario(
    () => subscribed(),
    [
      reader(0, [
        step<Registers>(
          'insert a subscription',
          (state) => {
            state.marks['id'] = insert(state)
          },
          { when: unlocked },
        ),
      ]),
      vm('unmap', [
        step(
          'start: which subscriptions?',
          (state, me) => {
            me.failed = intervalBegin(interval(state), 0, 1).includes(1)
          },
          { when: unlocked, shows: (_, { failed }) => (failed ? 'both' : 'the first') },
        ),
        ...[0, 1].map((id) =>
          step<{ pfn: number; failed: boolean }>(
            `callback ${id}, if it was there`,
            (state, me) => {
              if (id === 1 && !me.failed) return
              intervalCallback(interval(state), id)
              dropSptes(clientOf(state, 0), 0, 1)
            },
            { when: ({ locks }) => locks['kvm'] === '' },
          ),
        ),
        clearStep(0),
        freeStep(),
        ...end(),
      ]),
    ],
    [balanced],
  )
}

interface Remover {
  sequence: number
  wait: boolean
}

const WAIT = 'wait for another sequence'

const moved = ({ notifiers }: Readonly<World>, { wait, sequence }: Readonly<Remover>): boolean =>
  !wait || notifiers.mms[0]?.interval.sequence !== sequence

/** A subscription is removed and freed while a range over it begins and ends. */
function removeDuring(): Scenario<World> {
  return {
    initial: () => subscribed(),
    actors: [
      actor<World, Remover>('remove', { sequence: 0, wait: false }, [
        step<Remover>(
          'remove the subscription',
          (state, me) => {
            me.sequence = interval(state).sequence
            me.wait = intervalRemove(interval(state), 0) === 'queued'
          },
          { when: unlocked, shows: (_, { wait }) => (wait ? 'queued' : 'removed') },
        ),
        step<Remover>(WAIT, () => {}, { when: (state, me) => unlocked(state) && moved(state, me) }),
        step('free the subscription', (state) => intervalFree(interval(state), 0)),
      ]),
      actor<World, { hit: number }>('unmap', { hit: 0 }, [
        step<{ hit: number }>(
          'start',
          (state, me) => {
            me.hit = intervalBegin(interval(state), 0, 1).length
          },
          { when: unlocked },
        ),
        step<{ hit: number }>('callback', (state, { hit }) => {
          if (hit > 0) intervalCallback(interval(state), 0)
        }),
        ...end(),
      ]),
    ],
  }
}

export const intervalRules: readonly RuleEntry<World>[] = [
  editedRule(
    'interval-callback-stores-sequence',
    'every overlapping callback stores the current sequence in its subscription, under the lock of its user',
    SOURCE,
    faultAndUnmap,
    'it only drops the mappings',
    DANGLING,
    {
      actor: 'unmap',
      change: {
        step: 'callback: store the sequence, drop',
        to: { run: (state) => dropSptes(clientOf(state, 0), 0, 1) },
      },
    },
  ),
  editedRule(
    'interval-read-begin-waits',
    'read_begin waits while the sequence of the subscription is the current, odd one',
    SOURCE,
    faultAndUnmap,
    'it does not wait',
    DANGLING,
    { actor: 'fault', change: { step: 'wait for another sequence', to: { when: () => true } } },
  ),
  editedRule(
    'interval-retry-under-lock',
    'read_retry is asked under the lock under which the mapping is made',
    SOURCE,
    faultAndUnmap,
    'the lock is taken after it',
    DANGLING,
    { actor: 'fault', move: { step: 'lock kvm', before: 'install the entry' } },
  ),
  editedRule(
    'interval-even-only-when-idle',
    'the sequence becomes even only when the last active range ends',
    SOURCE,
    () =>
      secondaryScenario(
        () => subscribed(2),
        [reader(1), vm('unmap 0', unmap(0, 'unmap 0')), vm('unmap 1', unmap(1, 'unmap 1'))],
      ),
    'every end makes it even, and readers go on while the page of another range is still being unmapped',
    DANGLING,
    {
      actor: 'unmap 0',
      change: {
        step: RAISE,
        to: {
          run: (state) => {
            const { active } = interval(state)
            if (active > 1 && interval(state).sequence % 2 === 1) interval(state).sequence++
            intervalFinish(interval(state))
          },
        },
      },
    },
  ),
  switchedRule(
    'interval-new-subscription-is-odd',
    'a new subscription starts with an odd sequence below the current one, which no reader takes for the current',
    SOURCE,
    (sequence: 'below' | 'current') =>
      secondaryScenario(subscribed, [
        reader(0, [
          step<Registers>('insert a subscription', (state) => {
            const id = intervalInsert(interval(state), 0, 1)
            if (sequence === 'current') subscriptionOf(interval(state), id).sequence = interval(state).sequence
            state.marks['id'] = id
          }),
        ]),
      ]),
    'below',
    'it starts with the current one, and its first reader waits for a change that nobody makes',
    'deadlock',
    'current',
  ),
  switchedRule(
    'interval-inserted-while-active-waits',
    'a subscription inserted while a range is active takes the current odd sequence: its readers wait for the end',
    SOURCE,
    insertDuring,
    (state: World) => intervalInsert(interval(state), 0, 1),
    'it starts as if nothing were active',
    DANGLING,
    (state: World) => {
      const id = intervalInsert(interval(state), 0, 1)
      subscriptionOf(interval(state), id).sequence = 1
      return id
    },
  ),
  switchedRule(
    'interval-tree-changes-wait-for-the-end',
    'the tree is not changed while a range is active, because it is walked without a lock then',
    SOURCE,
    (insert: (state: World) => number): Scenario<World> => ({
      initial: () => subscribed(1, { version: 0 }),
      actors: [
        actor<World>('insert', {}, [
          step(
            'insert a subscription',
            (state) => {
              const id = insert(state)
              if (subscriptionOf(interval(state), id).state === 'live') state.marks['version'] = 1
            },
            { when: unlocked },
          ),
        ]),
        actor<World, { version: number }>('unmap', { version: 0 }, [
          step<{ version: number }>('start: walk to the first subscription', (state, me) => {
            intervalBegin(interval(state), 0, 1)
            me.version = state.marks['version'] ?? 0
          }),
          step<{ version: number }>('walk to the next', (state, me) => {
            requireRule(me.version === state.marks['version'], 'tree-changed', 'the tree changes while it is walked')
          }),
          ...end(),
        ]),
      ],
      atEnd: [
        {
          name: 'inserted in the end',
          check: ({ notifiers }) => (notifiers.mms[0]?.interval.subscriptions[1]?.state === 'live' ? null : 'queued'),
        },
      ],
    }),
    (state: World) => intervalInsert(interval(state), 0, 1),
    'it is inserted at once',
    'tree-changed',
    (state: World) => {
      const id = intervalInsert(interval(state), 0, 1)
      subscriptionOf(interval(state), id).state = 'live'
      return id
    },
  ),
  editedRule(
    'interval-remove-waits',
    'removing while a range is active waits for its end: until then the callback may run',
    SOURCE,
    removeDuring,
    'the user is freed at once',
    'use-after-free',
    { actor: 'remove', without: [WAIT] },
  ),
  editedRule(
    'interval-remover-waits-under-the-lock',
    'who waits to free a subscription reads the sequence under the lock: the new one is there before the queue is done',
    from('commit 319561669a59, mm/mmu_notifier.c', '5.18'),
    removeDuring,
    'the sequence is read without the lock',
    'use-after-free',
    {
      actor: 'remove',
      change: {
        step: WAIT,
        to: { when: (state, me) => moved(state, me as Remover) },
      },
    },
  ),
  switchedRule(
    'interval-tree-before-list',
    'the interval tree is told before the list clients: if it refuses, no list client has seen a start',
    SOURCE,
    (first: 'tree' | 'list') => {
      const tree: VmStep = step(
        'start: the tree refuses to block',
        (_, me) => {
          me.failed = true
        },
        { shows: () => '-EAGAIN', jump: { to: 'end', if: () => true } },
      )
      const list: VmStep = callback('start: list clients', 'kvm', (_, client) => {
        clientRangeStart(client, 0, 1, 'non-blockable', 'atomic')
      })
      const rest: VmStep[] = [
        clearStep(0),
        freeStep(),
        callback('end: list clients', 'kvm', (_, client) => clientRangeEnd(client, 0, 1)),
      ]
      return secondaryScenario(
        () => world({ clients: ['kvm'], pages: 1 }),
        [
          device('vcpu', kvmFaultProgram(0, 0)),
          vm('reaper', first === 'tree' ? [tree, list, ...rest] : [list, tree, ...rest]),
        ],
        [noStale, balanced],
      )
    },
    'tree',
    'the list comes first, and nobody undoes its start',
    'livelock',
    'list',
  ),
]
