// Writes into every package.json where its sources are: `node tools/release/repository.mjs https://HOST/OWNER/NAME`.
// A release does it just before it publishes; npm refuses provenance of a package that names another repository.
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))
const [url = ''] = process.argv.slice(2)
if (!/^https:\/\/[\w.-]+\/[\w.-]+\/[\w.-]+$/.test(url)) {
  console.error(`usage: node tools/release/repository.mjs https://HOST/OWNER/NAME, not ${url || 'nothing'}`)
  process.exit(2)
}
for (const group of ['packages', 'apps']) {
  for (const name of readdirSync(join(root, group))) {
    const directory = `${group}/${name}`
    const file = join(root, directory, 'package.json')
    if (!existsSync(file)) continue
    const manifest = JSON.parse(readFileSync(file, 'utf8'))
    manifest.repository = { type: 'git', url: `git+${url}.git`, directory }
    writeFileSync(file, `${JSON.stringify(manifest, null, 2)}\n`)
  }
}
