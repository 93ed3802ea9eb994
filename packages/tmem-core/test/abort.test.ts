/** Waiting until a signal aborts. */
import { getEventListeners } from 'node:events'
import { setImmediate } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { untilAborted } from '../src/index.ts'

test('it ends as the promise does, and the signal is left as it was', async () => {
  const { signal } = new AbortController()
  expect(await untilAborted(Promise.resolve(1), undefined)).toBe(1)
  expect(await untilAborted(Promise.resolve(1), signal)).toBe(1)
  await expect(untilAborted(Promise.reject(new Error('its own')), signal)).rejects.toThrow('its own')
  expect(getEventListeners(signal, 'abort')).toEqual([])
})

test('a signal that aborts ends it with its reason, and how the promise ends is nobody’s business', async () => {
  const unhandled: unknown[] = []
  const note = (reason: unknown): void => void unhandled.push(reason)
  process.on('unhandledRejection', note)
  try {
    const end = new AbortController()
    let fail = (_error: Error): void => undefined
    const promise = new Promise<never>((_, reject) => {
      fail = reject
    })
    const waiting = untilAborted(promise, end.signal)
    end.abort(new Error('no longer wanted'))
    await expect(waiting).rejects.toThrow('no longer wanted')
    // It has aborted already.
    await expect(untilAborted(promise, end.signal)).rejects.toThrow('no longer wanted')
    await expect(untilAborted(Promise.resolve(1), end.signal)).rejects.toThrow('no longer wanted')
    fail(new Error('too late'))
    await setImmediate()
    expect(unhandled).toEqual([])
    expect(getEventListeners(end.signal, 'abort')).toEqual([])
  } finally {
    process.off('unhandledRejection', note)
  }
})
