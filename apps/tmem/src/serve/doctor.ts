/**
 * `tmem doctor`: looks at everything that swapping to tmem on this host needs, and says what to do about what is
 * missing.
 *
 * There are two ways to a block device: FUSE and a loop device, or the kernel's NBD client. Exit code 0: at least one
 * of them can be gone; 1: none. A server takes the limits of its stacks at once and must not run short itself: so
 * memory, and a limit on it, are looked at as well; and a server that was killed, whose record makes the next one
 * refuse to start. The memory of a video device is shown where there is one: a stack can have it as a place.
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

/** What a check is about: needed by both ways, by one of them, or good to have. */
type Need = 'both' | 'fuse' | 'nbd' | 'advice'

interface Check {
  readonly name: string
  readonly need: Need
  readonly ok: boolean
  readonly found: string
  /** What to do; empty where all is well. */
  readonly advice: string
}

export async function doctor(
  options: { readonly control: string; readonly json?: true },
  terminal: Terminal,
): Promise<void> {
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
    ...killed(options.control),
    ...(await server(options.control)),
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
  if (!ready) throw new Failed('this host cannot swap to tmem: see what is missing')
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
    ? 'not there'
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

/** What a driver is called in Debian, by vendor; pocl's device is the processor, for whoever wants to try. */
const videoDrivers = 'NVIDIA nvidia-opencl-icd, AMD mesa-opencl-icd, Intel intel-opencl-icd, none pocl-opencl-icd'

/** Devices that vram can use, by the numbers that `device=` takes; the first one is the default. */
async function videoMemory(): Promise<Check> {
  const advice = `only vram(…) needs it: install ocl-icd-libopencl1 and the driver of the device (${videoDrivers})`
  const found = (ok: boolean, text: string): Check => check('video memory', 'advice', ok, text, advice)
  try {
    const { videoDevices } = await import('@tmem/vram')
    const devices = videoDevices()
    if (devices.length === 0) return found(false, 'OpenCL is there, and has no device')
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
    loaded ? 'loaded' : loadable ? 'not loaded' : 'this kernel has none',
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
    `start tmem serve before memory is short: at least ${formatBytes(headroomBytes)} and the limits of its stack`,
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
    'without one, the server itself may be swapped out: give the host memory to spare',
  )
}

/** Whoever starts the server from a group with a limit on memory has it waiting for memory that only it could free. */
function limit(): Check {
  const found = [...memoryLimits(readText)].map(
    ({ group, limitBytes }) => `${group}: ${Math.floor(limitBytes / 2 ** 20)}MiB`,
  )
  return check(
    'limit on memory',
    'advice',
    found.length === 0,
    found.length === 0 ? 'none' : found.join(', '),
    'start tmem serve outside of it',
  )
}

/** Read-ahead from swap, as a power of two of pages: the most that the kernel does along a program's addresses. */
const leastPageCluster = 5

/** Pages that are swapped in one after the other come together; each that comes alone takes three wake-ups. */
function readAhead(): Check {
  const setting = readText('/proc/sys/vm/page-cluster')?.trim()
  return check(
    'swap read-ahead',
    'advice',
    setting !== undefined && Number(setting) >= leastPageCluster,
    setting === undefined ? 'not known' : `vm.page-cluster ${setting}`,
    `where this host swaps to tmem alone: sysctl vm.page-cluster=${leastPageCluster}`,
  )
}

/** A server that was killed before. */
function killed(control: string): Check[] {
  try {
    const former = formerServer(control)
    if (former === undefined || former.running) return []
    const { pid, end, lost } = former
    const found = `process ${pid} ${end}${lost === '' ? '' : `, and what it held of ${lost} is lost`}`
    const advice = lost === '' ? 'start tmem serve again' : 'end its clients, then start tmem serve with --fresh'
    return [check('server before', 'advice', false, found, advice)]
  } catch (error) {
    return [check('server before', 'advice', false, (error as Error).message, 'see whether a server runs')]
  }
}

/** The machines that lend memory to a server: each must answer, and none alone have what may not vanish. */
const machinesOfServer = ({ devices }: Answers['stats']): Check[] =>
  devices.flatMap((device) =>
    machinesOf(device).map(({ name, counters: { open, blocks, lost_with_it: lost = 0 } }) =>
      check(
        `server: ${device.name} on ${name}`,
        'advice',
        open === 1 && lost === 0,
        `${open === 1 ? 'open' : 'away'}, ${blocks} blocks, of which ${lost} would be lost with it`,
        open === 1
          ? 'keep it running until all machines are there again'
          : 'start it again: until then no more goes there',
      ),
    ),
  )

/** A server that runs already: whether it is protected. */
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
    return [check('server', 'advice', false, (error as Error).message, `remove ${control} if no server is running`)]
  }
}
