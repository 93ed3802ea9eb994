// Makes a package for a place of your own: `npm run new-layer NAME`. It keeps blocks in a `Map`, passes the conformance
// suite as it stands, and is in every list that a package is in. Make of it what you want to have.
import { spawnSync } from 'node:child_process'
import { copyFileSync, existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const [name = '', ...more] = process.argv.slice(2)
const folder = join(root, 'packages', name)
if (more.length > 0 || !/^[a-z][a-z0-9]*(-[a-z0-9]+)*$/.test(name)) {
  stop(`usage: npm run new-layer NAME; a name has small letters, digits and single hyphens, not ${name || 'nothing'}`)
}
if (existsSync(folder)) stop(`packages/${name} is there already: choose another name`)

const camel = name.replace(/-(.)/g, (_, letter) => letter.toUpperCase())
const pascal = camel[0].toUpperCase() + camel.slice(1)
const write = (path, text) => {
  mkdirSync(dirname(join(root, path)), { recursive: true })
  writeFileSync(join(root, path), text)
}
const json = (value) => `${JSON.stringify(value, null, 2)}\n`

const entry = { types: './dist/index.d.ts', default: './dist/index.js' }
write(
  `packages/${name}/package.json`,
  json({
    name: `@tmem/${name}`,
    version: '0.0.0',
    description: `A place for pages: ${name}`,
    license: 'MIT',
    type: 'module',
    sideEffects: false,
    engines: { node: '>=20.19.0' },
    files: ['dist', '!dist/.tsbuildinfo', 'src'],
    types: entry.types,
    exports: { '.': { '@tmem/source': './src/index.ts', ...entry } },
    publishConfig: { access: 'public', exports: { '.': entry } },
    dependencies: { '@tmem/core': 'workspace:^' },
    devDependencies: { '@tmem/conformance': 'workspace:^' },
    nx: { targets: { test: {} } },
  }),
)
write(
  `packages/${name}/tsconfig.json`,
  json({
    extends: '../../tsconfig.base.json',
    compilerOptions: { rootDir: 'src', outDir: 'dist', tsBuildInfoFile: 'dist/.tsbuildinfo' },
    include: ['src'],
    references: [{ path: '../tmem-core' }],
  }),
)
copyFileSync(join(root, 'LICENSE'), join(folder, 'LICENSE'))
write(
  `packages/${name}/src/index.ts`,
  `/** A place for pages: ${name}. */\nexport { type ${pascal}Options, ${camel}, ${camel}Factory } from './${name}.ts'\n`,
)
write(
  `packages/${name}/src/${name}.ts`,
  `/**
 * A place that keeps blocks in a \`Map\`.
 *
 * Invariants: a location has at most one block; \`used\` is what the blocks of the map take together; a location is
 * given out again only after it was freed.
 */
import {
  type Block,
  type ByteAmount,
  bytesOf,
  checkOptions,
  type Layer,
  type LayerFactory,
  type MemoryPlace,
  type OptionValue,
  type PlaceTraits,
  PutOutcome,
  type StatsNode,
} from '@tmem/core'

/** What \`${camel}\` takes. */
export interface ${pascal}Options {
  /** Bytes that it may use, with what belongs to each block: 64 KiB and more. */
  readonly limitBytes: ByteAmount
}

const minLimitBytes = 64 * 1024
/** What a block needs beside its bytes, more or less. */
const bytesPerBlock = 64

/** A place that keeps blocks in a \`Map\`. Throws \`RangeError\` for a limit that makes no sense. */
export function ${camel}(options: ${pascal}Options): Layer {
  checkOptions('${camel}', options, { limitBytes: true })
  const limitBytes = bytesOf('${camel}', 'limitBytes', options.limitBytes)
  if (!Number.isSafeInteger(limitBytes) || limitBytes < minLimitBytes)
    throw new RangeError(\`${camel}: limitBytes is at least \${minLimitBytes}, got \${limitBytes}\`)
  const traits: PlaceTraits = Object.freeze({
    persistent: true,
    ephemeral: true,
    waits: false,
    survives: 'nothing',
    rawOnly: false,
    capacity: Math.min(2 ** 24 - 2, Math.floor(limitBytes / bytesPerBlock)),
    reservedBytes: 0,
    maxPageSize: 2 ** 21,
  })
  return Object.freeze({ name: '${camel}', place: { traits, open: () => new ${pascal}Place(traits, limitBytes) } })
}

/** \`${camel}(limit=64MiB)\` in the text of a stack. */
export const ${camel}Factory: LayerFactory = Object.freeze({
  name: '${camel}',
  summary: 'blocks in a Map',
  options: Object.freeze({
    limit: { kind: 'bytes', summary: 'bytes that it may use', required: true, minimum: minLimitBytes },
  } as const),
  create: ({ limit }: Readonly<Record<string, OptionValue>>): Layer => ${camel}({ limitBytes: Number(limit) }),
})

class ${pascal}Place implements MemoryPlace {
  readonly name = '${camel}'
  readonly traits: PlaceTraits
  readonly limitBytes: number
  readonly #blocks = new Map<number, { readonly bytes: Uint8Array; readonly owner: number }>()
  readonly #holes: number[] = []
  #used = 0
  #charged = 0

  constructor(traits: PlaceTraits, limitBytes: number) {
    this.traits = traits
    this.limitBytes = limitBytes
  }

  get usedBytes(): number {
    return this.#used + this.#charged
  }

  sizeOf(length: number): number {
    return length + bytesPerBlock
  }

  excess(): number {
    return this.usedBytes - Math.floor(0.95 * this.limitBytes)
  }

  charge(bytes: number): boolean {
    if (this.usedBytes + bytes > this.limitBytes) return false
    this.#charged += bytes
    return true
  }

  put({ bytes, at, length }: Block, owner: number): number {
    if (this.usedBytes + this.sizeOf(length) > this.limitBytes) return -PutOutcome.NoMemory
    const location = this.#holes.pop() ?? this.#blocks.size
    this.#blocks.set(location, { bytes: bytes.slice(at, at + length), owner })
    this.#used += this.sizeOf(length)
    return location
  }

  get(location: number, into: Block): void {
    into.bytes.set(this.#blocks.get(location)!.bytes, into.at)
  }

  free(location: number, length: number): void {
    this.#blocks.delete(location)
    this.#holes.push(location)
    this.#used -= this.sizeOf(length)
  }

  check(owns: (owner: number, location: number) => boolean): void {
    for (const [location, { owner }] of this.#blocks)
      if (!owns(owner, location)) throw new Error(\`${camel}: nobody owns the block at \${location}\`)
  }

  stats(): StatsNode {
    return { name: '${camel}', counters: { used_bytes: this.usedBytes, blocks: this.#blocks.size }, children: [] }
  }

  async close(): Promise<void> {
    this.#blocks.clear()
  }
}
`,
)
write(
  `packages/${name}/test/conformance.test.ts`,
  `import { placeConformance, regularWay } from '@tmem/conformance'
import { compose, parseStack } from '@tmem/core'
import { describe, expect, it } from 'vitest'
import { ${camel}, ${camel}Factory } from '../src/index.ts'

const MiB = 2 ** 20

await placeConformance(
  {
    name: '${camel}',
    open: (context) => ${camel}({ limitBytes: MiB }).place!.open(context),
    manifest: { filledBy: 2 * MiB },
  },
  { describe, it },
)

it('is a layer, also as text', async () => {
  const layers = [[${camel}({ limitBytes: '16MiB' })], parseStack('${camel}(limit=16MiB)', [${camel}Factory])]
  for (const stack of layers) {
    const store = compose(stack, { check: 'model' })
    await regularWay(store)
    expect(() => store.check!()).not.toThrow()
    await store.close()
  }
})

it('refuses a limit that makes no sense', () => {
  expect(() => ${camel}({ limitBytes: 1 })).toThrow(/limitBytes is at least/)
})
`,
)
write(
  `packages/${name}/test/readme.test.ts`,
  `/** The example of the README is run as it stands there. */
import { readFileSync } from 'node:fs'
import { runInThisContext } from 'node:vm'
import * as core from '@tmem/core'
import { expect, test } from 'vitest'
import * as own from '../src/index.ts'

test('the example of the README works', async () => {
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  const code = /\`\`\`ts\\n([\\s\\S]*?)\`\`\`/.exec(readme)![1]!.replace(/^import .*\\n/gm, '')
  const lines: string[] = []
  const run = runInThisContext(
    \`async (modules, console) => { const { compose, GetOutcome, PutOutcome, ${camel} } = modules; \${code} }\`,
  )
  await run({ ...core, ...own }, { log: (line: string) => lines.push(line) })
  expect(lines).toEqual(['the page is back'])
})
`,
)
write(
  `packages/${name}/README.md`,
  `# @tmem/${name}

A place in a tmem stack: blocks in a \`Map\`.

\`\`\`ts
import { compose, GetOutcome, PutOutcome } from '@tmem/core'
import { ${camel} } from '@tmem/${name}'

const store = compose([${camel}({ limitBytes: '16MiB' })])
const pool = store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 })
if (typeof pool === 'number') throw new Error(\`refused: \${pool}\`)
const page = new Uint8Array(4096).fill(7)
if (pool.put(5, 0, page) !== PutOutcome.Stored) console.log('refused: use the regular way')
if (pool.get(5, 0, page.fill(0)) === GetOutcome.Hit && page[0] === 7) console.log('the page is back')
await store.close()
\`\`\`

In the text of a stack: \`${camel}(limit=64MiB)\`, where \`${camel}Factory\` is among the layers.

## What it keeps

Blocks of up to 64 KiB, persistent and ephemeral ones, until they are freed or the process ends.

## What it refuses

A put beyond \`limitBytes\`: \`NoMemory\`. The chain lets cold blocks sink, or offers the block to the next place.

## When something fails

Nothing here waits or can fail; a process that ends takes all blocks with it.

## Cost

A \`Map\` entry, an object and a copy for each block: the garbage collector pays for it.

## How to observe it

\`store.stats()\`: \`used_bytes\`, \`blocks\`.

## Limits

\`limitBytes\` is at least 64 KiB.

## Sources

The contract of places: \`packages/tmem-core/src/place.ts\`.
`,
)
write(`.changeset/first-${name}.md`, `---\n'@tmem/${name}': minor\n---\n\nA place for pages: ${name}.\n`)

const arrows = JSON.parse(readFileSync(join(root, 'tools/arrows.json'), 'utf8'))
const { tmem, ...sources } = arrows.sources
arrows.sources = { ...sources, [`@tmem/${name}`]: ['@tmem/core'], tmem }
write('tools/arrows.json', json(arrows))
insert(
  'apps/tmem/test/public-options.test.ts',
  '> = {\n',
  `  '${name} ${pascal}Options': row(called('${camel}'), () => ({ limitBytes: '1MiB' })),\n`,
)
insert(
  'README.md',
  '| package | what it is for |\n|---|---|\n',
  `| [@tmem/${name}](packages/${name}) | a place for pages |\n`,
)

run('pnpm', 'install', '--no-frozen-lockfile', '--prefer-offline')
run('node', 'tools/check-workspace.mjs', '--fix')
run('biome', 'check', '--write', 'tools/arrows.json', `packages/${name}`)
run('node', 'tools/build.mjs')
run('node', 'tools/api.mjs', '--fix')
console.log(`packages/${name} is there, and passes its tests as it stands:

  npm run -s tool -- vitest run packages/${name}

Then: src/${name}.ts (what it is: traits; put, get, free), its README, and its row in README.md.`)

/** Writes a line behind the first place where those words are. */
function insert(path, behind, line) {
  const text = readFileSync(join(root, path), 'utf8')
  const at = text.indexOf(behind)
  if (at < 0) stop(`${path}: there is no ${JSON.stringify(behind)} to write behind`, 1)
  writeFileSync(join(root, path), text.slice(0, at + behind.length) + line + text.slice(at + behind.length))
}

function run(...words) {
  const done = spawnSync(words[0], words.slice(1), { cwd: root, encoding: 'utf8' })
  if (done.status !== 0) stop(`${words.join(' ')} failed:\n${done.stdout}${done.stderr}`, 1)
}

function stop(message, code = 2) {
  console.error(message)
  process.exit(code)
}
