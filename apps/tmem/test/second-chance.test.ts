/** A second chance that is larger than memory and outlives the process: page cache, zcache, spill. */
import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, onTestFinished, test } from 'vitest'

interface Answer {
  readonly report: readonly { readonly pages: number; readonly fromFiles: number }[]
  readonly chain: Readonly<Record<string, number>>
  readonly zcache: Readonly<Record<string, number>>
  readonly moves: Readonly<Record<string, number>>
  readonly spill: Readonly<Record<string, number>>
}

const script = fileURLToPath(new URL('second-chance-process.mjs', import.meta.url))

function run(folder: string, spill: string, rounds: number, end: 'closed' | 'drained' | 'killed'): Promise<Answer> {
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, [script, folder, spill, String(rounds), end])
    let out = ''
    let problem = ''
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      out += text
    })
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      problem += text
    })
    child.on('error', reject)
    child.on('close', (code, signal) => {
      if (end === 'killed' ? signal === 'SIGKILL' : code === 0) resolve(JSON.parse(out) as Answer)
      else reject(new Error(`the process ended with ${code ?? signal}: ${problem}`))
    })
  })
}

/** Files of 6 MiB in all, that shrink to about half: six times what the memory of both levels holds. */
function prepare(): { folder: string; spill: string } {
  const root = mkdtempSync(join(tmpdir(), 'tmem-second-chance-'))
  onTestFinished(() => rmSync(root, { recursive: true }))
  const folder = mkdtempSync(join(root, 'files-'))
  let state = 1
  for (let file = 0; file < 24; file++) {
    const bytes = Buffer.alloc(64 * 4096)
    for (let at = 0; at < bytes.length; at++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0
      bytes[at] = at % 128 < 64 ? state >>> 24 : file
    }
    writeFileSync(join(folder, `file${file}`), bytes)
  }
  return { folder, spill: join(root, 'pages.spill') }
}

/** Files whose change time can be told from any later one. */
const settle = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 50))

test('a working set larger than zcache is answered from the spill, also after the process has ended', {
  timeout: 60_000,
}, async () => {
  const { folder, spill } = prepare()
  await settle()
  const first = await run(folder, spill, 2, 'drained')
  const [cold, warm] = first.report
  expect(cold).toEqual({ pages: 1536, fromFiles: 1536 })
  // Of what it gave up, zcache lost nothing.
  expect(warm!.fromFiles).toBe(0)
  expect(first.moves).toMatchObject({ dropped_ephemeral: 0, corrupt: 0 })
  expect(first.moves['passed_down']).toBeGreaterThan(1000)
  expect(first.zcache['pages']).toBeLessThan(600)
  // In many pages at once, and none was compressed a second time.
  expect(first.spill['ring_writes']! * 8).toBeLessThan(first.spill['written']!)
  expect(first.chain).toMatchObject({ encoded_again: 0, decoded_to_move: 0 })
  // Everything was passed down before the end: the next process reads no file at all.
  const second = await run(folder, spill, 1, 'closed')
  expect(second.spill['recovered']).toBe(1536)
  expect(second.report).toEqual([{ pages: 1536, fromFiles: 0 }])
  // What was in memory when that one was closed is gone; the rest is there, also for one that is killed, and its heir.
  const inMemory = second.zcache['pages']! + 64
  for (const end of ['killed', 'closed'] as const) {
    const { report, spill: counters } = await run(folder, spill, 1, end)
    expect(counters['recovered']).toBeGreaterThanOrEqual(1536 - inMemory)
    expect(report[0]!.fromFiles).toBe(1536 - counters['recovered']!)
    expect(report[0]!.fromFiles).toBeGreaterThan(0)
  }
})
