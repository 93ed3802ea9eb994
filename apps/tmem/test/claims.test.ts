/** `docs/claims.md`: a table that can be believed as far as it can be run. */
import { readFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { createBench, type MeasuredRow } from '../src/bench/frame.ts'
import { models } from '../src/bench/models.ts'
import { suites } from '../src/bench/suites.ts'
import { silentTerminal, tmem } from './tmem.ts'

const read = (path: string): string => readFileSync(new URL(`../../../${path}`, import.meta.url), 'utf8')
const rows = [...read('docs/claims.md').matchAll(/^\| (.*) \|$/gm)]
  .map(([, row]) => row!.split(' | '))
  .filter(([claim]) => claim !== 'claim')

test('every claim of the issue has one row: who said it, a command, what came of it, a verdict', () => {
  for (const row of rows) {
    expect(row).toHaveLength(4)
    expect(row[0]).toMatch(/(\(.*20(08|09|11)\))|the same/)
  }
  const all = rows.map(([claim]) => claim).join('\n')
  for (const word of ['hooks', 'descriptors', 'get_user_pages', '300 I/O', '10x', 'vmexit', 'three machines'])
    expect(all).toContain(word)
})

const measured = rows.filter(([, command]) => command !== 'none')
const open = rows.filter(([, command]) => command === 'none')

test.each(open)('not measured, and why: %s', (_claim, _command, found, verdict) => {
  expect(found).toMatch(/^not measured: .{20}/)
  expect(verdict).toBe('open')
})

test.each(measured)('a command that there is: %s', async (_claim, command, found) => {
  expect(found).not.toMatch(/not measured/)
  const [, words = ''] = /^`npm run -s tmem -- (.*?)`/.exec(command!) ?? []
  const [name, suite] = words.split(' ')
  expect((await tmem([name!, '--help'])).code).toBe(0)
  expect(name !== 'bench' || Object.hasOwn(suites, suite!)).toBe(true)
})

test('the figures of the models are those of the command', async () => {
  const counted = (await models.run(createBench(silentTerminal(), true))) as readonly MeasuredRow[]
  const found = rows.filter(([, command]) => command!.includes('bench models')).map(([, , cell]) => cell!)
  expect(found).toHaveLength(2)
  const against = (name: string): string => {
    const row = counted.find((one) => one.name === name)!
    return `${row.value} against ${row.reference_value}`
  }
  for (const load of ['cow-faults', 'reclaim', 'xip-sparse']) expect(found[0]).toContain(against(`hooks-${load}`))
  for (const load of ['fork', 'munmap', 'mprotect', 'mremap']) expect(found[0]).toContain(against(`hooks-${load}`))
  expect(found[0]).toContain(`a mixed load ${against('hooks-mixed')}`)
  const value = (name: string): MeasuredRow => counted.find((one) => one.name === `shared-image-${name}`)!
  expect(found[1]).toContain(`${value('descriptors').value} MiB`)
  expect(found[1]).toContain(`from ${value('guests-until-descriptors-exceed-it').value} guests on`)
  const { value: alone, reference_value: all } = value('page-tables-alone')
  expect(found[1]).toContain(`${alone} MiB instead of ${all} MiB`)
})

test('the three machines are those of the README', () => {
  const readme = read('README.md')
  const [, ...seconds] = /^time +([\d.]+) s +([\d.]+) s +([\d.]+) s$/m.exec(readme)!
  const [, , ...slower] = /^slowdown +([\d.]+) x +([\d.]+) x +([\d.]+) x$/m.exec(readme)!
  const cell = rows.find(([, command]) => command!.includes('demo'))!
  expect(cell[2]).toContain(`${seconds[0]} s, ${seconds[1]} s and ${seconds[2]} s: ${slower[0]} and ${slower[1]} times`)
  const percent = slower.map((times) => `${Math.round((Number(times) - 1) * 100)} %`)
  expect(cell[3]).toContain(`tmem costs ${percent[0]} where swap costs ${percent[1]}`)
})
