/**
 * `tmem install-unit`: the systemd units that run `tmem up` with a configuration file.
 *
 * There are two kinds of server, with a mount in the file and without:
 *  - Without a mount, the server has its own user, who may only read what the server needs and write its files; systemd
 *    owns the sockets and listens before the server has started and while it restarts.
 *  - With a mount, the server runs as root, which mounts and swap need. It keeps the mount namespace of the host, as
 *    the kernel could not swap to a mount in a private one. The system calls, devices and capabilities that the server
 *    does not need are still taken from it.
 *
 * Invariants:
 *  - Files that this command has not written are never touched; all files are checked before one is written.
 *  - Writes are atomic: a file has its old content or all of its new content.
 *
 * Sources: systemd.service(5), systemd.exec(5), systemd.socket(5), systemd.resource-control(5), sysusers.d(5).
 */
import { lstatSync, mkdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { isIP } from 'node:net'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { BadInput, Failed } from '../ending.ts'
import { layersWith } from '../layers.ts'
import { defaultControl } from '../serve/control.ts'
import { toldFiles } from '../serve/roles.ts'
import { type DeviceRequest, stackFor } from '../serve/serve.ts'
import type { Terminal } from '../terminal.ts'
import { type Config, readConfig } from './config.ts'
import { controlOf, type FileOptions } from './up.ts'

/** Options of the command. */
export interface UnitOptions extends FileOptions {
  /** Name of the units, and of their user if they get one. */
  readonly name: string
  /** Directory that stands for `/`. */
  readonly root: string
}

/** The first line of each file that this command writes. */
const mark = '# Written by tmem install-unit: it is written anew there, and not to be changed here.'

/** A file to write. */
interface UnitFile {
  readonly path: string
  readonly text: string
}

/** Writes the units. Rejects with `BadInput` or `Failed` before anything is written. */
export async function installUnit(options: UnitOptions, terminal: Terminal): Promise<void> {
  if (!/^[a-z][a-z0-9_-]{0,30}$/.test(options.name))
    throw new BadInput(`bad --name "${options.name}": expected lower-case letters, digits, - and _, at most 31`)
  const root = resolve(options.root)
  const config = await readConfig(options.file)
  const control = controlOf(options, config)
  const plan = await planFor(options.name, config, control)
  const files = plan.files.map(({ path, text }) => ({ path: join(root, path), text }))
  const states = files.map((file) => ({ path: file.path, state: judged(file) }))
  writeAll(files.filter((_, n) => states[n]!.state === 'written'))
  if (options.json === true) terminal.print(JSON.stringify({ files: states, next: plan.next }))
  else
    terminal.print(
      [...states.map(({ path, state }) => `${path}: ${state}`), 'next:', ...plan.next.map((line) => `  ${line}`)].join(
        '\n',
      ),
    )
}

interface Plan {
  readonly files: readonly UnitFile[]
  /** The commands to run next. */
  readonly next: readonly string[]
}

/** The files and sockets that a server uses. */
interface Use {
  readonly name: string
  readonly config: Config
  readonly control: string
  /** Directories in which the server creates and writes files other than sockets. */
  readonly written: readonly string[]
  readonly hasNetwork: boolean
  readonly isRemote: boolean
}

async function planFor(name: string, config: Config, control: string): Promise<Plan> {
  const { serve } = config
  const written = new Set<string>()
  let isRemote = false
  const factories = toldFiles(await layersWith(serve.modules), (path) => written.add(dirname(path)))
  for (const request of serve.device as readonly DeviceRequest[]) {
    if (request.snapshot !== undefined) written.add(dirname(request.snapshot))
    for (const layer of stackFor(serve, request, factories)) if (layer.name === 'ramster') isRemote = true
  }
  const { nbd = [], metrics, caches = [] } = serve
  for (const { file, listen } of caches) {
    if (file !== undefined) written.add(dirname(file.path))
    if (listen.startsWith('unix:')) written.add(dirname(resolve(listen.slice('unix:'.length))))
  }
  const addresses = [...nbd, ...caches.map(({ listen }) => listen)]
  const hasNetwork = isRemote || metrics !== undefined || addresses.some((address) => address.startsWith('tcp:'))
  const use: Use = { name, config, control, written: [...written], hasNetwork, isRemote }
  const units = `etc/systemd/system/${name}`
  if (serve.fuse !== undefined)
    return {
      files: [{ path: `${units}.service`, text: serviceText(use, rootSection(use), []) }],
      next: ['systemctl daemon-reload', `systemctl enable --now ${name}.service`],
    }
  judgeOwnUser(use)
  // Caches create their sockets themselves.
  const sockets = nbd.length === 0 ? [] : [`${name}.socket`]
  return {
    files: [
      ...sockets.map((unit) => ({ path: `etc/systemd/system/${unit}`, text: socketText(use) })),
      { path: `${units}.service`, text: serviceText(use, userSection(use), sockets) },
      { path: `etc/sysusers.d/${name}.conf`, text: `${mark}\nu ${name} - "tmem server"\n` },
    ],
    next: [
      'systemd-sysusers',
      'systemctl daemon-reload',
      `systemctl enable --now ${[...sockets, `${name}.service`].join(' ')}`,
    ],
  }
}

/** Throws `BadInput` if the server's own user could not run it, or if nobody could reach it. */
function judgeOwnUser({ name, config, control }: Use): void {
  if (control === resolve(defaultControl) && config.control === undefined)
    throw new BadInput(
      `${config.path}: a server with its own user needs a directory for its control socket: add control: /run/${name}/control.sock`,
    )
  for (const path of [process.execPath, program, config.path, ...(config.serve.modules ?? [])]) {
    const closed = closedOn(path)
    if (closed !== undefined)
      throw new BadInput(
        `the user ${name} could not read ${path}: ${closed} is closed to others; chmod it, or move the file`,
      )
  }
}

/** The first part of a path that others may not enter or read. */
function closedOn(path: string): string | undefined {
  if ((statSync(path).mode & 0o004) === 0) return path
  for (let at = dirname(path); ; at = dirname(at)) {
    if ((statSync(at).mode & 0o001) === 0) return at
    if (at === dirname(at)) return undefined
  }
}

const program = fileURLToPath(new URL('../bin.js', import.meta.url))

function serviceText(use: Use, own: readonly string[], needs: readonly string[]): string {
  const { name, config, control, isRemote } = use
  const given = config.control === undefined ? ['--control', control] : []
  return `${mark}
[Unit]
Description=tmem: what ${specified(config.path)} says
Documentation=man:tmem(1)
# So it ends before the network and the file systems do, and what lies there can come back.
After=local-fs.target ${isRemote ? 'network-online.target' : 'network.target'}${needs.map((unit) => ` ${unit}`).join('')}
${isRemote ? 'Wants=network-online.target\n' : ''}${needs.map((unit) => `Requires=${unit}\n`).join('')}
[Service]
Type=notify
NotifyAccess=all
ExecStart=${words([process.execPath, program, 'up', '-f', config.path, ...given])}
# 2: the file has mistakes; 3: pages are lost, and somebody has to look.
Restart=on-failure
RestartPreventExitStatus=2 3
# Images are read before it serves, and what is swapped out comes back before it ends: both take as long as they take.
TimeoutStartSec=infinity
TimeoutStopSec=30min
KillMode=mixed
# The record of what a server held stays for the next one.
RuntimeDirectory=${name}
RuntimeDirectoryMode=0755
RuntimeDirectoryPreserve=yes
StateDirectory=${name}
UMask=0077
# What holds other programs' memory is not swapped out itself, and not chosen when memory is short.
MemorySwapMax=0
OOMScoreAdjust=-900
NoNewPrivileges=yes
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX${use.hasNetwork ? ' AF_INET AF_INET6' : ''}
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
# The runtime compiles while it runs: MemoryDenyWriteExecute would end it.
${own.join('\n')}

[Install]
WantedBy=multi-user.target
${needs.map((unit) => `Also=${unit}\n`).join('')}`
}

/** A server without a mount. */
function userSection({ name, config, written, control }: Use): string[] {
  const folders = new Set([...written, dirname(control)])
  // The directories that systemd creates already belong to the user.
  for (const own of [`/run/${name}`, `/var/lib/${name}`]) folders.delete(own)
  const paths = [process.execPath, program, config.path, ...folders]
  const isHome = paths.some((path) => /^\/(?:home|root|run\/user)(?:\/|$)/.test(path))
  const isTemporary = paths.some((path) => /^\/(?:var\/)?tmp(?:\/|$)/.test(path))
  return [
    `User=${name}`,
    `Group=${name}`,
    'CapabilityBoundingSet=',
    'AmbientCapabilities=',
    'ProtectSystem=strict',
    `ProtectHome=${isHome ? 'read-only' : 'yes'}`,
    ...(folders.size === 0 ? [] : [`ReadWritePaths=${words([...folders].toSorted().map((path) => `-${path}`))}`]),
    // A private /tmp would hide files that the server needs, and its content would end with the server.
    ...(isTemporary ? [] : ['PrivateTmp=yes']),
    'PrivateDevices=yes',
    'ProtectClock=yes',
    'ProtectControlGroups=yes',
    'ProtectHostname=yes',
    'ProtectKernelLogs=yes',
    'ProtectKernelModules=yes',
    'ProtectKernelTunables=yes',
    'ProtectProc=invisible',
    'RemoveIPC=yes',
    ...(config.serve.socketGroup === undefined ? ['PrivateUsers=yes'] : []),
    'SystemCallFilter=@system-service',
    'SystemCallFilter=~@privileged @resources',
  ]
}

/** A server with a mount, to which the kernel swaps. */
function rootSection({ config }: Use): string[] {
  const swaps = (config.serve.device as readonly DeviceRequest[]).some(({ swapPriority }) => swapPriority !== undefined)
  return [
    // For mounts, swap and loop devices; for the io-flusher flag; for images and sockets of other users.
    'CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_RESOURCE CAP_DAC_OVERRIDE CAP_CHOWN CAP_FOWNER',
    'KeyringMode=private',
    'DevicePolicy=closed',
    'DeviceAllow=/dev/fuse rw',
    ...(swaps ? ['DeviceAllow=/dev/loop-control rw', 'DeviceAllow=block-loop rw'] : []),
    'SystemCallFilter=@system-service @mount @swap',
  ]
}

function socketText({ name, config }: Use): string {
  const { nbd = [], socketMode, socketGroup } = config.serve
  const modes = new Set<string>()
  const streams = nbd.map((text) => {
    const [, path, mode] = /^unix:(.+?)(?:,mode=([0-7]{3,4}))?$/.exec(text) ?? []
    if (path === undefined) return streamOf(config, text)
    modes.add(mode ?? socketMode ?? (socketGroup === undefined ? '600' : '660'))
    return resolve(config.folder, path)
  })
  if (modes.size > 1)
    throw new BadInput(
      `${config.path}: nbd: one unit cannot have sockets with the modes ${[...modes].join(' and ')}: give all the same mode`,
    )
  const [mode] = modes
  return `${mark}
[Unit]
Description=tmem: sockets of ${specified(config.path)}

[Socket]
${streams.map((stream) => `ListenStream=${specified(stream)}\n`).join('')}${
  mode === undefined
    ? ''
    : `SocketUser=${name}\nSocketGroup=${specified(socketGroup ?? name)}\nSocketMode=${mode}\nRemoveOnStop=yes\n`
}
[Install]
WantedBy=sockets.target
`
}

/** A TCP address in the form of units. Throws `BadInput` for a host name, and for port 0. */
function streamOf({ path }: Config, text: string): string {
  const [, host, port] = /^tcp:(.+):(\d+)$/.exec(text) ?? []
  if (host === undefined || isIP(host.replaceAll(/^\[|\]$/g, '')) === 0 || port === '0')
    throw new BadInput(
      `${path}: nbd: ${text}: a socket unit listens on an address with a port, e.g. tcp:127.0.0.1:10809`,
    )
  return `${host}:${port}`
}

/** Text for a unit, in which a percent sign would begin a specifier. */
const specified = (text: string): string => text.replaceAll('%', '%%')

/** Words of a command line, or of a list of paths. */
const words = (all: readonly string[]): string =>
  all
    .map((word) => specified(word).replaceAll('$', '$$$$'))
    .map((word) => (/^[\w@%+=:,./$-]+$/.test(word) ? word : `"${word.replaceAll(/["\\]/g, '\\$&')}"`))
    .join(' ')

/** Whether a file has to be written. Throws `Failed` if the file exists and this command has not written it. */
function judged({ path, text }: UnitFile): 'written' | 'unchanged' {
  const found = lstatSync(path, { throwIfNoEntry: false })
  if (found === undefined) return 'written'
  const notOurs = `${path} exists and was not written by tmem install-unit: remove it, or choose another --name`
  if (!found.isFile() || found.size > maxUnitBytes) throw new Failed(notOurs)
  const before = readFileSync(path, 'utf8')
  if (!before.startsWith(`${mark}\n`)) throw new Failed(notOurs)
  return before === text ? 'unchanged' : 'written'
}

const maxUnitBytes = 2 ** 16

/** Writes all files under temporary names, then renames them. */
function writeAll(files: readonly UnitFile[]): void {
  const made: string[] = []
  try {
    for (const { path, text } of files) {
      mkdirSync(dirname(path), { recursive: true })
      writeFileSync(`${path}.new`, text, { flag: 'wx', mode: 0o644 })
      made.push(`${path}.new`)
    }
    for (const { path } of files) renameSync(`${path}.new`, path)
  } catch (error) {
    for (const path of made) rmSync(path, { force: true })
    throw new Failed(`the units cannot be written: ${(error as Error).message}`)
  }
}
