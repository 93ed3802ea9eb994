// Programs that tests use and that npm does not bring. On Debian, as root, what is missing is installed; what is marked
// with "unpack" is only unpacked into .cache/debian, also by others than root. Anywhere else, and when that fails, the
// tests that need it are skipped with the reason (tools/requires.ts).
import { spawnSync } from 'node:child_process'
import {
  accessSync,
  constants,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
} from 'node:fs'
import { release } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'

const wanted = JSON.parse(readFileSync(new URL('debian-packages.json', import.meta.url), 'utf8'))

export function has(command) {
  return `${process.env.PATH ?? ''}${delimiter}/usr/sbin${delimiter}/sbin`.split(delimiter).some((folder) => {
    try {
      accessSync(join(folder, command), constants.X_OK)
      return true
    } catch {
      return false
    }
  })
}

/** Where a package that is only unpacked lies, as it would below `/`. */
export function unpacked(name) {
  return fileURLToPath(new URL(`../.cache/debian/${name}`, import.meta.url))
}

function there({ package: name, command, file, unpack: how }) {
  if (how !== undefined) return existsSync(unpacked(name))
  return file === undefined ? has(command) : existsSync(file)
}

/**
 * Returns a line to show when something could not be installed. What is marked with `"for": "system"` is large, and
 * only installed for tests of that kind.
 */
export function installMissing(isSystem = false) {
  const root = process.getuid?.() === 0
  const missing = wanted.filter(
    (entry) => !there(entry) && (root || entry.unpack !== undefined) && (isSystem || entry.for !== 'system'),
  )
  if (missing.length === 0 || !existsSync('/etc/debian_version')) return undefined
  if (root) apt(['update', '-qq'])
  const programs = missing.filter((entry) => entry.unpack === undefined).map((entry) => entry.package)
  const installed =
    programs.length === 0 || apt(['install', '-y', '-qq', '--no-install-recommends', ...programs]).status === 0
  const failed = installed ? [] : programs
  for (const entry of missing) if (entry.unpack !== undefined && !unpack(entry)) failed.push(entry.package)
  return failed.length === 0 ? undefined : `could not install ${failed.join(', ')}: tests that need them are skipped`
}

function apt(words, options = {}) {
  return spawnSync('apt-get', ['-o', 'DPkg::Lock::Timeout=60', ...words], {
    stdio: 'ignore',
    timeout: 180_000,
    env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' },
    ...options,
  })
}

/**
 * Downloads the package, or of a metapackage (`"unpack": "dependency"`) what it depends on first, and unpacks it into
 * `.cache`: nothing of it is run or known to the system, which a kernel must not be. All or nothing.
 */
function unpack(entry) {
  const target = unpacked(entry.package)
  mkdirSync(dirname(target), { recursive: true })
  const scratch = mkdtempSync(`${target}.`)
  try {
    const name = entry.unpack === 'dependency' ? dependency(entry.package) : entry.package
    if (name === undefined || apt(['download', '-qq', name], { cwd: scratch }).status !== 0) return false
    const [file] = readdirSync(scratch)
    const tree = join(scratch, 'tree')
    if (spawnSync('dpkg-deb', ['-x', join(scratch, file), tree], { stdio: 'ignore' }).status !== 0) return false
    renameSync(tree, target)
    return true
  } catch (error) {
    // Somebody else was as quick: theirs is as good.
    if (error.code === 'ENOTEMPTY' || error.code === 'EEXIST') return true
    throw error
  } finally {
    rmSync(scratch, { recursive: true, force: true })
  }
}

/** The name of the first package that the newest version of a package depends on. */
function dependency(name) {
  const shown = spawnSync('apt-cache', ['show', '--no-all-versions', name], { encoding: 'utf8' })
  return /^Depends: ([^ ,|]+)/m.exec(shown.stdout ?? '')?.[1]
}

// Run as a program: the state of the machine that test results, also cached ones, depend on.
if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  console.log(JSON.stringify([process.getuid?.(), release(), wanted.filter(there)]))
}
