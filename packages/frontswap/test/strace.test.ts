import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

/** What is traced: what marks the places in the log, writes, and syncs. */
const calls = 'trace=openat,access,faccessat,faccessat2,pwrite64,pwritev,fsync,fdatasync,sync_file_range'

test('the system sees that `sync` syncs the file, after all that was written', (ctx) => {
  const folder = mkdtempSync(join(tmpdir(), 'swap-strace-'))
  try {
    const file = join(folder, 'swap')
    const log = join(folder, 'log')
    const script = fileURLToPath(new URL('syncs.mjs', import.meta.url))
    const traced = spawnSync('strace', ['-f', '-y', '-o', log, '-e', calls, process.execPath, script, file], {
      encoding: 'utf8',
      timeout: 60_000,
    })
    if (traced.error !== undefined) return ctx.skip(`needs strace: ${traced.error.message}`)
    if (/ptrace/i.test(traced.stderr)) return ctx.skip(`needs a system that lets strace look: ${traced.stderr.trim()}`)
    expect(traced.stderr).toBe('')
    expect(traced.status).toBe(0)
    const lines = readFileSync(log, 'utf8').split('\n')
    const said = (what: string): number => lines.findIndex((line) => line.includes(`"${file}.${what}"`))
    // A call that another thread interrupts takes two lines: it has ended with the second.
    const between = (from: number, to: number): string[] => lines.slice(from, to)
    const put = said('put')
    const synced = said('synced')
    expect(put).toBeGreaterThan(-1)
    expect(synced).toBeGreaterThan(put)
    // The file was opened before it had its name, so the system knows that open file by a number in its folder.
    const isOfFile = (line: string): boolean => line.includes(`<${folder}/`)
    const writes = (line: string): boolean => line.includes('pwrite') && isOfFile(line)
    expect(between(0, put).filter(writes).length).toBeGreaterThan(0)
    const waited = between(put, synced)
    const begins = waited.findIndex((line) => /\bf(data)?sync\(/.test(line) && isOfFile(line))
    expect(begins).toBeGreaterThan(-1)
    expect(waited.slice(begins).some((line) => /sync.*= 0$/.test(line))).toBe(true)
    expect(waited.slice(begins).some(writes)).toBe(false)
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
})
