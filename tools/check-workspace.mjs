// The rules that every package of the workspace keeps, checked by `npm test`. `--fix` writes the TypeScript references
// and what is published of a package.
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const fix = process.argv.includes('--fix')
const problems = []
/** What the README of every package has a section about, so that it is found where one looks for it. */
const sections = [
  'What it keeps',
  'What it refuses',
  'When something fails',
  'Cost',
  'How to observe it',
  'Limits',
  'Sources',
]
const published = ['dist', '!dist/.tsbuildinfo', 'src'] // sources, because source maps lead to them
const json = (path) => JSON.parse(readFileSync(join(root, path), 'utf8'))
const arrows = json('tools/arrows.json')

const packages = ['packages', 'apps']
  .flatMap((group) => readdirSync(join(root, group)).map((name) => `${group}/${name}`))
  .filter((folder) => existsSync(join(root, folder, 'package.json')))
  .map((folder) => ({ folder, manifest: json(`${folder}/package.json`) }))
  .sort((a, b) => (a.folder < b.folder ? -1 : 1))
const folderOf = new Map(packages.map(({ folder, manifest }) => [manifest.name, folder]))

checkVersions('package.json', json('package.json'))
for (const { folder, manifest } of packages) {
  const rule = (kept, text) => kept || problems.push(`${folder}: ${text}`)
  for (const file of ['README.md', 'LICENSE', 'tsconfig.json', 'src/index.ts']) {
    rule(existsSync(join(root, folder, file)), `${file} is missing`)
  }
  const library = folder.startsWith('packages/')
  const readme = existsSync(join(root, folder, 'README.md'))
    ? readFileSync(join(root, folder, 'README.md'), 'utf8')
    : ''
  const lacking = sections.filter((section) => library && !readme.includes(`\n## ${section}\n`))
  rule(lacking.length === 0, `README.md has no section ${lacking.join(', ')}`)
  const name = folder.slice(folder.indexOf('/') + 1)
  // The program is called as it is started.
  const named = name === 'tmem' ? name : `@tmem/${name === 'tmem-core' ? 'core' : name}`
  rule(manifest.name === named, `must be named ${named}, not ${manifest.name}`)
  rule(manifest.license === 'MIT', 'needs "license": "MIT"')
  rule(manifest.type === 'module', 'needs "type": "module"')
  rule(manifest.sideEffects === false, 'needs "sideEffects": false')
  rule(manifest.engines?.node === '>=20.19.0', 'needs "engines": {"node": ">=20.19.0"}')
  checkFiles(folder, manifest)
  rule(typeof manifest.types === 'string', 'needs "types"')
  rule(manifest.exports?.['.'] !== undefined, 'needs "exports" with "."')
  for (const [path, entry] of Object.entries(manifest.exports ?? {})) {
    const keys = Object.keys(entry).filter((key) => key !== 'browser')
    rule(
      keys.join() === '@tmem/source,types,default',
      `exports["${path}"] has ${keys.join()}, not @tmem/source,types,default, and perhaps browser between them`,
    )
    const { '@tmem/source': source, ...others } = entry
    rule(existsSync(join(root, folder, source ?? '?')), `exports["${path}"]: ${source} does not exist`)
    const same = JSON.stringify(manifest.publishConfig?.exports?.[path]) === JSON.stringify(others)
    rule(same, `publishConfig.exports["${path}"] must be the same without @tmem/source`)
  }
  checkVersions(folder, manifest)

  const uses = (kind) => Object.keys(manifest[kind] ?? {}).filter((name) => folderOf.has(name))
  const sources = arrows.sources[manifest.name]
  rule(sources !== undefined, `${manifest.name} is not in tools/arrows.json`)
  const allowed = (list, name) => list?.includes(name) || list?.includes('*')
  for (const used of uses('dependencies')) {
    rule(allowed(sources, used), `may not depend on ${used} (tools/arrows.json)`)
  }
  for (const used of uses('devDependencies')) {
    const ok = [sources, arrows.tests['*'], arrows.tests[manifest.name]].some((list) => allowed(list, used))
    rule(ok, `its tests may not use ${used} (tools/arrows.json)`)
  }
  checkReferences(
    `${folder}/tsconfig.json`,
    uses('dependencies').map((used) => relative(folder, folderOf.get(used))),
  )
}
for (const path of ['tsconfig.json', 'tsconfig.test.json']) {
  checkReferences(
    path,
    packages.map(({ folder }) => folder),
  )
}

for (const problem of problems) console.log(problem)
console.log(problems.length === 0 ? `${packages.length} packages keep the rules` : `${problems.length} problems`)
process.exitCode = problems.length === 0 ? 0 : 1

function checkVersions(where, manifest) {
  for (const kind of ['dependencies', 'devDependencies', 'peerDependencies', 'optionalDependencies']) {
    for (const [name, version] of Object.entries(manifest[kind] ?? {})) {
      const wanted = folderOf.has(name) ? 'workspace:^' : 'catalog:'
      if (version !== wanted) problems.push(`${where}: ${kind}.${name} must be "${wanted}", not "${version}"`)
    }
  }
}

function checkFiles(folder, manifest) {
  if (JSON.stringify(manifest.files) === JSON.stringify(published)) return
  if (fix) write(`${folder}/package.json`, { ...manifest, files: published })
  else problems.push(`${folder}: "files" must be ${JSON.stringify(published)}; node tools/check-workspace.mjs --fix`)
}

function checkReferences(path, folders) {
  if (!existsSync(join(root, path))) return
  const config = json(path)
  const references = [...folders].sort().map((folder) => ({ path: folder }))
  if (JSON.stringify(config.references ?? []) === JSON.stringify(references)) return
  if (fix) write(path, { ...config, references })
  else problems.push(`${path}: references do not match the dependencies; node tools/check-workspace.mjs --fix`)
}

function write(path, value) {
  writeFileSync(join(root, path), `${JSON.stringify(value, null, 2)}\n`)
  spawnSync('npx', ['biome', 'format', '--write', path], { cwd: root })
}
