/** The programs around a server: what they answer, and how they end. Swapping for real is in test/system. */
import { spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { accessSync, constants, existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, onTestFinished, test, vi } from 'vitest'
import { type Answer, Client } from '../../../packages/nbd/test/client.ts'
import { requires } from '../../../tools/requires.ts'
import { bin, serving, servingIn } from './serving.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

/** Of the NBD protocol. */
const Command = { flush: 3, trim: 4, resize: 8 } as const
const fua = 1

interface Tree {
  readonly name: string
  readonly counters: Readonly<Record<string, number>>
  readonly children: readonly Tree[]
}

const twoDevices = ['--device', 'name=a,size=8MiB', '--device', 'name=b,size=4MiB,memlimit=64KiB']
const filed = 'zcache(limit=4MiB,zvMaxZsize=2048) > frontswap(file="FOLDER/{name}.img",size={size})'

describe('tmem serve', () => {
  test('serves several devices, each over its own stack, tells about them, and stops clean', async () => {
    const { folder, control, info, stop } = await serving(filed, ...twoDevices)
    expect(info).toMatchObject({
      fuse: null,
      nbd: [`unix:${folder}/nbd.sock`],
      devices: [
        { name: 'a', sizeBytes: 2 ** 23 },
        { name: 'b', sizeBytes: 2 ** 22 },
      ],
    })
    expect(readdirSync(folder).sort()).toEqual(['a.img', 'b.img', 'control.sock', 'control.sock.record', 'nbd.sock'])
    const { stdout } = await tmem(['stat', '--control', control])
    expect(stdout.split('\n').map((line) => line.split(/\s+/).slice(0, 5))).toEqual([
      ['device', 'size', 'pages', 'used', 'same'],
      ['a', '8MiB', '2048', '0', '0'],
      ['b', '4MiB', '1024', '0', '0'],
      ['device', 'place', 'pages', 'bytes', 'put'],
      ['a', 'zcache', '0', '0.0MiB', '0'],
      ['a', 'frontswap', '0', '0.0MiB', '0'],
      ['b', 'zcache', '0', '0.0MiB', '0'],
      ['b', 'frontswap', '0', '0.0MiB', '0'],
      [''],
    ])
    const { devices, servers } = JSON.parse((await tmem(['stat', '--json', '--control', control])).stdout)
    expect(devices.map(({ name, counters }: { name: string; counters: object }) => [name, counters])).toMatchObject([
      ['a', { disksize: 2 ** 23, memlimit: 0 }],
      ['b', { disksize: 2 ** 22, memlimit: 65536 }],
    ])
    expect(servers[0].name).toBe('nbd')
    expect(await stop()).toEqual({ code: 0, stderr: '' })
    expect(readdirSync(folder)).toEqual([])
  })

  test('what is written over NBD is read back, and counted', async (ctx) => {
    requires(ctx, { commands: ['qemu-io'] })
    const { folder, control, stop } = await serving(filed, ...twoDevices)
    const uri = `nbd+unix:///a?socket=${folder}/nbd.sock`
    const written = await run(
      'qemu-io',
      '-f',
      'raw',
      '-c',
      'write -P 7 0 1M',
      '-c',
      'write -P 0 1M 64k',
      '-c',
      'discard 0 512k',
      '-c',
      'read -P 7 512k 512k',
      uri,
    )
    expect(written).toMatchObject({ code: 0, output: expect.not.stringContaining('failed') })
    const { devices } = JSON.parse((await tmem(['stat', '--json', '--control', control])).stdout)
    expect(devices[0].counters).toMatchObject({ pages_zero: 144, notify_free: 128, failed_reads: 0, failed_writes: 0 })
    // A page that the server received in two parts was written twice.
    expect(devices[0].counters.num_writes).toBeGreaterThanOrEqual(272)
    expect((await stop()).code).toBe(0)
  })

  test('limits that follow the host: they begin at the floor, and grow', async () => {
    const stack = 'zcache() > frontswap(file="FOLDER/{name}.img",size={size})'
    const memory = ['--memory', 'auto,floor=4MiB,ceiling=64MiB,reserve=1MiB']
    const { control, stop } = await serving(stack, ...memory, ...twoDevices)
    const limits = async (): Promise<number[]> => {
      const { devices } = JSON.parse((await tmem(['stat', '--json', '--control', control])).stdout)
      return devices.map(({ children }: { children: Tree[] }) => {
        const chain = children.find(({ name }) => name === 'chain')!
        return chain.children.find(({ name }) => name === 'zcache')!.counters['limit_bytes']
      })
    }
    const first = await limits()
    expect(first[0]).toBe(first[1])
    expect(first[0]).toBeGreaterThanOrEqual(2 * 2 ** 20)
    // A thirty-second of the ceiling in a second, each half of it.
    await until(async () => (await limits())[0]! > first[0]!)
    expect((await limits())[0]).toBeLessThanOrEqual(32 * 2 ** 20)
    expect((await stop()).code).toBe(0)
  })

  test.each(['memory(limit=80MiB)', 'zcache(limit=80MiB) > memory(limit=80MiB)'])(
    'memory of pages that are discarded goes back to the system: %s',
    async (stack) => {
      const { folder, info, stop } = await serving(stack, '--device', 'name=a,size=64MiB')
      const resident = (): number =>
        Number(/^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${info.pid}/status`, 'latin1'))![1]) * 1024
      const client = await Client.ready({ path: join(folder, 'nbd.sock') }, { name: 'a' })
      const part = 4 * 2 ** 20
      for (let n = 0; n < 12; n++) expect((await client.write(n * part, randomBytes(part))).error).toBe(0)
      const full = resident()
      expect((await client.request(Command.trim, 0, 12 * part)).error).toBe(0)
      // The collector of an idle process does not come.
      await until(() => new Promise((resolve) => setTimeout(() => resolve(resident() < full - 8 * part), 50)))
      expect((await stop()).code).toBe(0)
    },
  )

  test('a control socket of a killed server is replaced, one in use is not', async () => {
    const { folder, control, stop } = await serving('memory(limit=8MiB)', '--device', 'name=a,size=4MiB')
    const words = [
      'serve',
      '--stack',
      'memory(limit=8MiB)',
      '--device',
      'name=a,size=4MiB',
      '--nbd',
      `unix:${folder}/2`,
      '--control',
      control,
    ]
    const second = await tmem(words)
    expect(second).toMatchObject({ code: 1, stdout: '' })
    expect(second.stderr).toMatch(/^tmem: process \d+ serves on .*: stop it, or name another --control/)
    rmSync(`${control}.record`)
    const third = await tmem(words)
    expect(third.stderr).toMatch(/^tmem: the control socket .* cannot be created: .*EADDRINUSE/)
    expect((await stop()).code).toBe(0)
    expect(existsSync(control)).toBe(false)
  })

  test('the control socket answers nonsense with an error, and goes on', async () => {
    const { control, stop } = await serving('memory(limit=8MiB)', '--device', 'name=a,size=4MiB')
    for (const text of ['\n', '{}\n', 'null\n', '{"do":"nothing"}\n', `${'x'.repeat(5000)}`, '{"do":"info"']) {
      const answer = await talk(control, text, !text.endsWith('\n') && text.length < 4096)
      expect(answer === '' || JSON.parse(answer).error !== undefined).toBe(true)
    }
    expect((await tmem(['stat', '--control', control])).code).toBe(0)
    expect((await stop()).code).toBe(0)
  })

  test.each([
    [['--nbd', 'unix:x'], "required option '--stack <text>' not specified"],
    [['--stack', 'memory(limit=8MiB)', '--device', 'name=a,size=4MiB'], 'say how to serve: add --nbd or --fuse'],
    [['--stack', 'memory(limit=8MiB)', '--device', 'size=4MiB', '--nbd', 'unix:x'], /expected a name and a size/],
    [['--stack', 'memory(limit=8MiB)', '--device', 'name=a,size=4MB', '--nbd', 'unix:x'], /size: expected whole pages/],
    [
      ['--stack', 'memory(limit=8MiB)', '--device', 'name=../a,size=4MiB', '--nbd', 'unix:x'],
      /bad device name "..\/a"/,
    ],
    [['--stack', 'memory(limit=8MiB)', '--device', 'name=a,size=4MiB,x=1', '--nbd', 'unix:x'], /bad device/],
    [
      ['--stack', 'memory(limit=8MiB)', '--device', 'name=a,size=4MiB,writethrough', '--nbd', 'unix:x'],
      /add snapshot=PATH/,
    ],
    [
      [
        '--stack',
        'memory(limit=8MiB)',
        '--device',
        'name=a,size=4MiB,snapshot=x',
        '--device',
        'name=b,size=4MiB,snapshot=./x',
        '--nbd',
        'unix:y',
      ],
      /\/x would be both the snapshot of a and the snapshot of b: give each its own/,
    ],
    [['--stack', 'memory(limit=8MiB)', '--device', 'name=a,size=4MiB', '--nbd', 'udp:x'], /bad address "udp:x"/],
    [
      [
        '--stack',
        'memory(limit=8MiB)',
        '--device',
        'name=a,size=4MiB',
        '--device',
        'name=a,size=4MiB',
        '--nbd',
        'unix:x',
      ],
      'two devices have the name a: rename one',
    ],
    [
      ['--stack', 'zcache(limit=8MiB)', '--device', 'name=a,size=4MiB', '--nbd', 'unix:x'],
      /device a cannot stand above zcache: it needs room for all of its 4194304 bytes.*\(TMEM_BAD_STACK\)/,
    ],
    [
      ['--stack', 'memory(limit=8MiB)', '--device', 'name=a,size=4MiB,memlimit=4KiB', '--nbd', 'unix:x'],
      /memlimitBytes needs a backing store/,
    ],
    [
      ['--stack', 'memory(limit=8MiB)', '--device', 'name=a,size=4MiB', '--nbd', 'unix:x', '--memory', 'much'],
      /bad --memory "much": expected auto/,
    ],
    [
      ['--stack', 'memory(limit=8MiB)', '--device', 'name=a,size=4MiB', '--nbd', 'unix:x', '--memory', 'auto,floor=1'],
      /needs a zcache or memory without a limit, or with limit=auto/,
    ],
    [
      ['--stack', 'memory(limit=auto)', '--device', 'name=a,size=4MiB', '--nbd', 'unix:x'],
      /needs room for all of its 4194304 bytes.*memory reserves 0/,
    ],
    [
      ['--stack', 'zcache(limit=much) > memory(limit=8MiB)', '--device', 'name=a,size=4MiB', '--nbd', 'unix:x'],
      /expected an amount of bytes .* or auto for limit, got "much"/,
    ],
    [
      ['--stack', 'zcache(limit=auto) > memory(limit=8MiB)', '--device', 'name=a,size=4MiB', '--fuse', '/nowhere'],
      /with --fuse all memory is taken before serving, so that no limit can be auto/,
    ],
  ])('bad usage: %j', async (words, message) => {
    const ended = await tmem(['serve', ...words, '--control', join(temporaryDirectory(), 'c')])
    expect(ended).toMatchObject({ code: 2, stdout: '' })
    expect(ended.stderr.trimEnd().split('\n').length).toBe(1)
    expect(ended.stderr).toMatch(message)
  })

  test('sockets that cannot be made are said before anything is opened', async () => {
    const folder = temporaryDirectory()
    const long = join(folder, 'x'.repeat(120))
    for (const [path, words] of [
      [
        join(folder, 'missing', 's'),
        /^tmem: the socket .*missing.s cannot be created: the directory .*missing does not exist: make it with mkdir -p\n$/,
      ],
      [folder, /^tmem: .* exists and is not a socket: name another path\n$/],
      // A file where a directory is wanted.
      [
        join(fileURLToPath(import.meta.url), 's'),
        /^tmem: the socket .* cannot be created: .*\/serve.test.ts is not a directory\n$/,
      ],
      // The runtime would cut it off and listen there.
      [long, /^tmem: the path .* has \d+ bytes, and that of a socket at most 107: name a shorter one\n$/],
    ] as const)
      for (const [nbd, control] of [
        [path, join(folder, 'c')],
        [join(folder, 's'), path],
      ] as const) {
        const stack = filed.replaceAll('FOLDER', folder)
        const ended = await tmem([
          'serve',
          '--stack',
          stack,
          ...twoDevices,
          '--nbd',
          `unix:${nbd}`,
          '--control',
          control,
        ])
        expect(ended).toEqual({ code: 2, stdout: '', stderr: expect.stringMatching(words) })
        expect(readdirSync(folder)).toEqual([])
      }
  })

  test('a signal ends it also while it starts', async () => {
    const folder = temporaryDirectory()
    const image = join(folder, 'a.raw')
    // A second and more to read.
    writeFileSync(image, Buffer.alloc(2 ** 28, 'what was there '))
    const words = ['serve', '--stack', filed.replaceAll('FOLDER', folder), '--control', join(folder, 'c')]
    const ended = await tmem(
      [...words, '--device', `name=a,size=256MiB,snapshot=${image}`, '--nbd', `unix:${folder}/s`],
      {
        during: async (running) => {
          while (running.exitCode === null && !existsSync(`${folder}/a.img`))
            await new Promise((resolve) => setTimeout(resolve, 10))
          running.kill('SIGTERM')
        },
      },
    )
    expect(ended).toEqual({ code: 130, stdout: '', stderr: 'tmem: interrupted\n' })
    expect(readdirSync(folder)).toEqual(['a.raw'])
  })

  test('when its terminal goes it ends cleanly, and nobody need read what it says', async () => {
    const first = await serving('memory(limit=8MiB)', '--device', 'name=a,size=4MiB')
    await first.kill()
    const { folder, control } = first
    const words = ['serve', '--stack', 'memory(limit=8MiB)', '--device', 'name=a,size=4MiB', '--control', control]
    const ended = await tmem([...words, '--nbd', `unix:${folder}/nbd.sock`, '--fresh'], {
      during: async (running) => {
        // What was lost is told there.
        running.stderr.destroy()
        await new Promise((resolve) => running.stdout.once('data', resolve))
        running.kill('SIGHUP')
      },
    })
    expect(ended).toMatchObject({ code: 0, stderr: '' })
    expect(readdirSync(folder)).toEqual([])
  })

  test('what cannot be opened leaves nothing behind', async () => {
    const folder = temporaryDirectory()
    writeFileSync(join(folder, 'b.img'), 'mine')
    const ended = await tmem([
      'serve',
      '--stack',
      filed.replaceAll('FOLDER', folder),
      ...twoDevices,
      '--nbd',
      `unix:${folder}/s`,
      '--control',
      `${folder}/c`,
    ])
    expect(ended).toMatchObject({ code: 1, stdout: '' })
    expect(ended.stderr).toMatch(/b\.img: it is there, and it is none of ours/)
    expect(readdirSync(folder)).toEqual(['b.img'])
  })
})

describe('a device with every kind of place', () => {
  const stack =
    'zcache(limit=1MiB,zvMaxZsize=2048,recompress=deflate) > frontswap(file="FOLDER/{name}.img",size={size})'
  const hypervisor = ['--hypervisor', 'memory(limit=256KiB)']
  const device = ['--device', 'name=v,size=4MiB,max=8MiB']
  const pages = 1024
  /** The columns of the only device, and the pages of its places; whether they add up. */
  const table = async (control: string): Promise<Record<string, string>> => {
    const lines = (await tmem(['stat', '--control', control])).stdout.split('\n').map((line) => line.split(/\s+/))
    const columns = Object.fromEntries(lines[0]!.map((name, n) => [name, lines[1]![n]!]))
    const sum = (of: Record<string, string>, names: readonly string[]): number =>
      names.reduce((all, name) => all + Number(of[name]), 0)
    const parts = sum(columns, ['same', 'hyper', 'compr', 'raw', 'backing', 'lost'])
    let inPlaces = sum(columns, ['same', 'lost'])
    for (const line of lines.slice(3, -1)) {
      const place = Object.fromEntries(lines[2]!.map((name, n) => [name, line[n]!]))
      const left = sum(place, ['put', 'sunk', 'rose']) - sum(place, ['down', 'up', 'gone'])
      expect([place['place'], left]).toEqual([place['place'], Number(place['pages'])])
      inPlaces += left
    }
    expect([parts, inPlaces]).toEqual([Number(columns['used']), Number(columns['used'])])
    return columns
  }
  const turn = async (control: string, ...words: string[]): Promise<string> => {
    const { code, stdout, stderr } = await tmem(['knob', '--control', control, '--json', '--', 'v', ...words])
    return code === 0 ? JSON.parse(stdout)[words[0]!] : stderr.trimEnd()
  }

  test('says what rests where, and its knobs move it; what is read stays the same', { timeout: 60_000 }, async () => {
    const { folder, control, info, stop } = await serving(stack, ...hypervisor, ...device)
    expect(info).toMatchObject({ hypervisor: hypervisor[1] })
    const client = await Client.ready({ path: join(folder, 'nbd.sock') }, { name: 'v' })
    // Zeros, text, text with noise of six bits that only deflate can shrink, and noise.
    const page = (n: number): Buffer => {
      const text = Buffer.alloc(4096, n % 4 === 0 ? 0 : `page ${n} of text `)
      const noise = n % 4 < 2 ? Buffer.alloc(0) : randomBytes(n % 4 === 2 ? 1800 : 4096)
      return Buffer.concat([n % 4 === 2 ? noise.map((byte) => byte & 63) : noise, text]).subarray(0, 4096)
    }
    const content = Array.from({ length: pages - 24 }, (_, n) => page(n))
    expect((await client.write(0, Buffer.concat(content))).error).toBe(0)
    const written = await table(control)
    expect(Number(written['used'])).toBe(pages - 24)
    expect(Number(written['same'])).toBe(250)
    for (const name of ['hyper', 'compr', 'backing']) expect(Number(written[name])).toBeGreaterThan(10)

    expect(await turn(control, 'recall', '10')).toBe('10 pages')
    const recalled = await table(control)
    expect(Number(recalled['hyper'])).toBe(Number(written['hyper']) - 10)
    expect(await turn(control, 'recall', 'all')).toBe(`${recalled['hyper']} pages`)

    expect(await turn(control, 'recompress', 'type=huge')).toBe('0 pages')
    expect(await turn(control, 'recompress', 'threshold=1000', 'max_pages=20')).toMatch(/^(1?\d|20) pages$/)
    const { devices: states } = JSON.parse((await tmem(['stat', '--json', '--control', control])).stdout)
    const slots = states[0].children.find(({ name }: { name: string }) => name === 'slots').counters
    expect(slots.recompressed).toBeGreaterThan(0)

    expect(await turn(control, 'idle', 'all')).toBe(`${pages - 24} pages`)
    expect(await turn(control, 'writeback_limit', '5')).toBe('5')
    expect(await turn(control, 'writeback', 'type=idle')).toBe('5 pages')
    expect(await turn(control, 'writeback_limit_enable')).toBe('1')
    expect(await turn(control, 'writeback_limit_enable', '0')).toBe('0')
    expect(await turn(control, 'writeback_limit')).toBe('off')
    // Nothing may be moved until it is said how much.
    expect(await turn(control, 'writeback_limit_enable', '1')).toBe('1')
    expect(await turn(control, 'writeback', 'type=idle')).toBe('0 pages')
    expect(await turn(control, 'writeback_limit', 'off')).toBe('off')
    // Pages that were moved already are not counted again.
    const [first, second] = [50, 51].map((index) => `page_indexes=${index}-${index + 4}`)
    const moved = await turn(control, 'writeback', first!, 'page_index=60')
    expect(moved).toMatch(/^[1-6] pages$/)
    expect(await turn(control, 'writeback', first!, 'page_index=60')).toBe('0 pages')
    expect(await turn(control, 'writeback', second!)).toMatch(/^[01] pages$/)
    expect(await turn(control, 'writeback', 'idle')).toMatch(/^\d{2,} pages$/)
    const writtenBack = await table(control)
    expect(Number(writtenBack['backing'])).toBe(pages - 24 - 250)

    expect((await client.request(Command.trim, 0, 100 * 4096)).error).toBe(0)
    // Only who may lose what is cut off may do that: not somebody else under the client's feet.
    expect(await turn(control, 'disksize', '2M')).toContain('v is in use: 1 NBD connections')
    expect((await client.request(Command.resize, 2 ** 21, 0)).error).toBe(0)
    const smaller = await table(control)
    expect(smaller).toMatchObject({ size: '2MiB', pages: '512', used: '412', kernel: '-', stale: '-' })
    const got = (await client.read(0, 512 * 4096)).data
    for (let n = 0; n < 512; n++)
      expect(got.subarray(n * 4096, (n + 1) * 4096).equals(n < 100 ? Buffer.alloc(4096) : content[n]!)).toBe(true)

    const all = await tmem(['knob', 'v', '--control', control])
    expect(all.stdout.split('\n').map((line) => line.split(/\s+/)[0])).toEqual([
      'knob',
      'disksize',
      'mem_limit',
      'writeback_limit',
      'writeback_limit_enable',
      'idle',
      'writeback',
      'recompress',
      'recall',
      'mem_used_max',
      'reset',
      'compact',
      '',
    ])
    for (const [words, message] of [
      [['recompress', 'algo=zstd'], /algo=zstd: leave it out: a place has one codec/],
      [['recompress', 'cold=1'], /expected type=, threshold= or max_pages=/],
      [['recompress', 'type=incompressible'], /already tried/],
      [['writeback', 'cold'], /expected huge, idle, huge_idle or incompressible, got cold/],
      [['writeback', 'page_index=512'], /v has no page 512/],
      [['writeback_limit', '-1'], /expected a number, got -1/],
      [['mem_limit', 'much'], /expected an amount of bytes/],
      [['mem_used_max', '1'], /expected 0, which resets it/],
      [['reset', '0'], /expected a number above 0, got 0/],
      [['reset', 'yes'], /expected a number, got yes/],
      [['recompress', 'priority=2'], /priority=2: leave it out: a place has one codec/],
      [['writeback', 'page_indexes=7-3'], /the first is behind the last/],
      [['writeback', 'page_indexes=7'], /expected huge, idle/],
      [['writeback', 'idle', 'cold'], /got cold/],
      [['writeback_limit_enable', 'on'], /expected 0 or 1, got on/],
      [['comp_algorithm', 'lz4'], /there is no knob comp_algorithm; .*the stack sets the compression/],
      [['hot_add', '1'], /there is no knob hot_add; .*--device/],
      [['reset', '1'], /v is in use: 1 NBD connections/],
      [['disksize', '9MiB'], /v was made for at most 8388608 bytes/],
      [['nothing'], /there is no knob nothing; there are disksize, mem_limit/],
    ] as const)
      expect(await turn(control, ...words)).toMatch(message)
    expect((await tmem(['knob', 'w', '--control', control])).stderr).toMatch(/there is no device w; there is v/)
    expect(Number(await turn(control, 'mem_used_max', '0'))).toBeLessThan(
      Number(all.stdout.match(/mem_used_max +(\d+)/)![1]),
    )
    client.socket.destroy()
    await until(async () => (await turn(control, 'reset', '1')) === 'empty')
    expect(await table(control)).toMatchObject({ size: '2MiB', used: '0' })
    const { devices } = JSON.parse((await tmem(['stat', '--json', '--control', control])).stdout)
    expect(devices[0].counters).toMatchObject({ num_reads: 0, num_writes: 0, notify_free: 0, bdev_num_writes: 0 })
    expect(await stop()).toEqual({
      code: 0,
      stderr: expect.stringMatching(/^(tmem: v is in use: 1 NBD connections\n)+$/),
    })
  })

  test('a place that is not there is said by its knob', async () => {
    const { control, stop } = await serving('memory(limit=8MiB)', '--device', 'name=v,size=1MiB')
    expect(await turn(control, 'recompress', 'type=idle')).toMatch(/recompress needs a place with a codec for it/)
    expect(await turn(control, 'recall', 'all')).toBe('0 pages')
    expect(await turn(control, 'writeback', 'idle')).toMatch(/writeback needs a backing store/)
    expect((await stop()).code).toBe(0)
  })

  test('a hypervisor alone is no place for pages', async () => {
    const words = ['--stack', 'zcache(limit=1MiB)', '--hypervisor', 'memory(limit=8MiB)', '--nbd', 'unix:x']
    const ended = await tmem([
      'serve',
      ...words,
      '--device',
      'name=v,size=1MiB',
      '--control',
      join(temporaryDirectory(), 'c'),
    ])
    expect(ended).toMatchObject({
      code: 2,
      stderr: expect.stringContaining('it needs room for all of its 1048576 bytes'),
    })
  })
})

describe('a server that is killed', () => {
  const stack = 'zcache(limit=1MiB,zvMaxZsize=2048) > frontswap(file="FOLDER/{name}.img",size={size})'
  const page = (seed: number): Buffer => Buffer.concat([randomBytes(2048), Buffer.alloc(2048, seed)])
  const client = (folder: string, name: string): Promise<Client> =>
    Client.ready({ path: join(folder, 'nbd.sock') }, { name })
  const must = async (answer: Promise<Answer>): Promise<Buffer> => {
    const { error, data } = await answer
    expect(error).toBe(0)
    return data
  }

  test('and started again serves what was flushed; written through, all that was acknowledged', async () => {
    const folder = temporaryDirectory()
    const words = [
      '--device',
      'name=a,size=8MiB,snapshot=FOLDER/a.raw',
      '--device',
      'name=b,size=8MiB,snapshot=FOLDER/b.raw,writethrough',
    ]
    const first = await servingIn(folder, stack, ...words)
    const flushed = Array.from({ length: 1000 }, (_, n) => page(n))
    const later = Array.from({ length: 1000 }, (_, n) => page(n + 1))
    for (const name of ['a', 'b']) {
      const to = await client(folder, name)
      await must(to.write(4096, Buffer.concat(flushed)))
      await must(to.request(Command.flush, 0, 0))
      await must(to.write(1024 * 4096, Buffer.concat(later)))
      await must(to.write(4096 + 100 * 4096, Buffer.concat(later.slice(0, 100))))
      await must(to.request(Command.trim, 4096 + 300 * 4096, 100 * 4096))
    }
    const [head, ...rows] = (await tmem(['stat', '--control', first.control])).stdout
      .trimEnd()
      .split('\n')
      .map((line) => line.split(/\s+/))
    // 1000 later ones, 100 overwritten and 100 trimmed.
    expect(rows.slice(0, 2).map((row) => row[head!.indexOf('unsaved')])).toEqual(['1200', '0'])
    await first.kill()
    expect(readdirSync(folder)).toContain('a.img')

    const second = await servingIn(folder, stack, ...words)
    for (const name of ['a', 'b']) {
      const from = await client(folder, name)
      const got = await must(from.read(4096, 1000 * 4096))
      const then = await must(from.read(1024 * 4096, 1000 * 4096))
      for (let n = 0; n < 1000; n++) {
        const isLater = n >= 100 && n < 200
        const isTrimmed = n >= 300 && n < 400
        const now = isLater ? later[n - 100]! : isTrimmed ? Buffer.alloc(4096) : flushed[n]!
        const is = (bytes: Buffer, place: Buffer): boolean => place.subarray(n * 4096, (n + 1) * 4096).equals(bytes)
        // What was not flushed may be there or not, but nothing else may be.
        expect(is(now, got) || (name === 'a' && is(flushed[n]!, got)), `page ${n} of ${name}`).toBe(true)
        expect(is(later[n]!, then) || (name === 'a' && is(Buffer.alloc(4096), then)), `page ${n} of ${name}`).toBe(true)
      }
    }
    const { code, stderr } = await second.stop()
    expect(code).toBe(0)
    expect(stderr).toMatch(
      /^tmem: process \d+, the earlier server, was killed: a has all that was flushed, and perhaps a part of later writes/,
    )
    expect(readdirSync(folder).sort()).toEqual(['a.raw', 'b.raw'])

    // A clean end keeps everything.
    const third = await servingIn(folder, stack, ...words)
    await must((await client(folder, 'a')).write(0, later[7]!))
    expect(await third.stop()).toEqual({ code: 0, stderr: '' })
    expect(readFileSync(join(folder, 'a.raw')).subarray(0, 4096)).toEqual(later[7])
  })

  test('a write with FUA is there', async () => {
    const folder = temporaryDirectory()
    const words = ['--device', 'name=a,size=1MiB,snapshot=FOLDER/a.raw']
    const first = await servingIn(folder, stack, ...words)
    const bytes = page(1)
    await must((await client(folder, 'a')).write(8192, bytes, fua))
    await first.kill()
    expect(readFileSync(join(folder, 'a.raw')).subarray(8192, 12288)).toEqual(bytes)
  })

  test('without a snapshot: it says what is lost, and serves again only when told to', async () => {
    const folder = temporaryDirectory()
    const words = ['--device', 'name=a,size=8MiB', '--device', 'name=b,size=1MiB,snapshot=FOLDER/b.raw,writethrough']
    const first = await servingIn(folder, stack, ...words)
    await must((await client(folder, 'a')).write(0, page(1)))
    await first.kill()
    const { pid } = first.info
    const what = `process ${pid}, the earlier server, was killed: the pages of a are lost`
    const again = await tmem([
      'serve',
      '--stack',
      stack.replaceAll('FOLDER', folder),
      '--device',
      'name=a,size=8MiB',
      '--nbd',
      `unix:${folder}/nbd.sock`,
      '--control',
      first.control,
    ])
    expect(again).toMatchObject({ code: 3, stdout: '' })
    expect(again.stderr).toBe(
      `tmem: ${what}, as there was no snapshot. Clients would read zeros: end them, then start with --fresh\n`,
    )
    const seen = JSON.parse((await tmem(['doctor', '--json', '--control', first.control])).stdout)
    expect(seen.checks.find(({ name }: { name: string }) => name === 'server before')).toEqual({
      name: 'server before',
      need: 'advice',
      ok: false,
      found: `process ${pid} was killed; the pages of a are lost`,
      advice: 'end its clients, then start tmem serve with --fresh',
    })
    // What it has left answers nothing, and its next start takes that away: no advice of its own.
    expect(seen.checks.some(({ name }: { name: string }) => name === 'server')).toBe(false)
    for (const question of [['stat'], ['top', '--once'], ['explain', 'a', '0'], ['swap', 'status']])
      expect(await tmem([...question, '--control', first.control])).toMatchObject({
        code: 1,
        stderr: `tmem: no server at ${first.control}: process ${pid}, the last one, was killed; start it again, which says what is lost and what to run first\n`,
      })
    const second = await servingIn(folder, stack, ...words, '--fresh')
    expect(await must((await client(folder, 'a')).read(0, 4096))).toEqual(Buffer.alloc(4096))
    expect(await second.stop()).toEqual({ code: 0, stderr: `tmem: ${what}\n` })
    // That was a clean end: nothing to consent to.
    const third = await servingIn(folder, stack, ...words)
    expect(await third.stop()).toEqual({ code: 0, stderr: '' })
  })

  test('is not missed by clients that left before it was asked to end', async () => {
    const server = await serving(stack, '--device', 'name=a,size=8MiB')
    const clients = await Promise.all(Array.from({ length: 8 }, () => client(server.folder, 'a')))
    await must(clients[0]!.write(0, page(1)))
    // So it is told of both at once: its clients' ends, and the signal.
    process.kill(server.info.pid, 'SIGSTOP')
    for (const one of clients) {
      one.request(Command.flush, 0, 0).catch(() => undefined)
      one.socket.destroySoon()
    }
    await Promise.all(clients.map(({ closed }) => closed))
    const ended = server.stop()
    process.kill(server.info.pid, 'SIGCONT')
    expect(await ended).toEqual({ code: 0, stderr: '' })
  })

  test.runIf(process.platform === 'linux')(
    'a killed server that nobody has reaped (state Z) stands in nobody\u2019s way',
    async () => {
      const folder = temporaryDirectory()
      const words = ['--device', 'name=a,size=8MiB,snapshot=FOLDER/a.raw', '--device', 'name=b,size=8MiB', '--json']
      const files = 'zcache(limit=4MiB) > frontswap(file=FOLDER/{name}.img,size={size})'
      const line = [
        'serve',
        '--stack',
        files,
        '--nbd',
        'unix:FOLDER/nbd.sock',
        '--control',
        'FOLDER/control.sock',
        ...words,
      ]
      const program = [process.execPath, bin, ...line].map((word) => `'${word.replaceAll('FOLDER', folder)}'`).join(' ')
      // What the shell becomes has a child of which it knows nothing.
      const parent = spawn('sh', ['-c', `${program} & exec sleep 600`], { stdio: ['ignore', 'pipe', 'inherit'] })
      onTestFinished(() => void parent.kill('SIGKILL'))
      const { pid } = JSON.parse(
        await new Promise<string>((resolve) => parent.stdout.setEncoding('utf8').once('data', resolve)),
      )
      process.kill(pid, 'SIGKILL')
      await vi.waitFor(() => expect(readFileSync(`/proc/${pid}/stat`, 'latin1')).toContain(' Z '))
      const second = await servingIn(folder, files, ...words.slice(0, -1), '--fresh')
      expect(await second.stop()).toMatchObject({
        code: 0,
        stderr: expect.stringContaining(`process ${pid}, the earlier server`),
      })
      expect(readFileSync(`/proc/${pid}/stat`, 'latin1')).toContain(' Z ')
    },
  )

  test('two servers never have one snapshot, and a record that is none is not believed', async () => {
    const folder = temporaryDirectory()
    const device = ['--device', 'name=a,size=1MiB,snapshot=FOLDER/a.raw']
    const { info, control, stop } = await servingIn(folder, 'memory(limit=8MiB)', ...device)
    const words = ['serve', '--stack', 'memory(limit=8MiB)', '--nbd', `unix:${folder}/2`]
    const second = await tmem([
      ...words,
      ...device.map((word) => word.replace('FOLDER', folder)),
      '--control',
      join(folder, 'other.sock'),
    ])
    expect(second).toMatchObject({ code: 1, stderr: expect.stringContaining(`process ${info.pid} uses it already`) })
    expect((await stop()).code).toBe(0)
    for (const text of ['', '{}', 'x'.repeat(8192)]) {
      writeFileSync(`${control}.record`, text)
      const third = await tmem([...words, '--device', 'name=a,size=1MiB', '--control', control])
      expect(third).toMatchObject({ code: 1, stderr: expect.stringContaining('is not a record of a server') })
      expect(readFileSync(`${control}.record`, 'utf8')).toBe(text)
    }
  })
})

describe('without a server', () => {
  test('stat and swap say so', async () => {
    const control = join(temporaryDirectory(), 'none')
    for (const words of [['stat'], ['swap', 'status'], ['swap', 'on']])
      expect(await tmem([...words, '--control', control])).toMatchObject({
        code: 1,
        stderr: expect.stringMatching(/^tmem: no server at .*start one with tmem up or tmem serve/),
      })
  })

  test('swap says that it needs files', async () => {
    const { control, stop } = await serving('memory(limit=8MiB)', '--device', 'name=a,size=4MiB')
    expect(await tmem(['swap', 'on', '--control', control])).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('start it with --fuse'),
    })
    expect((await stop()).code).toBe(0)
  })

  test('doctor looks at this host and says what to do about each thing that is missing', async () => {
    const control = join(temporaryDirectory(), 'none')
    const { code, stdout } = await tmem(['doctor', '--json', '--control', control])
    const { ready, ways, checks } = JSON.parse(stdout)
    expect(code).toBe(ready ? 0 : 1)
    expect(ready).toBe(ways.fuse || ways.nbd)
    expect(checks.length).toBeGreaterThan(10)
    for (const { ok, advice } of checks) expect(ok ? advice === '' : advice.length > 5).toBe(true)
    const named = (wanted: string) => checks.find(({ name }: { name: string }) => name === wanted)
    expect(named('/dev/fuse').ok).toBe(mayOpen('/dev/fuse'))
    const setting = '/proc/sys/vm/page-cluster'
    const pages = existsSync(setting) ? readFileSync(setting, 'utf8').trim() : undefined
    expect(named('swap read-ahead')).toMatchObject({
      need: 'advice',
      ok: pages !== undefined && Number(pages) >= 5,
      found: pages === undefined ? 'not known' : `vm.page-cluster ${pages}`,
    })
  })

  test('doctor shows the devices that vram can use, or says what to install', async () => {
    const control = join(temporaryDirectory(), 'none')
    const row = async (...through: string[]) => {
      const { stdout } = await tmem(['doctor', '--json', '--control', control], { through })
      return JSON.parse(stdout).checks.find(({ name }: { name: string }) => name === 'video memory')
    }
    const vendors = temporaryDirectory()
    // The loader looks for drivers there alone.
    const none = await row('env', `OCL_ICD_VENDORS=${vendors}`)
    expect(none).toMatchObject({ need: 'advice', ok: false })
    expect(none.found).toMatch(/OpenCL/)
    expect(none.advice).toContain('ocl-icd-libopencl1')
    if (!existsSync('/etc/OpenCL/vendors/pocl.icd')) return
    expect(await row()).toMatchObject({
      ok: true,
      found: expect.stringMatching(/^0: .+, \d+MiB/),
      advice: '',
    })
  })
})

/** Whether this user may read and write a file. */
function mayOpen(path: string): boolean {
  try {
    accessSync(path, constants.R_OK | constants.W_OK)
    return true
  } catch {
    return false
  }
}

/** Waits for what the server finds out by itself, such as that a client has gone. */
async function until(holds: () => Promise<boolean>): Promise<void> {
  for (let tries = 0; !(await holds()); tries++) if (tries > 50) throw new Error(`in vain: ${holds.toString()}`)
}

/** Runs a program to its end. */
function run(command: string, ...words: string[]): Promise<{ code: number | null; output: string }> {
  return new Promise((resolve, reject) => {
    const child = spawn(command, words, { stdio: ['ignore', 'pipe', 'pipe'], timeout: 20_000 })
    let output = ''
    for (const stream of [child.stdout, child.stderr])
      stream.setEncoding('utf8').on('data', (text: string) => {
        output += text
      })
    child.once('error', reject)
    child.once('close', (code) => resolve({ code, output }))
  })
}

/** Sends a text to a socket; what comes back before it is closed. */
function talk(path: string, text: string, leaves: boolean): Promise<string> {
  return new Promise((resolve) => {
    let answer = ''
    const socket = connect(path, () => {
      socket.write(text)
      if (leaves) socket.destroy()
    })
    socket.setEncoding('utf8').on('data', (part: string) => {
      answer += part
    })
    socket.on('error', () => undefined)
    socket.on('close', () => resolve(answer))
  })
}
