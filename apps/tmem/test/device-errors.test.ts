/** What a client of NBD is told when a disk is full or broken: the one is not the other. */
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Layer, PlaceTraits } from '@tmem/core'
import { type SwapFile, SwapPlace } from '@tmem/frontswap'
import { ramzswap } from '@tmem/ramzswap'
import { zcache } from '@tmem/zcache'
import { expect, onTestFinished, test } from 'vitest'
import { Client, serve } from '../../../packages/nbd/test/client.ts'
import { requires } from '../../../tools/requires.ts'
import { temporaryDirectory } from './tmem.ts'

/** Of the NBD protocol. */
const Errno = { none: 0, EIO: 5, ENOSPC: 28 } as const
const flush = 3

test.each(['EIO', 'ENOSPC'] as const)('the backing file answers %s', async (code) => {
  let failing = false
  const fail = (): void => {
    if (failing) throw Object.assign(new Error(code), { code })
  }
  const file: SwapFile = {
    directIo: true,
    write: async () => fail(),
    writeNow: fail,
    read: () => Promise.reject(Object.assign(new Error('EIO'), { code: 'EIO' })),
    readNow: fail,
    sync: () => Promise.resolve(),
    close: () => Promise.resolve(),
  }
  const sizeBytes = 64 * 4096
  const device = ramzswap({
    name: 'dev',
    sizeBytes,
    stack: [zcache({ limitBytes: 2 ** 20, zvMaxZsize: 2048 }), swapFile(file, sizeBytes)],
  })
  const told: unknown[] = []
  const { address } = await serve({ exports: [{ name: 'dev', device }], onError: (error) => told.push(error) })
  const client = await Client.ready(address, { name: 'dev' })
  expect((await client.write(0, randomBytes(8192))).error).toBe(Errno.none)
  failing = true
  expect((await client.write(0, randomBytes(4096))).error).toBe(Errno[code])
  expect((await client.write(0, randomBytes(16 * 4096))).error).toBe(Errno[code])
  // What shrinks has its place in memory.
  expect((await client.write(0, Buffer.alloc(4096, 'text '))).error).toBe(Errno.none)
  expect((await client.read(4096, 4096)).error).toBe(Errno.EIO)
  // A write that arrived in parts failed in parts.
  expect(told.length).toBeGreaterThanOrEqual(3)
})

test('a disk that is full when a snapshot is flushed: ENOSPC, and the rest is served and saved', async (ctx) => {
  requires(ctx, { root: true, commands: ['unshare', 'mount'] })
  const folder = temporaryDirectory()
  const disk = join(folder, 'disk')
  mkdirSync(disk)
  const bin = fileURLToPath(new URL('../dist/bin.js', import.meta.url))
  const words = [
    'serve',
    '--stack',
    'memory(limit=16MiB)',
    '--nbd',
    `unix:${folder}/nbd.sock`,
    '--json',
    '--log',
    'text',
  ]
  words.push('--device', `name=a,size=8MiB,snapshot=${disk}/a.raw`, '--control', join(folder, 'control.sock'))
  // A file system of 1 MiB that nobody else sees, and which is gone with the server.
  const script = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
  const server = spawn('unshare', ['-m', 'sh', '-c', script, disk, process.execPath, bin, ...words], {
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  onTestFinished(() => void server.kill('SIGKILL'))
  let stderr = ''
  server.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr += text
  })
  const ended = new Promise<number | null>((resolve) => server.once('close', resolve))
  const ready = await Promise.race([new Promise((resolve) => server.stdout.once('data', resolve)), ended])
  if (!(ready instanceof Buffer)) throw new Error(`it ended with ${String(ready)}: ${stderr}`)
  const client = await Client.ready({ path: join(folder, 'nbd.sock') }, { name: 'a' })
  const bytes = randomBytes(2 ** 21)
  expect((await client.write(0, bytes)).error).toBe(Errno.none)
  expect((await client.request(flush, 0, 0)).error).toBe(Errno.ENOSPC)
  expect((await client.read(0, 2 ** 21)).data.equals(bytes)).toBe(true)
  const trim = 4
  expect((await client.request(trim, 2 ** 19, 2 ** 21 - 2 ** 19)).error).toBe(Errno.none)
  expect((await client.request(flush, 0, 0)).error).toBe(Errno.none)
  server.kill('SIGTERM')
  expect(await ended).toBe(0)
  expect(stderr).toMatch(/^tmem: snapshot .*a\.raw: it cannot be written at \d+: ENOSPC.*\n$/)
})

/** The end of a stack in a given file. */
function swapFile(file: SwapFile, sizeBytes: number): Layer {
  const traits: PlaceTraits = {
    persistent: true,
    ephemeral: false,
    waits: true,
    survives: 'nothing',
    rawOnly: false,
    capacity: sizeBytes / 4096,
    reservedBytes: sizeBytes,
    maxPageSize: 4096,
  }
  const settings = { file, traits, from: 4096, roomBytes: 2 ** 20, slots: false, bytesPerHour: undefined }
  return { name: 'frontswap', place: { traits, open: (context) => new SwapPlace(settings, context) } }
}
