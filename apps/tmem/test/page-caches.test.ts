/** Files that a server serves through a page cache, with a second chance, as NBD clients see them. */
import { execFile, spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdirSync, readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { promisify } from 'node:util'
import type { StatsNode } from '@tmem/core'
import { expect, onTestFinished, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { bin } from './serving.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const run = promisify(execFile)
const text = `
devices: {}
page-caches:
  base: { file: base.raw, memory: 1MiB, stack: zcache(limit=16MiB) }
nbd: [unix:nbd.sock]
control: control.sock
metrics: tcp:127.0.0.1:0
`

/** Pages that shrink to about half. */
function image(mebibytes: number): Buffer {
  const bytes = randomBytes(mebibytes * 2 ** 20)
  for (let at = 0; at < bytes.length; at += 4096) bytes.fill('text', at + 2048, at + 4096)
  return bytes
}

interface Up {
  readonly folder: string
  readonly info: { readonly metrics: string; readonly pageCaches: readonly object[] }
  readonly down: () => Promise<number | null>
}

async function up(folder: string, says = text): Promise<Up> {
  writeFileSync(join(folder, 'tmem.yaml'), says)
  const child = spawn(process.execPath, [bin, 'up', '-f', join(folder, 'tmem.yaml'), '--json'], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  onTestFinished(() => void child.kill('SIGKILL'))
  const ended = new Promise<number | null>((resolve) => child.once('close', resolve))
  const ready = await new Promise<string>((resolve) => child.stdout.setEncoding('utf8').once('data', resolve))
  return {
    folder,
    info: JSON.parse(ready),
    down: () => {
      child.kill('SIGTERM')
      return ended
    },
  }
}

const uri = (folder: string): string => `nbd+unix:///base?socket=${folder}/nbd.sock`

test('the file is read again and again with hardly a read of the disk', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: ['nbdcopy', 'nbdinfo'] })
  const folder = temporaryDirectory()
  const bytes = image(8)
  writeFileSync(join(folder, 'base.raw'), bytes)
  // Until a clock's tick is over nobody can tell whether the file is changed still.
  await new Promise((resolve) => setTimeout(resolve, 100))
  const { info, down } = await up(folder)
  expect(info.pageCaches).toEqual([{ name: 'base', sizeBytes: bytes.length }])
  expect(JSON.parse((await run('nbdinfo', ['--json', uri(folder)])).stdout).exports).toMatchObject([
    { 'export-size': bytes.length, is_read_only: true },
  ])
  const counters = async (): Promise<Readonly<Record<string, number>>> => {
    const { stdout } = await tmem(['stat', '--json', '--control', join(folder, 'control.sock')])
    const [cache] = (JSON.parse(stdout) as { pageCaches: StatsNode[] }).pageCaches
    return cache!.children.find(({ name }) => name === 'page-cache')!.counters
  }
  const read: number[] = []
  for (let round = 0; round < 3; round++) {
    await run('nbdcopy', ['--', uri(folder), join(folder, 'back')])
    expect(readFileSync(join(folder, 'back')).equals(bytes)).toBe(true)
    read.push((await counters())['diskBytesRead']!)
  }
  expect(read[0]).toBeGreaterThanOrEqual(bytes.length)
  // On a file system that is no local disk nothing is kept.
  const isKept = (await counters())['resident']! > 0
  expect(read[2]).toBeLessThan(bytes.length * (isKept ? 1.2 : 3.2))
  const metrics = await (await fetch(info.metrics)).text()
  expect(metrics).toContain(`tmem_page_cache_file_bytes{device="base"} ${bytes.length}\n`)
  expect(metrics).toMatch(/^tmem_request_duration_seconds_count\{device="base",server="nbd",operation="read"\} [1-9]/m)
  expect(metrics).not.toContain('tmem_layer_value')
  expect((await tmem(['stat', '--control', join(folder, 'control.sock')])).code).toBe(0)
  expect(await down()).toBe(0)
  expect(readdirSync(folder).toSorted()).toEqual(['back', 'base.raw', 'tmem.yaml'])
})

test('nobody writes it, what others change is seen, what is cut off is an error', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: ['nbdsh'], paths: ['/usr/bin/python3'] })
  const folder = temporaryDirectory()
  const file = join(folder, 'base.raw')
  writeFileSync(file, image(1))
  const { down } = await up(folder)
  const python = async (program: string): Promise<string> =>
    (
      await run('/usr/bin/python3', ['-c', `import nbd\nh = nbd.NBD()\nh.connect_uri('${uri(folder)}')\n${program}`])
    ).stdout.trim()
  expect(await python('print(h.is_read_only(), bytes(h.pread(512, 0)).hex())')).toBe(
    `True ${readFileSync(file).subarray(0, 512).toString('hex')}`,
  )
  const bytes = image(1)
  writeFileSync(file, bytes)
  expect(await python('print(bytes(h.pread(4096, 8192)).hex())')).toBe(bytes.subarray(8192, 12_288).toString('hex'))
  truncateSync(file, 4096)
  expect(await python('try: h.pread(512, 8192)\nexcept nbd.Error as e: print(e.errno)')).toBe('EIO')
  expect(await down()).toBe(0)
})

test.each([
  ['not there', (): void => undefined, /does not exist$/],
  ['a folder', (path: string): void => mkdirSync(path), /is not a regular file$/],
  ['no whole sectors', (path: string): void => writeFileSync(path, 'x'), /has 1 bytes: expected whole sectors of 512$/],
  ['empty', (path: string): void => writeFileSync(path, ''), /has 0 bytes: expected whole sectors of 512$/],
])('a file that is %s is told, and nothing is left', async (_, make, message) => {
  const folder = temporaryDirectory()
  make(join(folder, 'base.raw'))
  const before = readdirSync(folder)
  writeFileSync(join(folder, 'tmem.yaml'), text)
  const { code, stderr } = await tmem(['up', '-f', join(folder, 'tmem.yaml')])
  expect(code).toBe(2)
  expect(stderr.trimEnd()).toMatch(message)
  expect(readdirSync(folder).toSorted()).toEqual([...before, 'tmem.yaml'].toSorted())
})

test('a file with two roles is refused', async () => {
  const folder = temporaryDirectory()
  writeFileSync(join(folder, 'base.raw'), Buffer.alloc(4096))
  const both = text.replace(
    'devices: {}',
    'devices: { a: { size: 4096, stack: "frontswap(file=base.raw,size=64KiB)" } }',
  )
  writeFileSync(join(folder, 'tmem.yaml'), both)
  const { code, stderr } = await tmem(['up', '-f', join(folder, 'tmem.yaml')])
  expect([code, stderr]).toEqual([2, expect.stringContaining('would be both a backing file of a and the file of base')])
  expect(readFileSync(join(folder, 'base.raw')).equals(Buffer.alloc(4096))).toBe(true)
})
