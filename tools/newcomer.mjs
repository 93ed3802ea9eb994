// Runs `npm test` as people meet it for the first time: each case is a fresh copy of what is committed, in an
// environment of its own, made and taken away by this script. `npm run test:newcomer` runs all cases, one after the
// other; `npm run test:newcomer -- NAME...` those, and NAME+NAME one that is both. Prints a line every minute, and at
// the end one for each case.
import { spawn, spawnSync } from 'node:child_process'
import { chmodSync, existsSync, mkdirSync, mkdtempSync, rmSync, unlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const isRoot = process.getuid?.() === 0
const user = `tmem-newcomer-${process.pid}`

/** What is unusual about each environment. Where root is not the point, a user without privileges runs `npm test`. */
const cases = {
  unprivileged: {},
  'closed-folder': { closed: true },
  'path-with-a-space': { folder: 'new comer/Prüfung/試験' },
  'node-22': { major: 22 },
  'node-24': { major: 24 },
  bare: { bare: true },
  'busy-temporary-folder': { busy: true },
}

const given = process.argv.slice(2)
const wanted = (given.length > 0 ? given : Object.keys(cases)).map((name) => name.split('+'))
const unknown = wanted.flat().find((name) => !Object.hasOwn(cases, name))
if (unknown !== undefined) {
  console.error(`no case is named ${unknown}; there are ${Object.keys(cases).join(', ')}; "+" joins several into one`)
  process.exit(2)
}
const stopped = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => stopped.abort())

const lines = []
let failed = 0
for (const names of wanted) {
  if (stopped.signal.aborted) break
  const { line, ok } = await runCase(names)
  if (!ok) failed++
  lines.push(line)
}
for (const line of lines) console.log(line)
process.exitCode = stopped.signal.aborted ? 130 : failed === 0 ? 0 : 1

async function runCase(names) {
  const name = names.join('+')
  // Others must be able to get there, except where that is the point.
  const folder = mkdtempSync(join(tmpdir(), 'tmem-newcomer-'))
  chmodSync(folder, 0o755)
  const home = join(folder, 'home')
  mkdirSync(home)
  const world = { folder, home, undo: [] }
  const start = performance.now()
  const seconds = () => Math.round((performance.now() - start) / 1000)
  try {
    const how = prepare(world, Object.assign({}, ...names.map((one) => cases[one])))
    if (typeof how === 'string') return { line: `${name.padEnd(24)}skipped: ${how}`, ok: true }
    const { status, said } = await npmTest(name, world, how, seconds)
    const summary = said.match(/^\d+ passed, \d+ failed, \d+ skipped$/m)?.[0] ?? 'no summary'
    if (status !== 0) {
      // Of each failure its name and what was wrong, before the end of it all.
      const lines = said.split('\n')
      for (const [n, line] of lines.entries()) if (/ FAIL /.test(line)) console.log(lines.slice(n, n + 3).join('\n'))
      console.log(said.slice(-20_000))
    }
    return { line: `${name.padEnd(24)}${status === 0 ? 'green' : 'RED'}  ${summary}, ${seconds()} s`, ok: status === 0 }
  } finally {
    for (const undo of world.undo.reverse()) undo()
    chmodSync(home, 0o700)
    rmSync(folder, { recursive: true, force: true })
  }
}

/** Makes the environment, and answers how `npm test` is started there; or why it cannot be. */
function prepare(world, { closed, folder = closed ? 'closed/checkout' : 'checkout', major, bare, busy }) {
  if (closed && !isRoot) return 'needs root: anybody else owns all folders above the checkout'
  const path = []
  if (major !== undefined) {
    const node = join(world.folder, 'node')
    mkdirSync(node)
    const done = spawnSync('npm', ['install', '--prefix', node, '--no-save', `node@${major}`], { encoding: 'utf8' })
    if (done.status !== 0) return `Node ${major} cannot be had: ${done.stderr.split('\n')[0]}`
    path.push(join(node, 'node_modules/node/bin'))
  }
  if (closed) mkdirSync(join(world.folder, 'closed'), { mode: 0o700 })
  const cwd = copyTo(world, folder)
  let through = closed ? [] : asUser(world)
  if (busy) makeNoise(world)
  if (bare) {
    // Everything is fetched once; then there is no network.
    const [command, ...words] = [...through, 'npm', 'run', '-s', 'build']
    const first = spawnSync(command, words, { cwd, encoding: 'utf8', env: environment(world, path) })
    if (first.status !== 0) throw new Error(`the first build failed: ${first.error?.message ?? first.stderr}`)
    const bin = join(world.folder, 'bin')
    mkdirSync(bin)
    for (const name of ['pnpm', 'yarn'])
      writeFileSync(join(bin, name), '#!/bin/sh\necho "the wrong one"\nexit 1\n', { mode: 0o755 })
    path.unshift(bin)
    chmodSync(world.home, 0o500)
    if (isRoot) through = ['unshare', '--net', 'sh', '-c', 'ip link set lo up; exec "$@"', 'sh', ...through]
  }
  return { cwd, through, path }
}

/** Others make files in the temporary folder, and remove them, all the time. */
function makeNoise({ undo }) {
  const files = Array.from({ length: 20 }, (_, n) => join(tmpdir(), `newcomer-noise-${process.pid}-${n}`))
  const noise = setInterval(() => {
    for (const file of files)
      if (existsSync(file)) unlinkSync(file)
      else writeFileSync(file, 'noise')
  }, 5)
  undo.push(() => {
    clearInterval(noise)
    for (const file of files) rmSync(file, { force: true })
  })
}

function npmTest(name, world, { cwd, through, path }, seconds) {
  const [command, ...words] = [...through, 'npm', 'test']
  return new Promise((resolve, reject) => {
    const env = environment(world, path)
    const child = spawn(command, words, { cwd, env, stdio: ['ignore', 'pipe', 'pipe'], detached: true })
    const said = []
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (bytes) => said.push(bytes))
    const alive = setInterval(() => console.log(`${name}: ${seconds()} s`), 60_000)
    // All that it has started, and nothing else.
    const end = () => {
      if (child.pid !== undefined) process.kill(-child.pid, 'SIGTERM')
    }
    stopped.signal.addEventListener('abort', end, { once: true })
    child.on('error', reject)
    child.on('close', (status) => {
      clearInterval(alive)
      stopped.signal.removeEventListener('abort', end)
      resolve({ status, said: Buffer.concat(said).toString() })
    })
  })
}

/**
 * The environment of somebody who has just come: nothing of npm's, a home and a cache of their own. Only the way to the
 * registry is that of who runs this.
 */
function environment({ home, folder }, path) {
  const kept = Object.entries(process.env).filter(([name]) => !/^(npm_|NODE_(?!EXTRA)|NX_|XDG_|INIT_CWD$)/i.test(name))
  const own = process.env.PATH.split(delimiter).filter((entry) => !entry.startsWith(root))
  return {
    ...Object.fromEntries(kept),
    HOME: home,
    npm_config_cache: join(folder, 'npm-cache'),
    PATH: [...path, ...own].join(delimiter),
  }
}

/**
 * What is committed, as a tarball would have it: without `.git`. Of what is no checkout all but what was made in it.
 */
function copyTo({ folder }, name) {
  const target = join(folder, name)
  mkdirSync(target, { recursive: true })
  const archive = join(folder, 'archive.tar')
  if (existsSync(join(root, '.git'))) run('git', ['archive', '--output', archive, 'HEAD'], root)
  else {
    const made = ['node_modules', 'dist', '.cache', '.nx', '.reports', 'coverage', '*.tsbuildinfo', '*.log', 'packed']
    run('tar', ['-cf', archive, ...made.map((one) => `--exclude=${one}`), '.'], root)
  }
  run('tar', ['-xf', archive, '-C', target], root)
  unlinkSync(archive)
  return target
}

/**
 * All that is there is given to a user made for this; answers what lets that user run a command. Who is not root runs
 * it by himself.
 */
function asUser(world) {
  if (!isRoot) return []
  run('useradd', ['--no-create-home', '--home-dir', world.home, '--shell', '/bin/sh', user], root)
  world.undo.push(() => run('userdel', [user], root))
  const [uid, gid] = ['-u', '-g'].map((flag) => Number(run('id', [flag, user], root)))
  run('chown', ['-R', `${uid}:${gid}`, world.folder], root)
  return ['setpriv', '--reuid', `${uid}`, '--regid', `${gid}`, '--clear-groups', '--']
}

function run(name, words, cwd) {
  const done = spawnSync(name, words, { cwd, encoding: 'utf8' })
  if (done.status === 0) return done.stdout
  throw new Error(`${name} ${words.join(' ')} failed: ${done.error?.message ?? done.stderr}`)
}
