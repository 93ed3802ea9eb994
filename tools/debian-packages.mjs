// Programs that tests use and that npm does not bring. On Debian, as root, what is missing is installed; anywhere
// else, and when installing fails, the tests that need it are skipped with the reason (tools/requires.ts).
import { spawnSync } from 'node:child_process'
import { accessSync, constants, existsSync, readFileSync } from 'node:fs'
import { release } from 'node:os'
import { delimiter, join } from 'node:path'
import { pathToFileURL } from 'node:url'

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

/** Returns a line to show when something could not be installed. */
export function installMissing() {
  const missing = wanted.filter((entry) => !has(entry.command)).map((entry) => entry.package)
  if (missing.length === 0 || process.getuid?.() !== 0 || !existsSync('/etc/debian_version')) return undefined
  const apt = (...args) =>
    spawnSync('apt-get', ['-o', 'DPkg::Lock::Timeout=60', ...args], {
      stdio: 'ignore',
      timeout: 180_000,
      env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' },
    })
  apt('update', '-qq')
  const done = apt('install', '-y', '-qq', '--no-install-recommends', ...missing)
  return done.status === 0 ? undefined : `could not install ${missing.join(', ')}: tests that need them are skipped`
}

// Run as a program: the state of the machine that test results, also cached ones, depend on.
if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  console.log(JSON.stringify([process.getuid?.(), release(), wanted.filter((entry) => has(entry.command))]))
}
