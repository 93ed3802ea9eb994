// What users get of every package: packs all of them as a release does, looks into them, lays them side by side into an
// empty folder outside of the workspace, and uses them there: imports, declarations, the ten lines of README.md, the
// program. What they need from the registry is linked from the workspace; nothing is downloaded. Needs a build.
import { spawnSync } from 'node:child_process'
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const problems = []
const scratch = fs.mkdtempSync(join(tmpdir(), 'tmem-packages-'))
try {
  const packages = unpack()
  for (const found of packages) inspect(found)
  if (problems.length === 0) use(packages)
  for (const problem of problems) console.log(problem)
  console.log(problems.length === 0 ? `${packages.length} packages can be used` : `${problems.length} problems`)
  process.exitCode = problems.length === 0 ? 0 : 1
} finally {
  fs.rmSync(scratch, { recursive: true })
}

function unpack() {
  const groups = ['--filter', './packages/*', '--filter', './apps/*']
  const packed = JSON.parse(run(root, 'pnpm', '-r', ...groups, 'pack', '--pack-destination', scratch, '--json'))
  const folderOf = new Map(
    ['packages', 'apps']
      .flatMap((group) => fs.readdirSync(join(root, group)).map((name) => join(root, group, name)))
      .filter((folder) => fs.existsSync(join(folder, 'package.json')))
      .map((folder) => [json(join(folder, 'package.json')).name, folder]),
  )
  return packed.map(({ name, filename, files }) => {
    const installed = join(scratch, 'node_modules', name)
    fs.mkdirSync(installed, { recursive: true })
    run(installed, 'tar', '-xzf', filename, '--strip-components=1')
    const manifest = json(join(installed, 'package.json'))
    return { name, folder: folderOf.get(name), installed, manifest, files: files.map(({ path }) => path) }
  })
}

function inspect({ name, installed, manifest, files }) {
  const rule = (kept, text) => kept || problems.push(`${name} as packed: ${text}`)
  for (const file of ['README.md', 'LICENSE', 'package.json']) rule(files.includes(file), `${file} is missing`)
  for (const file of files) {
    rule(
      /^(README\.md|LICENSE|CHANGELOG\.md|package\.json|dist\/.*|src\/.*)$/.test(file),
      `${file} does not belong there`,
    )
    rule(!/(^|\/)test\/|\.test\.|\.tsbuildinfo$/.test(file), `${file} does not belong there`)
  }
  rule(!JSON.stringify(manifest.exports).includes('@tmem/source'), '"exports" leads to the sources')
  for (const kind of ['dependencies', 'peerDependencies', 'optionalDependencies']) {
    for (const [used, version] of Object.entries(manifest[kind] ?? {})) {
      rule(/^[\^~]?\d/.test(version), `${kind}.${used} is "${version}"`)
    }
  }
  const named = [manifest.types, ...Object.values(manifest.exports).flatMap((entry) => Object.values(entry))]
  for (const path of [...named, ...Object.values(manifest.bin ?? {})]) {
    rule(fs.existsSync(join(installed, path)), `${path} is missing`)
  }
  for (const path of Object.values(manifest.bin ?? {})) {
    rule(
      fs.readFileSync(join(installed, path), 'utf8').startsWith('#!/usr/bin/env node\n'),
      `${path} cannot be started`,
    )
  }
  for (const map of files.filter((file) => file.endsWith('.map'))) {
    for (const source of json(join(installed, map)).sources) {
      const path = relative(installed, join(installed, dirname(map), source))
      rule(
        files.includes(path),
        `${map} leads to ${path}, which is missing; if that is right, remove dist and build again`,
      )
    }
  }
}

function use(packages) {
  const installed = new Map(packages.map((found) => [found.name, found]))
  for (const { name, folder, manifest } of packages) {
    // Who uses an entry for a neighbour has the neighbour.
    for (const used of Object.keys({ ...manifest.dependencies, ...manifest.peerDependencies })) {
      if (installed.has(used)) continue
      link(used, join(folder, 'node_modules', used))
      if (!fs.existsSync(join(scratch, 'node_modules', used))) problems.push(`${name}: ${used} is not installed`)
    }
  }
  link('@types/node', join(root, 'node_modules/@types/node'))

  const entries = packages.flatMap(({ name, manifest }) =>
    Object.keys(manifest.exports).map((path) => join(name, path)),
  )
  write('package.json', JSON.stringify({ type: 'module' }))
  write('imports.js', entries.map((entry) => `await import('${entry}')\n`).join(''))
  tried('imports.js')

  const lines = /```js\n(.*?)```/s.exec(fs.readFileSync(join(root, 'README.md'), 'utf8'))?.[1] ?? ''
  write('readme.js', lines.replace('/tmp/swap.img', join(scratch, 'swap.img')))
  if (tried('readme.js') !== 'true\ntrue\n') problems.push('the ten lines of README.md do not print what they say')

  const bin = join(scratch, 'node_modules/tmem', installed.get('tmem').manifest.bin.tmem)
  if (!tried(bin, '--help').startsWith('Usage: tmem')) problems.push('tmem --help does not show its usage')
  const demo = JSON.parse(tried(bin, 'demo', '--size', '2MiB', '--json') || '{}')
  if (demo.wrongBytes !== 0) problems.push('tmem demo does not work as packed')

  const compilerOptions = { module: 'nodenext', target: 'es2023', strict: true, noEmit: true, types: ['node'] }
  write('tsconfig.json', JSON.stringify({ compilerOptions, files: ['consumer.ts'] }))
  const imports = entries.map((entry, index) => `import * as entry${index} from '${entry}'\n`)
  write('consumer.ts', `${imports.join('')}console.log(${entries.map((_, index) => `entry${index}`).join()})\n${lines}`)
  const types = spawnSync('tsc', ['-p', scratch], { encoding: 'utf8' })
  if (types.status !== 0) problems.push(`the declarations cannot be used:\n${types.stdout}`)
}

function link(name, target) {
  const path = join(scratch, 'node_modules', name)
  if (fs.existsSync(path) || !fs.existsSync(target)) return
  fs.mkdirSync(dirname(path), { recursive: true })
  fs.symlinkSync(fs.realpathSync(target), path)
}

/** What the script prints in the folder of the user; a failure is a problem. */
function tried(...words) {
  const done = spawnSync(process.execPath, words, {
    cwd: scratch,
    encoding: 'utf8',
    env: { ...process.env, NODE_OPTIONS: '' },
  })
  if (done.status === 0) return done.stdout
  problems.push(`as installed, node ${words.join(' ')} failed:\n${done.stderr}`)
  return ''
}

function run(cwd, name, ...words) {
  const done = spawnSync(name, words, { cwd, encoding: 'utf8', maxBuffer: 2 ** 28 })
  if (done.status === 0) return done.stdout
  throw new Error(`${name} ${words.join(' ')} failed: ${done.error?.message ?? `${done.stdout}${done.stderr}`}`)
}

function write(name, text) {
  fs.writeFileSync(join(scratch, name), text)
}

function json(path) {
  return JSON.parse(fs.readFileSync(path, 'utf8'))
}
