// A release, rehearsed: `npm run test:release`. A copy of the checkout is versioned, built and published, as
// docs/releasing.md says, to a registry of its own on loopback; people's folders install from there with npm and pnpm,
// and use what they got: README examples as ES modules and through `require`, declarations under strict compilers, the
// program by npx. Then the same once more with a changed @tmem/core, as an upgrade.
//
// The checkout is only read. Everything that is made lies in one temporary folder, which is removed at the end
// (`--keep` leaves it). What is published cannot get anywhere else: all registries of the publishing programs are the
// one on loopback, and they see nobody's credentials. Packages of others come from where the user's npm gets them.
import { fork } from 'node:child_process'
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { asCommonJs, examplesOf } from './examples.mjs'
import { run, step, together } from './work.mjs'

const here = dirname(fileURLToPath(import.meta.url))
const root = dirname(dirname(here))
const keep = process.argv.includes('--keep')
const scratch = fs.mkdtempSync(join(tmpdir(), 'tmem-release-'))
const checkout = join(scratch, 'checkout')
const counts = { installs: 0, programs: 0, compiled: 0 }
const skipped = []
/**
 * Installed one by one with npm, too: one with entry points of its own for others' packages, one over many packages.
 */
const alone = ['@tmem/cache', '@tmem/simulator']
let registry
let port

const json = (path) => JSON.parse(fs.readFileSync(path, 'utf8'))
const write = (path, text) => {
  fs.mkdirSync(dirname(path), { recursive: true })
  fs.writeFileSync(path, text)
}
const must = (condition, text) => {
  if (!condition) throw new Error(text)
}

const end = () => {
  registry?.disconnect()
  registry = undefined
  if (keep) console.log(`kept: ${scratch}`)
  else fs.rmSync(scratch, { recursive: true, force: true, maxRetries: 3 })
}
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.on(signal, () => {
    end()
    process.exit(130)
  })
}

const started = performance.now()
try {
  await step('a copy of the checkout', copyCheckout)
  await step('its dependencies', async () => {
    await run(checkout, ['pnpm', 'install', '--frozen-lockfile', '--prefer-offline'], local())
  })
  await step('a registry', startRegistry)
  const first = await step('first release', () => release([]))
  const folder = join(scratch, 'people')
  const lint = step('publint, attw, sizes', () => look(first))
  // Its failure is told where it is waited for.
  lint.catch(() => {})
  const readmes = await step('every package for itself, with pnpm', () => installEach(folder, first))
  await step('ES modules, require', () => useEach(folder, first))
  await step('TypeScript: nodenext, bundler', () => compile(folder, readmes))
  await step('examples of the READMEs', () => runExamples(readmes))
  const tenLines = join(scratch, 'ten-lines')
  await step('the ten lines, with npm', () => useTenLines(tenLines, first))
  await step('Jest', () => useJest(tenLines))
  await step('single packages, with npm', () => useAlone(join(scratch, 'alone'), first, readmes))
  await step('all packages together, with npm', () => useAllTogether(join(scratch, 'together'), first))
  await step('npx tmem', () => useProgram(first))
  await lint

  const second = await step('second release', () => release(['@tmem/core']))
  await step('dependents, changelogs', () => compareReleases(first, second))
  await step('upgrades, with npm and pnpm', () => upgrade(tenLines, folder, second, readmes))
  await step('npm run new-layer', newLayer)
  await step('API reports', changeApi)
  for (const reason of new Set(skipped)) {
    console.log(`skipped ${skipped.filter((other) => other === reason).length}: ${reason}`)
  }
  const seconds = Math.round((performance.now() - started) / 1000)
  console.log(
    `${counts.installs} installations, ${counts.programs} programs run, ${counts.compiled} compiled: green, ${seconds} s`,
  )
} catch (error) {
  console.log(error.message)
  console.log('the release rehearsal failed')
  process.exitCode = 1
} finally {
  end()
}

/** What is there, committed or not, but for what git ignores; as a repository of its own, which a release needs. */
async function copyCheckout() {
  fs.mkdirSync(checkout)
  const listed = fs.existsSync(join(root, '.git'))
    ? (await run(root, ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'])).split('\0')
    : walk(root, '')
  for (const path of listed) {
    if (path === '' || !fs.existsSync(join(root, path))) continue
    fs.mkdirSync(dirname(join(checkout, path)), { recursive: true })
    fs.cpSync(join(root, path), join(checkout, path), { verbatimSymlinks: true })
  }
  await git('init', '--quiet', '--initial-branch=main')
  await commit('what is released')
}

function* walk(top, path) {
  const made = new Set(['node_modules', 'dist', '.cache', '.nx', '.reports', 'coverage', 'packed', 'reference'])
  for (const entry of fs.readdirSync(join(top, path), { withFileTypes: true })) {
    if (made.has(entry.name)) continue
    if (entry.isDirectory()) yield* walk(top, join(path, entry.name))
    else yield join(path, entry.name)
  }
}

function git(...words) {
  const who = { GIT_AUTHOR_NAME: 'rehearsal', GIT_AUTHOR_EMAIL: 'rehearsal@localhost' }
  const env = { ...process.env, ...who, GIT_COMMITTER_NAME: who.GIT_AUTHOR_NAME }
  Object.assign(env, { GIT_COMMITTER_EMAIL: who.GIT_AUTHOR_EMAIL, GIT_CONFIG_GLOBAL: '/dev/null' })
  return run(checkout, ['git', ...words], { env })
}

async function commit(message) {
  await git('add', '--all')
  await git('-c', 'core.hooksPath=/dev/null', 'commit', '--quiet', '--message', message)
}

function startRegistry() {
  const folder = join(scratch, 'registry')
  fs.mkdirSync(folder)
  registry = fork(join(here, 'registry.mjs'), [folder], { cwd: folder, stdio: ['ignore', 'ignore', 'inherit', 'ipc'] })
  return new Promise((resolve, reject) => {
    registry.once('message', (given) => {
      port = given
      const token = `//127.0.0.1:${port}/:_authToken=rehearsal\n`
      write(join(scratch, 'publisher.npmrc'), `registry=${url()}\n@tmem:registry=${url()}\n${token}`)
      resolve()
    })
    registry.once('exit', (status) => reject(new Error(`the registry ended with ${status}`)))
  })
}

function url() {
  return `http://127.0.0.1:${port}/`
}

/** The environment of the checkout's own programs: nothing of who started the rehearsal through npm. */
function local(more = {}) {
  const kept = Object.entries(process.env).filter(
    ([name]) => !/^(npm_|INIT_CWD$|NODE_OPTIONS$|FORCE_COLOR$)/i.test(name),
  )
  const bins = [join(checkout, 'node_modules/.bin'), join(checkout, 'tools/node_modules/.bin')]
  const way = Object.entries(process.env).filter(([name]) =>
    /^npm_config_(registry|cafile|(https?_)?proxy)$/i.test(name),
  )
  const PATH = [...bins, process.env.PATH].join(delimiter)
  return { env: { ...Object.fromEntries([...kept, ...way]), NO_COLOR: '1', PATH, ...more } }
}

/** The environment of who publishes. Changesets takes the registry from the environment, by scope. */
function publisher() {
  const { env } = local({ NPM_CONFIG_USERCONFIG: join(scratch, 'publisher.npmrc') })
  return { env: { ...env, npm_config_registry: url(), 'npm_config_@tmem:registry': url() } }
}

/** The packages of the copy: `Map` of name to version, folder and manifest. */
function packagesOf() {
  const folders = ['packages', 'apps'].flatMap((group) =>
    fs.readdirSync(join(checkout, group)).map((name) => join(checkout, group, name)),
  )
  return new Map(
    folders
      .filter((folder) => fs.existsSync(join(folder, 'package.json')))
      .map((folder) => ({ folder, manifest: json(join(folder, 'package.json')) }))
      .map(({ folder, manifest }) => [manifest.name, { folder, manifest, version: manifest.version }]),
  )
}

/** Versions, builds and publishes; `changed` packages get a change that users notice first. */
async function release(changed) {
  for (const name of changed) {
    const text = `---\n'${name}': minor\n---\n\nRehearsed: what ${name} does anew.\n`
    write(join(checkout, '.changeset', 'rehearsed.md'), text)
    const { folder } = packagesOf().get(name)
    fs.appendFileSync(join(folder, 'README.md'), '\nRehearsed.\n')
  }
  await run(checkout, ['changeset', 'version'], local())
  await run(checkout, ['pnpm', 'install', '--frozen-lockfile', '--offline'], local())
  await run(checkout, [process.execPath, 'tools/build.mjs'], local())
  await commit('version packages')
  await run(checkout, ['changeset', 'publish'], publisher())
  const packages = packagesOf()
  await together(
    4,
    [...packages].map(([name, found]) => async () => {
      const answer = await fetch(`${url()}${name.replace('/', '%2f')}`)
      must(answer.ok, `${name} is not in the registry: ${answer.status}`)
      const { versions, 'dist-tags': tags } = await answer.json()
      must(tags.latest === found.version, `${name}: the registry has ${tags.latest}, not ${found.version}`)
      const published = versions[found.version]
      found.tarball = published.dist.tarball
      found.published = published
      const changelog = join(found.folder, 'CHANGELOG.md')
      found.changelog = fs.existsSync(changelog) ? fs.readFileSync(changelog, 'utf8') : ''
    }),
  )
  return packages
}

/** What publint, Are The Types Wrong and tools/release/sizes.json say of the tarballs. */
async function look(packages) {
  const folder = join(scratch, 'tarballs')
  const list = []
  for (const [name, { tarball }] of packages) {
    const unpacked = join(folder, name)
    fs.mkdirSync(unpacked, { recursive: true })
    const file = `${unpacked}.tgz`
    fs.writeFileSync(file, Buffer.from(await (await fetch(tarball)).arrayBuffer()))
    await run(unpacked, ['tar', '-xzf', file, '--strip-components=1'])
    list.push({ name, tarball: file, folder: unpacked })
  }
  write(join(folder, 'list.json'), JSON.stringify(list))
  const { problems, sizes } = JSON.parse(await run(here, [process.execPath, 'look.mjs', join(folder, 'list.json')]))
  const bounds = json(join(here, 'sizes.json'))
  const kib = (bytes) => `${(bytes / 1024).toFixed(1)} KiB`.padStart(11)
  const rows = [
    `${'package'.padEnd(22)}${['packed', 'installed', 'minified'].map((word) => word.padStart(11)).join('')}`,
  ]
  for (const [name, size] of Object.entries(sizes)) {
    const bound = bounds[name] ?? bounds['any other']
    for (const kind of ['packed', 'minified']) {
      const most = (bound[kind] ?? 0) * 1024
      if (size[kind] > most)
        problems.push(`${name}: ${kind} ${kib(size[kind]).trim()}, ${kib(most).trim()} in sizes.json`)
    }
    rows.push(`${name.padEnd(22)}${kib(size.packed)}${kib(size.installed)}${kib(size.minified)}`)
  }
  console.log(rows.join('\n'))
  must(problems.length === 0, problems.join('\n'))
}

function shortName(name) {
  return name.replace('@tmem/', '')
}
function nodeTypes() {
  return json(join(checkout, 'tools/node_modules/@types/node/package.json')).version
}

/** What a person asks npm for. */
function wanted(packages, name) {
  const found = packages.get(name)
  if (found !== undefined) return name.startsWith('@tmem/') ? found.version : found.tarball
  if (name === '@types/node') return nodeTypes()
  return json(join(checkout, 'packages/cache/node_modules', name, 'package.json')).version
}

/** The environment of people: their own npm, with the registry for @tmem in the folder's .npmrc. */
function person() {
  return local({ npm_config_update_notifier: 'false', npm_config_fund: 'false', npm_config_audit: 'false' })
}

function folderOf(path, manifest) {
  write(join(path, 'package.json'), JSON.stringify({ name: 'person', version: '1.0.0', type: 'module', ...manifest }))
  write(join(path, '.npmrc'), `@tmem:registry=${url()}\n`)
}

/**
 * A folder for each package, which has it and what its README's examples import, and sees nothing else: undeclared
 * dependencies are not found (`hoist: false`).
 */
async function installEach(folder, packages) {
  folderOf(folder, { devDependencies: { '@types/node': nodeTypes() } })
  const settings = ["packages: ['*']", 'hoist: false', 'minimumReleaseAge: 0', 'autoInstallPeers: false']
  settings.push('strictDepBuilds: false', 'strictPeerDependencies: true')
  write(join(folder, 'pnpm-workspace.yaml'), `${settings.join('\n')}\n`)
  const readmes = []
  for (const [name, { folder: from, manifest }] of packages) {
    const own = join(folder, shortName(name))
    const { examples, pieces } = examplesOf(fs.readFileSync(join(from, 'README.md'), 'utf8'))
    for (let n = 0; n < pieces; n++) skipped.push('a piece of a program, in a README')
    const peers = Object.keys(manifest.peerDependencies ?? {})
    const uses = new Set([name, '@types/node', ...peers, ...examples.flatMap((example) => example.uses)])
    const dependencies = Object.fromEntries([...uses].map((used) => [used, wanted(packages, used)]))
    write(join(own, 'package.json'), JSON.stringify({ name: `with-${shortName(name)}`, type: 'module', dependencies }))
    for (const { number, language, code, uses, only } of examples) {
      const file = join(own, `example-${number}.${language}`)
      write(file, code)
      readmes.push({ name, own, file, uses, only })
    }
    const entries = Object.keys(manifest.exports).map((path) => `${name}${path.slice(1)}`)
    const lines = (form) => entries.map((entry, n) => form(entry, n)).join('\n')
    write(join(own, 'entries.ts'), `${lines((entry, n) => `import * as e${n} from '${entry}'\nvoid e${n}`)}\n`)
    write(join(own, 'module.mjs'), `${lines((entry) => `await import('${entry}')`)}\n`)
    write(join(own, 'require.cjs'), `${lines((entry) => `require('${entry}')`)}\n`)
    counts.installs++
  }
  await run(folder, ['pnpm', 'install', '--no-frozen-lockfile'], person())
  return readmes
}

/** Runs a program of a person's, within a minute. */
async function node(cwd, ...words) {
  const said = await run(cwd, [process.execPath, ...words], { ...person(), seconds: 60 })
  counts.programs++
  return said
}

async function useEach(folder, packages) {
  const files = ['module.mjs', 'require.cjs']
  const tasks = [...packages.keys()].flatMap((name) =>
    files.map((file) => () => node(join(folder, shortName(name)), file)),
  )
  await together(2, tasks)
}

/** With `skipLibCheck: false`: declarations are compiled, too. The modules that come of it are what is run. */
async function compile(folder, readmes) {
  const common = { target: 'es2023', lib: ['es2023'], strict: true, skipLibCheck: false, types: ['node'] }
  const files = [...new Set(readmes.map(({ own }) => join(own, 'entries.ts')))]
  files.push(...readmes.map(({ file }) => file).filter((file) => file.endsWith('.ts')))
  for (const [name, options] of Object.entries({
    nodenext: { module: 'nodenext' },
    bundler: { module: 'preserve', moduleResolution: 'bundler', noEmit: true },
  })) {
    const config = join(folder, `tsconfig.${name}.json`)
    write(config, JSON.stringify({ compilerOptions: { ...common, ...options }, files }))
    await run(folder, ['tsc', '-p', config], local())
    counts.compiled += files.length
  }
}

async function runExamples(readmes) {
  const runnable = readmes.filter(({ only }) => only === undefined)
  for (const { only } of readmes) if (only !== undefined) skipped.push(only)
  // One after the other in a folder: they use the same files.
  const folders = [...new Set(runnable.map(({ own }) => own))]
  await together(
    2,
    folders.map((folder) => async () => {
      for (const { own, file } of runnable) {
        if (own !== folder) continue
        const module = file.replace(/\.ts$/, '.js')
        const required = module.replace(/\.js$/, '.cjs')
        write(required, asCommonJs(fs.readFileSync(module, 'utf8')))
        await node(own, module)
        await node(own, required)
      }
    }),
  )
}

/** A person's way from `npm install` to a working stack. */
async function useTenLines(folder, packages) {
  folderOf(folder, {})
  await npm(folder, packages, ['@tmem/core', '@tmem/zcache', '@tmem/frontswap'])
  const code = /```js\n(.*?)```/s.exec(fs.readFileSync(join(checkout, 'README.md'), 'utf8'))[1]
  must(code.trim().split('\n').length < 20, 'the ten lines of README.md are 20 and more')
  write(join(folder, 'stack.js'), code.replace('/tmp/swap.img', './swap.img'))
  write(join(folder, 'stack.cjs'), asCommonJs(code.replace('/tmp/swap.img', './swap.img')))
  await tenLinesWork(folder)
}

/** As the README says: tests that are modules, and tests that are not, which import. */
async function useJest(folder) {
  const code = fs.readFileSync(join(folder, 'stack.js'), 'utf8')
  const body = (text) => `test('the ten lines', async () => {\n${text.replace('./swap.img', './jest.img')}})\n`
  const imports = /^import .*\n/gm
  write(join(folder, 'module.test.mjs'), `${code.match(imports).join('')}${body(code.replace(imports, ''))}`)
  const dynamic = code.replace(/^import (.*) from ('.*')$/gm, 'const $1 = await import($2)')
  write(join(folder, 'script.test.cjs'), body(dynamic))
  const config = { rootDir: folder, testMatch: ['**/*.test.mjs', '**/*.test.cjs'], transform: {}, maxWorkers: 1 }
  const jest = join(here, 'node_modules/jest/bin/jest.js')
  await node(folder, '--experimental-vm-modules', jest, '--config', JSON.stringify(config))
}

async function tenLinesWork(folder) {
  for (const file of ['stack.js', 'stack.cjs']) {
    const said = await node(folder, file)
    must(said === 'true\ntrue\n', `${file}: the ten lines of README.md print\n${said}`)
  }
}

async function npm(folder, packages, names) {
  const specs = names.map((name) =>
    packages.has(name) && name.startsWith('@tmem/') ? `${name}@${wanted(packages, name)}` : wanted(packages, name),
  )
  await run(folder, ['npm', 'install', '--no-audit', '--no-fund', ...specs], person())
  counts.installs++
}

/**
 * The packages in `alone`, each the only one that a person asks npm for: it brings all that it needs, for itself and
 * for those examples of its README that import nothing else.
 */
async function useAlone(folder, packages, readmes) {
  for (const name of alone) {
    const own = join(folder, shortName(name))
    folderOf(own, {})
    await npm(own, packages, [name])
    const entries = entriesWithoutPeers(name, packages.get(name))
    write(join(own, 'module.mjs'), entries.map((entry) => `await import('${entry}')\n`).join(''))
    write(join(own, 'require.cjs'), entries.map((entry) => `require('${entry}')\n`).join(''))
    await node(own, 'module.mjs')
    await node(own, 'require.cjs')
    const examples = readmes.filter(
      ({ name: of, uses, only }) => of === name && only === undefined && uses.every((used) => used === name),
    )
    must(examples.length > 0, `no example of ${name} uses ${name} alone`)
    for (const { file } of examples) {
      const module = file.replace(/\.ts$/, '.js')
      const copy = join(own, basename(module))
      fs.copyFileSync(module, copy)
      await node(own, copy)
    }
  }
}

/**
 * Entry points that need no package which is the user's to install: that is what other entry points join a package to.
 */
function entriesWithoutPeers(name, { manifest }) {
  return Object.keys(manifest.exports)
    .filter((path) => path === '.' || manifest.peerDependencies === undefined)
    .map((path) => `${name}${path.slice(1)}`)
}

async function useAllTogether(folder, packages) {
  folderOf(folder, {})
  await npm(folder, packages, [...packages.keys()])
  const entries = [...packages].flatMap(([name, found]) => entriesWithoutPeers(name, found))
  write(join(folder, 'all.mjs'), entries.map((entry) => `await import('${entry}')\n`).join(''))
  write(join(folder, 'all.cjs'), entries.map((entry) => `require('${entry}')\n`).join(''))
  await node(folder, 'all.mjs')
  await node(folder, 'all.cjs')
  const tree = JSON.parse(await run(folder, ['npm', 'ls', '@tmem/core', '--all', '--json'], person()))
  const versions = new Set([...JSON.stringify(tree).matchAll(/"@tmem\/core":\{"version":"(.*?)"/g)].map(([, v]) => v))
  must(versions.size === 1, `there are several @tmem/core: ${[...versions].join(', ')}`)
}

async function useProgram(packages) {
  const folder = join(scratch, 'npx')
  folderOf(folder, {})
  const npx = (...words) =>
    run(folder, ['npx', '--yes', '--package', packages.get('tmem').tarball, '--', 'tmem', ...words], person())
  const help = await npx('--help')
  must(help.startsWith('Usage: tmem'), `npx tmem --help prints\n${help}`)
  const demo = JSON.parse(await npx('demo', '--size', '2MiB', '--json'))
  must(demo.wrongBytes === 0, 'npx tmem demo reads wrong bytes')
  counts.installs++
  counts.programs += 2
}

/** What makes a package for somebody's place makes one that passes every check. */
async function newLayer() {
  const { env } = local()
  const there = (...words) => run(checkout, words, { env })
  await there(process.execPath, 'tools/new-layer.mjs', 'sample-place')
  await there(process.execPath, 'tools/check-workspace.mjs')
  await there(process.execPath, 'tools/check-links.mjs')
  await there('tsc', '-b', 'tsconfig.test.json')
  await there('biome', 'check', '--error-on-warnings', 'packages/sample-place', 'tools/arrows.json')
  await there('oxlint', '--type-aware', '--deny-warnings', 'packages/sample-place')
  await there('knip', '--no-progress')
  await there('vitest', 'run', 'packages/sample-place', 'apps/tmem/test/public-options.test.ts')
}

/** A name more is an error until a changeset tells of it, and then until the report has it. */
async function changeApi() {
  const { env } = local()
  const api = (...words) => run(checkout, [process.execPath, 'tools/api.mjs', ...words], { env })
  const refused = (done) => done.then(() => false).catch(() => true)
  await api()
  fs.appendFileSync(
    join(checkout, 'packages/zcache/src/index.ts'),
    '\n/** Rehearsed. */\nexport const rehearsed = 1 as const\n',
  )
  await run(checkout, [process.execPath, 'tools/build.mjs'], { env })
  must(await refused(api()), 'a change of an API passes the check')
  must(await refused(api('--fix')), 'a change of an API without a changeset is written into its report')
  write(join(checkout, '.changeset/rehearsed-api.md'), "---\n'@tmem/zcache': minor\n---\n\nRehearsed.\n")
  must(await refused(api()), 'a report that is not that of the API passes the check')
  must(await refused(api('--fix')), 'an export that nobody names passes the check')
  fs.appendFileSync(join(checkout, 'packages/zcache/README.md'), '\n`rehearsed` is one.\n')
  await api('--fix')
  await api()
}

/** What depends on the changed package is released anew, says why, and wants the new one; nothing else is. */
function compareReleases(first, second) {
  const core = second.get('@tmem/core')
  must(core.version !== first.get('@tmem/core').version, '@tmem/core has no new version')
  must(core.changelog.includes('Rehearsed: what @tmem/core does anew.'), 'the changelog of @tmem/core lacks its change')
  let bumped = 0
  for (const [name, { version, changelog, published, manifest }] of second) {
    if (name === '@tmem/core') continue
    const depends = manifest.dependencies?.['@tmem/core'] !== undefined
    const isNew = version !== first.get(name).version
    must(isNew || !depends, `${name} depends on @tmem/core and was not released anew`)
    if (isNew) {
      bumped++
      must(changelog.includes(`## ${version}`), `the changelog of ${name} lacks ${version}`)
      must(changelog.includes('Updated dependencies'), `the changelog of ${name} does not say why there is ${version}`)
    }
    const range = published.dependencies?.['@tmem/core']
    must(!depends || range === `^${core.version}`, `${name} ${version} wants @tmem/core ${range}`)
  }
  return `@tmem/core ${first.get('@tmem/core').version} to ${core.version}, ${bumped} dependents`
}

async function upgrade(tenLines, folder, packages, readmes) {
  await npm(tenLines, packages, ['@tmem/core', '@tmem/zcache', '@tmem/frontswap'])
  await tenLinesWork(tenLines)
  const own = join(folder, 'swapper')
  const manifest = json(join(own, 'package.json'))
  for (const name of Object.keys(manifest.dependencies)) {
    if (packages.has(name)) manifest.dependencies[name] = wanted(packages, name)
  }
  write(join(own, 'package.json'), JSON.stringify(manifest))
  await run(folder, ['pnpm', 'install', '--no-frozen-lockfile'], person())
  counts.installs++
  await runExamples(readmes.filter((readme) => readme.own === own))
  for (const place of [tenLines, own]) {
    const installed = json(join(place, 'node_modules/@tmem/core/package.json')).version
    must(installed === packages.get('@tmem/core').version, `${place} still has @tmem/core ${installed}`)
  }
}
