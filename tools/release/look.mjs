// Looks at published tarballs as publint and Are The Types Wrong do, and measures them. Takes a file with
// `[{name, tarball, folder}]`, the folder being the tarball unpacked; prints `{problems, sizes}` as JSON.
import { readdirSync, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { checkPackage, createPackageFromTarballData } from '@arethetypeswrong/core'
import { build } from 'esbuild'
import { publint } from 'publint'
import { formatMessage } from 'publint/utils'

const problems = []
const sizes = {}
for (const { name, tarball, folder } of JSON.parse(readFileSync(process.argv[2], 'utf8'))) {
  const manifest = JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8'))
  const { messages } = await publint({ pkgDir: folder, pack: false, strict: true })
  for (const message of messages) problems.push(`${name}: publint: ${formatMessage(message, manifest)}`)

  const bytes = readFileSync(tarball)
  const analysis = await checkPackage(createPackageFromTarballData(new Uint8Array(bytes)))
  if (!analysis.types) problems.push(`${name}: attw: it has no types`)
  for (const problem of analysis.problems ?? []) {
    // The packages are ES modules: resolutions that know no "exports", or no modules, are not supported.
    if (problem.resolutionKind === 'node10' || problem.resolutionKind === 'node16-cjs') continue
    problems.push(`${name}: attw: ${problem.kind} ${JSON.stringify(problem)}`)
  }

  const entryPoints = Object.values(manifest.exports).map((entry) => join(folder, entry.default))
  const { outputFiles } = await build({
    entryPoints,
    bundle: true,
    packages: 'external',
    platform: 'node',
    format: 'esm',
    minify: true,
    splitting: true,
    outdir: join(folder, '..'),
    write: false,
    logLevel: 'silent',
  })
  sizes[name] = {
    packed: bytes.length,
    installed: sizeOf(folder),
    minified: outputFiles.reduce((sum, { contents }) => sum + contents.length, 0),
  }
}
console.log(JSON.stringify({ problems, sizes }))

function sizeOf(path) {
  if (!statSync(path).isDirectory()) return statSync(path).size
  return readdirSync(path).reduce((sum, name) => sum + sizeOf(join(path, name)), 0)
}
