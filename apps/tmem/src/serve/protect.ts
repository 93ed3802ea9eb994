/**
 * Protects the server from the kernel that swaps to it: the kernel must neither swap the server out nor kill it when
 * memory is short.
 *
 * Each measure reports its result or why it failed; no failure keeps the server from serving. Another measure is in
 * `aheadMemory`: the memory of the stores is allocated before they are served.
 */
import { existsSync, mkdirSync, readdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs'
import { processRuns } from '@tmem/core'
import { setIoFlusher } from '@tmem/fuse'

/** The result of a measure, and how to undo it if it outlives the process. */
export interface Protection {
  readonly measures: readonly { readonly name: string; readonly done: boolean; readonly note: string }[]
  undo(): void
}

/** Takes all measures that this host allows. */
export async function protect(): Promise<Protection> {
  const measures: { name: string; done: boolean; note: string }[] = []
  const attempt = (name: string, act: () => string): void => {
    try {
      measures.push({ name, done: true, note: act() })
    } catch (error) {
      measures.push({ name, done: false, note: (error as Error).message })
    }
  }
  const flusher = await setIoFlusher()
  measures.push({
    name: 'io-flusher',
    done: flusher,
    note: flusher ? 'set' : 'the kernel refused it (CAP_SYS_RESOURCE)',
  })
  attempt('oom', () => {
    try {
      writeFileSync('/proc/self/oom_score_adj', '-900')
    } catch (error) {
      throw new Error(`the kernel refused oom_score_adj -900 (CAP_SYS_RESOURCE): ${(error as Error).message}`)
    }
    return 'oom_score_adj -900'
  })
  let leave = (): void => undefined
  attempt('cgroup', () => {
    const group = ownGroup()
    if (group.leave !== undefined) leave = group.leave
    return group.setting
  })
  return { measures, undo: () => leave() }
}

/**
 * Creates and enters a control group below the process's own in which nothing is swapped out, unless the own group is
 * one already (a service with `MemorySwapMax=0`).
 */
function ownGroup(): { readonly setting: string; readonly leave?: () => void } {
  const lines = readFileSync('/proc/self/cgroup', 'utf8').trim().split('\n')
  const first = lines.find((line) => line.split(':')[1]!.split(',').includes('memory'))
  const second = lines.find((line) => line.startsWith('0::'))
  const own = (first ?? second ?? '').split(':')[2]
  if (own === undefined) throw new Error('no control group with memory')
  const base = first === undefined ? '/sys/fs/cgroup' : '/sys/fs/cgroup/memory'
  const parent = own === '/' ? base : `${base}${own}`
  if (first === undefined && settingOf(`${parent}/memory.swap.max`) === '0')
    return { setting: `${parent}: memory.swap.max 0` }
  const path = `${parent}/tmem-serve-${process.pid}`
  // Groups that killed servers have left behind.
  for (const name of readdirSync(parent)) {
    const pid = /^tmem-serve-(\d+)$/.exec(name)?.[1]
    if (pid !== undefined && !processRuns(Number(pid))) rmdirSync(`${parent}/${name}`)
  }
  const [file, value] = first === undefined ? ['memory.swap.max', '0'] : ['memory.swappiness', '0']
  mkdirSync(path)
  try {
    writeFileSync(`${path}/${file}`, value)
    writeFileSync(`${path}/cgroup.procs`, String(process.pid))
  } catch (error) {
    rmdirSync(path)
    throw error
  }
  const leave = (): void => {
    writeFileSync(`${parent}/cgroup.procs`, String(process.pid))
    rmdirSync(path)
  }
  return { setting: `${path}: ${file} ${value}`, leave }
}

/** The content of a file of a control group; `undefined` if it does not exist, as in the root group. */
const settingOf = (file: string): string | undefined =>
  existsSync(file) ? readFileSync(file, 'utf8').trim() : undefined
