// The API reference: static pages in `reference/` made from the docstrings, with a search that needs no server. Typedoc
// has a TypeScript of its own here, because it uses the compiler as a library.
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Application } from 'typedoc'

const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))
const packages = ['packages', 'apps']
  .flatMap((group) => readdirSync(join(root, group)).map((name) => join(root, group, name)))
  .filter((folder) => existsSync(join(folder, 'package.json')))
const entryPoints = packages.flatMap((folder) =>
  Object.values(JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8')).exports).map((entry) =>
    join(folder, entry['@tmem/source']),
  ),
)
const application = await Application.bootstrap({
  entryPoints,
  tsconfig: join(root, 'tools/release/tsconfig.reference.json'),
  name: 'tmem',
  readme: join(root, 'README.md'),
  out: join(root, 'reference'),
  basePath: root,
  disableSources: true,
  excludeInternal: true,
  excludePrivate: true,
  treatWarningsAsErrors: false,
  validation: { notExported: false, invalidLink: false, rewrittenLink: false, notDocumented: false },
  logLevel: 'Warn',
})
const project = await application.convert()
if (project === undefined || application.logger.hasErrors()) {
  console.log('the reference was not built')
  process.exit(1)
}
await application.generateDocs(project, join(root, 'reference'))
if (application.logger.hasErrors()) process.exit(1)
const names = project.children?.reduce((sum, module) => sum + (module.children?.length ?? 1), 0) ?? 0
console.log(`reference/index.html: ${names} names in ${entryPoints.length} entry points`)
