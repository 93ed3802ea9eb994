// Whether every link of every document leads somewhere: to a file of the checkout, and to a heading of it. Links to
// other hosts are counted, and not asked for.
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { dirname, join, relative, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const problems = []
let links = 0
let elsewhere = 0
const headings = new Map()

for (const file of documents()) {
  const text = withoutCode(readFileSync(file, 'utf8'))
  const targets = [...text.matchAll(/\[(?:[^\][]|\[[^\]]*\])*\]\(([^()\s]+(?:\([^()]*\)[^()\s]*)?)\)/g)].map(
    ([, to]) => to,
  )
  targets.push(...[...text.matchAll(/^\[[^\]]+\]:\s+(\S+)$/gm)].map(([, to]) => to))
  for (const target of targets) {
    links++
    const where = `${relative(root, file)}: ${target}`
    if (/^(https?|mailto):/.test(target)) {
      elsewhere++
      continue
    }
    const [path, anchor] = target.split('#')
    const to = path === '' ? file : resolve(dirname(file), decodeURI(path))
    if (!existsSync(to)) problems.push(`${where} is not there`)
    else if (anchor === undefined) continue
    else if (statSync(to).isDirectory() || !to.endsWith('.md')) problems.push(`${where}: only documents have headings`)
    else if (!headingsOf(to).has(anchor)) problems.push(`${where}: there is no such heading`)
  }
}
for (const problem of problems) console.log(problem)
console.log(
  problems.length === 0
    ? `${links} links lead somewhere, ${elsewhere} of them elsewhere`
    : `${problems.length} problems`,
)
process.exitCode = problems.length === 0 ? 0 : 1

/** The documents that are, or could be, committed. */
function documents() {
  const listed = spawnSync('git', ['ls-files', '--cached', '--others', '--exclude-standard', '*.md'], {
    cwd: root,
    encoding: 'utf8',
  })
  const paths = listed.status === 0 ? listed.stdout.trimEnd().split('\n') : [...below(root)]
  return paths.map((path) => resolve(root, path)).filter((path) => existsSync(path) && !path.endsWith('/api.md'))
}

function* below(folder) {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    if (['node_modules', 'dist', '.cache', '.git', 'reference'].includes(entry.name)) continue
    if (entry.isDirectory()) yield* below(join(folder, entry.name))
    else if (entry.name.endsWith('.md')) yield join(folder, entry.name)
  }
}

function withoutCode(text) {
  return text.replace(/^( *)```.*?^\1```$/gms, '').replace(/`[^`\n]*`/g, (code) => 'x'.repeat(code.length))
}

/** The anchors of a document, as GitHub makes them. */
function headingsOf(file) {
  let found = headings.get(file)
  if (found === undefined) {
    found = new Set()
    const text = readFileSync(file, 'utf8').replace(/^( *)```.*?^\1```$/gms, '')
    for (const [, title] of text.matchAll(/^#{1,6} (.*)$/gm)) {
      const plain = title
        .replace(/\[([^\]]*)\]\([^)]*\)/g, '$1')
        .replace(/`/g, '')
        .trim()
        .toLowerCase()
      const anchor = plain.replace(/[^\p{L}\p{N}\s_-]/gu, '').replace(/ /g, '-')
      let name = anchor
      for (let n = 1; found.has(name); n++) name = `${anchor}-${n}`
      found.add(name)
    }
    headings.set(file, found)
  }
  return found
}
