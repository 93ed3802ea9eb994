/**
 * Reports: pages that are one file each, with their data in them, for who has no server and no network.
 *
 * Invariant: data is only ever text. In the file it is JSON in which no `<` is left, so that nothing of it ends the
 * element that it stands in; on the page it becomes text nodes.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { staticFolder } from './server.ts'

/** What each report begins with: by this a file is known as one. */
export const reportMark = '<!doctype html>\n<!-- a report of tmem -->\n'

/** What was run on. */
export interface ReportMachine {
  readonly cpu: string
  readonly cores: number
  readonly memoryBytes: number
  readonly platform: string
  readonly arch: string
  readonly kernel: string
  readonly node: string
}

/** What a report is about. */
export type ReportData = {
  /** When it was made: milliseconds since 1970. */
  readonly time: number
  readonly machine: ReportMachine
} & (
  | { readonly kind: 'demo'; readonly demo: DemoData; readonly curves: readonly Curve[] }
  | { readonly kind: 'bench'; readonly bench: BenchData }
  | { readonly kind: 'explore'; readonly explore: readonly ExploreData[] }
)

/** What one of the demo's machines did, as in `tmem demo --json`. */
export interface DemoMachine {
  readonly name: string
  readonly seconds: number
  readonly slowdown: number
  readonly swapOuts: number
  readonly swapIns: number
  readonly diskWrites: number
  readonly diskReads: number
  readonly diskBytes: number
  readonly refusals: Readonly<Record<string, number>>
  readonly tmem: { readonly pages: number; readonly bytes: number; readonly ratio: number; readonly cpuSeconds: number }
  readonly places: readonly { readonly name: string; readonly pages: number; readonly bytes: number }[]
}

/** The document of `tmem demo --json`, as far as it is shown. */
export interface DemoData {
  readonly input: {
    readonly pages: number
    readonly sources: readonly { readonly path: string; readonly bytes: number }[]
  }
  readonly settings: {
    readonly seed: number
    readonly memoryBytes: number
    readonly partBytes: number
    readonly budgetBytes: number
    readonly references: number
    readonly directIo: boolean
  }
  readonly machines: readonly DemoMachine[]
  readonly diskIoAvoided: number
  readonly comparedBytes: number
  readonly wrongBytes: number
}

/** A machine of the demo over time: columns of the same length. Counts are since its start. */
export interface Curve {
  readonly name: string
  readonly seconds: readonly number[]
  /** Part of the stream that is done, 0 to 1. */
  readonly done: readonly number[]
  readonly swapIns: readonly number[]
  readonly swapOuts: readonly number[]
  readonly diskReads: readonly number[]
  readonly diskWrites: readonly number[]
  /** Bytes of memory that hold pages: frames of the program, and what tmem uses. */
  readonly memoryBytes: readonly number[]
}

/** The document of `tmem bench --json`. */
export interface BenchData {
  readonly suite: string
  readonly summary: string
  readonly quick: boolean
  readonly rows: readonly {
    readonly name: string
    readonly skipped?: string
    readonly unit?: string
    readonly value?: number
    readonly reference?: string
    readonly reference_value?: number
    readonly ratio?: number
    readonly goal?: number
    readonly met?: boolean
  }[]
}

/** One side of a rule: what was found, and the history that shows it. */
export interface ExploreSide {
  readonly actors: readonly string[]
  readonly found: string
  /** What is wrong, in words; null: nothing is. */
  readonly message: string | null
  readonly history: readonly { readonly actor: number; readonly label: string; readonly shows: string }[]
}

/** A rule, kept and broken; or a scenario of somebody's own, which has no other side. */
export interface ExploreData {
  readonly name: string
  readonly rule: string
  readonly source: string
  readonly breaks: string
  readonly kept: ExploreSide
  readonly broken: ExploreSide | null
}

/** The whole file. Throws when the pages were not built. */
export function reportPage(data: ReportData): string {
  const read = (name: string): string => readFileSync(join(staticFolder, name), 'utf8')
  const title = { demo: 'tmem demo', bench: 'tmem bench', explore: 'tmem explore' }[data.kind]
  const json = JSON.stringify(data).replaceAll('<', String.raw`\u003c`)
  // In a script the end of the element must not stand in a string.
  const script = read('report.js').replaceAll('</script', String.raw`<\/script`)
  return `${reportMark}<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="content-security-policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="color-scheme" content="dark light">
<title>${title}</title>
<style>
${read('page.css')}
</style>
</head>
<body>
<div id="page"></div>
<script type="application/json" id="data">${json}</script>
<script>
${script}
</script>
</body>
</html>
`
}
