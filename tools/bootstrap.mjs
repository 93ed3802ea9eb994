// Runs a command of the workspace on a machine with Node and npm only: installs the pinned pnpm into .cache, then the
// dependencies, then does what was asked. Has no dependencies itself. Standard output belongs to the command: what the
// preparation says appears only when it fails, and that it goes on, every few seconds on standard error.
import { spawn, spawnSync } from 'node:child_process'
import { accessSync, constants, existsSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { homedir } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { installMissing } from './debian-packages.mjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const [command = '', ...args] = process.argv.slice(2)

/** What each command is for, and what it takes. */
const usage = {
  start: ['[OPTION...]', 'the demo; --help lists its options'],
  tmem: ['COMMAND [OPTION...]', 'the program; --help lists its commands'],
  test: ['', 'builds, checks and tests all packages; as root on Debian it installs what tests need'],
  'test:root': ['', 'runs those test files of npm test in which some tests need root'],
  'test:system': ['', 'runs the tests with real kernels and clients; most need root'],
  'test:release': ['[--keep]', 'rehearses a release: versions, registry, installations, examples, upgrade'],
  'test:runtimes': ['[NAME...]', 'runs the portable suite in Node 20 to the newest, Bun and Deno'],
  'test:kernel': ['', 'runs the tests with guests whose kernels have hooks: downloads and compiles what they need'],
  'test:newcomer': ['[CASE...]', 'runs npm test as newcomers do: other users, paths, versions of Node'],
  build: ['', 'compiles all packages and their tests'],
  lint: ['', 'checks formatting and rules, without tests'],
  format: ['[PATH...]', 'formats files'],
  try: ['', 'shows and runs the first example of README.md'],
  'new-layer': ['NAME', 'creates a package for your own place, whose tests pass as it stands'],
  reference: ['', 'writes the API reference into reference/'],
  pack: ['[FOLDER]', 'writes every package as a tarball (into packed), and says how to install them'],
  tool: ['PROGRAM [ARGUMENT...]', 'a tool of the workspace, as: vitest run packages/zcache'],
}

const [major, minor] = process.versions.node.split('.').map(Number)
if (major < 20 || (major === 20 && minor < 19)) stop(`tmem needs Node 20.19 or newer; this is ${process.version}`)

const commands = {
  start: () => program('demo', ...args),
  tmem: () => program(...args),
  test: () => test(['test'], ['build', 'types', 'format', 'lint', 'unused', 'workspace', 'packages', 'api']),
  'test:root': () => testRoot(),
  'test:system': async () => {
    await prepareReleaseTools()
    return test(['test-system-alone', 'test-system-beside'], ['build'], true)
  },
  'test:kernel': () => test(['test-kernel'], ['build']),
  build: () => run(['node', 'tools/build.mjs']) || run(['tsc', '-b', 'tsconfig.test.json']),
  lint: () =>
    run(['biome', 'check', '--error-on-warnings', '.']) |
    run(['oxlint', '--type-aware', '--deny-warnings']) |
    run(['knip', '--no-progress']) |
    run(['node', 'tools/check-workspace.mjs']) |
    run(['node', 'tools/check-links.mjs']),
  format: () => run(['biome', 'check', '--write', ...(args.length > 0 ? args : ['.'])]),
  tool: () => run(args),
  'test:newcomer': () => run(['node', 'tools/newcomer.mjs', ...args]),
  'test:release': () => withReleaseTools('rehearse.mjs', ...args),
  try: () => afterBuild('tools/try.mjs'),
  pack: () => afterBuild('tools/pack.mjs', ...args),
  'test:runtimes': () => afterBuild('tools/runtimes.mjs', ...args),
  'new-layer': () => run(['node', 'tools/new-layer.mjs', ...args]),
  reference: () => withReleaseTools('reference.mjs'),
}
if (!Object.hasOwn(commands, command)) {
  stop(`usage: node tools/bootstrap.mjs ${Object.keys(commands).join('|')} [ARGUMENT...]`, 2)
}
if (command === 'tool' && args.length === 0) stop(usageOf('tool'), 2)
const takesHelp = command === 'start' || command === 'tmem' || command === 'tool'
if (!takesHelp && args.some((word) => word === '--help' || word === '-h')) {
  for (const name of Object.keys(usage)) process.stdout.write(`${usageOf(name)}\n`)
  process.exit(0)
}
if (usage[command][0] === '' && args.length > 0) stop(`${args[0]}: npm run ${command} takes no arguments`, 2)

await findPnpm()
if (args[0] !== 'pnpm') await prepare('dependencies', 'node_modules', ['pnpm', 'install', '--frozen-lockfile'])
const status = await commands[command]()
if (status !== undefined) process.exitCode = status

function usageOf(name) {
  const [takes, what] = usage[name]
  const isNpm = name === 'start' || name === 'test'
  const line = isNpm ? `npm ${name}${takes && ' -- '}${takes}` : `npm run -s ${name}${takes && ' -- '}${takes}`
  return `${line.padEnd(48)}${what}`
}

async function findPnpm() {
  const pin = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).packageManager
  const prefix = join('.cache', pin.replace('@', '-'))
  const bin = join(root, prefix, 'node_modules', '.bin')
  if (!existsSync(join(bin, 'pnpm'))) {
    const flags = ['--no-save', '--no-package-lock', '--no-audit', '--no-fund', '--fetch-retries=1']
    await prepare(pin, prefix, ['npm', 'install', '--prefix', prefix, ...flags, pin])
  }
  process.env.PATH = [bin, join(root, 'tools', 'node_modules', '.bin'), process.env.PATH].join(delimiter)
}

// In this process, so that standard streams, signals and the exit code are the program's own.
async function program(...words) {
  await prepare('the program', 'apps/tmem/dist', ['node', 'tools/build.mjs'])
  const bin = join(root, 'apps/tmem/dist/bin.js')
  process.argv.splice(1, process.argv.length, bin, ...words)
  await import(pathToFileURL(bin).href)
}

async function afterBuild(script, ...words) {
  await prepare('the packages', 'apps/tmem/dist', ['node', 'tools/build.mjs'])
  return run(['node', script, ...words])
}

/** What only a release needs has a workspace of its own, so that nobody else fetches it. */
async function withReleaseTools(script, ...words) {
  await prepareReleaseTools()
  return run(['node', join('tools/release', script), ...words])
}

function prepareReleaseTools() {
  const folder = 'tools/release'
  return prepare('the tools of a release', `${folder}/node_modules`, [
    'pnpm',
    '--dir',
    folder,
    'install',
    '--frozen-lockfile',
  ])
}

function test(targets, checks, isSystem = false) {
  const trouble = installMissing(isSystem)
  if (trouble) console.log(trouble)
  const reports = targets.flatMap((target) =>
    projects(target).map((folder) => join(folder, '.reports', `${target}.json`)),
  )
  for (const report of reports) rmSync(join(root, report), { force: true }) // nx restores those of cached results
  delete process.env.FORCE_COLOR // nx sets it for its children; their commands in nx.json take it off again
  Object.assign(process.env, { NX_DAEMON: 'false', NX_WORKSPACE_DATA_DIRECTORY: '.cache/nx-data', NO_COLOR: '1' })
  const ended = run(['nx', 'run-many', '-t', ...checks, ...targets, '--output-style=stream'])

  const sum = { passed: 0, failed: 0, skipped: 0 }
  const reasons = new Map()
  for (const report of reports) {
    const counts = read(report)
    sum.passed += counts.passed
    sum.failed += counts.failed
    for (const [reason, count] of Object.entries(counts.skipped)) {
      reasons.set(reason, (reasons.get(reason) ?? 0) + count)
      sum.skipped += count
    }
  }
  if (ended !== 0 && sum.failed === 0) {
    console.log('A check other than a test failed (above); it is counted as one failure.')
    sum.failed = 1
  }
  for (const [reason, count] of reasons) console.log(`skipped ${count}: ${reason}`)
  console.log(`${sum.passed} passed, ${sum.failed} failed, ${sum.skipped} skipped`)
  return sum.failed === 0 ? 0 : 1
}

/** What npm test leaves out for everybody else, in the files in which it is. */
function testRoot() {
  const trouble = installMissing()
  if (trouble) console.log(trouble)
  const files = ['packages', 'apps']
    .flatMap((group) => readdirSync(join(root, group)).map((name) => join(group, name, 'test')))
    .filter((folder) => existsSync(join(root, folder)))
    .flatMap((folder) => readdirSync(join(root, folder)).map((name) => join(folder, name)))
    .filter((file) => file.endsWith('.test.ts') && readFileSync(join(root, file), 'utf8').includes('root: true'))
  return run(['node', 'tools/build.mjs']) || run(['vitest', 'run', ...files])
}

function read(report) {
  if (existsSync(join(root, report))) return JSON.parse(readFileSync(join(root, report), 'utf8'))
  console.log(`${report} was not written: its tests did not run, which is counted as one failure.`)
  return { passed: 0, failed: 1, skipped: {} }
}

/** The folders of the packages, and that of all of them, that have the nx target. */
function projects(target) {
  return ['packages', 'apps']
    .flatMap((group) => readdirSync(join(root, group)).map((name) => join(group, name)))
    .concat('.')
    .filter((folder) => {
      const file = join(root, folder, 'package.json')
      return existsSync(file) && JSON.parse(readFileSync(file, 'utf8')).nx?.targets?.[target] !== undefined
    })
}

function run([name, ...words]) {
  const done = spawnSync(name, words, { cwd: root, stdio: 'inherit' })
  if (done.error) process.stderr.write(`${done.error.message}\n`)
  return done.status ?? 1
}

/** Says every few seconds that it goes on, and all that the command said only when it failed. */
async function prepare(what, made, [name, ...words]) {
  if (!existsSync(join(root, made))) process.stderr.write(`preparing ${what} ...\n`)
  const env = {
    ...process.env,
    ...ownFolders(),
    npm_config_loglevel: 'warn', // also under npm --silent: why it failed
    npm_config_engine_strict: 'false', // it is for who types npm install
  }
  // Each asks under its own name.
  for (const whose of ['npm', 'pnpm'])
    Object.assign(env, { [`${whose}_config_fetch_retries`]: '1', [`${whose}_config_fetch_retry_mintimeout`]: '1000' })
  const start = performance.now()
  const done = await new Promise((resolve) => {
    const child = spawn(name, words, { cwd: root, stdio: ['ignore', 'pipe', 'pipe'], env })
    const said = []
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (bytes) => said.push(bytes))
    const alive = setInterval(() => {
      process.stderr.write(`preparing ${what}: ${Math.round((performance.now() - start) / 1000)} s\n`)
    }, 5000)
    const end = (status, error) => {
      clearInterval(alive)
      resolve({ status, error, said: Buffer.concat(said).toString() })
    }
    child.on('error', (error) => end(1, error))
    child.on('close', (status) => end(status))
  })
  if (done.status === 0) return
  // Of many the last: each file that cannot be had is told several times.
  process.stderr.write(`${done.said.trimEnd().split('\n').slice(-15).join('\n')}\n`)
  stop(
    `${name} ${words.join(' ')} failed${done.error ? `: ${done.error.message}` : ''}; what is missing is downloaded once: is there a network?`,
  )
}

/**
 * Where npm and pnpm put what they download when they cannot write into the home folder. What is installed stays with
 * the store that it came from: pnpm would fetch all of it again into another one.
 */
function ownFolders() {
  try {
    accessSync(homedir(), constants.W_OK)
    return {}
  } catch {
    const installed = join(root, 'node_modules', '.modules.yaml')
    const store = existsSync(installed) ? dirname(JSON.parse(readFileSync(installed, 'utf8')).storeDir) : undefined
    const own = join(root, '.cache')
    const folder = join(own, 'xdg')
    return {
      npm_config_cache: join(own, 'npm'),
      XDG_DATA_HOME: folder,
      XDG_STATE_HOME: folder,
      ...(store === undefined || store.startsWith(own) ? { XDG_CACHE_HOME: folder } : { pnpm_config_store_dir: store }),
    }
  }
}

function stop(message, code = 1) {
  process.stderr.write(`${message}\n`)
  process.exit(code)
}
