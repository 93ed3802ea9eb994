/**
 * This host's kernel really swaps to a device of `tmem serve`: its file, a loop device, and a program in a control
 * group with 64 MiB that uses 200 MiB and verifies them; or stress-ng. All of it lies in one directory and one control
 * group (what the README says lies where it says), and is undone also when a test fails, and before the first test, in
 * case that a run before was killed.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmdirSync, rmSync, statfsSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { compileHog } from '@tmem/guest'
import { afterEach, beforeAll, describe, expect, test, vi } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { ask } from '../../src/serve/control.ts'
import { tmem } from '../tmem.ts'
import { type Served, served } from './served.ts'

const bin = fileURLToPath(new URL('../../dist/bin.js', import.meta.url))
const folder = '/var/tmp/tmem-test-swap'
const mount = join(folder, 'mount')
const control = join(folder, 'control.sock')
const group = '/sys/fs/cgroup/memory/tmem-test-swap'
const needs = {
  root: true,
  commands: ['cc', 'losetup', 'mkswap', 'swapon', 'swapoff'],
  paths: ['/dev/fuse', '/dev/loop-control', '/sys/fs/cgroup/memory/memory.limit_in_bytes'],
}
const running = new Set<ChildProcess>()
/** Of servers that ran: others run on this host. */
const groups = new Set<string>()

/** Loop devices over files of the mount. */
const loops = (): string[] =>
  readdirSync('/sys/block').filter((name) => {
    const note = `/sys/block/${name}/loop/backing_file`
    return existsSync(note) && readFileSync(note, 'utf8').startsWith(mount)
  })
const swapping = (): boolean => {
  const swaps = readFileSync('/proc/swaps', 'utf8')
  return loops().some((name) => swaps.includes(`/dev/${name} `))
}
const traces = (): object => ({
  loops: loops(),
  mounted: readFileSync('/proc/self/mounts', 'utf8').includes(mount),
  group: existsSync(group),
  groups: [...groups].filter((path) => existsSync(path)),
  folder: existsSync(folder),
})
const clean = { loops: [], mounted: false, group: false, groups: [], folder: false }

/** Undoes whatever is there, in the order in which it can be undone. Each step is bounded. */
async function sweep(): Promise<void> {
  const tool = (command: string, ...words: string[]): void => {
    spawnSync(command, words, { timeout: 60_000, stdio: 'ignore' })
  }
  const pids = existsSync(join(group, 'cgroup.procs'))
    ? readFileSync(join(group, 'cgroup.procs'), 'utf8').split('\n')
    : []
  for (const pid of pids) if (pid !== '') process.kill(Number(pid), 'SIGKILL')
  for (const name of loops()) {
    tool('swapoff', `/dev/${name}`)
    tool('umount', `/dev/${name}`)
    tool('losetup', '-d', `/dev/${name}`)
  }
  for (const child of running) child.kill('SIGTERM')
  for (let tries = 0; running.size > 0 && tries < 50; tries++) await setTimeout(100)
  for (const child of running) child.kill('SIGKILL')
  if (readFileSync('/proc/self/mounts', 'utf8').includes(mount)) tool('umount', '-l', mount)
  for (let tries = 0; existsSync(group) && tries < 50; tries++) {
    try {
      rmdirSync(group)
    } catch {
      // A process that was killed has not gone yet.
      await setTimeout(100)
    }
  }
  for (const path of groups) if (existsSync(path)) rmdirSync(path)
  rmSync(folder, { recursive: true, force: true })
}

/** Starts `tmem serve` and waits until it serves. */
async function serve(...words: string[]): Promise<Served> {
  // What a killed server has left answers ENOTCONN to everything, and is for the next server to take away.
  if (!readFileSync('/proc/self/mounts', 'utf8').includes(mount)) mkdirSync(mount, { recursive: true })
  const stack = `zcache(limit=64MiB,zvMaxZsize=2048) > frontswap(file=${folder}/{name}.img,size={size})`
  const own = ['--stack', stack, '--device', 'name=swap0,size=256MiB', '--fuse', mount, '--control', control]
  const server = await served(running, ...own, ...words)
  groups.add(`/sys/fs/cgroup/memory/tmem-serve-${server.child.pid}`)
  expect(server.info).toMatchObject({ pid: server.child.pid, fuse: mount })
  return server
}

/** Starts the program that uses too much memory, in its control group. */
function startHog(
  mebibytes: number,
  rounds: number,
): { child: ChildProcess; ended: Promise<{ code: number | null; output: string }> } {
  const program = join(folder, 'hog')
  compileHog(program)
  mkdirSync(group)
  writeFileSync(join(group, 'memory.limit_in_bytes'), '64M')
  const script = `echo $$ > ${group}/cgroup.procs && exec timeout -s KILL 120 ${program} ${mebibytes} ${rounds}`
  const child = spawn('sh', ['-c', script], { stdio: ['ignore', 'pipe', 'inherit'] })
  running.add(child)
  let output = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    output += text
  })
  const ended = new Promise<{ code: number | null; output: string }>((resolve) => {
    child.once('close', (code) => {
      running.delete(child)
      resolve({ code, output })
    })
  })
  return { child, ended }
}

const json = async (...words: string[]) => {
  const { code, stdout, stderr } = await tmem([...words, '--control', control, '--json'])
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
  return JSON.parse(stdout)
}

const swapped = (): { readonly ins: number; readonly outs: number } => {
  const text = readFileSync('/proc/vmstat', 'utf8')
  const of = (name: string): number => Number(new RegExp(`^${name} (\\d+)$`, 'm').exec(text)![1])
  return { ins: of('pswpin'), outs: of('pswpout') }
}

describe('swap to a file of the mount', { timeout: 180_000 }, () => {
  beforeAll(sweep)
  afterEach(sweep)

  test('every byte comes back, the statistics add up, and in use it is not stopped', async (ctx) => {
    requires(ctx, needs)
    const { child, notes, ended } = await serve()
    // The memory for pages and tables is there before anybody swaps.
    const resident = /^RssAnon:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${child.pid}/status`, 'utf8'))![1]
    expect(Number(resident)).toBeGreaterThan(90 * 1024)
    expect(await json('swap', 'on')).toMatchObject({ devices: [{ device: 'swap0', swap: { priority: 100 } }] })
    const again = await tmem(['swap', 'on', 'swap0', '--control', control])
    expect(again).toMatchObject({ code: 1, stderr: 'tmem: swap0 is active swap already\n' })
    const before = swapped()
    const hog = await startHog(200, 2).ended
    expect(hog).toEqual({ code: 0, output: '51200 pages, 0 wrong\n' })
    const after = swapped()
    // 136 MiB do not fit, once while filling and again in each round.
    expect(after.outs - before.outs).toBeGreaterThan(136 * 256)
    expect(after.ins - before.ins).toBeGreaterThan(136 * 256)

    const { devices } = await json('stat')
    const [{ counters, children }] = devices
    const slots = children.find((one: { name: string }) => one.name === 'slots').counters
    expect(counters).toMatchObject({ failed_reads: 0, failed_writes: 0, invalid_io: 0, disksize: 2 ** 28 })
    expect(counters.num_writes).toBeGreaterThanOrEqual(after.outs - before.outs)
    expect(counters.bdev_num_writes).toBeGreaterThan(1000)
    expect(slots.same_filled + slots.compressed + slots.backing + slots.empty).toBe(65536)
    expect(slots.stored).toBe(65536 - slots.empty + slots.overwritten + slots.freed)
    // The kernel has freed all of them; what it has not discarded yet is still there.
    const { devices: states } = await json('swap', 'status')
    expect(65536 - slots.empty).toBeGreaterThanOrEqual(states[0].swap.usedBytes / 4096)
    expect(counters.notify_free).toBeGreaterThan(0)
    const [head, row] = (await tmem(['stat', '--control', control])).stdout.split('\n').map((line) => line.split(/\s+/))
    const column = (name: string): number => Number(row![head!.indexOf(name)])
    expect(column('same') + column('compr') + column('backing')).toBe(column('used'))
    expect(column('kernel') + column('stale')).toBe(column('used') + column('unwritten'))
    expect(column('kernel')).toBe(states[0].swap.usedBytes / 4096)
    expect(column('stale')).toBeGreaterThan(0)

    child.kill('SIGTERM')
    while (!notes().includes('not stopped')) await setTimeout(50)
    expect(notes()).toMatch(/not stopped: in use by \/dev\/loop\d+, which is active swap: run tmem swap off first/)
    expect(swapping()).toBe(true)
    expect(await json('swap', 'off')).toMatchObject({ devices: [{ device: 'swap0', loop: null, swap: null }] })
    child.kill('SIGTERM')
    expect(await ended).toBe(0)
    await sweep()
    expect(traces()).toEqual(clean)
  })

  test('a limit that the host cannot spare is refused, before anything is mounted', async (ctx) => {
    requires(ctx, needs)
    const [memory] = /(?<=MemTotal: +)\d+/.exec(readFileSync('/proc/meminfo', 'utf8'))!
    mkdirSync(mount, { recursive: true })
    const gibibytes = Math.ceil(Number(memory) / 2 ** 20) + 1
    const stack = `memory(limit=${gibibytes}GiB)`
    const words = ['--device', 'name=swap0,size=16MiB', '--fuse', mount, '--control', control]
    if (gibibytes > 60) ctx.skip('a store of so much memory is refused for its size')
    expect(await tmem(['serve', '--stack', stack, ...words])).toMatchObject({
      code: 1,
      stderr: expect.stringMatching(/^tmem: the stacks may take \d+MiB of memory, but this host can spare \d+MiB now/m),
    })
    await sweep()
    expect(traces()).toEqual(clean)
  })

  test('stress-ng verifies its memory in a group with a quarter of it', async (ctx) => {
    requires(ctx, { ...needs, commands: [...needs.commands, 'stress-ng'] })
    const { child, ended } = await serve()
    await json('swap', 'on')
    mkdirSync(group)
    writeFileSync(join(group, 'memory.limit_in_bytes'), '64M')
    const before = swapped()
    const words = ['--vm', '4', '--vm-bytes', '192M', '--vm-keep', '--verify', '--metrics', '--timeout', '15s']
    // It asks for all of its memory at once again and again (MADV_POPULATE_READ); in a group this small the kernel then
    // kills a worker now and then, with zram as its swap as well, and stress-ng starts another one. What it verifies is
    // the same.
    const script = `echo $$ > ${group}/cgroup.procs && exec timeout -s KILL 90 stress-ng ${words.join(' ')} --temp-path ${folder} 2>&1`
    const stress = spawn('sh', ['-c', script], { stdio: ['ignore', 'pipe', 'inherit'] })
    running.add(stress)
    let output = ''
    stress.stdout.setEncoding('utf8').on('data', (text: string) => {
      output += text
    })
    const code = await new Promise((resolve) => stress.once('close', resolve))
    running.delete(stress)
    if (code !== 0) throw new Error(`stress-ng ended with ${String(code)}: ${output}`)
    expect(output).not.toMatch(/fail/)
    const [, operations] = /metrc: .* vm +(\d+) /.exec(output) ?? []
    expect(Number(operations)).toBeGreaterThan(0)
    const after = swapped()
    expect(after.outs - before.outs).toBeGreaterThan(128 * 256)
    expect(after.ins - before.ins).toBeGreaterThan(128 * 256)
    const [{ counters }] = (await json('stat')).devices
    expect(counters).toMatchObject({ failed_reads: 0, failed_writes: 0, invalid_io: 0 })
    await json('swap', 'off')
    child.kill('SIGTERM')
    expect(await ended).toBe(0)
    await sweep()
    expect(traces()).toEqual(clean)
  })

  test('with --drain it ends the swapping first, and stops', async (ctx) => {
    requires(ctx, needs)
    const { child, ended } = await serve('--drain', '--busy-turns', '20')
    await json('swap', 'on')
    const hog = startHog(120, 100)
    while (swapped().outs === 0 || Number((await json('swap', 'status')).devices[0].swap.usedBytes) < 2 ** 24)
      await setTimeout(100)
    // With more memory what is swapped out has a place to go.
    writeFileSync(join(group, 'memory.limit_in_bytes'), '512M')
    child.kill('SIGTERM')
    expect(await ended).toBe(0)
    expect(swapping()).toBe(false)
    hog.child.kill('SIGKILL')
    await hog.ended
    await sweep()
    expect(traces()).toEqual(clean)
  })

  test('a server that is killed takes down who was swapped to it, not the system; the next one starts', async (ctx) => {
    requires(ctx, needs)
    const { child, ended } = await serve()
    await json('swap', 'on')
    const hog = startHog(200, 100)
    while (Number((await json('swap', 'status')).devices[0].swap.usedBytes) < 2 ** 26) await setTimeout(100)
    child.kill('SIGKILL')
    await ended
    expect((await hog.ended).code).not.toBe(0)
    const [loop] = loops()
    // Without its mount nobody could tell what the loop device was.
    for (const words of [[], ['--fresh']])
      await expect(serve(...words)).rejects.toThrow(
        `in use by /dev/${loop}, which is active swap: run swapoff /dev/${loop}; losetup -d /dev/${loop}; then start again`,
      )
    expect(spawnSync('swapoff', [`/dev/${loop}`], { timeout: 60_000 }).status).toBe(0)
    expect(spawnSync('losetup', ['-d', `/dev/${loop}`], { timeout: 60_000 }).status).toBe(0)
    // Nobody reads zeros unasked, and what the killed server left is not in the way of the next.
    await expect(serve()).rejects.toThrow('start with --fresh')
    const next = await serve('--fresh')
    // The control group of the killed one is gone, too.
    expect(readdirSync('/sys/fs/cgroup/memory')).not.toContain(`tmem-serve-${child.pid}`)
    expect(await json('swap', 'status')).toEqual({
      devices: [expect.objectContaining({ device: 'swap0', loop: null })],
    })
    next.child.kill('SIGTERM')
    expect(await next.ended).toBe(0)
    await sweep()
    expect(traces()).toEqual(clean)
  })
})

/** Runs a tool that must succeed: what it said. */
async function must(command: string, ...words: string[]): Promise<string> {
  const ran = spawn(command, words, { stdio: ['ignore', 'pipe', 'pipe'], timeout: 60_000 })
  let output = ''
  for (const stream of [ran.stdout, ran.stderr])
    stream.setEncoding('utf8').on('data', (text: string) => {
      output += text
    })
  const code = await new Promise((resolve) => ran.once('close', resolve))
  if (code !== 0) throw new Error(`${command} ${words.join(' ')} ended with ${String(code)}: ${output}`)
  return output.trim()
}

test('a file system whose server is killed: what was synced is there for the next one', {
  timeout: 120_000,
}, async (ctx) => {
  requires(ctx, { ...needs, commands: [...needs.commands, 'mkfs.ext4', 'e2fsck'] })
  await sweep()
  try {
    const device = ['--device', `name=disk0,size=128MiB,snapshot=${folder}/disk0.raw`]
    const first = await serve(...device)
    const file = join(mount, 'disk0')
    const place = join(folder, 'ext4')
    mkdirSync(place)
    const loop = await must('losetup', '-f', '--show', '--direct-io=on', file)
    await must('mkfs.ext4', '-q', '-F', loop)
    await must('mount', loop, place)
    const tree = fileURLToPath(new URL('../../dist', import.meta.url))
    await must('cp', '-r', tree, join(place, 'synced'))
    await must('sync', '-f', place)
    // Nobody asked that these last.
    await must('cp', '-r', tree, join(place, 'later'))
    first.child.kill('SIGKILL')
    await first.ended
    // What the kernel still wants to write has nowhere to go.
    await must('umount', place)
    await must('losetup', '-d', loop)

    // The image is a file system without us, too.
    await must('cp', '--sparse=always', join(folder, 'disk0.raw'), join(folder, 'copy.raw'))
    await must('e2fsck', '-fp', join(folder, 'copy.raw')).catch((error: Error) => {
      // 1: its journal was replayed.
      if (!error.message.includes('ended with 1:')) throw error
    })
    await must('e2fsck', '-fn', join(folder, 'copy.raw'))

    const second = await serve(...device, '--fresh')
    expect(second.notes()).toMatch(/disk0 has all that was flushed/)
    const again = await must('losetup', '-f', '--show', '--direct-io=on', file)
    await must('mount', again, place)
    await must('diff', '-r', tree, join(place, 'synced'))
    await must('umount', place)
    await must('e2fsck', '-fn', again)
    // Knobs are files.
    const knob = join(mount, 'knobs', 'disk0', 'writeback_limit')
    expect(readFileSync(knob, 'utf8')).toBe('off\n')
    writeFileSync(knob, '7\n')
    expect(readFileSync(knob, 'utf8')).toBe('7\n')
    expect(() => writeFileSync(join(mount, 'knobs', 'disk0', 'reset'), '1')).toThrow(/EBUSY/)
    await must('losetup', '-d', again)
    // The kernel lets go of the file a moment later.
    const reset = (): void => writeFileSync(join(mount, 'knobs', 'disk0', 'reset'), '1')
    await vi.waitFor(reset, { timeout: 30_000, interval: 100 })
    expect((await json('stat')).devices[1].counters).toMatchObject({ num_reads: 0, num_writes: 0, pages_stored: 0 })
    second.child.kill('SIGTERM')
    expect(await second.ended).toBe(0)
    expect(readFileSync(join(folder, 'disk0.raw')).every((byte) => byte === 0)).toBe(true)
  } finally {
    await sweep()
  }
  expect(traces()).toEqual(clean)
})

test('a file system on it: files, fsck, trim', { timeout: 120_000 }, async (ctx) => {
  requires(ctx, { ...needs, commands: [...needs.commands, 'mkfs.ext4', 'e2fsck', 'fstrim'] })
  await sweep()
  try {
    const { child, ended } = await serve()
    const file = join(mount, 'swap0')
    const place = join(folder, 'ext4')
    mkdirSync(place)
    const loop = await must('losetup', '-f', '--show', '--direct-io=on', file)
    await must('mkfs.ext4', '-q', '-F', loop)
    await must('mount', loop, place)
    await must('cp', '-r', fileURLToPath(new URL('../../dist', import.meta.url)), join(place, 'tree'))
    await must('cp', process.execPath, join(place, 'big'))
    await must('umount', place)
    await must('e2fsck', '-fn', loop)
    await must('mount', loop, place)
    await must('cmp', process.execPath, join(place, 'big'))
    await must('diff', '-r', fileURLToPath(new URL('../../dist', import.meta.url)), join(place, 'tree'))
    const full = (await json('stat')).devices[0].counters
    await must('rm', join(place, 'big'))
    // Blocks are free once the journal says so.
    await must('sync', '-f', place)
    await must('fstrim', place)
    const trimmed = (await json('stat')).devices[0].counters
    expect(trimmed.notify_free).toBeGreaterThan(full.notify_free + 1000)
    await must('umount', place)
    await must('losetup', '-d', loop)
    // The kernel lets go of the file a moment later, and until then it is not stopped.
    const users = () => ask(control, 'users', { device: 'swap0' })
    await expect.poll(users, { timeout: 30_000 }).toEqual({ clients: 0, opens: 0 })
    child.kill('SIGTERM')
    expect(await ended).toBe(0)
  } finally {
    await sweep()
  }
  expect(traces()).toEqual(clean)
})

test('the README\u2019s way to use it as swap works as it is written', { timeout: 180_000 }, async (ctx) => {
  requires(ctx, needs)
  const [memory] = /(?<=MemAvailable: +)\d+/.exec(readFileSync('/proc/meminfo', 'utf8')) ?? ['0']
  if (Number(memory) < 3 * 2 ** 20) ctx.skip('needs 3 GiB of memory')
  const { bavail, bsize } = statfsSync('/var/lib')
  if (bavail * bsize < 4 * 2 ** 30) ctx.skip('needs 4 GiB of disk in /var/lib')
  const places = ['/run/tmem', '/run/tmem.sock', '/run/tmem.sock.record', '/var/lib/tmem']
  const there = places.find((path) => existsSync(path))
  if (there !== undefined) ctx.skip(`${there} is there: somebody uses it`)
  const markdown = readFileSync(new URL('../../README.md', import.meta.url), 'utf8').split('## Use it as swap')[1]!
  const [begin, end] = [...markdown.matchAll(/^```sh\n(.*?)^```$/gms)].map(([, code]) => code!)
  mkdirSync(folder, { recursive: true })
  // The program under the name that the README gives it.
  writeFileSync(join(folder, 'tmem'), `#!/bin/sh\nexec ${process.execPath} ${bin} "$@"\n`, { mode: 0o755 })
  const env: NodeJS.ProcessEnv = { ...process.env, PATH: `${folder}:${process.env['PATH']}`, NO_COLOR: '1' }
  delete env['XDG_RUNTIME_DIR']
  const shell = spawn('bash', ['-e'], { stdio: ['pipe', 'pipe', 'pipe'], env, cwd: folder })
  running.add(shell)
  let output = ''
  for (const stream of [shell.stdout, shell.stderr])
    stream.setEncoding('utf8').on('data', (text: string) => {
      output += text
    })
  const ended = new Promise<number | null>((resolve) => shell.once('close', resolve))
  let isOver = false
  void ended.then(() => {
    isOver = true
  })
  const until = async (what: RegExp, count: number): Promise<void> => {
    while ([...output.matchAll(what)].length < count) {
      if (isOver) throw new Error(`it ended: ${output}`)
      await setTimeout(100)
    }
  }
  try {
    // --watch goes on until somebody ends it; so does `wait`, for the server that was told to stop.
    shell.stdin.write(`${begin!.trimEnd()} || true\n`)
    await until(/^swap0 +2GiB +524288 /gm, 2)
    expect(readFileSync('/proc/swaps', 'utf8')).toMatch(/^\/dev\/loop\d+ +partition\s+2097148\s+\d+\s+100$/m)
    const watch = readFileSync(`/proc/${shell.pid}/task/${shell.pid}/children`, 'utf8').trim().split(' ').map(Number)
    process.kill(watch.at(-1)!, 'SIGINT')
    shell.stdin.end(`${end}wait %1\n`)
    expect(await ended).toBe(0)
    expect(places.filter((path) => existsSync(path))).toEqual(['/run/tmem', '/var/lib/tmem'])
    expect(readdirSync('/var/lib/tmem')).toEqual([])
    expect(readdirSync('/run/tmem')).toEqual([])
    expect(readFileSync('/proc/swaps', 'utf8')).not.toContain('2097148')
  } finally {
    const { pid = 0 } =
      JSON.parse(
        (
          await tmem(['swap', 'off', '--control', '/run/tmem.sock']).then(() =>
            tmem(['stat', '--json', '--control', '/run/tmem.sock']),
          )
        ).stdout || '{}',
      ).info ?? {}
    if (pid !== 0) process.kill(pid, 'SIGTERM')
    await ended
    running.delete(shell)
    for (const path of places) rmSync(path, { recursive: true, force: true })
    await sweep()
  }
  expect(traces()).toEqual(clean)
})
