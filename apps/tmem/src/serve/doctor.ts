/**
 * `tmem doctor`: checks everything that this host needs for swapping to tmem, and says how to get what is missing.
 *
 * Two ways lead to a block device: FUSE with a loop device, and the kernel's NBD client. Exit code 0: at least one of
 * them works; 1: none. A server takes the memory of its stacks at once and must not run short itself, so that available
 * memory and its limits are checked, too; so is the record of a killed server, which makes the next one refuse to
 * start. The memory of a video device is shown if there is one, as a stack can use it as a place.
 */
import { accessSync, constants, existsSync, readFileSync } from 'node:fs'
import { release } from 'node:os'
import { delimiter, join } from 'node:path'
import { formatBytes } from '@tmem/core'
import { memoryLimits } from '@tmem/zcache'
import pc from 'picocolors'
import { Failed } from '../ending.ts'
import type { Terminal } from '../terminal.ts'
import { type Answers, ask } from './control.ts'
import { availableBytes, headroomBytes, readText } from './host.ts'
import { formerServer } from './record.ts'
import { machinesOf } from './stat.ts'

/** Who needs the checked item: both ways, one of them, or none (advice). */
type Need = 'both' | 'fuse' | 'nbd' | 'advice'

interface Check {
  readonly name: string
  readonly need: Need
  readonly ok: boolean
  readonly found: string
  /** What to do; empty if the check passed. */
  readonly advice: string
}

export async function doctor(
  options: { readonly control: string; readonly json?: true },
  terminal: Terminal,
): Promise<void> {
  const before = killed(options.control)
  const checks = [
    check(
      'linux',
      'both',
      process.platform === 'linux',
      `${process.platform} ${release()}`,
      'swap to tmem from a Linux host or guest',
    ),
    check(
      'root',
      'both',
      process.getuid?.() === 0,
      `user ${process.getuid?.() ?? '?'}`,
      'run tmem serve and tmem swap as root',
    ),
    ...['mkswap', 'swapon', 'swapoff'].map((name) => program(name, 'both', 'util-linux')),
    device('/dev/fuse', 'fuse', 'load it with modprobe fuse'),
    device('/dev/loop-control', 'fuse', 'load it with modprobe loop'),
    program('losetup', 'fuse', 'mount'),
    await koffi(),
    nbdModule(),
    program('nbd-client', 'nbd', 'nbd-client'),
    await videoMemory(),
    memory(),
    group(),
    limit(),
    readAhead(),
    ...before,
    // What a killed server has left answers nothing, and its next start takes it away.
    ...(before.length > 0 ? [] : await server(options.control)),
  ]
  const can = (way: 'fuse' | 'nbd'): boolean => checks.every(({ need, ok }) => ok || (need !== 'both' && need !== way))
  const ways = { fuse: can('fuse'), nbd: can('nbd') }
  const ready = ways.fuse || ways.nbd
  if (options.json === true) terminal.print(JSON.stringify({ ready, ways, checks }))
  else {
    for (const { name, ok, need, found, advice } of checks) {
      const mark = ok ? pc.green('ok     ') : need === 'advice' ? pc.yellow('advice ') : pc.red('missing')
      terminal.print(`${mark}  ${name}: ${found}${ok ? '' : `: ${advice}`}`)
    }
    terminal.print(`FUSE and a loop device: ${ways.fuse ? 'yes' : 'no'}; NBD client: ${ways.nbd ? 'yes' : 'no'}`)
  }
  if (!ready) throw new Failed('this host cannot swap to tmem: get the items marked missing')
}

const check = (name: string, need: Need, ok: boolean, found: string, advice: string): Check => ({
  name,
  need,
  ok,
  found,
  advice: ok ? '' : advice,
})

function program(name: string, need: Need, debianPackage: string): Check {
  const path = [...(process.env['PATH'] ?? '').split(delimiter), '/usr/sbin', '/sbin']
    .map((folder) => join(folder, name))
    .find((file) => isAllowed(file, constants.X_OK))
  return check(name, need, path !== undefined, path ?? 'not found', `install the package ${debianPackage}`)
}

function device(path: string, need: Need, advice: string): Check {
  const found = !existsSync(path)
    ? 'missing'
    : isAllowed(path, constants.R_OK | constants.W_OK)
      ? 'there'
      : 'not allowed'
  return check(path, need, found === 'there', found, found === 'not allowed' ? 'run as root' : advice)
}

function isAllowed(path: string, mode: number): boolean {
  try {
    accessSync(path, mode)
    return true
  } catch {
    return false
  }
}

async function koffi(): Promise<Check> {
  const advice = 'install tmem with its optional dependencies'
  try {
    const { setIoFlusher } = await import('@tmem/fuse')
    const flusher = await setIoFlusher()
    return check(
      'koffi',
      'fuse',
      true,
      flusher ? 'loads; io-flusher is allowed' : 'loads; io-flusher is refused',
      advice,
    )
  } catch (error) {
    return check('koffi', 'fuse', false, (error as Error).message, advice)
  }
}

/** The packages of drivers in Debian, by vendor; the device of pocl is the processor. */
const videoDrivers = 'NVIDIA nvidia-opencl-icd, AMD mesa-opencl-icd, Intel intel-opencl-icd, none pocl-opencl-icd'

/** Devices for vram, under the numbers that `device=` takes; the first is the default. */
async function videoMemory(): Promise<Check> {
  const advice = `only a vram(…) place needs it: install ocl-icd-libopencl1 and the driver of the device (${videoDrivers})`
  const found = (ok: boolean, text: string): Check => check('video memory', 'advice', ok, text, advice)
  try {
    const { videoDevices } = await import('@tmem/vram')
    const devices = videoDevices()
    if (devices.length === 0) return found(false, 'OpenCL is installed and has no device')
    return found(
      true,
      devices.map(({ name, bytes }, n) => `${n}: ${name}, ${Math.floor(bytes / 2 ** 20)}MiB`).join('; '),
    )
  } catch (error) {
    return found(false, (error as Error).message)
  }
}

function nbdModule(): Check {
  const loaded = existsSync('/sys/module/nbd') || existsSync('/dev/nbd0')
  const list = `/lib/modules/${release()}/modules.dep`
  const loadable = !loaded && existsSync(list) && readFileSync(list, 'utf8').includes('/nbd.ko')
  return check(
    'nbd module',
    'nbd',
    loaded,
    loaded ? 'loaded' : loadable ? 'not loaded' : 'missing from this kernel',
    loadable ? 'modprobe nbd' : 'use FUSE and a loop device',
  )
}

function memory(): Check {
  const available = availableBytes() ?? 0
  return check(
    'memory',
    'advice',
    available >= headroomBytes,
    `${Math.floor(available / 2 ** 20)}MiB available`,
    `free memory before starting tmem serve: it needs ${formatBytes(headroomBytes)} and the limits of its stack`,
  )
}

function group(): Check {
  const found = existsSync('/sys/fs/cgroup/memory/memory.limit_in_bytes')
    ? 'control groups, version 1'
    : existsSync('/sys/fs/cgroup/cgroup.controllers')
      ? 'control groups, version 2'
      : 'none'
  const limit = '/sys/fs/cgroup/memory/memory.limit_in_bytes'
  const writable =
    found === 'none' ? false : isAllowed(existsSync(limit) ? '/sys/fs/cgroup/memory' : '/sys/fs/cgroup', constants.W_OK)
  return check(
    'memory control group',
    'advice',
    writable,
    found,
    'without one, the kernel may swap out the server itself: keep spare memory on the host',
  )
}

/** A server in a group with a memory limit could wait for memory that only the server itself can free. */
function limit(): Check {
  const found = [...memoryLimits(readText)].map(
    ({ group, limitBytes }) => `${group}: ${Math.floor(limitBytes / 2 ** 20)}MiB`,
  )
  return check(
    'limit on memory',
    'advice',
    found.length === 0,
    found.length === 0 ? 'none' : found.join(', '),
    'start tmem serve outside of this group',
  )
}

/** Read-ahead from swap, as a power of two of pages: the most that the kernel uses along a program's addresses. */
const leastPageCluster = 5

/** Read-ahead fetches neighbouring pages together; each page that comes alone costs three wake-ups. */
function readAhead(): Check {
  const setting = readText('/proc/sys/vm/page-cluster')?.trim()
  return check(
    'swap read-ahead',
    'advice',
    setting !== undefined && Number(setting) >= leastPageCluster,
    setting === undefined ? 'not known' : `vm.page-cluster ${setting}`,
    `if this host swaps only to tmem: sysctl vm.page-cluster=${leastPageCluster}`,
  )
}

/** The record of a killed server. */
function killed(control: string): Check[] {
  try {
    const former = formerServer(control)
    if (former === undefined || former.running) return []
    const { pid, end, lost } = former
    const found = `process ${pid} ${end}${lost === '' ? '' : `; the pages of ${lost} are lost`}`
    const advice = lost === '' ? 'start tmem serve again' : 'end its clients, then start tmem serve with --fresh'
    return [check('server before', 'advice', false, found, advice)]
  } catch (error) {
    return [check('server before', 'advice', false, (error as Error).message, 'see whether a server runs')]
  }
}

/** The lending machines of a server: each must answer, and none may hold the only copy of a persistent page. */
const machinesOfServer = ({ devices }: Answers['stats']): Check[] =>
  devices.flatMap((device) =>
    machinesOf(device).map(({ name, counters: { open, blocks, lost_with_it: lost = 0 } }) =>
      check(
        `server: ${device.name} on ${name}`,
        'advice',
        open === 1 && lost === 0,
        `${open === 1 ? 'open' : 'away'}, ${blocks} blocks, of which ${lost} would be lost with it`,
        open === 1 ? 'keep it running until all machines answer again' : 'start it again: until then it gets no blocks',
      ),
    ),
  )

/** Whether a running server is protected. */
async function server(control: string): Promise<Check[]> {
  if (!existsSync(control)) return []
  try {
    const { pid } = await ask(control, 'info')
    const oom = Number(readFileSync(`/proc/${pid}/oom_score_adj`, 'utf8'))
    const swapped = Number(/^VmSwap:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? 0)
    return [
      check('server', 'advice', true, `process ${pid} answers on ${control}`, ''),
      check(
        'server: out of memory',
        'advice',
        oom <= -900,
        `oom_score_adj ${oom}`,
        'start it with --fuse, as root and with CAP_SYS_RESOURCE',
      ),
      check(
        'server: not swapped',
        'advice',
        swapped === 0,
        `${swapped} KiB of it are in swap`,
        'restart it before memory is short',
      ),
      ...machinesOfServer(await ask(control, 'stats')),
    ]
  } catch (error) {
    return [check('server', 'advice', false, (error as Error).message, `if no server runs, remove ${control}`)]
  }
}
