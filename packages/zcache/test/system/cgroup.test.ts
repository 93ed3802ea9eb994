/**
 * The governor for real: a control group with a limit, a pool that takes all it may have, and a hog beside it that
 * grows fast. Nobody is killed, the pool makes room, and it does not swing to and fro.
 *
 * Needs root and a memory controller that can be written; the group is removed again, also on failure.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

const MiB = 2 ** 20
const limit = 512 * MiB

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

/** Runs a script of this folder inside the group; resolves to its exit code, signal and output. */
function run(group: Group, script: string, ...args: number[]): { child: ChildProcess; end: Promise<Ended> } {
  const path = fileURLToPath(new URL(script, import.meta.url))
  const command = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
  const child = spawn('sh', ['-c', command, group.folder, process.execPath, path, ...args.map(String)], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  let output = ''
  child.stdout.on('data', (data: Buffer) => {
    output += data.toString()
  })
  const end = new Promise<Ended>((resolve) => child.on('close', (code, signal) => resolve({ code, signal, output })))
  return { child, end }
}

interface Ended {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly output: string
}

test('beside a hog in a control group: nobody is killed, the pool makes room, no oscillation', {
  timeout: 60_000,
}, async (context) => {
  const group = makeGroup()
  if (typeof group === 'string') return context.skip(group)
  const children: ChildProcess[] = []
  try {
    const pool = run(group, 'pool.mjs', 20)
    children.push(pool.child)
    await new Promise((resolve) => setTimeout(resolve, 9000))
    const hog = run(group, 'hog.mjs', 200, 8, 4)
    children.push(hog.child)
    const ends = await Promise.all([pool.end, hog.end])
    expect(ends.map(({ code, signal }) => ({ code, signal }))).toEqual([
      { code: 0, signal: null },
      { code: 0, signal: null },
    ])
    expect(/^oom_kill (\d+)$/m.exec(readFileSync(group.killsFile, 'utf8'))?.[1]).toBe('0')
    const steps = ends[0].output
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line) as { seconds: number; budget: number; used: number })
    const usedAt = (from: number, to: number): number[] =>
      steps.filter(({ seconds }) => seconds >= from && seconds < to).map(({ used }) => used)
    const before = Math.max(...usedAt(5, 9))
    const beside = Math.min(...usedAt(11, 16))
    expect(before).toBeGreaterThan(150 * MiB)
    expect(before - beside).toBeGreaterThan(100 * MiB)
    // Turns of more than 16 MiB: up, down beside the hog, up again when it is gone, and one to spare.
    let turns = 0
    let direction = 1
    let extreme = 0
    for (const { budget } of steps) {
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
