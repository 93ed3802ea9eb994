// Loads the built package into contexts of their own and uses it there: node --experimental-vm-modules forbidden.mjs
import { readFileSync } from 'node:fs'
import { createContext, SourceTextModule, SyntheticModule } from 'node:vm'

const index = new URL(import.meta.resolve('@tmem/codecs'))

/** The package in a context. What it imports from outside is what this program has. */
async function load(context) {
  const modules = new Map()
  const moduleOf = (url) => {
    if (!modules.has(url.href))
      modules.set(url.href, new SourceTextModule(readFileSync(url, 'utf8'), { context, identifier: url.href }))
    return modules.get(url.href)
  }
  const module = moduleOf(index)
  await module.link(async (name, { identifier }) => {
    if (name.startsWith('.')) return moduleOf(new URL(name, identifier))
    const outside = await import(name)
    const exported = Object.keys(outside)
    return new SyntheticModule(
      exported,
      function () {
        for (const one of exported) this.setExport(one, outside[one])
      },
      { context },
    )
  })
  await module.evaluate()
  return module.namespace
}

async function tryIt(globals, wasm) {
  const context = createContext(globals, { codeGeneration: { strings: false, wasm } })
  const codec = (await load(context)).createCodec('lz4')
  // Arrays of this realm, and not of the context's.
  const page = new Uint8Array(4096).map((_, at) => at % 50)
  const block = new Uint8Array(codec.bound(4096))
  const length = codec.compress(page, 0, 4096, block, 0, block.length)
  const back = new Uint8Array(4096)
  const decoded = codec.decompress(block, 0, length, back, 0, 4096)
  return `${codec.engine} ${decoded} ${Buffer.compare(back, page) === 0}`
}

const answer = {
  forbidden: await tryIt({ atob }, false),
  allowed: await tryIt({ atob }, true),
  bare: await tryIt({}, true),
}
process.stdout.write(JSON.stringify(answer))
