/**
 * What a guest boots: a kernel with its modules as a Debian package has them, and a root directory in memory with
 * busybox and a shell script. Nothing of the host is written; the packages need not be installed, only unpacked (`dpkg
 * -x`).
 *
 * The script runs once what the kernel has is mounted (/proc, /sys, /dev), its modules are loaded and the drives are
 * there. When it ends, init prints a line with its exit code (`runGuest` takes that away again) and turns the machine
 * off.
 */

import { readdirSync, readFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { checkOptions } from '@tmem/core'
import { type CpioEntry, cpio } from './cpio.ts'

/** A kernel and those of its modules that a guest loads. */
export interface Kernel {
  /** Path of the image. */
  readonly image: string
  /** As `uname -r` says it. */
  readonly release: string
  /** Paths of the modules, in the order in which they are loaded. */
  readonly modules: readonly string[]
}

/**
 * Drives of a virtual machine. The kernels before 5.17 have no `virtio_pci_legacy_dev`, those before 5.12 no
 * `…_modern_dev`.
 */
const virtioModules: readonly string[] = Object.freeze([
  'virtio_ring',
  'virtio',
  'virtio_pci_legacy_dev',
  'virtio_pci_modern_dev',
  'virtio_pci',
  'virtio_blk',
])

/**
 * The kernel below `root`, where a kernel package was unpacked (or installed: `/`), with those of the modules that it
 * has: what is built in is no module. Of several kernels the newest. Undefined if there is none that can be read.
 */
export function findKernel(root: string, modules: readonly string[] = virtioModules): Kernel | undefined {
  const prefix = 'vmlinuz-'
  const compare = new Intl.Collator('en', { numeric: true }).compare
  const releases = namesIn(join(root, 'boot')).filter((name) => name.startsWith(prefix))
  for (const release of releases.map((name) => name.slice(prefix.length)).sort((a, b) => compare(b, a))) {
    const folder = join(root, 'lib/modules', release, 'kernel')
    const found = new Map<string, string>()
    for (const path of namesIn(folder, true))
      if (path.endsWith('.ko')) found.set(basename(path, '.ko').replaceAll('-', '_'), join(folder, path))
    if (found.size === 0) continue
    const paths = modules.map((name) => found.get(name)).filter((path) => path !== undefined)
    return { image: join(root, 'boot', prefix + release), release, modules: paths }
  }
  return undefined
}

function namesIn(folder: string, recursive = false): string[] {
  try {
    return readdirSync(folder, { encoding: 'utf8', recursive })
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return []
    throw error
  }
}

/** What is in the root directory of a guest. */
export interface InitramfsOptions {
  readonly kernel: Kernel
  /** Path of a busybox that is linked statically. */
  readonly busybox: string
  /**
   * What the guest does, for busybox's `sh`. Its exit code is the guest's. The first drive is `/dev/vda`, the next one
   * `/dev/vdb`.
   */
  readonly script: string
  /** What the script needs. `script`, `init`, and what is in `bin/` and `lib/modules/` are taken. */
  readonly files?: readonly CpioEntry[]
}

// busybox's insmod knows nothing of dependencies: what cannot be loaded yet is tried again after the others. The kernel
// hands what it does not know of its command line to init, as variables.
const init = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
loaded=1
while [ $loaded = 1 ]; do
  loaded=0
  for module in /lib/modules/*.ko; do
    if [ -e "$module" ] && insmod "$module" 2>/dev/null; then rm "$module"; loaded=1; fi
  done
done
for module in /lib/modules/*.ko; do
  if [ -e "$module" ]; then echo "not loaded: $module"; insmod "$module"; fi
done
tries=0
while [ "$(ls /sys/block | grep -c '^vd')" -lt "$guest_drives" ] && [ $tries -lt 100 ]; do
  sleep 0.1
  tries=$((tries + 1))
done
sh /script
code=$?
echo
echo "guest ended with $code"
poweroff -f
`

/** The root directory, as `runGuest` takes it. */
export function initramfs(options: InitramfsOptions): Uint8Array {
  checkOptions('initramfs', options, { kernel: 'object', busybox: 'text', script: 'text', files: 'list?' })
  const { kernel, busybox, script, files = [] } = options
  return cpio([
    { path: 'init', data: init, mode: 0o755 },
    { path: 'script', data: script },
    { path: 'bin/busybox', data: readFileSync(busybox), mode: 0o755 },
    { path: 'dev/console', device: [5, 1], mode: 0o600 },
    { path: 'proc' },
    { path: 'sys' },
    { path: 'tmp' },
    ...kernel.modules.map((path, n) => ({
      path: `lib/modules/${String(n).padStart(2, '0')}-${basename(path)}`,
      data: readFileSync(path),
    })),
    ...files,
  ])
}
