/**
 * `tmem bench fuse`: files of our mount and block devices over them, against a file of a tmpfs and the kernel's zram
 * with LZ4; and a program that the kernel swaps to them.
 *
 * Direct I/O with libaio, driven by fio; on the tmpfs through its page cache, which is where a tmpfs has its bytes. The
 * block device is a loop device with direct I/O over the file of ramzswap over zcache. The program may use 64 MiB of
 * its 200 MiB (a control group), looks at all of them in no order, writes half of them anew, and verifies them.
 *
 * It changes the machine: a mount, a loop device, a zram device, a control group, the list of swap areas. A note in
 * /run is written first, so that whatever a run that was killed has left is found and undone by the next one; only what
 * the note tells of is undone.
 */
import { spawn, spawnSync } from 'node:child_process'
import {
  accessSync,
  closeSync,
  constants,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  rmSync,
  statfsSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { processRuns } from '@tmem/core'
import { compileHog } from '@tmem/guest'
import { Failed, throwIfInterrupted } from '../ending.ts'
import { comparedByFio, type FioTarget, type LoadRow, type Started, started } from './fio.ts'
import { type Bench, median, type Row, ratioRow, type Suite, shownPart, skippedRow, valueRow } from './frame.ts'

/** The suite. */
export const fuse: Suite = {
  name: 'fuse',
  summary:
    "files of our mount and loop devices over them against a tmpfs file and the kernel's zram, and swapping to them",
  run: fuseRows,
}

/** What a server has done, in `times` of its mount. Times of reads and writes are those of the compressed device. */
export interface ServerTimes {
  readonly userMs: number
  readonly systemMs: number
  readonly readMs: number
  readonly writeMs: number
  readonly reads: number
  readonly writes: number
  readonly writtenBytes: number
}

const mebibyte = 2 ** 20
const deviceBytes = 256 * mebibyte
const hogMebibytes = 200
const limitBytes = 64 * mebibyte
const note = '/run/tmem-bench-fuse'
const folder = '/var/tmp/tmem-bench-fuse'
const mountPoint = join(folder, 'mount')
const group = '/sys/fs/cgroup/memory/tmem-bench-fuse'
const tmpfsFile = '/dev/shm/tmem-bench-fuse'
const tmpfsMagic = 0x0102_1994
const zram = '/dev/zram0'
const zramSettings = '/sys/block/zram0'

const random = { random: true, blockBytes: 4096 } as const
const sequential = { random: false, blockBytes: mebibyte, depth: 4 } as const
const fileLoads: readonly LoadRow[] = Object.freeze([
  { name: 'file-read-4k-qd32', kind: 'read', ...random, depth: 32 },
  { name: 'file-write-4k-qd32', kind: 'write', ...random, depth: 32 },
  { name: 'file-read-4k-qd1', kind: 'read', ...random, depth: 1 },
  { name: 'file-write-4k-qd1', kind: 'write', ...random, depth: 1 },
  { name: 'file-read-1m', kind: 'read', ...sequential },
  { name: 'file-write-1m', kind: 'write', ...sequential },
])
const loopLoads: readonly LoadRow[] = Object.freeze([
  { name: 'loop-compressed-read-4k-qd32', kind: 'read', ...random, depth: 32 },
  { name: 'loop-compressed-write-4k-qd32', kind: 'write', ...random, depth: 32 },
  { name: 'loop-compressed-read-4k-qd1', kind: 'read', ...random, depth: 1 },
  { name: 'loop-compressed-write-4k-qd1', kind: 'write', ...random, depth: 1 },
])
const hogName = 'hog-run'
const roundsOf = ({ quick }: Bench): number => (quick ? 1 : 7)

async function fuseRows(bench: Bench): Promise<Row[]> {
  const names = [...fileLoads.map(({ name }) => name), ...loopLoads.map(({ name }) => name), hogName]
  const skipped = (all: readonly string[], reason: string): Row[] => all.map((name) => skippedRow(name, reason))
  const trouble = sweep() ?? lacking()
  if (trouble !== undefined) return skipped(names, trouble)
  let server: Started | undefined
  // Not what somebody else may have put there, in a folder where all may: that stays, and this fails.
  mkdirSync(folder, { mode: 0o700 })
  writeFileSync(note, `${process.pid}\n`)
  try {
    mkdirSync(mountPoint)
    const program = fileURLToPath(new URL('./fuse-server.js', import.meta.url))
    server = await started(process.execPath, [program, String(deviceBytes), mountPoint], join(mountPoint, 'times'))
    writeFileSync(note, `${process.pid} ${server.pid}\n`)
    const rows = [...(await fileRows(bench))]
    const withoutZram = zramLacking()
    if (withoutZram !== undefined) return [...rows, ...skipped(names.slice(fileLoads.length), withoutZram)]
    writeFileSync(note, `${process.pid} ${server.pid} zram\n`)
    writeFileSync(`${zramSettings}/comp_algorithm`, 'lz4')
    writeFileSync(`${zramSettings}/disksize`, `${deviceBytes}`)
    const loop = command('losetup', '-f', '--show', '--direct-io=on', join(mountPoint, 'compressed'))
    const reference = 'zram lz4'
    const both = { ours: direct(loop, true), theirs: direct(zram, true) }
    rows.push(...(await comparedByFio(bench, { ...both, reference, loads: loopLoads, rounds: roundsOf(bench) })))
    rows.push(...(await hogRows(bench, loop)))
    return rows
  } finally {
    undo()
    await server?.stop()
  }
}

function lacking(): string | undefined {
  if (process.platform !== 'linux') return 'needs Linux'
  if (process.getuid?.() !== 0) return 'needs root: it mounts, and swaps'
  if (!existsSync('/dev/fuse')) return 'needs /dev/fuse'
  if (!existsSync('/dev/loop-control')) return 'needs /dev/loop-control'
  if (!existsSync('/sys/fs/cgroup/memory/memory.limit_in_bytes')) return 'needs the memory controller of cgroup v1'
  if (!existsSync('/dev/shm') || statfsSync('/dev/shm').type !== tmpfsMagic) return 'needs a tmpfs on /dev/shm'
  for (const program of ['fio', 'losetup', 'mkswap', 'swapon', 'swapoff', 'cc'])
    if (spawnSync(program, ['--version']).error !== undefined) return `needs the program ${program}`
  return undefined
}

function zramLacking(): string | undefined {
  if (!existsSync(zramSettings)) return `the reference cannot be had: needs ${zram}`
  if (setting('disksize') !== '0') return `the reference cannot be had: ${zram} is in use by somebody else`
  return setting('comp_algorithm').includes('lz4') ? undefined : `the reference cannot be had: ${zram} has no lz4`
}

const setting = (key: string): string => readFileSync(`${zramSettings}/${key}`, 'utf8').trim()

const direct = (path: string, half: boolean): FioTarget => ({
  words: ['--ioengine=libaio', '--direct=1', `--filename=${path}`],
  sizeBytes: deviceBytes,
  half,
})

async function fileRows(bench: Bench): Promise<Row[]> {
  const tmpfs = { ...direct(tmpfsFile, false), words: ['--ioengine=libaio', `--filename=${tmpfsFile}`] }
  // Nothing is there, and no link is followed.
  closeSync(openSync(tmpfsFile, 'wx', 0o600))
  try {
    const both = { ours: direct(join(mountPoint, 'plain'), false), theirs: tmpfs }
    return await comparedByFio(bench, { ...both, reference: 'tmpfs file', loads: fileLoads, rounds: roundsOf(bench) })
  } finally {
    rmSync(tmpfsFile, { force: true })
  }
}

/** One run of the program, in milliseconds. */
interface HogRun {
  readonly wall: number
  readonly user: number
  readonly system: number
}

/** The program swapped to either, in turns; and where the time of our runs went. */
async function hogRows(bench: Bench, loop: string): Promise<Row[]> {
  const program = join(folder, 'hog')
  compileHog(program)
  mkdirSync(group)
  writeFileSync(join(group, 'memory.limit_in_bytes'), `${limitBytes}`)
  for (const area of [loop, zram]) command('mkswap', area)
  const ours: (HogRun & { readonly server: ServerTimes })[] = []
  const theirs: HogRun[] = []
  const walls = (runs: readonly HogRun[]): number => median(runs.map(({ wall }) => wall))
  const rounds = bench.quick ? 1 : 5
  await shownPart(bench, hogName, async (at) => {
    for (let round = 0; round < rounds; round++)
      for (const turn of round % 2 === 0 ? [0, 1] : [1, 0]) {
        const area = turn === 0 ? loop : zram
        command('swapon', '--discard', '--priority', '32767', area)
        const before = serverTimes()
        const run = await hog(program, bench)
        const after = serverTimes()
        command('swapoff', area)
        if (turn === 1) theirs.push(run)
        else if (after.writes - before.writes === 0)
          throw new Failed('bench fuse: nothing was swapped to the loop device')
        else ours.push({ ...run, server: difference(after, before) })
        at(ours.length + theirs.length, 2 * rounds)
      }
    return [undefined, `${walls(ours).toFixed()} ms, zram ${walls(theirs).toFixed()}`]
  })
  const share = (name: string, part: (run: (typeof ours)[number]) => number): Row =>
    valueRow(`hog-${name}`, '% of the run', median(ours.map((run) => (100 * part(run)) / run.wall)))
  return [
    ratioRow(hogName, 'ms', walls(ours), 'the same on zram lz4', walls(theirs)),
    share('in-program', ({ user }) => user),
    share('in-program-kernel', ({ system }) => system),
    share('in-compression', ({ server }) => server.writeMs),
    share('in-decompression', ({ server }) => server.readMs),
    share('in-rest-of-server', ({ server }) => server.userMs - server.writeMs - server.readMs),
    share('in-server-kernel', ({ server }) => server.systemMs),
    // Wake-ups, the loop device's thread, and whatever nobody was charged for; less what both did at once.
    share('in-neither', ({ wall, user, system, server }) => wall - user - system - server.userMs - server.systemMs),
    valueRow('hog-read-requests', 'requests', median(ours.map(({ server }) => server.reads))),
    valueRow('hog-write-requests', 'requests', median(ours.map(({ server }) => server.writes))),
    valueRow('hog-write-size', 'bytes/request', median(ours.map(({ server }) => server.writtenBytes / server.writes))),
  ]
}

const serverTimes = (): ServerTimes => JSON.parse(readFileSync(join(mountPoint, 'times'), 'utf8')) as ServerTimes

function difference(after: ServerTimes, before: ServerTimes): ServerTimes {
  const names = Object.keys(after) as (keyof ServerTimes)[]
  return Object.fromEntries(names.map((name) => [name, after[name] - before[name]])) as unknown as ServerTimes
}

/** Runs the program in its control group. The shell says what it has used. */
async function hog(program: string, bench: Bench): Promise<HogRun> {
  throwIfInterrupted(bench.signal)
  const script = `echo $$ > ${group}/cgroup.procs && "$0" ${hogMebibytes} 1 && times`
  const from = performance.now()
  const child = spawn('sh', ['-c', script, program], { stdio: ['ignore', 'pipe', 'ignore'] })
  let output = ''
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    output += text
  })
  const status = await new Promise<number | null>((resolve) => {
    child.once('close', resolve)
  })
  const wall = performance.now() - from
  const seconds = [...output.matchAll(/(\d+)m([\d.]+)s/g)].map(
    ([, minutes, rest]) => Number(minutes) * 60 + Number(rest),
  )
  const [, , user, system] = seconds
  if (status !== 0 || !output.includes(' 0 wrong') || user === undefined || system === undefined)
    throw new Failed(`bench fuse: the swapped program failed (status ${status}): ${output.trim()}`)
  return { wall, user: user * 1000, system: system * 1000 }
}

/** Runs a program of the system; what it printed. */
function command(name: string, ...words: string[]): string {
  const done = spawnSync(name, words, { encoding: 'utf8' })
  if (done.status !== 0) throw new Failed(`bench fuse: ${name} ${words.join(' ')} failed: ${done.stderr.trim()}`)
  return done.stdout.trim()
}

/** Undoes what a run that is no more has left. Says why not, when one is still there. */
function sweep(): string | undefined {
  if (!existsSync(note)) return undefined
  try {
    accessSync(note, constants.W_OK)
  } catch {
    return `an earlier run has left ${note}, which only root can undo`
  }
  const [pid, server] = readFileSync(note, 'utf8').trim().split(' ')
  if (processRuns(Number(pid))) return `another run (process ${pid}) is at work`
  undo()
  // Its server may have outlived it; nothing uses the mount any more.
  const line = `/proc/${server}/cmdline`
  if (server !== undefined && existsSync(line) && readFileSync(line, 'utf8').includes('fuse-server'))
    process.kill(Number(server), 'SIGKILL')
  return undefined
}

/** Loop devices over files of the mount. */
const loops = (): string[] =>
  readdirSync('/sys/block').filter((name) => {
    const backing = `/sys/block/${name}/loop/backing_file`
    return existsSync(backing) && readFileSync(backing, 'utf8').startsWith(mountPoint)
  })

/**
 * Takes everything away that the note tells of, in the order in which it can be. Our server goes on until it is told to
 * end.
 */
function undo(): void {
  const words = readFileSync(note, 'utf8').trim().split(' ')
  if (existsSync(group)) {
    // Whoever is in it was started by this bench.
    for (const pid of readFileSync(join(group, 'cgroup.procs'), 'utf8').split('\n').filter(Boolean))
      process.kill(Number(pid), 'SIGKILL')
    // The kernel lets go of a process's group a moment after it has ended.
    for (let tries = 0; readFileSync(join(group, 'cgroup.procs'), 'utf8') !== '' && tries < 250; tries++) rest()
    rmdirSync(group)
  }
  const areas = [...loops().map((name) => `/dev/${name}`), ...(words.includes('zram') ? [zram] : [])]
  for (const area of areas) if (readFileSync('/proc/swaps', 'utf8').includes(`${area} `)) command('swapoff', area)
  for (const name of loops()) command('losetup', '-d', `/dev/${name}`)
  if (words.includes('zram'))
    for (let tries = 0; ; tries++)
      // Somebody who looks at every new device may still have it open.
      try {
        writeFileSync(`${zramSettings}/reset`, '1')
        break
      } catch (error) {
        if (tries === 100 || (error as NodeJS.ErrnoException).code !== 'EBUSY') throw error
        rest()
      }
  rmSync(tmpfsFile, { force: true })
  // A loop device lets go of its file a moment after it was taken away.
  for (let tries = 0; readFileSync('/proc/self/mounts', 'utf8').includes(` ${mountPoint} `); tries++) {
    const done = spawnSync('umount', tries < 100 ? [mountPoint] : ['-l', mountPoint], { encoding: 'utf8' })
    if (done.status !== 0 && tries > 100) throw new Failed(`bench fuse: umount failed: ${done.stderr.trim()}`)
    if (done.status !== 0) rest()
  }
  rmSync(folder, { recursive: true, force: true })
  rmSync(note)
}

const rest = (): void => {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20)
}
