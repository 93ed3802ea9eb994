/** A service manager is told that a server serves, and hands it its sockets: with systemd's own programs. */
import { execFile, spawn } from 'node:child_process'
import { existsSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { promisify } from 'node:util'
import { expect, onTestFinished, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { bin, servingIn } from './serving.ts'
import { temporaryDirectory } from './tmem.ts'

const file = `
stack: memory(limit=8MiB)
devices: { a: { size: 4MiB } }
nbd: [unix:nbd.sock]
control: control.sock
`

test('READY and STOPPING are told, once each', { timeout: 30_000 }, async (ctx) => {
  requires(ctx, { commands: ['systemd-notify'], paths: ['/usr/bin/python3'] })
  const folder = temporaryDirectory()
  const address = join(folder, 'notify')
  const script = `
import socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.bind('${address}')
while True: print(repr(s.recv(4096).decode()), flush=True)
`
  const listener = spawn('/usr/bin/python3', ['-c', script], { stdio: ['ignore', 'pipe', 'inherit'] })
  onTestFinished(() => void listener.kill())
  let told = ''
  listener.stdout.setEncoding('utf8').on('data', (text: string) => {
    told += text
  })
  while (!existsSync(address)) await setTimeout(10)
  const env = { ...process.env, NOTIFY_SOCKET: address }
  const server = await servingIn({ folder, env }, 'memory(limit=8MiB)', '--device', 'name=a,size=4MiB')
  while (!told.includes('READY=1')) await setTimeout(10)
  expect(told).toContain('STATUS=serves a')
  expect(told).not.toContain('STOPPING')
  expect(await server.stop()).toEqual({ code: 0, stderr: '' })
  while (!told.includes('STOPPING=1')) await setTimeout(10)
  expect(told.match(/READY=1/g)).toHaveLength(1)
})

test('a manager that cannot be told is no reason not to serve', async (ctx) => {
  requires(ctx, { commands: ['systemd-notify'] })
  const folder = temporaryDirectory()
  const env = { ...process.env, NOTIFY_SOCKET: join(folder, 'nobody') }
  const server = await servingIn({ folder, env }, 'memory(limit=8MiB)', '--device', 'name=a,size=4MiB')
  const { code, stderr } = await server.stop()
  expect(code).toBe(0)
  expect(stderr).toMatch(/^tmem: the service manager cannot be notified \(systemd-notify READY=1\): /)
})

test('tmem up serves on the sockets that it is handed, instead of those in its file', {
  timeout: 30_000,
}, async (ctx) => {
  requires(ctx, { commands: ['systemd-socket-activate', 'nbdinfo'] })
  const folder = temporaryDirectory()
  writeFileSync(join(folder, 'tmem.yaml'), file)
  const path = join(folder, 'nbd.sock')
  const words = ['-l', path, process.execPath, bin, 'up', '-f', join(folder, 'tmem.yaml')]
  const child = spawn('systemd-socket-activate', words, { stdio: ['ignore', 'ignore', 'pipe'] })
  onTestFinished(() => void child.kill('SIGKILL'))
  const ended = new Promise<number | null>((resolve) => child.once('close', resolve))
  while (!existsSync(path)) await setTimeout(10)
  const { stdout } = await promisify(execFile)('nbdinfo', ['--size', `nbd+unix:///a?socket=${path}`])
  expect(stdout).toBe(`${4 * 2 ** 20}\n`)
  child.kill('SIGTERM')
  expect(await ended).toBe(0)
})
