/** What whoever runs `tmem serve` as a service relies on: exit codes, readiness, who may use its sockets. */
import { type SpawnSyncReturns, spawn, spawnSync } from 'node:child_process'
import { chmodSync, existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { totalmem } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { bin, serving, servingIn } from './serving.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const stack = 'memory(limit=8MiB)'
const device = ['--device', 'name=a,size=4MiB']

test('after a kill it ends with exit code 3, each time, until somebody consents; help and README name the code', async () => {
  const first = await serving(stack, ...device)
  await first.kill()
  for (let n = 0; n < 2; n++)
    await expect(servingIn(first.folder, stack, ...device)).rejects.toThrow(/^exit code 3: tmem: process .*--fresh$/)
  const next = await servingIn(first.folder, stack, ...device, '--fresh')
  expect((await next.stop()).code).toBe(0)
  expect((await tmem(['--help'])).stdout).toMatch(/^3: .*look first/m)
  const readme = readFileSync(new URL('../README.md', import.meta.url), 'utf8')
  expect(readme).toContain('RestartPreventExitStatus=2 3')
})

test('stat --wait waits for a server that is just being started, and no longer than it is told to', async () => {
  const folder = temporaryDirectory()
  const waiting = spawn(process.execPath, [
    bin,
    'stat',
    '--wait',
    '30',
    '--json',
    '--control',
    `${folder}/control.sock`,
  ])
  let said = ''
  waiting.stdout.setEncoding('utf8').on('data', (text: string) => {
    said += text
  })
  const ended = new Promise<number | null>((resolve) => waiting.once('close', resolve))
  const server = await servingIn(folder, stack, ...device)
  expect(await ended).toBe(0)
  expect(JSON.parse(said).info.pid).toBe(server.info.pid)
  expect((await server.stop()).code).toBe(0)
  const none = await tmem(['stat', '--wait', '1', '--control', server.control])
  expect(none).toMatchObject({ code: 1, stdout: '', stderr: expect.stringMatching(/^tmem: no server at /) })
})

test('its sockets have the mode and the group that they are given', async () => {
  // Of root any group, of anybody else one that is theirs.
  const gid = process.getuid!() === 0 ? 12_345 : process.getgid!()
  const of = ({ folder, control }: { folder: string; control: string }): string[] =>
    [control, `${folder}/nbd.sock`, `${folder}/own.sock`].map((path) => {
      const found = statSync(path)
      return `${(found.mode & 0o777).toString(8)} ${found.gid === gid}`
    })
  const own = ['--nbd', 'unix:FOLDER/own.sock,mode=600']
  const shared = await serving(stack, ...device, ...own, '--socket-group', String(gid))
  expect(of(shared)).toEqual(['660 true', '660 true', '600 true'])
  expect((await shared.stop()).code).toBe(0)
  const open = await serving(stack, ...device, ...own, '--socket-mode', '666')
  expect(of(open).map((text) => text.slice(0, 3))).toEqual(['666', '666', '600'])
  expect((await open.stop()).code).toBe(0)
})

test.each([
  ['--socket-mode', '99', /^tmem: bad --socket-mode "99": expected three octal digits/],
  ['--socket-group', 'no-such-group', /^tmem: --socket-group: there is no group "no-such-group"/],
])('%s %s is refused before anything is made', async (option, value, message) => {
  const folder = temporaryDirectory()
  await expect(servingIn(folder, stack, ...device, option, value)).rejects.toThrow(
    new RegExp(`^exit code 2: ${message.source.slice(1)}`),
  )
  expect(readdirSync(folder)).toEqual([])
})

test('a control socket that one may not open is no missing server', async (ctx) => {
  requires(ctx, { root: true, commands: ['setpriv'] })
  const stranger = (...words: string[]): SpawnSyncReturns<string> =>
    spawnSync('setpriv', ['--reuid=65534', '--regid=65534', '--clear-groups', ...words], { encoding: 'utf8' })
  for (const path of [process.execPath, bin])
    if (stranger('test', '-r', path).status !== 0) ctx.skip('the checkout is closed to other users')
  const server = await serving(stack, ...device)
  chmodSync(server.folder, 0o755)
  const { status, stderr } = stranger(process.execPath, bin, 'stat', '--control', server.control)
  expect([status, stderr]).toEqual([1, expect.stringMatching(/^tmem: this user may not open the control socket /)])
  expect((await server.stop()).code).toBe(0)
})

test('limits that this host could never keep are refused over NBD, too', async () => {
  const folder = temporaryDirectory()
  const gibibytes = Math.ceil(totalmem() / 2 ** 30)
  for (const text of [`zcache(limit=${gibibytes}GiB)`, `zcache(limit=1MiB) > memory(limit=${gibibytes}GiB)`])
    await expect(servingIn(folder, text, ...device)).rejects.toThrow(
      /^exit code 1: tmem: the stacks may take \d+MiB of memory, but .*: set limits of at most \d+MiB in all$/,
    )
  expect(readdirSync(folder)).toEqual([])
})

test('a folder that is not there: what to make', async () => {
  const folder = temporaryDirectory()
  const control = join(folder, 'not/there/control.sock')
  const ended = await tmem(['serve', '--stack', stack, ...device, '--nbd', `unix:${folder}/s`, '--control', control])
  expect(ended).toMatchObject({
    code: 2,
    stderr: expect.stringContaining(`the directory ${folder}/not/there does not exist`),
  })
  expect(ended.stderr).toContain('mkdir -p')
  expect(existsSync(join(folder, 's'))).toBe(false)
  await expect(servingIn(folder, stack, ...device, '--fuse', 'FOLDER/not/there')).rejects.toThrow(
    process.geteuid?.() === 0
      ? `exit code 1: tmem: the directory ${folder}/not/there for the mount does not exist: make it with mkdir -p`
      : `exit code 1: tmem: to mount on ${folder}/not/there takes root (CAP_SYS_ADMIN)`,
  )
  await expect(servingIn(folder, 'frontswap(file=FOLDER/not/there,size=8MiB)', ...device)).rejects.toThrow(
    `its folder does not exist: make it with mkdir -p ${folder}/not`,
  )
})

test('who may mount nothing hears that first, whatever else is missing', async (ctx) => {
  requires(ctx, { root: true, commands: ['setpriv'] })
  const folder = temporaryDirectory()
  const words = ['serve', '--stack', stack, ...device, '--fuse', `${folder}/mount`, '--control', `${folder}/c.sock`]
  expect(await tmem(words, { through: ['setpriv', '--bounding-set', '-sys_admin'] })).toMatchObject({
    code: 1,
    stderr: expect.stringMatching(
      /^tmem: to mount on .* takes root \(CAP_SYS_ADMIN\), .*: run it as root, or serve over NBD/,
    ),
  })
  expect(readdirSync(folder)).toEqual([])
})

test('a server that hangs is told as one that is there', async () => {
  const { info, control, stop } = await serving(stack, ...device)
  process.kill(info.pid, 'SIGSTOP')
  const { code, stderr } = await tmem(['stat', '--control', control])
  process.kill(info.pid, 'SIGCONT')
  expect({ code, stderr }).toEqual({
    code: 1,
    stderr: expect.stringMatching(/^tmem: the server at .* has not answered for 10 seconds: it is stopped or hangs/),
  })
  expect((await stop()).code).toBe(0)
})
