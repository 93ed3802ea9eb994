/**
 * What the scenarios share: one kind of world, the actions of the VM in steps, and the two checks that matter most.
 *
 * Everything here calls the models; nothing is modelled a second time. Where a kernel does several things that others
 * can come between, each is a step.
 */
import { type Actor, actor, type Check, END, type HasLocks, type Scenario, type Step } from '@tmem/interleave'
import {
  type AddressSpace,
  auditMachine,
  auditXip,
  type Cpu,
  clearPte,
  createMachine,
  createSpace,
  createXipFile,
  createXipFilesystem,
  dropMapped,
  fault,
  frameOf,
  type Machine,
  type MachineOptions,
  mmap,
  spaceOf,
  translate,
  type XipFilesystem,
} from '@tmem/vm-mixedmap'
import {
  addClient,
  type Client,
  clientInvalidatePage,
  clientRangeEnd,
  clientRangeStart,
  danglingSptes,
  type FaultStep,
  faultRegisters,
  staleSptes,
} from '../clients.ts'
import { createNotifiers, type NotifierWorld, register, V13_COMPLETE } from '../notifier.ts'

/** The state of every scenario of this package. */
export interface World extends NotifierWorld, HasLocks {
  /** Locks by name; "" is free. */
  locks: Record<string, string> & { mmapSem: string }
  fs: XipFilesystem
  cpus: Cpu[]
  /** Small facts of one scenario: values seen, things done. */
  marks: Record<string, number>
}

export interface WorldOptions extends Partial<MachineOptions> {
  /** Clients of space 0, registered in this order. */
  readonly clients?: readonly Client['kind'][]
  /** Pages of space 0's private writable area at 0; each is present and holds 7. */
  readonly pages?: number
  readonly spaces?: number
  readonly marks?: Record<string, number>
  readonly locks?: readonly string[]
  /** Blocks of an XIP file system after the ordinary frames, with one file of that many pages. */
  readonly blocks?: number
}

/** A small machine: four frames with descriptors, x86-like, unless said otherwise. */
export function world(options: WorldOptions = {}): World {
  const { clients = [], pages = 0, spaces = 1, marks = {}, locks = [], blocks = 0 } = options
  const { memory = { kind: 'flat', frames: 4 }, frames = 4 + blocks, pteSpecial = true, maxTables = 8 } = options
  const { hugeSpecial = false, kernel = '2.6.31' } = options
  const machine = createMachine({ memory, frames, pteSpecial, hugeSpecial, kernel, maxTables })
  for (let i = 0; i < spaces; i++) createSpace(machine)
  const empty: XipFilesystem = { readOnly: false, files: [], freeBlocks: [], sparseSequence: 0, locks: { sparse: '' } }
  const fs = blocks === 0 ? empty : createXipFilesystem(machine, { first: frames - blocks, blocks })
  if (blocks > 0) createXipFile({ machine, fs }, blocks * 4096)
  if (pages > 0) {
    const space = spaceOf(machine, 0)
    mmap(space, { first: 0, pages, backing: { kind: 'anonymous' }, write: true })
    for (let vpn = 0; vpn < pages; vpn++) {
      fault(machine, space, vpn, 'write')
      frameOf(machine, translate(machine, space, vpn, 'write') as number).content = 7
    }
  }
  const made: World = {
    machine,
    notifiers: createNotifiers(machine, V13_COMPLETE),
    locks: { mmapSem: '', ...Object.fromEntries([...locks, ...clients].map((name) => [name, ''])) },
    fs,
    cpus: [{ interruptsOff: false }, { interruptsOff: false }],
    marks: { ...marks },
  }
  for (const kind of clients) addClient(made, kind, 0)
  for (const id of clients.keys()) register(made, id)
  // Registration puts new clients first; the scenarios speak of them in the order given.
  if (made.notifiers.mms[0] !== undefined) made.notifiers.mms[0].list.sort((a, b) => a - b)
  return made
}

/** Where a rule is stated, and the first or the read kernel that keeps it as it is modelled. */
export interface Origin {
  readonly source: string
  readonly version: string
}

export function from(source: string, version: string): Origin {
  return { source, version }
}

export const space0 = ({ machine }: World): AddressSpace => spaceOf(machine, 0)

/** A step of a scenario. */
export function step<L extends object = object>(
  label: string,
  run: (world: World, me: L) => void,
  more: Partial<Omit<Step<World, L>, 'label' | 'run'>> = {},
): Step<World, L> {
  return { label, run, ...more }
}

export function setMark(name: string, value: number): (world: World) => void {
  return ({ marks }) => {
    marks[name] = value
  }
}

/** Registers of the VM's programs. */
export interface VmRegisters {
  pfn: number
  failed: boolean
}

export function vmRegisters(): VmRegisters {
  return { pfn: -1, failed: false }
}

export type VmStep = Step<World, VmRegisters>

/** A thread of the VM. */
export function vm(name: string, steps: readonly VmStep[]): Actor<World> {
  return actor(name, vmRegisters(), steps)
}

/** A virtual processor or device that takes secondary faults. */
export function device(name: string, steps: readonly FaultStep[]): Actor<World> {
  return actor<World, ReturnType<typeof faultRegisters>>(name, faultRegisters(), steps)
}

/** Calls one client, as soon as its lock is free. */
export function callback(label: string, name: string, run: (world: World, client: Client) => void): VmStep {
  return step(
    label,
    (state) => {
      const client = state.notifiers.clients.find((one) => one.name === name)
      if (client !== undefined) run(state, client)
    },
    { when: ({ locks }) => (locks[name] ?? '') === '' },
  )
}

export const clearStep = (vpn: number): VmStep =>
  step(
    'clear and flush the entry',
    (state, me) => {
      me.pfn = clearPte(state.machine, space0(state), vpn)?.pfn ?? -1
    },
    { shows: (_, { pfn }) => (pfn < 0 ? 'empty' : `frame ${pfn}`) },
  )

export const freeStep = (): VmStep =>
  step(
    'free the page',
    (state, me) => {
      if (me.pfn >= 0) dropMapped(state.machine, space0(state), me.pfn)
    },
    { shows: ({ machine }, { pfn }) => (pfn < 0 ? '' : `count ${machine.frames[pfn]?.page?.count}`) },
  )

const showsKvm = ({ notifiers }: Readonly<World>): string => {
  const client = notifiers.clients[0]
  return client?.kind === 'kvm' ? `count ${client.count} seq ${client.seq}` : ''
}

export const startStep = (first: number, end: number, name = 'kvm'): VmStep => ({
  ...callback(`range_start: ${name}`, name, (_, client) => {
    clientRangeStart(client, first, end, 'blockable', 'may-sleep')
  }),
  shows: showsKvm,
})

export const endStep = (first: number, end: number, name = 'kvm'): VmStep => ({
  ...callback(`range_end: ${name}`, name, (_, client) => clientRangeEnd(client, first, end)),
  shows: showsKvm,
})

/** Unmaps one page inside a range: start, clear, free, end. */
export function unmapRange(
  vpn: number,
  names: readonly string[] = ['kvm'],
  first: number = vpn,
  end: number = vpn + 1,
): VmStep[] {
  return [
    ...names.map((name) => startStep(first, end, name)),
    clearStep(vpn),
    freeStep(),
    ...names.map((name) => endStep(first, end, name)),
  ]
}

export const pageStep = (vpn: number, name = 'kvm'): VmStep =>
  callback(`invalidate_page: ${name}`, name, (_, client) => clientInvalidatePage(client, vpn, 'may-sleep'))

/** Unmaps one page with the callback for single pages: clear, notify, free. */
export function unmapPage(vpn: number, names: readonly string[] = ['kvm']): VmStep[] {
  return [clearStep(vpn), ...names.map((name) => pageStep(vpn, name)), freeStep()]
}

/** No secondary MMU refers to free memory: in every state. */
export const noDangling: Check<World> = {
  name: 'no dangling spte',
  reads: ['machine', 'notifiers'],
  check: (state) => danglingSptes(state)[0] ?? null,
}

/** When all is quiet, secondary MMUs agree with the primary one. */
export const noStale: Check<World> = { name: 'no stale spte', check: (state) => staleSptes(state)[0] ?? null }

/** When all is quiet, references, reverse map and rss balance, and no entry was found bad. */
export const balanced: Check<{ machine: Machine }> = {
  name: 'balance',
  check: ({ machine }) => auditMachine(machine)[0] ?? null,
}

/** When all is quiet, every mapping of a file shows the file. */
export const fileShown: Check<World> = { name: 'mappings show the file', check: (state) => auditXip(state)[0] ?? null }

/** A scenario about secondary MMUs. */
export function secondaryScenario(
  initial: () => World,
  actors: readonly Actor<World>[],
  atEnd: readonly Check<World>[] = [noStale, balanced],
): Scenario<World> {
  return { initial, actors, invariants: [noDangling], atEnd }
}

/**
 * A program as part of another: its "end" becomes the step after it. Names and labels get a prefix, so that two can
 * stand in one actor.
 */
export function inlined<L extends object>(steps: readonly Step<World, L>[], prefix: string): Step<World, L>[] {
  const after = `${prefix} done`
  const renamed = steps.map(({ jump, at, label, ...rest }) => ({
    ...rest,
    label: `${prefix}: ${label}`,
    ...(at === undefined ? {} : { at: `${prefix} ${at}` }),
    ...(jump === undefined
      ? {}
      : {
          jump: {
            to: jump.to === END ? after : `${prefix} ${jump.to}`,
            if: (state: Readonly<World>, me: Readonly<L>) => jump.if(state, me),
          },
        }),
  }))
  return [...renamed, { label: after, at: after, run: () => {} }]
}

/** Steps that can run only when something holds, besides what they wait for themselves. */
export function onlyWhen<L extends object>(
  steps: readonly Step<World, L>[],
  holds: (state: Readonly<World>) => boolean,
): Step<World, L>[] {
  return steps.map(({ touches: _touches, ...one }) => ({
    ...one,
    when: (state: Readonly<World>, me: Readonly<L>) => holds(state) && (one.when?.(state, me) ?? true),
  }))
}
