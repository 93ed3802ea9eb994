// Shows the first example of README.md, and runs it as it stands there. Needs a build.
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const [, example] = /```js\n(.*?)```/s.exec(readFileSync(join(root, 'README.md'), 'utf8'))
// Where an import finds the packages.
const folder = mkdtempSync(join(root, 'apps/tmem/dist/try-'))
const remove = () => rmSync(folder, { recursive: true, force: true })
process.on('exit', remove)
for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(130))
const file = join(folder, 'example.mjs')
writeFileSync(file, example)
process.stdout.write(`${example}\n--- it prints:\n`)
await import(pathToFileURL(file).href)
