/** Pages in a file: what the next process finds of them. */
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { compose } from '@tmem/core'
import { memory } from '@tmem/memory'
import { GuestMemory, restoreDomain, XenHost } from '@tmem/xen-hypercall'
import fc from 'fast-check'
import { expect, onTestFinished, test } from 'vitest'
import { SavedPages } from '../src/index.ts'

const persistent = 0x01000001
const head = 4096
const recordBytes = 4160

function folder(): string {
  const path = mkdtempSync(join(tmpdir(), 'tmem-test-'))
  onTestFinished(() => rmSync(path, { recursive: true }))
  return path
}

const pageOf = (value: number): Uint8Array => new Uint8Array(4096).fill(value)

/** What a host has that begins with the file: value by pool, object and index. */
async function restored(saved: SavedPages): Promise<Map<string, number>> {
  const store = compose([memory({ limitBytes: 2 ** 24 })])
  const host = new XenHost({ store })
  host.addDomain({ id: 1, memory: new GuestMemory(new Uint8Array(4096)) })
  try {
    await restoreDomain(host, 1, saved.stream())
    const found = new Map<string, number>()
    const page = new Uint8Array(4096)
    for (const [slot, pool] of (host.clients.get(1)?.slots ?? []).entries()) {
      if (pool === undefined) continue
      pool.pool.walk!((object, index) => {
        pool.pool.get(object, index, page)
        expect(new Set(page).size).toBe(1)
        found.set(`${slot}/${object}/${index}`, page[0]!)
        return true
      })
    }
    return found
  } finally {
    host.close()
    await store.close()
  }
}

test('whatever was put and flushed, the next process has what was there', async () => {
  const put = fc.record({
    act: fc.constant('put' as const),
    object: fc.nat(3),
    index: fc.nat(3),
    value: fc.integer({ min: 1, max: 255 }),
  })
  const flush = fc.record({
    act: fc.constantFrom('page' as const, 'object' as const),
    object: fc.nat(3),
    index: fc.nat(3),
    value: fc.constant(0),
  })
  const reopen = fc.record({
    act: fc.constant('reopen' as const),
    object: fc.constant(0),
    index: fc.constant(0),
    value: fc.constant(0),
  })
  const path = folder()
  let run = 0
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.oneof({ weight: 6, arbitrary: put }, flush, reopen), { maxLength: 60 }),
      async (acts) => {
        const options = { file: join(path, `${run++}`), sizeBytes: 2 ** 20 }
        let saved = SavedPages.open(options)
        try {
          saved.newPool(2, persistent)
          const model = new Map<string, number>()
          for (const { act, object, index, value } of acts) {
            const name = `2/${object}/${index}`
            if (act === 'put') {
              if (saved.put(2, object, index, pageOf(value))) model.set(name, value)
            } else if (act === 'page') {
              saved.flushPage(2, object, index)
              model.delete(name)
            } else if (act === 'object') {
              saved.flushObject(2, object)
              for (const one of model.keys()) if (one.startsWith(`2/${object}/`)) model.delete(one)
            } else {
              saved.close()
              saved = SavedPages.open(options)
            }
          }
          expect(await restored(saved)).toEqual(model)
        } finally {
          saved.close({ remove: true })
        }
      },
    ),
    { numRuns: 40 },
  )
})

test('a record that was cut off, or altered, holds no page, and the others are there', async () => {
  const file = join(folder(), 'saved')
  const saved = SavedPages.open({ file, sizeBytes: 2 ** 20 })
  saved.newPool(0, persistent)
  for (const index of [0, 1, 2]) saved.put(0, 5, index, pageOf(index + 1))
  saved.close()
  const descriptor = openSync(file, 'r+')
  writeSync(descriptor, new Uint8Array([77]), 0, 1, head + recordBytes + 2000)
  closeSync(descriptor)
  const again = SavedPages.open({ file, sizeBytes: 2 ** 20 })
  expect(await restored(again)).toEqual(
    new Map([
      ['0/5/0', 1],
      ['0/5/2', 3],
    ]),
  )
  again.close()
})

test('the pages of ephemeral and shared pools are not kept, nor those of a pool that is destroyed', async () => {
  const saved = SavedPages.open({ file: join(folder(), 'saved'), sizeBytes: 2 ** 20 })
  onTestFinished(() => saved.close())
  saved.newPool(0, 0x01000000)
  saved.newPool(1, 0x01000003)
  saved.newPool(2, persistent)
  for (const pool of [0, 1, 2]) expect(saved.put(pool, 1, 1, pageOf(1))).toBe(true)
  expect(saved.pages).toBe(1)
  saved.destroyPool(2)
  expect(saved.pages).toBe(0)
  expect([...saved.stream()]).toEqual([])
})

test("a file that is somebody else's stays as it is", () => {
  const file = join(folder(), 'notes')
  writeFileSync(file, 'my notes\n')
  expect(() => SavedPages.open({ file, sizeBytes: 2 ** 20 })).toThrow(/notes/)
  expect(readFileSync(file, 'utf8')).toBe('my notes\n')
})
