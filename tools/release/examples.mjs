// The examples of the READMEs as files of a person's own project. An example with imports runs as it stands, but for
// the paths that it names; what it leaves to the reader is listed here, by words that are in it. A piece without
// imports that is not listed is told as such, and not run.

const tests = [["'vitest'", "'node:test'"]] // any runner that has describe and it
const openStore = "import { compose } from '@tmem/core'\nimport { memory } from '@tmem/memory'\n"

/**
 * What examples leave to the reader: lines `before` and `after` them, words to `replace`, packages that they `use`, and
 * `only`, the reason why an example is compiled and not run. `isPiece` leaves one out.
 */
const left = [
  { in: "import { Cache } from '@tmem/cache'", replace: [["'256MiB'", "'16MiB'"]] },
  {
    in: 'JSON.stringify, decode: JSON.parse',
    before: "import { Cache } from '@tmem/cache'\ninterface Row { readonly name: string }\n",
    after: 'await json.close()\n',
  },
  {
    in: 'getUser(key, signal)',
    before: `import { Cache } from '@tmem/cache'
const cache = new Cache<{ readonly name: string }>({ memory: '16MiB' })
const getUser = async (name: string | Uint8Array, _signal: AbortSignal) => ({ name: String(name) })
`,
    after: "if (user?.name !== 'user:2') throw new Error('nothing was loaded')\nawait cache.close()\n",
  },
  {
    in: '/var/cache/app.cache',
    before: "import { Cache } from '@tmem/cache'\n",
    after: 'await cache.close()\n',
    replace: [
      ['/var/cache/app.cache', './app.cache'],
      ["'4GiB'", "'16MiB'"],
    ],
  },
  {
    in: 'new KeyvStore(cache)',
    uses: ['keyv'],
    before: `import { Keyv } from 'keyv'
import { Cache } from '@tmem/cache'
const cache = new Cache({ memory: '16MiB' })
`,
    after:
      "await keyv.set('a', 1)\nif ((await keyv.get('a')) !== 1) throw new Error('not kept')\nawait cache.close()\n",
  },
  {
    in: "subscribe('tmem:cache'",
    before: `import { subscribe } from 'node:diagnostics_channel'
import type { CacheMessage } from '@tmem/cache'
const closeWhatBelongsTo = (_key: unknown) => {}
`,
  },
  {
    in: 'new UndiciStore(cache)',
    before: "import { Cache } from '@tmem/cache'\nconst cache = new Cache({ memory: '16MiB' })\n",
    after: 'await cache.close()\n',
  },
  {
    in: 'new RespServer({ cache',
    before: "import { Cache } from '@tmem/cache'\nconst cache = new Cache<Uint8Array>({ memory: '16MiB' })\n",
    after: 'setTimeout(() => process.exit(), 300)\n',
    replace: [["'/run/app/cache.sock'", "{ port: 0, host: '127.0.0.1' }"]],
  },
  // Declarations of unstorage itself do not compile with `skipLibCheck: false`.
  { in: 'tmemDriver({ cache', isPiece: true },
  { in: 'prepareParts(', only: 'it boots a kernel: `npm run test:system`' },
  { in: "name: 'my stack'", replace: tests },
  { in: 'everyAllocation((context)', before: openStore, uses: ['@tmem/core', '@tmem/memory'] },
  { in: "placeConformance({ name: 'map'", after: 'await store.close()\n', replace: tests, follows: 'class MapPlace' },
  {
    in: 'swap.getSwapPage()',
    uses: ['@tmem/memory'],
    before: `import { compose, systemAllocator as allocator } from '@tmem/core'
import { memory } from '@tmem/memory'
const [file, sizeBytes] = ['./area.img', 64 * 4096]
const store = compose([memory({ limitBytes: 2 ** 20 })])
const page = new Uint8Array(4096).fill(7)
const markDirty = () => {}
const unuse = { frame: () => new Uint8Array(4096), done: () => {} }
`,
    after: 'await area.close()\nawait store.close()\n',
  },
  {
    in: 'volume.acquireCookie(',
    before: `import { compose } from '@tmem/core'
import { zcache } from '@tmem/zcache'
const store = compose([zcache({ limitBytes: '16MiB' })])
const page = new Uint8Array(4096)
`,
    after: 'await store.close()\n',
  },
  {
    in: 'fuseServer({ mountPoint:',
    replace: [['/mnt/tmem', './mnt']],
    only: 'it mounts, as root: `npm run test:system`',
  },
  { in: 'findKernel(', only: 'it boots a kernel: `npm run test:system`' },
  { in: "path: '/tmp/tmem.sock'", replace: [['/tmp/tmem.sock', './tmem.sock']], after: "process.emit('SIGTERM')\n" },
  {
    in: 'openSnapshot(ramzswap(',
    uses: ['@tmem/memory'],
    before: `import { memory } from '@tmem/memory'
const [sizeBytes, stack] = [2 ** 20, [memory({ limitBytes: 2 ** 22 })]]
`,
    after: 'await device.close()\n',
  },
  {
    in: 'const wait = memory.write(',
    follows: 'new Swapper(',
    before: 'const [page, at, bytes] = [0, 0, Buffer.from("bytes")]\n',
    until: 'memory.close()',
  },
  {
    in: 'let at = memory.resident(page)',
    follows: 'new Swapper(',
    before: 'const page = 4711\n',
    until: 'memory.close()',
  },
  {
    in: 'new Lenders([',
    before: "import { Lenders, ramster, valkey } from '@tmem/ramster'\n",
    only: 'it needs servers that lend',
  },
  { in: 'videoDevices()', only: 'it needs a video device' },
  { in: 'SwappableBuffer.open(', only: 'it needs userfaultfd: `npm run test:root`' },
  { in: 'new Governor({', after: 'setTimeout(() => process.exit(), 300)\n' },
]

/**
 * The examples of a README, as `{ number, language, code, uses, only }`: whole programs, and the packages that they
 * import; and the number of pieces that are none.
 */
export function examplesOf(readme) {
  const blocks = [...readme.matchAll(/^```(ts|js)\n(.*?)^```$/gms)].map(([, language, code]) => ({ language, code }))
  const examples = []
  let pieces = 0
  for (const [number, { language, code }] of blocks.entries()) {
    const rest = left.find((entry) => code.includes(entry.in)) ?? {}
    if (rest.isPiece || (!/^import /m.test(code) && rest.before === undefined)) {
      pieces++
      continue
    }
    let whole = `${rest.before ?? ''}${code}${rest.after ?? ''}`
    if (rest.follows !== undefined) {
      const other = blocks.find((block) => block.code.includes(rest.follows)).code
      // A piece of a program stands before the end of it.
      const end = rest.until === undefined ? other.length : other.indexOf(rest.until)
      const inside = rest.until === undefined ? whole : `{\n${whole}}\n`
      whole = `${other.slice(0, end)}${inside}${other.slice(end)}`
    }
    for (const [from, to] of rest.replace ?? []) whole = whole.replaceAll(from, to)
    const imported = [...whole.matchAll(/(?:from |^import |resolve\()'([^'.][^']*)'/gm)]
      .map(([, name]) =>
        name
          .split('/')
          .slice(0, name.startsWith('@') ? 2 : 1)
          .join('/'),
      )
      .filter((name) => !name.startsWith('node:'))
    const uses = [...new Set([...imported, ...(rest.uses ?? [])])]
    examples.push({ number, language, code: whole, uses, only: rest.only })
  }
  return { examples, pieces }
}

/** The same program for `require`: its imports are calls, and what waits is in a function. */
export function asCommonJs(code) {
  const calls = []
  const body = code
    .replace(/^import (.*?) from ['"](.*?)['"];?$/gms, (_, names, from) => {
      const list = names.startsWith('{') ? names.replace(/ as /g, ': ') : names.replace('* as ', '')
      calls.push(`const ${list} = require('${from}')`)
      return ''
    })
    .replace(/import\.meta\.resolve\((.*?)\)/g, "require('node:url').pathToFileURL(require.resolve($1)).href")
    .replace(/^\/\/# sourceMappingURL.*$/m, '')
    .replace(/^export \{\};?$/m, '')
  return `${calls.join('\n')}\nvoid (async () => {\n${body}\n})()\n`
}
