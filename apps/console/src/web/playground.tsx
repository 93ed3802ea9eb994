/**
 * The playground: a stack that is composed from a text and played in the page, and races of page mapping that are taken
 * step by step. Nothing of it needs a server.
 */
import { TmemError } from '@tmem/core'
import { begin, explore, followed, type Moment, type RuleEntry, type Scenario } from '@tmem/interleave'
import { pageMapping } from '@tmem/mmu-notifier'
import { type ComponentChildren, render, type VNode } from 'preact'
import { useEffect, useRef, useState } from 'preact/hooks'
import { count } from './model.ts'
import { type Access, type Done, maxPages, parseTrace, playgroundFactories, Replay } from './replay.ts'
import { Scroll } from './scroll.tsx'
import { Sequence } from './sequence.tsx'
import { ThemeButton, useKeys, useTheme } from './theme.tsx'

const stacks: readonly { readonly name: string; readonly text: string }[] = [
  { name: 'zcache, then a slow place', text: 'zcache(limit=256KiB) > slowMemory(size=4MiB)' },
  { name: 'zcache alone', text: 'zcache(limit=256KiB)' },
  { name: 'plain memory, then a slow place', text: 'memory(limit=256KiB) > slowMemory(size=4MiB)' },
]

const traces: readonly { readonly name: string; readonly text: () => string }[] = [
  { name: 'fill, then a hot part', text: () => `w 0-255\n${Array.from({ length: 12 }, () => 'r 0-47').join('\n')}` },
  { name: 'two passes over everything', text: () => 'w 0-255\nr 0-255\nr 0-255' },
  { name: 'skewed reads and writes', text: skewed },
]

/** A stream in which few pages have most of the accesses; always the same. */
function skewed(): string {
  let state = 1
  const next = (): number => {
    state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0
    return state / 2 ** 32
  }
  const lines = ['w 0-255']
  for (let n = 0; n < 1500; n++) lines.push(`${next() < 0.3 ? 'w' : 'r'} ${Math.floor(256 * next() ** 3)}`)
  return lines.join('\n')
}

function App(): VNode {
  const [theme, change] = useTheme()
  const [view, look] = useState<'stack' | 'race'>('stack')
  useKeys((key) => {
    if (key === 't') change()
    else if (key === '1') look('stack')
    else if (key === '2') look('race')
    else return false
    return true
  })
  return (
    <div class="page">
      <header class="head">
        <h1>tmem playground</h1>
        <span class="about">the packages themselves, at work in this page</span>
        <ThemeButton theme={theme} change={change} />
      </header>
      <nav class="tabs" aria-label="Views">
        <button type="button" aria-current={view === 'stack' ? 'true' : undefined} onClick={() => look('stack')}>
          A stack at work
        </button>
        <button type="button" aria-current={view === 'race' ? 'true' : undefined} onClick={() => look('race')}>
          Races of page mapping
        </button>
      </nav>
      <main style={{ marginTop: '0.9rem' }}>{view === 'stack' ? <StackView /> : <RaceView />}</main>
      <footer class="foot">
        <span>
          Keys: <kbd>1</kbd> a stack, <kbd>2</kbd> races, <kbd>t</kbd> dark or light
        </span>
      </footer>
    </div>
  )
}

// ---------------------------------------------------------------------------------------------------------------
// A stack

interface Playing {
  readonly replay: Replay
  readonly trace: readonly Access[]
}

function StackView(): VNode {
  const [text, setText] = useState(stacks[0]!.text)
  const [traceText, setTrace] = useState(traces[0]!.text())
  const [error, setError] = useState('')
  const [playing, play] = useState<Playing | undefined>(undefined)
  const [runs, run] = useState(false)
  const [speed, setSpeed] = useState(32)
  const [, redraw] = useState(0)
  const answers = useRef<Done[]>([])
  const isBusy = useRef(false)
  const now = useRef(playing)
  now.current = playing

  const failed = (reason: unknown): void => {
    run(false)
    if (!(reason instanceof TmemError || reason instanceof RangeError)) console.error(reason)
    setError((reason as Error).message)
  }
  const open = async (): Promise<Playing | undefined> => {
    try {
      const trace = parseTrace(traceText)
      const replay = await Replay.open(text)
      await now.current?.replay.close()
      answers.current = []
      setError('')
      const opened = { replay, trace }
      play(opened)
      return opened
    } catch (reason) {
      failed(reason)
      return undefined
    }
  }
  const take = async (of: Playing, steps: number): Promise<void> => {
    if (isBusy.current) return
    isBusy.current = true
    try {
      for (let n = 0; n < steps && of.replay.done < of.trace.length; n++) {
        const done = await of.replay.take(of.trace[of.replay.done]!)
        answers.current = [...answers.current.slice(-7), done]
      }
      if (of.replay.done >= of.trace.length) run(false)
    } catch (reason) {
      failed(reason)
    } finally {
      isBusy.current = false
      redraw((n) => n + 1)
    }
  }
  const step = async (): Promise<void> => {
    const of = playing ?? (await open())
    if (of !== undefined) await take(of, 1)
  }
  useEffect(() => {
    if (!runs || playing === undefined) return undefined
    const timer = setInterval(() => void take(playing, Math.max(1, Math.round(speed / 20))), 1000 / Math.min(20, speed))
    return () => clearInterval(timer)
  }, [runs, playing, speed])

  return (
    <div class="panels">
      <section class="panel narrow" aria-labelledby="compose">
        <h2 id="compose">Compose</h2>
        <form
          onSubmit={(event) => {
            event.preventDefault()
            void open().then((opened) => opened !== undefined && run(true))
          }}
        >
          <Chosen
            id="stack"
            label="Stack"
            choices={stacks.map(({ name }) => name)}
            choose={(n) => setText(stacks[n]!.text)}
          />
          <textarea
            aria-label="text of the stack"
            rows={2}
            style={{ width: '100%' }}
            spellcheck={false}
            value={text}
            onInput={({ currentTarget }) => setText(currentTarget.value)}
          />
          <Chosen
            id="trace"
            label="Trace"
            choices={traces.map(({ name }) => name)}
            choose={(n) => setTrace(traces[n]!.text())}
          />
          <textarea
            aria-label="trace"
            rows={7}
            style={{ width: '100%' }}
            spellcheck={false}
            value={traceText}
            onInput={({ currentTarget }) => setTrace(currentTarget.value)}
          />
          <div class="row" style={{ marginTop: '0.5rem' }}>
            <button type="submit">Open and play</button>
            <button type="button" disabled={playing === undefined || runs} onClick={() => run(true)}>
              Go on
            </button>
            <button type="button" disabled={!runs} onClick={() => run(false)}>
              Pause
            </button>
            <button type="button" disabled={runs} onClick={() => void step()}>
              Step
            </button>
          </div>
          <div class="row" style={{ marginTop: '0.5rem' }}>
            <label for="speed">Accesses a second</label>
            <input
              id="speed"
              type="range"
              min={1}
              max={2000}
              value={speed}
              onInput={({ currentTarget }) => setSpeed(Number(currentTarget.value))}
            />
            <span class="value">{count(speed)}</span>
          </div>
        </form>
        <p class="answer error" role="status">
          {error}
        </p>
        <p class="note">
          A trace has lines such as <code>w 0-63</code> (written), <code>r 7</code> (read), <code>d 7</code>{' '}
          (discarded), pages below {count(maxPages)}. Layers: {playgroundFactories.map(({ name }) => name).join(', ')}.
          Each page that is read is compared with what was last written.
        </p>
      </section>
      <Pages playing={playing} answers={answers.current} />
      <Counts playing={playing} />
    </div>
  )
}

interface ChosenProps {
  readonly id: string
  readonly label: string
  readonly choices: readonly string[]
  readonly choose: (number: number) => void
  /** Default: the browser knows. */
  readonly chosen?: number
}

function Chosen({ id, label, choices, choose, chosen }: ChosenProps): VNode {
  return (
    <div class="row" style={{ margin: '0.4rem 0' }}>
      <label for={id}>{label}</label>
      <select
        id={id}
        {...(chosen === undefined ? {} : { value: chosen })}
        onChange={({ currentTarget }) => choose(Number(currentTarget.value))}
      >
        {choices.map((name, n) => (
          <option key={name} value={n}>
            {name}
          </option>
        ))}
      </select>
    </div>
  )
}

const placeName = (names: readonly string[], place: number): string =>
  place < 0 ? 'nowhere' : place === 0 ? 'directory' : names[place - 1]!

function Pages({
  playing,
  answers,
}: {
  readonly playing: Playing | undefined
  readonly answers: readonly Done[]
}): VNode {
  const replay = playing?.replay
  const trace = playing?.trace ?? []
  const pages = Math.max(0, ...trace.map(({ page }) => page + 1))
  const touched = answers.at(-1)?.access.page
  const cells = Array.from({ length: pages }, (_, page) => replay?.placeOf(page) ?? -1)
  return (
    <section class="panel broad" aria-labelledby="pages">
      <h2 id="pages">
        Pages{' '}
        <small>
          {count(replay?.done ?? 0)} of {count(trace.length)} accesses
        </small>
      </h2>
      <div class="legend">
        {['directory', ...(replay?.names ?? [])].map((name, n) => (
          <span key={n}>
            <i class={`swatch c${Math.min(n, 4)}`} />
            {name} <b class="value">{count(cells.filter((place) => place === n).length)}</b>
          </span>
        ))}
      </div>
      <div
        class="grid"
        role="img"
        aria-label="pages by number, each in the colour of its place"
        style={{ '--columns': Math.ceil(Math.sqrt(4 * pages)) }}
      >
        {cells.map((place, page) => (
          <i
            key={page}
            class={`${place < 0 ? '' : `held c${Math.min(place, 4)}`}${page === touched ? ' touched' : ''}`}
            title={`page ${page}: ${placeName(replay?.names ?? [], place)}`}
          />
        ))}
      </div>
      <ol class="events answers" aria-label="the last accesses">
        {answers.toReversed().map(({ access: { kind, page }, answer }, n) => (
          <li key={n}>
            <span class="mono">
              {kind} {page}
            </span>
            <span>{answer}</span>
          </li>
        ))}
      </ol>
    </section>
  )
}

function Counts({ playing }: { readonly playing: Playing | undefined }): VNode {
  const chain = playing?.replay.stats()
  const node = chain?.name === 'chain' ? chain : chain?.children.find(({ name }) => name === 'chain')
  const places = node?.children.filter(({ name }) => name !== 'refused') ?? []
  const columns = [
    ['put', 'put here'],
    ['sunk_in', 'sunk here'],
    ['rose', 'risen here'],
    ['passed_down', 'gone down'],
    ['raised', 'gone up'],
    ['gone', 'given up'],
    ['reads', 'reads'],
  ] as const
  return (
    <section class="panel full" aria-labelledby="counts">
      <h2 id="counts">
        What moved <small>pages, since the stack was opened</small>
      </h2>
      <Scroll label="what moved">
        <table>
          <thead>
            <tr>
              <th scope="col">place</th>
              <th scope="col">pages</th>
              {columns.map(([key, title]) => (
                <th scope="col" key={key}>
                  {title}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {places.map(({ name, counters, children }, n) => {
              const moves = children.find((child) => child.name === 'moves')?.counters ?? {}
              return (
                <tr key={n}>
                  <th scope="row">
                    <i class={`swatch c${Math.min(n + 1, 4)}`} />
                    {name}
                  </th>
                  <td>{count(counters['pages'] ?? 0)}</td>
                  {columns.map(([key]) => (
                    <td key={key}>{count(moves[key] ?? 0)}</td>
                  ))}
                </tr>
              )
            })}
          </tbody>
        </table>
      </Scroll>
      {places.length === 0 && <p class="note">Open a stack: its places are counted here.</p>}
    </section>
  )
}

// ---------------------------------------------------------------------------------------------------------------
// Races

function RaceView(): VNode {
  const [chosen, choose] = useState(0)
  const [isBroken, breakIt] = useState(true)
  const entry = pageMapping.entries[chosen]!
  return (
    <Race key={`${chosen} ${isBroken}`} entry={entry} isBroken={isBroken}>
      <Chosen
        id="rule"
        label="Rule"
        chosen={chosen}
        choices={pageMapping.entries.map(({ name }) => name)}
        choose={choose}
      />
      <p>{entry.rule}</p>
      <p class="note">
        {entry.source} ({entry.version})
      </p>
      <div class="row" style={{ margin: '0.6rem 0' }}>
        <button type="button" aria-pressed={!isBroken} onClick={() => breakIt(false)}>
          Rule kept
        </button>
        <button type="button" aria-pressed={isBroken} onClick={() => breakIt(true)}>
          Rule broken
        </button>
      </div>
      {isBroken && <p class="note">What the broken one does: {entry.mutant.breaks}</p>}
    </Race>
  )
}

interface RaceProps {
  readonly entry: RuleEntry
  readonly isBroken: boolean
  readonly children: ComponentChildren
}

/** One scenario, at a moment of one history. */
function Race({ entry, isBroken, children }: RaceProps): VNode {
  const scenario = (): Scenario<object> => (isBroken ? entry.mutant.scenario() : entry.scenario())
  const [moments, setMoments] = useState<readonly Moment<object>[]>(() => [begin(scenario())])
  const [found, setFound] = useState('')
  const [ahead, setAhead] = useState<readonly number[]>([])
  const actors = scenario().actors.map(({ name }) => name)
  const moment = moments.at(-1)!
  const take = (actor: number): void => {
    if (moment.next[actor]?.ready === true) setMoments([...moments, moment.take(actor)])
  }
  const back = (): void => {
    if (moments.length > 1) setMoments(moments.slice(0, -1))
  }
  const follow = (): void => {
    const planned = ahead[moment.history.length]
    const actor =
      planned !== undefined && moment.next[planned]?.ready === true
        ? planned
        : moment.next.findIndex(({ ready }) => ready)
    if (actor >= 0) take(actor)
  }
  const all = (): void => {
    const result = explore(scenario())
    setFound(
      result.kind === 'holds'
        ? `Nothing is wrong in all ${count(result.states)} states.`
        : result.kind === 'bounded'
          ? `Nothing was wrong in ${count(result.states)} states; there are more.`
          : `${result.message}: ${result.history.length} steps lead there; "Next" takes them.`,
    )
    // Both sides can be taken through the mutant's turns.
    const broken = result.kind === 'violated' ? result : explore(entry.mutant.scenario())
    setAhead(broken.kind === 'violated' ? broken.history.map(({ actor }) => actor) : [])
    setMoments([begin(scenario())])
  }
  useKeys((key) => {
    if (key === 'ArrowRight') follow()
    else if (key === 'ArrowLeft') back()
    else if (/^[a-d]$/.test(key)) take(key.charCodeAt(0) - 97)
    else return false
    return true
  })
  const whole =
    ahead.length === 0
      ? moment.history
      : [...moment.history, ...followed(scenario(), ahead).history.slice(moment.history.length)]
  return (
    <div class="panels">
      <section class="panel narrow" aria-labelledby="race">
        <h2 id="race">{entry.name}</h2>
        {children}
        <div class="row" style={{ margin: '0.6rem 0' }}>
          <button type="button" onClick={all}>
            Run all interleavings
          </button>
          <button type="button" onClick={back} disabled={moments.length === 1}>
            Back
          </button>
          <button type="button" onClick={follow} disabled={!moment.next.some(({ ready }) => ready)}>
            Next
          </button>
        </div>
        <p role="status">{found}</p>
        <h3 style={{ fontSize: '0.95rem', margin: '0.8rem 0 0.3rem' }}>Whose turn is it?</h3>
        <ol>
          {moment.next.map(({ label, ready }, actor) => (
            <li key={actor} class="row" style={{ margin: '0.3rem 0' }}>
              <button type="button" disabled={!ready} onClick={() => take(actor)}>
                <kbd>{String.fromCharCode(97 + actor)}</kbd> {actors[actor]}
              </button>
              <span class={ready ? '' : 'note'}>
                {label === null ? 'has ended' : ready ? label : `waits: ${label}`}
              </span>
            </li>
          ))}
        </ol>
        <p class="note">
          Keys: <kbd>a</kbd>, <kbd>b</kbd> … an actor’s turn, <kbd>→</kbd> next, <kbd>←</kbd> back.
        </p>
      </section>
      <section class="panel broad" aria-labelledby="history">
        <h2 id="history">
          What happened <small>{count(moment.history.length)} steps</small>
        </h2>
        <Scroll label="what happened">
          <Sequence caption="what happened" actors={actors} history={whole} at={moment.history.length} />
        </Scroll>
        {moment.trouble !== null && <p class="verdict bad">{moment.trouble.message}</p>}
        {moment.trouble === null && !moment.next.some(({ ready }) => ready) && (
          <p class="verdict good">Everybody has ended, and nothing is wrong.</p>
        )}
      </section>
    </div>
  )
}

render(<App />, document.getElementById('app')!)
