/**
 * A peer that is there no more, and says so to nobody: two machines (network namespaces), and the network between them
 * goes down.
 */
import { execFileSync, spawn } from 'node:child_process'
import { expect, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { later } from '../client.ts'

const serverProgram = `
  import { memoryDevice, nbdServer } from ${JSON.stringify(new URL('../../dist/index.js', import.meta.url).href)}
  const device = memoryDevice({ sizeBytes: 1048576 })
  const server = nbdServer({ exports: [{ device }], limits: { keepAliveMs: 1000 } })
  await server.listen({ host: '10.77.0.1', port: 10809 })
  console.log('ready')
  let last = 0
  setInterval(() => {
    const { connections } = server.stats().children[0].counters
    if (connections !== last) console.log('clients ' + connections)
    last = connections
  }, 50)`

const clientProgram = `
import sys, nbd
h = nbd.NBD()
h.connect_tcp("10.77.0.1", "10809")
sys.stdin.read()
`

test('a client whose machine vanishes is gone after the time for it; one that only says nothing is not', async (ctx) => {
  requires(ctx, { commands: ['ip', 'nbdsh'], paths: ['/usr/bin/python3'], root: true })
  const [here, there] = [`tmem-a${process.pid}`, `tmem-b${process.pid}`]
  const ip = (...words: string[]): string => execFileSync('ip', words, { encoding: 'utf8', stdio: 'pipe' })
  for (const name of [here, there]) {
    try {
      ip('netns', 'add', name)
    } catch (error) {
      ctx.skip(`cannot make a network namespace: ${(error as { stderr: string }).stderr.trim()}`)
    }
    later(() => ip('netns', 'del', name))
  }
  ip('link', 'add', 'one', 'netns', here, 'type', 'veth', 'peer', 'name', 'two', 'netns', there)
  for (const [name, link, address] of [
    [here, 'one', '10.77.0.1/24'],
    [there, 'two', '10.77.0.2/24'],
  ] as const) {
    ip('-n', name, 'addr', 'add', address, 'dev', link)
    ip('-n', name, 'link', 'set', link, 'up')
  }
  const begin = (name: string, ...words: string[]): { said: () => string } => {
    const running = spawn('ip', ['netns', 'exec', name, ...words], { stdio: ['pipe', 'pipe', 'inherit'] })
    const ended = new Promise((resolve) => running.once('exit', resolve))
    later(async () => {
      running.kill('SIGKILL')
      await ended
    })
    let said = ''
    running.stdout.on('data', (text) => {
      said += text
    })
    return { said: () => said }
  }
  const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms))
  const server = begin(here, process.execPath, '--input-type=module', '-e', serverProgram)
  const until = async (text: string, seconds: number): Promise<void> => {
    for (let tries = 0; !server.said().includes(text) && tries < seconds * 20; tries++) await pause(50)
    expect(server.said()).toContain(text)
  }
  await until('ready', 10)
  begin(there, '/usr/bin/python3', '-c', clientProgram)
  await until('clients 1', 10)
  // It is asked whether it is there, more than once, and it is.
  await pause(4000)
  expect(server.said()).toBe('ready\nclients 1\n')
  ip('-n', there, 'link', 'set', 'two', 'down')
  await until('clients 0', 30)
}, 80_000)
