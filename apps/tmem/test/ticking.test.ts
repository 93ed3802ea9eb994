/** Background work as stacks ask for it; and that one which breaks is the only one that ends. */
import type { Layer, PageStore } from '@tmem/core'
import { memory } from '@tmem/memory'
import { ramzswap } from '@tmem/ramzswap'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { Ticking } from '../src/serve/ticking.ts'

beforeEach(() => void vi.useFakeTimers())
afterEach(() => void vi.useRealTimers())

const never = (): void => {
  throw new Error('nobody is broken')
}

test('it works at once, again while there is more, then now and then, and soon when it is woken', () => {
  let ticks = 0
  let more = 2
  const ticking = new Ticking(() => {
    ticks++
    return { pages: 1, pending: more-- > 0 }
  }, never)
  expect(ticks).toBe(0)
  vi.advanceTimersByTime(100)
  expect(ticks).toBe(3)
  vi.advanceTimersByTime(3000)
  expect(ticks).toBe(6)
  for (let n = 0; n < 10; n++) ticking.wake()
  vi.advanceTimersByTime(1)
  expect(ticks).toBe(7)
  vi.advanceTimersByTime(500)
  expect(ticks).toBe(7)
  ticking.stop()
  ticking.wake()
  vi.advanceTimersByTime(10_000)
  expect(ticks).toBe(7)
  expect(vi.getTimerCount()).toBe(0)
})

test('woken by its own work it works again soon, once', () => {
  let ticks = 0
  const ticking: Ticking = new Ticking(() => {
    if (++ticks === 1) ticking.wake()
    return { pages: 0, pending: false }
  }, never)
  vi.advanceTimersByTime(10)
  expect(ticks).toBe(2)
  ticking.stop()
})

test('it rests as long as it has worked', () => {
  let ticks = 0
  let nowMs = 0
  vi.spyOn(performance, 'now').mockImplementation(() => nowMs)
  const ticking = new Ticking(() => {
    ticks++
    nowMs += 50
    return { pages: 1, pending: true }
  }, never)
  vi.advanceTimersByTime(1)
  expect(ticks).toBe(1)
  vi.advanceTimersByTime(45)
  expect(ticks).toBe(1)
  vi.advanceTimersByTime(10)
  expect(ticks).toBe(2)
  ticking.stop()
  vi.restoreAllMocks()
})

/** A filter that claims to have done more than it may, once it is told to. */
function lying(): { layer: Layer; lie: () => void } {
  let lies = false
  const over = (next: PageStore): PageStore =>
    new Proxy(next, {
      get: (store, key) => {
        if (key === 'tick' && lies) return () => ({ pages: 1e9, pending: false })
        const value: unknown = Reflect.get(store, key, store)
        return typeof value === 'function' ? value.bind(store) : value
      },
    })
  return {
    lie: () => {
      lies = true
    },
    layer: { name: 'liar', plan: (below) => below ?? 'it needs one', open: (next) => over(next!) },
  }
}

test('a store that breaks its rules ends its own device, and no other', async () => {
  const { layer, lie } = lying()
  const sizeBytes = 16 * 4096
  const good = ramzswap({ name: 'good', sizeBytes, stack: [memory({ limitBytes: 2 ** 20 })] })
  const bad = ramzswap({ name: 'bad', sizeBytes, stack: [layer, memory({ limitBytes: 2 ** 20 })] })
  let ticks = 0
  const broken: string[] = []
  const tickings = [bad, good].map(
    (device) =>
      new Ticking(
        () => {
          if (device === good) ticks++
          return device.tick({ pages: 8 })
        },
        (error) => broken.push(`${device.name}: ${error.message}`),
      ),
  )
  const page = Buffer.alloc(4096, 'kept')
  for (const device of [bad, good]) await device.write(0, page)
  vi.advanceTimersByTime(2500)
  expect([broken, ticks]).toEqual([[], 3])
  lie()
  vi.advanceTimersByTime(10_000)
  expect(broken).toEqual([
    expect.stringMatching(/^bad: liar broke a rule .*tick touched 1000000000 pages with a budget of 8/),
  ])
  expect(ticks).toBe(13)
  await expect(async () => bad.read(0, Buffer.alloc(4096))).rejects.toThrow(/this stack is stopped/)
  const into = Buffer.alloc(4096)
  await good.read(0, into)
  expect(into.equals(page)).toBe(true)
  for (const ticking of tickings) ticking.stop()
  await Promise.all([bad.close(), good.close()])
})
