/**
 * The page's connection to its server: states as they come, and whether there is a server.
 *
 * A stream that ends is opened again, whatever the reason: a browser does so itself only where the connection broke,
 * and not where a server said no.
 */
import type { ConsoleState } from '../state.ts'

/** Told of each state, and of why there is none. */
export interface Listener {
  state(state: ConsoleState): void
  /** Nothing has come for a while, or the stream has ended; since when (milliseconds since 1970), and why. */
  away(since: number, why: string): void
}

/** After so long without a state the server is taken for gone. States come every second. */
const silentMs = 4000
const againMs = 1000

/** Listens until the function that it returns is called. */
export function connect(listener: Listener): () => void {
  let source: EventSource | undefined
  let heard = Date.now()
  let isOver = false
  let again: ReturnType<typeof setTimeout> | undefined
  const open = (): void => {
    if (isOver) return
    source?.close()
    source = new EventSource('api/events')
    source.addEventListener('message', ({ data }: MessageEvent<string>) => {
      heard = Date.now()
      listener.state(JSON.parse(data) as ConsoleState)
    })
    source.addEventListener('error', () => {
      source?.close()
      const before = heard
      void whyNot().then((why) => {
        if (heard === before && !isOver) listener.away(heard, why)
      })
      clearTimeout(again)
      again = setTimeout(open, againMs)
    })
  }
  open()
  const watch = setInterval(() => {
    if (Date.now() - heard < silentMs) return
    listener.away(heard, 'it does not answer')
    if (source?.readyState === EventSource.CLOSED) return
    clearTimeout(again)
    open()
  }, silentMs)
  return () => {
    isOver = true
    clearInterval(watch)
    clearTimeout(again)
    source?.close()
  }
}

/** What the server says to a question, if it is there. */
async function whyNot(): Promise<string> {
  try {
    const answer = await fetch('api/state')
    return answer.ok ? 'the stream was ended' : ((await answer.json()) as { error: string }).error
  } catch (error) {
    return error instanceof TypeError ? 'there is no connection' : String(error)
  }
}

/** What the pages of a browser say to the thread that has their stream, and what that says to them. */
type Said = 'hello' | 'bye'
type Told = { readonly state: ConsoleState } | { readonly away: { readonly since: number; readonly why: string } }

/**
 * Listens through a thread that all pages of this browser share. Browsers have six connections to a server, which six
 * streams would take: the seventh page would not even load.
 */
export function listen(listener: Listener): () => void {
  if (!('SharedWorker' in globalThis)) return connect(listener)
  let stop: (() => void) | undefined
  const thread = new SharedWorker('stream.js')
  const { port } = thread
  port.addEventListener('message', ({ data }: MessageEvent<Told>) => {
    if ('state' in data) listener.state(data.state)
    else listener.away(data.away.since, data.away.why)
  })
  port.start()
  const say = (said: Said): void => port.postMessage(said)
  const hide = (): void => say('bye')
  // It may come back as it was.
  const show = ({ persisted }: PageTransitionEvent): void => {
    if (persisted) say('hello')
  }
  addEventListener('pagehide', hide)
  addEventListener('pageshow', show)
  thread.addEventListener('error', () => {
    // Without it, alone.
    stop ??= connect(listener)
  })
  say('hello')
  return () => {
    removeEventListener('pagehide', hide)
    removeEventListener('pageshow', show)
    hide()
    stop?.()
  }
}

/** Where pages come in. */
export interface Pages {
  addEventListener(name: 'connect', come: (event: MessageEvent) => void): void
}

/**
 * What the thread does: one stream for all pages, as long as there is one. A page that comes is told the last state.
 */
export function share(pages: Pages): void {
  const ports = new Set<MessagePort>()
  let last: Told | undefined
  let stop: (() => void) | undefined
  const tell = (told: Told): void => {
    last = told
    for (const port of ports) port.postMessage(told)
  }
  pages.addEventListener('connect', ({ ports: [port] }) => {
    port!.addEventListener('message', ({ data }: MessageEvent<Said>) => {
      if (data === 'hello') {
        ports.add(port!)
        if (last !== undefined) port!.postMessage(last)
        stop ??= connect({
          state: (state) => tell({ state }),
          away: (since, why) => tell({ away: { since, why } }),
        })
        return
      }
      ports.delete(port!)
      if (ports.size > 0) return
      stop?.()
      stop = last = undefined
    })
    port!.start()
  })
}
