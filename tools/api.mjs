// The public surface of every package, kept in `packages/NAME/api.md`: names, signatures and docstrings of each entry
// point, made of the declarations that the build writes. `npm test` compares; a difference fails it.
//
//   node tools/api.mjs          compares
//   node tools/api.mjs --fix    writes what changed, if a changeset tells of it
//
// An export that no other package, program, example or document names is gone, or tools/api-kept.json says what it is
// there for, by name or for a whole entry point. docs/releasing.md says how stable each further entry point is.
//
// The last line of a report is a sum of the changesets that name the package. A report is written anew only when that
// sum is another one, that is, when a changeset was added or changed: what users see does not change untold. Needs a
// build.
import { createHash } from 'node:crypto'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import ts from 'typescript-api'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const fix = process.argv.includes('--fix')
const packages = ['packages', 'apps']
  .flatMap((group) => readdirSync(join(root, group)).map((name) => join(root, group, name)))
  .filter((folder) => existsSync(join(folder, 'package.json')))
  .map((folder) => ({ folder, manifest: JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8')) }))
const entriesOf = ({ folder, manifest }) =>
  Object.entries(manifest.exports).map(([path, entry]) => ({
    name: `${manifest.name}${path.slice(1)}`,
    file: join(folder, entry.types),
  }))
const files = packages.flatMap((found) => entriesOf(found).map(({ file }) => file))
const missing = files.find((file) => !existsSync(file))
if (missing !== undefined) stop(`${relative(root, missing)} is missing: npm run build`)

const program = ts.createProgram(files, {
  module: ts.ModuleKind.NodeNext,
  target: ts.ScriptTarget.ES2023,
  types: ['node'],
  typeRoots: [join(root, 'node_modules/@types')],
  noEmit: true,
  skipLibCheck: true,
})
const checker = program.getTypeChecker()

compareAll()

function compareAll() {
  const problems = unused().map((name) => `${name} is named nowhere else: remove it, or say why in tools/api-kept.json`)
  const tiers = readFileSync(join(root, 'docs/releasing.md'), 'utf8')
  for (const { name } of packages.flatMap((found) => entriesOf(found).slice(1))) {
    if (!tiers.includes(`\`${name}\``))
      problems.push(`${name} is in no tier: name it under Stability in docs/releasing.md`)
  }
  let written = 0
  for (const found of packages) {
    const { folder, manifest } = found
    const path = join(folder, 'api.md')
    const report = reportOf(found)
    const [, before = '', sum = ''] = existsSync(path)
      ? (/^(.*)\nChangesets: (\w+)\n$/s.exec(readFileSync(path, 'utf8')) ?? [])
      : []
    if (flat(before) === flat(report)) continue
    const told = changesetsOf(manifest.name)
    const isTold = told !== 'none' && told !== sum
    if (!isTold)
      problems.push(`${manifest.name}: its API changed, and no new changeset names it: ${difference(before, report)}`)
    else if (!fix)
      problems.push(`${manifest.name}: its API is not that of ${relative(root, path)}: node tools/api.mjs --fix`)
    else {
      writeFileSync(path, `${report}\nChangesets: ${told}\n`)
      written++
    }
  }
  for (const problem of problems) console.log(problem)
  if (written > 0) console.log(`${written} reports written`)
  if (problems.length === 0) console.log(`${packages.length} packages show what their api.md says`)
  process.exitCode = problems.length === 0 ? 0 : 1
}

function reportOf(found) {
  const parts = [`# API of ${found.manifest.name}\n\nMade by \`tools/api.mjs\`; not to be edited.\n`]
  for (const { name, file } of entriesOf(found)) {
    parts.push(`## ${name}\n`)
    const lines = exportsOf(file).map(({ symbol }) => textOf(symbol, found.folder))
    parts.push(`\`\`\`ts\n${lines.join('\n\n')}\n\`\`\`\n`)
  }
  return parts.join('\n')
}

/** The exports of a module by name. */
function exportsOf(file) {
  const module = checker.getSymbolAtLocation(program.getSourceFile(file))
  return checker
    .getExportsOfModule(module)
    .map((symbol) => ({ name: symbol.name, symbol }))
    .sort((a, b) => (a.name < b.name ? -1 : 1))
}

function targetOf(symbol) {
  return symbol.flags & ts.SymbolFlags.Alias ? checker.getAliasedSymbol(symbol) : symbol
}

function textOf(symbol, folder) {
  const declarations = targetOf(symbol).declarations ?? []
  const own = declarations.filter((declaration) => declaration.getSourceFile().fileName.startsWith(`${folder}/`))
  if (own.length === 0) return `export { ${symbol.name} } // of another package`
  if (ts.isSourceFile(own[0])) return `export * as ${symbol.name}`
  return own.map(declarationText).join('\n')
}

function declarationText(declaration) {
  const node = ts.isVariableDeclaration(declaration) ? declaration.parent.parent : declaration
  const file = node.getSourceFile()
  const text = file.text.slice(node.getStart(file, true), node.end)
  // How a class keeps its own things is nobody else's.
  return text
    .replace(/^ *#private;\n/gm, '')
    .replace(/^ *private [^;]*;\n/gm, '')
    .replace(/^export declare /gm, 'export ')
}

/** Without line ends: where a docstring is broken is no change. */
function flat(text) {
  return text
    .replaceAll('*/', ' */ ')
    .replaceAll('/**', ' /** ')
    .replace(/^\s*\* (?!\/)/gm, ' ')
    .replace(/\s+/g, ' ')
}

/** A sum of the changesets that name a package; `none` when there is none. */
function changesetsOf(name) {
  const folder = join(root, '.changeset')
  const naming = readdirSync(folder)
    .filter((file) => file.endsWith('.md') && file !== 'README.md')
    .sort()
    .map((file) => `${file}\n${readFileSync(join(folder, file), 'utf8')}`)
    .filter((text) => new RegExp(`^['"]?${name}['"]?: `, 'm').test(/\n---\n(.*?)\n---\n/s.exec(text)?.[1] ?? ''))
  if (naming.length === 0) return 'none'
  return createHash('sha256').update(naming.join('\n')).digest('hex').slice(0, 16)
}

function difference(before, after) {
  const [old, now] = [before, after].map((text) => text.split('\n'))
  const gone = old.find((line) => !now.includes(line))
  const come = now.find((line) => !old.includes(line))
  return [gone && `- ${gone.trim()}`, come && `+ ${come.trim()}`].filter(Boolean).join('  ') || 'the order changed'
}

/** Exports that are in no other package, program, example or document, in no signature, and not explained. */
function unused() {
  const kept = JSON.parse(readFileSync(join(root, 'tools/api-kept.json'), 'utf8'))
  const found = []
  const texts = packages.map(({ folder, manifest }) => ({ name: manifest.name, text: textsBelow(folder, true) }))
  const documents = ['README.md', 'docs'].map((path) => textsBelow(join(root, path), false)).join('\n')
  for (const one of packages) {
    const own = one.manifest.name
    const readme = readFileSync(join(one.folder, 'README.md'), 'utf8')
    const others = texts.filter(({ name }) => name !== own).map(({ text }) => text)
    for (const { name: entry, file } of entriesOf(one)) {
      const all = exportsOf(file)
      const signatures = all.map(({ name, symbol }) => ({ name, text: textOf(symbol, one.folder) }))
      for (const { name } of all) {
        if (kept[entry] !== undefined || kept[`${entry} ${name}`] !== undefined) continue
        const word = new RegExp(`\\b${name.replaceAll('$', '\\$')}\\b`)
        const isUsed =
          word.test(readme) ||
          word.test(documents) ||
          signatures.some((other) => other.name !== name && word.test(other.text)) ||
          others.some((text) => word.test(text))
        if (!isUsed) found.push(`${entry} ${name}`)
      }
    }
  }
  return found
}

function textsBelow(path, isPackage) {
  if (!existsSync(path)) return ''
  if (!isPackage && path.endsWith('.md')) return readFileSync(path, 'utf8')
  const parts = []
  for (const entry of readdirSync(path, { withFileTypes: true })) {
    if (['node_modules', 'dist', '.reports', 'api.md', 'CHANGELOG.md'].includes(entry.name)) continue
    const below = join(path, entry.name)
    if (entry.isDirectory()) parts.push(textsBelow(below, isPackage))
    else if (/\.(ts|mjs|js|md)$/.test(entry.name)) parts.push(readFileSync(below, 'utf8'))
  }
  return parts.join('\n')
}

function stop(message) {
  console.error(message)
  process.exit(1)
}
