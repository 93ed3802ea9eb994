/**
 * What operators of zram and of NBD servers reported, tried on the program with real clients. What needs root is in
 * test/system.
 */
import { execFile } from 'node:child_process'
import { readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { type Serving, serving, servingIn } from './serving.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const run = promisify(execFile)
const needs = { commands: ['nbdsh'], paths: ['/usr/bin/python3'] }

/**
 * Runs a program of libnbd's Python (what `nbdsh` is), connected to a device as `h`, with random pages by number as
 * `page`.
 */
async function nbd({ folder }: Serving, device: string, program: string): Promise<string> {
  const before = `
import os, random, nbd
h = nbd.NBD()
def page(n, noise): return random.Random(n).randbytes(noise) + b'page %d ' % n * 600
h.connect_uri('nbd+unix:///${device}?socket=${folder}/nbd.sock')
`
  return (await run('/usr/bin/python3', ['-c', before + program])).stdout.trim()
}

interface Tree {
  readonly name: string
  readonly counters: Readonly<Record<string, number>>
  readonly children: readonly Tree[]
}

async function section({ control }: Serving, device: string, name: string): Promise<Readonly<Record<string, number>>> {
  const { devices } = JSON.parse((await tmem(['stat', '--json', '--control', control])).stdout) as { devices: Tree[] }
  return devices.find((one) => one.name === device)!.children.find((one) => one.name === name)!.counters
}

async function turn({ control }: Serving, device: string, ...words: string[]): Promise<string> {
  const { stdout, stderr } = await tmem(['knob', '--control', control, '--json', '--', device, ...words])
  return stderr === '' ? (JSON.parse(stdout) as Record<string, string>)[words[0]!]! : stderr.trimEnd()
}

test.for(['memory(limit=64MiB)', 'zcache(limit=64MiB)'])(
  'compact says what it did, and what is trimmed is memory again: %s',
  { timeout: 60_000 },
  async (place, ctx) => {
    requires(ctx, needs)
    const server = await serving(
      `${place} > frontswap(file="FOLDER/{name}.img",size={size})`,
      '--device',
      'name=a,size=64MiB',
    )
    const used = async (): Promise<number> => (await section(server, 'a', 'mm_stat'))['mem_used_total']! / 2 ** 20
    expect(await turn(server, 'a', 'compact', '1')).toBe('0 pages, 0 KiB given back')
    const empty = await used()
    await nbd(server, 'a', 'for n in range(14000): h.pwrite(os.urandom(4096), n * 4096)')
    const full = await used()
    expect(full).toBeGreaterThan(54)
    await nbd(server, 'a', 'h.trim(64 * 2**20, 0)')
    const [, pages, kibibytes] = /^(\d+) pages, (\d+) KiB given back$/.exec(await turn(server, 'a', 'compact', '1'))!
    expect(Number(pages)).toBe(0)
    // A chunk may be kept for the puts to come.
    const left = await used()
    expect(left).toBeLessThan(empty + 9)
    // What the server's background work has given back before counts for that.
    expect(Number(kibibytes) / 1024).toBeLessThanOrEqual(full - left + 1)
    expect(await server.stop()).toEqual({ code: 0, stderr: '' })
  },
)

test('hot pages are in memory, however many cold ones came first', { timeout: 120_000 }, async (ctx) => {
  requires(ctx, needs)
  const server = await serving(
    'zcache(limit=8MiB) > frontswap(file="FOLDER/{name}.img",size={size})',
    '--device',
    'name=a,size=128MiB',
  )
  // What was written first is coldest: all of it is in the file when it is read.
  await nbd(server, 'a', 'for n in range(20000): h.pwrite(page(n, 1800)[:4096], n * 4096)')
  const cold = (await section(server, 'a', 'slots'))['backing']
  expect(cold).toBeGreaterThan(12_000)
  const reads = async (): Promise<number> => (await section(server, 'a', 'bd_stat'))['bd_reads']!
  const round = 'assert all(h.pread(4096, n * 4096) == page(n, 1800)[:4096] for n in range(1000))'
  const rounds: number[] = []
  for (let n = 0; n < 6; n++) {
    const before = await reads()
    await nbd(server, 'a', round)
    rounds.push((await reads()) - before)
  }
  expect(rounds[0]).toBeGreaterThan(900)
  expect(rounds[5]).toBe(0)
  expect(await server.stop()).toEqual({ code: 0, stderr: '' })
})

test('each knob that is turned is said, by whom; and each refusal', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, needs)
  const server = await serving(
    'memory(limit=8MiB)',
    '--device',
    'name=a,size=1MiB',
    '--log',
    'json',
    '--log-level',
    'info',
  )
  expect(await turn(server, 'a', 'writeback_limit', '5')).toBe('5')
  expect(await turn(server, 'a', 'writeback_limit', 'off')).toBe('off')
  expect(await turn(server, 'a', 'writeback_limit', 'some')).toMatch(/expected a number, got some/)
  expect(await turn(server, 'a', 'writeback', 'idle')).toMatch(/needs a backing store/)
  const stats = JSON.parse((await tmem(['stat', '--json', '--control', server.control])).stdout) as { servers: Tree[] }
  expect(stats.servers.find(({ name }) => name === 'log')!.counters).toEqual({
    error: 0,
    warn: 1,
    info: 2,
    debug: 0,
    suppressed: 0,
    dropped: 0,
  })
  const { code, stderr } = await server.stop()
  expect(code).toBe(0)
  const [first, second, third, ...more] = stderr
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line) as object)
  const turned = {
    level: 'info',
    pid: server.info.pid,
    event: 'knob.turned',
    device: 'a',
    knob: 'writeback_limit',
    by_uid: process.getuid!(),
    through: 'the control socket',
  }
  expect(first).toMatchObject({ ...turned, value: '5', answer: '5' })
  expect(second).toMatchObject({ ...turned, value: 'off' })
  expect((second as { msg: string }).msg).toMatch(
    /^a: writeback_limit off by process \d+ of user \d+, through the control socket: off$/,
  )
  expect(third).toMatchObject({
    level: 'warn',
    event: 'request.refused',
    msg: expect.stringContaining('backing store'),
  })
  expect(more).toEqual([])
})

test('what holds pages or steers the server is its owner\u2019s alone, unless said otherwise', async () => {
  const folder = temporaryDirectory()
  const device = ['--device', 'name=a,size=1MiB,snapshot=FOLDER/a.raw', '--nbd', `unix:${folder}/open.sock,mode=666`]
  // Nothing is left to the mask that it is started with.
  const before = process.umask(0)
  const starting = servingIn(folder, 'memory(limit=8MiB) > frontswap(file=FOLDER/{name}.img,size={size})', ...device)
  process.umask(before)
  const server = await starting
  const modes = readdirSync(folder).map((name) => [name, (statSync(join(folder, name)).mode & 0o777).toString(8)])
  expect(Object.fromEntries(modes)).toEqual({
    'a.img': '600',
    'a.raw': '600',
    'control.sock': '600',
    'control.sock.record': '600',
    'nbd.sock': '600',
    'open.sock': '666',
  })
  expect(server.info.nbd).toEqual([`unix:${folder}/nbd.sock`, `unix:${folder}/open.sock`])
  expect(await server.stop()).toEqual({ code: 0, stderr: '' })
})
