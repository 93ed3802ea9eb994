import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import type { PageModel } from '../src/index.ts'
import {
  ConformanceError,
  contradictionIn,
  expectLinearizable,
  History,
  PageOperation,
  pageModels,
} from '../src/index.ts'

const { Put, RefusedPut, Hit, Miss, Flush } = PageOperation
const { persistent, sharedEphemeral, privateEphemeral } = pageModels

type Operation = readonly [
  thread: number,
  operation: PageOperation,
  value: number,
  invoked: number,
  answered: number,
  handle?: number,
]

function historyOf(...operations: readonly Operation[]): History {
  const history = new History(operations.length)
  for (const [thread, operation, value, invoked, answered, handle = 1] of operations)
    history.record(thread, operation, handle, value, invoked, answered)
  return history
}

const isRight = (model: PageModel, ...operations: readonly Operation[]): boolean =>
  contradictionIn(historyOf(...operations), model) === undefined

describe('histories of one thread', () => {
  it('a get finds what was put last', () => {
    expect(isRight(persistent, [0, Put, 1, 0, 1], [0, Put, 2, 2, 3], [0, Hit, 2, 4, 5], [0, Hit, 2, 6, 7])).toBe(true)
    expect(isRight(persistent, [0, Put, 1, 0, 1], [0, Put, 2, 2, 3], [0, Hit, 1, 4, 5])).toBe(false)
    expect(isRight(persistent, [0, Put, 1, 0, 1], [0, Hit, 3, 4, 5])).toBe(false)
  })

  it('every page begins empty', () => {
    expect(isRight(persistent, [0, Miss, 0, 0, 1], [0, Flush, 0, 2, 3])).toBe(true)
    expect(isRight(persistent, [0, Hit, 1, 0, 1])).toBe(false)
  })

  it('a persistent page is missed only when there is none', () => {
    expect(isRight(persistent, [0, Put, 1, 0, 1], [0, Miss, 0, 2, 3])).toBe(false)
    expect(isRight(persistent, [0, Put, 1, 0, 1], [0, Flush, 0, 2, 3], [0, Miss, 0, 4, 5])).toBe(true)
    expect(isRight(persistent, [0, Put, 1, 0, 1], [0, Flush, 0, 2, 3], [0, Hit, 1, 4, 5])).toBe(false)
  })

  it('a refused put leaves no page, not even an older one', () => {
    expect(isRight(persistent, [0, Put, 1, 0, 1], [0, RefusedPut, 2, 2, 3], [0, Miss, 0, 4, 5])).toBe(true)
    expect(isRight(persistent, [0, Put, 1, 0, 1], [0, RefusedPut, 2, 2, 3], [0, Hit, 1, 4, 5])).toBe(false)
    expect(isRight(sharedEphemeral, [0, RefusedPut, 2, 2, 3], [0, Hit, 2, 4, 5])).toBe(false)
  })

  it('an ephemeral page may vanish, and then stays away until the next put', () => {
    for (const model of [sharedEphemeral, privateEphemeral]) {
      expect(isRight(model, [0, Put, 1, 0, 1], [0, Miss, 0, 2, 3], [0, Miss, 0, 4, 5])).toBe(true)
      expect(isRight(model, [0, Put, 1, 0, 1], [0, Miss, 0, 2, 3], [0, Hit, 1, 4, 5])).toBe(false)
      expect(isRight(model, [0, Put, 1, 0, 1], [0, Miss, 0, 2, 3], [0, Put, 1, 4, 5], [0, Hit, 1, 6, 7])).toBe(true)
    }
  })

  it('a hit takes a private ephemeral page away, and no other', () => {
    const twice: Operation[] = [
      [0, Put, 1, 0, 1],
      [0, Hit, 1, 2, 3],
      [0, Hit, 1, 4, 5],
    ]
    expect(isRight(privateEphemeral, ...twice)).toBe(false)
    expect(isRight(sharedEphemeral, ...twice)).toBe(true)
    expect(isRight(persistent, ...twice)).toBe(true)
    const steady = { ...privateEphemeral, vanishes: false }
    expect(isRight(steady, [0, Put, 1, 0, 1], [0, Hit, 1, 2, 3], [0, Miss, 0, 4, 5])).toBe(true)
    expect(isRight(steady, [0, Put, 1, 0, 1], [0, Miss, 0, 4, 5])).toBe(false)
  })
})

describe('histories of several threads', () => {
  it('operations that overlap may take effect in either order', () => {
    expect(isRight(persistent, [0, Put, 1, 0, 5], [1, Miss, 0, 1, 2], [2, Hit, 1, 3, 4])).toBe(true)
    expect(isRight(persistent, [0, Put, 1, 0, 5], [1, Hit, 1, 1, 2], [2, Hit, 1, 3, 4])).toBe(true)
    expect(isRight(persistent, [0, Put, 1, 0, 4], [1, Put, 2, 1, 5], [2, Hit, 1, 6, 7])).toBe(true)
    expect(isRight(persistent, [0, Put, 1, 0, 4], [1, Put, 2, 1, 5], [2, Hit, 2, 6, 7])).toBe(true)
  })

  it('what one get saw, no later get may unsee', () => {
    expect(isRight(persistent, [0, Put, 1, 0, 5], [1, Hit, 1, 1, 2], [2, Miss, 0, 3, 4])).toBe(false)
    const puts: Operation[] = [
      [0, Put, 1, 0, 8],
      [1, Put, 2, 1, 9],
    ]
    expect(isRight(persistent, ...puts, [2, Hit, 1, 2, 3], [3, Hit, 2, 4, 5])).toBe(true)
    expect(isRight(persistent, ...puts, [2, Hit, 1, 2, 3], [3, Hit, 2, 4, 5], [2, Hit, 1, 6, 7])).toBe(false)
  })

  it('the order of operations that do not overlap is kept', () => {
    expect(isRight(persistent, [0, Put, 1, 0, 1], [1, Put, 2, 2, 3], [2, Hit, 1, 4, 5])).toBe(false)
    expect(isRight(persistent, [0, Put, 1, 0, 1], [1, Put, 2, 2, 5], [2, Hit, 1, 3, 4])).toBe(true)
  })

  it('a private ephemeral page is had by one getter only', () => {
    const put: Operation = [0, Put, 1, 0, 1]
    expect(isRight(privateEphemeral, put, [1, Hit, 1, 2, 5], [2, Miss, 0, 3, 4])).toBe(true)
    expect(isRight(privateEphemeral, put, [1, Hit, 1, 2, 5], [2, Hit, 1, 3, 4])).toBe(false)
  })

  it('pages are judged one by one', () => {
    const stale: Operation[] = [
      [0, Put, 1, 0, 1, 7],
      [0, Put, 2, 2, 3, 8],
      [1, Hit, 1, 4, 5, 7],
      [1, Hit, 1, 6, 7, 8],
    ]
    expect(contradictionIn(historyOf(...stale), persistent)?.handle).toBe(8)
    const misses: Operation[] = [
      [0, Put, 1, 0, 1, 7],
      [0, Put, 2, 2, 3, 8],
      [1, Miss, 0, 4, 5, 7],
      [1, Miss, 0, 6, 7, 8],
    ]
    const modelOf = (handle: number): PageModel => (handle === 7 ? sharedEphemeral : persistent)
    expect(contradictionIn(historyOf(...misses), modelOf)?.handle).toBe(8)
  })

  it('histories of several threads are merged', () => {
    const merged = History.merged([
      historyOf([0, Put, 1, 0, 3]),
      historyOf([1, Miss, 0, 4, 5]),
      new History(4),
      historyOf([2, Hit, 1, 1, 2]),
    ])
    expect(merged.length).toBe(3)
    expect(contradictionIn(merged, persistent)?.operations).toEqual([0, 2, 1])
  })
})

describe('agreement with trying all orders', () => {
  /** Tries every order of all operations that keeps the order of those that do not overlap. */
  function someOrderIsRight(operations: readonly Operation[], model: PageModel): boolean {
    const search = (left: readonly Operation[], held: number | undefined): boolean => {
      if (left.length === 0) return true
      const firstAnswer = Math.min(...left.map(([, , , , answered]) => answered))
      return left.some((chosen, i) => {
        const [, operation, value, invoked] = chosen
        if (invoked > firstAnswer) return false
        const rest = left.filter((_, j) => j !== i)
        if (operation === Put) return search(rest, value)
        if (operation === Hit) return held === value && search(rest, model.takes ? undefined : held)
        if (operation === Miss) return (model.vanishes || held === undefined) && search(rest, undefined)
        return search(rest, undefined)
      })
    }
    return search(operations, undefined)
  }

  const models = [persistent, sharedEphemeral, privateEphemeral, { name: 'steady', takes: true, vanishes: false }]
  const random = fc.array(
    fc.record({
      operation: fc.constantFrom(Put, Put, Hit, Hit, Miss, Flush, RefusedPut),
      value: fc.integer({ min: 0, max: 2 }),
      invoked: fc.integer({ min: 0, max: 14 }),
      lasts: fc.integer({ min: 1, max: 6 }),
    }),
    { maxLength: 7 },
  )

  it('is complete', () => {
    let wrong = 0
    fc.assert(
      fc.property(random, fc.constantFrom(...models), (drawn, model) => {
        const operations = drawn.map(
          ({ operation, value, invoked, lasts }, i): Operation => [i, operation, value, invoked, invoked + lasts],
        )
        const expected = someOrderIsRight(operations, model)
        if (!expected) wrong++
        expect(isRight(model, ...operations)).toBe(expected)
      }),
      { seed: 3, numRuns: 3000 },
    )
    expect(wrong).toBeGreaterThan(500)
  })

  it('what it shows is wrong by itself', () => {
    fc.assert(
      fc.property(random, fc.constantFrom(...models), (drawn, model) => {
        const operations = drawn.map(
          ({ operation, value, invoked, lasts }, i): Operation => [i, operation, value, invoked, invoked + lasts],
        )
        const found = contradictionIn(historyOf(...operations), model)
        if (found === undefined) return
        expect(
          someOrderIsRight(
            found.operations.map((i) => operations[i]!),
            model,
          ),
        ).toBe(false)
      }),
      { seed: 4, numRuns: 2000 },
    )
  })
})

describe('long histories', () => {
  /**
   * Three threads on four pages, in steps: every operation takes effect in one step, between its call and its answer.
   */
  function simulated(operations: number, get: (held: number, before: number, random: number) => number): History {
    const history = new History(operations)
    const held = [0, 0, 0, 0]
    const before = [0, 0, 0, 0]
    let random = 1
    const next = (below: number): number => {
      random = (Math.imul(random, 1103515245) + 12345) >>> 0
      return (random >>> 8) % below
    }
    let now = 0
    let calls: { thread: number; page: number; kind: number; value: number; invoked: number; done: boolean }[] = []
    for (let value = 1; history.length < operations; ) {
      const thread = next(3)
      const call = calls.find((one) => one.thread === thread)
      if (call === undefined)
        calls.push({ thread, page: next(4), kind: next(5), value: value++, invoked: now++, done: false })
      else if (!call.done) {
        call.done = true
        const found = get(held[call.page]!, before[call.page]!, next(1000))
        if (call.kind > 1) call.value = found
        else {
          before[call.page] = held[call.page]!
          held[call.page] = call.kind === 0 ? call.value : 0
        }
      } else {
        const operation = call.kind === 0 ? Put : call.kind === 1 ? Flush : call.value === 0 ? Miss : Hit
        history.record(thread, operation, call.page, call.value, call.invoked, now++)
        calls = calls.filter((one) => one !== call)
      }
    }
    return history
  }

  it('forty thousand operations on four pages', () => {
    expect(
      contradictionIn(
        simulated(40_000, (held) => held),
        persistent,
      ),
    ).toBeUndefined()
  })

  it('a store that seldom returns stale bytes is caught', () => {
    const stale = simulated(40_000, (held, before, random) => (random === 0 ? before : held))
    const found = contradictionIn(stale, persistent)
    expect(found).toBeDefined()
    expect(found!.operations.length).toBeLessThan(12)
    expect(contradictionIn(historyOf(...found!.operations.map((i) => entry(stale, i))), persistent)).toBeDefined()
  })

  const entry = (history: History, i: number): Operation => [
    history.thread(i),
    history.operation(i),
    history.value(i),
    history.invoked(i),
    history.answered(i),
    history.handle(i),
  ]
})

describe('what is shown', () => {
  it('is the smallest stretch, without the gets that do not matter', () => {
    const history = historyOf(
      [0, Put, 1, 0, 1],
      [1, Hit, 1, 2, 3],
      [0, Put, 17, 4, 7],
      [1, Hit, 1, 5, 6],
      [2, Hit, 17, 8, 12],
      [1, Hit, 17, 9, 11],
      [0, Hit, 1, 13, 14],
      [1, Put, 3, 15, 16],
      [1, Hit, 3, 17, 18],
    )
    expect(() => expectLinearizable(history, persistent)).toThrow(ConformanceError)
    expect(contradictionIn(history, persistent)!.text).toBe(
      [
        'page 1 (persistent): no order of these operations explains their answers;',
        'before them the page held anything or nothing',
        '  thread 1  get: 17                   ||',
        '  thread 0  get: 1                      ||',
      ].join('\n'),
    )
  })

  it('says when the page held nothing before', () => {
    expect(contradictionIn(historyOf([3, Hit, 9, 0, 1]), sharedEphemeral)!.text).toBe(
      [
        'page 1 (shared ephemeral): no order of these operations explains their answers;',
        'before them the page held nothing',
        '  thread 3  get: 9                    ||',
      ].join('\n'),
    )
  })
})

describe('misuse', () => {
  it('is refused', () => {
    const history = historyOf([0, Put, 1, 0, 1])
    expect(() => history.record(0, Put, 1, 1, 2, 3)).toThrow('the history is full: it has 1 operations')
    expect(() => new History(1).record(0, Put, 1, 1, 3, 3)).toThrow(RangeError)
    expect(() => new History(1).record(0, Put, 1, -1, 3, 4)).toThrow(RangeError)
    const crowd = Array.from({ length: 21 }, (_, i): Operation => [i, Flush, 0, i, 100 + i])
    expect(() => contradictionIn(historyOf(...crowd), persistent)).toThrow('more than 20 operations overlap on page 1')
  })
})
