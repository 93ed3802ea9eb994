// The portable suite in other runtimes: `npm run test:runtimes [-- NAME...]`. Each comes from npm into .cache/runtimes,
// once for a version. Prints a table, as it is in docs/runtimes.md. Needs a build.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const suite = join(root, 'packages/conformance/test/portable/main.mjs')

/** What npm calls it, its program in `node_modules/.bin`, and the words before the file. */
const runtimes = {
  'Node 20': ['node@20', 'node'],
  'Node 22': ['node@22', 'node'],
  'Node 24': ['node@24', 'node'],
  'newest Node': ['node@latest', 'node'],
  Bun: ['bun@latest', 'bun'],
  Deno: ['deno@latest', 'deno', 'run', '--allow-all', '--node-modules-dir=manual'],
}

const wanted = process.argv.slice(2)
const unknown = wanted.find((name) => !Object.hasOwn(runtimes, name))
if (unknown !== undefined) {
  console.error(`no runtime is named ${unknown}; there are ${Object.keys(runtimes).join(', ')}`)
  process.exit(2)
}

let isGreen = true
console.log('| runtime | version | passed | failed |\n|---|---|---|---|')
for (const name of wanted.length > 0 ? wanted : Object.keys(runtimes)) {
  const [spec, program, ...words] = runtimes[name]
  const folder = join(root, '.cache/runtimes', name.replaceAll(' ', '-').toLowerCase())
  const bin = join(folder, 'node_modules/.bin', program)
  if (!existsSync(bin)) {
    mkdirSync(folder, { recursive: true })
    const done = spawnSync('npm', ['install', '--prefix', folder, '--no-save', '--no-audit', '--no-fund', spec], {
      encoding: 'utf8',
      cwd: folder,
    })
    if (done.status !== 0) {
      console.log(`| ${name} | cannot be had: ${done.stderr.trim().split('\n')[0]} | | |`)
      continue
    }
  }
  const version = spawnSync(bin, ['--version'], { encoding: 'utf8' }).stdout.match(/\d+\.\d+\.\d+/)?.[0] ?? '?'
  const done = spawnSync(bin, [...words, suite], { encoding: 'utf8', cwd: dirname(suite), maxBuffer: 2 ** 26 })
  const line = done.stdout.trim().split('\n').at(-1) ?? ''
  if (!line.startsWith('{')) {
    isGreen = false
    console.log(`| ${name} | ${version} | none: ${done.stderr.trim().split('\n').slice(0, 3).join(' ')} | |`)
    continue
  }
  const { passed, failed } = JSON.parse(line)
  if (failed.length > 0) isGreen = false
  console.log(`| ${name} | ${version} | ${passed} | ${failed.length} |`)
  for (const text of failed) console.error(text)
}
process.exitCode = isGreen ? 0 : 1
