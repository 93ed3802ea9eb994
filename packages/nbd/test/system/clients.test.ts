/** Clients that others wrote, against the server as it is built, in this process or one of its own. */
import { execFile, spawn } from 'node:child_process'
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { describe, expect, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { memoryDevice, type NbdExport, type NbdServer, type NbdServerOptions } from '../../src/index.ts'
import { bytesOf, serve, testFolder } from '../client.ts'

const size = 64 * 2 ** 20
const run = async (command: string, ...words: string[]): Promise<string> =>
  (await promisify(execFile)(command, words, { timeout: 60_000 })).stdout

async function start(given: Partial<NbdExport> = {}): Promise<{ folder: string; uri: string; server: NbdServer }> {
  const folder = testFolder()
  const path = join(folder, 'nbd.sock')
  const { server } = await serve({ exports: [{ device: memoryDevice({ sizeBytes: size }), ...given }] }, { path })
  return { folder, server, uri: `nbd+unix:///${given.name ?? ''}?socket=${path}` }
}

async function listening(options: Partial<NbdServerOptions>): Promise<{ path: string; server: NbdServer }> {
  const path = join(testFolder(), 'nbd.sock')
  const { server } = await serve(options, { path })
  return { path, server }
}

/** An image with bytes, zeros that are there, and holes. */
function image(folder: string): string {
  const file = join(folder, 'image')
  const bytes = Buffer.alloc(size)
  bytesOf(1, 5_000_000).copy(bytes, 1_000_000)
  bytesOf(2, 100_001).copy(bytes, 40 * 2 ** 20 + 17)
  writeFileSync(file, bytes)
  return file
}

describe('libnbd', () => {
  test('nbdinfo', async (ctx) => {
    requires(ctx, { commands: ['nbdinfo'] })
    const { uri } = await start({ name: 'disk', description: 'for tests', device: memoryDevice({ sizeBytes: size }) })
    const { exports } = JSON.parse(await run('nbdinfo', '--json', uri))
    expect(exports).toHaveLength(1)
    expect(exports[0]).toMatchObject({
      'export-name': 'disk',
      contexts: ['base:allocation'],
      is_read_only: false,
      can_cache: true,
      can_df: true,
      can_fast_zero: true,
      can_flush: true,
      can_fua: true,
      can_multi_conn: true,
      can_trim: true,
      can_zero: true,
      block_size_preferred: 4096,
      'export-size': size,
    })
    const listed = JSON.parse(await run('nbdinfo', '--json', '--list', uri.replace('/disk?', '/?')))
    expect(listed.exports[0]).toMatchObject({ 'export-name': 'disk', description: 'for tests' })
    expect(JSON.parse(await run('nbdinfo', '--json', '--map', uri))).toEqual([
      { offset: 0, length: size, type: 3, description: 'hole,zero' },
    ])
  })

  test('nbdcopy there and back, over several connections', async (ctx) => {
    requires(ctx, { commands: ['nbdcopy'] })
    const { folder, uri, server } = await start()
    const source = image(folder)
    const copy = join(folder, 'copy')
    await run('nbdcopy', '--connections=4', '--flush', source, uri)
    await run('nbdcopy', '--connections=4', uri, copy)
    expect(readFileSync(copy).equals(readFileSync(source))).toBe(true)
    // What was never written was not read either.
    expect(statSync(copy).blocks * 512).toBeLessThan(size / 2)
    // At least two each time: as many as nbdcopy has threads.
    expect(server.stats().counters['accepted']).toBeGreaterThan(2)
    expect(server.stats().children[0]!.counters['errors']).toBe(0)
  })

  test('nbdcopy from one of our servers to another', async (ctx) => {
    requires(ctx, { commands: ['nbdcopy'] })
    const [one, other] = await Promise.all([start(), start()])
    const source = image(one.folder)
    const copy = join(one.folder, 'copy')
    await run('nbdcopy', source, one.uri)
    await run('nbdcopy', one.uri, other.uri)
    await run('nbdcopy', other.uri, copy)
    expect(readFileSync(copy).equals(readFileSync(source))).toBe(true)
  })

  test('python3-libnbd: every command, with and without structured replies, and its errors', async (ctx) => {
    // Debian's own interpreter has it, whatever python3 is on PATH.
    requires(ctx, { commands: ['nbdsh'], paths: ['/usr/bin/python3'] })
    const { uri, server } = await start({ device: memoryDevice({ sizeBytes: size, blockSize: 512 }) })
    const program = `
import errno, nbd, sys
for structured in (True, False):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    h.set_strict_mode(0)
    h.add_meta_context("base:allocation")
    h.connect_uri(sys.argv[1])
    assert h.get_structured_replies_negotiated() == structured
    assert h.get_block_size(nbd.SIZE_MINIMUM) == 512
    data = bytes(range(256)) * 4096
    h.pwrite(data, 512, nbd.CMD_FLAG_FUA)
    assert h.pread(len(data), 512) == data
    h.flush()
    h.cache(4096, 0)
    h.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE)
    h.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO)
    h.trim(4096, 16384, nbd.CMD_FLAG_FUA)
    assert h.pread(8192, 4096) == bytes(8192)
    assert h.pread(4096, 16384) == bytes(4096)
    if structured:
        got = []
        h.block_status(h.get_size(), 0, lambda name, at, extents, error: got.append((name, at, extents)))
        assert got[0][0] == "base:allocation" and got[0][2][1] == 0 and 3 in got[0][2], got
        parts = []
        h.pread_structured(4096, 512, lambda part, at, status, error: parts.append((bytes(part), at, status)), nbd.CMD_FLAG_DF)
        assert parts == [(bytes(h.pread(4096, 512)), 512, nbd.READ_DATA)], [part[1:] for part in parts]
    for call, wanted in [
        (lambda: h.pread(512, h.get_size()), errno.EINVAL),
        (lambda: h.pwrite(bytes(512), h.get_size()), errno.ENOSPC),
        (lambda: h.pread(100, 0), errno.EINVAL),
        (lambda: h.zero(512, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO), errno.ENOTSUP),
    ]:
        try:
            call()
            assert False, wanted
        except nbd.Error as e:
            assert e.errnum == wanted, (e, wanted)
    cookies = [h.aio_pread(nbd.Buffer(65536), n * 65536) for n in range(64)]
    for cookie in cookies:
        while not h.aio_command_completed(cookie):
            h.poll(-1)
    h.shutdown()
print("done")
`
    expect(await run('/usr/bin/python3', '-c', program, uri)).toBe('done\n')
    expect(server.stats().children[0]!.counters['errors']).toBe(8)
  })
})

describe('qemu', () => {
  test('qemu-img convert and compare', async (ctx) => {
    requires(ctx, { commands: ['qemu-img'] })
    const { folder, uri } = await start()
    const source = image(folder)
    const back = join(folder, 'back')
    await run('qemu-img', 'convert', '-n', '-f', 'raw', '-O', 'raw', source, uri)
    expect(await run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', source, uri)).toContain('identical')
    await run('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', uri, back)
    expect(readFileSync(back).equals(readFileSync(source))).toBe(true)
    const map: { zero: boolean; data: boolean }[] = JSON.parse(
      await run('qemu-img', 'map', '-f', 'raw', '--output=json', uri),
    )
    expect(map.filter(({ zero }) => zero).length).toBeGreaterThan(0)
    expect(map.filter(({ data }) => data).length).toBeGreaterThan(0)
  })

  test('qemu-io: read, write, discard, zero, flush, aligned and not', async (ctx) => {
    requires(ctx, { commands: ['qemu-io'] })
    const { uri } = await start()
    const commands = [
      'write -P 7 0 1M',
      'write -P 8 12345 6789',
      'read -P 8 12345 6789',
      'write -f -P 9 2M 64k',
      'discard 64k 64k',
      'read -P 0 64k 64k',
      'write -z 128k 64k',
      'write -z -u 192k 64k',
      'read -P 0 128k 128k',
      'aio_write -P 5 3M 8M',
      'aio_flush',
      'read -P 5 3M 8M',
      'read -P 7 512k 512k',
      'flush',
    ]
    const words = commands.flatMap((command) => ['-c', command])
    const output = await run('qemu-io', '-f', 'raw', ...words, uri)
    expect(output).not.toMatch(/fail|error/i)
    expect(output.match(/^(read|wrote|discard) /gm)!.length).toBe(12)
  })
})

describe('fio', () => {
  test.for([
    ['randwrite', '4k', 32],
    ['randwrite', '4k', 1],
    ['write', '1m', 4],
    ['randwrite', '512-128k', 16],
  ] as const)('%s of %s, %i at a time, verified', async ([rw, blocks, depth], ctx) => {
    requires(ctx, { commands: ['fio'] })
    const { uri, server } = await start()
    const size32 = String(32 * 2 ** 20)
    const words = [
      '--name=verify',
      '--ioengine=nbd',
      `--uri=${uri}`,
      `--rw=${rw}`,
      `--iodepth=${depth}`,
      '--randseed=7',
      '--verify_state_save=0', // else it leaves a file where it runs
    ]
    const block = blocks.includes('-') ? [`--bsrange=${blocks}`] : [`--bs=${blocks}`]
    await run('fio', ...words, ...block, `--size=${size32}`, '--verify=crc32c', '--verify_fatal=1', '--do_verify=1')
    expect(server.stats().children[0]!.counters['errors']).toBe(0)
    expect(server.stats().children[0]!.counters['bytesRead']).toBeGreaterThanOrEqual(32 * 2 ** 20)
  })
})

test('the server in a process of its own, killed and started again on the same socket', async (ctx) => {
  requires(ctx, { commands: ['nbdinfo'] })
  const path = join(testFolder(), 'nbd.sock')
  const program = `
    import { memoryDevice, nbdServer } from ${JSON.stringify(new URL('../../dist/index.js', import.meta.url).href)}
    const server = nbdServer({ exports: [{ device: memoryDevice({ sizeBytes: 1048576 }) }] })
    await server.listen({ path: ${JSON.stringify(path)} })
    console.log('ready')`
  for (let round = 0; round < 2; round++) {
    const child = spawn(process.execPath, ['--input-type=module', '-e', program], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    const ended = new Promise((resolve) => child.once('exit', resolve))
    try {
      await new Promise((resolve, reject) => {
        child.stdout.once('data', resolve)
        child.once('exit', reject)
      })
      expect((await run('nbdinfo', '--size', `nbd+unix:///?socket=${path}`)).trim()).toBe('1048576')
    } finally {
      child.kill('SIGKILL')
      await ended
    }
  }
})

describe('nbd-client', () => {
  const both: NbdExport[] = ['one', 'two'].map((name) => ({ name, device: memoryDevice({ sizeBytes: size }) }))

  test('lists the exports, on a unix socket and on TCP', async (ctx) => {
    requires(ctx, { commands: ['nbd-client'] })
    const { server, path } = await listening({ exports: both })
    const tcp = await server.listen({ host: '127.0.0.1', port: 0 })
    if (!('port' in tcp)) throw new Error('no port')
    for (const words of [
      ['-unix', path],
      ['127.0.0.1', `${tcp.port}`],
    ])
      expect((await run('nbd-client', '-l', ...words)).split('\n')).toEqual(['Negotiation: ..', 'one', 'two', ''])
  })

  test('agrees with the server on an export, with GO and with EXPORT_NAME; the rest is for a kernel', async (ctx) => {
    requires(ctx, { commands: ['nbd-client'] })
    if (existsSync('/sys/module/nbd')) ctx.skip('the kernel has an nbd module: it would take the device')
    const { path, server } = await listening({ exports: both })
    for (const words of [[], ['-g']]) {
      const asked = promisify(execFile)('nbd-client', ['-N', 'two', '-unix', path, ...words, '/dev/nbd0'])
      const failure = await asked.then(
        () => ({ stdout: 'it has a device', stderr: '' }),
        (error: { stdout: string; stderr: string }) => error,
      )
      expect(failure.stdout).toBe('Negotiation: ..size = 64MB\n')
      expect(failure.stderr).toContain('make sure the nbd module is loaded')
    }
    // Both got as far as requests, of which there were none.
    const [, two] = server.stats().children
    expect(two).toMatchObject({ name: 'two', counters: { reads: 0, errors: 0 } })
  })
})
