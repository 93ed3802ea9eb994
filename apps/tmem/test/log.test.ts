/** What a server says: lines of every kind, bounded, and never waited for. */
import { openSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { ramzswap } from '@tmem/ramzswap'
import { zcache } from '@tmem/zcache'
import { expect, test } from 'vitest'
import { backingFile, bytesOf, systemError } from '../../../packages/ramzswap/test/subject.ts'
import { Log, type LogOptions } from '../src/serve/log.ts'
import { PlaceWatch } from '../src/serve/place-watch.ts'
import { temporaryDirectory } from './tmem.ts'

/** A log to a file, the time, and what was said by now. */
function logged(options: LogOptions = {}) {
  const path = join(temporaryDirectory(), 'log')
  const descriptor = openSync(path, 'a')
  let now = 0
  const log = new Log({ descriptor, clock: () => now, ...options })
  return {
    log,
    pass: (milliseconds: number) => {
      now += milliseconds
    },
    lines: () => readFileSync(path, 'utf8').split('\n').slice(0, -1),
  }
}

test('a line of JSON has time, level, process, event, message and fields; one of text the message', async () => {
  const json = logged({ format: 'json' })
  json.log.warn('place.failed', 'the disk\nfails', { device: 'a', failed: 3 })
  await json.log.close()
  expect(json.lines().map((line) => JSON.parse(line) as object)).toEqual([
    {
      level: 'warn',
      time: expect.stringMatching(/^\d{4}-\d\d-\d\dT[\d:.]+Z$/),
      pid: process.pid,
      event: 'place.failed',
      device: 'a',
      failed: 3,
      msg: 'the disk\nfails',
    },
  ])
  const text = logged({ format: 'text' })
  text.log.error('a', 'the \u001b[31mdisk\r\nfails')
  await text.log.close()
  expect(text.lines()).toEqual(['tmem: the  [31mdisk fails'])
})

test('what is said after its end is dropped, and counted', async () => {
  const { log, lines } = logged({ format: 'text' })
  log.warn('a', 'before')
  await log.close()
  log.error('b', 'after')
  for (let n = 0; n < 20; n++) log.warn('a', 'before')
  log.look()
  await log.close()
  expect(lines()).toEqual(['tmem: before'])
  expect(log.stats().counters['dropped']).toBeGreaterThan(0)
})

test('what is below the level is not said, and costs nothing', async () => {
  const { log, lines } = logged({ level: 'warn' })
  log.info('a', 'one')
  log.debug('a', 'two')
  log.error('a', 'three')
  await log.close()
  expect(lines().map((line) => (JSON.parse(line) as { msg: string }).msg)).toEqual(['three'])
  expect(log.stats().counters).toEqual({ error: 1, warn: 0, info: 0, debug: 0, suppressed: 0, dropped: 0 })
})

test('of one kind there are ten lines in ten seconds, and then how many more there were', async () => {
  const { log, pass, lines } = logged({ format: 'text' })
  for (let n = 0; n < 25; n++) log.warn('request.failed', `page ${n} cannot be read`)
  log.warn('request.failed', 'another thing')
  pass(9999)
  log.look()
  pass(1)
  log.look()
  log.warn('request.failed', 'page 25 cannot be read')
  await log.close()
  expect(lines()).toEqual([
    ...Array.from({ length: 10 }, (_, n) => `tmem: page ${n} cannot be read`),
    'tmem: another thing',
    'tmem: 15 more like it: page N cannot be read',
    'tmem: page 25 cannot be read',
  ])
  expect(log.stats().counters).toMatchObject({ warn: 13, suppressed: 15, dropped: 0 })
})

test('kinds are bounded, and what was counted of one that makes room is said', async () => {
  const { log, lines } = logged({ format: 'text' })
  for (let n = 0; n < 11; n++) log.warn('old', 'the oldest')
  const word = (n: number): string => String.fromCharCode(97 + (n % 26), 97 + Math.floor(n / 26))
  for (let n = 0; n < 64; n++) log.warn('new', word(n))
  await log.close()
  expect(lines().length).toBe(10 + 64 + 1)
  expect(lines()).toContain('tmem: 1 more like it: the oldest')
})

test('a place that fails is said once, and that it works again', async () => {
  const { log, lines } = logged({ format: 'text' })
  const { layers, file } = backingFile(64)
  const device = ramzswap({ name: 'a', sizeBytes: 64 * 4096, stack: [zcache({ limitBytes: 2 ** 20 }), ...layers] })
  const watch = new PlaceWatch(device, log)
  for (let n = 0; n < 8; n++) void device.write(n * 4096, bytesOf('text', 4096, n))
  watch.look()
  file().failWrite = () => systemError('EIO')
  for (let n = 0; n < 3; n++) {
    await expect(device.writeback({ pageIndex: n })).rejects.toThrow('EIO')
    watch.look()
  }
  file().failWrite = () => undefined
  watch.look()
  for (let n = 0; n < 8; n++) await device.writeback({ pageIndex: n })
  watch.look()
  file().failRead = () => systemError('EIO')
  await expect(device.read(4096, new Uint8Array(4096))).rejects.toThrow('EIO')
  watch.look()
  file().failRead = () => undefined
  await device.read(4096, new Uint8Array(4096))
  watch.look()
  await log.close()
  const place = device.usage().places[1]!.name
  expect(lines()).toEqual([
    `tmem: a: ${place} fails: EIO: injected`,
    `tmem: a: ${place} works again`,
    `tmem: a: ${place} fails`,
    `tmem: a: ${place} works again`,
  ])
  await device.close()
})
