/**
 * MMU notifiers: how a secondary MMU (a hypervisor's shadow tables, a coprocessor's TLB, another machine) learns that
 * the primary page tables change.
 *
 * Modelled: the notifier list of an address space with its registration, release and callbacks in the order of 2.6.31;
 * both shapes that were discussed in April 2008 (a callback for single pages, or ranges only; callbacks that may sleep,
 * or not); the non-blocking start of later kernels; and the interval notifiers of 5.5, with their sequence number.
 * Every call of the VM is counted as a hook, every call of a client as a callback.
 *
 * Invariants: a client's mappings (sptes) of a range are gone when invalidate_range_start returns, and none is made
 * until the matching end; release is called exactly once; nobody is called back after unregister has returned. The
 * scenarios of this package take the same actions apart and interleave them.
 *
 * All state is plain data. Addresses are virtual page numbers (vpn), ranges are [first, end).
 *
 * Source: mm/mmu_notifier.c, include/linux/mmu_notifier.h, virt/kvm/kvm_main.c, drivers/misc/sgi-gru/grutlbpurge.c of
 * 2.6.31; mm/mmu_notifier.c of 5.5 and later; mail "[PATCH 00 of 12] mmu notifier #v13", A. Arcangeli, 22 April 2008.
 */
import { type Machine, RuleViolation, requireRule, type SecondaryMmus } from '@tmem/vm-mixedmap'
import {
  type Client,
  type ClientId,
  clientChangePte,
  clientInvalidatePage,
  clientRangeEnd,
  clientRangeStart,
  clientRelease,
  clientYoung,
  needsSleep,
} from './clients.ts'

/** What a patch set offers. */
export interface PatchShape {
  /** Whether a change of one page has a callback of its own, or is a range of one page. */
  readonly singlePage: 'invalidate-page' | 'range-pair'
  /** Whether callbacks may sleep. If not, clients that have to are refused. */
  readonly callbacks: 'must-not-sleep' | 'may-sleep'
}

/** The series #v13 (A. Arcangeli), as far as it was meant for 2.6.26: for KVM and GRU. */
export const V13_FIRST_PART: PatchShape = { singlePage: 'invalidate-page', callbacks: 'must-not-sleep' }
/** The whole series #v13: the locks have become sleeping ones, XPMEM can use it. */
export const V13_COMPLETE: PatchShape = { singlePage: 'invalidate-page', callbacks: 'may-sleep' }
/** The series of C. Lameter: ranges only, sleeping from the start. */
export const RANGES_ONLY: PatchShape = { singlePage: 'range-pair', callbacks: 'may-sleep' }

/** Calls of the VM into the notifiers ("hooks"), and calls of clients that followed. */
export interface HookCounts {
  invalidatePage: number
  invalidateRangeStart: number
  invalidateRangeEnd: number
  clearFlushYoung: number
  changePte: number
  release: number
  /** Callbacks of all clients. */
  callbacks: number
  /** Pages that were changed while secondary faults in their range had to wait. */
  heldOffPages: number
}

/** The notifier side of one address space; same index as the machine's spaces. */
export interface NotifiedMm {
  /** Users (mm_users): at 0 the pages are freed. */
  users: number
  /** References on the structure itself (mm_count): the users together have one, every registration one. */
  structs: number
  /** Registered clients, in the order in which they are called. */
  list: ClientId[]
  /** Ranges between start and end. */
  activeRanges: number
  interval: IntervalMm
}

export interface Notifiers {
  readonly shape: PatchShape
  mms: NotifiedMm[]
  clients: Client[]
  hooks: HookCounts
}

/** What the functions of this file work on. */
export interface NotifierWorld {
  machine: Machine
  notifiers: Notifiers
}

export function createHookCounts(): HookCounts {
  return {
    invalidatePage: 0,
    invalidateRangeStart: 0,
    invalidateRangeEnd: 0,
    clearFlushYoung: 0,
    changePte: 0,
    release: 0,
    callbacks: 0,
    heldOffPages: 0,
  }
}

/** Notifiers for all spaces that a machine has; each with one user. */
export function createNotifiers(machine: Machine, shape: PatchShape): Notifiers {
  const mms = machine.spaces.map(() => ({
    users: 1,
    structs: 1,
    list: [],
    activeRanges: 0,
    interval: { sequence: 2, active: 0, subscriptions: [] },
  }))
  return { shape, mms, clients: [], hooks: createHookCounts() }
}

/** @throws RangeError if there is no such space. */
export function mmOf({ notifiers }: NotifierWorld, mm: number): NotifiedMm {
  const found = notifiers.mms[mm]
  if (found === undefined) throw new RangeError(`address space ${mm} has no notifiers`)
  return found
}

/** @throws RangeError if there is no such client. */
export function clientOf({ notifiers }: NotifierWorld, id: ClientId): Client {
  const client = notifiers.clients[id]
  if (client === undefined) throw new RangeError(`there is no client ${id}`)
  return client
}

// ---------------------------------------------------------------------------------------------------------------
// Registration

/**
 * - refused-must-sleep: the client has to sleep in its callbacks, and the patch set forbids it.
 * - busy: an operation on the address space is running; the caller waits for the locks and tries again.
 */
export type RegisterOutcome = 'registered' | '-EINTR' | '-ENOMEM' | 'refused-must-sleep' | 'busy'

/** What happens around a registration. */
export interface RegisterCircumstances {
  /** A signal arrives while the locks are taken: -EINTR. */
  readonly signal?: 'pending' | 'none'
  /** No memory for the list: -ENOMEM. */
  readonly memory?: 'none' | 'enough'
}

/**
 * mmu_notifier_register: takes mmap_sem and all reverse-map locks, so that no operation runs, and pins the structure of
 * the address space. On any outcome but "registered" nothing has changed.
 * @throws RuleViolation "register-without-user" if the address space has no user any more: release would never come.
 * @throws RangeError if the client is registered, or was before.
 */
export function register(world: NotifierWorld, id: ClientId, now: RegisterCircumstances = {}): RegisterOutcome {
  const client = clientOf(world, id)
  const mm = mmOf(world, client.mm)
  if (client.state !== 'new') throw new RangeError(`client "${client.name}" is ${client.state} already`)
  requireRule(mm.users > 0, 'register-without-user', `address space ${client.mm} has no user any more`)
  if (needsSleep(client) && world.notifiers.shape.callbacks === 'must-not-sleep') return 'refused-must-sleep'
  if (now.memory === 'none') return '-ENOMEM'
  if (now.signal === 'pending') return '-EINTR'
  if (mm.activeRanges > 0) return 'busy'
  mm.list.unshift(id)
  mm.structs++
  client.state = 'registered'
  return 'registered'
}

/**
 * Takes a client off the list; whoever does it has to call release.
 * @returns "not-mine" if somebody else did: then release runs, or has run, there.
 */
export function unlink(world: NotifierWorld, id: ClientId): 'unlinked' | 'not-mine' {
  const client = clientOf(world, id)
  const mm = mmOf(world, client.mm)
  if (!mm.list.includes(id)) return 'not-mine'
  mm.list = mm.list.filter((one) => one !== id)
  return 'unlinked'
}

/**
 * Calls a client's release: it drops all mappings and never makes any again.
 * @throws RuleViolation "release-once" if it was called before.
 */
export function callRelease(world: NotifierWorld, id: ClientId): void {
  const client = clientOf(world, id)
  requireRule(client.releases === 0, 'release-once', `client "${client.name}" is released twice`)
  client.releases++
  client.state = 'released'
  world.notifiers.hooks.callbacks++
  clientRelease(client)
}

/**
 * mmu_notifier_unregister: release runs before it returns, here or in the exit of the address space; no callback runs
 * afterwards. Gives the pin back.
 * @returns "already-released" after a second call, which changes nothing.
 * @throws RangeError if the client was never registered.
 */
export function unregister(world: NotifierWorld, id: ClientId): 'unregistered' | 'already-released' {
  const client = clientOf(world, id)
  if (client.state === 'new') throw new RangeError(`client "${client.name}" was never registered`)
  if (client.state === 'unregistered') return 'already-released'
  if (unlink(world, id) === 'unlinked') {
    world.notifiers.hooks.release++
    callRelease(world, id)
  }
  client.state = 'unregistered'
  dropStruct(mmOf(world, client.mm))
  return 'unregistered'
}

/** Gives a reference on the structure back. @throws RuleViolation "mm-struct-freed" if there is none. */
export function dropStruct(mm: NotifiedMm): void {
  requireRule(mm.structs > 0, 'mm-struct-freed', 'the mm structure is used after it was freed')
  mm.structs--
}

/**
 * The last user has gone: all clients are released, before the pages are freed (which the caller does afterwards).
 * @throws RangeError if the address space has exited before, or a range is active.
 */
export function releaseMm(world: NotifierWorld, mm: number): void {
  const notified = mmOf(world, mm)
  if (notified.users === 0) throw new RangeError(`address space ${mm} has exited already`)
  if (notified.activeRanges > 0) throw new RangeError(`address space ${mm} exits while a range is active`)
  notified.users = 0
  world.notifiers.hooks.release++
  for (const id of notified.list) if (unlink(world, id) === 'unlinked') callRelease(world, id)
  dropStruct(notified)
}

// ---------------------------------------------------------------------------------------------------------------
// Hooks

/** Whether a start may wait for locks of clients. Only one that may not can fail. */
export type Blocking = 'blockable' | 'non-blockable'

/**
 * invalidate_range_start: clients drop their mappings of the range and make no new ones.
 *
 * -EAGAIN (non-blockable only): a client would have to wait. Those that had accepted have had their end; the caller
 * must not call invalidateRangeEnd() for this round.
 */
export function invalidateRangeStart(
  world: NotifierWorld,
  mm: number,
  first: number,
  end: number,
  blocking: Blocking = 'blockable',
): 'ok' | '-EAGAIN' {
  range(first, end)
  const { hooks, shape } = world.notifiers
  const notified = mmOf(world, mm)
  hooks.invalidateRangeStart++
  intervalStart(notified.interval, first, end)
  const accepted: ClientId[] = []
  for (const id of notified.list) {
    hooks.callbacks++
    const client = clientOf(world, id)
    if (clientRangeStart(client, first, end, blocking, contextOf(shape)) === 'ok') {
      accepted.push(id)
      continue
    }
    requireRule(blocking === 'non-blockable', 'blockable-start-failed', `client "${client.name}" refuses to wait`)
    for (const one of accepted) {
      hooks.callbacks++
      clientRangeEnd(clientOf(world, one), first, end)
    }
    intervalEnd(notified.interval)
    return '-EAGAIN'
  }
  notified.activeRanges++
  return 'ok'
}

/**
 * invalidate_range_end: the matching end, with the same range.
 * @throws RuleViolation "end-without-start" if no range is active.
 */
export function invalidateRangeEnd(world: NotifierWorld, mm: number, first: number, end: number): void {
  range(first, end)
  const notified = mmOf(world, mm)
  requireRule(notified.activeRanges > 0, 'end-without-start', `no range of address space ${mm} is active`)
  notified.activeRanges--
  world.notifiers.hooks.invalidateRangeEnd++
  intervalEnd(notified.interval)
  for (const id of notified.list) {
    world.notifiers.hooks.callbacks++
    clientRangeEnd(clientOf(world, id), first, end)
  }
}

/**
 * invalidate_page: one entry was cleared and flushed; its page is freed only after this has returned.
 * @throws RangeError if the patch set has no such callback.
 */
export function invalidatePage(world: NotifierWorld, mm: number, vpn: number): void {
  const { hooks, shape } = world.notifiers
  if (shape.singlePage !== 'invalidate-page') throw new RangeError('this patch set has no invalidate_page')
  hooks.invalidatePage++
  for (const id of mmOf(world, mm).list) {
    hooks.callbacks++
    clientInvalidatePage(clientOf(world, id), vpn, contextOf(shape))
  }
}

/** clear_flush_young: whether any client has used the page since the last time. All are asked, and forget it. */
export function clearFlushYoung(world: NotifierWorld, mm: number, vpn: number): 'young' | 'old' {
  const { hooks } = world.notifiers
  hooks.clearFlushYoung++
  let young: 'young' | 'old' = 'old'
  for (const id of mmOf(world, mm).list) {
    hooks.callbacks++
    if (clientYoung(clientOf(world, id), vpn) === 'young') young = 'young'
  }
  return young
}

/**
 * change_pte: clients that can replace a mapping directly do it, others drop theirs. Call it before the primary entry.
 */
export function changePte(world: NotifierWorld, mm: number, vpn: number, pfn: number): void {
  const { hooks } = world.notifiers
  hooks.changePte++
  for (const id of mmOf(world, mm).list) {
    hooks.callbacks++
    clientChangePte(clientOf(world, id), vpn, pfn)
  }
}

/** The hooks as the primary page tables of @tmem/vm-mixedmap call them, in the order that the patch set prescribes. */
export function secondaryMmus(world: NotifierWorld): SecondaryMmus {
  const { hooks, shape } = world.notifiers
  const inRange: SecondaryMmus['range'] = (mm, first, end, change) => {
    invalidateRangeStart(world, mm, first, end)
    hooks.heldOffPages += end - first
    change()
    invalidateRangeEnd(world, mm, first, end)
  }
  return {
    range: inRange,
    page: (mm, vpn, change) => {
      if (shape.singlePage === 'range-pair') {
        inRange(mm, vpn, vpn + 1, change)
        return
      }
      change()
      invalidatePage(world, mm, vpn)
    },
  }
}

function contextOf({ callbacks }: PatchShape): 'atomic' | 'may-sleep' {
  return callbacks === 'may-sleep' ? 'may-sleep' : 'atomic'
}

function range(first: number, end: number): void {
  if (!Number.isSafeInteger(first) || !Number.isSafeInteger(end) || first < 0 || end <= first) {
    throw new RangeError(`[${first}, ${end}) is no range of pages`)
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Interval notifiers

/** One subscription: a range of pages with the sequence that its last invalidation left. */
export interface Subscription {
  first: number
  end: number
  sequence: number
  /** Changes of the tree wait for the end of all ranges. */
  state: 'live' | 'insert-queued' | 'remove-queued' | 'removed'
  /** Its owner has freed it, which must not happen before it is off the tree and off the queue. */
  freed: boolean
}

export interface IntervalMm {
  /** Even: idle; odd: a range that some subscription overlaps is active. Starts at 2. */
  sequence: number
  /** Ranges between start and end. */
  active: number
  subscriptions: Subscription[]
}

/**
 * A new subscription. When nothing is active it gets an odd sequence below the current one, which no reader can mistake
 * for a running invalidation; while a range is active it gets the current odd one, so that readers wait for its end.
 * @returns the subscription's number.
 */
export function intervalInsert(interval: IntervalMm, first: number, end: number): number {
  range(first, end)
  if (interval.active === 0) {
    interval.subscriptions.push({ first, end, sequence: interval.sequence - 1, state: 'live', freed: false })
  } else {
    // Into a tree that nobody walks it can go at once, but from now on its readers have to wait.
    const walked = interval.sequence % 2 === 1
    if (!walked) interval.sequence++
    const state = walked ? 'insert-queued' : 'live'
    interval.subscriptions.push({ first, end, sequence: interval.sequence, state, freed: false })
  }
  return interval.subscriptions.length - 1
}

/**
 * Ends a subscription; while the tree is walked that waits for the end of all ranges.
 * @throws RangeError if it was removed already.
 */
export function intervalRemove(interval: IntervalMm, id: number): 'removed' | 'queued' {
  const subscription = subscriptionOf(interval, id)
  if (subscription.state === 'removed' || subscription.state === 'remove-queued') {
    throw new RangeError(`subscription ${id} is ${subscription.state} already`)
  }
  const walked = interval.sequence % 2 === 1
  subscription.state = walked && subscription.state === 'live' ? 'remove-queued' : 'removed'
  return subscription.state === 'removed' ? 'removed' : 'queued'
}

/**
 * The first part of a start: the subscriptions whose callbacks have to run, each storing the sequence under its lock.
 */
export function intervalBegin(interval: IntervalMm, first: number, end: number): number[] {
  interval.active++
  const hit = interval.subscriptions.flatMap((one, id) =>
    (one.state === 'live' || one.state === 'remove-queued') && one.first < end && first < one.end ? [id] : [],
  )
  if (hit.length > 0 && interval.sequence % 2 === 0) interval.sequence++
  return hit
}

/**
 * The callback of one subscription, under its user's lock: the user drops its mappings with it.
 * @throws RuleViolation "use-after-free" if the owner has freed it.
 */
export function intervalCallback(interval: IntervalMm, id: number): void {
  const subscription = subscriptionOf(interval, id)
  requireRule(!subscription.freed, 'use-after-free', `the callback of subscription ${id} runs after it was freed`)
  subscription.sequence = interval.sequence
}

/** The owner frees a subscription that it has removed. What still finds it uses memory that was freed. */
export function intervalFree(interval: IntervalMm, id: number): void {
  subscriptionOf(interval, id).freed = true
}

/** A whole start with nobody else around. */
export function intervalStart(interval: IntervalMm, first: number, end: number): void {
  for (const id of intervalBegin(interval, first, end)) intervalCallback(interval, id)
}

/**
 * The first part of an end: the last one makes the sequence even, which whoever reads it without the lock sees at once.
 * Both parts run under the lock of the subscriptions; a waiter that reads the sequence under that lock, too, cannot see
 * the new one before the second part is done (commit 319561669a59, 5.18).
 * @returns "apply" if the second part, intervalApply(), has to follow.
 * @throws RuleViolation "end-without-start" if no range is active.
 */
export function intervalFinish(interval: IntervalMm): 'apply' | 'done' {
  requireRule(interval.active > 0, 'end-without-start', 'no interval is active')
  interval.active--
  if (interval.active > 0 || interval.sequence % 2 === 0) return 'done'
  interval.sequence++
  return 'apply'
}

/**
 * The second part of an end: what was queued goes into the tree or off it. Waiters are woken afterwards.
 * @throws RuleViolation "use-after-free" if the owner of a queued subscription has freed it.
 */
export function intervalApply(interval: IntervalMm): void {
  interval.subscriptions.forEach((one, id) => {
    if (one.state === 'insert-queued') one.state = 'live'
    if (one.state !== 'remove-queued') return
    requireRule(!one.freed, 'use-after-free', `subscription ${id} is taken off the tree after it was freed`)
    one.state = 'removed'
  })
}

/** A whole end with nobody else around. */
export function intervalEnd(interval: IntervalMm): void {
  if (intervalFinish(interval) === 'apply') intervalApply(interval)
}

/** read_begin: the sequence to remember, and whether the reader has to wait until the global one is another. */
export function intervalReadBegin(interval: IntervalMm, id: number): { sequence: number; wait: 'wait' | 'go' } {
  const { sequence } = subscriptionOf(interval, id)
  return { sequence, wait: sequence === interval.sequence ? 'wait' : 'go' }
}

/** read_retry, under the user's lock: whether an invalidation has come in between. */
export function intervalReadRetry(interval: IntervalMm, id: number, sequence: number): 'retry' | 'valid' {
  return subscriptionOf(interval, id).sequence === sequence ? 'valid' : 'retry'
}

export function subscriptionOf(interval: IntervalMm, id: number): Subscription {
  const subscription = interval.subscriptions[id]
  if (subscription === undefined) throw new RuleViolation('no-subscription', `there is no subscription ${id}`)
  return subscription
}
