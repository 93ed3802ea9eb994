/**
 * `tmem install-unit`: units that systemd's own programs take, and files that are not ours. Nothing of it is started.
 */
import { spawnSync } from 'node:child_process'
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { bin } from './serving.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const plain = `
stack: zcache(limit=8MiB) > frontswap(file=/var/lib/tmem/{name}.img,size={size})
devices: { a: { size: 4MiB } }
nbd: ['unix:/run/tmem/nbd.sock', 'tcp:127.0.0.1:10809']
sockets: { mode: '660', group: disk }
control: /run/tmem/control.sock
`
const mounted = `
stack: zcache(limit=8MiB) > frontswap(file=/var/lib/tmem/{name}.img,size={size})
devices: { a: { size: 4MiB, swap: true } }
fuse: /run/tmem/mount
control: /run/tmem/control.sock
`

interface Installed {
  readonly root: string
  readonly file: string
  readonly code: number | null
  readonly stderr: string
  readonly files: readonly { readonly path: string; readonly state: string }[]
}

/** A folder that everybody may pass, as the user of the service must. */
function openFolder(): string {
  const folder = temporaryDirectory()
  chmodSync(folder, 0o755)
  return folder
}

async function install(text: string, root = openFolder(), ...more: string[]): Promise<Installed> {
  const file = join(root, 'tmem.yaml')
  writeFileSync(file, text)
  chmodSync(file, 0o644)
  const { code, stdout, stderr } = await tmem(['install-unit', '-f', file, '--root', root, '--json', ...more])
  return { root, file, code, stderr, files: code === 0 ? JSON.parse(stdout).files : [] }
}

const units = (root: string): string => join(root, 'etc/systemd/system')

/** The user that runs a service must be able to read the program: not so in a checkout below /root. */
const isReadable = (): boolean =>
  spawnSync('sh', [
    '-c',
    'p=$0; while [ "$p" != / ]; do p=$(dirname "$p"); case $(stat -c %A "$p") in *x|*t) ;; *) exit 1;; esac; done',
    bin,
  ]).status === 0 &&
  spawnSync('sh', [
    '-c',
    'p=$0; while [ "$p" != / ]; do p=$(dirname "$p"); case $(stat -c %A "$p") in *x|*t) ;; *) exit 1;; esac; done',
    process.execPath,
  ]).status === 0

const verify = (...paths: string[]): { status: number | null; said: string } => {
  const { status, stdout, stderr } = spawnSync(
    'systemd-analyze',
    ['verify', '--man=no', '--recursive-errors=no', ...paths],
    {
      encoding: 'utf8',
    },
  )
  return { status, said: `${stdout}${stderr}` }
}

test('a server with a user of its own: systemd takes its units, and finds little that it may do', {
  timeout: 60_000,
}, async (ctx) => {
  requires(ctx, { commands: ['systemd-analyze', 'sh'] })
  if (!isReadable()) ctx.skip('the checkout is closed to other users')
  const { root, code, stderr, files } = await install(plain)
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
  const folder = units(root)
  expect(files.map(({ path }) => path)).toEqual([
    join(folder, 'tmem.socket'),
    join(folder, 'tmem.service'),
    join(root, 'etc/sysusers.d/tmem.conf'),
  ])
  const service = join(folder, 'tmem.service')
  expect(verify(service, join(folder, 'tmem.socket'))).toEqual({ status: 0, said: '' })
  // 0: nothing, 10: everything.
  const judged = spawnSync('systemd-analyze', ['security', '--offline=yes', '--no-pager', '--threshold=20', service], {
    encoding: 'utf8',
  })
  expect(judged).toMatchObject({ status: 0 })
  const socket = readFileSync(join(folder, 'tmem.socket'), 'utf8')
  for (const line of [
    'ListenStream=/run/tmem/nbd.sock',
    'ListenStream=127.0.0.1:10809',
    'SocketMode=660',
    'SocketGroup=disk',
    'SocketUser=tmem',
  ])
    expect(socket.split('\n')).toContain(line)
  const lines = readFileSync(service, 'utf8').split('\n')
  for (const line of [
    'Type=notify',
    'MemorySwapMax=0',
    'User=tmem',
    'CapabilityBoundingSet=',
    'RestartPreventExitStatus=2 3',
  ])
    expect(lines).toContain(line)
})

test('caches make their sockets themselves, where the server may', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: ['systemd-analyze', 'sh'] })
  if (!isReadable()) ctx.skip('the checkout is closed to other users')
  const caches = `
caches:
  a: { memory: 4MiB, listen: 'unix:/run/caches/a.sock', file: { path: /var/cache/tmem/a, size: 1MiB } }
  b: { memory: 2MiB, listen: 'tcp:127.0.0.1:6380' }
control: /run/tmem/control.sock
`
  const { root, code, files } = await install(caches)
  expect(code).toBe(0)
  const service = join(units(root), 'tmem.service')
  expect(files.map(({ path }) => path)).toEqual([service, join(root, 'etc/sysusers.d/tmem.conf')])
  expect(verify(service)).toEqual({ status: 0, said: '' })
  const lines = readFileSync(service, 'utf8').split('\n')
  expect(lines).toContain('ReadWritePaths=-/run/caches -/var/cache/tmem')
  expect(lines).toContain('RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6')
  expect(lines.filter((line) => line.includes('.socket'))).toEqual([])
})

test('what lies among temporary files is not hidden from the server, and stays when it ends', async (ctx) => {
  if (!isReadable()) ctx.skip('the checkout is closed to other users')
  const { root, code } = await install(plain.replace('/var/lib/tmem', '/var/tmp'))
  expect(code).toBe(0)
  expect(readFileSync(join(units(root), 'tmem.service'), 'utf8')).not.toMatch(/^PrivateTmp=/m)
})

test('a server with a mount is root, and keeps the mounts of the host', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: ['systemd-analyze'] })
  const { root, code, files } = await install(mounted)
  expect(code).toBe(0)
  const service = join(units(root), 'tmem.service')
  expect(files).toEqual([{ path: service, state: 'written' }])
  expect(verify(service)).toEqual({ status: 0, said: '' })
  const text = readFileSync(service, 'utf8')
  // Each of these gives a service mounts of its own, in which nobody else would see what it serves.
  expect(text).not.toMatch(/^(?:Private|Protect|ReadWritePaths|ReadOnlyPaths|MountFlags|User=|DynamicUser)/m)
  expect(text).toMatch(/^DeviceAllow=\/dev\/fuse rw$/m)
  const judged = spawnSync('systemd-analyze', ['security', '--offline=yes', '--no-pager', '--threshold=70', service], {
    encoding: 'utf8',
  })
  expect(judged).toMatchObject({ status: 0 })
})

test('again it changes nothing, after a change of the file it writes anew', async () => {
  const first = await install(mounted)
  expect((await install(mounted, first.root)).files.map(({ state }) => state)).toEqual(['unchanged'])
  const changed = await install(mounted.replace('swap: true', 'swap: false'), first.root)
  expect(changed.files.map(({ state }) => state)).toEqual(['written'])
  expect(readdirSync(units(first.root))).toEqual(['tmem.service'])
})

const theirs = '[Service]\nExecStart=/bin/true\n'

test.each([
  ['a file', (path: string): void => writeFileSync(path, theirs)],
  ['a link', (path: string): void => symlinkSync('/nowhere', path)],
  ['a folder', (path: string): void => mkdirSync(path)],
])('%s that is not ours stays as it is, and nothing else is written', async (_, make) => {
  const root = openFolder()
  const path = join(units(root), 'tmem.service')
  mkdirSync(dirname(path), { recursive: true })
  make(path)
  const { code, stderr } = await install(mounted, root)
  expect([code, stderr]).toEqual([
    1,
    `tmem: ${path} exists and was not written by tmem install-unit: remove it, or choose another --name\n`,
  ])
  expect(readdirSync(units(root))).toEqual(['tmem.service'])
  expect((await install(mounted, root, '--name', 'other')).code).toBe(0)
  expect(readdirSync(units(root))).toEqual(['other.service', 'tmem.service'])
})

test('one of several files that is not ours: none is written', async (ctx) => {
  if (!isReadable()) ctx.skip('the checkout is closed to other users')
  const root = openFolder()
  mkdirSync(join(root, 'etc/sysusers.d'), { recursive: true })
  writeFileSync(join(root, 'etc/sysusers.d/tmem.conf'), 'u tmem 7\n')
  expect((await install(plain, root)).code).toBe(1)
  expect(existsSync(units(root))).toBe(false)
  expect(readFileSync(join(root, 'etc/sysusers.d/tmem.conf'), 'utf8')).toBe('u tmem 7\n')
})

test.each([
  ['no control socket', plain.replace(/^control.*$/m, ''), [], /: add control: \/run\/tmem\/control\.sock$/],
  [
    'two modes',
    plain.replace('nbd.sock', 'nbd.sock,mode=600').replace("'tcp:127.0.0.1:10809'", "'unix:/run/tmem/b'"),
    [],
    /one unit cannot have sockets with the modes 600 and 660/,
  ],
  ['a name of a host', plain.replace('127.0.0.1', 'localhost'), [], /a socket unit listens on an address with a port/],
  ['any port', plain.replace('10809', '0'), [], /a socket unit listens on an address with a port/],
  ['a bad name', plain, ['--name', 'a b'], /^tmem: bad --name "a b": expected lower-case letters/],
  ['a file with mistakes', plain.replace('size:', 'sise:'), [], /has mistakes/],
])('%s is told, and nothing is written', async (_, text, more, message) => {
  if (!isReadable()) return
  const { root, code, stderr } = await install(text, undefined, ...more)
  expect(code).toBe(2)
  expect(stderr.trimEnd().split('\n')[0]).toMatch(message)
  expect(existsSync(join(root, 'etc'))).toBe(false)
})

test('what the user of the service could not read is told', async () => {
  const root = temporaryDirectory()
  chmodSync(root, 0o700)
  const { code, stderr } = await install(plain, root)
  expect([code, stderr]).toEqual([
    2,
    expect.stringMatching(/^tmem: the user tmem could not read .* is closed to others; chmod it, or move the file\n$/),
  ])
  expect(existsSync(join(root, 'etc'))).toBe(false)
})
