/** `tmem explain` and `tmem top` on a server that real clients use. */
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { stripVTControlCharacters } from 'node:util'
import { expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { type Interval, textOf } from '../src/serve/top.ts'
import { bin, type Serving, serving } from './serving.ts'
import { tmem } from './tmem.ts'

const needs = { commands: ['nbdsh'], paths: ['/usr/bin/python3'] }
const stack = 'zcache(limit=1MiB) > frontswap(file="FOLDER/{name}.img",size=8MiB)'
const device = ['--device', 'name=a,size=4MiB']

function nbd({ folder }: Serving, program: string): void {
  const before = `
import nbd, random
h = nbd.NBD()
h.connect_uri('nbd+unix:///a?socket=${folder}/nbd.sock')
`
  execFileSync('/usr/bin/python3', ['-c', before + program])
}

interface Explained {
  readonly slot: number
  readonly state: string
  readonly place: string | null
  readonly placeNumber: number | null
  readonly bytes: number
  readonly codec: number | null
  readonly codecName: string | null
  readonly flags: string
  readonly ageSeconds: number | null
}

const explained = async ({ control }: Serving, offset: number | string): Promise<Explained> => {
  const { stdout, stderr } = await tmem(['explain', 'a', String(offset), '--control', control, '--json'])
  expect(stderr).toBe('')
  return JSON.parse(stdout) as Explained
}

test('explain says where each page is, in which form, and that looking does not change it', async (ctx) => {
  requires(ctx, needs)
  const server = await serving(stack, ...device)
  nbd(
    server,
    "h.pwrite(b'text of a page. ' * 256, 0)\nh.pwrite(b'\\7' * 4096, 4096)\nh.pwrite(random.Random(1).randbytes(4096), 8192)",
  )
  const text = await explained(server, 17)
  expect(text).toMatchObject({ slot: 0, state: 'held', place: 'zcache', placeNumber: 0, codecName: 'lz4', flags: '' })
  expect(text.bytes).toBeGreaterThan(0)
  expect(text.bytes).toBeLessThan(1024)
  expect(text.ageSeconds).toBeGreaterThanOrEqual(0)
  expect(await explained(server, '4KiB')).toMatchObject({ slot: 1, state: 'same', place: null, bytes: 0, flags: 's' })
  expect(await explained(server, 8192)).toMatchObject({
    state: 'held',
    bytes: 4096,
    codec: 0,
    codecName: null,
    flags: 'h',
  })
  expect(await explained(server, 4194303)).toMatchObject({ slot: 1023, state: 'empty', place: null, ageSeconds: null })
  await tmem(['knob', 'a', 'writeback', 'page_index=0', '--control', server.control])
  expect(await explained(server, 0)).toMatchObject({ place: 'frontswap', placeNumber: 1, codec: null, flags: 'w' })
  const shown = await tmem(['explain', 'a', '0', '--control', server.control])
  expect(shown.stdout).toMatch(/^place {2,}frontswap, number 2 from the top$/m)
  expect(shown.stdout).toMatch(/^flags {2,}w \(in a place that waits\)$/m)
  const moves = shown.stdout.split('\n').filter((line) => /^moves |^ /.test(line))
  expect(moves).toEqual([
    expect.stringMatching(/^moves {2,}[\d.]+ seconds ago: sank from zcache to frontswap$/),
    expect.stringMatching(/^ {2,}no other in the last [\d.]+ seconds, which is all that is recorded$/),
  ])
  // Had it counted as use, the page would have risen.
  expect(await explained(server, 0)).toMatchObject({ place: 'frontswap' })
  expect((await server.stop()).code).toBe(0)
})

test('explain tells mistakes in a line', async () => {
  const server = await serving(stack, ...device)
  const said = async (...words: string[]): Promise<unknown> => {
    const { code, stderr } = await tmem(['explain', ...words, '--control', server.control])
    return [code, stderr]
  }
  expect(await said('a', '4MiB')).toEqual([
    1,
    expect.stringMatching(/: a has bytes 0 to 4194303, got offset 4194304\n$/),
  ])
  expect(await said('b', '0')).toEqual([1, expect.stringMatching(/: there is no device b; there is a\n$/)])
  expect(await said('a', 'x')).toEqual([2, expect.stringMatching(/^tmem: .*Expected an amount of bytes[^\n]*\n$/)])
  expect((await server.stop()).code).toBe(0)
})

test('top shows what was done in an interval, what is waited for first', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, needs)
  const server = await serving(stack, '--device', 'name=idle,size=1MiB', '--device', 'name=a,size=4MiB')
  const look = ['top', '--once', '--interval', '2', '--control', server.control]
  const watching = tmem([...look, '--json'])
  nbd(
    server,
    'import time\nend = time.time() + 3\nwhile time.time() < end:\n  for n in range(600): h.pwrite(random.Random(n).randbytes(2000) + bytes(2096), n * 4096)\n  for n in range(600): h.pread(4096, n * 4096)',
  )
  const { code, stdout, stderr } = await watching
  expect([code, stderr]).toEqual([0, ''])
  const interval = JSON.parse(stdout) as Interval
  expect(interval.devices.map(({ device }) => device)).toEqual(['a', 'idle'])
  const [a, idle] = interval.devices
  expect(a!.writes).toBeGreaterThan(0)
  expect(a!.reads).toBeGreaterThan(0)
  expect(a!.waitMs).toBeGreaterThan(0)
  expect(a!.p99Ms).toBeGreaterThan(0)
  expect(idle).toMatchObject({ waitMs: 0, reads: 0, writes: 0, p99Ms: null, pages: 0 })
  const [file, compressed] = interval.places.filter(({ device }) => device === 'a')
  expect([file!.place, compressed!.place]).toEqual(['frontswap', 'zcache'])
  expect(file!.sunk).toBeGreaterThan(0)
  expect(compressed!.put).toBeGreaterThan(0)
  expect(textOf(interval)).toMatch(/^a +\d+\.\dms +\d+ +\d+ /m)
  expect((await server.stop()).code).toBe(0)
})

test('top into a pipe prints each interval in lines, without a code for the screen, and ends with a signal', async () => {
  const server = await serving(stack, ...device)
  const { code, stdout } = await tmem(['top', '--interval', '0.1', '--control', server.control], {
    during: (running) =>
      new Promise((resolve) => {
        let text = ''
        running.stdout.on('data', (part: string) => {
          text += part
          if (text.split('move p99').length < 4) return
          running.kill('SIGINT')
          resolve()
        })
      }),
  })
  expect(code).toBe(130)
  expect(stdout).not.toContain('\u001b')
  expect((await server.stop()).code).toBe(0)
})

test.each([['0'], ['x'], ['4000'], ['-1']])('top --interval %s', async (interval) => {
  const { code, stderr } = await tmem(['top', `--interval=${interval}`])
  expect([code, stderr]).toEqual([
    2,
    expect.stringMatching(
      /^tmem: option '--interval <seconds>' argument '[^']*' is invalid\. Expected seconds from 0\.1 to 3600\.\n$/,
    ),
  ])
})

test('top on a terminal draws the screen anew in place', async (ctx) => {
  requires(ctx, { commands: ['script'] })
  const server = await serving(stack, ...device)
  const words = [process.execPath, bin, 'top', '--interval', '0.1', '--control', server.control]
  const top = words.map((word) => `'${word}'`).join(' ')
  // It ends with the signal that a person's Ctrl-C is.
  const child = spawn('script', ['-qec', `stty rows 20 cols 60; ${top}`, '/dev/null'], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  let shown = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    const before = shown
    shown += text
    const draws = (all: string): number => all.split('\u001b[H').length - 1
    if (draws(before) < 3 && draws(shown) >= 3) child.stdin.write('\u0003')
  })
  await once(child, 'close')
  expect(shown).toContain('tmem top: process ')
  expect(shown.split('\u001b[2J')).toHaveLength(2)
  const [, , second] = shown.split('\u001b[H')
  const lines = second!.split('\u001b[J')[0]!.split('\r\n')
  expect(lines.length).toBeLessThan(20)
  for (const line of lines) expect(stripVTControlCharacters(line).length).toBeLessThanOrEqual(60)
  expect((await server.stop()).code).toBe(0)
})
