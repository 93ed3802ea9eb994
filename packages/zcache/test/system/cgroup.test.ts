/**
 * The governor for real: a control group with a limit, a pool that takes all it may have, and a hog beside it that
 * grows fast. Nobody is killed, the pool makes room, and it does not swing to and fro.
 *
 * Needs root and a memory controller that can be written; the group is removed again, also on failure.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { expect, test, vi } from 'vitest'

const MiB = 2 ** 20
const limit = 512 * MiB

/** A step of the pool: bytes. */
interface Step {
  readonly budget: number
  readonly used: number
}

interface Group {
  readonly folder: string
  readonly killsFile: string
}

/** Makes a group with the limit, or says why there is none. */
function makeGroup(): Group | string {
  if (process.getuid?.() !== 0) return 'needs root to make a control group'
  const one = '/sys/fs/cgroup/memory'
  const version1 = existsSync(join(one, 'memory.limit_in_bytes'))
  const folder = join(version1 ? one : '/sys/fs/cgroup', `tmem-test-${process.pid}`)
  try {
    mkdirSync(folder)
  } catch (error) {
    return `cannot make a control group: ${String(error)}`
  }
  try {
    writeFileSync(join(folder, version1 ? 'memory.limit_in_bytes' : 'memory.max'), String(limit))
    return { folder, killsFile: join(folder, version1 ? 'memory.oom_control' : 'memory.events') }
  } catch (error) {
    rmdirSync(folder)
    return `cannot limit a control group: ${String(error)}`
  }
}

/** Runs a script of this folder inside the group until it is told to end. */
function run(group: Group, script: string, ...args: number[]): Running {
  const path = fileURLToPath(new URL(script, import.meta.url))
  const command = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
  const child = spawn('sh', ['-c', command, group.folder, process.execPath, path, ...args.map(String)], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  const lines: string[] = []
  createInterface(child.stdout).on('line', (line) => lines.push(line))
  const ended = new Promise<object>((resolve) => child.on('close', (code, signal) => resolve({ code, signal })))
  const end = (): Promise<object> => {
    child.stdin.end()
    return ended
  }
  return { child, lines, end }
}

interface Running {
  readonly child: ChildProcess
  /** What it has said by now. */
  readonly lines: readonly string[]
  /** Tells it to end; resolves to its exit code and signal. */
  readonly end: () => Promise<object>
}

const well = { code: 0, signal: null }

test('beside a hog in a control group: nobody is killed, the pool makes room, no oscillation', {
  timeout: 180_000,
}, async (context) => {
  const group = makeGroup()
  if (typeof group === 'string') return context.skip(group)
  const children: ChildProcess[] = []
  try {
    const pool = run(group, 'pool.mjs')
    children.push(pool.child)
    const steps = (): Step[] => pool.lines.map((line) => JSON.parse(line) as Step)
    /** Waits until the last steps are as they should be; a process that has ended makes no more of them. */
    const until = (isSo: (last: readonly Step[]) => boolean): Promise<void> =>
      vi.waitFor(() => expect(steps()).toSatisfy(isSo), { timeout: 50_000, interval: 100 })
    const most = (some: readonly Step[]): number => Math.max(...some.map(({ used }) => used))
    // It takes what it may, and then no more.
    await until((all) => all.length > 60 && most(all) > 150 * MiB && most(all) - most(all.slice(0, -30)) < 4 * MiB)
    const before = most(steps())
    const hog = run(group, 'hog.mjs', 200, 8)
    children.push(hog.child)
    await vi.waitFor(() => expect(hog.lines).toEqual(['grown in 25 steps']), { timeout: 50_000 })
    await until((all) => before - all.at(-1)!.used > 100 * MiB)
    expect(await hog.end()).toEqual(well)
    await until((all) => before - all.at(-1)!.used < 32 * MiB)
    expect(await pool.end()).toEqual(well)
    expect(/^oom_kill (\d+)$/m.exec(readFileSync(group.killsFile, 'utf8'))?.[1]).toBe('0')
    // Turns of more than 16 MiB: up, down beside the hog, up again when it is gone, and one to spare.
    let turns = 0
    let direction = 1
    let extreme = 0
    for (const { budget } of steps()) {
      if ((budget - extreme) * direction > 0) extreme = budget
      else if ((extreme - budget) * direction > 16 * MiB) {
        turns++
        direction = -direction
        extreme = budget
      }
    }
    expect(turns).toBeLessThanOrEqual(3)
  } finally {
    for (const child of children) child.kill('SIGKILL')
    // A group can be removed when its last process is gone.
    for (let tries = 0; existsSync(group.folder) && tries < 50; tries++) {
      try {
        rmdirSync(group.folder)
      } catch {
        await new Promise((resolve) => setTimeout(resolve, 100))
      }
    }
  }
  expect(existsSync(group.folder)).toBe(false)
})
