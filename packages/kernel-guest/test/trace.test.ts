/** Traces that are made by hand: what cannot have happened is found, and nothing else. */
import { describe, expect, test } from 'vitest'
import { checkTrace, traceHead } from '../src/index.ts'

type Event = readonly [kind: number, first?: number, end?: number, detail?: number, who?: number]

const [store, load, invalidate, area] = [1, 2, 3, 4]
const [cleanPut, cleanGet, cleanInvalidate, cleanInode, cleanFs] = [5, 6, 7, 8, 9]
const [register, start, end, range, changePte, young, release] = [16, 17, 18, 19, 20, 21, 22]
const page = 4096

function traceOf(...events: readonly Event[]): Uint8Array {
  const bytes = new Uint8Array(traceHead.length + events.length * 32)
  bytes.set(traceHead)
  const view = new DataView(bytes.buffer, traceHead.length)
  for (const [n, [kind, first = 0, last = 0, detail = 0, who = 0]] of events.entries()) {
    view.setBigUint64(n * 32, BigInt(n) * 1_000_000n, true)
    view.setBigUint64(n * 32 + 8, BigInt(first), true)
    view.setBigUint64(n * 32 + 16, BigInt(last), true)
    view.setUint16(n * 32 + 24, kind, true)
    view.setInt16(n * 32 + 26, detail, true)
    view.setUint32(n * 32 + 28, who, true)
  }
  return bytes
}

const watched = (...events: readonly Event[]): Event[] =>
  [[register] as Event, ...events].map(([kind, first, last, detail]) => [kind, first ?? 0, last ?? 0, detail ?? 0, 7])

test('what a kernel does has no contradiction, and is counted', () => {
  const report = checkTrace(
    traceOf(
      [store, 0, 5, 1],
      [load, 0, 5, 1],
      [load, 0, 5, 1],
      [invalidate, 0, 5],
      [store, 0, 6, 1],
      [store, 0, 7, -12],
      [store, 1, 6, 1],
      [area, 0],
      [load, 1, 6, 1],
      ...watched(
        [start, page, 2 * page],
        [range, page, 2 * page],
        [end, page, 2 * page],
        [start, 0, 16 * page],
        [start, page, 3 * page],
        [changePte, page, 2 * page],
        [young, page, 2 * page],
        [end, 0, 16 * page],
        [end, page, 3 * page],
        [release],
      ),
    ),
  )
  expect(report).toEqual({
    events: 20,
    seconds: 0.019,
    kinds: {
      store: 4,
      load: 3,
      invalidate: 1,
      area: 1,
      register: 1,
      start: 3,
      range: 1,
      end: 3,
      changePte: 1,
      young: 1,
      release: 1,
    },
    singlePages: 1,
    ranges: 2,
    hooks: 6,
    hooksWithPages: 5,
    contradictions: [],
  })
})

test("cleancache may miss at any time, and has each file's pages for itself", () => {
  const report = checkTrace(
    traceOf(
      [cleanGet, 9, 5],
      [cleanPut, 9, 5, 0, 1],
      [cleanPut, 8, 5, 0, 1],
      [cleanPut, 9, 5, 0, 2],
      [cleanInode, 8, 0, 0, 1],
      [cleanFs, 0, 0, 0, 2],
      [cleanGet, 9, 5, 1, 1],
      [cleanInvalidate, 9, 6, 0, 1],
      [cleanGet, 9, 5, 0, 1],
    ),
  )
  expect(report.contradictions).toEqual([])
})

describe('is found', () => {
  test.each<readonly [string, number, readonly Event[]]>([
    ['load-needs-store', 0, [[load, 0, 5, 1]]],
    [
      'load-needs-store',
      2,
      [
        [store, 0, 5, 1],
        [invalidate, 0, 5],
        [load, 0, 5, 1],
      ],
    ],
    [
      'load-needs-store',
      2,
      [
        [store, 0, 5, 1],
        [store, 0, 5, -12],
        [load, 0, 5, 1],
      ],
    ],
    [
      'load-needs-store',
      2,
      [
        [store, 0, 5, 1],
        [area, 0],
        [load, 0, 5, 1],
      ],
    ],
    [
      'invalidate-needs-store',
      1,
      [
        [store, 0, 5, 1],
        [invalidate, 1, 5],
      ],
    ],
    ['start-and-end-are-paired', 1, watched([end, 0, page])],
    ['start-and-end-are-paired', 2, watched([start, 0, page], [end, 0, 2 * page])],
    ['start-and-end-are-paired', 2, watched([start, 0, page])],
    ['range-within-start-and-end', 1, watched([range, 0, page])],
    ['no-callback-after-release', 2, watched([release], [start, 0, page])],
    ['callback-needs-registration', 0, [[start, 0, page]]],
    ['register-once', 1, watched([register])],
    ['cannot-be', 2, watched([start, 0, page], [release])],
    ['cannot-be', 1, watched([start, page, page])],
    ['cannot-be', 0, [[10]]],
    ['hit-needs-put', 0, [[cleanGet, 9, 5, 1]]],
    [
      'hit-needs-put',
      2,
      [
        [cleanPut, 9, 5],
        [cleanInvalidate, 9, 5],
        [cleanGet, 9, 5, 1],
      ],
    ],
    [
      'hit-needs-put',
      2,
      [
        [cleanPut, 9, 5],
        [cleanInode, 9],
        [cleanGet, 9, 5, 1],
      ],
    ],
    [
      'hit-needs-put',
      2,
      [
        [cleanPut, 9, 5, 0, 1],
        [cleanFs, 0, 0, 0, 1],
        [cleanGet, 9, 5, 1, 1],
      ],
    ],
  ])('%s, event %i', (rule, event, events) => {
    expect(checkTrace(traceOf(...events)).contradictions[0]).toMatchObject({ rule, event })
  })
})

test('what is no trace, or is cut off, is told', () => {
  expect(() => checkTrace(new Uint8Array(100))).toThrow('it is no trace: it does not begin as one')
  expect(() => checkTrace(traceOf([store, 0, 1, 1]).subarray(0, 40))).toThrow('the trace is cut off in event 0')
})
