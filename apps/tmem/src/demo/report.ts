/** The findings of the demo, as one JSON document and as a table. */
import { basePageSize, formatBytes } from '@tmem/core'
import pc from 'picocolors'
import { tableOf } from '../terminal.ts'
import type { Source } from './input.ts'

/** The work of one of the three machines. */
export interface MachineReport {
  readonly name: 'memory' | 'tmem' | 'swap'
  /** Time of the whole stream, without the checks after it. */
  readonly seconds: number
  /** `seconds` over those of the first machine. */
  readonly slowdown: number
  /** Pages that left memory, and pages that returned. */
  readonly swapOuts: number
  readonly swapIns: number
  /** I/O operations on the swap file, and the bytes that they moved. */
  readonly diskWrites: number
  readonly diskReads: number
  readonly diskBytes: number
  /** Pages that tmem refused and that went to the swap file instead, by reason of the refusal. */
  readonly refusals: Readonly<Record<string, number>>
  /** At the end of the stream. On a machine without tmem everything but the ratio is 0. */
  readonly tmem: TmemReport
  /** What each place holds at the end of the stream; empty for a machine without a stack. */
  readonly places: readonly PlaceReport[]
}

/** What a place of a stack holds. `directory` stands for same-filled pages, which need no place. */
export interface PlaceReport {
  readonly name: string
  readonly pages: number
  /** Bytes that the place uses, in memory or on disk. */
  readonly bytes: number
}

/** What tmem held, and its cost. */
export interface TmemReport {
  readonly pages: number
  /** Memory that tmem used, metadata included. */
  readonly bytes: number
  /** Bytes of the pages over the bytes used; 1 if there are no pages. */
  readonly ratio: number
  readonly cpuSeconds: number
}

/** The JSON document of `tmem demo --json`: a contract. */
export interface DemoReport {
  readonly input: { readonly pages: number; readonly sources: readonly Source[] }
  readonly settings: {
    readonly seed: number
    /** Bytes of memory of the first machine, and of the other two: half of it, or what the budget leaves. */
    readonly memoryBytes: number
    readonly partBytes: number
    readonly budgetBytes: number
    readonly references: number
    /** True when swap I/O bypassed the operating system's cache. */
    readonly directIo: boolean
  }
  readonly machines: readonly MachineReport[]
  /** The share of the swap machine's disk I/O operations that the tmem machine avoided; 0 if it did more. */
  readonly diskIoAvoided: number
  /** Bytes that the reads of all machines compared with what was last written. */
  readonly comparedBytes: number
  /** Always 0: a wrong byte ends the run without a report. */
  readonly wrongBytes: 0
}

/** The table, and hints on what to do next. */
export function shown(report: DemoReport): string {
  const { input, settings, machines } = report
  const line = (label: string, cell: (machine: MachineReport) => string): string[] => [label, ...machines.map(cell)]
  const withTmem = (cell: (tmem: TmemReport) => string) => (machine: MachineReport) =>
    machine.name === 'tmem' ? cell(machine.tmem) : '-'
  const placeNames = [...new Set(machines.flatMap(({ places }) => places.map(({ name }) => name)))]
  const reasons = [...new Set(machines.flatMap((machine) => Object.keys(machine.refusals)))].sort()
  const memory = (bytes: number): string => `${mebibytes(bytes)} MiB`
  const rows = [
    line('memory', ({ name }) => (name === 'memory' ? memory(settings.memoryBytes) : memory(settings.partBytes))),
    line('tmem', ({ name }) => (name === 'tmem' ? memory(settings.budgetBytes) : '-')),
    line('swap file', ({ name }) => (name === 'memory' ? '-' : memory(settings.memoryBytes))),
    line('time', ({ seconds }) => `${seconds.toFixed(2)} s`),
    line(pc.bold('slowdown'), ({ slowdown }) => pc.bold(`${slowdown.toFixed(2)} x`)),
    line('swap-outs', ({ swapOuts }) => count(swapOuts)),
    line('swap-ins', ({ swapIns }) => count(swapIns)),
    line('disk writes', ({ diskWrites }) => count(diskWrites)),
    line('disk reads', ({ diskReads }) => count(diskReads)),
    line('disk bytes', ({ diskBytes }) => memory(diskBytes)),
    line(pc.bold('disk I/O avoided'), ({ name }) =>
      name === 'tmem' ? pc.bold(pc.green(`${(report.diskIoAvoided * 100).toFixed(1)} %`)) : '-',
    ),
    ...reasons.map((reason) => line(`refused: ${reason}`, ({ refusals }) => count(refusals[reason] ?? 0))),
    ...placeNames.map((name) =>
      line(`at the end in ${name}`, ({ places }) => {
        const place = places.find((one) => one.name === name)
        return place === undefined ? '-' : `${count(place.pages)} pages, ${memory(place.bytes)}`
      }),
    ),
    line(
      'pages held by tmem',
      withTmem(({ pages }) => count(pages)),
    ),
    line(
      'used by tmem, metadata included',
      withTmem(({ bytes }) => memory(bytes)),
    ),
    line(
      'compression ratio',
      withTmem(({ ratio }) => ratio.toFixed(2)),
    ),
    line(
      'CPU in tmem',
      withTmem(({ cpuSeconds }) => `${cpuSeconds.toFixed(2)} s`),
    ),
  ]
  return [
    `${count(input.pages)} pages (${formatBytes(input.pages * basePageSize)}) of real bytes from`,
    ...input.sources.map(({ path, bytes }) => `  ${path} (${mebibytes(bytes)} MiB)`),
    `${count(settings.references)} page reads and writes, the same on three machines:`,
    '',
    tableOf(['', 'all the memory', 'part + tmem', 'part + swap'], rows),
    '',
    `${(report.comparedBytes / 2 ** 30).toFixed(1)} GiB of reads were compared with what was last written: ${report.wrongBytes} wrong bytes.`,
    ...(settings.directIo
      ? []
      : [
          pc.yellow(
            'The file system refused direct I/O, so that the operating system cached swapped pages in memory. The times of',
          ),
          pc.yellow(
            'the last machine are too good, and disk reads and writes count requests, not disk operations. Try --dir on a disk.',
          ),
        ]),
    '',
    'What to try next:',
    hint(`${tmem} demo --help`, 'options: your own pages (--input), other sizes, another seed'),
    hint(`${tmem} bench core`, 'what one put and one get cost'),
    hint(`${tmem} stack`, 'the layers to build stacks of'),
    hint('README.md', '"A stack in ten lines", "The packages"'),
  ].join('\n')
}

/** How to start the program here: in a checkout it is not on the PATH. */
const tmem = process.env['npm_package_name'] === 'tmem-workspace' ? 'npm run -s tmem --' : 'tmem'
const hint = (what: string, why: string): string => `  ${what.padEnd(tmem.length + 16)}${why}`

const count = (number: number): string => number.toLocaleString('en-US')

const mebibytes = (bytes: number): string => (bytes / 2 ** 20).toFixed(1)
