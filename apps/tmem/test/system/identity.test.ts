/**
 * What a thing is decides, not what it is called: one device by several names, two who act at one moment, what a killed
 * server left.
 *
 * The table: each way that gives up pages or writes over them × each kind of user × each way to name the mount; each
 * cell is tried, with this host's loop devices, swap and mounts. All of it lies in one directory and is undone also
 * when a test fails.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, realpathSync, rmSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { mounts } from '@tmem/fuse'
import { PageFile } from '@tmem/page-file'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { Command } from '../../../../packages/nbd/src/protocol.ts'
import { Client } from '../../../../packages/nbd/test/client.ts'
import { requires } from '../../../../tools/requires.ts'
import { tmem } from '../tmem.ts'
import { type Served, served } from './served.ts'

const folder = '/var/tmp/tmem-test-identity'
const real = join(folder, 'real')
const link = join(folder, 'link')
const bind = join(folder, 'bind')
const place = join(folder, 'ext4')
const control = join(folder, 'control.sock')
const socket = join(folder, 'nbd.sock')
const needs = {
  root: true,
  commands: ['losetup', 'mkswap', 'swapon', 'swapoff', 'mount', 'umount', 'mkfs.ext4', 'blkid'],
  paths: ['/dev/fuse', '/dev/loop-control'],
}
const running = new Set<ChildProcess>()

/** Loop devices over files in the folder, whatever their server is. */
const loops = (): string[] =>
  readdirSync('/sys/block').filter((name) => {
    const note = `/sys/block/${name}/loop/backing_file`
    return existsSync(note) && readFileSync(note, 'utf8').startsWith(folder)
  })
const swaps = (): string[] => loops().filter((name) => readFileSync('/proc/swaps', 'utf8').includes(`/dev/${name} `))
const mountedThere = (): string[] =>
  mounts()
    .map(({ point }) => point)
    .filter((point) => point.startsWith(`${folder}/`))

/** Undoes whatever is there, in the order in which it can be undone. Each step is bounded. */
async function sweep(): Promise<void> {
  const tool = (command: string, ...words: string[]): void => {
    spawnSync(command, words, { timeout: 60_000, stdio: 'ignore' })
  }
  for (const name of loops()) {
    tool('umount', `/dev/${name}`)
    tool('swapoff', `/dev/${name}`)
    tool('losetup', '-d', `/dev/${name}`)
  }
  for (const child of running) child.kill('SIGKILL')
  for (let tries = 0; running.size > 0 && tries < 50; tries++) await setTimeout(100)
  for (const point of mountedThere().reverse()) tool('umount', '-l', point)
  rmSync(folder, { recursive: true, force: true })
}

async function must(command: string, ...words: string[]): Promise<string> {
  const { code, output } = await run(command, ...words)
  if (code !== 0) throw new Error(`${command} ${words.join(' ')} ended with ${String(code)}: ${output}`)
  return output.trim()
}

/** Runs a program, for a minute at most: never in this thread, which may be waited for. */
async function run(command: string, ...words: string[]): Promise<{ code: unknown; output: string }> {
  const ran = spawn(command, words, { stdio: ['ignore', 'pipe', 'pipe'], timeout: 60_000 })
  let output = ''
  for (const stream of [ran.stdout, ran.stderr])
    stream.setEncoding('utf8').on('data', (text: string) => {
      output += text
    })
  return { code: await new Promise((resolve) => ran.once('close', resolve)), output }
}

/** `S` of the issue, mounted on what is called `mount`. */
const serve = (mount: string, ...words: string[]): Promise<Served> =>
  served(
    running,
    '--stack',
    'memory(limit=80MiB)',
    '--device',
    'name=d,size=64MiB',
    '--fuse',
    mount,
    '--nbd',
    `unix:${socket}`,
    '--control',
    control,
    ...words,
  )

const said = async (...words: string[]): Promise<string> => {
  const { code, stderr, stdout } = await tmem([...words, '--control', control])
  return code === 0 ? `done: ${stdout}` : stderr
}

beforeEach(async (ctx) => {
  requires(ctx, needs)
  await sweep()
  for (const name of [real, bind, place]) mkdirSync(name, { recursive: true })
  symlinkSync('real', link)
})
afterEach(sweep)

/** How a mount is called when the server is started, and when its file is used. */
const namings = {
  'by its path': { served: real, used: real },
  'through a symbolic link': { served: link, used: link },
  'through a bind mount': { served: real, used: bind },
}

/** Kinds of user: begins to use the device's file, and ends that. */
const users: Record<string, (file: string) => Promise<() => Promise<unknown>>> = {
  'active swap': async (file) => {
    const loop = await must('losetup', '-f', '--show', '--direct-io=on', file)
    await must('mkswap', loop)
    await must('swapon', loop)
    return async () => {
      await must('swapoff', loop)
      await must('losetup', '-d', loop)
    }
  },
  'loop device': async (file) => {
    const loop = await must('losetup', '-f', '--show', file)
    return () => must('losetup', '-d', loop)
  },
  'mounted file system': async (file) => {
    const loop = await must('losetup', '-f', '--show', '--direct-io=on', file)
    await must('mkfs.ext4', '-q', '-F', loop)
    await must('mount', loop, place)
    return async () => {
      await must('umount', place)
      await must('losetup', '-d', loop)
    }
  },
  'open file': async (file) => {
    const reader = spawn('sh', ['-c', 'exec 3<"$1"; echo open; exec sleep 60', 'sh', file], {
      stdio: ['ignore', 'pipe', 'ignore'],
    })
    await new Promise((resolve) => reader.stdout.once('data', resolve))
    return () => {
      reader.kill('SIGKILL')
      return new Promise((resolve) => reader.once('close', resolve))
    }
  },
  'client of NBD': async () => {
    const client = await Client.ready({ path: socket }, { name: 'd' })
    return () => left(client, '0')
  },
}

/** How many clients of NBD the server has. */
const clients = (): Promise<string> => must('cat', join(real, 'stats/server-nbd/connections'))

/** Ends a client; resolves when the server has as many as before it came. */
async function left(client: Client, before: string): Promise<void> {
  client.socket.destroy()
  await expect.poll(clients, { timeout: 60_000 }).toBe(before)
}

/** Ways that give up pages, or write over them: what came of it. */
const ways: Record<string, () => Promise<string>> = {
  reset: () => said('knob', 'd', 'reset', '1'),
  'a smaller disksize': () => said('knob', 'd', 'disksize', '8192'),
  'the knob in the mount': async () =>
    (await run('sh', '-c', 'printf 1 | dd of="$1"', 'sh', join(real, 'knobs/d/reset'))).output,
  RESIZE: async () => {
    const before = await clients()
    const client = await Client.ready({ path: socket }, { name: 'd' })
    const { error } = await client.request(Command.RESIZE, 4096, 0)
    await left(client, before)
    return error === 0 ? 'done' : `in use: error ${error}`
  },
  'swap on': () => said('swap', 'on'),
}

describe.for(Object.entries(namings))('named %s', ([naming, { served, used }]) => {
  // A client of NBD names no mount.
  const cells = Object.entries(users).filter(([user]) => user !== 'client of NBD' || naming === 'by its path')
  test.for(cells)('while this uses it no way gives up its pages: %s', { timeout: 120_000 }, async ([user, begin]) => {
    const server = await serve(served)
    if (used === bind) await must('mount', '--bind', real, bind)
    await must('dd', 'if=/dev/urandom', `of=${join(real, 'd')}`, 'bs=1M', 'count=1', 'conv=notrunc', 'status=none')
    const end = await begin(join(used, 'd'))
    // What the kernel itself writes there meanwhile is its own business: then what is in it, and its length, tell.
    const look = user === 'active swap' || user === 'mounted file system' ? ['blkid', '-p'] : ['cksum']
    const before = await must(look[0]!, ...look.slice(1), join(real, 'd'))
    const came: Record<string, string> = {}
    for (const [way, act] of Object.entries(ways)) came[way] = await act()
    expect(Object.entries(came).filter(([, text]) => !/in use|active swap|resource busy/.test(text))).toEqual([])
    // A server is not stopped under them; its clients of NBD are told, and reconnect.
    if (user !== 'client of NBD') {
      server.child.kill('SIGTERM')
      while (!server.notes().includes('not stopped')) await setTimeout(50)
    }
    expect(await must(look[0]!, ...look.slice(1), join(real, 'd'))).toBe(before)
    expect(await must('stat', '-c', '%s', join(real, 'd'))).toBe(String(2 ** 26))
    await end()
    // With nobody there each of them is done.
    for (const way of ['reset', 'a smaller disksize'])
      expect([way, await ways[way]!()]).toEqual([way, expect.stringMatching(/^done/)])
    server.child.kill('SIGTERM')
    expect(await server.ended).toBe(0)
    expect([loops(), mountedThere().filter((point) => point !== bind)]).toEqual([[], []])
  })
})

test('through a link the device is on once, and status says so', { timeout: 60_000 }, async () => {
  const server = await serve(link)
  expect(await said('swap', 'on')).toMatch(/^done/)
  expect(await said('swap', 'on')).toBe('tmem: d is active swap already\n')
  expect(swaps().length).toBe(1)
  const states = JSON.parse((await tmem(['swap', 'status', '--control', control, '--json'])).stdout)
  expect(states).toMatchObject({ devices: [{ device: 'd', loop: `/dev/${swaps()[0]}`, swap: { priority: 100 } }] })
  expect(await said('swap', 'off')).toMatch(/^done/)
  server.child.kill('SIGTERM')
  expect(await server.ended).toBe(0)
})

test('a device called like the statistics of a server hides nothing, and is not hidden', {
  timeout: 60_000,
}, async () => {
  const server = await serve(real, '--device', 'name=server-nbd,size=1MiB', '--device', 'name=server-nbd.2,size=2MiB')
  const listed = (await must('ls', join(real, 'stats'))).split('\n')
  expect(listed.sort()).toEqual(['d', 'server-fuse', 'server-log', 'server-nbd', 'server-nbd.2', 'server-nbd.3'])
  expect(await must('cat', join(real, 'stats/server-nbd/disksize'))).toBe(String(2 ** 20))
  expect(await must('cat', join(real, 'stats/server-nbd.2/disksize'))).toBe(String(2 ** 21))
  expect(await must('cat', join(real, 'stats/server-nbd.3/connections'))).toBe('0')
  server.child.kill('SIGTERM')
  expect(await server.ended).toBe(0)
})

test('of two who turn it on at one moment, one does', { timeout: 120_000 }, async () => {
  const server = await serve(link)
  for (let round = 0; round < 10; round++) {
    const both = await Promise.all([said('swap', 'on'), said('swap', 'on'), said('swap', 'on')])
    expect([both.filter((text) => text.startsWith('done')).length, swaps().length, loops().length, both]).toEqual([
      1,
      1,
      1,
      both,
    ])
    expect(await said('swap', 'off')).toMatch(/^done/)
  }
  server.child.kill('SIGTERM')
  expect(await server.ended).toBe(0)
})

test('SIGTERM with --drain drains what was turned on through a link or a bind mount', { timeout: 60_000 }, async () => {
  const server = await serve(link, '--drain')
  await must('mount', '--bind', real, bind)
  await users['active swap']!(join(bind, 'd'))
  server.child.kill('SIGTERM')
  expect(await server.ended).toBe(0)
  expect(loops()).toEqual([])
})

test('a file that lies where the mount was is not the device', { timeout: 60_000 }, async () => {
  const server = await serve(link)
  await must('mount', '-t', 'tmpfs', 'other', real)
  await must('sh', '-c', 'echo "somebody else" >"$1" && truncate -s 64M "$1"', 'sh', join(real, 'd'))
  const before = await must('cksum', join(real, 'd'))
  for (const words of [['on'], ['status'], ['off']])
    expect(await said('swap', ...words)).toMatch(
      /real\/d is not a file of the server: another file system is mounted there/,
    )
  expect([await must('cksum', join(real, 'd')), loops()]).toEqual([before, []])
  server.child.kill('SIGTERM')
  while (!server.notes().includes('something is mounted over')) await setTimeout(50)
  await must('umount', real)
  server.child.kill('SIGTERM')
  expect(await server.ended).toBe(0)
})

test('a copy of the mount in another namespace keeps no server from ending', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: ['unshare'] })
  const server = await serve(link)
  const copy = spawn('unshare', ['-m', 'sh', '-c', 'echo there; exec sleep 60'], {
    stdio: ['ignore', 'pipe', 'ignore'],
  })
  await new Promise((resolve) => copy.stdout.once('data', resolve))
  try {
    server.child.kill('SIGTERM')
    expect(await server.ended).toBe(0)
  } finally {
    copy.kill('SIGKILL')
  }
  expect(mountedThere()).toEqual([])
})

test('SIGTERM with --drain leaves a file system alone, and says what to do', { timeout: 60_000 }, async () => {
  const server = await serve(link, '--drain')
  const end = await users['mounted file system']!(join(link, 'd'))
  server.child.kill('SIGTERM')
  while (!server.notes().includes('not stopped')) await setTimeout(50)
  expect(server.notes()).toMatch(
    /not stopped: in use by \/dev\/loop\d+, which is mounted on \/var\/tmp\/tmem-test-identity\/ext4/,
  )
  await must('touch', join(place, 'still there'))
  await end()
  server.child.kill('SIGTERM')
  expect(await server.ended).toBe(0)
})

test('what a killed server left in use is named to the next one, which mounts nothing over it', {
  timeout: 120_000,
}, async () => {
  const first = await serve(link)
  expect(await said('swap', 'on')).toMatch(/^done/)
  first.child.kill('SIGKILL')
  await first.ended
  const [loop] = loops()
  for (const name of [link, real])
    await expect(serve(name, '--fresh')).rejects.toThrow(
      `in use by /dev/${loop}, which is active swap: run swapoff /dev/${loop}; losetup -d /dev/${loop}; then start again`,
    )
  // The attributes of the file are known to nobody any more after a second.
  await setTimeout(1500)
  await expect(serve(link, '--fresh')).rejects.toThrow(`in use by /dev/${loop}, which is active swap`)
  expect(mountedThere()).toEqual([real])
  await must('swapoff', `/dev/${loop}`)
  await must('losetup', '-d', `/dev/${loop}`)
  const next = await serve(link, '--fresh')
  expect(mountedThere()).toEqual([realpathSync(real)])
  next.child.kill('SIGTERM')
  expect(await next.ended).toBe(0)
})

test('a program that has the file of a killed server open is waited for, not cut off from its name', {
  timeout: 60_000,
}, async () => {
  const first = await serve(link)
  const end = await users['open file']!(join(link, 'd'))
  first.child.kill('SIGKILL')
  await first.ended
  await expect(serve(link, '--fresh')).rejects.toThrow(`has left on ${real} is in use: end that`)
  expect(mountedThere()).toEqual([real])
  await end()
  const next = await serve(link, '--fresh')
  next.child.kill('SIGTERM')
  expect(await next.ended).toBe(0)
})

test('a loop device over a mount whose server hangs keeps no other server waiting', { timeout: 120_000 }, async () => {
  const server = await serve(real)
  const loop = await must('losetup', '-f', '--show', join(real, 'd'))
  // It takes requests no more: whoever asks for the file's attributes waits.
  server.child.kill('SIGSTOP')
  try {
    const other = join(folder, 'other')
    mkdirSync(other)
    const second = await served(
      running,
      '--stack',
      `frontswap(file="${folder}/other.img",size=1MiB)`,
      '--device',
      'name=o,size=1MiB',
      '--fuse',
      other,
      '--control',
      join(folder, 'other.sock'),
      '--nbd',
      `unix:${join(folder, 'other.nbd')}`,
    )
    second.child.kill('SIGTERM')
    expect(await second.ended).toBe(0)
    // An image that was there is asked for, too.
    const file = join(folder, 'there.img')
    await must('truncate', '-s', '1M', file)
    PageFile.open({ path: file, mode: 'plain', bytes: 2 ** 20, keep: true }).closeNow()
  } finally {
    server.child.kill('SIGCONT')
  }
  await must('losetup', '-d', loop)
  server.child.kill('SIGTERM')
  expect(await server.ended).toBe(0)
})
