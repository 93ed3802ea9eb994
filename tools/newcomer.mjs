// Runs `npm test` as people meet it for the first time: each case is a fresh copy of what is committed, in an
// environment of its own, made and taken away by this script. `npm run test:newcomer` runs all cases, one after the
// other; `npm run test:newcomer -- NAME...` those. Prints a line every minute, and at the end one for each case.
import { spawn, spawnSync } from 'node:child_process'
import { chmodSync, chownSync, existsSync, mkdirSync, mkdtempSync, rmSync, unlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const isRoot = process.getuid?.() === 0
const user = `tmem-newcomer-${process.pid}`

/**
 * Each prepares its environment, and answers how `npm test` is started there; or why it cannot be. Where root is not
 * the point, a user without privileges runs it.
 */
const cases = {
  unprivileged: (world) => asUser(world, copyTo(world, 'checkout')),
  'closed-folder': (world) => {
    if (!isRoot) return 'needs root: anybody else owns all folders above the checkout'
    const folder = join(world.folder, 'closed')
    mkdirSync(folder, { mode: 0o700 })
    return { cwd: copyTo(world, 'closed/checkout') }
  },
  'path-with-a-space': (world) => asUser(world, copyTo(world, 'new comer/Prüfung/試験')),
  'node-22': (world) => withNode(world, 22),
  'node-24': (world) => withNode(world, 24),
  bare: (world) => {
    const { cwd, through = [] } = asUser(world, copyTo(world, 'tarball'))
    // Everything is fetched once; then there is no network.
    const [command, ...words] = [...through, 'npm', 'run', '-s', 'build']
    const first = spawnSync(command, words, { cwd, encoding: 'utf8', env: environment(world) })
    if (first.status !== 0) throw new Error(`the first build failed: ${first.error?.message ?? first.stderr}`)
    const bin = join(world.folder, 'bin')
    mkdirSync(bin)
    for (const name of ['pnpm', 'yarn'])
      writeFileSync(join(bin, name), '#!/bin/sh\necho "the wrong one"\nexit 1\n', { mode: 0o755 })
    chmodSync(world.home, 0o500)
    const offline = isRoot ? ['unshare', '--net', 'sh', '-c', 'ip link set lo up; exec "$@"', 'sh'] : []
    return { cwd, through: [...offline, ...through], path: bin }
  },
  'busy-temporary-folder': (world) => {
    const noise = setInterval(() => {
      for (let n = 0; n < 20; n++) {
        const file = join(tmpdir(), `newcomer-noise-${process.pid}-${n}`)
        if (existsSync(file)) unlinkSync(file)
        else writeFileSync(file, 'noise')
      }
    }, 5)
    world.undo.push(() => {
      clearInterval(noise)
      for (let n = 0; n < 20; n++) rmSync(join(tmpdir(), `newcomer-noise-${process.pid}-${n}`), { force: true })
    })
    return asUser(world, copyTo(world, 'checkout'))
  },
}

const wanted = process.argv.slice(2)
const unknown = wanted.find((name) => !Object.hasOwn(cases, name))
if (unknown !== undefined) {
  console.error(`no case is named ${unknown}; there are ${Object.keys(cases).join(', ')}`)
  process.exit(2)
}
const stopped = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => stopped.abort())

const lines = []
let failed = 0
for (const name of wanted.length > 0 ? wanted : Object.keys(cases)) {
  if (stopped.signal.aborted) break
  const { line, ok } = await runCase(name)
  if (!ok) failed++
  lines.push(line)
}
for (const line of lines) console.log(line)
process.exitCode = stopped.signal.aborted ? 130 : failed === 0 ? 0 : 1

async function runCase(name) {
  // Others must be able to get there, except where that is the point.
  const folder = mkdtempSync(join(tmpdir(), 'tmem-newcomer-'))
  chmodSync(folder, 0o755)
  const home = join(folder, 'home')
  mkdirSync(home)
  const world = { folder, home, undo: [] }
  const start = performance.now()
  const seconds = () => Math.round((performance.now() - start) / 1000)
  try {
    const how = cases[name](world)
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

function npmTest(name, world, { cwd, through = [], path }, seconds) {
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
    PATH: [...(path === undefined ? [] : [path]), ...own].join(delimiter),
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
 * All that is there is given to a user made for this; nobody else's, who is not root, are the files of who runs this.
 */
function asUser(world, cwd) {
  if (!isRoot) return { cwd }
  run('useradd', ['--no-create-home', '--home-dir', world.home, '--shell', '/bin/sh', user], root)
  world.undo.push(() => run('userdel', [user], root))
  const [uid, gid] = ['-u', '-g'].map((flag) => Number(run('id', [flag, user], root)))
  run('chown', ['-R', `${uid}:${gid}`, world.folder], root)
  chownSync(world.folder, uid, gid)
  return { cwd, through: ['setpriv', '--reuid', `${uid}`, '--regid', `${gid}`, '--clear-groups', '--'] }
}

function withNode(world, major) {
  const folder = join(world.folder, 'node')
  mkdirSync(folder)
  const done = spawnSync('npm', ['install', '--prefix', folder, '--no-save', `node@${major}`], { encoding: 'utf8' })
  if (done.status !== 0) return `Node ${major} cannot be had: ${done.stderr.split('\n')[0]}`
  return { ...asUser(world, copyTo(world, 'checkout')), path: join(folder, 'node_modules/node/bin') }
}

function run(name, words, cwd) {
  const done = spawnSync(name, words, { cwd, encoding: 'utf8' })
  if (done.status === 0) return done.stdout
  throw new Error(`${name} ${words.join(' ')} failed: ${done.error?.message ?? done.stderr}`)
}
