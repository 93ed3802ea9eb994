/** A report: the data that stands in its own file, as a page. */
import { render, type VNode } from 'preact'
import { useState } from 'preact/hooks'
import type { BenchData, Curve, DemoData, DemoMachine, ExploreData, ExploreSide, ReportData } from '../report.ts'
import { bytesSteps, Chart } from './chart.tsx'
import { bytesText, count, rateText } from './model.ts'
import { Scroll } from './scroll.tsx'
import { Sequence } from './sequence.tsx'
import { ThemeButton, useKeys, useTheme } from './theme.tsx'

function Report({ data }: { readonly data: ReportData }): VNode {
  const [theme, change] = useTheme()
  const { machine, time } = data
  useKeys((key) => {
    if (key !== 't') return false
    change()
    return true
  })
  return (
    <div class="page">
      <header class="head">
        <h1>tmem {data.kind}</h1>
        <span class="about">
          {machine.cpu}, {machine.cores} cores, {bytesText(machine.memoryBytes)}, {machine.platform} {machine.kernel}{' '}
          {machine.arch}, Node {machine.node}; <time dateTime={new Date(time).toISOString()}>{dateText(time)}</time>
        </span>
        <ThemeButton theme={theme} change={change} />
      </header>
      {data.kind === 'demo' && <Demo demo={data.demo} curves={data.curves} theme={theme} />}
      {data.kind === 'bench' && <Bench bench={data.bench} />}
      {data.kind === 'explore' && <Explore rules={data.explore} />}
    </div>
  )
}

const dateText = (time: number): string => `${new Date(time).toISOString().slice(0, 16).replace('T', ' ')} UTC`

// ---------------------------------------------------------------------------------------------------------------
// The demo

const titles: Readonly<Record<string, string>> = {
  memory: 'all the memory',
  tmem: 'part + tmem',
  swap: 'part + swap',
}

function Demo({
  demo,
  curves,
  theme,
}: {
  readonly demo: DemoData
  readonly curves: readonly Curve[]
  readonly theme: string
}): VNode {
  const { settings, input, machines } = demo
  const withTmem = machines.find(({ name }) => name === 'tmem')
  const withSwap = machines.find(({ name }) => name === 'swap')
  return (
    <main>
      <dl class="figures">
        <div>
          <dt>disk I/O avoided</dt>
          <dd>
            {(demo.diskIoAvoided * 100).toFixed(1)} %<small>tmem against the swap file alone</small>
          </dd>
        </div>
        <div>
          <dt>slowdown with tmem</dt>
          <dd>
            {withTmem?.slowdown.toFixed(2) ?? '–'} ×<small>of {settingsText(settings.memoryBytes)} all in memory</small>
          </dd>
        </div>
        <div>
          <dt>slowdown with swap</dt>
          <dd>
            {withSwap?.slowdown.toFixed(2) ?? '–'} ×
            <small>{settings.directIo ? 'direct I/O' : 'through the system’s cache'}</small>
          </dd>
        </div>
        <div>
          <dt>wrong bytes</dt>
          <dd>
            {count(demo.wrongBytes)}
            <small>of {bytesText(demo.comparedBytes)} compared</small>
          </dd>
        </div>
      </dl>
      <div class="panels">
        <OverTime
          title="Faults"
          what="pages that came back, since the start"
          of="swapIns"
          curves={curves}
          theme={theme}
          text={count}
        />
        <OverTime
          title="Disk I/O"
          what="reads and writes of the swap file, since the start"
          of="disk"
          curves={curves}
          theme={theme}
          text={count}
        />
        <OverTime
          title="Memory"
          what="frames, and what tmem uses"
          of="memoryBytes"
          curves={curves}
          theme={theme}
          text={bytesText}
        />
        <OverTime title="Progress" what="% of the stream" of="done" curves={curves} theme={theme} text={rateText} />
        <section class="panel full" aria-labelledby="table">
          <h2 id="table">The three machines</h2>
          <Scroll label="figures of the three machines">
            <DemoTable demo={demo} />
          </Scroll>
          <p class="note wrap">
            {count(input.pages)} pages of real bytes from {input.sources.map(({ path }) => path).join(', ')};{' '}
            {count(settings.references)} reads and writes, the same on all; seed {settings.seed}.
          </p>
        </section>
      </div>
    </main>
  )
}

const settingsText = (bytes: number): string => bytesText(bytes)

interface OverTimeProps {
  readonly title: string
  readonly what: string
  readonly of: 'swapIns' | 'disk' | 'memoryBytes' | 'done'
  readonly curves: readonly Curve[]
  readonly theme: string
  readonly text: (value: number) => string
}

function OverTime({ title, what, of, curves, theme, text }: OverTimeProps): VNode {
  // One scale of time for all of them: each has a value at its own moments only.
  const times = [...new Set(curves.flatMap(({ seconds }) => seconds))].sort((a, b) => a - b)
  const valuesOf = (curve: Curve): readonly number[] => {
    if (of === 'disk') return curve.diskReads.map((reads, n) => reads + curve.diskWrites[n]!)
    return of === 'done' ? curve.done.map((part) => part * 100) : curve[of]
  }
  const lines = curves.map((curve, n) => {
    const at = new Map(curve.seconds.map((second, point) => [second, valuesOf(curve)[point]!]))
    return {
      label: titles[curve.name] ?? curve.name,
      color: `c${n + 1}`,
      values: times.map((time) => at.get(time) ?? null),
    }
  })
  const id = title.toLowerCase().replaceAll(/\W+/g, '-')
  return (
    <section class="panel half" aria-labelledby={id}>
      <h2 id={id}>
        {title} <small>{what}</small>
      </h2>
      <Chart
        title={`${title} over time: ${what}`}
        times={times}
        isClock={false}
        spansGaps
        lines={lines}
        text={text}
        {...(text === bytesText ? { steps: bytesSteps } : {})}
        theme={theme}
        height={15}
      />
    </section>
  )
}

function DemoTable({ demo: { machines, settings, diskIoAvoided } }: { readonly demo: DemoData }): VNode {
  const row = (label: string, cell: (machine: DemoMachine) => string): VNode => (
    <tr key={label}>
      <th scope="row">{label}</th>
      {machines.map((machine) => (
        <td key={machine.name}>{cell(machine)}</td>
      ))}
    </tr>
  )
  const withTmem = (cell: (tmem: DemoMachine['tmem']) => string) => (machine: DemoMachine) =>
    machine.name === 'tmem' ? cell(machine.tmem) : '–'
  const places = [...new Set(machines.flatMap((machine) => machine.places.map(({ name }) => name)))]
  const reasons = [...new Set(machines.flatMap((machine) => Object.keys(machine.refusals)))].sort()
  return (
    <table class="folds">
      <thead>
        <tr>
          <th scope="col">
            <span class="hidden">what</span>
          </th>
          {machines.map(({ name }) => (
            <th scope="col" key={name}>
              {titles[name] ?? name}
            </th>
          ))}
        </tr>
      </thead>
      <tbody>
        {row('memory', ({ name }) => bytesText(name === 'memory' ? settings.memoryBytes : settings.partBytes))}
        {row('tmem', ({ name }) => (name === 'tmem' ? bytesText(settings.budgetBytes) : '–'))}
        {row('time', ({ seconds }) => `${seconds.toFixed(2)} s`)}
        {row('slowdown', ({ slowdown }) => `${slowdown.toFixed(2)} ×`)}
        {row('swap-outs', ({ swapOuts }) => count(swapOuts))}
        {row('swap-ins', ({ swapIns }) => count(swapIns))}
        {row('disk writes', ({ diskWrites }) => count(diskWrites))}
        {row('disk reads', ({ diskReads }) => count(diskReads))}
        {row('disk bytes', ({ diskBytes }) => bytesText(diskBytes))}
        {row('disk I/O avoided', ({ name }) => (name === 'tmem' ? `${(diskIoAvoided * 100).toFixed(1)} %` : '–'))}
        {reasons.map((reason) => row(`refused: ${reason}`, ({ refusals }) => count(refusals[reason] ?? 0)))}
        {places.map((name) =>
          row(`at the end in ${name}`, (machine) => {
            const place = machine.places.find((one) => one.name === name)
            return place === undefined ? '–' : `${count(place.pages)} pages, ${bytesText(place.bytes)}`
          }),
        )}
        {row(
          'used by tmem, metadata included',
          withTmem(({ bytes }) => bytesText(bytes)),
        )}
        {row(
          'compression ratio',
          withTmem(({ ratio }) => ratio.toFixed(2)),
        )}
        {row(
          'CPU in tmem',
          withTmem(({ cpuSeconds }) => `${cpuSeconds.toFixed(2)} s`),
        )}
      </tbody>
    </table>
  )
}

// ---------------------------------------------------------------------------------------------------------------
// A bench

function Bench({ bench: { suite, summary, quick, rows } }: { readonly bench: BenchData }): VNode {
  const measured = rows.filter(({ skipped }) => skipped === undefined)
  const judged = measured.filter(({ met }) => met !== undefined)
  return (
    <main>
      <dl class="figures">
        <div>
          <dt>{suite}</dt>
          <dd>
            {count(measured.length)} rows<small>{summary}</small>
          </dd>
        </div>
        <div>
          <dt>goals met</dt>
          <dd>
            {judged.length === 0 ? '–' : `${judged.filter(({ met }) => met === true).length} of ${judged.length}`}
            <small>
              {judged.length === 0
                ? 'no row has one'
                : quick
                  ? 'a quick run: rough figures'
                  : 'medians of rounds in turns'}
            </small>
          </dd>
        </div>
      </dl>
      <div class="panels">
        <section class="panel full" aria-labelledby="rows">
          <h2 id="rows">
            Every row <small>against its reference and its goal</small>
          </h2>
          <Scroll label="rows of the bench">
            <table>
              <thead>
                <tr>
                  <th scope="col">what</th>
                  <th scope="col">ours</th>
                  <th scope="col">reference</th>
                  <th scope="col">ratio</th>
                  <th scope="col">goal</th>
                  <th scope="col">
                    <span class="hidden">how far from the goal</span>
                  </th>
                  <th scope="col">verdict</th>
                </tr>
              </thead>
              <tbody>
                {rows.map((row) => (
                  <BenchRow key={row.name} row={row} />
                ))}
              </tbody>
            </table>
          </Scroll>
          <p class="note">
            ratio: our cost over the reference’s; below 1 we are cheaper. goal: the largest ratio (without a reference:
            value) that is wanted. The bar is ours; the mark is the goal.
          </p>
        </section>
      </div>
    </main>
  )
}

function BenchRow({ row }: { readonly row: BenchData['rows'][number] }): VNode {
  const { name, skipped, unit = '', value, reference, reference_value: other, ratio, goal, met } = row
  if (skipped !== undefined)
    return (
      <tr>
        <th scope="row">{name}</th>
        <td colSpan={6} class="note wrap">
          skipped: {skipped}
        </td>
      </tr>
    )
  const figure = ratio ?? value ?? 0
  const whole = goal === undefined ? 0 : Math.max(goal, figure) * 1.1
  return (
    <tr>
      <th scope="row">{name}</th>
      <td>
        {value} {unit}
      </td>
      <td>{reference === undefined ? '–' : `${reference} ${other}`}</td>
      <td>{ratio?.toFixed(2) ?? '–'}</td>
      <td>{goal === undefined ? '–' : `≤ ${goal}`}</td>
      <td>
        {whole > 0 && (
          <div class={`goal ${met === true ? 'good' : 'bad'}`}>
            <i style={{ width: `${(100 * figure) / whole}%` }} />
            <u style={{ left: `${(100 * goal!) / whole}%` }} />
          </div>
        )}
      </td>
      <td class={met === undefined ? '' : met ? 'good' : 'bad'}>{met === undefined ? '–' : met ? 'met' : 'missed'}</td>
    </tr>
  )
}

// ---------------------------------------------------------------------------------------------------------------
// Interleavings

function Explore({ rules }: { readonly rules: readonly ExploreData[] }): VNode {
  const [chosen, choose] = useState(0)
  const [at, go] = useState(0)
  const rule = rules[chosen]!
  const longest = Math.max(rule.kept.history.length, rule.broken?.history.length ?? 0)
  const step = (to: number): void => go(Math.max(0, Math.min(longest, to)))
  useKeys((key) => {
    if (key === 'ArrowRight' || key === 'ArrowDown' || key === 'j') step(at + 1)
    else if (key === 'ArrowLeft' || key === 'ArrowUp' || key === 'k') step(at - 1)
    else if (key === 'Home') step(0)
    else if (key === 'End') step(longest)
    else return false
    return true
  })
  return (
    <main>
      {rules.length > 1 && (
        <div class="row tabs">
          <label for="rule">Rule</label>
          <select
            id="rule"
            value={chosen}
            onChange={({ currentTarget }) => {
              choose(Number(currentTarget.value))
              go(0)
            }}
          >
            {rules.map(({ name }, n) => (
              <option key={name} value={n}>
                {name}
              </option>
            ))}
          </select>
        </div>
      )}
      <section class="panel" style={{ margin: '0.9rem 0' }} aria-labelledby="name">
        <h2 id="name">{rule.name}</h2>
        <p>{rule.rule}</p>
        {rule.source !== '' && <p class="note">{rule.source}</p>}
        <div class="row" style={{ marginTop: '0.7rem' }}>
          <button type="button" onClick={() => step(0)} disabled={at === 0}>
            Start
          </button>
          <button type="button" onClick={() => step(at - 1)} disabled={at === 0}>
            Back
          </button>
          <button type="button" onClick={() => step(at + 1)} disabled={at === longest}>
            Next step
          </button>
          <button type="button" onClick={() => step(longest)} disabled={at === longest}>
            End
          </button>
          <span class="note">
            step {at} of {longest}; keys <kbd>←</kbd> <kbd>→</kbd> <kbd>Home</kbd> <kbd>End</kbd>
          </span>
        </div>
      </section>
      <div class="sides">
        <Side title={rule.broken === null ? 'The scenario' : 'Rule kept'} side={rule.kept} at={at} />
        {rule.broken !== null && <Side title={`Rule broken: ${rule.breaks}`} side={rule.broken} at={at} />}
      </div>
    </main>
  )
}

function Side({ title, side, at }: { readonly title: string; readonly side: ExploreSide; readonly at: number }): VNode {
  const isOver = at >= side.history.length
  return (
    <section class="panel" aria-label={title}>
      <h2>
        {title} <small>{side.found}</small>
      </h2>
      <Sequence caption={title} actors={side.actors} history={side.history} at={at} />
      <p class={`verdict ${!isOver ? 'note' : side.message === null ? 'good' : 'bad'}`}>
        {!isOver ? 'to be gone on with' : (side.message ?? 'nothing is wrong at the end')}
      </p>
    </section>
  )
}

const data = JSON.parse(document.getElementById('data')!.textContent!) as ReportData
render(<Report data={data} />, document.getElementById('page')!)
