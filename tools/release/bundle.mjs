// Bundles modules for browsers, without a setting that a bundler does not have by itself:
//   node bundle.mjs esbuild|webpack|vite FOLDER ENTRY...
// writes FOLDER/NAME.js for each entry NAME.mjs, and prints the bytes that it has written.
import { readdirSync, statSync } from 'node:fs'
import { basename, join } from 'node:path'

const [bundler, folder, ...entries] = process.argv.slice(2)
const named = Object.fromEntries(entries.map((entry) => [basename(entry, '.mjs'), entry]))

const bundlers = {
  async esbuild() {
    const { build } = await import('esbuild')
    await build({ entryPoints: named, bundle: true, minify: true, format: 'esm', outdir: folder, logLevel: 'warning' })
  },
  async webpack() {
    const { default: webpack } = await import('webpack')
    const stats = await new Promise((resolve, reject) => {
      webpack({ mode: 'production', entry: named, output: { path: folder } }, (error, done) =>
        error ? reject(error) : resolve(done),
      )
    })
    if (stats.hasErrors()) throw new Error(stats.toString({ all: false, errors: true }))
  },
  async vite() {
    const { build } = await import('vite')
    const rollupOptions = { input: named, output: { entryFileNames: '[name].js' } }
    await build({ configFile: false, logLevel: 'error', build: { outDir: folder, emptyOutDir: false, rollupOptions } })
  },
}
if (!Object.hasOwn(bundlers, bundler)) {
  console.error(`no bundler is named ${bundler}; there are ${Object.keys(bundlers).join(', ')}`)
  process.exit(2)
}
await bundlers[bundler]()
let bytes = 0
for (const name of readdirSync(folder, { recursive: true })) {
  const { size } = statSync(join(folder, name))
  if (name.endsWith('.js')) bytes += size
}
console.log(bytes)
