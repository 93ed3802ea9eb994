import { chmodSync, mkdirSync, readdirSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { compose } from '@tmem/core'
import { corrupt } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { describe, expect, test } from 'vitest'
import { z } from 'zod'
import { requires } from '../../../tools/requires.ts'
import { type Input, readInput } from '../src/demo/input.ts'
import { runMachine } from '../src/demo/machine.ts'
import { createRandom, createStream } from '../src/demo/workload.ts'
import { BadInput, endingOf, Failed, Interrupted } from '../src/ending.ts'
import { silentTerminal, temporaryDirectory, tmem } from './tmem.ts'

const count = z.number().int().nonnegative()
const machine = (name: string) =>
  z.strictObject({
    name: z.literal(name),
    seconds: z.number().positive(),
    slowdown: z.number().positive(),
    swapOuts: count,
    swapIns: count,
    diskWrites: count,
    diskReads: count,
    diskBytes: count,
    refusals: z.record(z.string(), z.number().int().positive()),
    tmem: z.strictObject({
      pages: count,
      bytes: count,
      ratio: z.number().positive(),
      cpuSeconds: z.number().nonnegative(),
    }),
    places: z.array(z.strictObject({ name: z.string(), pages: count, bytes: count })),
  })
const report = z.strictObject({
  input: z.strictObject({
    pages: count,
    sources: z.array(z.strictObject({ path: z.string(), bytes: count })).nonempty(),
  }),
  settings: z.strictObject({
    seed: count,
    memoryBytes: count,
    partBytes: count,
    budgetBytes: count,
    references: count,
    directIo: z.boolean(),
  }),
  machines: z.tuple([machine('memory'), machine('tmem'), machine('swap')]),
  diskIoAvoided: z.number().min(0).max(1),
  comparedBytes: count,
  wrongBytes: z.literal(0),
})

describe('tmem demo', () => {
  test('prints one JSON document, in which things add up, and leaves nothing behind', async () => {
    const directory = temporaryDirectory()
    const { code, stdout, stderr } = await tmem(['demo', '--size', '4MiB', '--seed', '5', '--dir', directory, '--json'])
    expect({ code, lines: stdout.split('\n').length }).toEqual({ code: 0, lines: 2 })
    for (const name of ['memory', 'tmem', 'swap'])
      expect(stderr).toMatch(new RegExp(`^${name} machine: \\d+\\.\\d\\d s$`, 'm'))
    expect(readdirSync(directory)).toEqual([])

    const found = report.parse(JSON.parse(stdout))
    const [all, part, swap] = found.machines
    expect(found.settings).toMatchObject({ seed: 5, memoryBytes: 2 ** 22, partBytes: 2 ** 21, budgetBytes: 2 ** 21 })
    expect(found.input.pages).toBe(1024)
    // Seven references in ten are reads, and at the end each page is read once more; on three machines.
    expect(found.comparedBytes / 4096 / 3).toBeGreaterThan(0.69 * found.settings.references + 1024)
    expect(found.comparedBytes / 4096 / 3).toBeLessThan(0.71 * found.settings.references + 1024)
    expect(found.input.sources.reduce((sum, { bytes }) => sum + bytes, 0)).toBe(2 ** 22)
    expect(all).toMatchObject({ slowdown: 1, swapOuts: 0, swapIns: 0, diskWrites: 0, diskReads: 0, diskBytes: 0 })
    expect(all).toMatchObject({ refusals: {}, tmem: { pages: 0, bytes: 0, ratio: 1, cpuSeconds: 0 } })
    expect(part.slowdown).toBeCloseTo(part.seconds / all.seconds, 9)

    // On the swap machine every page that comes is I/O, but for those that repeat one word; what goes is written many
    // at a time.
    expect(swap.swapOuts).toBeGreaterThan(512)
    expect(swap.diskReads).toBeLessThanOrEqual(swap.swapIns)
    expect(swap.diskReads).toBeGreaterThan(0.9 * swap.swapIns)
    expect(swap.diskWrites).toBeLessThan(swap.swapOuts / 2)
    expect(swap.refusals).toEqual({})
    // With tmem hardly anything needs the disk: half of the memory, compressed, has room for the other half.
    expect(part.refusals).toEqual({})
    expect(part.diskWrites).toBeLessThan(swap.diskWrites / 10)
    expect(found.diskIoAvoided).toBeCloseTo(
      1 - (part.diskReads + part.diskWrites) / (swap.diskReads + swap.diskWrites),
      9,
    )
    expect(found.diskIoAvoided).toBeGreaterThan(0.95)
    expect(part.tmem.pages).toBeGreaterThan(0)
    expect(part.tmem.bytes).toBeLessThanOrEqual(2 ** 21)
    expect(part.tmem.ratio).toBeCloseTo((part.tmem.pages * 4096) / part.tmem.bytes, 9)
    expect(part.tmem.cpuSeconds).toBeGreaterThan(0)
  })

  test('prints a table and how to go on, from the files that it was given', async () => {
    const input = temporaryDirectory()
    const dir = temporaryDirectory()
    mkdirSync(join(input, 'below'))
    writeFileSync(join(input, 'below', 'text'), 'some text that compresses. '.repeat(60_000))
    const words = ['demo', '--input', input, process.execPath, '--size', '3MiB', '--budget', '512KiB', '--dir', dir]
    const { code, stdout } = await tmem(words)
    expect(code).toBe(0)
    for (const part of [
      '768 pages (3MiB)',
      `  ${input} (`,
      `  ${process.execPath} (`,
      'slowdown',
      'swap-outs',
      'disk I/O avoided',
      'compression ratio',
      'CPU in tmem',
      ': 0 wrong bytes.',
      ' demo --help ',
      'README.md',
    ])
      expect(stdout).toContain(part)
    expect(stdout).toMatch(/^memory +3\.0 MiB +1\.5 MiB +1\.5 MiB$/m)
  })

  test('tells what rests where when the budget overflows, and reads less from the disk than a machine without tmem', async () => {
    const directory = temporaryDirectory()
    const words = ['--size', '16MiB', '--budget', '1MiB', '--seed', '3', '--dir', directory, '--json']
    const { code, stdout } = await tmem(['demo', ...words])
    expect(code).toBe(0)
    const found = report.parse(JSON.parse(stdout))
    const [, part, swap] = found.machines
    expect(found.settings.partBytes).toBe(8 * 2 ** 20)
    const pagesIn = (name: string): number => part.places.find((place) => place.name === name)?.pages ?? 0
    expect(pagesIn('zcache')).toBeGreaterThan(150)
    expect(pagesIn('frontswap')).toBeGreaterThan(300)
    expect(part.tmem.bytes).toBeLessThanOrEqual(2 ** 20)
    expect(part.diskReads).toBeLessThan(swap.diskReads)
    // Cold pages go down many at a time.
    expect(part.diskWrites).toBeLessThan(swap.swapOuts / 10)
  })

  test('keeps pages that do not shrink while there is room', async () => {
    const directory = temporaryDirectory()
    const random = createRandom(1)
    writeFileSync(
      join(directory, 'noise'),
      new Uint32Array(2 ** 18).map(() => random() * 2 ** 32),
    )
    const { code, stdout } = await tmem(['demo', '--input', join(directory, 'noise'), '--dir', directory, '--json'])
    expect(code).toBe(0)
    const [, part, swap] = report.parse(JSON.parse(stdout)).machines
    expect(part.tmem.pages).toBeGreaterThan(0)
    expect(part.tmem.ratio).toBeLessThan(1)
    expect(part.diskReads).toBeLessThan(swap.diskReads)
  })

  test('says so when the swap file is not on a disk', async (ctx) => {
    requires(ctx, { paths: ['/dev/shm'] })
    const { code, stdout } = await tmem(['demo', '--size', '1MiB', '--dir', '/dev/shm'])
    expect(code).toBe(0)
    expect(stdout).toContain('The file system refused direct I/O')
  })

  test('takes what there is when no size is given', async () => {
    const input = temporaryDirectory()
    writeFileSync(join(input, 'file'), 'abcdefgh'.repeat(2 ** 17 + 100))
    const { code, stdout } = await tmem(['demo', '--input', join(input, 'file'), '--json'])
    expect(code).toBe(0)
    expect(report.parse(JSON.parse(stdout)).input).toEqual({
      pages: 256,
      sources: [{ path: join(input, 'file'), bytes: 2 ** 20 }],
    })
  })
})

describe('bad input ends with exit code 2, one line, and nothing left behind', () => {
  test.each([
    [['--input', '/nowhere/at-all'], 'cannot read --input /nowhere/at-all: ENOENT'],
    [['--input', '/dev/null'], 'cannot use --input /dev/null: it is neither a file nor a directory'],
    [['--input', 'DIR'], 'the input is too small: DIR has 0 bytes, the demo needs 1MiB'],
    [['--input', 'DIR/small', '--size', '1MiB'], 'the input is too small: DIR/small has 5 bytes, --size is 1MiB'],
    [['--input', 'DIR/loop'], 'cannot read --input DIR/loop: ELOOP'],
    [['--size', 'many'], "option '--size <bytes>' argument 'many' is invalid."],
    [['--size', '8KiB'], '--size 8KiB is too small: the demo needs at least 1MiB'],
    [['--size', '1000TiB'], '--size 1000TiB is too large: the demo needs a little more than twice as much memory'],
    [
      ['--size', '2MiB', '--budget', '2MiB'],
      '--budget 2MiB is too large: tmem gets a part of the 2MiB of --size, not all of it',
    ],
    [
      ['--size', '2MiB', '--budget', '1GiB'],
      '--budget 1GiB is too large: tmem gets a part of the 2MiB of --size, not all of it',
    ],
    [['--size', '2MiB', '--budget', '4KiB'], '--budget 4KiB is too small: zcache needs 256KiB'],
    [
      ['--size', '2MiB', '--dir', '/nowhere/at-all'],
      'cannot make a swap file in /nowhere/at-all: the directory does not exist: make it with mkdir -p /nowhere/at-all',
    ],
    [['--size', '2MiB', '--dir', 'DIR/small'], 'cannot make a swap file in DIR/small: it is not a directory'],
  ])('tmem demo %j', async (words, message) => {
    const directory = temporaryDirectory()
    const input = join(directory, 'input')
    const swap = join(directory, 'swap')
    mkdirSync(input)
    mkdirSync(swap)
    const named = words.map((word) => word.replace('DIR', input))
    if (words.some((word) => word.includes('small'))) writeFileSync(join(input, 'small'), 'small')
    if (words.some((word) => word.includes('loop'))) symlinkSync('loop', join(input, 'loop'))
    const place = words.includes('--dir') ? [] : ['--dir', swap]
    const { code, stdout, stderr } = await tmem(['demo', ...named, ...place, '--json'])
    expect({ code, stdout, lines: stderr.split('\n').length }).toEqual({ code: 2, stdout: '', lines: 2 })
    expect(stderr).toContain(`tmem: ${message.replace('DIR', input)}`)
    expect(readdirSync(swap)).toEqual([])
  })

  test('no space for the swap file', async (ctx) => {
    requires(ctx, { commands: ['unshare', 'mount'], root: true })
    const directory = temporaryDirectory()
    // A file system of 2 MiB, in a mount name space of its own that goes away with the program.
    const mount = `mount -t tmpfs -o size=2m tmpfs ${directory} && exec "$@"`
    const { code, stdout, stderr } = await tmem(['demo', '--size', '4MiB', '--dir', directory], {
      through: ['unshare', '--mount', 'sh', '-c', mount, 'sh'],
    })
    expect({ code, stdout, lines: stderr.split('\n').length }).toEqual({ code: 2, stdout: '', lines: 2 })
    expect(stderr).toContain(`tmem: no space for the swap file: ${directory} has 2MiB free, the demo needs 4MiB`)
  })

  test('a file that may not be read', async () => {
    const directory = temporaryDirectory()
    const path = join(directory, 'secret')
    writeFileSync(path, Buffer.alloc(2 ** 20))
    chmodSync(directory, 0o755)
    chmodSync(path, 0)
    const root = process.geteuid?.() === 0
    try {
      if (root) process.seteuid!(65534)
      const reading = readInput({ paths: [directory], defaultBytes: 2 ** 20, minPages: 1 }, silentTerminal())
      await expect(reading).rejects.toThrow(
        new BadInput(`cannot read --input ${path}: EACCES: permission denied, open '${path}'`),
      )
    } finally {
      if (root) process.seteuid!(0)
    }
  })
})

describe('interrupted, it ends with exit code 130 and leaves nothing behind', () => {
  test.each(['SIGINT', 'SIGTERM'] as const)('%s', async (signal) => {
    const directory = temporaryDirectory()
    const ended = await tmem(['demo', '--size', '16MiB', '--dir', directory, '--json'], {
      during: async (running) => {
        // The first swap file is the second machine's.
        for (let wait = 0; wait < 500 && !readdirSync(directory, { recursive: true }).some(isSwapFile); wait++)
          await setTimeout(10)
        expect(readdirSync(directory, { recursive: true }).some(isSwapFile)).toBe(true)
        running.kill(signal)
      },
    })
    expect(ended).toEqual({ code: 130, stdout: '', stderr: expect.stringMatching(/^tmem: interrupted$/m) })
    expect(readdirSync(directory)).toEqual([])
  })

  const isSwapFile = (name: string | Buffer): boolean => String(name).endsWith('swap.img')
})

describe('reading input', () => {
  const read = (paths: string[], size: number): Promise<Input> =>
    readInput({ paths, size, defaultBytes: 0, minPages: 1 }, silentTerminal())

  test('lays files one behind the other, without .git and .cache', async () => {
    const directory = temporaryDirectory()
    for (const name of ['.git', '.cache', 'b']) mkdirSync(join(directory, name))
    writeFileSync(join(directory, '.git', 'pack'), 'x'.repeat(10_000))
    writeFileSync(join(directory, '.cache', 'junk'), 'x'.repeat(10_000))
    writeFileSync(join(directory, 'c'), 'c'.repeat(5000))
    writeFileSync(join(directory, 'b', 'inner'), 'b'.repeat(3000))
    writeFileSync(join(directory, 'a'), 'a'.repeat(192))
    const { pages, bytes, sources } = await read([directory], 8192)
    expect(pages).toBe(2)
    expect(bytes.toString()).toBe('a'.repeat(192) + 'b'.repeat(3000) + 'c'.repeat(5000))
    expect(sources).toEqual([{ path: directory, bytes: 8192 }])
  })

  test('takes pieces at even distances when there is more than is wanted', async () => {
    const path = join(temporaryDirectory(), 'large')
    const words = new Uint32Array(2 ** 20).map((_, word) => word)
    writeFileSync(path, words)
    const { bytes } = await read([path], 2 ** 17)
    const seen = new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4)
    // 8 pieces of 16 KiB, one from each 512 KiB.
    for (let word = 0; word < seen.length; word++)
      expect(seen[word]).toBe(Math.floor(word / 4096) * (2 ** 20 / 8) + (word % 4096))
  })
})

describe('a machine', () => {
  const input: Input = {
    pages: 64,
    bytes: Buffer.from(new Uint8Array(64 * 4096).map((_, at) => (at >>> 12) + (at & 4095) * 7)),
    sources: [],
  }
  const stream = createStream({ pages: 64, references: 2000, exponent: 1.1, writes: 0.3, seed: 3 })
  const run = async (layers: Parameters<typeof compose>[0], signal?: AbortSignal): Promise<void> => {
    const store = compose(layers)
    try {
      await runMachine(
        { name: 'test', frames: 20, store, isWoken: () => false, input, stream },
        () => undefined,
        silentTerminal(signal),
      )
    } finally {
      await store.close()
    }
  }

  test('ends at the first wrong byte, with page and offset, and exit code 1', async () => {
    await run([memory({ limitBytes: 2 ** 20 })])
    const wrong =
      /^wrong data on the test machine: page \d+, offset \d+: got 0x[0-9a-f]{2}, last written was 0x[0-9a-f]{2}$/
    const failure = await run([corrupt({ every: 100 }), memory({ limitBytes: 2 ** 20 })]).catch(
      (error: unknown) => error,
    )
    expect(failure).toBeInstanceOf(Failed)
    expect(endingOf(failure)).toEqual({ code: 1, message: expect.stringMatching(wrong) })
  })

  test('ends when interrupted', async () => {
    const interruption = new AbortController()
    interruption.abort()
    await expect(run([memory({ limitBytes: 2 ** 20 })], interruption.signal)).rejects.toBeInstanceOf(Interrupted)
  })
})
