import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { z } from 'zod'
import { temporaryDirectory, tmem } from './tmem.ts'

const commands =
  'demo bench explore simulate stack serve up down status config install-unit stat explain top knob swap doctor help completion'.split(
    ' ',
  )

describe('help', () => {
  test('lists every command, and each has its own', async () => {
    const help = await tmem(['--help'])
    expect(help).toMatchObject({ code: 0, stderr: '' })
    for (const command of commands) expect(help.stdout).toMatch(new RegExp(`^ {2}${command} `, 'm'))
    for (const command of commands) {
      const own = await tmem([command, '--help'])
      expect(own).toMatchObject({ code: 0, stderr: '' })
      expect(own.stdout).toContain(`Usage: tmem ${command}`)
      expect(own.stdout).toContain('--json')
    }
  })

  test('--version prints the version of the package', async () => {
    const { version } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8'))
    expect(await tmem(['--version'])).toEqual({ code: 0, stdout: `${version}\n`, stderr: '' })
  })
})

describe('bad usage ends with exit code 2 and one line', () => {
  const exactly = (message: string): RegExp =>
    new RegExp(`^tmem: ${message.replaceAll(/[.*+?^${}()|[\]\\]/g, '\\$&')}\n$`)

  test.each([
    [[], 'name a command; tmem --help lists them'],
    [['dmo'], "unknown command 'dmo' (Did you mean demo?)"],
    [['demo', '--sise', '1'], "unknown option '--sise' (Did you mean --size?)"],
    [['demo', 'extra'], "too many arguments for 'demo'. Expected 0 arguments but got 1."],
    [['demo', '--size'], "option '--size <bytes>' argument missing"],
    [
      ['demo', '--size', 'big'],
      "option '--size <bytes>' argument 'big' is invalid. Expected an amount of bytes such as 64MiB, 1GiB or 65536.",
    ],
    [
      ['demo', '--seed', '-1'],
      "option '--seed <number>' argument '-1' is invalid. Expected an integer from 0 to 4294967295.",
    ],
    [['bench'], "missing required argument 'suite'"],
    [
      ['bench', 'cor'],
      /^tmem: command-argument value 'cor' is invalid for argument 'suite'\. Allowed choices are (\w+, )+zcache, stack\.\n$/,
    ],
    [['explore', 'x', '--list'], 'give a name or --list, not both'],
    [
      ['explore', '--states', '0'],
      /^tmem: option '--states <number>' argument '0' is invalid\. Expected an integer from 1/,
    ],
    [
      ['explore', 'nothing-like-it'],
      /^tmem: no scenario "nothing-like-it"; nearest: .*; tmem explore --list shows all\n$/,
    ],
    [['simulate', '--history', '3'], '--history needs the --seed of the history: give both'],
    [['simulate', '--seed', '1', '--history', '3', '--seconds', '1'], 'give --history or --seconds, not both'],
    [['simulate', '--seed', '1', '--trace'], '--trace prints one history: give --seed and --history, without --json'],
    [['stack', 'memory', '--file', 'x'], 'give the text of a stack or --file, not both'],
    [['stack', '--file', '/nowhere/stack.yaml'], /^tmem: cannot read the stack in \/nowhere\/stack.yaml: ENOENT/],
    [
      ['stack', 'zcahe(limit=1MiB)'],
      /^tmem: bad stack at column 1: no layer is named "zcahe"; did you mean zcache\? .* \(TMEM_BAD_STACK_TEXT\)\n$/,
    ],
    [
      ['stack', 'frontswap(file=a,size=1MiB) > memory(limit=1MiB)'],
      /^tmem: memory cannot stand below a place that waits: memory comes first \(TMEM_BAD_STACK\)\n$/,
    ],
  ])('tmem %j', async (words, message) => {
    const { code, stdout, stderr } = await tmem(words)
    expect({ code, stdout, lines: stderr.split('\n').length }).toEqual({ code: 2, stdout: '', lines: 2 })
    expect(stderr).toMatch(typeof message === 'string' ? exactly(message) : message)
  })
})

describe('tmem stack', () => {
  test('lists the layers with their options', async () => {
    const { code, stdout } = await tmem(['stack', '--json'])
    const option = z.object({ kind: z.enum(['bytes', 'integer', 'number', 'text', 'flag']), summary: z.string() })
    const layer = z.object({ name: z.string(), summary: z.string(), options: z.record(z.string(), option) })
    const { layers } = z.object({ layers: z.array(layer) }).parse(JSON.parse(stdout))
    expect(code).toBe(0)
    const names = ['memory', 'zcache', 'frontswap', 'spill', 'ramster', 'seal', 'vram']
    expect(layers.map(({ name }) => name)).toEqual(names)
    const list = await tmem(['stack'])
    for (const { name, options } of layers) {
      expect(list.stdout).toContain(`${name}: `)
      for (const known of Object.keys(options)) expect(list.stdout).toContain(`  ${known}=`)
    }
  })

  test('says what a stack can do, from text and from YAML', async () => {
    const text = 'zcache(limit=64MiB) > frontswap(file=/nowhere/swap.img,size=1GiB)'
    const spoken = await tmem(['stack', text])
    expect(spoken).toMatchObject({ code: 0, stderr: '' })
    expect(spoken.stdout).toContain('room that is sure: 1GiB')
    const fromText = await tmem(['stack', text, '--json'])
    expect(JSON.parse(fromText.stdout)).toMatchObject({
      stack: ['zcache', 'frontswap'],
      capabilities: { persistent: true, deferred: true, reservedBytes: 2 ** 30 },
    })
    const file = join(temporaryDirectory(), 'stack.yaml')
    writeFileSync(file, '- zcache: {limit: 64MiB}\n- frontswap:\n    file: /nowhere/swap.img\n    size: 1GiB\n')
    expect(await tmem(['stack', '--file', file, '--json'])).toEqual(fromText)
    writeFileSync(file, '- zcache: {limit: 64MiB\n')
    const broken = await tmem(['stack', '--file', file])
    expect(broken).toMatchObject({ code: 2, stdout: '' })
    expect(broken.stderr).toMatch(/^tmem: .*stack.yaml is not YAML: .*line 2.*\n$/)
  })
})

describe('tmem explore', () => {
  test('lists the rules, all of whose mutants are caught, and shows one as a chart', { timeout: 60_000 }, async () => {
    const rule = z.strictObject({
      name: z.string(),
      rule: z.string(),
      source: z.string(),
      version: z.string().regex(/^\d+\.\d+/),
      states: z.number().int().positive(),
      mutantCaught: z.literal(true),
      bounded: z.literal(false),
    })
    const listed = await tmem(['explore', '--list', '--json'])
    expect(listed).toMatchObject({ code: 0, stderr: expect.stringMatching(/^exploring: \d+ rules\n$/) })
    const { scenarios } = z.strictObject({ scenarios: z.array(rule).nonempty() }).parse(JSON.parse(listed.stdout))
    const [{ name, rule: text }] = scenarios
    const shown = await tmem(['explore', name])
    expect(shown).toMatchObject({ code: 0, stderr: '' })
    expect(shown.stdout).toContain(`${name}: ${text}\n`)
    expect(shown.stdout).toMatch(/^ *1 \| /m)
    const one = await tmem(['explore', name, '--json'])
    expect(JSON.parse(one.stdout)).toMatchObject({
      ...scenarios[0],
      kept: { kind: 'holds' },
      broken: { kind: 'violated' },
    })
  })
})
