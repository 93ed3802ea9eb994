/**
 * What a server keeps, and says, when its disk fails, its image is taken away, or its clients are still there when it
 * ends.
 */
import { execFileSync } from 'node:child_process'
import {
  closeSync,
  existsSync,
  ftruncateSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { systemFiles } from '@tmem/page-file'
import { describe, expect, type TestContext, test } from 'vitest'
import { Client } from '../../../packages/nbd/test/client.ts'
import { requires } from '../../../tools/requires.ts'
import { type Serving, servingIn } from './serving.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const flush = 3
const stack = 'memory(limit=8MiB)'
const page = (seed: number): Buffer => Buffer.alloc(4096, `page ${seed} `)
const client = ({ folder }: Serving): Promise<Client> => Client.ready({ path: join(folder, 'nbd.sock') }, { name: 'a' })
const image = ['--device', 'name=a,size=4MiB,snapshot=FOLDER/a.raw']
const written = (folder: string, n: number): Buffer =>
  readFileSync(join(folder, 'a.raw')).subarray(n * 4096, (n + 1) * 4096)

/** What a server says that refuses to serve. */
const refusal = (folder: string, ...words: string[]): Promise<string> =>
  servingIn(folder, stack, ...words).then(
    () => 'it serves',
    (error: Error) => error.message,
  )

describe('a disk that fails', () => {
  /** A server over it, and what the test says to the disk. */
  const over = async (
    ctx: TestContext,
    ...words: string[]
  ): Promise<{ server: Serving; say: (name: string) => void; unsay: (name: string) => void; faults: string }> => {
    requires(ctx, { commands: ['cc'] })
    const [folder, faults] = [temporaryDirectory(), temporaryDirectory()]
    const library = join(faults, 'failing-disk.so')
    const source = fileURLToPath(new URL('failing-disk.c', import.meta.url))
    execFileSync('cc', ['-shared', '-fPIC', '-O1', '-o', library, source, '-ldl'])
    const env = {
      ...process.env,
      LD_PRELOAD: library,
      FAULT_FILE: join(folder, 'a.raw'),
      FAULT_FOLDER: faults,
    }
    return {
      server: await servingIn({ folder, env }, stack, ...words),
      say: (name) => writeFileSync(join(faults, name), ''),
      unsay: (name) => rmSync(join(faults, name)),
      faults,
    }
  }

  test('written through, a sync that fails forgets nothing, also not what came while it was under way', async (ctx) => {
    const { server, say, unsay, faults } = await over(
      ctx,
      '--device',
      'name=a,size=4MiB,snapshot=FOLDER/a.raw,writethrough',
    )
    const to = await client(server)
    expect((await to.request(flush, 0, 0)).error).toBe(0)
    expect((await to.write(0, page(1))).error).toBe(0)
    say('hold')
    say('fail-sync')
    const failing = to.request(flush, 0, 0)
    while (!existsSync(join(faults, 'syncing'))) await new Promise((resolve) => setTimeout(resolve, 2))
    expect((await to.write(4096, page(2))).error).toBe(0)
    unsay('hold')
    expect((await failing).error).not.toBe(0)
    // The file has neither of them now.
    expect([written(server.folder, 0), written(server.folder, 1)]).toEqual([Buffer.alloc(4096), Buffer.alloc(4096)])
    expect((await to.request(flush, 0, 0)).error).toBe(0)
    for (const medium of [join(server.folder, 'a.raw'), join(faults, 'medium')])
      expect(readFileSync(medium).subarray(0, 8192)).toEqual(Buffer.concat([page(1), page(2)]))
    const { code, stderr } = await server.stop()
    expect([code, stderr]).toEqual([0, expect.stringMatching(/^tmem: snapshot .*a\.raw: it cannot be synced: EIO/)])
  })

  test.for(['full', 'fail-sync'])('at the end (%s): the next server says what may be missing', async (fault, ctx) => {
    const { server, say, unsay } = await over(ctx, ...image)
    const { folder, control, info } = server
    const to = await client(server)
    expect((await to.write(0, page(1))).error).toBe(0)
    expect((await to.request(flush, 0, 0)).error).toBe(0)
    expect((await to.write(0, page(2))).error).toBe(0)
    say(fault)
    const { code, stderr } = await server.stop()
    expect([code, stderr]).toEqual([1, expect.stringMatching(/a\.raw: .*(ENOSPC|EIO)/)])
    expect(readdirSync(folder).sort()).toEqual(['a.raw', 'control.sock.record'])
    if (fault === 'full') unsay(fault)
    const { stdout } = await tmem(['doctor', '--json', '--control', control])
    const told = `process ${info.pid} could not keep all when it ended`
    expect(JSON.parse(stdout).checks).toContainEqual(expect.objectContaining({ name: 'server before', found: told }))
    const next = await servingIn(folder, stack, ...image)
    expect((await (await client(next)).read(0, 4096)).data).toEqual(page(1))
    expect(await next.stop()).toEqual({
      code: 0,
      stderr: `tmem: process ${info.pid}, the earlier server, could not keep all when it ended: a has all that was flushed, and perhaps a part of later writes\n`,
    })
    expect(readdirSync(folder)).toEqual(['a.raw'])
  })
})

describe('an image that is taken away while it is served', () => {
  test.each([
    ['removed', (path: string) => rmSync(path), /removed, renamed or replaced it/, 1],
    [
      'replaced',
      (path: string) => {
        writeFileSync(`${path}.2`, Buffer.alloc(2 ** 22))
        renameSync(`${path}.2`, path)
      },
      /removed, renamed or replaced it: there is another file/,
      1,
    ],
    ['cut off', (path: string) => truncateSync(path, 4096), /somebody has cut it off: it has 4096 bytes/, 0],
  ] as const)('%s: flushes fail, it says why, and so does the next server', async (_, act, reason, code) => {
    const server = await servingIn(temporaryDirectory(), stack, ...image)
    const to = await client(server)
    expect((await to.write(0, Buffer.concat([page(1), page(2)]))).error).toBe(0)
    expect((await to.request(flush, 0, 0)).error).toBe(0)
    act(join(server.folder, 'a.raw'))
    expect((await to.request(flush, 0, 0)).error).not.toBe(0)
    const ended = await server.stop()
    expect([ended.code, ended.stderr]).toEqual([code, expect.stringMatching(reason)])
    // What was cut off could be written again.
    expect(existsSync(`${server.control}.record`)).toBe(code !== 0)
    const next = await servingIn(server.folder, stack, ...image)
    expect((await (await client(next)).read(4096, 4096)).data).toEqual(code === 0 ? page(2) : Buffer.alloc(4096))
    expect((await next.stop()).stderr).toMatch(code === 0 ? /^$/ : /could not keep all when it ended/)
  })
})

describe('an end that was asked for', () => {
  const device = ['--device', 'name=a,size=4MiB']

  test('with a client connected and no snapshot is no clean end', async () => {
    const server = await servingIn(temporaryDirectory(), stack, ...device)
    const to = await client(server)
    expect((await to.write(0, page(1))).error).toBe(0)
    expect(await server.stop()).toEqual({
      code: 3,
      stderr: expect.stringMatching(/^tmem: the pages of a are lost, and clients had it open: .*--fresh/),
    })
    expect(readdirSync(server.folder)).toEqual(['control.sock.record'])
    const told = `process ${server.info.pid}, the earlier server, could not keep all when it ended: the pages of a are lost`
    for (let n = 0; n < 2; n++)
      expect(await refusal(server.folder, ...device)).toBe(
        `exit code 3: tmem: ${told}, as there was no snapshot. Clients would read zeros: end them, then start with --fresh`,
      )
    const next = await servingIn(server.folder, stack, ...device, '--fresh')
    expect(await next.stop()).toEqual({ code: 0, stderr: `tmem: ${told}\n` })
    expect(readdirSync(server.folder)).toEqual([])
  })

  test('is one where nobody is connected, or where there is nothing that could be missed', async () => {
    const folder = temporaryDirectory()
    const first = await servingIn(folder, stack, ...device)
    const to = await client(first)
    expect((await to.read(0, 4096)).error).toBe(0)
    expect(await first.stop()).toEqual({ code: 0, stderr: '' })
    const second = await servingIn(folder, stack, ...device)
    const then = await client(second)
    expect((await then.write(0, page(1))).error).toBe(0)
    then.socket.destroy()
    const connections = async (): Promise<number> =>
      JSON.parse((await tmem(['stat', '--json', '--control', second.control])).stdout).servers[0].counters.connections
    while ((await connections()) > 0) await new Promise((resolve) => setTimeout(resolve, 10))
    expect(await second.stop()).toEqual({ code: 0, stderr: '' })
    expect(readdirSync(folder)).toEqual([])
  })

  test('a start that fails leaves the record of the one before, also with --fresh', async () => {
    const server = await servingIn(temporaryDirectory(), stack, ...device)
    await server.kill()
    const before = readFileSync(`${server.control}.record`, 'latin1').slice(4096)
    // Somebody listens there already.
    const other = await servingIn(temporaryDirectory(), stack, ...device)
    const taken = `unix:${other.folder}/nbd.sock`
    expect(await refusal(server.folder, ...device, '--fresh', '--nbd', taken)).toMatch(/EADDRINUSE/)
    expect(readFileSync(`${server.control}.record`, 'latin1').slice(4096)).toBe(before)
    expect((await other.stop()).code).toBe(0)
  })
})

test('of six servers that take over what a killed one left exactly one serves, and no other touches anything', async () => {
  const folder = temporaryDirectory()
  let server = await servingIn(folder, stack, ...image)
  for (let round = 0; round < 3; round++) {
    const to = await client(server)
    expect((await to.write(round * 4096, page(round))).error).toBe(0)
    expect((await to.request(flush, 0, 0)).error).toBe(0)
    await server.kill()
    const racers = await Promise.allSettled(Array.from({ length: 6 }, () => servingIn(folder, stack, ...image)))
    const losers = racers.filter((racer) => racer.status === 'rejected').map(({ reason }) => (reason as Error).message)
    expect(losers).toHaveLength(5)
    for (const message of losers)
      expect(message).toMatch(/^exit code 1: tmem: (process \d+ serves on|the record .* uses it)/)
    server = racers.find((racer) => racer.status === 'fulfilled')!.value
    const { stdout } = await tmem(['stat', '--json', '--control', server.control])
    expect(JSON.parse(stdout).info.pid).toBe(server.info.pid)
  }
  expect((await server.stop()).code).toBe(0)
  expect(readdirSync(folder)).toEqual(['a.raw'])
  for (let round = 0; round < 3; round++) expect(written(folder, round)).toEqual(page(round))
}, 60_000)

test('holes of an image are not read at the start', async (ctx) => {
  const { lacks } = systemFiles()
  if (lacks !== undefined) ctx.skip(lacks)
  const folder = temporaryDirectory()
  const descriptor = openSync(join(folder, 'a.raw'), 'w')
  ftruncateSync(descriptor, 6 * 2 ** 30)
  closeSync(descriptor)
  const words = ['--device', 'name=a,size=6GiB,snapshot=FOLDER/a.raw']
  const server = await servingIn(folder, 'zcache(limit=8MiB) > frontswap(file="FOLDER/a.img",size=7GiB)', ...words)
  const [, bytes] = /^rchar: (\d+)$/m.exec(readFileSync(`/proc/${server.info.pid}/io`, 'latin1'))!
  expect(Number(bytes)).toBeLessThan(2 ** 26)
  expect((await server.stop()).code).toBe(0)
})
