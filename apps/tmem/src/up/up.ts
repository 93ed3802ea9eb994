/**
 * `tmem up`, `down`, `status`: a server as a configuration file describes it, including swap areas on its devices.
 *
 * `up` is the server, in the foreground. Once all devices are served it starts swapping to them in the order of the
 * file, and at its end, asked for or after a failure, it undoes everything in the opposite order. `down` and `status`
 * ask the running server, so that they show the state and not the file.
 */
import { resolve } from 'node:path'
import { chdir } from 'node:process'
import { setTimeout } from 'node:timers/promises'
import { formatBytes } from '@tmem/core'
import { Failed, Interrupted } from '../ending.ts'
import { isActivated } from '../serve/activation.ts'
import { ask, defaultControl, type Info } from '../serve/control.ts'
import { drain } from '../serve/host.ts'
import { formerServer } from '../serve/record.ts'
import { type DeviceRequest, serve } from '../serve/serve.ts'
import type { ServedCacheRequest } from '../serve/served-cache.ts'
import { usesBy } from '../serve/swap.ts'
import { type Terminal, tableOf, withProgress } from '../terminal.ts'
import { type Config, configSchema, readConfig } from './config.ts'

/** Path of the file. */
export interface FileOptions {
  readonly file: string
  /** Control socket, instead of the one in the file. */
  readonly control?: string
  readonly json?: true
}

/** Serves what the file says until it is asked to end. Rejects as `serve` does. */
export async function up(options: FileOptions & { readonly fresh?: true }, terminal: Terminal): Promise<void> {
  const config = await readConfig(options.file)
  const control = controlOf(options, config)
  const { nbd, ...others } = config.serve
  await serve(
    {
      ...others,
      // Socket activation: the manager listens there and hands the sockets over.
      ...(nbd === undefined || isActivated(process.env, process.pid) ? {} : { nbd }),
      control,
      ...(options.fresh === true ? { fresh: true } : {}),
      ...(options.json === true ? { json: true } : {}),
    },
    terminal,
  )
}

/** Milliseconds between two checks whether a server has ended. */
const lookMs = 100

/**
 * Ends swapping to the server of the file, then the server, and waits for its end. Rejects with `Failed` if no server
 * answers, if it does not end within `wait` seconds, or if it lost pages.
 */
export async function down(options: FileOptions & { readonly wait: number }, terminal: Terminal): Promise<void> {
  const control = controlOf(options, await readConfig(options.file))
  const info = await ask(control, 'info')
  const isThere = (): boolean => {
    const server = formerServer(control)
    return server?.running === true && server.pid === info.pid
  }
  if (!isThere())
    throw new Failed(
      `the server at ${control} says that it is process ${info.pid}, which is not a server on this host: end it where it runs, e.g. in its container`,
    )
  const { fileSystem } = info
  if (fileSystem !== null) await withProgress(terminal, (onProgress) => drain(fileSystem, onProgress))
  // Swapoff takes time: meanwhile the server may have ended, and another process may have its number.
  if (isThere()) process.kill(info.pid, 'SIGTERM')
  const end = performance.now() + options.wait * 1000
  while (formerServer(control)?.running === true) {
    if (performance.now() >= end)
      throw new Failed(
        `process ${info.pid} has not ended within ${options.wait} seconds: see its log, or wait longer with --wait SECONDS`,
      )
    await setTimeout(lookMs, undefined, { signal: terminal.signal }).catch(() => {
      throw new Interrupted()
    })
  }
  const left = formerServer(control)
  if (left !== undefined) throw new Failed(`process ${left.pid} ${left.end}: the pages of ${left.lost} are lost`)
  if (options.json === true) terminal.print(JSON.stringify({ pid: info.pid, ended: true }))
  else terminal.print(`process ${info.pid} has ended`)
}

/**
 * Shows what is served and swapped to, and every difference from the file. Rejects with `Failed` if no server answers
 * or anything differs.
 */
export async function status(options: FileOptions, terminal: Terminal): Promise<void> {
  const config = await readConfig(options.file)
  const control = controlOf(options, config)
  const info = await ask(control, 'info')
  const uses =
    info.fileSystem === null
      ? undefined
      : await usesBy(
          info,
          info.devices.map(({ name }) => name),
        )
  const devices = info.devices.map(({ name, sizeBytes }) => {
    const use = uses?.get(name)?.find(({ swap }) => swap !== undefined)
    return { name, sizeBytes, loop: use?.loop ?? null, swap: use?.swap ?? null }
  })
  const differences = [...differencesOf(config, devices), ...cacheDifferencesOf(config, info)]
  const { pid, nbd, fuse, caches } = info
  if (options.json === true) terminal.print(JSON.stringify({ pid, control, nbd, fuse, devices, caches, differences }))
  else terminal.print(shown(info, devices, control))
  if (differences.length > 0) throw new Failed(`the server differs from ${options.file}: ${differences.join('; ')}`)
}

/** Judges a file, or prints the JSON Schema of such files. */
export async function config(what: 'check' | 'schema', { file, json }: FileOptions, terminal: Terminal): Promise<void> {
  if (what === 'schema') {
    terminal.print(JSON.stringify(configSchema(), undefined, 2))
    return
  }
  const { serve: options } = await readConfig(file)
  if (json === true) terminal.print(JSON.stringify({ file, devices: options.device, caches: options.caches ?? [] }))
  else
    terminal.print(
      `${file} is valid: ${[...options.device.map(described), ...(options.caches ?? []).map(cacheDescribed)].join(', ')}`,
    )
}

const described = (device: string | DeviceRequest): string =>
  typeof device === 'string' ? device : `${device.name} of ${formatBytes(device.sizeBytes)}`

const cacheDescribed = ({ name, memoryBytes, listen }: ServedCacheRequest): string =>
  `cache ${name} of ${formatBytes(memoryBytes)} on ${listen}`

interface Served {
  readonly name: string
  readonly sizeBytes: number
  readonly loop: string | null
  readonly swap: { readonly usedBytes: number; readonly priority: number } | null
}

function differencesOf(config: Config, devices: readonly Served[]): string[] {
  const asked = config.serve.device as readonly DeviceRequest[]
  const differences = devices
    .filter(({ name }) => !asked.some((one) => one.name === name))
    .map(({ name }) => `${name} is served but not in the file`)
  for (const { name, sizeBytes, swapPriority } of asked) {
    const served = devices.find((one) => one.name === name)
    if (served === undefined) differences.push(`${name} is not served`)
    else if (served.sizeBytes !== sizeBytes)
      differences.push(`${name} has a size of ${formatBytes(served.sizeBytes)} instead of ${formatBytes(sizeBytes)}`)
    else if (swapPriority !== undefined && served.swap === null) differences.push(`${name} is not swapped to`)
  }
  return differences
}

function cacheDifferencesOf({ serve: { caches = [] } }: Config, info: Info): string[] {
  return [
    ...info.caches
      .filter(({ name }) => !caches.some((one) => one.name === name))
      .map(({ name }) => `${name} is served but not in the file`),
    ...caches
      .filter(({ name }) => !info.caches.some((one) => one.name === name))
      .map(({ name }) => `${name} is not served`),
  ]
}

function shown({ pid, nbd, fuse, caches }: Info, devices: readonly Served[], control: string): string {
  const rows = devices.map(({ name, sizeBytes, loop, swap }) => [
    name,
    formatBytes(sizeBytes),
    swap === null ? 'off' : 'on',
    loop ?? '-',
    swap === null ? '-' : formatBytes(swap.usedBytes),
    swap === null ? '-' : String(swap.priority),
  ])
  const where = [
    ...nbd.map((address) => `NBD on ${address}`),
    ...(fuse === null ? [] : [`files in ${fuse}`]),
    ...caches.map(({ name, listen }) => `cache ${name} on ${listen}`),
  ]
  return [
    ...(rows.length === 0 ? [] : [tableOf(['device', 'size', 'swap', 'loop', 'used', 'priority'], rows)]),
    `${where.join(', ')}; control socket ${control}; process ${pid}`,
  ].join('\n')
}

/** The control socket of the file. Also changes to the directory of the file, to which its paths are relative. */
export function controlOf({ control }: FileOptions, config: Config): string {
  const given = control === undefined ? undefined : resolve(control)
  chdir(config.folder)
  return given ?? resolve(config.control ?? defaultControl)
}
