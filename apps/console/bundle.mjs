// Makes the pages, each with all that it imports in one file, in dist/static. Pages whose inputs have not changed stay
// as they are. Run by tools/build.mjs, after TypeScript.
import {
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const app = dirname(fileURLToPath(import.meta.url))
const root = dirname(dirname(app))
const web = join(app, 'src/web')
const target = join(app, 'dist/static')
const stamp = join(app, 'dist/static.json')
const copied = ['console.html', 'playground.html', 'icon.svg']
const bundled = [
  { entries: ['console.tsx', 'page.css'], format: 'esm' },
  // What is opened as a file, and a thread that pages share, has no modules.
  { entries: ['report.tsx', 'playground.tsx', 'stream.ts'], format: 'iife' },
]

/** Makes the pages, if anything that they are made of has changed. */
export async function bundle() {
  if (isCurrent()) return
  // Not needed otherwise, and slow to load.
  const { build } = await import('esbuild')
  mkdirSync(dirname(target), { recursive: true })
  // Somebody else may build, or serve what is there, at the same time.
  const scratch = mkdtempSync(`${target}-`)
  const inputs = new Set(['apps/console/bundle.mjs', 'pnpm-lock.yaml'])
  for (const name of copied) {
    copyFileSync(join(web, name), join(scratch, name))
    inputs.add(`apps/console/src/web/${name}`)
  }
  for (const { entries, format } of bundled) {
    const { metafile } = await build({
      absWorkingDir: root,
      entryPoints: entries.map((name) => join(web, name)),
      outdir: scratch,
      bundle: true,
      minify: true,
      format,
      target: 'es2023',
      // The packages' sources, where the workspace has them.
      conditions: ['@tmem/source'],
      jsx: 'automatic',
      jsxImportSource: 'preact',
      metafile: true,
      logLevel: 'warning',
      // Mapped memory, which a browser has not, looks for a library beside its own module.
      logOverride: { 'empty-import-meta': 'silent' },
    })
    for (const path of Object.keys(metafile.inputs)) inputs.add(path)
  }
  chmodSync(scratch, 0o755)
  rmSync(target, { recursive: true, force: true })
  try {
    renameSync(scratch, target)
  } catch (error) {
    // Whoever was as quick has made the same.
    if (error.code !== 'ENOTEMPTY' && error.code !== 'EEXIST') throw error
    rmSync(scratch, { recursive: true })
  }
  writeFileSync(stamp, JSON.stringify(Object.fromEntries([...inputs].map((path) => [path, changeOf(path)]))))
}

/** Whether all that the pages were made of is as it was then. */
function isCurrent() {
  if (!existsSync(stamp) || !existsSync(target)) return false
  const inputs = JSON.parse(readFileSync(stamp, 'utf8'))
  return Object.entries(inputs).every(([path, changed]) => changed === changeOf(path))
}

function changeOf(path) {
  return statSync(join(root, path), { throwIfNoEntry: false })?.mtimeMs ?? null
}
