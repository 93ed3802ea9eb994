/**
 * Every option object of every package, found in its sources: mistakes in it are told with the name and the nearest
 * name, sizes may be text, and nothing fails inside. A package, or an option, that comes later is found by itself, and
 * fails here until it has a row.
 */
import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { compose, systemAllocator, Tmem } from '@tmem/core'
import { memory } from '@tmem/memory'
import { describe, expect, test } from 'vitest'

const packages = fileURLToPath(new URL('../../../packages/', import.meta.url))

type Given = Record<string, unknown>

/** How options of that type are given, and some with which all is well, or nothing happens before a size is judged. */
interface Row {
  readonly give: (exports: never, options: never) => unknown
  readonly good: () => Given
  /** Names whose value is looked at by somebody else. */
  readonly loose?: readonly string[]
  /** Names that go with another kind of these options. */
  readonly apart?: readonly string[]
}

const store = () => compose([memory({ limitBytes: '4MiB' })])
const nowhere = '/nonexistent/folder/file'
const allocator = systemAllocator
const device = () => ({ name: 'd', sizeBytes: 4096, blockSize: 512, preferredBlockSize: 4096, close: () => undefined })
const none = () => ({})
const row = <M, O>(give: (exports: M, options: O) => unknown, good: () => Given, more: Partial<Row> = {}): Row => ({
  give: give as Row['give'],
  good,
  ...more,
})

const endpoints = (exports: { nbdServer(options: object): { listen(at: object): Promise<unknown> } }, at: object) =>
  exports.nbdServer({ exports: [] }).listen(at)
const limited = (exports: { nbdServer(options: object): unknown }, limits: object) =>
  exports.nbdServer({ exports: [], limits })
type Moving = { writeback(request: object): Promise<unknown>; recompress(request: object): Promise<unknown> }
const moving = (which: keyof Moving) => (exports: { ramzswap(options: object): Moving }, request: object) =>
  exports.ramzswap({ name: 'd', sizeBytes: 4096, stack: [memory({ limitBytes: '4MiB' })] })[which](request)
/** A class, a function, or a static method. */
const made = (name: string) => (exports: never, options: never) =>
  new (exports[name] as new (options: never) => unknown)(options)
const called =
  (path: string, ...before: unknown[]) =>
  (exports: Given, options: never) => {
    const [name, method] = path.split('.') as [string, string | undefined]
    if (method === undefined) return (exports[name] as (...all: unknown[]) => unknown)(...before, options)
    return (exports[name] as Record<string, (...all: unknown[]) => unknown>)[method]!(...before, options)
  }

interface CacheClass {
  new (options: object): { share(): object }
  join(shared: object, options: object): { close(): Promise<void> }
}

/** By package and type. */
const rows: Readonly<Record<string, Row | string>> = {
  'cache CacheOptions': row(made('Cache'), none),
  'cache JoinOptions': row(
    (exports: { Cache: CacheClass }, options) =>
      exports.Cache.join(new exports.Cache({ memory: '4MiB' }).share(), options as object),
    none,
  ),
  'cache SetOptions': row(
    (
      exports: { Cache: new (options: object) => { set(key: string, value: string, options: object): unknown } },
      options: object,
    ) => new exports.Cache({ memory: '4MiB' }).set('key', 'value', options),
    none,
  ),
  'cleancache TmemBackendOptions': row(called('tmemBackend', new Tmem(store()), 0), none),
  'conformance EveryAllocationOptions': row(called('everyAllocation', store, undefined), none),
  'conformance ReferenceOptions': row(called('reference'), none),
  'faults CorruptOptions': row(called('corrupt'), none),
  'faults DelayOptions': row(called('delay'), () => ({ turn: async () => undefined })),
  'faults DiscardOptions': row(called('discard'), none),
  'faults FailOptions': row(called('fail'), none),
  'faults RefuseOptions': row(called('refuse'), none),
  'faults SlowMemoryOptions': row(called('slowMemory'), () => ({ sizeBytes: 2 ** 20 })),
  'faults TearOptions': row(called('tear'), none),
  'faults TraceLogOptions': row(made('TraceLog'), none),
  'faults TraceOptions': row(called('trace'), () => ({ log: {} })),
  'frontswap FrontswapOptions': row(made('Frontswap'), () => ({ allocator })),
  'frontswap SelfShrinkOptions': row(made('SelfShrink'), none),
  'frontswap SwapAreaOptions': row(
    (exports: { SwapArea: { open(options: object, from: object): unknown } }, options: object) =>
      exports.SwapArea.open(options, allocator),
    () => ({ file: nowhere, sizeBytes: 1 }),
  ),
  'frontswap SwapFileOptions': row(called('frontswap'), () => ({ file: nowhere, sizeBytes: 2 ** 20 })),
  'frontswap SwapPlaceOptions': 'what the layer makes of its own options',
  'fscache FsCacheOptions': row(made('FsCache'), () => ({ store: store() })),
  'fscache HttpFilesOptions': row(made('HttpFiles'), () => ({ cache: {} })),
  'fuse FuseOptions': row(called('fuseServer'), () => ({ mountPoint: nowhere, root: {} })),
  'guest GuestOptions': row(called('runGuest'), () => ({
    kernel: {},
    initramfs: new Uint8Array(0),
    memoryBytes: 2 ** 28,
    signal: AbortSignal.abort(),
  })),
  'guest InitramfsOptions': row(called('initramfs'), () => ({ kernel: {}, busybox: nowhere, script: 'true' })),
  'interleave ChartOptions': row(called('chartHistory', [], []), none),
  'interleave ExploreOptions': row(called('explore', { initial: () => ({}), actors: [] }), none),
  'kernel-guest AttachOptions': row(called('attachGuest'), () => ({
    host: {},
    domain: 1,
    memory: nowhere,
    doorbell: nowhere,
  })),
  'kernel-guest BootOptions': row(called('bootGuest'), () => ({ parts: {}, workload: 'hog', memoryBytes: 1 })),
  'kernel-guest PartsOptions': row(called('prepareParts'), () => ({ cache: nowhere })),
  'kernel-guest SavedPagesOptions': row(called('SavedPages.open'), () => ({ file: nowhere, sizeBytes: 1 })),
  'memory MemoryOptions': row(called('memory'), () => ({ limitBytes: 2 ** 22 })),
  'memory SharedMemoryOptions': row(called('SharedMemoryStore.create'), () => ({ limitBytes: 2 ** 26 })),
  'nbd MemoryDeviceOptions': row(called('memoryDevice'), () => ({ sizeBytes: 4096 })),
  'nbd NbdEndpoint': row(endpoints, () => ({ path: nowhere }), { apart: ['port', 'host', 'fd', 'tls'] }),
  'nbd NbdExport': row(
    (exports: { nbdServer(options: object): unknown }, one: object) => exports.nbdServer({ exports: [one] }),
    () => ({ device: device() }),
    { loose: ['name', 'description'] },
  ),
  'nbd NbdLimits': row(limited, none),
  'nbd NbdServerOptions': row(called('nbdServer'), () => ({ exports: [] })),
  'nbd NbdTls': row((exports: never, tls: object) => endpoints(exports, { port: 0, tls }), none, {
    loose: ['key', 'cert', 'ca', 'crl', 'minVersion', 'passphrase'],
  }),
  'page-cache DirectReadsOptions': row(made('DirectReads'), none),
  'page-cache OpenOptions': 'as node:fs takes them, which answers for what is in them',
  'page-cache PageCacheOptions': row(made('PageCache'), () => ({ sizeBytes: 2 ** 20 })),
  'page-cache ReadOptions': 'as node:fs takes them, which answers for what is in them',
  'page-file MemoryFilesOptions': row(made('MemoryFiles'), none),
  'page-file PageFileRequest': row(called('PageFile.open'), () => ({ path: nowhere, mode: 'existing' })),
  'page-file SystemFilesOptions': row(called('systemFiles'), none),
  'page-file TransferBuffersOptions': row(made('TransferBuffers'), none),
  'ramster ProcessMemoryOptions': row(called('processMemory'), () => ({ limitBytes: 2 ** 22 })),
  'ramster RamsterOptions': row(called('ramster'), () => ({ machines: [], sizeBytes: 2 ** 20 })),
  'ramster ValkeyOptions': row(called('valkey'), () => ({ host: 'localhost' })),
  'ramster ValkeyClusterOptions': row(called('valkeyCluster'), () => ({ nodes: [{ host: 'localhost' }] })),
  'ramzswap RamzswapOptions': row(called('ramzswap'), () => ({ name: 'd', sizeBytes: 1, stack: [] })),
  'ramzswap RecompressRequest': row(moving('recompress'), none),
  'ramzswap SnapshotOptions': row(called('openSnapshot', device()), () => ({ path: nowhere })),
  'ramzswap WritebackRequest': 'a kind, or slots; its own tests have both',
  'seal SealOptions': row(called('seal'), none),
  'simulator HistoryOptions': row(called('runHistory', 1, 0), none),
  'simulator SimulationOptions': row(called('simulate'), () => ({ seed: 1, histories: 0 })),
  'soak SoakOptions': row(called('soak'), () => ({ program: [], ask: async () => ({}), seconds: 0, seed: 1 })),
  'spill SpillOptions': row(called('spill'), () => ({ file: nowhere, sizeBytes: 2 ** 20 })),
  'swapper SwapperOptions': row(made('Swapper'), () => ({ pages: 64, frames: 16, store: store() })),
  'tmem-core AccountsOptions': row(called('createAccounts'), none),
  'tmem-core ComposeOptions': row(called('compose', [memory({ limitBytes: '4MiB' })]), none),
  'tmem-core TmemOptions': row(
    (exports: { Tmem: new (below: object, options: object) => unknown }, options: object) =>
      new exports.Tmem(store(), options),
    none,
  ),
  'userfault SwappableBufferOptions': row(called('SwappableBuffer.open'), () => ({
    bytes: 1,
    residentBytes: 2 ** 20,
    stack: 'memory(limit=64MiB)',
  })),
  'virtio-channel ChannelOptions': row(called('createChannel'), none),
  'vm-mixedmap GupRequest': 'what a processor of the model is asked for, not how something is made',
  'vm-mixedmap MachineOptions': row(called('createMachine'), () => ({
    memory: { kind: 'flat', start: 0, pages: 0 },
    frames: 16,
    pteSpecial: true,
  })),
  'vram VramOptions': row(called('vram'), () => ({ limitBytes: 2 ** 20 })),
  'xen-hypercall ControlRequest': 'what a guest asks of the model, with the errors that Xen has for it',
  'xen-hypercall DescribeOptions': row(called('describe', new Uint8Array(4096)), none),
  'xen-hypercall DomainOptions': row(made('Domain'), () => ({ id: 1, memory: {} })),
  'xen-hypercall SelfBalloonOptions': row(made('SelfBalloon'), () => ({ clock: () => 0 })),
  'xen-hypercall StreamReadOptions': row(
    (exports: { readStream(source: Iterable<Uint8Array>, options: object): AsyncGenerator }, options: object) =>
      exports.readStream([], options).next(),
    none,
  ),
  'xen-hypercall XenHostOptions': row(made('XenHost'), () => ({ store: store() })),
  'zcache GovernorOptions': row(made('Governor'), () => ({ limit: { bytes: 0, maximumBytes: 2 ** 24 } })),
  'zcache ZcacheOptions': row(called('zcache'), () => ({ limitBytes: 2 ** 22 })),
}

interface Found {
  readonly name: string
  readonly folder: string
  /** Name, whether it must be there, and its type. */
  readonly members: readonly { readonly name: string; readonly required: boolean; readonly type: string }[]
}

/** The types of options that a package exports. */
function* optionsOf(folder: string): Generator<Found> {
  const index = join(packages, folder, 'src/index.ts')
  const text = readFileSync(index, 'utf8')
  const files = [...text.matchAll(/^export (\*|(?:type )?\{[^}]*\}) from '(.*)'$/gm)]
  for (const [, names, file] of files) {
    const source = readFileSync(join(dirname(index), file!), 'utf8')
    const types = source.matchAll(/^export (?:interface|type) (\w+(?:Options|Limits|Request|Endpoint|Export|Tls))\b/gm)
    for (const { 1: name, index: at } of types) {
      if (names !== '*' && !new RegExp(`\\b${name}\\b`).test(names!)) continue
      const rest = source.slice(at)
      const body = rest.slice(0, rest.search(/^\}?$/m)).replace(/\/\*\*.*?\*\//gs, '')
      const members = [...body.matchAll(/^ +readonly (\w+)(\??): (.*)$/gm)].map((member) => ({
        name: member[1]!,
        required: member[2] === '',
        type: member[3]!,
      }))
      yield { name: name!, folder, members }
    }
  }
}

const folders = readdirSync(packages).filter((folder) => readdirSync(join(packages, folder)).includes('package.json'))
const found = folders.flatMap((folder) => [...optionsOf(folder)])

test('each type of options that a package exports has a row here, and no row is left over', () => {
  expect(Object.keys(rows).sort()).toEqual(found.map(({ folder, name }) => `${folder} ${name}`).sort())
})

const isSize = (name: string): boolean => /bytes$|^(pageSize|blockSize)$/i.test(name)
const loaded = (folder: string): Promise<never> => import(join(packages, folder, 'src/index.ts')) as Promise<never>

for (const { folder, name, members } of found) {
  const one = rows[`${folder} ${name}`]
  if (one === undefined || typeof one === 'string') continue
  describe(`${folder}: ${name}`, () => {
    const { loose = [], apart = [] } = one
    /** What is said of these options; 'nothing' where they are taken. */
    const said = async (options: unknown): Promise<unknown> => {
      try {
        const done = (await one.give(await loaded(folder), options as never)) as { close?(): unknown } | undefined
        await done?.close?.()
        return 'nothing'
      } catch (error) {
        return error
      }
    }
    const expectRefused = async (options: unknown, words: RegExp): Promise<void> => {
      const error = await said(options)
      expect(error === 'nothing' || error).toSatisfy(
        (one: unknown) => one instanceof TypeError || one instanceof RangeError,
      )
      expect((error as TypeError).message).toMatch(words)
      expect((error as TypeError).message).not.toMatch(/Cannot read|is not a function|is not iterable|destructure/)
    }

    test('no object', async () => {
      for (const options of [null, 5, '64MiB'])
        await expectRefused(options, /expected an object of options, got|is an object; got/)
      if (members.some(({ required }) => required)) await expectRefused(undefined, /expected an object of options/)
    })

    test('a name that there is not', async () => {
      const near = (members.find((member) => !apart.includes(member.name)) ?? members[0]!).name
      const wrong = `${near}x`
      await expectRefused({ ...one.good(), [wrong]: 1 }, new RegExp(`has no option ${wrong}; .*\\b${near}\\b`))
    })

    const needed = members.filter((member) => member.required && !apart.includes(member.name))
    test.each(needed)('without $name', async (member) => {
      const { [member.name]: _, ...rest } = one.good()
      await expectRefused(rest, new RegExp(member.name))
    })

    const judged = members.filter((member) => !loose.includes(member.name) && !/unknown/.test(member.type))
    test.each(judged)('$name is of another kind', async (member) => {
      await expectRefused({ ...one.good(), [member.name]: null }, new RegExp(member.name))
    })

    const sizes = members.filter((member) => isSize(member.name) && !member.type.includes('=>'))
    test.each(sizes)('$name as text', async (member) => {
      expect(member.type).toMatch(/ByteAmount/)
      await expectRefused(
        { ...one.good(), [member.name]: '64 megs' },
        new RegExp(`${member.name} is an amount of bytes`),
      )
      expect(await said({ ...one.good(), [member.name]: '1KiB' })).not.toBeInstanceOf(TypeError)
    })
  })
}
