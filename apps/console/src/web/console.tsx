/**
 * The console: one device at a time, from the stack down to single pages.
 *
 * Invariant: what a server says becomes text, never markup. A figure that is not known is a dash in the same place.
 */
import { Fragment, render, type VNode } from 'preact'
import { useEffect, useRef, useState } from 'preact/hooks'
import type { ConsoleDevice, ConsoleEvent, ConsoleState, ExplainedSlot } from '../state.ts'
import { bytesSteps, Chart } from './chart.tsx'
import { listen } from './connection.ts'
import {
  ageText,
  bytesOf,
  bytesText,
  count,
  counter,
  type Flows,
  flowsOf,
  latenciesOf,
  nanosecondsText,
  type PlaceBytes,
  type PlaceFlow,
  rateText,
  swapUseOf,
  totalsOf,
} from './model.ts'
import { Scroll } from './scroll.tsx'
import { ThemeButton, useKeys, useTheme } from './theme.tsx'

/** What a page remembers of a second, of each device. */
interface Sample {
  readonly time: number
  readonly flows: ReadonlyMap<string, Flows | undefined>
  readonly bytes: ReadonlyMap<string, { readonly memory: number; readonly file: number; readonly swap: number | null }>
}

/** Ten minutes. */
const maxSamples = 600

function sampleOf(before: ConsoleState | undefined, now: ConsoleState): Sample {
  const { devices } = now
  return {
    time: Date.now() / 1000,
    flows: new Map(devices.map(({ name }) => [name, flowsOf(name, before, now)])),
    bytes: new Map(
      devices.map((device) => {
        const { memory, file } = totalsOf(device)
        return [device.name, { memory, file, swap: device.swap?.usedBytes ?? null }]
      }),
    ),
  }
}

interface Shown {
  readonly state: ConsoleState | undefined
  readonly samples: readonly Sample[]
  readonly away: { readonly since: number; readonly why: string } | undefined
}

/** States as they come, with what the page remembers. What another run of the server said is forgotten. */
function useStates(): Shown {
  const [shown, show] = useState<Shown>({ state: undefined, samples: [], away: undefined })
  useEffect(
    () =>
      listen({
        state: (state) =>
          show((old) => {
            const isSame = old.state?.server.run === state.server.run
            const samples = isSame ? old.samples.slice(-maxSamples + 1) : []
            return { state, samples: [...samples, sampleOf(old.state, state)], away: undefined }
          }),
        away: (since, why) => show((old) => ({ ...old, away: { since, why } })),
      }),
    [],
  )
  return shown
}

function App(): VNode {
  const { state, samples, away } = useStates()
  const [theme, changeTheme] = useTheme()
  const [chosen, choose] = useState<string | undefined>(undefined)
  const devices = state?.devices ?? []
  const device = devices.find(({ name }) => name === chosen) ?? devices[0]
  const explain = useRef<HTMLInputElement>(null)
  useKeys((key) => {
    if (key === 't') changeTheme()
    else if (key === '/') explain.current?.focus()
    else if (/^[1-9]$/.test(key) && devices[Number(key) - 1] !== undefined) choose(devices[Number(key) - 1]!.name)
    else return false
    return true
  })
  return (
    <div class="page">
      <header class="head">
        <h1>tmem</h1>
        <span class="live">
          <i class={away === undefined && state !== undefined ? 'dot' : 'dot away'} />
          {away !== undefined ? 'no answer' : state === undefined ? 'connecting' : 'live'}
        </span>
        <span class="about mono">{state?.server.stack ?? ''}</span>
        <ThemeButton theme={theme} change={changeTheme} />
      </header>
      <div role="status">
        {away !== undefined && (
          <p class="banner">
            No state since {timeText(away.since)}: {away.why}. The page tries again every second; figures are those of
            then.
          </p>
        )}
      </div>
      <main>
        {devices.length > 1 && (
          <nav class="tabs" aria-label="Devices">
            {devices.map(({ name }, n) => (
              <button
                type="button"
                key={name}
                aria-current={name === device?.name ? 'true' : undefined}
                onClick={() => choose(name)}
                title={n < 9 ? `key: ${n + 1}` : ''}
              >
                {name}
              </button>
            ))}
          </nav>
        )}
        {state !== undefined && device !== undefined && (
          <Device key={device.name} state={state} device={device} samples={samples} theme={theme} input={explain} />
        )}
        {state !== undefined && device === undefined && <p class="banner">The server has no device.</p>}
      </main>
      <footer class="foot">
        <span>
          {state === undefined ? '' : `process ${state.server.pid}`}
          {state?.server.nbd.map((address) => `, NBD on ${address}`)}
          {state?.server.fuse === null || state === undefined ? '' : `, files in ${state.server.fuse}`}
        </span>
        <span>
          Keys: <kbd>1</kbd>–<kbd>9</kbd> device, <kbd>/</kbd> explain a page, <kbd>t</kbd> dark or light.{' '}
          <a href="playground.html">Playground</a>
        </span>
      </footer>
    </div>
  )
}

interface DeviceProps {
  readonly state: ConsoleState
  readonly device: ConsoleDevice
  readonly samples: readonly Sample[]
  readonly theme: string
  readonly input: { current: HTMLInputElement | null }
}

function Device({ state, device, samples, theme, input }: DeviceProps): VNode {
  const flows = samples.at(-1)?.flows.get(device.name)
  return (
    <>
      <Figures device={device} />
      <div class="panels three">
        <Stack device={device} flows={flows} />
        <Bytes device={device} />
        <Rates device={device} samples={samples} theme={theme} />
        <Taken device={device} samples={samples} theme={theme} />
        <Ages device={device} />
        <Latencies device={device} />
        <Knobs device={device} writable={state.server.writable} />
        <div class="half column">
          <Explain device={device} input={input} />
          <Events events={state.events} />
        </div>
      </div>
    </>
  )
}

function Figures({ device }: { readonly device: ConsoleDevice }): VNode {
  const totals = totalsOf(device)
  const swap = swapUseOf(device)
  const size = counter(device.stats, 'disksize')
  const { clients, opens } = device.users
  return (
    <dl class="figures">
      <Figure name={device.name} value={bytesText(size)} more={`NBD connections ${clients}, open files ${opens}`} />
      <Figure
        name="held"
        value={bytesText(totals.logical)}
        more={`${count(totals.pages)} pages${totals.lost > 0 ? `, ${count(totals.lost)} lost` : ''}`}
      />
      <Figure name="memory" value={bytesText(totals.memory)} more="all that is taken for it" />
      <Figure name="file" value={bytesText(totals.file)} more="in places that wait" />
      <Figure name="ratio" value={totals.ratio?.toFixed(2) ?? '–'} more="pages in memory to memory" />
      <Figure
        name="kernel's swap"
        value={swap === undefined ? '–' : bytesText(swap.kernel * 4096)}
        more={
          swap === undefined
            ? 'not swapped to, or not told'
            : `${count(swap.stale)} stale here, ${count(swap.unwritten)} never written`
        }
      />
    </dl>
  )
}

function Figure({
  name,
  value,
  more,
}: {
  readonly name: string
  readonly value: string
  readonly more: string
}): VNode {
  return (
    <div>
      <dt>{name}</dt>
      <dd>
        {value}
        <small>{more}</small>
      </dd>
    </div>
  )
}

const colorOf = (number: number): string => `c${Math.min(number, 4)}`

function Stack({ device, flows }: { readonly device: ConsoleDevice; readonly flows: Flows | undefined }): VNode {
  const [directory, ...places] = bytesOf(device)
  return (
    <section class="panel narrow" aria-labelledby="stack">
      <h2 id="stack">
        Stack <small>pages a second, now</small>
      </h2>
      <ol>
        <li class="layer c0">
          <span class="name">requests</span>
          <span class="held">
            {rate(flows?.reads)} read, {rate(flows?.writes)} written
          </span>
          <span class="part whole">
            {count(directory!.pages)} pages repeat one word, and rest in the directory; {rate(flows?.freed)} discarded
          </span>
        </li>
        {places.map((place, n) => {
          const flow = flows?.places[n]
          return (
            <Fragment key={n}>
              <Between below={flow} isTop={n === 0} />
              <Layer place={place} number={n + 1} />
            </Fragment>
          )
        })}
      </ol>
      {flows !== undefined && flows.refused.length > 0 && (
        <p class="note bad">
          Refused to the requests: {flows.refused.map(({ reason, rate: of }) => `${reason} ${rateText(of)}`).join(', ')}
        </p>
      )}
    </section>
  )
}

const rate = (value: number | undefined): string => (value === undefined ? '–' : rateText(value))

interface BetweenProps {
  readonly below: PlaceFlow | undefined
  readonly isTop: boolean
}

/** What flows into a layer from above, and out of it upwards. */
function Between({ below, isTop }: BetweenProps): VNode {
  return (
    <li class="flow">
      <Arrow sign="↓" name="put" value={below?.put} />
      {!isTop && <Arrow sign="↓" name="sunk" value={below?.sunk} />}
      {!isTop && <Arrow sign="↑" name="risen" value={below?.up} />}
      {isTop && <Arrow sign="×" name="given up" value={below?.gone} />}
      {below?.refused.map(({ reason, rate: of }) => (
        <span key={reason} class="refused">
          <span>refused, {reason}</span>
          <b>{rateText(of)}</b>
        </span>
      ))}
    </li>
  )
}

interface ArrowProps {
  readonly sign: string
  readonly name: string
  readonly value: number | undefined
}

function Arrow({ sign, name, value }: ArrowProps): VNode {
  return (
    <span class={value === undefined || value === 0 ? 'none' : ''}>
      <span>
        <span aria-hidden="true">{sign}</span> {name}
      </span>
      <b>{rate(value)}</b>
    </span>
  )
}

function Layer({ place, number }: { readonly place: PlaceBytes; readonly number: number }): VNode {
  const { name, kind, pages, blocks, metadata, waste, used, limit } = place
  const whole = Math.max(limit, used, 1)
  const part = (bytes: number): { width: string } => ({ width: `${(100 * bytes) / whole}%` })
  const what = { memory: 'memory', waits: 'a file, or another machine', foreign: "a hypervisor's", directory: '' }[kind]
  return (
    <li class={`layer ${colorOf(number)}`}>
      <span class="name">{name}</span>
      <span class="held">{count(pages)} pages</span>
      <span class="part">{what}</span>
      <span class="held part">
        {bytesText(used)}
        {limit > 0 ? ` of ${bytesText(limit)}` : ''}
      </span>
      <div
        class={`bar ${colorOf(number)}`}
        role="img"
        aria-label={`${name}: ${Math.round((100 * used) / whole)} % used`}
      >
        <i style={part(blocks)} />
        <i class="metadata" style={part(metadata)} />
        <i class="waste" style={part(waste)} />
      </div>
    </li>
  )
}

function Bytes({ device }: { readonly device: ConsoleDevice }): VNode {
  const places = bytesOf(device)
  const totals = totalsOf(device)
  const whole = Math.max(1, totals.logical)
  const sum = (of: (place: PlaceBytes) => number): number => places.reduce((all, place) => all + of(place), 0)
  return (
    <section class="panel broad" aria-labelledby="bytes">
      <h2 id="bytes">
        Where the bytes are <small>{bytesText(totals.logical)} of pages</small>
      </h2>
      <div class="bar tall" role="img" aria-label="pages by place; the table has the figures">
        {places.map(({ name, logical }, n) => (
          <i key={n} class={colorOf(n)} title={name} style={{ width: `${(100 * logical) / whole}%` }} />
        ))}
      </div>
      <Scroll label="bytes by place">
        <table>
          <thead>
            <tr>
              <th scope="col">place</th>
              <th scope="col">pages</th>
              <th scope="col">as pages</th>
              <th scope="col">blocks</th>
              <th scope="col">metadata</th>
              <th scope="col">waste</th>
              <th scope="col">taken</th>
            </tr>
          </thead>
          <tbody>
            {places.map((place, n) => (
              <tr key={n} data-place={place.name}>
                <th scope="row">
                  <i class={`swatch ${colorOf(n)}`} />
                  {place.name}
                </th>
                <td>{count(place.pages)}</td>
                <td>{bytesText(place.logical)}</td>
                <td>{bytesText(place.blocks)}</td>
                <td>{bytesText(place.metadata)}</td>
                <td>{bytesText(place.waste)}</td>
                <td>{bytesText(place.used)}</td>
              </tr>
            ))}
          </tbody>
          <tfoot>
            <tr>
              <th scope="row">all</th>
              <td>{count(sum(({ pages }) => pages) + totals.lost)}</td>
              <td>{bytesText(sum(({ logical }) => logical) + totals.lost * 4096)}</td>
              <td>{bytesText(sum(({ blocks }) => blocks))}</td>
              <td>{bytesText(sum(({ metadata }) => metadata))}</td>
              <td>{bytesText(sum(({ waste }) => waste))}</td>
              <td>{bytesText(sum(({ used }) => used))}</td>
            </tr>
          </tfoot>
        </table>
      </Scroll>
      <p class="note">
        blocks + metadata + waste = taken. Waste is rounding, holes, and what is free in what was taken.
        {totals.lost > 0 ? ` ${count(totals.lost)} pages are lost, and counted in the sum.` : ''}
      </p>
    </section>
  )
}

interface OverTime {
  readonly device: ConsoleDevice
  readonly samples: readonly Sample[]
  readonly theme: string
}

function Rates({ device: { name }, samples, theme }: OverTime): VNode {
  const line = (of: (flows: Flows) => number): (number | null)[] =>
    samples.map(({ flows }) => {
      const seen = flows.get(name)
      return seen === undefined ? null : of(seen)
    })
  const sum = (flows: Flows, key: 'sunk' | 'up'): number => flows.places.reduce((all, place) => all + place[key], 0)
  return (
    <section class="panel half" aria-labelledby="rates">
      <h2 id="rates">
        Pages a second <small>since the page is open, ten minutes at most</small>
      </h2>
      <Chart
        title="Pages a second over time: read, written, sunk, risen"
        times={samples.map(({ time }) => time)}
        isClock
        text={rateText}
        theme={theme}
        lines={[
          { label: 'read', color: 'c1', values: line(({ reads }) => reads) },
          { label: 'written', color: 'c2', values: line(({ writes }) => writes) },
          { label: 'sunk', color: 'c3', values: line((flows) => sum(flows, 'sunk')) },
          { label: 'risen', color: 'c4', values: line((flows) => sum(flows, 'up')) },
        ]}
      />
    </section>
  )
}

function Taken({ device: { name }, samples, theme }: OverTime): VNode {
  const line = (key: 'memory' | 'file' | 'swap'): (number | null)[] =>
    samples.map(({ bytes }) => bytes.get(name)?.[key] ?? null)
  return (
    <section class="panel half" aria-labelledby="taken">
      <h2 id="taken">
        Bytes taken <small>and what the kernel has swapped here</small>
      </h2>
      <Chart
        title="Bytes over time: memory, file, the kernel's swap"
        times={samples.map(({ time }) => time)}
        isClock
        text={bytesText}
        steps={bytesSteps}
        theme={theme}
        lines={[
          { label: 'memory', color: 'c1', values: line('memory') },
          { label: 'file', color: 'c2', values: line('file') },
          { label: "kernel's swap", color: 'c3', values: line('swap') },
        ]}
      />
    </section>
  )
}

function Ages({ device: { ages } }: { readonly device: ConsoleDevice }): VNode {
  const bounds = ages?.bounds ?? []
  const most = Math.max(1, ages?.seen ?? 1)
  return (
    <section class="panel half" aria-labelledby="ages">
      <h2 id="ages">
        How long pages were not touched{' '}
        <small>{ages === null ? 'not known' : `% of the ${count(ages.seen)} pages that were looked at`}</small>
      </h2>
      {ages !== null && (
        <Scroll label="age of pages by place">
          <table class="heat">
            <thead>
              <tr>
                <th scope="col">place</th>
                {bounds.map((bound) => (
                  <th scope="col" key={bound}>
                    &lt; {ageText(bound)}
                  </th>
                ))}
                <th scope="col">older</th>
              </tr>
            </thead>
            <tbody>
              {ages.places.map(({ name, pages }, n) => (
                <tr key={n}>
                  <th scope="row" class="place">
                    <i class={`swatch ${colorOf(n)}`} />
                    {name}
                  </th>
                  {pages.map((number, column) => (
                    <td key={column} style={{ '--heat': number / most }}>
                      {((100 * number) / most).toFixed(1)}
                    </td>
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        </Scroll>
      )}
    </section>
  )
}

function Latencies({ device }: { readonly device: ConsoleDevice }): VNode {
  const rows = latenciesOf(device)
  return (
    <section class="panel half" aria-labelledby="latency">
      <h2 id="latency">
        How long it takes <small>percentiles since the start</small>
      </h2>
      {rows.length === 0 ? (
        <p class="note">This server does not measure it.</p>
      ) : (
        <Scroll label="latencies">
          <table>
            <thead>
              <tr>
                <th scope="col">what</th>
                <th scope="col">count</th>
                <th scope="col">50 %</th>
                <th scope="col">90 %</th>
                <th scope="col">99 %</th>
                <th scope="col">longest</th>
              </tr>
            </thead>
            <tbody>
              {rows.map(({ name, count: number, percentiles }) => (
                <tr key={name}>
                  <th scope="row">{name}</th>
                  <td>{count(number)}</td>
                  {percentiles.map((value, n) => (
                    <td key={n}>{nanosecondsText(value)}</td>
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        </Scroll>
      )}
    </section>
  )
}

/** Knobs whose value is bytes. */
const inBytes: ReadonlySet<string> = new Set(['disksize', 'mem_limit', 'mem_used_max'])

function Knobs({ device, writable }: { readonly device: ConsoleDevice; readonly writable: boolean }): VNode {
  const [token, setToken] = useState('')
  const [said, say] = useState<{ readonly text: string; readonly isError: boolean } | undefined>(undefined)
  const turn = async (knob: string, value: string): Promise<void> => {
    say({ text: `${knob} …`, isError: false })
    const { text, isError } = await asked('api/knob', {
      method: 'POST',
      headers: { 'content-type': 'application/json', authorization: `Bearer ${token}` },
      body: JSON.stringify({ device: device.name, knob, value }),
    })
    say({ text: `${knob} ${value}: ${text}`, isError })
  }
  return (
    <section class="panel half" aria-labelledby="knobs">
      <h2 id="knobs">
        Knobs <small>{writable ? 'whoever has the token may turn them' : 'for reading'}</small>
      </h2>
      {writable && (
        <div class="row">
          <label for="token">Token</label>
          <input
            id="token"
            type="password"
            autocomplete="off"
            value={token}
            onInput={({ currentTarget }) => setToken(currentTarget.value)}
          />
        </div>
      )}
      <Scroll label="knobs">
        <table class="left">
          <thead>
            <tr>
              <th scope="col">knob</th>
              <th scope="col">value</th>
              {writable && <th scope="col">turn</th>}
            </tr>
          </thead>
          <tbody>
            {Object.entries(device.knobs).map(([name, value]) => (
              <tr key={name}>
                <th scope="row" class="mono">
                  {name}
                </th>
                <td class="wrap">
                  {value === '' ? <span class="note">acts</span> : value}
                  {inBytes.has(name) && Number(value) > 0 && <span class="note"> = {bytesText(Number(value))}</span>}
                </td>
                {writable && (
                  <td class="knob">
                    <Turn name={name} turn={turn} />
                  </td>
                )}
              </tr>
            ))}
          </tbody>
        </table>
      </Scroll>
      <p class={`answer ${said?.isError === true ? 'error' : ''}`} role="status">
        {said?.text ?? ''}
      </p>
    </section>
  )
}

interface TurnProps {
  readonly name: string
  readonly turn: (knob: string, value: string) => Promise<void>
}

function Turn({ name, turn }: TurnProps): VNode {
  const [value, set] = useState('')
  return (
    <form
      class="row"
      onSubmit={(event) => {
        event.preventDefault()
        void turn(name, value)
      }}
    >
      <input
        aria-label={`new value of ${name}`}
        value={value}
        size={10}
        onInput={({ currentTarget }) => set(currentTarget.value)}
      />
      <button type="submit" aria-label={`turn ${name}`}>
        Turn
      </button>
    </form>
  )
}

/** What a server answers to a request, in words. */
async function asked(url: string, request: RequestInit): Promise<{ readonly text: string; readonly isError: boolean }> {
  try {
    const answer = await fetch(url, request)
    const body = (await answer.json()) as { readonly answer?: string; readonly error?: string }
    return answer.ok
      ? { text: body.answer === '' ? 'done' : String(body.answer), isError: false }
      : { text: String(body.error), isError: true }
  } catch (error) {
    return { text: `the server has not answered: ${(error as Error).message}`, isError: true }
  }
}

function Events({ events }: { readonly events: readonly ConsoleEvent[] }): VNode {
  return (
    <section class="panel" aria-labelledby="events">
      <h2 id="events">
        Events <small>the newest first</small>
      </h2>
      {events.length === 0 ? (
        <p class="note">Nothing has happened that anybody has to know.</p>
      ) : (
        <ol class="events" tabindex={0} aria-label="events">
          {events.toReversed().map(({ number, time, level, message }) => (
            <li key={number}>
              <time dateTime={new Date(time).toISOString()}>{timeText(time)}</time>
              <span class={level === 'error' ? 'bad' : level === 'warn' ? 'warn' : ''}>{message}</span>
            </li>
          ))}
        </ol>
      )}
    </section>
  )
}

interface ExplainProps {
  readonly device: ConsoleDevice
  readonly input: { current: HTMLInputElement | null }
}

function Explain({ device, input }: ExplainProps): VNode {
  const [found, find] = useState<ExplainedSlot | string | undefined>(undefined)
  const explain = async (): Promise<void> => {
    const text = input.current?.value.trim() ?? ''
    const offset = offsetOf(text)
    if (offset === undefined) {
      find(`${text} is no offset: expected bytes, such as 4096 or 0x1000, or page 7`)
      return
    }
    try {
      const answer = await fetch(`api/explain?${new URLSearchParams({ device: device.name, offset: String(offset) })}`)
      const body = (await answer.json()) as ExplainedSlot & { readonly error?: string }
      find(answer.ok ? body : String(body.error))
    } catch (error) {
      find(`the server has not answered: ${(error as Error).message}`)
    }
  }
  return (
    <section class="panel" aria-labelledby="explain">
      <h2 id="explain">
        Explain a page <small>where it is, and what became of it</small>
      </h2>
      <form
        class="row"
        onSubmit={(event) => {
          event.preventDefault()
          void explain()
        }}
      >
        <label for="offset">Offset in {device.name}</label>
        <input id="offset" ref={input} size={18} placeholder="4096, 0x1000, page 7" />
        <button type="submit">Explain</button>
      </form>
      <div class="answer" role="status">
        {typeof found === 'string' ? <span class="error">{found}</span> : found !== undefined && <Facts of={found} />}
      </div>
    </section>
  )
}

function Facts({ of }: { readonly of: ExplainedSlot }): VNode {
  return (
    <dl class="facts">
      {Object.entries(of).map(([name, value]) => (
        <Fragment key={name}>
          <dt>{name}</dt>
          <dd>{Array.isArray(value) ? <List of={value} /> : textOf(value)}</dd>
        </Fragment>
      ))}
    </dl>
  )
}

/** Facts of which there are many, one a line. */
function List({ of }: { readonly of: readonly unknown[] }): VNode {
  if (of.length === 0) return <>none</>
  return (
    <ol>
      {of.map((value, n) => (
        <li key={n}>{textOf(value)}</li>
      ))}
    </ol>
  )
}

function textOf(value: unknown): string {
  if (value === null || value === undefined) return '–'
  if (typeof value === 'object')
    return Object.entries(value)
      .filter(([, part]) => part !== null)
      .map(([name, part]) => `${name} ${textOf(part)}`)
      .join(', ')
  return typeof value === 'string' ? value : JSON.stringify(value)
}

/** Bytes: as a number, in hex, or as the number of a page. */
function offsetOf(text: string): number | undefined {
  const [, page] = /^page (\d{1,10})$/.exec(text) ?? []
  if (page !== undefined) return Number(page) * 4096
  return /^(\d{1,15}|0x[\da-f]{1,12})$/i.test(text) ? Number(text) : undefined
}

const timeText = (time: number): string => new Date(time).toTimeString().slice(0, 8)

render(<App />, document.getElementById('app')!)
