/** The units that `tmem install-unit` writes, started and stopped by a systemd that runs. */
import { spawnSync } from 'node:child_process'
import { setTimeout as sleep } from 'node:timers/promises'
import { expect, onTestFinished, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { bin } from '../serving.ts'
import { temporaryDirectory } from '../tmem.ts'
import { hindrance, LiveSystemd, needs } from './live-systemd.ts'

const config = `
stack: zcache(limit=8MiB) > frontswap(file=/var/lib/tmem/{name}.img,size={size})
devices: { a: { size: 4MiB } }
nbd: ['unix:/run/tmem/nbd.sock']
control: /run/tmem/control.sock
`

/** The network, as far as the order is concerned in which units stop: it tells what the server is when it goes. */
const network = `[Unit]
Wants=network.target
Before=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop=/bin/sh -c 'systemctl is-active tmem.service > /run/server-when-network-stops; true'
`
/** All of it goes at once, as when the machine ends. */
const down = '[Unit]\nConflicts=tmem.service tmem.socket network.service network.target\n'

/** The user of a service must be able to pass every folder above the program. */
const isReadable = (): boolean =>
  [bin, process.execPath].every(
    (path) => spawnSync('setpriv', ['--reuid=65534', '--clear-groups', 'test', '-r', path]).status === 0,
  )

test('systemd starts what install-unit wrote, by itself or for a client, stops it before the network, and looks at its exit code', {
  timeout: 180_000,
}, async (ctx) => {
  requires(ctx, { ...needs, commands: [...needs.commands, 'nbdinfo', 'setpriv'] })
  if (hindrance() !== undefined) ctx.skip(hindrance())
  if (!isReadable()) ctx.skip('the checkout is closed to other users')
  const live = await LiveSystemd.start(temporaryDirectory())
  onTestFinished(() => live.end())
  const done = (...words: readonly string[]): string => {
    const { status, stdout, stderr } = live.run(...words)
    const log = status === 0 ? '' : live.run('journalctl', '--no-pager', '-o', 'cat', '-u', 'tmem*').stdout
    expect({ words, status, stderr: `${stderr}${log}` }).toEqual({ words, status: 0, stderr: expect.any(String) })
    return stdout
  }
  const state = (): Record<string, string> =>
    live.show('tmem.service', 'ActiveState', 'Result', 'ExecMainStatus', 'NRestarts', 'MainPID')
  const write = (path: string, text: string): string => done('sh', '-c', 'printf %s "$1" > "$0"', path, text)
  const tmem = (...words: readonly string[]): string => done(process.execPath, bin, ...words)

  write('/etc/tmem.yaml', config)
  done('chmod', '644', '/etc/tmem.yaml')
  const { next } = JSON.parse(tmem('install-unit', '-f', '/etc/tmem.yaml', '--json')) as { next: string[] }
  // What it says is what is done.
  for (const line of next) done('sh', '-c', line)
  // The start has come back, so the server has said that it serves.
  expect(live.show('tmem.service', 'Type', 'ActiveState', 'User')).toEqual({
    Type: 'notify',
    ActiveState: 'active',
    User: 'tmem',
  })
  // What another user says is believed by nobody, so it is the server's own who asks.
  const asked = ['setpriv', '--reuid=tmem', '--regid=tmem', '--clear-groups', process.execPath, bin, 'stat', '--json']
  expect(JSON.parse(done(...asked, '--control', '/run/tmem/control.sock')).devices).toHaveLength(1)

  // A client starts it: the socket is systemd's, and stays.
  done('systemctl', 'stop', 'tmem.service')
  expect(state()).toMatchObject({ ActiveState: 'inactive', Result: 'success', ExecMainStatus: '0' })
  expect(done('nbdinfo', '--size', 'nbd+unix:///a?socket=/run/tmem/nbd.sock')).toBe('4194304\n')
  // It may answer before it has said that it serves.
  await expect.poll(state, { timeout: 30_000 }).toMatchObject({ ActiveState: 'active' })

  write('/etc/systemd/system/network.service', network)
  write('/etc/systemd/system/down.target', down)
  done('systemctl', 'daemon-reload')
  done('systemctl', 'start', 'network.service')
  expect(state()).toMatchObject({ ActiveState: 'active' })
  done('systemctl', 'start', 'down.target')
  // What stops for it is not waited for.
  for (let left = 600; live.show('network.service', 'ActiveState')['ActiveState'] !== 'inactive' && left > 0; left--)
    await sleep(100)
  expect(done('sh', '-c', 'cat /run/server-when-network-stops')).toBe('inactive\n')
  expect(state()).toMatchObject({ ActiveState: 'inactive', Result: 'success', ExecMainStatus: '0' })

  // Killed it is started again; that one ends with 3, as pages may be lost, and is not.
  done('systemctl', 'start', 'tmem.service')
  done('kill', '-9', state()['MainPID']!)
  for (let left = 600; state()['ActiveState'] !== 'failed' && left > 0; left--) await sleep(100)
  expect(state()).toMatchObject({ ActiveState: 'failed', Result: 'exit-code', ExecMainStatus: '3', NRestarts: '1' })
  expect(done('journalctl', '--no-pager', '-o', 'cat', '-u', 'tmem.service')).toMatch(/ are lost, .*--fresh/)
})
