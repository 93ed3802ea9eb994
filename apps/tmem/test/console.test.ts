/** `tmem serve --http`: what it takes and refuses, and that the console tells what `tmem stat` does. */

import { execFileSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { chmodSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import type { ConsoleState } from '@tmem/console'
import { expect, test } from 'vitest'
import { Client } from '../../../packages/nbd/test/client.ts'
import { requires } from '../../../tools/requires.ts'
import { serving, servingIn } from './serving.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const stack = 'zcache(limit=2MiB) > frontswap(file="FOLDER/{name}.img",size={size})'
const device = ['--device', 'name=a,size=8MiB']

const stateOf = async (http: string): Promise<ConsoleState> =>
  (await (await fetch(`${http}api/state`)).json()) as ConsoleState

test('the state is what tmem stat says', async () => {
  const { folder, info, control, stop } = await serving(stack, '--http', 'tcp:0', ...device)
  expect(info.http).toMatch(/^http:\/\/127\.0\.0\.1:\d+\/$/)
  const client = await Client.ready({ path: join(folder, 'nbd.sock') }, { name: 'a' })
  expect((await client.write(0, Buffer.alloc(2 ** 20, 'pages of words'))).error).toBe(0)
  const state = await stateOf(info.http!)
  const stat = JSON.parse((await tmem(['stat', '--json', '--control', control])).stdout)
  expect(stat.info.http).toBe(info.http)
  expect(state.devices.map(({ stats }) => stats)).toEqual(stat.devices)
  expect(state.devices[0]).toMatchObject({
    users: { clients: 1, opens: 0 },
    swap: null,
    knobs: { mem_limit: '0', disksize: String(8 * 2 ** 20) },
    ages: { seen: 256 },
  })
  expect(state.server).toMatchObject({ pid: info.pid, writable: false })
  const explained = await (await fetch(`${info.http}api/explain?device=a&offset=4097`)).json()
  expect(explained).toMatchObject({ device: 'a', slot: 1, state: 'held', place: 'zcache' })
  const shown = JSON.parse((await tmem(['explain', 'a', '4097', '--json', '--control', control])).stdout)
  expect(explained).toEqual({ ...shown, ageSeconds: expect.any(Number), movesSeconds: expect.any(Number) })
  const outside = await fetch(`${info.http}api/explain?device=a&offset=${8 * 2 ** 20}`)
  expect([outside.status, await outside.json()]).toEqual([422, { error: expect.stringContaining('a has bytes 0 to') }])
  client.socket.destroy()
  expect(await stop()).toEqual({ code: 0, stderr: '' })
  await expect(fetch(info.http!)).rejects.toThrow('fetch failed')
})

test('events are remembered, whatever is said of them', async () => {
  const folder = temporaryDirectory()
  const token = join(folder, 'token')
  writeFileSync(token, 'letters-and-digits-0123\n', { mode: 0o600 })
  const { info, control, stop } = await servingIn(folder, stack, '--http', 'tcp:0', '--http-token', token, ...device)
  expect((await tmem(['knob', 'a', 'mem_limit', '1MiB', '--control', control])).code).toBe(0)
  const turn = await fetch(`${info.http}api/knob`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', authorization: 'Bearer letters-and-digits-0123' },
    body: JSON.stringify({ device: 'a', knob: 'mem_limit', value: '2MiB' }),
  })
  expect(await turn.json()).toEqual({ answer: String(2 * 2 ** 20) })
  const { events } = await stateOf(info.http!)
  expect(events.map(({ message }) => message)).toEqual([
    expect.stringContaining('through the control socket'),
    expect.stringContaining('mem_limit 2MiB, through the console'),
  ])
  // It was started to say warnings only.
  expect(await stop()).toEqual({ code: 0, stderr: '' })
})

test('a place that begins to refuse is an event, and one that has stopped, too', async () => {
  const picky = 'zcache(limit=4MiB,zvMaxZsize=2048) > frontswap(file="FOLDER/{name}.img",size={size})'
  const { folder, info } = await serving(picky, '--http', 'tcp:0', ...device)
  const client = await Client.ready({ path: join(folder, 'nbd.sock') }, { name: 'a' })
  expect((await client.write(0, Buffer.alloc(2 ** 20, 'words'))).error).toBe(0)
  const messages = async (): Promise<string[]> => (await stateOf(info.http!)).events.map(({ message }) => message)
  await setTimeout(1500)
  expect(await messages()).toEqual([])
  // Nothing that this zcache wants.
  expect((await client.write(0, randomBytes(2 ** 20))).error).toBe(0)
  const begun = 'a: zcache has begun to refuse pages'
  const ended = 'a: zcache has not refused a page for 10 seconds'
  await expect.poll(messages, { timeout: 5000 }).toEqual([begun])
  await expect.poll(messages, { timeout: 30_000, interval: 500 }).toEqual([begun, ended])
})

test.each([
  [['--http', 'unix:/x'], 'bad --http "unix:/x": expected tcp:PORT (on the loopback) or tcp:HOST:PORT'],
  [['--http', 'tcp:70000'], 'bad --http "tcp:70000"'],
  [['--http', '8780'], 'bad --http "8780"'],
  [['--http-token', '/x'], '--http-token is for the console'],
  [['--http', 'tcp:0', '--http-token', '/nowhere/token'], '--http-token /nowhere/token: ENOENT'],
])('%s is refused', async (words, message) => {
  await expect(serving(stack, ...words, ...device)).rejects.toThrow(message)
})

test('a token that others can read, or that is none, is refused', async () => {
  const folder = temporaryDirectory()
  const token = join(folder, 'token')
  const start = () => servingIn(folder, stack, '--http', 'tcp:0', '--http-token', token, ...device)
  for (const text of ['', 'short', 'two words that are long enough', 'x'.repeat(5000)]) {
    writeFileSync(token, text, { mode: 0o600 })
    await expect(start()).rejects.toThrow('--http-token')
  }
  writeFileSync(token, 'letters-and-digits-0123')
  chmodSync(token, 0o644)
  await expect(start()).rejects.toThrow('others can read or write it: chmod 600')
})

test('a token that is a pipe is refused, and not waited for', async (ctx) => {
  requires(ctx, { commands: ['mkfifo'] })
  const folder = temporaryDirectory()
  const token = join(folder, 'token')
  execFileSync('mkfifo', ['-m', '600', token])
  await expect(servingIn(folder, stack, '--http', 'tcp:0', '--http-token', token, ...device)).rejects.toThrow(
    'token is not a regular file',
  )
})

test('a port that is taken is told, and nothing is left', async () => {
  const { info, folder, stop } = await serving(stack, '--http', 'tcp:0', ...device)
  const { port } = new URL(info.http!)
  await expect(serving(stack, '--http', `tcp:${port}`, ...device)).rejects.toThrow(
    /the console cannot listen on 127.0.0.1, port \d+: .*EADDRINUSE.*: another process listens there, name another port$/,
  )
  expect(folder).toBeTruthy()
  expect((await stop()).code).toBe(0)
})

test('other names are open to others, and it says so', async () => {
  const { stop } = await serving(stack, '--http', 'tcp:0.0.0.0:0', ...device)
  expect((await stop()).stderr).toMatch(
    /everybody who reaches http:\/\/0\.0\.0\.0:\d+\/ can read all that the console shows/,
  )
})
