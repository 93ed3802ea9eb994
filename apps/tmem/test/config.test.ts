/** The file of `tmem up`: each kind of mistake, where it is told to be, and the schema that editors read. */
import { execFileSync } from 'node:child_process'
import { closeSync, ftruncateSync, openSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { BadInput } from '../src/ending.ts'
import { stackFromFile } from '../src/layers.ts'
import type { DeviceRequest } from '../src/serve/serve.ts'
import { configSchema, readConfig } from '../src/up/config.ts'
import { decode } from '../src/xen/decode.ts'
import { silentTerminal, temporaryDirectory, tmem } from './tmem.ts'

const stack = 'memory(limit=80MiB)'
const good = `stack: ${stack}\ndevices:\n  a: { size: 64MiB }\nnbd: [unix:x]\n`

/** `LINE:COLUMN: message` of each mistake. */
async function mistakesIn(text: string): Promise<readonly string[]> {
  const file = join(temporaryDirectory(), 'tmem.yaml')
  writeFileSync(file, text)
  const error: unknown = await readConfig(file).catch((thrown: unknown) => thrown)
  if (!(error instanceof BadInput)) return [`no mistake: ${JSON.stringify(error)}`]
  return error.mistakes.map((line) => line.replace(`${file}:`, ''))
}

const mistakes: readonly (readonly [what: string, text: string, expected: readonly (string | RegExp)[]])[] = [
  ['no YAML', 'stack: [\n', [/^2:1: /]],
  ['nothing', '', [/^1:1: devices: expected at least one device, page cache or cache/]],
  ['an alias of nothing', good.replace('64MiB', '*size'), [/^3:14: there is no anchor size/]],
  [
    'aliases of aliases',
    `${Array.from('abcdefg', (name, n, all = 'abcdefg') => `${name}: &${name} [${Array.from({ length: 9 }, () => (n === 0 ? 'x' : `*${all[n - 1]}`)).join(',')}]\n`).join('')}devices: *g\n`,
    [/^2:\d+: its aliases expand to too much: write the values out/],
  ],
  [
    'a name that JavaScript keeps',
    `${good}  __proto__: {}\n`.replace('nbd: [unix:x]\n', '').concat('nbd: [unix:x]\n'),
    [/^4:3: __proto__ cannot be used as a name/],
  ],
  ['a list', '- a\n', [/^1:1: expected names and values: stack, devices/]],
  ['a name twice', `${good}stack: x\n`, [/^5:1: Map keys must be unique/]],
  ['a name misspelt', `${good}contol: c\n`, [/^5:1: contol: unknown name contol: did you mean control\?/]],
  ['two names misspelt', `${good}contol: c\nfuze: m\n`, [/^5:1: contol/, /^6:1: fuze: .* did you mean fuse\?/]],
  [
    'no address of a console',
    `${good}http: { listen: 8780x }\n`,
    [/^5:1: http: bad --http "8780x": expected tcp:PORT/],
  ],
  ['a token that is nowhere', `${good}http: { token: none }\n`, [/^5:1: http: --http-token .*none: ENOENT/]],
  [
    'no devices',
    `stack: ${stack}\ndevices: {}\nnbd: [unix:x]\n`,
    [/^2:1: devices: expected at least one device, page cache or cache/],
  ],
  ['a device without a size', good.replace('size: 64MiB', ''), [/^3:3: devices\.a\.size: expected an amount of bytes/]],
  ['no amount', good.replace('64MiB', '64MB1'), [/^3:8: devices\.a\.size: expected an amount of bytes such as 64MiB/]],
  ['no whole pages', good.replace('64MiB', '100'), [/^3:8: devices\.a\.size: expected whole pages of 4 KiB/]],
  ['size of nothing', good.replace('64MiB', '0'), [/^3:8: devices\.a\.size: expected whole pages of 4 KiB/]],
  ['a bad name', good.replace('a:', 'a/b:'), [/^3:3: devices\.a\/b: expected at most 64 letters/]],
  ['a name that is taken', good.replace('a:', 'stats:'), [/^3:3: devices\.stats: .*not stats or knobs/]],
  ['too large', good.replace('64MiB', '64MiB, max: 32MiB'), [/^3:21: devices\.a\.max: expected at least the size/]],
  [
    'writethrough of nothing',
    good.replace('64MiB', '64MiB, writethrough: true'),
    [/^3:21: devices\.a\.writethrough: is how a snapshot is written: add snapshot/],
  ],
  [
    'no flag',
    good.replace('64MiB', '64MiB, writethrough: 1'),
    [/^3:21: devices\.a\.writethrough: expected true or false/],
  ],
  ['swap without a mount', good.replace('64MiB', '64MiB, swap: true'), [/^3:21: devices\.a\.swap: .*add fuse/]],
  [
    'a priority that is none',
    good.replace('64MiB', '64MiB, swap: { priority: 40000 }'),
    [/^3:29: devices\.a\.swap\.priority: expected a whole number from 0 to 32767/],
  ],
  ['no way in', good.replace('nbd: [unix:x]\n', ''), [/^1:1: say how to serve: nbd, a list of addresses, or fuse/]],
  ['addresses that are no list', good.replace('[unix:x]', 'unix:x'), [/^4:1: nbd: expected a list of addresses/]],
  ['no stack', good.replace(`stack: ${stack}\n`, ''), [/^2:3: devices\.a: expected a stack, here or for all devices/]],
  [
    'a layer misspelt',
    good.replace('memory', 'memroy'),
    [/^1:1: stack: bad stack at column 1: .*did you mean memory\?/],
  ],
  [
    'a layer misspelt in a stack of its own',
    good.replace('64MiB', `64MiB, stack: "memroy(limit=1MiB)"`),
    [/^3:21: devices\.a\.stack: bad stack at column 1: .*did you mean memory\?/],
  ],
  ['a stack that is too small', good.replace('80MiB', '8MiB'), [/^1:1: stack: device a cannot stand above memory/]],
  ['a level that is none', `${good}log: { level: loud }\n`, [/^5:8: log\.level: expected error, warn, info or debug/]],
  [
    'a limit misspelt',
    `${good}limits: { conections: 3 }\n`,
    [/^5:11: limits\.conections: .* did you mean connections/],
  ],
  [
    'a limit of nothing',
    `${good}limits: { requests: 0 }\n`,
    [/^5:11: limits\.requests: expected a whole number from 1/],
  ],
  ['TLS without certificates', `${good}tls: {}\n`, [/^5:1: tls\.certificates: expected a directory/]],
  ['no mode', `${good}sockets: { mode: 660 }\n`, [/^5:12: sockets\.mode: expected permissions such as "660"/]],
  [
    'a page cache without a file',
    `${good}page-caches: { b: { memory: 1MiB } }\n`,
    [/^5:16: page-caches\.b\.file: expected a path/],
  ],
  [
    'a page cache of nothing',
    `${good}page-caches: { b: { file: x, memory: 4KiB } }\n`,
    [/^5:30: page-caches\.b\.memory: expected at least 64KiB/],
  ],
  [
    'a page cache named as a device',
    `${good}page-caches: { a: { file: x, memory: 1MiB } }\n`,
    [/^5:16: page-caches\.a: a device has this name/],
  ],
  [
    'a page cache with a layer misspelt',
    `${good}page-caches: { b: { file: x, memory: 1MiB, stack: "memroy(limit=1MiB)" } }\n`,
    [/^5:44: page-caches\.b\.stack: bad stack at column 1: .*did you mean memory\?/],
  ],
  [
    'a page cache with a name misspelt',
    `${good}page-caches: { b: { file: x, memory: 1MiB, stak: x } }\n`,
    [/^5:44: page-caches\.b\.stak: unknown name stak: did you mean stack\?/],
  ],
  ['a cache of nothing', `${good}caches: { c: }\n`, [/^5:11: caches\.c: expected names and values: memory, ttl/]],
  ['caches that are a list', `${good}caches: [c]\n`, [/^5:1: caches: expected caches by name, each with memory/]],
  [
    'a cache without memory or address',
    `${good}caches: { c: {} }\n`,
    [/^5:11: caches\.c\.memory: expected an amount of bytes/, /^5:11: caches\.c\.listen: expected unix:PATH or tcp/],
  ],
  [
    'a cache with too little memory',
    `${good}caches: { c: { memory: 1MiB, listen: unix:c } }\n`,
    [/^5:16: caches\.c\.memory: expected at least 2MiB/],
  ],
  [
    'a cache with no address',
    `${good}caches: { c: { memory: 2MiB, listen: 6380 } }\n`,
    [/^5:30: caches\.c\.listen: expected unix:PATH or tcp:HOST:PORT/],
  ],
  [
    'a cache with an address that is none',
    `${good}caches: { c: { memory: 2MiB, listen: "127.0.0.1:6380" } }\n`,
    [/^5:30: caches\.c\.listen: expected unix:PATH or tcp:HOST:PORT, e\.g\. tcp:127/],
  ],
  [
    'a cache with a port that is none',
    `${good}caches: { c: { memory: 2MiB, listen: "tcp:127.0.0.1:70000" } }\n`,
    [/^5:30: caches\.c\.listen: expected unix:PATH or tcp:HOST:PORT/],
  ],
  [
    'a cache with a life that is none',
    `${good}caches: { c: { memory: 2MiB, ttl: 0, listen: unix:c } }\n`,
    [/^5:30: caches\.c\.ttl: expected a whole number from 1/],
  ],
  [
    'a cache with a file without a size',
    `${good}caches: { c: { memory: 2MiB, listen: unix:c, file: { path: f } } }\n`,
    [/^5:46: caches\.c\.file\.size: expected an amount of bytes/],
  ],
  [
    'a cache with a file that is too small',
    `${good}caches: { c: { memory: 4MiB, listen: unix:c, file: { path: f, size: 4KiB } } }\n`,
    [/^5:63: caches\.c\.file\.size: expected 64KiB to 256GiB/],
  ],
  [
    'a cache with too little memory for its file',
    `${good}caches: { c: { memory: 34MiB, listen: unix:c, file: { path: f, size: 1GiB } } }\n`,
    [/^5:16: caches\.c\.memory: expected at least 3MiB and a 32nd of the file/],
  ],
  [
    'a cache with a name misspelt',
    `${good}caches: { c: { memory: 2MiB, lisen: unix:c, listen: unix:c } }\n`,
    [/^5:30: caches\.c\.lisen: unknown name lisen: did you mean listen\?/],
  ],
  [
    'a cache named as a device',
    `${good}caches: { a: { memory: 2MiB, listen: unix:c } }\n`,
    [/^5:11: caches\.a: a device has this name/],
  ],
  [
    'a cache named as a page cache',
    `${good}page-caches: { b: { file: x, memory: 1MiB } }\ncaches: { b: { memory: 2MiB, listen: unix:c } }\n`,
    [/^6:11: caches\.b: a page cache has this name/],
  ],
  [
    'a cache with a bad name',
    `${good}caches: { stats: { memory: 2MiB, listen: unix:c } }\n`,
    [/^5:11: caches\.stats: .*not stats or knobs/],
  ],
  [
    'two caches on one address',
    `${good}caches: { c: { memory: 2MiB, listen: unix:c }, d: { memory: 2MiB, listen: unix:c } }\n`,
    [/^5:67: caches\.d\.listen: c listens there already: give each its own/],
  ],
  ['no address of metrics', `${good}metrics: 9464\n`, [/^5:1: metrics: expected tcp:HOST:PORT, e\.g\. tcp:127/]],
  [
    'a port that is none',
    `${good}metrics: tcp:127.0.0.1:x\n`,
    [/^5:1: metrics: expected tcp:HOST:PORT, e\.g\. tcp:127/],
  ],
  ['no module', `${good}modules: [/nowhere.mjs]\n`, [/^5:1: modules: \/nowhere\.mjs cannot be loaded/]],
]

test.for(mistakes)('mistake: %s', async ([, text, expected]) => {
  const told = await mistakesIn(text)
  expect(told).toHaveLength(expected.length)
  for (const [n, line] of told.entries()) expect(line).toMatch(expected[n]!)
})

test('a file that is right says what the command line would say', async () => {
  const folder = temporaryDirectory()
  const file = join(folder, 'tmem.yaml')
  writeFileSync(
    file,
    `
stack: memory(limit=80MiB)
devices:
  a: { size: 64MiB, snapshot: a.img, writethrough: true }
  b: { size: 4096, memlimit: 4096, max: 8KiB, stack: 'memory(limit=1MiB) > frontswap(file=b,size=1MiB)', swap: true }
  c: { size: 4096, swap: { priority: 7 } }
  d: { size: 4096, swap: false }
nbd: ['tcp:127.0.0.1:0']
fuse: m
page-caches: { base: { file: base.raw, memory: 1MiB, stack: zcache(limit=4MiB) } }
caches:
  sessions: { memory: 64MiB, listen: unix:s.sock }
  kept: { memory: 4MiB, ttl: 60, file: { path: kept, size: 32MiB }, listen: 'tcp:127.0.0.1:6380' }
limits: { connections: 3, bytes: 1MiB }
tls: { certificates: certs, verify-peer: true }
log: { format: json, level: debug }
sockets: { mode: "660", group: 7 }
busy-turns: 3
http: {}
metrics: tcp:127.0.0.1:0
control: c.sock
`,
  )
  const { serve, control, folder: base } = await readConfig(file)
  expect({ control, base }).toEqual({ control: 'c.sock', base: folder })
  const requests = serve.device as readonly DeviceRequest[]
  expect(requests.map(({ name, swapPriority }) => [name, swapPriority])).toEqual([
    ['a', undefined],
    ['b', 100],
    ['c', 7],
    ['d', undefined],
  ])
  expect(requests[0]).toEqual({
    name: 'a',
    sizeBytes: 64 * 2 ** 20,
    stack: 'memory(limit=80MiB)',
    snapshot: join(folder, 'a.img'),
    writethrough: true,
  })
  expect(requests[1]).toMatchObject({
    memlimitBytes: 4096,
    maxSizeBytes: 8192,
    stack: expect.stringContaining('file=b'),
  })
  expect(serve).toMatchObject({
    nbd: ['tcp:127.0.0.1:0'],
    fuse: 'm',
    nbdLimits: 'connections=3,bytes=1048576',
    tlsCertificates: 'certs',
    tlsVerifyPeer: true,
    log: 'json',
    logLevel: 'debug',
    socketMode: '660',
    socketGroup: '7',
    busyTurns: 3,
    http: 'tcp:127.0.0.1:8780',
    metrics: 'tcp:127.0.0.1:0',
    caches: [
      { name: 'sessions', memoryBytes: 64 * 2 ** 20, listen: 'unix:s.sock' },
      {
        name: 'kept',
        memoryBytes: 4 * 2 ** 20,
        ttlMs: 60_000,
        file: { path: join(folder, 'kept'), sizeBytes: 2 ** 25 },
        listen: 'tcp:127.0.0.1:6380',
      },
    ],
    pageCaches: [{ name: 'base', file: join(folder, 'base.raw'), memoryBytes: 2 ** 20, stack: 'zcache(limit=4MiB)' }],
    drain: true,
  })
})

test('all that the command line of a server takes has its name in the file', async () => {
  const { stdout } = await tmem(['serve', '--help'])
  const options = [...stdout.matchAll(/^ +(?:-\w, )?--([\w-]+)/gm)].map(([, name]) => name!)
  const elsewhere: Record<string, string> = {
    device: 'devices',
    'tls-certificates': 'tls',
    'tls-verify-peer': 'tls',
    'nbd-limits': 'limits',
    'http-token': 'http',
    'socket-mode': 'sockets',
    'socket-group': 'sockets',
    'log-level': 'log',
  }
  // What is of one start, or always so.
  const others = ['drain', 'fresh', 'json', 'help']
  const names = Object.keys((configSchema() as { properties: object }).properties)
  const missing = options.filter((name) => !others.includes(name) && !names.includes(elsewhere[name] ?? name))
  expect(options).toContain('stack')
  expect(missing).toEqual([])
})

test('the schema knows every name, and refuses others', () => {
  const { properties, additionalProperties } = configSchema() as {
    properties: Record<string, { description?: string }>
    additionalProperties: boolean
  }
  expect(additionalProperties).toBe(false)
  expect(Object.keys(properties)).toContain('devices')
  expect(Object.entries(properties).filter(([, { description }]) => description === undefined)).toEqual([])
})

function truncated(path: string, bytes: number): number {
  const file = openSync(path, 'w')
  ftruncateSync(file, bytes)
  return file
}

test.each([
  ['a pipe', (file: string): unknown => execFileSync('mkfifo', [file]), /is not a regular file/],
  ['a device without an end', (file: string): unknown => symlinkSync('/dev/zero', file), /is not a regular file/],
  ['a file of 2 GiB', (file: string): unknown => closeSync(truncated(file, 2 ** 31)), /more than/],
])('%s is refused before it is read', async (_, make, why) => {
  const file = join(temporaryDirectory(), 'tmem.yaml')
  make(file)
  await expect(readConfig(file)).rejects.toThrow(why)
  await expect(stackFromFile(file)).rejects.toThrow(why)
  await expect(decode([file], { as: 'op', release: '4.9', bits: '64' }, silentTerminal())).rejects.toThrow(why)
})
