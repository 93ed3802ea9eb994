/** What is acknowledged survives a killed process: real processes, which use what was built, and a real file. */
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import { compose, PutOutcome } from '@tmem/core'
import { zcache } from '@tmem/zcache'
import { afterAll, describe, expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { spill } from '../src/index.ts'
import { changeOf, pageOf } from './changes.mjs'
import { countersOf, fetched, poolOf } from './stores.ts'

const folder = mkdtempSync(join(tmpdir(), 'spill-restart-'))
afterAll(() => rmSync(folder, { recursive: true }))
let files = 0
const program = fileURLToPath(new URL('holder.mjs', import.meta.url))
const sizeBytes = 64 * 2 ** 20

interface Killed {
  readonly pid: number
  /** Changes that were begun, and those that had come to their end. */
  readonly begun: number
  readonly ended: number
}

/** Runs the program over a file and kills it after so many changes. */
async function killed(file: string, limit: number, changes: number, while_?: (pid: number) => void): Promise<Killed> {
  const child = spawn(process.execPath, [program, file, String(sizeBytes), String(limit)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  let said = ''
  let told = false
  child.stdout.setEncoding('latin1')
  child.stdout.on('data', (text: string) => {
    said += text
    if (!told && said.includes(`e ${changes}\n`)) {
      told = true
      while_?.(child.pid!)
      child.kill('SIGKILL')
    }
  })
  const [, signal] = await once(child, 'close')
  expect(signal).toBe('SIGKILL')
  const last = (letter: string): number =>
    Math.max(...[...said.matchAll(new RegExp(`^${letter} (\\d+)$`, 'gm'))].map(([, number]) => Number(number)))
  return { pid: child.pid!, begun: last('b'), ended: last('e') }
}

/** The changes of a handle: number of the last one that ended, and of those that may or may not have been done. */
function stateOf(index: number, { begun, ended }: Killed): { last: number | undefined; maybe: number[] } {
  let last: number | undefined
  const maybe: number[] = []
  for (let number = 0; number <= begun; number++) {
    if (changeOf(number).index !== index) continue
    if (number <= ended) last = number
    else maybe.push(number)
  }
  return { last, maybe }
}

describe('killed', { timeout: 120_000 }, () => {
  test.each([
    ['a spill alone: all that was acknowledged is there', 0],
    ['a spill below a zcache, in the middle of flights: what is found is the last page', 300_000],
  ] as const)('%s', async (_how, limit) => {
    let found = 0
    for (let round = 0; round < 4; round++) {
      const file = join(folder, `spill${files++}`)
      const end = await killed(file, limit, 700 + 331 * round)
      const below = spill({ file, sizeBytes })
      const store = compose(limit === 0 ? [below] : [zcache({ limitBytes: limit }), below])
      const pool = poolOf(store)
      store.check!()
      for (let index = 0; index < 300; index++) {
        const { last, maybe } = stateOf(index, end)
        const page = await fetched(pool, 7, index)
        const right = [last, ...maybe].filter((one) => one !== undefined && !changeOf(one).flush)
        // What was in memory is gone; but not what had gone straight to the file.
        const mayBeGone = limit > 0 || maybe.length > 0 || last === undefined || changeOf(last).flush
        if (page !== undefined) found++
        const isRight = page === undefined ? mayBeGone : right.some((one) => Buffer.compare(page, pageOf(one!)) === 0)
        expect(isRight, `page ${index}, killed in change ${end.begun}`).toBe(true)
      }
      expect(countersOf(store)['damaged_records']).toBe(0)
      await store.close()
    }
    expect(found).toBeGreaterThan(limit === 0 ? 800 : 50)
  })

  test('while it lives nobody else has its file; afterwards the next one does', async () => {
    const file = join(folder, `spill${files++}`)
    let message = ''
    const { pid } = await killed(file, 0, 10, () => {
      try {
        compose([spill({ file, sizeBytes })])
      } catch (error) {
        message = String(error)
      }
    })
    expect(message).toContain(`process ${pid} uses it`)
    const store = compose([spill({ file, sizeBytes })])
    expect(countersOf(store)['left']).toBeGreaterThan(5)
    expect(() => compose([spill({ file, sizeBytes })])).toThrow('this process uses it already')
    await store.close()
  })

  test('a thread that ends leaves its file to the next', async () => {
    const file = join(folder, `spill${files++}`)
    const worker = new Worker(program, { argv: [file, String(sizeBytes), '0'], execArgv: [] })
    await once(worker, 'message')
    expect(() => compose([spill({ file, sizeBytes })])).toThrow(`thread ${worker.threadId} of this process uses it`)
    await worker.terminate()
    const store = compose([spill({ file, sizeBytes })])
    store.check!()
    await store.close()
  })
})

test('a disk that is really full', async (ctx) => {
  requires(ctx, { root: true, commands: ['mount', 'umount'] })
  const disk = mkdtempSync(join(folder, 'disk-'))
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=512k', 'none', disk])
  try {
    const store = compose([spill({ file: join(disk, 'pages.spill'), sizeBytes: 2 ** 20 })])
    const pool = poolOf(store)
    let stored = 0
    while (pool.put(1, stored, pageOf(stored)) === PutOutcome.Stored) stored++
    expect(stored).toBeGreaterThan(80)
    expect(store.failure).toMatchObject({ code: 'TMEM_IO', cause: { code: 'ENOSPC' } })
    for (let index = stored; index < 600; index++)
      expect(pool.put(1, index, pageOf(index))).toBe(PutOutcome.Unavailable)
    for (let index = 0; index < stored; index++) expect(await fetched(pool, 1, index)).toEqual(pageOf(index))
    pool.flushPage(1, 0)
    expect(countersOf(store)).toMatchObject({ abandoned: 0, live: stored - 1 })
    await store.close()
    const next = compose([spill({ file: join(disk, 'pages.spill'), sizeBytes: 2 ** 20 })])
    expect(countersOf(next)['left']).toBe(stored - 1)
    await next.close()
  } finally {
    execFileSync('umount', [disk])
  }
})
