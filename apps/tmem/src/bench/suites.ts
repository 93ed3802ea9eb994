/** `tmem bench SUITE`: the available suites, and the output of their answers. */
import { formatBytes } from '@tmem/core'
import pc from 'picocolors'
import { BadInput } from '../ending.ts'
import { judgeReport, type ReportOptions, writeReport } from '../report-file.ts'
import { type Terminal, tableOf } from '../terminal.ts'
import { createBench, describeMachine, type MachineDescription, type Row, type Suite } from './frame.ts'

/**
 * All suites by name, but for `stack`, which is made for a stack. A suite is loaded when it runs, with the references
 * that it measures.
 */
export const suites: Readonly<Record<string, () => Promise<Suite>>> = Object.freeze({
  cache: async () => (await import('./cache.ts')).cache,
  cleancache: async () => (await import('./cleancache.ts')).cleancache,
  core: async () => (await import('./core.ts')).core,
  fscache: async () => (await import('./fscache.ts')).fscache,
  fuse: async () => (await import('./fuse.ts')).fuse,
  guest: async () => (await import('./kernel-guest.ts')).guest,
  metrics: async () => (await import('./metrics.ts')).metrics,
  models: async () => (await import('./models.ts')).models,
  nbd: async () => (await import('./nbd.ts')).nbd,
  ramster: async () => (await import('./ramster.ts')).ramster,
  tiers: async () => (await import('./tiers.ts')).tiers,
  userfault: async () => (await import('./userfault.ts')).userfault,
  virtio: async () => (await import('./virtio.ts')).virtio,
  xen: async () => (await import('./xen.ts')).xen,
  zcache: async () => (await import('./zcache.ts')).zcache,
})

/** Options of the command. */
export interface BenchOptions extends ReportOptions {
  readonly json?: true
  readonly quick?: true
  /** Text of the stack that the suite `stack` measures. */
  readonly stack?: string
  readonly modules?: readonly string[]
}

/** The suite of that name. Throws `BadInput` for options that it does not have. */
export async function suiteOf(name: string, { stack, modules }: BenchOptions): Promise<Suite> {
  if (name === 'stack') {
    if (stack === undefined) throw new BadInput("bench stack: --stack is missing, e.g. --stack 'zcache(limit=64MiB)'")
    return (await import('./stack.ts')).stackSuite(stack, modules)
  }
  if (stack !== undefined || modules !== undefined)
    throw new BadInput(`bench ${name}: --stack and --modules are for tmem bench stack`)
  return suites[name]!()
}

/** The JSON document of `tmem bench SUITE --json`: a contract. */
export interface BenchAnswer {
  readonly suite: string
  readonly quick: boolean
  readonly machine: MachineDescription
  readonly rows: readonly Row[]
}

/** Runs a suite and prints its answer. */
export async function runSuite(suite: Suite, options: BenchOptions, terminal: Terminal): Promise<void> {
  judgeReport(options)
  const quick = options.quick === true
  const rows = await suite.run(createBench(terminal, quick))
  writeReport(options, { kind: 'bench', bench: { suite: suite.name, summary: suite.summary, quick, rows } })
  const answer: BenchAnswer = { suite: suite.name, quick, machine: describeMachine(), rows }
  terminal.print(options.json === true ? JSON.stringify(answer) : shown(answer, suite.summary))
}

function shown({ suite, quick, machine, rows }: BenchAnswer, summary: string): string {
  const cells = rows.map((row) =>
    'skipped' in row
      ? [row.name, '', '', '', '', pc.dim(`skipped: ${row.skipped}`)]
      : [
          row.name,
          `${row.value} ${row.unit}`,
          row.reference === undefined ? '' : `${row.reference} ${row.reference_value}`,
          row.ratio?.toFixed(2) ?? '',
          row.goal === undefined ? '' : `≤ ${row.goal}`,
          row.met === undefined ? '' : row.met ? pc.green('met') : pc.red('missed'),
        ],
  )
  const align = ['left', 'right', 'right', 'right', 'right', 'left'] as const
  return [
    `${pc.bold(`tmem bench ${suite}`)}: ${summary}${quick ? ' --quick (rough figures)' : ''}`,
    `${machine.cpu}, ${machine.cores} cores, ${formatBytes(Math.round(machine.memoryBytes / 2 ** 30) * 2 ** 30)}, ${machine.platform} ${machine.kernel} ${machine.arch}, Node ${machine.node}`,
    '',
    tableOf(['what', 'ours', 'reference', 'ratio', 'goal', ''], cells, align),
    '',
    'Times are medians of rounds in which both took turns. ratio = our cost / reference cost: below 1 we are cheaper.',
    'goal: the largest acceptable ratio (without a reference: value). missed: the cost is higher here; results are right.',
  ].join('\n')
}
