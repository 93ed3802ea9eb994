/** Reports of commands as files: what is in them, and what they never write over. */
import { execFileSync } from 'node:child_process'
import { chmodSync, linkSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { temporaryDirectory, tmem } from './tmem.ts'

/** The data of a report. */
function dataOf(path: string): Record<string, unknown> {
  const html = readFileSync(path, 'utf8')
  const [, json] = /<script type="application\/json" id="data">(.*?)<\/script>/s.exec(html)!
  return JSON.parse(json!) as Record<string, unknown>
}

const models = ['bench', 'models', '--report']

describe('what is in a report', () => {
  test('bench: each row of the answer', async () => {
    const path = join(temporaryDirectory(), 'bench.html')
    const { code, stdout } = await tmem([...models, path, '--json'])
    expect(code).toBe(0)
    const { bench, machine, kind } = dataOf(path)
    expect(kind).toBe('bench')
    expect(bench).toMatchObject({ suite: 'models', quick: false, rows: JSON.parse(stdout).rows })
    expect(machine).toMatchObject({ node: process.version, arch: process.arch })
    // Nothing of it comes from elsewhere.
    const html = readFileSync(path, 'utf8')
    expect(html).not.toMatch(/<(?:script|link|img)[^>]*\s(?:src|href)=/)
    expect(html).not.toMatch(/@import|url\(/)
  })

  test('demo: each machine over time, as far as its figures at the end', async () => {
    const path = join(temporaryDirectory(), 'demo.html')
    const { code, stdout } = await tmem(['demo', '--size', '2MiB', '--report', path, '--json'])
    expect(code).toBe(0)
    const answer = JSON.parse(stdout)
    const { demo, curves } = dataOf(path) as {
      demo: object
      curves: {
        name: string
        swapIns: number[]
        swapOuts: number[]
        diskWrites: number[]
        done: number[]
        seconds: number[]
      }[]
    }
    expect(demo).toEqual(answer)
    expect(curves.map(({ name }) => name)).toEqual(['memory', 'tmem', 'swap'])
    for (const [n, curve] of curves.entries()) {
      expect(curve.done.at(-1)).toBe(1)
      expect(curve.swapIns.at(-1)).toBe(answer.machines[n].swapIns)
      expect(curve.swapOuts.at(-1)).toBe(answer.machines[n].swapOuts)
      expect(curve.diskWrites.at(-1)).toBe(answer.machines[n].diskWrites)
      expect(curve.seconds).toEqual([...curve.seconds].sort((a, b) => a - b))
    }
    expect(answer).not.toHaveProperty('curves')
  })

  test('explore: the mutant, and the rule kept while everybody takes the same turns', async () => {
    const path = join(temporaryDirectory(), 'explore.html')
    const { code, stdout } = await tmem(['explore', 'cow-fork-copies-pinned-pages', '--report', path, '--json'])
    expect(code).toBe(0)
    const answer = JSON.parse(stdout)
    const [rule] = dataOf(path)['explore'] as { name: string; kept: Side; broken: Side }[]
    expect(rule).toMatchObject({ name: answer.name, broken: { message: answer.broken.message } })
    expect(rule!.broken.history).toEqual(answer.broken.history)
    expect(rule!.kept.message).toBeNull()
    expect(rule!.kept.history[0]!.actor).toBe(rule!.broken.history[0]!.actor)
  })

  test('a file of somebody with markup in its words', async () => {
    const folder = temporaryDirectory()
    const file = join(folder, 'scenario.mjs')
    const label = '</script><script>globalThis.hit = 1</script>'
    writeFileSync(
      file,
      `export default { initial: () => ({}), actors: [{ name: '<b>A</b>', locals: {}, steps: [{ label: ${JSON.stringify(label)}, run: () => {} }] }] }`,
    )
    const path = join(folder, 'own.html')
    expect((await tmem(['explore', file, '--report', path])).code).toBe(0)
    const [own] = dataOf(path)['explore'] as { kept: Side; broken: null }[]
    expect(own).toMatchObject({ broken: null, kept: { actors: ['<b>A</b>'], history: [{ label }] } })
    expect(readFileSync(path, 'utf8')).not.toContain(label)
  })
})

interface Side {
  readonly message: string | null
  readonly history: readonly { readonly actor: number }[]
}

describe('what a report never writes over', () => {
  test('a report is written over, by whatever name it is opened', async () => {
    const folder = temporaryDirectory()
    const path = join(folder, 'a.html')
    expect((await tmem([...models, path])).code).toBe(0)
    writeFileSync(path, `${readFileSync(path, 'utf8')}${'x'.repeat(10_000)}`)
    symlinkSync(path, join(folder, 'b.html'))
    linkSync(path, join(folder, 'c.html'))
    for (const name of ['a.html', 'b.html', 'c.html'])
      expect((await tmem([...models, join(folder, name)])).code).toBe(0)
    expect(readFileSync(path, 'utf8')).toMatch(/<\/html>\n$/)
    expect(readdirSync(folder)).toEqual(['a.html', 'b.html', 'c.html'])
  })

  test('anything else is not, unless that is said', async () => {
    const path = join(temporaryDirectory(), 'thesis.html')
    for (const text of ['<!doctype html>\n<p>years of work</p>', '', '<!doctype html>\n<!-- a report of t']) {
      writeFileSync(path, text)
      const { code, stdout, stderr } = await tmem([...models, path])
      expect([code, stdout]).toEqual([2, ''])
      expect(stderr).toBe(
        `tmem: --report ${path}: the file exists and is not a report: name another file, or add --overwrite\n`,
      )
      expect(readFileSync(path, 'utf8')).toBe(text)
    }
    expect((await tmem([...models, path, '--overwrite'])).code).toBe(0)
    expect(dataOf(path)['kind']).toBe('bench')
  })

  test('no directory, no file, no place: one line each, and nothing is left', async () => {
    const folder = temporaryDirectory()
    execFileSync('mkfifo', [join(folder, 'pipe')])
    for (const [name, what] of [
      ['missing/a.html', 'does not exist: make it with mkdir -p'],
      ['.', 'cannot be opened'],
      ['pipe', 'is not a regular file'],
      ['../../../../dev/null', 'is not a regular file'],
    ] as const) {
      const path = name.startsWith('..') ? '/dev/null' : join(folder, name)
      const { code, stderr } = await tmem([...models, path, '--overwrite'])
      expect([name, code, stderr.split('\n').length]).toEqual([name, 2, 2])
      expect(stderr).toContain(what)
    }
    expect(readdirSync(folder)).toEqual(['pipe'])
  })

  test('where a file cannot be made, nothing is left of it', async (ctx) => {
    if (process.getuid?.() === 0) ctx.skip('root may write anywhere')
    const folder = temporaryDirectory()
    chmodSync(folder, 0o500)
    const { code, stderr } = await tmem([...models, join(folder, 'a.html')])
    expect(code).toBe(1)
    expect(stderr).toContain('cannot be written')
    expect(readdirSync(folder)).toEqual([])
  })

  test('options that belong together', async () => {
    const { code, stderr } = await tmem(['bench', 'models', '--overwrite'])
    expect([code, stderr]).toEqual([2, 'tmem: --overwrite needs --report FILE: give both, or neither\n'])
    expect((await tmem(['demo', '--remote', '--report', 'x.html'])).stderr).toContain('three machines')
    expect((await tmem(['explore', '--litmus', '--report', 'x.html'])).stderr).toContain('leave out --litmus')
  })
})
