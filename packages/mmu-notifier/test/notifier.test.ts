import {
  auditMachine,
  createMachine,
  createSpace,
  exitSpace,
  fault,
  fork,
  frameOf,
  mmap,
  munmap,
  pageOf,
  putPage,
  RuleViolation,
  runProgram,
  translate,
} from '@tmem/vm-mixedmap'
import { describe, expect, test } from 'vitest'
import {
  addClient,
  type Client,
  callRelease,
  changePte,
  clearFlushYoung,
  clientOf,
  countHooks,
  createNotifiers,
  danglingSptes,
  deliverMessages,
  type FaultWorld,
  faultRegisters,
  gruFaultProgram,
  intervalBegin,
  intervalCallback,
  intervalEnd,
  intervalInsert,
  intervalReadBegin,
  intervalReadRetry,
  intervalRemove,
  intervalStart,
  invalidatePage,
  invalidateRangeEnd,
  invalidateRangeStart,
  type KvmClient,
  kvmFaultProgram,
  mmOf,
  type PatchShape,
  RANGES_ONLY,
  register,
  releaseMm,
  secondaryMmus,
  staleSptes,
  subscriptionOf,
  unregister,
  V13_COMPLETE,
  V13_FIRST_PART,
  WORKLOADS,
  type XpmemClient,
  xpmemExport,
} from '../src/index.ts'

/** One space with four present pages, 0 to 3. */
function setUp(shape: PatchShape, ...kinds: Client['kind'][]): FaultWorld {
  const machine = createMachine({ memory: { kind: 'flat', frames: 12 }, frames: 12, pteSpecial: true })
  const space = createSpace(machine)
  mmap(space, { first: 0, pages: 4, backing: { kind: 'anonymous' }, write: true })
  for (let vpn = 0; vpn < 4; vpn++) fault(machine, space, vpn, 'write')
  const world = { machine, notifiers: createNotifiers(machine, shape), locks: { kvm: '', gru: '', xpmem: '' } }
  for (const kind of kinds) expect(register(world, addClient(world, kind, 0))).toBe('registered')
  return world
}

const secondaryFault = (world: FaultWorld, id: number, vpn: number): string => {
  const client = clientOf(world, id)
  if (client.kind === 'xpmem') return xpmemExport(world, id, vpn)
  const program = client.kind === 'kvm' ? kvmFaultProgram(id, vpn) : gruFaultProgram(id, vpn, 'process')
  return runProgram(program, world, faultRegisters()).outcome
}

const mapped = (world: FaultWorld, id: number) => Object.keys(clientOf(world, id).sptes).map(Number)

/** What a rule violation names, or "" if nothing was thrown. */
function ruleOf(action: () => unknown): string {
  try {
    action()
  } catch (error) {
    if (error instanceof RuleViolation) return error.rule
    throw error
  }
  return ''
}

describe('registration', () => {
  test('circumstances, and the shape that forbids sleeping', () => {
    const world = setUp(V13_FIRST_PART)
    const kvm = addClient(world, 'kvm', 0)
    expect(register(world, kvm, { signal: 'pending' })).toBe('-EINTR')
    expect(register(world, kvm, { memory: 'none' })).toBe('-ENOMEM')
    expect(register(world, addClient(world, 'xpmem', 0))).toBe('refused-must-sleep')
    expect([mmOf(world, 0).list, mmOf(world, 0).structs]).toEqual([[], 1])
    expect(register(world, kvm)).toBe('registered')
    expect([mmOf(world, 0).list, mmOf(world, 0).structs]).toEqual([[kvm], 2])
    expect(() => register(world, kvm)).toThrow(/registered already/)
    const complete = setUp(V13_COMPLETE)
    expect(register(complete, addClient(complete, 'xpmem', 0))).toBe('registered')
  })

  test('during an invalidation: busy, so that no end without a start is seen', () => {
    const world = setUp(V13_COMPLETE)
    const kvm = addClient(world, 'kvm', 0)
    invalidateRangeStart(world, 0, 0, 2)
    expect(register(world, kvm)).toBe('busy')
    invalidateRangeEnd(world, 0, 0, 2)
    expect(register(world, kvm)).toBe('registered')
    expect(clientOf(world, kvm).count).toBe(0)
  })

  test('of an address space that has exited, or does not exist', () => {
    const world = setUp(V13_COMPLETE)
    releaseMm(world, 0)
    expect(ruleOf(() => register(world, addClient(world, 'kvm', 0)))).toBe('register-without-user')
    expect(() => register(world, addClient(world, 'kvm', 5))).toThrow(/address space 5/)
    expect(() => register(world, 99)).toThrow(/no client 99/)
  })
})

describe('release', () => {
  test('runs once, whichever of exit and unregister comes first', () => {
    for (const first of ['exit', 'unregister'] as const) {
      const world = setUp(V13_COMPLETE, 'kvm')
      secondaryFault(world, 0, 1)
      if (first === 'exit') releaseMm(world, 0)
      expect(unregister(world, 0)).toBe('unregistered')
      if (first === 'unregister') releaseMm(world, 0)
      expect(clientOf(world, 0)).toMatchObject({ releases: 1, sptes: {} })
      expect(mmOf(world, 0).structs).toBe(0)
      exitSpace(world.machine, world.machine.spaces[0]!)
      expect(danglingSptes(world)).toEqual([])
      expect(auditMachine(world.machine)).toEqual([])
    }
  })

  test('double release', () => {
    const world = setUp(V13_COMPLETE, 'kvm')
    unregister(world, 0)
    expect(unregister(world, 0)).toBe('already-released')
    expect(mmOf(world, 0).structs).toBe(1)
    expect(ruleOf(() => callRelease(world, 0))).toBe('release-once')
    releaseMm(world, 0)
    expect(() => releaseMm(world, 0)).toThrow(/has exited already/)
    expect(() => unregister(world, addClient(world, 'gru', 0))).toThrow(/never registered/)
  })

  test('no fault installs anything afterwards', () => {
    const world = setUp(V13_COMPLETE, 'kvm')
    releaseMm(world, 0)
    expect(secondaryFault(world, 0, 0)).toBe('released')
    expect(mapped(world, 0)).toEqual([])
    expect(auditMachine(world.machine)).toEqual([])
  })

  test('exit with a range still active is a mistake of the caller', () => {
    const world = setUp(V13_COMPLETE, 'kvm')
    invalidateRangeStart(world, 0, 0, 1)
    expect(() => releaseMm(world, 0)).toThrow(/range is active/)
  })
})

describe.each([
  ['invalidate_page kept', V13_COMPLETE],
  ['ranges only', RANGES_ONLY],
] as const)('%s', (_, shape) => {
  test('unmapping and copy-on-write drop what the clients have, and leave the rest', () => {
    const world = setUp(shape, 'kvm', 'gru')
    const [space] = world.machine.spaces
    for (const id of [0, 1]) for (const vpn of [0, 1, 2]) expect(secondaryFault(world, id, vpn)).toBe('installed')
    munmap(world.machine, space!, 0, 1, secondaryMmus(world))
    expect([mapped(world, 0), mapped(world, 1)]).toEqual([
      [1, 2],
      [1, 2],
    ])
    const forked = fork(world.machine, space!, secondaryMmus(world))
    expect(mapped(world, 0)).toEqual([])
    expect(secondaryFault(world, 0, 1)).toBe('installed')
    expect(fault(world.machine, space!, 1, 'write', secondaryMmus(world))).toBe('copied')
    expect(mapped(world, 0)).toEqual([])
    expect(forked.kind).toBe('forked')
    expect([danglingSptes(world), staleSptes(world), auditMachine(world.machine)]).toEqual([[], [], []])
  })
})

describe('hooks', () => {
  test('nesting, pairing and bad ranges', () => {
    const world = setUp(V13_COMPLETE, 'kvm')
    const kvm = clientOf(world, 0) as KvmClient
    invalidateRangeStart(world, 0, 0, 2)
    invalidateRangeStart(world, 0, 1, 4)
    expect(kvm).toMatchObject({ count: 2, rangeFirst: 0, rangeEnd: 4, seq: 0 })
    invalidateRangeEnd(world, 0, 0, 2)
    expect(kvm).toMatchObject({ count: 1, seq: 1 })
    invalidateRangeEnd(world, 0, 1, 4)
    expect(ruleOf(() => invalidateRangeEnd(world, 0, 1, 4))).toBe('end-without-start')
    for (const [first, end] of [
      [2, 2],
      [-1, 2],
      [0.5, 2],
    ] as const) {
      expect(() => invalidateRangeStart(world, 0, first, end)).toThrow(RangeError)
      expect(() => invalidateRangeEnd(world, 0, first, end)).toThrow(RangeError)
    }
    const ranges = setUp(RANGES_ONLY)
    expect(() => invalidatePage(ranges, 0, 0)).toThrow(/no invalidate_page/)
  })

  test('a client that must sleep: refused non-blocking start, undone for the others; never in atomic context', () => {
    const world = setUp(V13_COMPLETE, 'xpmem', 'kvm')
    expect(secondaryFault(world, 0, 1)).toBe('exported')
    expect(invalidateRangeStart(world, 0, 0, 2, 'non-blockable')).toBe('-EAGAIN')
    expect([clientOf(world, 0).count, clientOf(world, 1).count, mmOf(world, 0).activeRanges]).toEqual([0, 0, 0])
    expect(mapped(world, 0)).toEqual([1])
    expect(invalidateRangeStart(world, 0, 2, 4, 'non-blockable')).toBe('ok')
    expect(secondaryFault(world, 0, 3)).toBe('busy')
    invalidateRangeEnd(world, 0, 2, 4)
    const atomic = { ...world, notifiers: { ...world.notifiers, shape: V13_FIRST_PART } }
    expect(ruleOf(() => invalidatePage(atomic, 0, 1))).toBe('sleeps-in-atomic')
  })

  test('XPMEM holds a reference until the other partition has answered', () => {
    const world = setUp(V13_COMPLETE, 'xpmem')
    const xpmem = clientOf(world, 0) as XpmemClient
    secondaryFault(world, 0, 1)
    const { pfn } = xpmem.sptes[1]!
    munmap(world.machine, world.machine.spaces[0]!, 1, 1, secondaryMmus(world))
    expect([xpmem.messages, Object.keys(xpmem.remote)]).toEqual([[1], ['1']])
    expect(pageOf(world.machine, pfn).pins).toBe(1)
    deliverMessages(world.machine, xpmem)
    expect([xpmem.remote, pageOf(world.machine, pfn).use]).toEqual([{}, 'free'])
    expect(xpmemExport(world, 0, 99)).toBe('no-page')
    expect(() => xpmemExport(setUp(V13_COMPLETE, 'kvm'), 0, 0)).toThrow(/not XPMEM/)
  })

  test('young: all are asked, and forget', () => {
    const world = setUp(V13_COMPLETE, 'kvm', 'gru')
    secondaryFault(world, 0, 1)
    secondaryFault(world, 1, 1)
    expect(clearFlushYoung(world, 0, 1)).toBe('young')
    expect(clearFlushYoung(world, 0, 1)).toBe('old')
    clientOf(world, 1).sptes[1]!.young = true
    expect(clearFlushYoung(world, 0, 1)).toBe('young')
  })

  test('change_pte: KVM replaces its entry, GRU drops it', () => {
    const world = setUp(V13_COMPLETE, 'kvm', 'gru')
    secondaryFault(world, 0, 1)
    secondaryFault(world, 1, 1)
    changePte(world, 0, 1, 3)
    expect([clientOf(world, 0).sptes[1], mapped(world, 1)]).toEqual([{ pfn: 3, writable: false, young: true }, []])
  })
})

describe('faults', () => {
  test('of pages that are not there', () => {
    const world = setUp(V13_COMPLETE, 'kvm', 'gru')
    expect(secondaryFault(world, 0, 50)).toBe('no-page')
    expect(secondaryFault(world, 1, 50)).toBe('no-page')
    expect(runProgram(gruFaultProgram(1, 50, 'interrupt'), world, faultRegisters()).outcome).toBe('failed-in-interrupt')
    expect(auditMachine(world.machine)).toEqual([])
  })

  test('while a range is active: GRU waits in process context, fails in interrupt context', () => {
    const world = setUp(V13_COMPLETE, 'gru')
    invalidateRangeStart(world, 0, 0, 1)
    expect(() => runProgram(gruFaultProgram(0, 0, 'process'), world, faultRegisters())).toThrow(/waits for ever/)
    expect(runProgram(gruFaultProgram(0, 0, 'interrupt'), world, faultRegisters()).outcome).toBe('failed-in-interrupt')
    invalidateRangeEnd(world, 0, 0, 1)
    expect(runProgram(gruFaultProgram(0, 0, 'interrupt'), world, faultRegisters()).outcome).toBe('installed')
  })

  test('a fault outside the active range goes on, if the client keeps the range', () => {
    const world = setUp(V13_COMPLETE, 'kvm')
    invalidateRangeStart(world, 0, 0, 1)
    const outside = kvmFaultProgram(0, 2, { retry: 'with-range' })
    expect(runProgram(outside, world, faultRegisters()).outcome).toBe('installed')
  })

  test('a write fault breaks the share', () => {
    const world = setUp(V13_COMPLETE, 'kvm')
    fork(world.machine, world.machine.spaces[0]!, secondaryMmus(world))
    const program = kvmFaultProgram(0, 0, { access: 'write' })
    expect(runProgram(program, world, faultRegisters()).outcome).toBe('installed')
    expect(clientOf(world, 0).sptes[0]?.pfn).toBe(translate(world.machine, world.machine.spaces[0]!, 0, 'write'))
    expect(staleSptes(world)).toEqual([])
  })
})

describe('interval notifiers', () => {
  const fresh = () => ({ sequence: 2, active: 0, subscriptions: [] })

  test('even when idle, odd while a range that matters is active', () => {
    const interval = fresh()
    const id = intervalInsert(interval, 4, 8)
    expect(subscriptionOf(interval, id).sequence).toBe(1)
    intervalStart(interval, 0, 4)
    expect(interval).toMatchObject({ sequence: 2, active: 1 })
    intervalStart(interval, 7, 9)
    expect([interval.sequence, subscriptionOf(interval, id).sequence]).toEqual([3, 3])
    expect(intervalReadBegin(interval, id)).toEqual({ sequence: 3, wait: 'wait' })
    intervalEnd(interval)
    expect(interval.sequence).toBe(3)
    intervalEnd(interval)
    expect(interval.sequence).toBe(4)
    expect(intervalReadBegin(interval, id)).toEqual({ sequence: 3, wait: 'go' })
    expect(intervalReadRetry(interval, id, 3)).toBe('valid')
    expect(intervalReadRetry(interval, id, 1)).toBe('retry')
    expect(ruleOf(() => intervalEnd(interval))).toBe('end-without-start')
  })

  test('changes of the tree wait while it is walked', () => {
    const interval = fresh()
    const old = intervalInsert(interval, 0, 4)
    expect(intervalBegin(interval, 0, 1)).toEqual([old])
    intervalCallback(interval, old)
    const late = intervalInsert(interval, 0, 4)
    expect(subscriptionOf(interval, late)).toMatchObject({ state: 'insert-queued', sequence: 3 })
    expect(intervalRemove(interval, old)).toBe('queued')
    expect(() => intervalRemove(interval, old)).toThrow(/remove-queued already/)
    const never = intervalInsert(interval, 0, 4)
    expect(intervalRemove(interval, never)).toBe('removed')
    intervalEnd(interval)
    expect(interval.subscriptions.map(({ state }) => state)).toEqual(['removed', 'live', 'removed'])
    expect(intervalRemove(interval, late)).toBe('removed')
    expect(() => intervalInsert(interval, 3, 3)).toThrow(RangeError)
    expect(ruleOf(() => subscriptionOf(interval, 9))).toBe('no-subscription')
  })

  test('inserted while a range is active that nobody watches: at once, but its readers wait', () => {
    const interval = fresh()
    intervalStart(interval, 0, 1)
    const id = intervalInsert(interval, 0, 4)
    expect(subscriptionOf(interval, id)).toMatchObject({ state: 'live', sequence: 3 })
    expect(intervalReadBegin(interval, id).wait).toBe('wait')
    intervalEnd(interval)
    expect(intervalReadBegin(interval, id)).toEqual({ sequence: 3, wait: 'go' })
  })
})

describe('how many hooks', () => {
  const hooks = (shape: PatchShape, pages: number) =>
    Object.fromEntries(WORKLOADS.map((name) => [name, countHooks(shape, name, pages).hooks]))

  test('a callback for single pages halves them where the VM deals with single pages, and only there', () => {
    expect(hooks(V13_FIRST_PART, 100)).toEqual({
      'cow-faults': 100,
      reclaim: 100,
      'xip-sparse': 100,
      fork: 2,
      munmap: 2,
      mprotect: 2,
      mremap: 2,
      mixed: 308,
    })
    expect(hooks(RANGES_ONLY, 100)).toEqual({
      'cow-faults': 200,
      reclaim: 200,
      'xip-sparse': 200,
      fork: 2,
      munmap: 2,
      mprotect: 2,
      mremap: 2,
      mixed: 608,
    })
  })

  test('and no secondary fault has to wait for a single page', () => {
    expect(countHooks(V13_FIRST_PART, 'cow-faults', 100)).toMatchObject({ heldOffPages: 0, callbacks: 200 })
    expect(countHooks(RANGES_ONLY, 'cow-faults', 100)).toMatchObject({ heldOffPages: 100, callbacks: 400 })
    expect(countHooks(V13_FIRST_PART, 'munmap', 100)).toMatchObject({ heldOffPages: 100, callbacks: 4 })
  })

  test('sizes', () => {
    expect(() => countHooks(RANGES_ONLY, 'fork', 0)).toThrow(RangeError)
    expect(() => countHooks(RANGES_ONLY, 'fork', 501)).toThrow(RangeError)
    expect(() => countHooks(RANGES_ONLY, 'fork', 1.5)).toThrow(RangeError)
  })
})

test('a dangling and a stale entry are found', () => {
  const world = setUp(V13_COMPLETE, 'kvm')
  secondaryFault(world, 0, 0)
  frameOf(world.machine, 0)
  munmap(world.machine, world.machine.spaces[0]!, 0, 1)
  expect(danglingSptes(world)).toEqual(['kvm maps page 0 to frame 0, which is free'])
  expect(staleSptes(world)).toEqual(['kvm maps page 0 to frame 0, the primary not'])
  expect(ruleOf(() => putPage(world.machine, 0, 'owner'))).toBe('reference-underflow')
})
