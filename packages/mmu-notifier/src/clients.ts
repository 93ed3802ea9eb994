/**
 * Three clients of MMU notifiers, as far as they differ in what they need:
 *
 * - KVM keeps shadow entries under a lock of its own, and a fault that may sleep between looking the page up and
 *   installing it: counter and sequence number.
 * - GRU has a hardware TLB, and faults that arrive in interrupt context: a counter only, because the hardware cancels
 *   an insert that races with a flush.
 * - XPMEM maps pages into other partitions and has to send messages and wait for the answers: it must sleep, and keeps
 *   a reference on every page it has exported.
 *
 * Invariants: an entry (spte) of a client refers to a page that is not free; KVM and GRU hold no references through
 * their entries.
 *
 * The fault paths are programs: step lists that @tmem/interleave can explore. They need the client's lock in
 * `world.locks`, under the client's name.
 *
 * Source: virt/kvm/kvm_main.c, drivers/misc/sgi-gru/grutlbpurge.c and grufault.c of 2.6.31; for XPMEM only the mail of
 * 22 April 2008 and its thread (the details of its messages are this model's own).
 */
import type { HasLocks, Step } from '@tmem/interleave'
import {
  fault,
  findVma,
  getPage,
  type Machine,
  putPage,
  readPte,
  requireRule,
  spaceOf,
  translate,
} from '@tmem/vm-mixedmap'
import type { Blocking, NotifierWorld } from './notifier.ts'

/** Index in Notifiers.clients. */
export type ClientId = number

/** An entry of a secondary MMU. */
export interface Spte {
  pfn: number
  writable: boolean
  /** Used since clear_flush_young was asked. */
  young: boolean
}

interface ClientState {
  name: string
  /** Address space. */
  mm: number
  state: 'new' | 'registered' | 'released' | 'unregistered'
  releases: number
  /** Entries by virtual page number. */
  sptes: Record<string, Spte>
  /** Ranges between start and end. */
  count: number
}

export interface KvmClient extends ClientState {
  kind: 'kvm'
  /** Raised at every end and at every single page. */
  seq: number
  /** The union of the active ranges, while there are any. */
  rangeFirst: number
  rangeEnd: number
}

export interface GruClient extends ClientState {
  kind: 'gru'
  /** Flushes of the TLB. The hardware cancels an insert that was under way when one happened. */
  flushes: number
}

export interface XpmemClient extends ClientState {
  kind: 'xpmem'
  /** Entries in the other partition. Each page is pinned as long as it is exported (is in `sptes`). */
  remote: Record<string, Spte>
  /** Pages whose drop the other partition was asked for and has not confirmed. */
  messages: number[]
  /** The references to give back once confirmed. */
  pinned: number[]
}

export type Client = KvmClient | GruClient | XpmemClient

/** Adds a client of an address space; it is not registered yet. Returns its number. */
export function addClient(world: NotifierWorld, kind: Client['kind'], mm: number, name: string = kind): ClientId {
  const common: ClientState = { name, mm, state: 'new', releases: 0, sptes: {}, count: 0 }
  const { clients } = world.notifiers
  switch (kind) {
    case 'kvm':
      clients.push({ ...common, kind, seq: 0, rangeFirst: 0, rangeEnd: 0 })
      break
    case 'gru':
      clients.push({ ...common, kind, flushes: 0 })
      break
    case 'xpmem':
      clients.push({ ...common, kind, remote: {}, messages: [], pinned: [] })
  }
  return clients.length - 1
}

/** Whether a client has to sleep in its callbacks. */
export function needsSleep(client: Client): boolean {
  return client.kind === 'xpmem'
}

// ---------------------------------------------------------------------------------------------------------------
// Callbacks

/** Drops entries in a range. Those of XPMEM are asked for by messages; deliverMessages() answers them. */
export function dropSptes(client: Client, first: number, end: number): void {
  if (client.kind === 'gru') client.flushes++
  for (const vpn of Object.keys(client.sptes).map(Number)) {
    if (vpn < first || vpn >= end) continue
    const spte = client.sptes[vpn] as Spte
    delete client.sptes[vpn]
    if (client.kind !== 'xpmem') continue
    client.messages.push(vpn)
    client.pinned.push(spte.pfn)
  }
}

/**
 * range_start of a client.
 * @returns "-EAGAIN" if it would have to wait and the start is not blockable: XPMEM, when it has something to drop.
 * @throws RuleViolation "sleeps-in-atomic" if it has to sleep and the caller may not.
 */
export function clientRangeStart(
  client: Client,
  first: number,
  end: number,
  blocking: Blocking,
  context: 'atomic' | 'may-sleep',
): 'ok' | '-EAGAIN' {
  const has = Object.keys(client.sptes).some((vpn) => Number(vpn) >= first && Number(vpn) < end)
  if (has && needsSleep(client) && blocking === 'non-blockable') return '-EAGAIN'
  if (has) mayWait(client, context)
  if (client.kind === 'kvm') {
    client.rangeFirst = client.count === 0 ? first : Math.min(client.rangeFirst, first)
    client.rangeEnd = client.count === 0 ? end : Math.max(client.rangeEnd, end)
  }
  client.count++
  dropSptes(client, first, end)
  return 'ok'
}

/** range_end of a client. @throws RuleViolation "end-without-start" if it has seen no start. */
export function clientRangeEnd(client: Client, _first: number, _end: number): void {
  requireRule(client.count > 0, 'end-without-start', `client "${client.name}" sees an end without a start`)
  // The sequence first: who sees the count at 0 must see the new sequence, too.
  if (client.kind === 'kvm') client.seq++
  client.count--
}

/** invalidate_page of a client. */
export function clientInvalidatePage(client: Client, vpn: number, context: 'atomic' | 'may-sleep'): void {
  if (client.kind === 'kvm') client.seq++
  if (client.sptes[vpn] !== undefined) mayWait(client, context)
  dropSptes(client, vpn, vpn + 1)
}

/** clear_flush_young of a client: reports, and forgets. */
export function clientYoung(client: Client, vpn: number): 'young' | 'old' {
  const spte = client.sptes[vpn]
  if (spte?.young !== true) return 'old'
  spte.young = false
  return 'young'
}

/** change_pte of a client: KVM replaces the entry, others drop it. */
export function clientChangePte(client: Client, vpn: number, pfn: number): void {
  const spte = client.sptes[vpn]
  if (spte === undefined) return
  if (client.kind === 'kvm') Object.assign(spte, { pfn, writable: false })
  else dropSptes(client, vpn, vpn + 1)
}

/** release of a client: all entries go. */
export function clientRelease(client: Client): void {
  dropSptes(client, 0, Number.MAX_SAFE_INTEGER)
}

/**
 * The other partition answers: it drops its entries of all pages it was asked for, and XPMEM gives the references back.
 */
export function deliverMessages(machine: Machine, client: XpmemClient): void {
  for (const vpn of client.messages.splice(0)) delete client.remote[vpn]
  for (const pfn of client.pinned.splice(0)) putPage(machine, pfn, 'pin')
}

function mayWait(client: Client, context: 'atomic' | 'may-sleep'): void {
  requireRule(
    !needsSleep(client) || context === 'may-sleep',
    'sleeps-in-atomic',
    `client "${client.name}" sleeps where it must not`,
  )
}

// ---------------------------------------------------------------------------------------------------------------
// Faults

/** What the fault programs work on. */
export interface FaultWorld extends NotifierWorld, HasLocks {}

export interface FaultRegisters {
  /** The sequence number that was read first. */
  seq: number
  /** Frame looked up, -1 for none. */
  pfn: number
  writable: boolean
  retry: boolean
  outcome: '' | 'installed' | 'no-page' | 'failed-in-interrupt' | 'released'
}

export function faultRegisters(): FaultRegisters {
  return { seq: -1, pfn: -1, writable: false, retry: false, outcome: '' }
}

export type FaultStep = Step<FaultWorld, FaultRegisters>

/** The steps of a fault that scenarios use by name. */
export const KVM_STEPS = {
  readSeq: 'read seq',
  lookUp: 'look the page up (may sleep)',
  lock: 'lock mmu_lock',
  check: 'count 0 and seq unchanged?',
  install: 'install the spte',
  unlock: 'unlock mmu_lock',
} as const

/** A client in a world, of the kind that the program is for. */
function own(world: Readonly<FaultWorld>, id: ClientId): Client {
  return world.notifiers.clients[id] as Client
}

/** get_user_pages for one page: faults it in if needed, and pins it. -1 if there is nothing. */
export function lookUp(machine: Machine, mm: number, vpn: number, access: 'read' | 'write'): number {
  const space = spaceOf(machine, mm)
  if (findVma(space, vpn) === undefined) return -1
  for (let tries = 0; tries < 2 && translate(machine, space, vpn, access) === null; tries++) {
    fault(machine, space, vpn, access)
  }
  const pfn = translate(machine, space, vpn, access)
  if (pfn === null) return -1
  getPage(machine, pfn, 'pin')
  return pfn
}

/**
 * A fault of a virtual processor (KVM): read the sequence, look the page up, take the lock, check, install, give the
 * page's reference back. `retry` "with-range" retries only for pages in the active ranges, as later kernels do.
 */
export function kvmFaultProgram(
  id: ClientId,
  vpn: number,
  options: { readonly access?: 'read' | 'write'; readonly retry?: 'any-range' | 'with-range' } = {},
): FaultStep[] {
  const { access = 'read', retry = 'any-range' } = options
  const lock = (world: Readonly<FaultWorld>) => own(world, id).name
  const concerns = (kvm: KvmClient): boolean =>
    kvm.count > 0 && (retry === 'any-range' || (vpn >= kvm.rangeFirst && vpn < kvm.rangeEnd))
  const client = `notifiers.clients.${id}`
  return [
    {
      label: KVM_STEPS.readSeq,
      at: 'again',
      touches: { reads: [client] },
      run: (world, me) => {
        me.seq = (own(world, id) as KvmClient).seq
      },
      shows: (_, { seq }) => String(seq),
    },
    {
      label: KVM_STEPS.lookUp,
      touches: { reads: [client], writes: ['machine'] },
      run: (world, me) => {
        me.pfn = lookUp(world.machine, own(world, id).mm, vpn, access)
        me.writable = access === 'write'
        if (me.pfn < 0) me.outcome = 'no-page'
      },
      shows: (_, { pfn }) => (pfn < 0 ? 'no page' : `frame ${pfn}`),
      jump: { to: 'end', if: (_, { pfn }) => pfn < 0 },
    },
    {
      label: KVM_STEPS.lock,
      touches: { reads: [client], writes: ['locks'] },
      when: (world) => world.locks[lock(world)] === '',
      run: (world) => {
        world.locks[lock(world)] = `fault ${vpn}`
      },
    },
    {
      label: KVM_STEPS.check,
      touches: { reads: [client] },
      run: (world, me) => {
        const kvm = own(world, id) as KvmClient
        // The range of a finished invalidation is not kept, so a changed sequence means a retry in any case.
        me.retry = concerns(kvm) || kvm.seq !== me.seq
        if (kvm.state !== 'registered') me.outcome = 'released'
      },
      shows: (_, { retry: again, outcome }) => (outcome !== '' ? outcome : again ? 'no, retry' : 'yes'),
      jump: { to: 'unlock', if: (_, { retry: again, outcome }) => again || outcome !== '' },
    },
    {
      label: KVM_STEPS.install,
      touches: { writes: [client] },
      run: (world, me) => {
        own(world, id).sptes[vpn] = { pfn: me.pfn, writable: me.writable, young: true }
        me.outcome = 'installed'
      },
    },
    {
      label: KVM_STEPS.unlock,
      at: 'unlock',
      touches: { reads: [client], writes: ['locks'] },
      run: (world) => {
        world.locks[lock(world)] = ''
      },
    },
    {
      label: 'put the page',
      touches: { writes: ['machine.frames'] },
      run: ({ machine }, me) => {
        putPage(machine, me.pfn, 'pin')
        me.pfn = -1
      },
      jump: { to: 'again', if: (_, { outcome }) => outcome === '' },
    },
  ]
}

/** The steps of a GRU fault that scenarios use by name. */
export const GRU_STEPS = {
  check: 'no range active?',
  wait: 'wait until none is active',
  walk: 'walk the page tables',
  insert: 'insert into the TLB',
} as const

/**
 * A TLB miss of GRU. In process context it waits while ranges are active; in interrupt context it fails, and the fault
 * is turned over to process context. There is no sequence number: the hardware cancels an insert that meets a flush.
 */
export function gruFaultProgram(id: ClientId, vpn: number, context: 'process' | 'interrupt'): FaultStep[] {
  const client = `notifiers.clients.${id}`
  const gru = (world: Readonly<FaultWorld>): GruClient => own(world, id) as GruClient
  const begin: FaultStep =
    context === 'process'
      ? {
          label: GRU_STEPS.wait,
          at: 'again',
          touches: { reads: [client] },
          when: (world) => gru(world).count === 0,
          run: (world, me) => {
            me.seq = gru(world).flushes
          },
        }
      : {
          label: GRU_STEPS.check,
          at: 'again',
          touches: { reads: [client] },
          run: (world, me) => {
            me.seq = gru(world).flushes
            if (gru(world).count > 0) me.outcome = 'failed-in-interrupt'
          },
          shows: (_, { outcome }) => (outcome === '' ? 'yes' : 'no: fail'),
          jump: { to: 'end', if: (_, { outcome }) => outcome !== '' },
        }
  return [
    begin,
    {
      label: GRU_STEPS.walk,
      touches: { reads: [client], writes: ['machine'] },
      run: (world, me) => {
        me.pfn = gruWalk(world, id, vpn, context)
        if (me.pfn < 0) me.outcome = context === 'interrupt' ? 'failed-in-interrupt' : 'no-page'
      },
      shows: (_, { pfn }) => (pfn < 0 ? 'cannot tell' : `frame ${pfn}`),
      jump: { to: 'end', if: (_, { pfn }) => pfn < 0 },
    },
    {
      label: GRU_STEPS.insert,
      touches: { writes: [client] },
      run: (world, me) => {
        me.retry = gru(world).flushes !== me.seq
        if (me.retry) return
        gru(world).sptes[vpn] = { pfn: me.pfn, writable: false, young: true }
        me.outcome = 'installed'
      },
      shows: (_, { retry }) => (retry ? 'cancelled by a flush' : 'done'),
      jump: { to: 'again', if: (_, { retry }) => retry },
    },
  ]
}

/** The page behind an address: in interrupt context only what an atomic walk finds, else a fault makes it. */
function gruWalk(world: FaultWorld, id: ClientId, vpn: number, context: 'process' | 'interrupt'): number {
  const { machine } = world
  const { mm } = own(world, id)
  if (context === 'interrupt') return readPte(machine, spaceOf(machine, mm), vpn)?.pfn ?? -1
  const pfn = lookUp(machine, mm, vpn, 'read')
  if (pfn >= 0) putPage(machine, pfn, 'pin')
  return pfn
}

/** An export of XPMEM: pins the page, and lets the other partition map it. Only while no range is active. */
export function xpmemExport(world: NotifierWorld, id: ClientId, vpn: number): 'exported' | 'busy' | 'no-page' {
  const client = world.notifiers.clients[id]
  if (client?.kind !== 'xpmem') throw new RangeError(`client ${id} is not XPMEM`)
  if (client.count > 0) return 'busy'
  const pfn = lookUp(world.machine, client.mm, vpn, 'read')
  if (pfn < 0) return 'no-page'
  client.sptes[vpn] = { pfn, writable: false, young: true }
  client.remote[vpn] = { pfn, writable: false, young: true }
  return 'exported'
}

/**
 * Entries of secondary MMUs that refer to memory which is free: the thing that must never be. In every state of every
 * scenario.
 */
export function danglingSptes({ machine, notifiers }: NotifierWorld): string[] {
  return notifiers.clients.flatMap((client) => {
    const sets = client.kind === 'xpmem' ? [client.sptes, client.remote] : [client.sptes]
    return sets.flatMap((set) =>
      Object.entries(set)
        .filter(([, { pfn }]) => machine.frames[pfn]?.page?.use === 'free')
        .map(([vpn, { pfn }]) => `${client.name} maps page ${vpn} to frame ${pfn}, which is free`),
    )
  })
}

/** Entries that differ from the primary page tables: another frame, or permission that the primary has not. */
export function staleSptes({ machine, notifiers }: NotifierWorld): string[] {
  return notifiers.clients.flatMap((client) => {
    const space = spaceOf(machine, client.mm)
    const sets = client.kind === 'xpmem' ? [client.sptes, client.remote] : [client.sptes]
    return sets.flatMap((set) =>
      Object.entries(set).flatMap(([vpn, { pfn, writable }]) => {
        const primary = translate(machine, space, Number(vpn), writable ? 'write' : 'read')
        if (primary === pfn) return []
        return [
          `${client.name} maps page ${vpn} to frame ${pfn}, the primary ${primary === null ? 'not' : `to ${primary}`}`,
        ]
      }),
    )
  })
}
