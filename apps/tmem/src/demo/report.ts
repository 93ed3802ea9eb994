/** What the demo found: as one JSON document, and as a table. */
import { basePageSize, formatBytes } from '@tmem/core'
import pc from 'picocolors'
import { tableOf } from '../terminal.ts'
import type { Source } from './input.ts'

/** What one of the three machines did. */
export interface MachineReport {
  readonly name: 'memory' | 'tmem' | 'swap'
  /** Time of the whole stream, without the checks that come after it. */
  readonly seconds: number
  /** `seconds` over those of the first machine. */
  readonly slowdown: number
  /** Pages that left memory, and pages that came back. */
  readonly swapOuts: number
  readonly swapIns: number
  /** I/O operations on the swap file, and the bytes that they moved. */
  readonly diskWrites: number
  readonly diskReads: number
  readonly diskBytes: number
  /** Pages that tmem refused and that went to the swap file instead, by reason. */
  readonly refusals: Readonly<Record<string, number>>
  /** At the end of the stream. All zero but the ratio where the machine has no tmem. */
  readonly tmem: TmemReport
  /** What rests where at the end of the stream: empty where the machine has no stack of places. */
  readonly places: readonly PlaceReport[]
}

/** What a place of a stack holds; `directory`: pages that repeat one word, which need no place. */
export interface PlaceReport {
  readonly name: string
  readonly pages: number
  /** Bytes that it uses, in memory or on disk. */
  readonly bytes: number
}

/** What tmem held, and what it cost. */
export interface TmemReport {
  readonly pages: number
  /** Memory that it used, metadata included. */
  readonly bytes: number
  /** Bytes of the pages over the bytes used; 1 when there are no pages. */
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
  /** The part of the swap machine's disk I/O operations that the tmem machine did without; 0 if it did more. */
  readonly diskIoAvoided: number
  /** Bytes that were read and compared with what was last written there, on all machines. */
  readonly comparedBytes: number
  /** A wrong byte ends the run: there is no report with another number. */
  readonly wrongBytes: 0
}

/** The table, and what to do next. */
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
    `${(report.comparedBytes / 2 ** 30).toFixed(1)} GiB that were read were compared with what was last written: ${report.wrongBytes} wrong bytes.`,
    ...(settings.directIo
      ? []
      : [
          pc.yellow(
            'The file system refused direct I/O: the operating system kept swapped pages in memory of its own, so that the times of',
          ),
          pc.yellow(
            'the last machine are too good, and disk reads and writes are requests, not what the disk did. Try --dir on a disk.',
          ),
        ]),
    '',
    'How to go on:',
    hint(`${tmem} demo --help`, 'your own pages (--input), other sizes, another seed'),
    hint(`${tmem} bench core`, 'what one put and one get cost'),
    hint(`${tmem} stack`, 'the layers to build stacks of'),
    hint('README.md', '"A stack in ten lines", "The packages"'),
  ].join('\n')
}

/** How the program is started here: in a checkout it is on nobody's PATH. */
const tmem = process.env['npm_package_name'] === 'tmem-workspace' ? 'npm run -s tmem --' : 'tmem'
const hint = (what: string, why: string): string => `  ${what.padEnd(tmem.length + 16)}${why}`

const count = (number: number): string => number.toLocaleString('en-US')

const mebibytes = (bytes: number): string => (bytes / 2 ** 20).toFixed(1)
