/** Knobs whose work has to wait: what happens meanwhile. */
import { memory } from '@tmem/memory'
import { ramzswap } from '@tmem/ramzswap'
import { expect, test } from 'vitest'
import { knobsOf } from '../src/serve/knobs.ts'
import { Users } from '../src/serve/users.ts'

test('reset takes nothing away from who came while it waited', async () => {
  const device = ramzswap({ name: 'dev', sizeBytes: 8 * 4096, stack: [memory({ limitBytes: 2 ** 20 })] })
  const page = Buffer.alloc(4096, 'a page of somebody who came late')
  let clients = 0
  const users = new Users('dev', {
    clients: () => clients,
    opens: () => 0,
    opensNow: async () => 0,
    kernelUse: async () => undefined,
  })
  const served = {
    resize: (sizeBytes: number): void => device.resize(sizeBytes),
    discard: async (at: number, length: number): Promise<void> => {
      await device.discard(at, length)
      clients = 1
      await device.write(0, page)
    },
  }
  const reset = knobsOf({ device, served, users }).get('reset')!
  await expect(async () => reset.write('1')).rejects.toThrow(
    'dev was emptied, but its counters were not reset, as it came into use meanwhile: 1 NBD connections',
  )
  const into = Buffer.alloc(4096)
  await device.read(0, into)
  expect(into.equals(page)).toBe(true)
  await expect(async () => reset.write('1')).rejects.toThrow('dev is in use: 1 NBD connections')
  await device.close()
})

test('while pages are given up nobody opens the file, and nobody else gives them up; after a failure both may', async () => {
  let opens = 0
  const users = new Users('dev', {
    clients: () => 0,
    opens: () => opens,
    opensNow: async () => opens,
    kernelUse: async () => '/dev/loop7',
  })
  let fail: (error: Error) => void = () => undefined
  const first = users.whileUnused(() => new Promise((_, reject) => (fail = reject)))
  expect(users.mayOpen).toBe(false)
  await expect(users.whileUnused(() => undefined)).rejects.toThrow('dev is being emptied already')
  fail(new Error('a disk that fails'))
  await expect(first).rejects.toThrow('a disk that fails')
  expect(users.mayOpen).toBe(true)
  opens = 1
  await expect(users.whileUnused(() => undefined)).rejects.toThrow('dev is in use: /dev/loop7')
  expect(users.hasFile).toBe(true)
  opens = 0
  expect(await users.whileUnused(() => 'done')).toBe('done')
})
