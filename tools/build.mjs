// Builds all packages: TypeScript, then the pages of apps/console.
import { spawnSync } from 'node:child_process'
import { dirname } from 'node:path'
import { fileURLToPath } from 'node:url'
import { bundle } from '../apps/console/bundle.mjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const typed = spawnSync('tsc', ['-b', 'tsconfig.json'], { cwd: root, stdio: 'inherit' })
if (typed.error) process.stderr.write(`${typed.error.message}\n`)
if (typed.status === 0) await bundle()
else process.exitCode = typed.status ?? 1
