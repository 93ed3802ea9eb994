/**
 * A systemd that runs: the machine's own program as the first process of namespaces of its own, over a layer that is
 * thrown away. Units are installed there as an operator does it, and nothing of the machine's own is changed or
 * started.
 *
 * Invariants: its file systems, processes, network and control groups end with it; the kernel's settings are read only.
 */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync, readdirSync, readFileSync, rmdirSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'

/** The checkout, which need not lie in the file system of `/`. */
const checkout = fileURLToPath(new URL('../../../../', import.meta.url)).replace(/\/$/, '')

/** What a test asks for with `requires`. */
export const needs = {
  root: true,
  commands: ['unshare', 'pivot_root', 'nsenter', 'systemctl', 'systemd-sysusers', 'journalctl'],
  paths: ['/lib/systemd/systemd'],
}

/** Where the second version of control groups is mounted. */
const groups = (): string | undefined =>
  /^\d+ \d+ \S+ \/ (\S+) .* - cgroup2 /m.exec(readFileSync('/proc/self/mountinfo', 'utf8'))?.[1]

/** Why a systemd of its own cannot run here, beside `needs`. */
export function hindrance(): string | undefined {
  if (!/\boverlay$/m.test(readFileSync('/proc/filesystems', 'utf8'))) return 'needs overlayfs'
  return groups() === undefined ? 'needs cgroup2' : undefined
}

/** `$0`: an empty folder; `$1`: the checkout; `$2`: its control group. Ends as systemd. */
const script = `set -e
echo $$ > "$2/cgroup.procs"
exec unshare --mount --pid --fork --uts --ipc --net --cgroup --kill-child --propagation private sh -ec '
mount -t tmpfs tmpfs "$0"
mkdir "$0/upper" "$0/work" "$0/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$0/upper,workdir=$0/work" "$0/root"
cd "$0/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,ro,bind proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/shm dev/pts
ln -s /proc/self/fd dev/fd
ln -s pts/ptmx dev/ptmx
for name in null zero full random urandom tty; do : > dev/$name; mount --bind /dev/$name dev/$name; done
mkdir -p ".$1"
mount --bind "$1" ".$1"
# Nothing of the machine is started: neither what is enabled, nor what each target brings along.
rm -rf etc/systemd/system lib/systemd/system/*.wants etc/fstab
mkdir etc/systemd/system lib/systemd/system/sysinit.target.wants
for unit in socket service; do ln -s ../systemd-journald.$unit lib/systemd/system/sysinit.target.wants; done
# Not by chroot: services get file systems of their own, and for that it has to be the root of all mounts.
mkdir before
pivot_root . before
umount -l before
exec /usr/bin/env -i container=test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  /lib/systemd/systemd --unit=basic.target --log-target=journal --show-status=no
' "$0" "$1"`

/** What a command said. */
export interface Said {
  readonly status: number | null
  readonly stdout: string
  readonly stderr: string
}

export class LiveSystemd {
  readonly #child: ChildProcess
  readonly #group: string
  readonly #ended: Promise<unknown>
  /** Its number outside. */
  readonly #pid: number

  private constructor(child: ChildProcess, group: string, ended: Promise<unknown>, pid: number) {
    this.#child = child
    this.#group = group
    this.#ended = ended
    this.#pid = pid
  }

  /** Resolves when it has started; `folder` is empty. Rejects with what was said when it does not. */
  static async start(folder: string): Promise<LiveSystemd> {
    const group = join(groups()!, `tmem-test-${process.pid}`)
    mkdirSync(group)
    const child = spawn('sh', ['-c', script, folder, checkout, group], { stdio: ['ignore', 'ignore', 'pipe'] })
    let notes = ''
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      notes += text
    })
    const ended = once(child, 'exit')
    for (let left = 200; left > 0 && child.exitCode === null; left--) {
      const pid = Number(readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, 'utf8').trim())
      if (pid > 0) {
        const live = new LiveSystemd(child, group, ended, pid)
        if (live.run('systemctl', 'is-active', 'basic.target').status === 0) return live
      }
      await sleep(100)
    }
    child.kill('SIGKILL')
    await ended
    await removeGroup(group)
    throw new Error(`systemd has not started: ${notes}`)
  }

  /** Runs a command inside. */
  run(...words: readonly string[]): Said {
    const inside = ['-t', String(this.#pid), '-m', '-p', '-i', '-n', '-u', '-C', '-r', '-w', '--']
    return spawnSync('nsenter', [...inside, ...words], { encoding: 'utf8', timeout: 60_000 })
  }

  /** Properties of a unit. */
  show(unit: string, ...names: readonly string[]): Record<string, string> {
    const { stdout } = this.run('systemctl', 'show', unit, ...names.map((name) => `--property=${name}`))
    return Object.fromEntries(
      stdout
        .trimEnd()
        .split('\n')
        .map((line) => /^(\w+)=(.*)$/s.exec(line)!.slice(1)),
    )
  }

  /** Ends all of it. */
  async end(): Promise<void> {
    this.#child.kill('SIGKILL')
    await this.#ended
    await removeGroup(this.#group)
  }
}

/** Removes a control group with those in it, whose processes are just ending. */
async function removeGroup(path: string): Promise<void> {
  for (const entry of readdirSync(path, { withFileTypes: true }))
    if (entry.isDirectory()) await removeGroup(join(path, entry.name))
  for (let left = 100; ; left--)
    try {
      rmdirSync(path)
      return
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EBUSY' || left === 0) throw error
      await sleep(50)
    }
}
