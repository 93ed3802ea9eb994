/** Rules of the notifier list (2.6.27 to 2.6.31, and the non-blocking start of later kernels), with their mutants. */
import {
  type Actor,
  acquire,
  actor,
  type Edit,
  edited,
  type RuleEntry,
  release,
  requireRule,
  type Scenario,
} from '@tmem/interleave'
import {
  clearPte,
  dropMapped,
  exitSpace,
  findVma,
  fork,
  frameOf,
  mprotect,
  mremap,
  type SecondaryMmus,
  spaceOf,
  takePage,
  translate,
  writeProtectFault,
  xipFault,
  xipMmap,
  xipRegisters,
  xipWriteProgram,
} from '@tmem/vm-mixedmap'
import {
  addClient,
  type Client,
  clientChangePte,
  clientInvalidatePage,
  clientRangeEnd,
  clientRangeStart,
  clientYoung,
  deliverMessages,
  dropSptes,
  type FaultRegisters,
  type FaultStep,
  GRU_STEPS,
  gruFaultProgram,
  KVM_STEPS,
  type KvmClient,
  kvmFaultProgram,
  lookUp,
  type XpmemClient,
} from '../clients.ts'
import { callRelease, clientOf, dropStruct, mmOf, register, secondaryMmus, unlink } from '../notifier.ts'
import {
  balanced,
  callback,
  clearStep,
  device,
  endStep,
  fileShown,
  freeStep,
  from,
  inlined,
  noDangling,
  noStale,
  type Origin,
  onlyWhen,
  pageStep,
  secondaryScenario,
  setMark,
  space0,
  startStep,
  step,
  unmapPage,
  unmapRange,
  type VmStep,
  vm,
  type World,
  world,
} from './world.ts'

const LIST = from('mm/mmu_notifier.c, include/linux/mmu_notifier.h', '2.6.31')
const KVM = from('virt/kvm/kvm_main.c', '2.6.31')
const GRU = from('drivers/misc/sgi-gru/grutlbpurge.c, grufault.c', '2.6.31')
const SEED = from('mail "mmu notifier #v13", A. Arcangeli, 22 April 2008', '2.6.27')
const MODERN = from('mm/mmu_notifier.c', '5.5')

/** A rule whose mutant is the same scenario, edited. */
export function editedRule<S extends object = World>(
  name: string,
  rule: string,
  origin: Origin,
  scenario: () => Scenario<NoInfer<S>>,
  breaks: string,
  caughtAs: string,
  ...edits: readonly Edit<NoInfer<S>>[]
): RuleEntry<S> {
  return { name, rule, ...origin, scenario, mutant: { breaks, caughtAs, scenario: () => edited(scenario(), ...edits) } }
}

/** A rule whose mutant is built by the same function with another argument. */
export function switchedRule<T, S extends object = World>(
  name: string,
  rule: string,
  origin: Origin,
  scenario: (part: T) => Scenario<NoInfer<S>>,
  right: T,
  breaks: string,
  caughtAs: string,
  wrong: T,
): RuleEntry<S> {
  return {
    name,
    rule,
    ...origin,
    scenario: () => scenario(right),
    mutant: { breaks, caughtAs, scenario: () => scenario(wrong) },
  }
}

const DANGLING = noDangling.name
const STALE = noStale.name

const oneKvm =
  (pages = 1) =>
  () =>
    world({ clients: ['kvm'], pages })
const kvmOf = ({ notifiers }: Readonly<World>): KvmClient => notifiers.clients[0] as KvmClient
const vcpu = (vpn = 0, options: Parameters<typeof kvmFaultProgram>[2] = {}) =>
  device('vcpu', kvmFaultProgram(0, vpn, options))

/** A virtual processor faults page 0 while it is unmapped inside a range. */
const faultAndRange = (): Scenario<World> => secondaryScenario(oneKvm(), [vcpu(), vm('unmap', unmapRange(0))])

/** A virtual processor faults page 0 while it is unmapped as a single page. */
const faultAndPage = (): Scenario<World> => secondaryScenario(oneKvm(), [vcpu(), vm('unmap', unmapPage(0))])

/** Two ranges are active at once; a virtual processor faults the page of the second. */
const faultAndTwoRanges = (): Scenario<World> =>
  secondaryScenario(oneKvm(2), [vcpu(1), vm('unmap 0', unmapRange(0)), vm('unmap 1', unmapRange(1))])

/** The end of a range in two steps, without the client's lock. */
const splitEnd = (): VmStep[] => [
  step('range_end: seq + 1', (state) => {
    kvmOf(state).seq++
  }),
  step('range_end: count - 1', (state) => {
    kvmOf(state).count--
  }),
]

const entry = (state: World, vpn = 0): number => translate(state.machine, space0(state), vpn, 'read') ?? -1

/** A client's entry that is there from the start. */
function mapped(state: World, id = 0, writable = false, vpn = 0): World {
  clientOf(state, id).sptes[vpn] = { pfn: entry(state, vpn), writable, young: false }
  return state
}

export const listRules: readonly RuleEntry<World>[] = [
  editedRule(
    'range-start-drops-mappings',
    'invalidate_range_start drops the mappings of the range, because pages are freed before the end',
    LIST,
    faultAndRange,
    'the client drops them at the end',
    DANGLING,
    {
      actor: 'unmap',
      change: { step: 'range_start: kvm', to: { run: (state) => void kvmOf(state).count++ } },
    },
    {
      actor: 'unmap',
      change: {
        step: 'range_end: kvm',
        to: {
          run: (state) => {
            dropSptes(kvmOf(state), 0, 1)
            clientRangeEnd(kvmOf(state), 0, 1)
          },
        },
      },
    },
  ),
  editedRule(
    'no-mapping-between-start-and-end',
    'between start and the matching end no mapping of the range is made',
    LIST,
    faultAndRange,
    'the fault looks at the sequence only, not at the count',
    DANGLING,
    {
      actor: 'vcpu',
      change: {
        step: KVM_STEPS.check,
        to: {
          run: (state, me) => {
            const registers = me as FaultRegisters
            registers.retry = kvmOf(state as World).seq !== registers.seq
          },
        },
      },
    },
  ),
  editedRule(
    'ranges-need-a-counter',
    'ranges nest and overlap, also from different threads: a counter, not a flag',
    LIST,
    faultAndTwoRanges,
    'a flag: any start sets it, any end clears it',
    DANGLING,
    ...['0', '1'].flatMap((vpn): Edit<World>[] => [
      {
        actor: `unmap ${vpn}`,
        change: {
          step: 'range_start: kvm',
          to: {
            run: (state) => {
              clientRangeStart(kvmOf(state), Number(vpn), Number(vpn) + 1, 'blockable', 'may-sleep')
              kvmOf(state).count = 1
            },
          },
        },
      },
      {
        actor: `unmap ${vpn}`,
        change: {
          step: 'range_end: kvm',
          to: {
            run: (state) => {
              kvmOf(state).seq++
              kvmOf(state).count = 0
            },
          },
        },
      },
    ]),
  ),
  editedRule(
    'shared-tables-are-flushed-with-the-tlb',
    'hardware that walks the page tables of the processor is flushed where its TLB is, under the page-table lock',
    from('commit 1897bdc4d331, include/linux/mmu_notifier.h', '3.19'),
    () =>
      secondaryScenario(
        () => world({ clients: ['gru'], pages: 1 }),
        [
          device('device', [
            step('misses, walks the tables of the processor, keeps what it finds', (state) => {
              const pfn = translate(state.machine, space0(state), 0, 'read')
              if (pfn !== null) clientOf(state, 0).sptes[0] = { pfn, writable: false, young: true }
            }),
          ]),
          vm('unmap', [
            startStep(0, 1, 'gru'),
            clearStep(0),
            callback('invalidate_range: gru', 'gru', (_, client) => dropSptes(client, 0, 1)),
            freeStep(),
            endStep(0, 1, 'gru'),
          ]),
        ],
      ),
    'it hears of start and end only, and misses again in between',
    DANGLING,
    { actor: 'unmap', without: ['invalidate_range: gru'] },
  ),
  editedRule(
    'start-and-end-are-paired',
    'every start has its end, also on error paths',
    LIST,
    faultAndRange,
    'the VM returns without the end',
    'livelock',
    { actor: 'unmap', without: ['range_end: kvm'] },
  ),
  editedRule(
    'page-lives-until-callback-returns',
    'invalidate_page is called before the page is freed',
    LIST,
    faultAndPage,
    'the page is freed first',
    DANGLING,
    { actor: 'unmap', move: { step: 'free the page', before: 'invalidate_page: kvm' } },
  ),
  editedRule(
    'page-callback-after-clear-and-flush',
    'invalidate_page is called after the entry was cleared and flushed',
    LIST,
    faultAndPage,
    'the callback comes first, and a fault finds the old entry again',
    DANGLING,
    { actor: 'unmap', move: { step: 'invalidate_page: kvm', before: 'clear and flush the entry' } },
  ),
  editedRule(
    'kvm-sequence-raised-at-end',
    'the end of a range raises the sequence: a fault that began before the range must see it',
    KVM,
    faultAndRange,
    'only the count goes back',
    DANGLING,
    {
      actor: 'unmap',
      change: { step: 'range_end: kvm', to: { run: (state) => void kvmOf(state).count-- } },
    },
  ),
  editedRule(
    'kvm-sequence-before-count',
    'at the end the sequence is raised before the count drops',
    KVM,
    () =>
      secondaryScenario(oneKvm(), [vcpu(), vm('unmap', [startStep(0, 1), clearStep(0), freeStep(), ...splitEnd()])]),
    'the count drops first, and a fault without the lock sees 0 with the old sequence',
    DANGLING,
    { actor: 'unmap', move: { step: 'range_end: count - 1', before: 'range_end: seq + 1' } },
  ),
  editedRule(
    'kvm-sequence-read-before-lookup',
    'the fault reads the sequence before it looks the page up',
    KVM,
    faultAndRange,
    'it reads it afterwards',
    DANGLING,
    {
      actor: 'vcpu',
      change: {
        step: KVM_STEPS.lock,
        to: {
          run: (state, me) => {
            state.locks['kvm'] = 'fault 0'
            ;(me as FaultRegisters).seq = kvmOf(state).seq
          },
        },
      },
    },
  ),
  editedRule(
    'kvm-check-under-lock',
    'count and sequence are checked under the lock under which the mapping is made',
    KVM,
    faultAndRange,
    'the lock is taken after the check',
    DANGLING,
    { actor: 'vcpu', move: { step: KVM_STEPS.lock, before: KVM_STEPS.install } },
  ),
  editedRule(
    'kvm-single-page-raises-sequence',
    'invalidate_page raises the sequence, too',
    KVM,
    faultAndPage,
    'it only drops the mapping',
    DANGLING,
    {
      actor: 'unmap',
      change: { step: 'invalidate_page: kvm', to: { run: (state) => dropSptes(kvmOf(state), 0, 1) } },
    },
  ),
  editedRule(
    'kvm-range-is-the-union',
    'a client that keeps the covered range keeps the union while several ranges are active: no false negatives',
    from('virt/kvm/kvm_main.c', '5.10'),
    () =>
      secondaryScenario(oneKvm(2), [
        vcpu(0, { retry: 'with-range' }),
        vm('unmap 0', unmapRange(0)),
        vm('unmap 1', unmapRange(1)),
      ]),
    'it keeps the last range only',
    DANGLING,
    {
      actor: 'unmap 1',
      change: {
        step: 'range_start: kvm',
        to: {
          run: (state) => {
            clientRangeStart(kvmOf(state), 1, 2, 'blockable', 'may-sleep')
            Object.assign(kvmOf(state), { rangeFirst: 1, rangeEnd: 2 })
          },
        },
      },
    },
  ),
  editedRule(
    'kvm-precheck-only-retries',
    'a check without the lock may only cause a retry, never permit a mapping',
    from('virt/kvm/kvm_main.c', '5.10'),
    () => {
      const program = kvmFaultProgram(0, 0)
      const precheck: FaultStep = {
        label: 'precheck without the lock',
        run: (state, me) => {
          const kvm = kvmOf(state as World)
          me.retry = kvm.count > 0 || kvm.seq !== me.seq
        },
        jump: { to: 'early', if: (_, { retry }) => retry },
      }
      const early: FaultStep = {
        label: 'put the page early',
        at: 'early',
        run: (state, me) => program.at(-1)?.run(state, me),
        jump: { to: 'again', if: () => true },
      }
      const steps = [...program.slice(0, 2), precheck, ...program.slice(2, -1)]
      // "put the page" ends the program; the early exit goes back to the start.
      const last = program.at(-1) as FaultStep
      const done: FaultStep = { ...last, jump: { to: 'end', if: (_, { outcome }) => outcome !== '' } }
      const again: FaultStep = { label: 'retry', run: () => {}, jump: { to: 'again', if: () => true } }
      return secondaryScenario(oneKvm(), [device('vcpu', [...steps, done, again, early]), vm('unmap', unmapRange(0))])
    },
    'the check under the lock is left out when the first one was good',
    DANGLING,
    {
      actor: 'vcpu',
      change: {
        step: KVM_STEPS.check,
        to: {
          run: (_, me) => {
            ;(me as FaultRegisters).retry = false
          },
        },
      },
    },
  ),
  editedRule(
    'gru-waits-while-ranges-are-active',
    'a client with a counter only makes no mapping while the count is above 0',
    GRU,
    () =>
      secondaryScenario(
        () => world({ clients: ['gru'], pages: 1 }),
        [device('tlb miss', gruFaultProgram(0, 0, 'process')), vm('unmap', unmapRange(0, ['gru']))],
      ),
    'the fault does not wait',
    DANGLING,
    { actor: 'tlb miss', change: { step: GRU_STEPS.wait, to: { when: () => true } } },
  ),
  editedRule(
    'gru-flush-cancels-insert',
    'without a sequence number the hardware must cancel an insert that meets a flush',
    GRU,
    () =>
      secondaryScenario(
        () => world({ clients: ['gru'], pages: 1 }),
        [device('tlb miss', gruFaultProgram(0, 0, 'process')), vm('unmap', unmapRange(0, ['gru']))],
      ),
    'an insert under way survives the flush',
    DANGLING,
    {
      actor: 'tlb miss',
      change: {
        step: GRU_STEPS.insert,
        to: {
          run: (state, me) => {
            const { pfn } = me as FaultRegisters
            clientOf(state, 0).sptes[0] = { pfn, writable: false, young: true }
          },
        },
      },
    },
  ),
  editedRule(
    'gru-interrupt-does-not-wait',
    'a fault in interrupt context fails instead of waiting for the end of a range',
    GRU,
    () => {
      const free = ({ marks }: Readonly<World>): boolean => marks['interrupt'] === 0
      return secondaryScenario(
        () => world({ clients: ['gru'], pages: 1, marks: { interrupt: 0 } }),
        [
          device('interrupt', [
            step('interrupt arrives', setMark('interrupt', 1)) as FaultStep,
            ...(inlined(gruFaultProgram(0, 0, 'interrupt'), 'in interrupt') as FaultStep[]),
            step('return from interrupt', setMark('interrupt', 0)) as FaultStep,
          ]),
          vm('unmap, same cpu', onlyWhen(unmapRange(0, ['gru']), free)),
        ],
      )
    },
    'it waits, on the processor that would end the range',
    'deadlock',
    {
      actor: 'interrupt',
      change: {
        step: `in interrupt: ${GRU_STEPS.check}`,
        to: { when: ({ notifiers }) => notifiers.clients[0]?.count === 0 },
      },
    },
  ),
  editedRule(
    'gru-undecided-goes-to-process-context',
    'what the atomic walk cannot decide in interrupt context is turned over to process context',
    GRU,
    () => {
      const free = ({ marks }: Readonly<World>): boolean => marks['interrupt'] === 0
      return secondaryScenario(() => {
        const made = world({ clients: ['gru'], pages: 1, marks: { interrupt: 0 } })
        const pte = clearPte(made.machine, space0(made), 0)
        dropMapped(made.machine, space0(made), pte?.pfn ?? -1)
        return made
      }, [
        device('tlb miss', [
          step('interrupt arrives', setMark('interrupt', 1)) as FaultStep,
          ...(inlined(gruFaultProgram(0, 0, 'interrupt'), 'in interrupt') as FaultStep[]),
          step('return from interrupt', setMark('interrupt', 0)) as FaultStep,
          step<FaultRegisters>('was it decided?', () => {}, {
            jump: { to: 'end', if: (_, { outcome }) => outcome === 'installed' },
          }) as FaultStep,
          ...(inlined(gruFaultProgram(0, 0, 'process'), 'in process') as FaultStep[]),
        ]),
        vm(
          'munmap, same cpu',
          onlyWhen([acquire('mmapSem', 'munmap'), step('work', () => {}), release('mmapSem', 'munmap')], free),
        ),
      ])
    },
    'the interrupt takes mmap_sem to fault the page in',
    'deadlock',
    {
      actor: 'tlb miss',
      change: { step: `in interrupt: ${GRU_STEPS.walk}`, to: { when: ({ locks }) => locks['mmapSem'] === '' } },
    },
  ),
  switchedRule(
    'no-order-between-clients',
    'clients are called one after another, in no promised order: none may rely on another having been called',
    LIST,
    (trusting: 'independent' | 'copies from kvm') => {
      const call = (label: string, first: Client['kind'], second: Client['kind']): VmStep =>
        step(label, (state, me) => {
          const name = me.failed ? second : first
          const client = state.notifiers.clients.find((one) => one.name === name) as Client
          clientRangeStart(client, 0, 1, 'blockable', 'may-sleep')
          const shadow = clientOf(state, 0).sptes[0]
          if (trusting !== 'independent' && name === 'gru' && shadow !== undefined) client.sptes[0] = { ...shadow }
        })
      return secondaryScenario(
        () => mapped(mapped(world({ clients: ['kvm', 'gru'], pages: 1, marks: { order: 0 } }), 0), 1),
        [
          actor<World>('list order', {}, [step('the list has the other order', setMark('order', 1))]),
          vm('unmap', [
            step(
              'which order has the list?',
              (state, me) => {
                me.failed = state.marks['order'] === 1
              },
              { shows: (_, { failed }) => (failed ? 'gru, kvm' : 'kvm, gru') },
            ),
            call('range_start: first client', 'kvm', 'gru'),
            call('range_start: second client', 'gru', 'kvm'),
            clearStep(0),
            freeStep(),
            endStep(0, 1, 'kvm'),
            endStep(0, 1, 'gru'),
          ]),
        ],
        [balanced],
      )
    },
    'independent',
    'GRU refills from the shadow tables, as if KVM had always been called before',
    DANGLING,
    'copies from kvm',
  ),
  editedRule(
    'register-excludes-operations',
    'registration is excluded from running operations: no client sees an end without its start',
    LIST,
    () =>
      secondaryScenario(() => {
        const made = world({ pages: 1, locks: ['kvm'] })
        addClient(made, 'kvm', 0)
        return made
      }, [
        device('kvm', [
          acquire('mmapSem', 'kvm') as FaultStep,
          step('register', (state) => {
            register(state as World, 0)
          }) as FaultStep,
          release('mmapSem', 'kvm') as FaultStep,
          ...(inlined(kvmFaultProgram(0, 0), 'fault') as FaultStep[]),
        ]),
        vm('unmap', [
          acquire('mmapSem', 'unmap'),
          onList('range_start', (_, client) => void clientRangeStart(client, 0, 1, 'blockable', 'may-sleep')),
          clearStep(0),
          freeStep(),
          onList('range_end', (_, client) => clientRangeEnd(client, 0, 1)),
          release('mmapSem', 'unmap'),
        ]),
      ]),
    'it takes no lock',
    'end-without-start',
    { actor: 'kvm', without: ['lock mmapSem', 'unlock mmapSem'] },
  ),
  editedRule(
    'unregister-waits-for-callbacks',
    'after unregister has returned no callback is running',
    LIST,
    unmapAndUnregister,
    'it returns without a grace period, and the client frees its memory',
    'use-after-free',
    { actor: 'unregister', without: ['wait for a grace period'] },
  ),
  editedRule(
    'mappings-dropped-before-unregister',
    'who unregisters has dropped all mappings before: off the list it hears of nothing, and release comes later',
    LIST,
    unmapAndUnregister,
    'it leaves that to release',
    DANGLING,
    { actor: 'unregister', without: ['drop all mappings'] },
  ),
  editedRule(
    'released-before-taken-off-the-list',
    'at exit a client is released while it is still on the list: pages can still be reclaimed meanwhile',
    from('commit 3ad3d901bbcf (July 2012), which repaired the order of 2.6.27 and later', '3.6'),
    () =>
      secondaryScenario(
        () => mapped(world({ clients: ['kvm'], pages: 1 })),
        [
          vm('reclaim', [
            clearStep(0),
            onList('invalidate_page', (_, client) => clientInvalidatePage(client, 0, 'atomic')),
            freeStep(),
          ]),
          vm('exit', [
            callback('release: kvm', 'kvm', (state) => callRelease(state, 0)),
            step('take it off the list', (state) => void unlink(state, 0)),
          ]),
        ],
        [balanced],
      ),
    'it is taken off the list first, as 2.6.31 does',
    DANGLING,
    { actor: 'exit', move: { step: 'take it off the list', before: 'release: kvm' } },
  ),
  editedRule(
    'release-runs-once',
    'whoever takes the entry off the list calls release: it runs exactly once',
    LIST,
    exitAndUnregister,
    'unregister looks at the list, releases, and takes the entry off afterwards',
    'release-once',
    {
      actor: 'unregister',
      change: {
        step: 'take it off the list',
        to: {
          run: (state, me) => {
            ;(me as { failed: boolean }).failed = !mmOf(state, 0).list.includes(0)
          },
        },
      },
    },
  ),
  editedRule(
    'loser-of-release-waits',
    'who finds the entry taken off by the other waits until its release has ended',
    LIST,
    exitAndUnregister,
    'unregister returns at once, and the client frees its memory',
    'use-after-free',
    { actor: 'unregister', without: ['wait for a grace period'] },
  ),
  editedRule(
    'release-before-pages-are-freed',
    'release is called before the pages of the address space are freed',
    LIST,
    faultAndExit,
    'the pages are freed first',
    DANGLING,
    { actor: 'exit', move: { step: 'free all pages', before: 'release: kvm' } },
  ),
  editedRule(
    'no-mapping-after-release',
    'after release a client makes no mapping',
    LIST,
    faultAndExit,
    'a fault under way installs its entry all the same',
    DANGLING,
    {
      actor: 'vcpu',
      change: {
        step: KVM_STEPS.check,
        to: {
          run: (state, me) => {
            const registers = me as FaultRegisters
            registers.retry = kvmOf(state as World).count > 0 || kvmOf(state as World).seq !== registers.seq
          },
        },
      },
    },
  ),
  editedRule(
    'register-pins-the-mm-structure',
    'a registration pins the structure of the address space until unregister, which may come after the exit',
    LIST,
    exitAndUnregister,
    'it takes no reference',
    'mm-struct-freed',
    {
      actor: 'exit',
      change: {
        step: 'last user goes',
        to: {
          run: (state) => {
            mmOf(state, 0).users = 0
            dropStruct(mmOf(state, 0)) // the reference that the registration should have taken
          },
        },
      },
    },
  ),
  editedRule(
    'register-needs-a-user',
    'who registers holds a user reference on the address space: otherwise release would never come',
    LIST,
    () =>
      secondaryScenario(
        () => {
          const made = world({ pages: 1, locks: ['kvm'] })
          addClient(made, 'kvm', 0)
          return made
        },
        [
          device('kvm', [
            step<FaultRegisters>(
              'get a user reference',
              (state, me) => {
                if (mmOf(state, 0).users === 0) me.outcome = 'released'
                else mmOf(state, 0).users++
              },
              { shows: (_, { outcome }) => outcome, jump: { to: 'end', if: (_, { outcome }) => outcome !== '' } },
            ) as FaultStep,
            step('register', (state) => {
              register(state as World, 0)
            }) as FaultStep,
            ...(inlined(kvmFaultProgram(0, 0), 'fault') as FaultStep[]),
            step('put the user reference', putUser) as FaultStep,
          ]),
          vm('process', [step('exits', putUser)]),
        ],
        [balanced],
      ),
    'it registers with what it has',
    'register-without-user',
    { actor: 'kvm', without: ['get a user reference'] },
  ),
  switchedRule(
    'register-holds-no-vm-lock',
    'who registers holds none of the VM locks, which registration takes itself',
    LIST,
    (before: 'nothing' | 'mmap_sem') =>
      secondaryScenario(() => {
        const made = world({ pages: 1, clients: ['gru'] })
        return made
      }, [
        actor<World>('kvm', {}, [
          ...(before === 'nothing' ? [] : [acquire('mmapSem', 'kvm')]),
          { ...acquire('mmapSem', 'kvm'), label: 'register: lock mmap_sem and the reverse maps' },
          { ...release('mmapSem', 'kvm'), label: 'register: unlock' },
        ]),
        vm('unmap', [acquire('mmapSem', 'unmap'), ...unmapRange(0, ['gru']), release('mmapSem', 'unmap')]),
      ]),
    'nothing',
    'the caller holds mmap_sem',
    'deadlock',
    'mmap_sem',
  ),
  editedRule(
    'callbacks-that-sleep-need-sleeping-locks',
    'a callback that has to sleep must not be called under a spinlock',
    SEED,
    () =>
      secondaryScenario(xpmemWorld, [
        remotePartition(['page-table lock']),
        vm('unmap', [
          acquire('page-table lock', 'unmap'),
          clearStep(0),
          release('page-table lock', 'unmap'),
          ...xpmemCallback(),
          freeStep(),
        ]),
      ]),
    'it is called under the page-table lock, which the other partition needs to answer',
    'deadlock',
    { actor: 'unmap', move: { step: 'unlock page-table lock', before: 'free the page' } },
  ),
  editedRule(
    'xpmem-waits-for-answers',
    'XPMEM gives its page references back only when the other partition has dropped its entries',
    SEED,
    () =>
      secondaryScenario(xpmemWorld, [remotePartition([]), vm('unmap', [clearStep(0), ...xpmemCallback(), freeStep()])]),
    'it gives them back when the messages are sent',
    DANGLING,
    {
      actor: 'unmap',
      change: {
        step: 'xpmem: wait for the answers',
        to: {
          when: () => true,
          run: (state) => {
            const xpmem = clientOf(state, 0) as XpmemClient
            const { messages } = xpmem
            xpmem.messages = []
            deliverMessages(state.machine, xpmem) // gives references back, drops nothing remotely
            xpmem.messages = messages
          },
        },
      },
    },
  ),
  editedRule(
    'young-results-are-or-ed',
    'a page is young if any client has used it: all are asked, and the answers are OR-ed',
    LIST,
    () =>
      secondaryScenario(
        () => mapped(mapped(world({ clients: ['kvm', 'gru'], pages: 1, marks: { used: 0 } }), 0), 1),
        [
          device('vcpu', [
            step('uses the page', (state) => {
              const spte = clientOf(state, 0).sptes[0]
              if (spte === undefined) return
              spte.young = true
              ;(state as World).marks['used'] = 1
            }) as FaultStep,
          ]),
          vm('reclaim', [
            ask('kvm', 0, (answer, before) => answer || before),
            ask('gru', 1, (answer, before) => answer || before),
            step(
              'reclaim if old',
              (state, me) => {
                if (me.failed) return
                requireRule(
                  state.marks['asked'] !== 1,
                  'young-page-reclaimed',
                  'KVM had used the page when it was asked',
                )
              },
              { shows: (_, { failed }) => (failed ? 'young: keep' : 'old: reclaim') },
            ),
          ]),
        ],
        [balanced],
      ),
    'the last answer counts',
    'young-page-reclaimed',
    { actor: 'reclaim', change: { step: 'clear_flush_young: gru', to: ask('gru', 1, (answer) => answer) } },
  ),
  editedRule(
    'failed-start-is-undone',
    'when a client refuses a non-blocking start, those that had accepted get their end',
    MODERN,
    refusedStart,
    'nobody tells them',
    'livelock',
    { actor: 'reaper', without: ['core: end for kvm'] },
  ),
  editedRule(
    'failed-start-has-no-end',
    'after a start that failed the caller must not call end',
    MODERN,
    refusedStart,
    'it calls end all the same',
    'end-without-start',
    {
      actor: 'reaper',
      change: { step: 'give up', to: { run: (state) => clientRangeEnd(clientOf(state, 0), 0, 1) } },
    },
  ),
  editedRule(
    'blockable-start-never-fails',
    'only a start that must not block may fail; any other waits',
    MODERN,
    () =>
      secondaryScenario(xpmemWorld, [remotePartition([]), vm('unmap', [...xpmemCallback(), clearStep(0), freeStep()])]),
    'XPMEM fails a blockable start, and the VM goes on',
    STALE,
    {
      actor: 'unmap',
      change: { step: 'xpmem: ask the other partition', to: { run: () => {} } },
    },
  ),
  editedRule(
    'secondary-changed-before-primary',
    'with change_pte the secondary entries are changed before the primary one (set_pte_at_notify)',
    from('include/linux/mmu_notifier.h', '2.6.33'),
    () => repointed('change_pte: kvm', (state, pfn) => clientChangePte(clientOf(state, 0), 0, pfn), 'kvm'),
    'the primary entry is set first',
    'old-data',
    { actor: 'copy-on-write', move: { step: 'set the new entry', before: 'change_pte: kvm' } },
  ),
  editedRule(
    'repoint-flushes-before-set',
    'when an entry is repointed the secondary is flushed between clear and set, not at the end of the range',
    from('Documentation/vm/mmu_notifier', '4.15'),
    () => repointed('flush gru', (state) => dropSptes(clientOf(state, 0), 0, 1), 'gru'),
    'the flush waits for the end of the range',
    'old-data',
    { actor: 'copy-on-write', move: { step: 'set the new entry', before: 'flush gru' } },
  ),
  editedRule(
    'deferred-flush-frees-after-end',
    'the flush of the secondary may wait for the end of the range only if the page is freed after that',
    from('Documentation/vm/mmu_notifier', '4.15'),
    () =>
      secondaryScenario(
        () => mapped(world({ clients: ['gru'], pages: 1 })),
        [
          device('tlb miss', gruFaultProgram(0, 0, 'process')),
          vm('unmap', [
            callback('range_start: gru (no flush yet)', 'gru', (_, client) => void client.count++),
            clearStep(0),
            callback('range_end: gru flushes', 'gru', (_, client) => {
              dropSptes(client, 0, 1)
              clientRangeEnd(client, 0, 1)
            }),
            freeStep(),
          ]),
        ],
      ),
    'the page is freed inside the range',
    DANGLING,
    { actor: 'unmap', move: { step: 'free the page', before: 'range_end: gru flushes' } },
  ),
  cowRule('cow-fault-single-page', 'page', [], [pageStep(0)]),
  cowRule('cow-fault-range-pair', 'range', [startStep(0, 1)], [endStep(0, 1)]),
  editedRule(
    'fork-notifies',
    'fork write-protects a private range: it is a range for the notifiers',
    from('mm/memory.c', '2.6.31'),
    () =>
      secondaryScenario(
        () => mapped(world({ clients: ['kvm'], pages: 1, marks: { child: -1 } }), 0, true),
        [
          device('guest', [writeThrough(9)]),
          vm('fork', [
            startStep(0, 1),
            step('copy and write-protect', (state) => {
              fork(state.machine, space0(state))
              state.marks['child'] = childContent(state)
            }),
            endStep(0, 1),
          ]),
        ],
        [
          {
            name: 'child unchanged',
            check: (state) =>
              childContent(state) === state.marks['child'] ? null : `the child sees ${childContent(state)} now`,
          },
        ],
      ),
    'nobody is told',
    'child unchanged',
    { actor: 'fork', without: ['range_start: kvm', 'range_end: kvm'] },
  ),
  editedRule(
    'mremap-notifies-old-range',
    'moving an area is a range for the old addresses',
    from('mm/mremap.c', '2.6.31'),
    () =>
      secondaryScenario(oneKvm(), [
        vcpu(),
        vm('mremap', [
          startStep(0, 1),
          step('move the entries', (state) => void mremap(state.machine, space0(state), 0, 8)),
          endStep(0, 1),
        ]),
      ]),
    'nobody is told',
    STALE,
    { actor: 'mremap', without: ['range_start: kvm', 'range_end: kvm'] },
  ),
  editedRule(
    'mprotect-notifies',
    'taking permission away is a range',
    from('mm/mprotect.c', '2.6.31'),
    () =>
      secondaryScenario(oneKvm(), [
        vcpu(0, { access: 'write' }),
        vm('mprotect', [
          startStep(0, 1),
          step('make it read-only', (state) => {
            const { first } = findVma(space0(state), 0) ?? { first: 0 }
            mprotect(state.machine, space0(state), first, 1, false)
          }),
          endStep(0, 1),
        ]),
      ]),
    'nobody is told',
    STALE,
    { actor: 'mprotect', without: ['range_start: kvm', 'range_end: kvm'] },
  ),
  switchedRule(
    'xip-unmap-notifies',
    'unmapping the zero page of an XIP file clears, flushes and notifies, so that secondary MMUs see it',
    from('mm/filemap_xip.c', '2.6.31'),
    (told: 'told' | 'not told') =>
      secondaryScenario(
        () => {
          const made = world({ clients: ['kvm'], blocks: 1 })
          const file = made.fs.files[0]
          if (file !== undefined) xipMmap(space0(made), file, { first: 0, pages: 1 })
          xipFault(made, 0, 0, 'read')
          return mapped(made)
        },
        [
          actor<World>(
            'write',
            xipRegisters(),
            xipWriteProgram({ thread: 'write', file: 0, offset: 0, value: 5 }, (state) =>
              told === 'told' ? secondaryMmus(state as World) : nobodyTold,
            ),
          ),
          device('guest', [
            step('reads through its entry', (state) => {
              const spte = clientOf(state, 0).sptes[0]
              if (spte !== undefined) frameOf(state.machine, spte.pfn)
            }) as FaultStep,
          ]),
        ],
        [noStale, fileShown, balanced],
      ),
    'told',
    'only the primary entry is cleared',
    STALE,
    'not told',
  ),
  editedRule(
    'unmap-and-notify-before-store',
    'a page that goes to cleancache or swap is unmapped, and secondary MMUs are told, before it is copied',
    from('mm/vmscan.c, mm/rmap.c', '2.6.31'),
    () =>
      secondaryScenario(
        () => mapped(world({ clients: ['kvm'], pages: 1, marks: { last: 7, stored: -1 } }), 0, true),
        [
          device('guest', [writeThrough(9)]),
          vm('reclaim', [
            clearStep(0),
            pageStep(0),
            step(
              'put: copy the page',
              (state, me) => {
                state.marks['stored'] = frameOf(state.machine, me.pfn).content
              },
              { shows: ({ marks }) => String(marks['stored']) },
            ),
            freeStep(),
          ]),
        ],
        [
          {
            name: 'no lost store',
            check: ({ marks }) =>
              marks['stored'] === marks['last'] ? null : `stored ${marks['stored']}, last written ${marks['last']}`,
          },
        ],
      ),
    'it is copied before the secondary MMUs are told',
    'no lost store',
    { actor: 'reclaim', move: { step: 'put: copy the page', before: 'invalidate_page: kvm' } },
  ),
]

// ---------------------------------------------------------------------------------------------------------------
// Parts of the scenarios above

const nobodyTold: SecondaryMmus = {
  range: (_space, _first, _end, change) => change(),
  page: (_space, _vpn, change) => change(),
}

/** Calls whoever is registered at the moment. */
function onList(label: string, run: (world: World, client: Client) => void): VmStep {
  return callback(label, 'kvm', (state) => {
    for (const id of mmOf(state, 0).list) run(state, clientOf(state, id))
  })
}

/** Touches the client's own memory, which is gone once its module was unloaded. */
function useClient(state: World, use: (kvm: KvmClient) => void): void {
  requireRule(state.marks['memory'] === 1, 'use-after-free', 'a callback runs in a client whose memory was freed')
  use(kvmOf(state))
}

/** Takes the client off the list, releases it if that was this thread, waits for a grace period, frees its memory. */
function unregisterActor(): Actor<World> {
  return vm('unregister', [
    // The caller's duty in 2.6.31: between the list and release nobody tells the client of anything.
    callback('drop all mappings', 'kvm', (_, client) => dropSptes(client, 0, 1)),
    step(
      'take it off the list',
      (state, me) => {
        me.failed = unlink(state, 0) === 'not-mine'
      },
      { shows: (_, { failed }) => (failed ? 'somebody did' : '') },
    ),
    step('release, if it was me', (state, me) => {
      if (me.failed) return
      unlink(state, 0)
      useClient(state, () => callRelease(state, 0))
    }),
    step('wait for a grace period', () => {}, { when: ({ marks }) => marks['readers'] === 0 }),
    step('drop the pin', (state) => dropStruct(mmOf(state, 0))),
    step('free the client', setMark('memory', 0)),
  ])
}

/** A page is unmapped while a client unregisters. */
function unmapAndUnregister(): Scenario<World> {
  return secondaryScenario(
    () => mapped(world({ clients: ['kvm'], pages: 1, marks: { readers: 0, memory: 1 } })),
    [
      vm('unmap', [
        clearStep(0),
        step(
          'enter RCU, find the client',
          (state, me) => {
            me.failed = !mmOf(state, 0).list.includes(0)
            state.marks['readers'] = (state.marks['readers'] ?? 0) + 1
          },
          { shows: (_, { failed }) => (failed ? 'not on the list' : '') },
        ),
        step('invalidate_page: kvm', (state, me) => {
          if (!me.failed) useClient(state, (kvm) => dropSptes(kvm, 0, 1))
        }),
        step('leave RCU', (state) => {
          state.marks['readers'] = (state.marks['readers'] ?? 0) - 1
        }),
        freeStep(),
      ]),
      unregisterActor(),
    ],
    [balanced],
  )
}

/** The exit of an address space against unregister: both find the client on the list, one of them releases it. */
function exitAndUnregister(): Scenario<World> {
  return secondaryScenario(
    () => mapped(world({ clients: ['kvm'], pages: 1, marks: { readers: 0, memory: 1 } })),
    [
      vm('exit', [
        step('last user goes', (state) => {
          mmOf(state, 0).users = 0
        }),
        step(
          'enter RCU, take it off the list',
          (state, me) => {
            state.marks['readers'] = 1
            me.failed = unlink(state, 0) === 'not-mine'
          },
          { shows: (_, { failed }) => (failed ? 'somebody did' : '') },
        ),
        step('release, if it was me', (state, me) => {
          if (!me.failed) useClient(state, () => callRelease(state, 0))
        }),
        step('leave RCU', setMark('readers', 0)),
        step('wait for the other release', () => {}, { when: ({ notifiers }) => notifiers.clients[0]?.releases === 1 }),
        step('free all pages', (state) => exitSpace(state.machine, space0(state))),
        step('drop the users reference', (state) => dropStruct(mmOf(state, 0))),
      ]),
      unregisterActor(),
    ],
    [balanced],
  )
}

/** A fault against the exit of its address space. */
function faultAndExit(): Scenario<World> {
  return secondaryScenario(
    oneKvm(),
    [
      vcpu(),
      vm('exit', [
        callback('release: kvm', 'kvm', (state) => {
          unlink(state, 0)
          callRelease(state, 0)
        }),
        step('free all pages', (state) => exitSpace(state.machine, space0(state))),
      ]),
    ],
    [balanced],
  )
}

/** The last user releases the clients and frees the pages. */
function putUser(state: object): void {
  const world0 = state as World
  const mm = mmOf(world0, 0)
  mm.users--
  if (mm.users > 0) return
  for (const id of mm.list) if (unlink(world0, id) === 'unlinked') callRelease(world0, id)
  exitSpace(world0.machine, space0(world0))
}

/** XPMEM has exported page 0, pinned; the other partition maps it. */
function xpmemWorld(): World {
  const made = world({ clients: ['xpmem'], pages: 1, locks: ['page-table lock'] })
  const pfn = lookUp(made.machine, 0, 0, 'read')
  const xpmem = clientOf(made, 0) as XpmemClient
  xpmem.sptes[0] = { pfn, writable: false, young: true }
  xpmem.remote[0] = { pfn, writable: false, young: true }
  return made
}

/** Asks the other partition, waits, gives the references back. */
function xpmemCallback(): VmStep[] {
  return [
    callback('xpmem: ask the other partition', 'xpmem', (_, client) => dropSptes(client, 0, 1)),
    step('xpmem: wait for the answers', (state) => deliverMessages(state.machine, clientOf(state, 0) as XpmemClient), {
      when: ({ notifiers }) => (notifiers.clients[0] as XpmemClient).messages.length === 0,
    }),
  ]
}

/** The other partition answers one message; it may need locks of this one to do so. */
function remotePartition(locks: readonly string[]): Actor<World> {
  return actor<World>(
    'other partition',
    {},
    [
      step('a message comes', () => {}, {
        when: ({ notifiers }) => (notifiers.clients[0] as XpmemClient).messages.length > 0,
      }),
      ...locks.map((lock) => acquire(lock, 'other partition')),
      step('drop its entry, answer', (state) => {
        const xpmem = clientOf(state, 0) as XpmemClient
        for (const vpn of xpmem.messages.splice(0)) delete xpmem.remote[vpn]
      }),
      ...locks.map((lock) => release(lock, 'other partition')),
    ],
    { daemon: true },
  )
}

/** Asks one client whether it used page 0. `combine` makes the answer so far out of its answer and the one before. */
function ask(name: string, id: number, combine: (answer: boolean, before: boolean) => boolean): VmStep {
  return step(
    `clear_flush_young: ${name}`,
    (state, me) => {
      const answer = clientYoung(clientOf(state, id), 0) === 'young'
      if (answer && id === 0) state.marks['asked'] = 1
      me.failed = combine(answer, me.failed)
    },
    { shows: (_, { failed }) => (failed ? 'young' : 'old') },
  )
}

/** KVM accepts a non-blocking start, XPMEM refuses it; a virtual processor faults meanwhile. */
function refusedStart(): Scenario<World> {
  return secondaryScenario(
    () => {
      const made = world({ clients: ['kvm', 'xpmem'], pages: 1 })
      const pfn = lookUp(made.machine, 0, 0, 'read')
      clientOf(made, 1).sptes[0] = { pfn, writable: false, young: true }
      return made
    },
    [
      vcpu(),
      vm('reaper', [
        startStep(0, 1),
        step(
          'range_start: xpmem, must not block',
          (state, me) => {
            me.failed = clientRangeStart(clientOf(state, 1), 0, 1, 'non-blockable', 'atomic') === '-EAGAIN'
          },
          { shows: (_, { failed }) => (failed ? '-EAGAIN' : 'ok') },
        ),
        callback('core: end for kvm', 'kvm', (_, client) => clientRangeEnd(client, 0, 1)),
        step('give up', () => {}),
      ]),
    ],
    [noStale],
  )
}

/** Copy-on-write repoints page 0; the process writes to the copy, and a device must not read the old page then. */
function repointed(label: string, notify: (state: World, pfn: number) => void, kind: 'kvm' | 'gru'): Scenario<World> {
  return secondaryScenario(
    () => {
      const made = world({ clients: [kind], pages: 1, marks: { written: 0 } })
      takePage(made.machine, 3, 'anonymous')
      frameOf(made.machine, 3).content = 7
      return mapped(made)
    },
    [
      vm('copy-on-write', [
        clearStep(0),
        callback(label, kind, (state) => notify(state, 3)),
        step('set the new entry', (state) => {
          const table = state.machine.tables[0]
          if (table !== undefined) table.entries[0] = { pfn: 3, special: false, writable: true, dirty: false }
        }),
      ]),
      actor<World>('process', {}, [
        step(
          'writes 8 to the page, tells the device',
          (state) => {
            frameOf(state.machine, 3).content = 8
            state.marks['written'] = 1
          },
          { when: (state) => translate(state.machine, space0(state as World), 0, 'write') === 3 },
        ),
      ]),
      actor<World>('device', {}, [
        step(
          'is told, reads the page',
          (state) => {
            const spte = clientOf(state, 0).sptes[0]
            if (spte === undefined) return // a fault, which finds the new page
            const { content } = frameOf(state.machine, spte.pfn)
            requireRule(content === 8, 'old-data', `the device reads ${content}, the process has written 8`)
          },
          { when: ({ marks }) => marks['written'] === 1 },
        ),
      ]),
    ],
    [],
  )
}

/** A copy-on-write fault of the primary MMU while a virtual processor reads the page. */
function cowRule(
  name: string,
  shape: 'page' | 'range',
  before: readonly VmStep[],
  after: readonly VmStep[],
): RuleEntry<World> {
  const labels = [...before, ...after].map(({ label }) => label)
  return editedRule(
    name,
    `a copy-on-write fault tells secondary MMUs (${shape === 'page' ? 'invalidate_page kept' : 'ranges only'})`,
    from(`${SEED.source}; mm/memory.c`, '2.6.31'),
    () =>
      secondaryScenario(() => {
        const made = world({ clients: ['kvm'], pages: 1, spaces: 1 })
        fork(made.machine, spaceOf(made.machine, 0))
        return made
      }, [
        vcpu(),
        vm('store', [
          ...before,
          step(
            'clear, flush, set the copy',
            (state) => {
              const vma = findVma(space0(state), 0)
              if (vma !== undefined) writeProtectFault(state.machine, space0(state), vma, 0)
            },
            { shows: (state) => `frame ${entry(state as World)}` },
          ),
          ...after,
        ]),
      ]),
    'nobody is told',
    STALE,
    { actor: 'store', without: labels },
  )
}

/** A guest writes through its entry, if it has one that allows it. */
function writeThrough(value: number): FaultStep {
  return step(`writes ${value} through its entry`, (state) => {
    const spte = clientOf(state, 0).sptes[0]
    if (spte?.writable !== true) return
    frameOf(state.machine, spte.pfn).content = value
    state.marks['last'] = value
  }) as FaultStep
}

/** What the child of space 0 sees at page 0. */
function childContent(state: Readonly<World>): number {
  const child = state.machine.spaces[1]
  const pfn = child === undefined ? null : translate(state.machine, child, 0, 'read')
  return pfn === null ? -1 : frameOf(state.machine, pfn).content
}
