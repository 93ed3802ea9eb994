// Writes every package as the tarball that a release would publish, and says how to install them: for who wants to use
// them before they are in a registry. Each comes after those that it needs. Needs a build.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync } from 'node:fs'
import { basename, dirname, join, relative, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const target = resolve(root, process.argv[2] ?? 'packed')
mkdirSync(target, { recursive: true })

const groups = ['--filter', './packages/*', '--filter', './apps/*']
const done = spawnSync('pnpm', ['-r', ...groups, 'pack', '--pack-destination', target, '--json'], {
  cwd: root,
  encoding: 'utf8',
  maxBuffer: 2 ** 28,
})
if (done.status !== 0) throw new Error(`pnpm pack failed: ${done.error?.message ?? `${done.stdout}${done.stderr}`}`)

const packed = new Map(JSON.parse(done.stdout).map(({ name, filename }) => [name, filename]))
const needs = (name) => {
  const own = name === 'tmem' ? name : name === '@tmem/core' ? 'tmem-core' : name.slice(6)
  const folder = ['packages', 'apps'].map((group) => join(group, own)).find((path) => existsSync(join(root, path)))
  return Object.keys(JSON.parse(readFileSync(join(root, folder, 'package.json'), 'utf8')).dependencies ?? {})
}
const order = new Set()
const visit = (name) => {
  if (!packed.has(name) || order.has(name)) return
  for (const needed of needs(name)) visit(needed)
  order.add(name)
}
for (const name of packed.keys()) visit(name)

const wanted = new Set()
const want = (name) => {
  if (!packed.has(name) || wanted.has(name)) return
  wanted.add(name)
  for (const needed of needs(name)) want(needed)
}
for (const name of ['@tmem/zcache', '@tmem/frontswap']) want(name)

for (const name of order) console.log(`${name.padEnd(20)}${basename(packed.get(name))}`)
const files = [...order].filter((name) => wanted.has(name)).map((name) => packed.get(name))
console.log(`
${order.size} tarballs in ${relative(process.cwd(), target) || '.'}, each after those that it needs. What the README's ten lines use:

npm install ${files.join(' ')}`)
