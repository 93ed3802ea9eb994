/** The server of the console, asked by real clients of HTTP; the pages themselves are in the system tests. */
import { once } from 'node:events'
import { Agent, type IncomingMessage, request } from 'node:http'
import { connect, type Socket } from 'node:net'
import { setTimeout } from 'node:timers/promises'
import { expect, onTestFinished, test } from 'vitest'
import { type Console, type ConsoleOptions, type ConsoleState, serveConsole } from '../src/index.ts'

const token = 'sixteen letters-'

/** A state with a text that a page must not take for markup. */
const state = (atMs: number): ConsoleState => ({
  atMs,
  server: { pid: 1, run: 'a', stack: '<img src=x onerror=alert(1)>', nbd: [], fuse: null, writable: true },
  devices: [],
  servers: [],
  events: [],
})

interface Subject {
  readonly turned: string[]
  asked: number
}

async function served(
  options: Partial<ConsoleOptions> = {},
): Promise<{ console: Console; subject: Subject; port: number }> {
  const subject: Subject = { turned: [], asked: 0 }
  const console = await serveConsole({
    host: '127.0.0.1',
    port: 0,
    everyMs: 20,
    subject: {
      state: () => state(subject.asked++),
      turn: async (device, knob, value) => {
        if (knob === 'none') throw new Error('there is no knob none')
        subject.turned.push(`${device} ${knob} ${value}`)
        return 'as you like'
      },
      explain: (device, offset) => ({ device, offset }),
    },
    ...options,
  })
  onTestFinished(() => console.close())
  return { console, subject, port: Number(new URL(console.url).port) }
}

interface Asked {
  readonly method?: string
  readonly headers?: Record<string, string>
  readonly body?: string
}

/** Any request, also with a Host that `fetch` would not send. */
function ask(
  port: number,
  path: string,
  { method = 'GET', headers = {}, body }: Asked = {},
): Promise<{ status: number; text: string; headers: IncomingMessage['headers'] }> {
  return new Promise((resolve, reject) => {
    const sent = request({ port, host: '127.0.0.1', path, method, headers, agent: false }, (answer) => {
      let text = ''
      answer.setEncoding('utf8').on('data', (part: string) => {
        text += part
      })
      answer.on('end', () => resolve({ status: answer.statusCode!, text, headers: answer.headers }))
    })
    sent.on('error', reject)
    sent.end(body)
  })
}

/** A stream that is read; what has come of it so far. */
async function stream(port: number, agent?: Agent): Promise<{ status: number; text: () => string; end: () => void }> {
  const sent = request({
    port,
    host: '127.0.0.1',
    path: '/api/events',
    ...(agent === undefined ? { agent: false } : { agent }),
  })
  sent.on('error', () => undefined)
  sent.end()
  const [answer] = (await once(sent, 'response')) as [IncomingMessage]
  let text = ''
  answer.setEncoding('utf8').on('data', (part: string) => {
    text += part
  })
  answer.on('error', () => undefined)
  return { status: answer.statusCode!, text: () => text, end: () => sent.destroy() }
}

async function until(holds: () => boolean): Promise<void> {
  for (let n = 0; !holds(); n++) {
    if (n === 500) throw new Error('it does not come to that')
    await setTimeout(20)
  }
}

test('serves the page, what it is made of, and nothing else', async () => {
  const { port } = await served()
  const page = await ask(port, '/')
  expect(page.status).toBe(200)
  expect(page.text).toContain('<script type="module" src="console.js">')
  expect(page.headers['content-security-policy']).toMatch(/default-src 'none'.*frame-ancestors 'none'/)
  expect((await ask(port, '/console.js')).headers['content-type']).toContain('javascript')
  const { etag } = (await ask(port, '/page.css')).headers
  expect((await ask(port, '/page.css', { headers: { 'if-none-match': etag! } })).status).toBe(304)
  for (const path of ['/../package.json', '/%2e%2e/package.json', '/static.json', '/console.js/', '/server.ts'])
    expect([path, (await ask(port, path)).status]).toEqual([path, 404])
  expect((await ask(port, '/', { method: 'DELETE' })).status).toBe(405)
  expect((await ask(port, '/', { method: 'HEAD' })).text).toBe('')
})

test('answers to its address and to localhost, and to no name that somebody points here', async () => {
  const { port } = await served()
  for (const host of ['127.0.0.1', `127.0.0.1:${port}`, 'localhost', `localhost:${port}`, '[::1]', '192.0.2.7:80'])
    expect([host, (await ask(port, '/api/state', { headers: { host } })).status]).toEqual([host, 200])
  for (const host of ['evil.example', `evil.example:${port}`, '127.0.0.1.evil.example', 'localhost.evil.example'])
    expect([host, (await ask(port, '/api/state', { headers: { host } })).status]).toEqual([host, 421])
})

const json = { 'content-type': 'application/json', authorization: `Bearer ${token}` }
const knob = JSON.stringify({ device: 'a', knob: 'mem_limit', value: '1' })

test('a knob is turned by who has the token, from a page of its own', async () => {
  const { port, subject } = await served({ token })
  const turn = (headers: Record<string, string>, body = knob): Promise<number> =>
    ask(port, '/api/knob', { method: 'POST', headers, body }).then(({ status }) => status)
  expect(await turn(json)).toBe(200)
  expect(await turn({ ...json, origin: `http://127.0.0.1:${port}`, host: `127.0.0.1:${port}` })).toBe(200)
  expect(subject.turned).toEqual(['a mem_limit 1', 'a mem_limit 1'])

  expect(await turn({ 'content-type': 'application/json' })).toBe(401)
  expect(await turn({ ...json, authorization: 'Bearer sixteen letters' })).toBe(401)
  expect(await turn({ ...json, origin: 'https://evil.example' })).toBe(403)
  expect(await turn({ ...json, origin: 'null' })).toBe(403)
  expect(await turn({ ...json, 'sec-fetch-site': 'cross-site' })).toBe(403)
  expect(await turn({ ...json, 'sec-fetch-site': 'same-site', 'sec-fetch-mode': 'navigate' })).toBe(403)
  expect(await turn({ ...json, 'content-type': 'text/plain' })).toBe(415)
  expect(await turn({ ...json, host: 'evil.example' })).toBe(421)
  expect(await turn(json, '{')).toBe(400)
  expect(await turn(json, 'null')).toBe(400)
  expect(await turn(json, '{"device":"a","knob":"mem_limit","value":1}')).toBe(400)
  expect(await turn(json, JSON.stringify({ device: 'a', knob: 'x', value: 'y'.repeat(5000) }))).toBe(413)
  expect(await turn(json, JSON.stringify({ device: 'a', knob: 'none', value: '' }))).toBe(422)
  expect((await ask(port, '/api/knob', { headers: json })).status).toBe(405)
  expect(subject.turned).toHaveLength(2)
})

test('without a token nothing can be turned', async () => {
  const { port, subject } = await served()
  const { status, text } = await ask(port, '/api/knob', { method: 'POST', headers: json, body: knob })
  expect(status).toBe(403)
  expect(JSON.parse(text).error).toContain('--http-token')
  expect(subject.turned).toEqual([])
})

test('pages of other sites read nothing; a link from there may be followed', async () => {
  const { port } = await served()
  const site = { 'sec-fetch-site': 'cross-site' }
  expect((await ask(port, '/api/state', { headers: site })).status).toBe(403)
  expect((await ask(port, '/api/events', { headers: site })).status).toBe(403)
  expect((await ask(port, '/', { headers: { ...site, 'sec-fetch-mode': 'navigate' } })).status).toBe(200)
})

test('explains a page, and says what it expects', async () => {
  const { port } = await served()
  expect(JSON.parse((await ask(port, '/api/explain?device=a&offset=4096')).text)).toEqual({ device: 'a', offset: 4096 })
  for (const query of ['', '?device=a', '?device=a&offset=-1', '?device=a&offset=1e9', '?offset=1'])
    expect([query, (await ask(port, `/api/explain${query}`)).status]).toEqual([query, 400])
})

test('two hundred pages have one state each time, are bounded, and cost nothing once they are closed', async () => {
  const { console, port, subject } = await served({ maxPages: 200 })
  const agent = new Agent({ maxSockets: 300 })
  onTestFinished(() => agent.destroy())
  const pages = await Promise.all(Array.from({ length: 200 }, () => stream(port, agent)))
  expect(console.pages).toBe(200)
  await until(() => pages.every(({ text }) => text().split('\n\n').length > 4))
  // Each of 200 pages has at least three states, and no more were made than the clock allows for one.
  const { asked } = subject
  const most = Math.max(...pages.map(({ text }) => text().split('data: ').length - 1))
  expect(asked).toBeLessThanOrEqual(most + 3)
  expect((await ask(port, '/api/events')).status).toBe(503)
  expect((await ask(port, '/api/state')).status).toBe(200)
  for (const page of pages) page.end()
  await until(() => console.pages === 0)
  await setTimeout(60)
  const before = subject.asked
  await setTimeout(100)
  expect(subject.asked).toBe(before)
})

test('a page that does not read is not waited for, and nothing is kept for it', async () => {
  const servers = [{ name: 'x'.repeat(2 ** 20), counters: {}, children: [] }]
  let made = 0
  const { console, port } = await served({
    everyMs: 10,
    subject: { state: () => ({ ...state(made++), servers }), turn: async () => '' },
  })
  const deaf: Socket = connect(port, '127.0.0.1')
  deaf.on('error', () => undefined)
  onTestFinished(() => void deaf.destroy())
  deaf.write('GET /api/events HTTP/1.1\r\nHost: localhost\r\n\r\n')
  await until(() => console.pages === 1)
  deaf.pause()
  const page = await stream(port)
  // The other one goes on: forty states of a MiB each, of which the deaf one takes what fits into the sockets.
  await until(() => page.text().split('data: ').length > 40)
  page.end()
  const seen: number[] = []
  let rest = ''
  deaf.setEncoding('latin1').on('data', (part: string) => {
    rest += part
    for (const [all, number] of rest.matchAll(/"atMs":(\d+),/g)) {
      seen.push(Number(number))
      rest = rest.slice(rest.indexOf(all) + all.length)
    }
  })
  deaf.resume()
  const gaps = (): number[] => seen.slice(1).map((number, n) => number - seen[n]!)
  await until(() => gaps().some((gap) => gap > 20))
  // What came is in order, each once.
  expect(gaps().every((gap) => gap > 0)).toBe(true)
})

test('a subject that fails is told of, and the page goes on', async () => {
  const errors: string[] = []
  let fails = true
  const { port } = await served({
    subject: {
      state: () => {
        if (fails) throw new Error('no statistics now')
        return state(7)
      },
      turn: async () => '',
    },
    onError: ({ message }) => errors.push(message),
  })
  const page = await stream(port)
  await until(() => errors.length > 1)
  expect(new Set(errors)).toEqual(new Set(['no statistics now']))
  expect((await ask(port, '/api/state')).status).toBe(500)
  fails = false
  await until(() => page.text().includes('"atMs":7'))
  page.end()
})

test('closing ends what is open; settings that make no sense are told', async () => {
  const { console, port } = await served()
  const page = await stream(port)
  await console.close()
  await expect(ask(port, '/')).rejects.toThrow('ECONNREFUSED')
  page.end()
  await expect(serveConsole({ host: '127.0.0.1', port: 0, subject: null as never })).rejects.toThrow('subject')
  await expect(served({ maxPages: 0 })).rejects.toThrow('maxPages')
})
