// Runs a command of the workspace on a machine with Node and npm only: installs the pinned pnpm into .cache, then the
// dependencies, then does what was asked. Has no dependencies itself. Standard output belongs to the command: what the
// preparation says appears only when it fails.
import { spawnSync } from 'node:child_process'
import { accessSync, constants, existsSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { homedir } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { installMissing } from './debian-packages.mjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const [command = '', ...args] = process.argv.slice(2)
const quiet = !process.stderr.isTTY || process.env.npm_config_loglevel === 'silent'

const [major, minor] = process.versions.node.split('.').map(Number)
if (major < 20 || (major === 20 && minor < 19)) stop(`tmem needs Node 20.19 or newer; this is ${process.version}`)

const commands = {
  start: () => program('demo', ...args),
  tmem: () => program(...args),
  test: () => test('test', ['build', 'types', 'format', 'lint', 'unused', 'workspace', 'packages']),
  'test:system': () => test('test-system', ['build']),
  build: () => run(['tsc', '-b', 'tsconfig.json']) || run(['tsc', '-b', 'tsconfig.test.json']),
  lint: () =>
    run(['biome', 'check', '--error-on-warnings', '.']) |
    run(['oxlint', '--type-aware', '--deny-warnings']) |
    run(['knip', '--no-progress']) |
    run(['node', 'tools/check-workspace.mjs']),
  format: () => run(['biome', 'check', '--write', ...(args.length > 0 ? args : ['.'])]),
  tool: () => run(args),
}
if (!Object.hasOwn(commands, command)) {
  stop(`usage: node tools/bootstrap.mjs ${Object.keys(commands).join('|')} [ARGUMENT...]`, 2)
}

findPnpm()
if (args[0] !== 'pnpm') prepare('dependencies', 'node_modules', ['pnpm', 'install', '--frozen-lockfile'])
const status = await commands[command]()
if (status !== undefined) process.exitCode = status

function findPnpm() {
  const pin = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).packageManager
  const prefix = join('.cache', pin.replace('@', '-'))
  const bin = join(root, prefix, 'node_modules', '.bin')
  if (!existsSync(join(bin, 'pnpm'))) {
    const flags = ['--no-save', '--no-package-lock', '--no-audit', '--no-fund']
    prepare(pin, prefix, ['npm', 'install', '--prefix', prefix, ...flags, pin])
  }
  process.env.PATH = [bin, join(root, 'node_modules', '.bin'), process.env.PATH].join(delimiter)
}

// In this process, so that standard streams, signals and the exit code are the program's own.
async function program(...words) {
  prepare('the program', 'apps/tmem/dist', ['tsc', '-b', 'tsconfig.json'])
  const bin = join(root, 'apps/tmem/dist/bin.js')
  process.argv.splice(1, process.argv.length, bin, ...words)
  await import(pathToFileURL(bin).href)
}

function test(target, checks) {
  const trouble = installMissing()
  if (trouble) console.log(trouble)
  const reports = projects(target).map((folder) => join(folder, '.reports', `${target}.json`))
  for (const report of reports) rmSync(join(root, report), { force: true }) // nx restores those of cached results
  delete process.env.FORCE_COLOR // nx sets it for its children; their commands in nx.json take it off again
  Object.assign(process.env, { NX_DAEMON: 'false', NX_WORKSPACE_DATA_DIRECTORY: '.cache/nx-data', NO_COLOR: '1' })
  const ended = run(['nx', 'run-many', '-t', ...checks, target, '--output-style=static'])

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

function read(report) {
  if (existsSync(join(root, report))) return JSON.parse(readFileSync(join(root, report), 'utf8'))
  console.log(`${report} was not written: its tests did not run, which is counted as one failure.`)
  return { passed: 0, failed: 1, skipped: {} }
}

/** The folders of the packages that have the nx target. */
function projects(target) {
  return ['packages', 'apps']
    .flatMap((group) => readdirSync(join(root, group)).map((name) => join(group, name)))
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

/** Says what it does only when there is much to do, and all that the command said only when it failed. */
function prepare(what, made, [name, ...words]) {
  if (!quiet && !existsSync(join(root, made))) process.stderr.write(`preparing ${what} ...\n`)
  const env = { ...process.env, ...ownFolders(), npm_config_loglevel: 'warn' } // also under npm --silent: why it failed
  const done = spawnSync(name, words, { cwd: root, encoding: 'utf8', maxBuffer: 2 ** 28, env })
  if (done.status === 0) return
  process.stderr.write(`${done.stdout ?? ''}${done.stderr ?? ''}`)
  stop(`${name} ${words.join(' ')} failed${done.error ? `: ${done.error.message}` : ''}`)
}

/** Where npm and pnpm put what they download when they cannot write into the home folder. */
function ownFolders() {
  try {
    accessSync(homedir(), constants.W_OK)
    return {}
  } catch {
    const folder = (name) => join(root, '.cache', name)
    return {
      npm_config_cache: folder('npm'),
      XDG_CACHE_HOME: folder('xdg'),
      XDG_DATA_HOME: folder('xdg'),
      XDG_STATE_HOME: folder('xdg'),
    }
  }
}

function stop(message, code = 1) {
  process.stderr.write(`${message}\n`)
  process.exit(code)
}
