/**
 * `tmem up` with swap: two areas over one mount, on in the order of the file, off in the opposite one; and what is left
 * where it fails or is interrupted on the way: nothing.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { expect, onTestFinished, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { bin } from '../serving.ts'
import { temporaryDirectory, tmem } from '../tmem.ts'

const needs = {
  root: true,
  commands: ['losetup', 'mkswap', 'swapon', 'swapoff'],
  paths: ['/dev/fuse', '/dev/loop-control'],
}

const text = `
stack: zcache(limit=16MiB) > frontswap(file={name}.img,size=40MiB)
devices:
  first: { size: 32MiB, swap: { priority: 20 } }
  second: { size: 32MiB, swap: { priority: 10 } }
fuse: mount
control: control.sock
`

interface Place {
  readonly folder: string
  readonly file: string
  readonly child: ChildProcess
  readonly ended: Promise<number | null>
  readonly said: () => string
}

/** Begins to bring it up. */
function begin(says = text): Place {
  const folder = temporaryDirectory()
  const mount = join(folder, 'mount')
  mkdirSync(mount)
  const file = join(folder, 'tmem.yaml')
  writeFileSync(file, says)
  const child = spawn(process.execPath, [bin, 'up', '-f', file], { stdio: ['ignore', 'pipe', 'pipe'] })
  let said = ''
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding('utf8').on('data', (part: string) => {
      said += part
    })
  const ended = new Promise<number | null>((resolve) => child.once('close', resolve))
  onTestFinished(() => {
    if (child.exitCode !== null) return
    for (const [name] of areas(mount)) spawnSync('swapoff', [name!], { timeout: 30_000 })
    child.kill('SIGKILL')
    spawnSync('umount', ['-l', mount], { timeout: 30_000 })
  })
  return { folder, file, child, ended, said: () => said }
}

/** Active swap areas over files of a mount: loop device, its file's name, priority. */
function areas(mount: string): string[][] {
  const swaps = readFileSync('/proc/swaps', 'utf8').split('\n')
  return readdirSync('/sys/block').flatMap((name) => {
    const note = `/sys/block/${name}/loop/backing_file`
    const over = existsSync(note) ? readFileSync(note, 'utf8').trim() : ''
    const line = swaps.find((one) => one.startsWith(`/dev/${name} `) || one.startsWith(`/dev/${name}\t`))
    if (!over.startsWith(mount) || line === undefined) return []
    return [[`/dev/${name}`, over.slice(mount.length + 1), line.trim().split(/\s+/).at(-1)!]]
  })
}

const left = ({ folder }: Place): object => ({
  files: readdirSync(folder).toSorted(),
  mounted: readFileSync('/proc/self/mounts', 'utf8').includes(folder),
  areas: areas(join(folder, 'mount')),
})
const nothing = { files: ['mount', 'tmem.yaml'], mounted: false, areas: [] }

const ready = async (place: Place): Promise<void> => {
  while (!place.said().includes('SIGTERM ends it')) {
    if (place.child.exitCode !== null) throw new Error(place.said())
    await setTimeout(50)
  }
}

test('two areas are on as the file says, and off with tmem down', async (ctx) => {
  requires(ctx, needs)
  const place = begin()
  await ready(place)
  const on = areas(join(place.folder, 'mount')).map(([, file, priority]) => [file!, priority!])
  expect(Object.fromEntries(on)).toEqual({ first: '20', second: '10' })
  expect(place.said()).toContain('first: 32MiB, this host swaps to it\n')
  const { code, stdout } = await tmem(['status', '-f', place.file, '--json'])
  expect(code).toBe(0)
  expect(JSON.parse(stdout)).toMatchObject({
    devices: [
      { name: 'first', swap: { priority: 20 } },
      { name: 'second', swap: { priority: 10 } },
    ],
    differences: [],
  })
  expect(await tmem(['swap', 'off', 'second', '--control', join(place.folder, 'control.sock')])).toMatchObject({
    code: 0,
  })
  const differs = await tmem(['status', '-f', place.file])
  expect(differs.code).toBe(1)
  expect(differs.stderr).toContain('second is not swapped to')
  expect(await tmem(['down', '-f', place.file])).toMatchObject({ code: 0 })
  expect(await place.ended).toBe(0)
  expect(left(place)).toEqual(nothing)
})

test.for([100, 300, 500, 700, 900, 1200])('interrupted %d ms after its start it leaves nothing', async (ms, ctx) => {
  requires(ctx, needs)
  const place = begin()
  await setTimeout(ms)
  place.child.kill('SIGTERM')
  const code = await place.ended
  // A signal may come before the program takes any, or after all is done.
  expect(['SIGTERM', 130, 0]).toContain(place.child.signalCode ?? code)
  expect(left(place)).toEqual(nothing)
})

test.for([500, 700, 900, 1100, 1300, 1500])(
  'interrupted twice, %d ms after its start, it leaves nothing either',
  async (ms, ctx) => {
    requires(ctx, needs)
    const place = begin()
    await setTimeout(ms)
    // npm hands on the signal that the terminal has sent to both.
    for (let n = 0; n < 4; n++) {
      place.child.kill('SIGINT')
      await setTimeout(15)
    }
    const code = await place.ended
    expect(['SIGINT', 130, 0]).toContain(place.child.signalCode ?? code)
    expect(left(place)).toEqual(nothing)
  },
)

test('where the second area cannot be had, the first is off again', async (ctx) => {
  requires(ctx, needs)
  // mkswap refuses areas of less than ten pages.
  const place = begin(text.replace('second: { size: 32MiB', 'second: { size: 16KiB'))
  expect(await place.ended).toBe(1)
  expect(place.said()).toMatch(/mkswap .* failed/)
  expect(left(place)).toEqual(nothing)
})
