/**
 * What operators reported and what needs root: a control group that is too small, refusals through the files of a
 * mount, copies of a device. All of it lies in one directory and one control group, and is undone also when a test
 * fails.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, rmdirSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'

const bin = fileURLToPath(new URL('../../dist/bin.js', import.meta.url))
const folder = '/var/tmp/tmem-test-operators'
const mount = join(folder, 'mount')
const memory = '/sys/fs/cgroup/memory'
const group = join(memory, 'tmem-test-operators')
const needs = { root: true, paths: ['/dev/fuse'] }
const grouped = { ...needs, paths: [...needs.paths, join(memory, 'memory.limit_in_bytes')] }
const running = new Set<ChildProcess>()

const isMounted = (): boolean => readFileSync('/proc/self/mounts', 'utf8').includes(` ${mount} `)

async function sweep(): Promise<void> {
  for (const child of running) child.kill('SIGKILL')
  for (let tries = 0; running.size > 0 && tries < 50; tries++) await setTimeout(100)
  if (isMounted()) spawnSync('umount', ['-l', mount], { timeout: 60_000 })
  for (let tries = 0; existsSync(group) && tries < 50; tries++) {
    try {
      rmdirSync(group)
    } catch {
      // A process that was killed, or its own group, has not gone yet.
      await setTimeout(100)
    }
  }
  rmSync(folder, { recursive: true, force: true })
}

beforeEach(async () => {
  await sweep()
  mkdirSync(mount, { recursive: true })
})
afterEach(sweep)

/** Runs a program, for a minute at most: never in this thread, which may be waited for. */
async function run(
  command: string,
  ...words: string[]
): Promise<{ code: number | null; stdout: string; stderr: string }> {
  const child = spawn(command, words, { timeout: 60_000, env: { ...process.env, LC_ALL: 'C' } })
  const said = { stdout: '', stderr: '' }
  for (const name of ['stdout', 'stderr'] as const)
    child[name].setEncoding('utf8').on('data', (text: string) => {
      said[name] += text
    })
  const code = await new Promise<number | null>((resolve) => child.once('close', resolve))
  return { code, ...said }
}

interface Server {
  readonly child: ChildProcess
  readonly notes: () => string
  readonly ended: Promise<number | null>
  readonly ready: Promise<string>
}

/** Starts `tmem serve` with files, in the control group if there is one. */
function serve(stack: string, ...words: string[]): Server {
  const line = [bin, 'serve', '--stack', stack, '--device', 'name=a,size=64MiB', '--fuse', mount, '--json']
  line.push('--control', join(folder, 'control.sock'), ...words)
  const script = existsSync(group) ? `echo $$ > ${group}/cgroup.procs && exec "$@"` : 'exec "$@"'
  const child = spawn('sh', ['-c', script, 'sh', process.execPath, ...line], { stdio: ['ignore', 'pipe', 'pipe'] })
  running.add(child)
  let notes = ''
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    notes += text
  })
  const ended = new Promise<number | null>((resolve) => {
    child.once('close', (code) => {
      running.delete(child)
      resolve(code)
    })
  })
  const ready = new Promise<string>((resolve) => child.stdout.setEncoding('utf8').once('data', resolve))
  return { child, notes: () => notes, ended, ready }
}

async function started(server: Server): Promise<void> {
  const first = await Promise.race([server.ready, server.ended])
  if (typeof first !== 'string') throw new Error(`it ended with ${first}: ${server.notes()}`)
}

test('a control group that is too small is said in one line, and nothing is begun', async (ctx) => {
  requires(ctx, grouped)
  mkdirSync(group)
  writeFileSync(join(group, 'memory.limit_in_bytes'), `${150 * 2 ** 20}`)
  const server = serve(`zcache(limit=100MiB) > frontswap(file=${folder}/{name}.img,size={size})`)
  expect(await server.ended).toBe(1)
  expect(server.notes()).toMatch(
    /^tmem: the stacks may take \d+MiB of memory, but the control group \/tmem-test-operators, whose limit is 150MiB, can spare \d+MiB now: set smaller limits\n$/,
  )
  expect(isMounted()).toBe(false)
  expect(existsSync(join(folder, 'a.img'))).toBe(false)
})

test('in a control group that is large enough it serves all that it was given', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, grouped)
  mkdirSync(group)
  writeFileSync(join(group, 'memory.limit_in_bytes'), `${300 * 2 ** 20}`)
  const server = serve('memory(limit=80MiB)')
  await started(server)
  for (let round = 0; round < 3; round++) {
    const written = await run(
      'dd',
      'if=/dev/urandom',
      `of=${mount}/a`,
      'bs=64k',
      'count=1024',
      'conv=notrunc',
      'oflag=direct',
    )
    expect(written).toMatchObject({ code: 0 })
  }
  expect((await run('cat', join(mount, 'stats', 'a', 'slots', 'uncompressed'))).stdout).toBe('16384\n')
  server.child.kill('SIGTERM')
  expect(await server.ended).toBe(0)
})

test('what is refused through the mount is refused with its reason, and said with who asked', async (ctx) => {
  requires(ctx, needs)
  const server = serve('memory(limit=80MiB)', '--log-level', 'debug')
  await started(server)
  const turn = async (knob: string, value: string): Promise<string> => {
    const { code, stderr } = await run(
      'sh',
      '-c',
      `printf '%s' '${value}' | dd of=${mount}/knobs/a/${knob} conv=notrunc`,
    )
    return code === 0 ? 'done' : stderr.split('\n')[0]!.split(': ').at(-1)!
  }
  const user = spawn('sh', ['-c', `exec sleep 60 < ${mount}/a`], { stdio: 'ignore' })
  running.add(user)
  user.once('close', () => running.delete(user))
  for (let tries = 0; (await turn('reset', '1')) === 'done' && tries < 50; tries++) await setTimeout(100)
  for (const [knob, value, answer] of [
    ['reset', '1', 'Device or resource busy'],
    ['disksize', '32MiB', 'Device or resource busy'],
    ['disksize', '1GiB', 'Invalid argument'],
    ['reset', '0', 'Invalid argument'],
    ['idle', 'some', 'Invalid argument'],
    ['writeback', 'huge', 'Operation not supported'],
    ['mem_used_max', '0', 'done'],
  ])
    expect([knob, value, await turn(knob!, value!)]).toEqual([knob, value, answer])
  user.kill()
  await new Promise((resolve) => user.once('close', resolve))
  expect(await turn('reset', '1')).toBe('done')
  server.child.kill('SIGTERM')
  expect(await server.ended).toBe(0)
  const lines = server
    .notes()
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line) as Record<string, unknown>)
  const turned = lines.filter(({ event }) => event === 'knob.turned')
  expect(turned.at(-2)).toMatchObject({ knob: 'mem_used_max', value: '0', through: 'the mount', by_uid: 0 })
  expect(Number(turned.at(-1)!['by_pid'])).toBeGreaterThan(1)
  const refused = lines.filter(({ event, level }) => event === 'request.refused' && level === 'warn')
  expect(refused.map(({ msg }) => msg)).toContainEqual(expect.stringMatching(/^a is in use: 1 open files$/))
})

test('a mount is its owner’s alone, and its devices are copied with their holes', async (ctx) => {
  requires(ctx, { ...needs, commands: ['setpriv'] })
  const server = serve('memory(limit=80MiB)')
  await started(server)
  const modes = await run('stat', '-c', '%a %U', ...['', '/a', '/stats', '/knobs/a/reset'].map((path) => mount + path))
  expect(modes.stdout).toBe('500 root\n600 root\n500 root\n600 root\n')
  const stranger = await run('setpriv', '--reuid=65534', '--clear-groups', 'cat', join(mount, 'knobs', 'a', 'disksize'))
  expect(stranger).toMatchObject({ code: 1, stderr: expect.stringContaining('Permission denied') })
  const copy = join(folder, 'copy')
  expect(await run('cp', '--sparse=auto', join(mount, 'a'), copy)).toMatchObject({ code: 0, stderr: '' })
  expect([statSync(copy).size, statSync(copy).blocks]).toEqual([64 * 2 ** 20, 0])
  await run('dd', 'if=/dev/urandom', `of=${mount}/a`, 'bs=4k', 'count=3', 'seek=100', 'conv=notrunc')
  expect(await run('cp', '--sparse=auto', join(mount, 'a'), copy)).toMatchObject({ code: 0, stderr: '' })
  expect((await run('cmp', join(mount, 'a'), copy)).code).toBe(0)
  expect(statSync(copy).blocks).toBe(24)
  server.child.kill('SIGTERM')
  expect(await server.ended).toBe(0)
})
