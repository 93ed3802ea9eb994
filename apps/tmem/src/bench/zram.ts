/**
 * The kernel as reference: a C program whose memory is limited by a cgroup and swapped to zram with LZ4.
 *
 * It changes the machine: a cgroup, /dev/zram0, the list of swap areas. A note in /run is written first, so that
 * whatever a run that was killed has left is found and undone by the next one; only what the note tells of is undone.
 *
 * The program serves one round per line on its standard input and ends with it. It says how long each first load of a
 * page took that was a major fault: of all loads the slowest ones, as many as there were major faults.
 */
import { type ChildProcessWithoutNullStreams, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { processRuns } from '@tmem/core'
import { Failed } from '../ending.ts'

/** The work, alike for us (`userfault.ts`) and the kernel (the program below). */
export interface FaultWork {
  readonly pages: number
  readonly residentPages: number
  readonly operations: number
}

/** Of one round, in nanoseconds. */
export interface FaultTimes {
  readonly median: number
  readonly p99: number
  /** All of the round's time, stores included, per fault. */
  readonly perFault: number
}

const group = '/sys/fs/cgroup/memory/tmem-bench-userfault'
const device = '/dev/zram0'
const settings = '/sys/block/zram0'
const note = '/run/tmem-bench-userfault.pid'

const program = `
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1e9 + t.tv_nsec; }
static uint32_t word(uint32_t page, uint32_t version, uint32_t i) {
  return (i & 3) == 0 ? (version * 7919u + i + page) * 40503u : (page + 1) * 2654435761u + version;
}
static int compare(const void *a, const void *b) { double x = *(double *)a, y = *(double *)b; return (x > y) - (x < y); }
int main(int argc, char **argv) {
  uint32_t pages = strtoul(argv[1], 0, 10), operations = strtoul(argv[2], 0, 10), seed = 0x2545f491, sum = 0;
  size_t length = (size_t)pages * 4096, times = operations * sizeof(double);
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(0, &one);
  if (sched_setaffinity(0, sizeof one, &one)) return 2;
  uint32_t *memory = mmap(0, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  double *taken = mmap(0, times, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || taken == MAP_FAILED || madvise(memory, length, MADV_NOHUGEPAGE) || mlock(taken, times)) return 3;
  for (uint32_t page = 0; page < pages; page++)
    for (uint32_t i = 0; i < 1024; i++) memory[(size_t)page * 1024 + i] = word(page, 1, i);
  puts("ready");
  fflush(stdout);
  while (getchar() == '\\n') {
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    double start = now();
    for (uint32_t n = 0; n < operations; n++) {
      seed ^= seed << 13;
      seed ^= seed >> 17;
      seed ^= seed << 5;
      uint32_t page = seed % pages;
      volatile uint32_t *at = memory + (size_t)page * 1024;
      double began = now();
      sum += at[5];
      taken[n] = now() - began;
      if ((seed >> 16) % 4 == 0)
        for (uint32_t i = 0; i < 1024; i += 4) at[i] = word(page, n, i);
    }
    double total = now() - start;
    getrusage(RUSAGE_SELF, &after);
    long faults = after.ru_majflt - before.ru_majflt;
    if (faults > (long)operations) faults = operations;
    qsort(taken, operations, sizeof *taken, compare);
    double *slow = taken + (operations - faults);
    if (faults == 0) puts("0 0 0 0");
    else printf("%ld %f %f %f\\n", faults, slow[faults / 2], slow[faults * 99 / 100], total / faults);
    fflush(stdout);
  }
  return sum == 42 ? 4 : 0;
}
`

/** Rounds of the kernel, on request. */
export interface ZramSwap {
  round(): Promise<FaultTimes>
}

/** How often the program is tried: now and then the kernel finds nothing to swap out in time, and kills it. */
const attempts = 3

/** The kernel has killed the program because its group had no memory left. */
class Starved extends Error {}

/**
 * Sets everything up, hands it to `use`, and undoes it. When the kernel kills the program for want of memory in its
 * group meanwhile, all of that is done again. Answers in words why it cannot be had here: what `use` has measured then
 * is none.
 */
export async function withZramSwap(
  work: FaultWork,
  use: (swap: ZramSwap) => Promise<void>,
): Promise<string | undefined> {
  let why = ''
  for (let attempt = 0; attempt < attempts; attempt++) {
    try {
      return await attempted(work, use)
    } catch (error) {
      if (!(error instanceof Starved)) throw error
      why = error.message
    }
  }
  return `${attempts} times ${why}`
}

async function attempted(work: FaultWork, use: (swap: ZramSwap) => Promise<void>): Promise<string | undefined> {
  const trouble = sweep() ?? lacking()
  if (trouble !== undefined) return trouble
  const folder = mkdtempSync(join(tmpdir(), 'tmem-zram-'))
  let child: ChildProcessWithoutNullStreams | undefined
  try {
    writeFileSync(join(folder, 'hog.c'), program)
    const compiled = spawnSync('cc', ['-O2', '-o', join(folder, 'hog'), join(folder, 'hog.c')], { encoding: 'utf8' })
    if (compiled.error !== undefined || compiled.status !== 0)
      return 'there is no C compiler (cc) that could build the program that the kernel swaps'
    writeFileSync(note, `${process.pid}\n`)
    const failed = setUp(work)
    if (failed !== undefined) return failed
    const command = `echo $$ > ${group}/cgroup.procs && exec "$0" "$@"`
    child = spawn('sh', ['-c', command, join(folder, 'hog'), `${work.pages}`, `${work.operations}`])
    const running = child
    // A write to a program that has ended: its lines end, too, and that is what is reported.
    child.stdin.on('error', () => {})
    const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]()
    const next = async (): Promise<string> => {
      const line = await lines.next()
      if (line.done === true) throw await endOf(running)
      return line.value
    }
    await next()
    await use({
      async round() {
        running.stdin.write('\n')
        const [faults = 0, median = 0, p99 = 0, perFault = 0] = (await next()).split(' ').map(Number)
        if (!(faults > work.operations / 2))
          throw new Failed(`bench userfault: the kernel had only ${faults} major faults in ${work.operations} loads`)
        return { median, p99, perFault }
      },
    })
    return undefined
  } finally {
    if (child !== undefined && child.exitCode === null && child.signalCode === null) {
      const ended = once(child, 'exit')
      child.kill('SIGKILL')
      await ended
    }
    rmSync(folder, { recursive: true, force: true })
    if (existsSync(note)) undo()
  }
}

/** Why the program ended, whose output ends a moment before it does. */
async function endOf(child: ChildProcessWithoutNullStreams): Promise<Error> {
  if (child.exitCode === null && child.signalCode === null) await once(child, 'exit')
  const kills = Number(/oom_kill (\d+)/.exec(readFileSync(`${group}/memory.oom_control`, 'utf8'))?.[1] ?? 0)
  if (child.signalCode === 'SIGKILL' && kills > 0)
    return new Starved('the kernel has killed the swapped program, for want of memory in its group')
  return new Failed(`bench userfault: the swapped program ended: ${child.signalCode ?? `status ${child.exitCode}`}`)
}

function lacking(): string | undefined {
  if (process.platform !== 'linux') return 'needs Linux'
  if (process.getuid?.() !== 0) return 'needs root: it limits a cgroup and swaps to zram'
  if (!existsSync('/sys/fs/cgroup/memory/memory.limit_in_bytes')) return 'needs the memory controller of cgroup v1'
  if (!existsSync(settings)) return `needs ${device}`
  if (readFileSync(`${settings}/disksize`, 'utf8').trim() !== '0') return `${device} is in use by somebody else`
  if (!readFileSync(`${settings}/comp_algorithm`, 'utf8').includes('lz4')) return `${device} has no lz4`
  for (const command of ['mkswap', 'swapon', 'swapoff'])
    if (spawnSync(command, ['--version']).error !== undefined) return `needs the program ${command}`
  return undefined
}

/** Undoes what a run that is no more has left. Says why not, when one is still there. */
function sweep(): string | undefined {
  if (!existsSync(note)) return undefined
  const pid = readFileSync(note, 'utf8').trim()
  if (processRuns(Number(pid))) return `another run (process ${pid}) is using ${device}`
  undo()
  return undefined
}

function setUp({ pages, residentPages }: FaultWork): string | undefined {
  try {
    mkdirSync(group)
    writeFileSync(`${group}/memory.limit_in_bytes`, `${residentPages * 4096}`)
    writeFileSync(`${settings}/comp_algorithm`, 'lz4')
    writeFileSync(`${settings}/disksize`, `${pages * 4096 * 2}`)
  } catch (error) {
    return `the kernel could not be set up: ${error instanceof Error ? error.message : String(error)}`
  }
  for (const [command, ...parameters] of [
    ['mkswap', device] as const,
    ['swapon', '--priority', '100', device] as const,
  ]) {
    const done = spawnSync(command, parameters, { encoding: 'utf8' })
    if (done.status !== 0) return `${command} failed: ${done.stderr.trim()}`
  }
  return undefined
}

function undo(): void {
  if (existsSync(group)) {
    // Whoever is left in the group was started by this bench.
    for (const pid of readFileSync(`${group}/cgroup.procs`, 'utf8').split('\n').filter(Boolean))
      process.kill(Number(pid), 'SIGKILL')
    // The kernel lets go of a process's group a moment after it has ended.
    for (let tries = 0; readFileSync(`${group}/cgroup.procs`, 'utf8') !== '' && tries < 100; tries++)
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 20)
    rmdirSync(group)
  }
  if (readFileSync('/proc/swaps', 'utf8').includes(`${device} `)) {
    const off = spawnSync('swapoff', [device], { encoding: 'utf8' })
    if (off.status !== 0) throw new Failed(`bench userfault: swapoff ${device} failed: ${off.stderr.trim()}`)
  }
  writeFileSync(`${settings}/reset`, '1')
  rmSync(note)
}
