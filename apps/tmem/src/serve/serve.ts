/**
 * `tmem serve`: opens devices over a stack, serves them over NBD and as files, and stops once it may.
 *
 * Order: first all options are checked, then devices are opened, then they are served, and only then the server reports
 * that it is ready. It stops in the opposite order. It does not stop while this host's kernel swaps to one of its files
 * or has one as a loop device; with `--drain` it first ends these uses.
 */
import { rmSync } from 'node:fs'
import { lstat } from 'node:fs/promises'
import { resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { codecName } from '@tmem/codecs'
import {
  type Allocator,
  type BlockDevice,
  formatBytes,
  type Layer,
  type LayerFactory,
  type OpenProgress,
  parseBytes,
  parseStack,
  type StatsNode,
  TmemError,
} from '@tmem/core'
import { type FuseNode, type FuseServer, fuseServer, namedApart, type Place, placeOf, statisticsTree } from '@tmem/fuse'
import { mappedAllocator } from '@tmem/memory'
import { type NbdAddress, type NbdEndpoint, type NbdServer, nbdServer } from '@tmem/nbd'
import { openSnapshot, type Ramzswap, ramzswap, type Snapshot, virtswap } from '@tmem/ramzswap'
import { BadInput, Failed, Interrupted, LookFirst, throwIfInterrupted } from '../ending.ts'
import { layersWith } from '../layers.ts'
import type { Statistics } from '../metrics/metrics.ts'
import type { Terminal } from '../terminal.ts'
import { activatedDescriptors } from './activation.ts'
import { CachedFileDevice, type CachedFileRequest, judgeFile } from './cached-file.ts'
import { type Answers, type Info, type Request, serveControl } from './control.ts'
import {
  accessOf,
  cacheEndpointOf,
  type EndpointOptions,
  endpointsOf,
  limitsOf,
  metricsAddress,
  socketPath,
} from './endpoints.ts'
import {
  aheadMemory,
  drain,
  endingOf,
  judgeLimits,
  judgeMounting,
  type LoopUse,
  loopsOver,
  loopsOverDead,
  tool,
  useText,
} from './host.ts'
import { type HttpOptions, httpPlanOf, RefusalWatch, webConsole } from './http.ts'
import { type Knob, knobsElsewhere, knobsOf, lendingIn, type Turned } from './knobs.ts'
import { Latencies } from './latency.ts'
import { Log, type LogFormat, type LogLevel } from './log.ts'
import { LongWork } from './long-work.ts'
import { AutoMemory } from './memory.ts'
import { ServiceManager } from './notify.ts'
import type { Peer } from './peer.ts'
import { PlaceWatch } from './place-watch.ts'
import { protect } from './protect.ts'
import { type Kept, recordPath, ServerRecord, type Survival } from './record.ts'
import { judgeRoles, type Role, toldFiles, toldLimits } from './roles.ts'
import { ServedCache, type ServedCacheRequest, servedCacheBytes } from './served-cache.ts'
import { Ticking } from './ticking.ts'
import { type Entrances, Users } from './users.ts'

/** The options as they come from the command line. */
export interface ServeOptions extends EndpointOptions, HttpOptions {
  /** Stack of each device without one of its own. */
  readonly stack: string
  readonly modules?: string[]
  readonly hypervisor?: string
  readonly memory?: string
  /** The devices, as text or parsed. */
  readonly device: readonly (string | DeviceRequest)[]
  /** Files to serve read-only beside the devices. */
  readonly pageCaches?: readonly CachedFileRequest[]
  /** Caches of values to serve beside them, each on its own address. */
  readonly caches?: readonly ServedCacheRequest[]
  readonly fuse?: string
  /** `tcp:HOST:PORT`. */
  readonly metrics?: string
  readonly control: string
  readonly drain?: true
  readonly fresh?: true
  readonly busyTurns?: number
  readonly log?: LogFormat
  readonly logLevel?: LogLevel
  readonly json?: true
}

/** A device to serve. */
export interface DeviceRequest {
  readonly name: string
  readonly sizeBytes: number
  /** Its own stack. */
  readonly stack?: string
  readonly memlimitBytes?: number
  readonly maxSizeBytes?: number
  /** Path of its image. */
  readonly snapshot?: string
  readonly writethrough: boolean
  /** Priority of the swap area, if the kernel of this host is to swap to the device while it is served. */
  readonly swapPriority?: number
}

/** The work during which devices are served. */
export interface Course {
  /** Called once, when the devices are served. The server ends when the promise settles. */
  readonly until: (info: Info) => Promise<void>
  /** Called for each signal, which then does not stop the server. */
  readonly signalled: () => void
}

/** A device, and its served form: with a snapshot, all requests go through the snapshot. */
interface Opened extends Turned {
  readonly served: (BlockDevice | Snapshot) & { resize(sizeBytes: number): void }
  /** The served form for each server, with timed requests. */
  readonly overNbd: BlockDevice
  readonly overFuse: BlockDevice
  /** Its statistics, with the times of requests. */
  readonly stats: () => StatsNode
}

/** Pages that background work touches at a time, and the interval of looks at the clock and the host. */
const tickPages = 256
const lookMs = 1000

/**
 * Serves until a signal or the end of `course`. Rejects with `BadInput`, with `Failed`, or with `Interrupted` if the
 * signal came before it served.
 */
export async function serve(options: ServeOptions, terminal: Terminal, course?: Course): Promise<void> {
  // Else a second signal would end the process as it is, perhaps with swap on over a mount that nobody answers. npm
  // sends one more for each Ctrl-C.
  const asked = new AbortController()
  const release = terminal.takeSignals(() => asked.abort())
  try {
    await serveUntil(options, { ...terminal, signal: AbortSignal.any([terminal.signal, asked.signal]) }, course)
  } finally {
    release()
  }
}

async function serveUntil(options: ServeOptions, terminal: Terminal, course: Course | undefined): Promise<void> {
  const requests = options.device.map((device) => (typeof device === 'string' ? deviceOf(device) : device))
  for (const [n, { name }] of requests.entries())
    if (requests.findIndex((other) => other.name === name) !== n)
      throw new BadInput(`two devices have the name ${name}: rename one`)
  const descriptors = activatedDescriptors(process.env, process.pid)
  const endpoints = endpointsOf(options, descriptors)
  const { pageCaches = [], caches: cacheRequests = [] } = options
  if (endpoints.length === 0 && options.fuse === undefined && requests.length + pageCaches.length > 0)
    throw new BadInput('say how to serve: add --nbd or --fuse, or hand a socket over to this process (LISTEN_FDS)')
  const limits = limitsOf(options)
  const access = accessOf(options)
  const http = httpPlanOf(options)
  const metricsAt = options.metrics === undefined ? undefined : metricsAddress(options.metrics)
  // Slow to load, and not always needed. Loaded before the first stat of a socket: afterwards Node takes every link for
  // a file (`realpathSync` judges by the last stat) and does not find the dependencies of a linked package.
  const serveMetrics = metricsAt === undefined ? undefined : (await import('../metrics/endpoint.ts')).serveMetrics
  const controlPath = socketPath(options.control)
  const auto = new AutoMemory(options.memory)
  const roles: Role[] = [
    { role: 'the control socket', path: controlPath },
    { role: 'the record of the server', path: recordPath(controlPath) },
  ]
  for (const endpoint of endpoints) if ('path' in endpoint) roles.push({ role: 'an NBD socket', path: endpoint.path })
  const factories = auto.factories(await layersWith(options.modules))
  let limitsBytes = 0
  const latencies = requests.map(() => new Latencies())
  const stacks = requests.map((request, n) => {
    const { name, snapshot } = request
    if (snapshot !== undefined) roles.push({ role: `the snapshot of ${name}`, path: snapshot })
    const role = `a backing file of ${name}`
    const stack = stackFor(
      options,
      request,
      toldFiles(
        toldLimits(factories, (bytes) => (limitsBytes += bytes)),
        (path) => roles.push({ role, path }),
      ),
    )
    return latencies[n]!.withMoves(stack)
  })
  const cacheEndpoints = cacheRequests.map((request) => {
    const { name, file, listen } = request
    const endpoint = cacheEndpointOf(listen, access)
    limitsBytes += servedCacheBytes(request)
    if (file !== undefined) roles.push({ role: `the file of ${name}`, path: file.path })
    if ('path' in endpoint) roles.push({ role: `the socket of ${name}`, path: endpoint.path })
    return endpoint
  })
  const secondChances = pageCaches.map((request) => {
    const { name, file } = request
    judgeFile(request)
    limitsBytes += request.memoryBytes
    roles.push({ role: `the file of ${name}`, path: file })
    const told = toldFiles(
      toldLimits(factories, (bytes) => (limitsBytes += bytes)),
      (path) => roles.push({ role: `a backing file of ${name}`, path }),
    )
    return request.stack === undefined ? [] : parseStack(request.stack.replaceAll('{name}', name), told)
  })
  const swaps = requests.filter(({ swapPriority }) => swapPriority !== undefined)
  auto.begin()
  if (options.fuse === undefined) judgeLimits(limitsBytes)
  if (auto.isUsed && options.fuse !== undefined)
    throw new BadInput(
      'with --fuse all memory is taken before serving, so that no limit can be auto: set limits in bytes',
    )
  judgeRoles(roles, options.fuse)
  if (options.fuse !== undefined) {
    judgeMounting(resolve(options.fuse))
    await judgeLoops(resolve(options.fuse))
  }
  // Claimed before anything else is touched.
  const record = new ServerRecord(controlPath)

  // Undone in the opposite order, however the server ends.
  const undo: (() => Promise<void> | void)[] = []
  const log = new Log({
    ...(options.log === undefined ? {} : { format: options.log }),
    ...(options.logLevel === undefined ? {} : { level: options.logLevel }),
  })
  undo.push(() => log.close())
  // The command of `tmem run` notifies a manager of its own.
  const manager = new ServiceManager(course === undefined ? process.env : {}, log)
  /** The losses that the next server must learn of. */
  const lost: Kept[] = []
  let serves = false
  undo.push(() => record.end(lost, serves))
  // A signal before it serves ends it at the next opportunity.
  const goOn = (): void => throwIfInterrupted(terminal.signal)
  try {
    for (const line of record.judge(options.fresh === true)) log.warn('server.before', line)
    const protection = options.fuse === undefined ? undefined : await protect()
    undo.push(() => protection?.undo())
    const devices: Opened[] = []
    // From then on clients may have written.
    let keeps = false
    let nbd: NbdServer | undefined
    let fuse: FuseServer | undefined
    // A server that the kernel swaps to must not wait for memory.
    const memory = options.fuse === undefined ? undefined : aheadMemory()
    // Other servers give memory back to the system at once, and not at the next garbage collection.
    const allocator = memory?.allocator ?? mappedAllocator()
    // Read at each access to a page: once a second is precise enough.
    let nowMs = performance.now()
    const tickings: Ticking[] = []
    for (const [n, request] of requests.entries()) {
      const context = { clock: () => nowMs, wake: () => tickings[n]?.wake(), allocator }
      const isVirtual = options.hypervisor !== undefined
      const device = await opened(request, { stack: stacks[n]!, isVirtual, ...context }, { terminal, log })
      const { served } = device
      const overFuse = latencies[n]!.timed(served, 'fuse')
      const users = new Users(
        request.name,
        entrancesOf(overFuse, () => ({ nbd, fuse })),
      )
      devices.push({
        ...device,
        users,
        overNbd: latencies[n]!.timed(served, 'nbd'),
        overFuse,
        stats: () => latencies[n]!.complete(served.stats()),
      })
      undo.push(() => {
        const { served } = device
        if (!keeps) return 'abandon' in served ? served.abandon() : served.close()
        return closed(served, request, new LongWork(terminal, log, 'server.ending')).catch((error: unknown) => {
          if (request.snapshot !== undefined) lost.push({ name: request.name, survives: 'flushed' })
          throw error
        })
      })
      goOn()
      await Promise.race([device.device.ready(), interrupted(terminal.signal)])
    }
    const caches: CachedFileDevice[] = []
    const cacheTickings: Ticking[] = []
    for (const [n, request] of pageCaches.entries()) {
      const wake = (): void => cacheTickings[n]?.wake()
      const context = { stack: secondChances[n]!, clock: () => nowMs, wake, allocator }
      const cache = await CachedFileDevice.open(request, context)
      caches.push(cache)
      undo.push(() => cache.close())
      goOn()
    }
    const cacheTimes = caches.map(() => new Latencies())
    const valueCaches: ServedCache[] = []
    for (const request of cacheRequests) {
      const { name } = request
      const cache = await ServedCache.open(request, {
        ...(memory === undefined ? {} : { allocator: memory.allocator }),
        onError: (error) => onError(error),
        onRefused: (why) =>
          log.warn('client.refused', `a client of cache ${name} was refused: ${why}`, { cache: name }),
      })
      valueCaches.push(cache)
      undo.push(() => cache.close())
      goOn()
    }
    memory?.settle()
    for (const { name, done, note } of protection?.measures ?? [])
      if (!done) log.warn('server.protection', `not protected by ${name}: ${note}`)
    record.keep(requests.map((request) => ({ name: request.name, survives: survivalOf(request) })))
    keeps = true
    const busy = options.busyTurns === undefined ? {} : { busyTurns: options.busyTurns }
    const onError = (error: unknown): void => {
      // Any other error is a client's.
      if (error instanceof TmemError) log.error('request.failed', error.message, { code: error.code })
      else refused(error as Error)
    }
    const refused = (error: Error): void => {
      // Bad input concerns the writer of the knob alone; a failure also concerns the operator.
      const isNonsense = !(error instanceof TmemError || 'code' in error)
      log[isNonsense ? 'debug' : 'warn']('request.refused', error.message)
    }
    const servers: { stats(): StatsNode }[] = []
    nbd = nbdServer({
      exports: [
        ...devices.map(({ overNbd, users }) => ({
          name: overNbd.name,
          device: overNbd,
          resizable: true,
          // Without a name, the only device is meant.
          isDefault: devices.length + caches.length === 1,
          isUsedElsewhere: () => users.hasFile,
        })),
        ...caches.map((cache, n) => ({
          name: cache.name,
          device: cacheTimes[n]!.timed(cache, 'nbd'),
          isDefault: devices.length + caches.length === 1,
        })),
      ],
      onError,
      onRefused: ({ reason, peer, message }) =>
        log.warn('client.refused', `NBD client on ${peer} refused: ${message}`, { reason, peer }),
      limits,
      ...busy,
    })
    const addresses = await listenAll(nbd, endpoints, undo)
    goOn()
    if (endpoints.length > 0) servers.push(nbd)
    const cacheAddresses: string[] = []
    for (const [n, cache] of valueCaches.entries()) {
      const { address, isOpen } = await cache.listen(cacheEndpoints[n]!)
      cacheAddresses.push(address)
      if (isOpen)
        log.warn('cache.open', `everybody who reaches ${address} can read, write and empty the cache ${cache.name}`, {
          cache: cache.name,
          address,
        })
    }
    const statistics = (): Statistics => ({
      devices: devices.map(({ stats }) => stats()),
      pageCaches: caches.map((cache, n) => cacheTimes[n]!.complete(cache.stats())),
      caches: valueCaches.map((cache) => cache.stats()),
      servers: servers.map((server) => server.stats()),
    })
    const metrics = await serveMetrics?.(metricsAt!, statistics)
    undo.push(() => metrics?.close())
    if (options.fuse !== undefined) {
      fuse = await fuseServer({
        mountPoint: options.fuse,
        root: rootOf(
          devices,
          caches.map((cache, n) => cacheTimes[n]!.timed(cache, 'fuse')),
          valueCaches,
          servers,
          log,
        ),
        ...busy,
        onError,
      })
      servers.push(fuse)
    }
    servers.push(log)
    let info: Info = {
      pid: process.pid,
      stack: options.stack,
      hypervisor: options.hypervisor ?? null,
      devices: devices.map(({ served: { name, sizeBytes } }) => ({ name, sizeBytes })),
      pageCaches: caches.map(({ name, sizeBytes }) => ({ name, sizeBytes })),
      caches: valueCaches.map(({ name }, n) => ({ name, listen: cacheAddresses[n]! })),
      nbd: addresses,
      fuse: fuse?.mountPoint ?? null,
      metrics: metrics?.url ?? null,
      fileSystem: fuse?.device ?? null,
      http: null,
    }
    // From here on a failure must not leave the mount behind.
    let mounted = fuse
    undo.push(async () => {
      if (mounted !== undefined) await mounted.close()
    })
    const control = await serveControl(
      { path: controlPath, ...access },
      (request, peer) => answerTo(request, peer, { info, devices, statistics, log }),
      refused,
    )
    undo.push(() => {
      control.close()
      rmSync(controlPath, { force: true })
    })
    if (http !== undefined) {
      const parts = {
        info,
        devices,
        servers,
        log,
        explain: (device: string, offset: number) => explained(named(devices, device), offset),
        turn: (device: string, name: string, knob: Knob, value: string) =>
          turn(device, name, knob, value, { through: 'the console' }, log),
      }
      const console = await webConsole(http, parts)
      undo.push(() => console.close())
      info = { ...info, http: console.url }
      if (http.isOpen)
        log.warn('console.open', `everybody who reaches ${console.url} can read all that the console shows`, {
          url: console.url,
        })
    }
    const broken: string[] = []
    undo.push(async () => {
      for (const [n, { snapshot, name }] of requests.entries()) {
        const { device, users } = devices[n]!
        // Clients that have the device open reconnect to the next server, and would read zeros there.
        const isMissed = holdsPages(device) && (await users.isThereStill())
        if (snapshot === undefined && (isMissed || broken.includes(name))) lost.push({ name, survives: 'nothing' })
      }
    })
    for (const { device } of devices)
      tickings.push(
        new Ticking(
          () => device.tick({ pages: tickPages }),
          (error) => {
            broken.push(device.name)
            log.error('device.broken', `${device.name} has failed and serves no requests any more: ${error.message}`, {
              device: device.name,
            })
          },
        ),
      )
    for (const cache of caches)
      cacheTickings.push(
        new Ticking(
          () => cache.tick({ pages: tickPages }),
          (error) =>
            log.error(
              'cache.broken',
              `the second chance of ${cache.name} has failed; the file is served without it: ${error.message}`,
            ),
        ),
      )
    for (const cache of valueCaches)
      cacheTickings.push(
        new Ticking(
          () => cache.tick(tickPages),
          (error) =>
            log.error('cache.broken', `cache ${cache.name} has failed: ${error.message}`, { cache: cache.name }),
        ),
      )
    const watched = [
      ...devices.map(({ device }) => new PlaceWatch(device, log)),
      ...(http === undefined ? [] : devices.map(({ device }) => new RefusalWatch(device, log))),
    ]
    const looking = setInterval(() => {
      nowMs = performance.now()
      for (const watch of watched) watch.look()
      log.look()
      if (auto.step(nowMs)) for (const ticking of [...tickings, ...cacheTickings]) ticking.wake()
    }, lookMs)
    undo.push(() => {
      clearInterval(looking)
      for (const ticking of [...tickings, ...cacheTickings]) ticking.stop()
    })
    undo.push(async () => {
      if (mounted !== undefined && swaps.length > 0) await drained(mounted, { terminal, log })
    })
    // One after the other, as the order decides the priorities of the kernel.
    for (const { name, swapPriority } of swaps) {
      goOn()
      await swapOn(name, swapPriority!, controlPath)
    }
    goOn()
    serves = true
    if (options.json === true) terminal.print(JSON.stringify(info))
    // With a socket handed over (`nbdinfo -- [ tmem serve … ]`), standard output may belong to the parent process.
    else if (course === undefined && descriptors.length === 0)
      terminal.print(described(info, controlPath, new Set(swaps.map(({ name }) => name))))
    // Signals are handled from now on, whatever the manager does.
    const names = [...devices.map(({ served }) => served), ...caches, ...valueCaches].map(({ name }) => name)
    const told = manager.ready(`serves ${names.join(', ')}`)
    await stopped(fuse, options.drain === true, { terminal, log, info }, course)
    await told
    await manager.stopping()
    mounted = undefined
    if (broken.length > 0) throw new Failed(`the pages of ${broken.join(', ')} are lost: see the errors above`)
  } catch (error) {
    // Whatever the signal interrupted.
    if (!serves) goOn()
    throw error
  } finally {
    await undoAll(undo)
  }
  const names = lost.map(({ name }) => name).join(', ')
  if (names !== '')
    throw new LookFirst(
      `the pages of ${names} are lost, and clients had it open: end them, then start with --fresh; a snapshot would keep the pages`,
    )
}

/**
 * Makes the kernel swap to a device. Another process does it, because this one must answer requests for the files of
 * the mount meanwhile. Rejects with `Failed`.
 */
async function swapOn(name: string, priority: number, control: string): Promise<void> {
  const words = ['swap', 'on', name, '--control', control, '--priority', String(priority)]
  await tool(process.execPath, fileURLToPath(new URL('../bin.js', import.meta.url)), ...words)
}

/** Rejects with `Interrupted` when the signal is raised; never resolves. */
const interrupted = (signal: AbortSignal): Promise<never> =>
  new Promise((_, reject) => {
    signal.addEventListener('abort', () => reject(new Interrupted()), { once: true })
  })

/** Whether the device has pages that are not zero. */
function holdsPages(device: Ramzswap): boolean {
  const { slots = 0, empty = 0 } = device.stats().children.find(({ name }) => name === 'slots')?.counters ?? {}
  return empty < slots
}

/**
 * Rejects with `LookFirst` if a server was killed and the kernel still has loop devices over its files: each access to
 * them fails, and once the mount is gone they can no longer be identified.
 */
async function judgeLoops(directory: string): Promise<void> {
  let place: Place
  try {
    place = placeOf(directory)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT')
      throw new Failed(`the directory ${directory} for the mount does not exist: make it with mkdir -p ${directory}`)
    throw new Failed(`${directory} cannot be used: ${(error as Error).message}`)
  }
  if (!place.isMountPoint || !place.mount.type.startsWith('fuse')) return
  const isDead = await lstat(`${place.path}/.`).then(
    () => false,
    (error: NodeJS.ErrnoException) => error.code === 'ENOTCONN',
  )
  if (!isDead) return
  const uses = await loopsOverDead(place.mount)
  if (uses.length === 0) return
  throw new LookFirst(
    `the earlier server was killed, and its files are in use by ${usesOf(uses)}: run ${uses.flatMap(endingOf).join('; ')}; then start again`,
  )
}

const usesOf = (uses: readonly LoopUse[]): string => uses.map(useText).join('; ')

/** Undoes all steps, the last first, then throws the first error. */
async function undoAll(undo: readonly (() => Promise<void> | void)[]): Promise<void> {
  const errors: unknown[] = []
  for (const act of [...undo].reverse()) {
    try {
      await act()
    } catch (error) {
      errors.push(error)
    }
  }
  if (errors.length > 0) throw errors[0]
}

/** Resolves when the server was asked to stop and may; the mount is then gone. */
async function stopped(
  fuse: FuseServer | undefined,
  drains: boolean,
  { terminal, log, info }: { readonly terminal: Terminal; readonly log: Log; readonly info: Info },
  course: Course | undefined,
): Promise<void> {
  let asked: () => void = () => undefined
  let runs = course !== undefined
  const release = terminal.takeSignals(() => {
    if (runs) course!.signalled()
    else asked()
  })
  const over = course?.until(info).then(() => {
    runs = false
    return 'asked' as const
  })
  const ended = fuse?.ended.then(() => 'ended' as const)
  try {
    for (;;) {
      const request = new Promise<'asked'>((settle) => {
        asked = () => settle('asked')
      })
      if ((await Promise.race([runs ? over! : request, ...(ended === undefined ? [] : [ended])])) === 'ended')
        throw new Failed(`the mount on ${fuse!.mountPoint} was unmounted by another process`)
      if (fuse === undefined) return
      try {
        if (drains) await drained(fuse, { terminal, log })
        const uses = await loopsOver(fuse.device)
        if (uses.length === 0) {
          await fuse.close()
          return
        }
        log.warn(
          'server.in-use',
          `not stopped: in use by ${usesOf(uses)}: run tmem swap off first, or start with --drain`,
        )
      } catch (error) {
        log.warn('server.in-use', `not stopped: ${(error as Error).message}`)
      }
    }
  } finally {
    release()
  }
}

async function listenAll(
  server: NbdServer,
  endpoints: readonly NbdEndpoint[],
  undo: (() => Promise<void> | void)[],
): Promise<string[]> {
  undo.push(() => server.close())
  const addresses: string[] = []
  for (const endpoint of endpoints) {
    try {
      const address = await server.listen(endpoint)
      addresses.push(addressText(address))
    } catch (error) {
      throw new Failed(`cannot listen for NBD: ${(error as Error).message}`)
    }
  }
  return addresses
}

function addressText(address: NbdAddress): string {
  if ('path' in address) return `unix:${address.path}`
  return 'fd' in address ? `fd:${address.fd}` : `tcp:${address.host}:${address.port}`
}

function rootOf(
  devices: readonly Opened[],
  caches: readonly BlockDevice[],
  valueCaches: readonly ServedCache[],
  servers: readonly { stats(): StatsNode }[],
  log: Log,
): { kind: 'directory'; entries: () => Map<string, FuseNode> } {
  return {
    kind: 'directory',
    entries: () => {
      const entries = new Map<string, FuseNode>(
        devices.map(({ overFuse, users }) => [
          overFuse.name,
          { kind: 'device', device: overFuse, mayOpen: () => users.mayOpen },
        ]),
      )
      for (const device of caches) entries.set(device.name, { kind: 'device', device })
      entries.set('stats', {
        kind: 'directory',
        // A device may have the name of a section of the server.
        entries: () =>
          namedApart([
            ...devices.map(({ served, stats }) => [served.name, statisticsTree(stats)] as const),
            ...[...caches, ...valueCaches].map((cache) => [cache.name, statisticsTree(() => cache.stats())] as const),
            ...servers.map(
              (server) => [`server-${server.stats().name}`, statisticsTree(() => server.stats())] as const,
            ),
          ]),
      })
      entries.set('knobs', {
        kind: 'directory',
        entries: () =>
          new Map(
            devices.map((opened) => [opened.served.name, { kind: 'directory', entries: () => filesOf(opened, log) }]),
          ),
      })
      return entries
    },
  }
}

/** The entrances of users of a device that exist by now. */
function entrancesOf(
  device: BlockDevice,
  servers: () => { readonly nbd: NbdServer | undefined; readonly fuse: FuseServer | undefined },
): Entrances {
  return {
    clients: () =>
      servers()
        .nbd?.stats()
        .children.find(({ name }) => name === device.name)?.counters['connections'] ?? 0,
    opens: () => servers().fuse?.opens(device) ?? 0,
    opensNow: async () => servers().fuse?.opensNow(device) ?? 0,
    kernelUse: async () => {
      const { fuse } = servers()
      if (fuse === undefined) return undefined
      const uses = await loopsOver(fuse.device)
      const own = uses.filter(({ inode }) => inode !== undefined && fuse.inodes(device).includes(inode))
      return own.length === 0 ? undefined : own.map(useText).join('; ')
    },
  }
}

const filesOf = (opened: Opened, log: Log): Map<string, FuseNode> =>
  new Map(
    [...knobsOf(opened)].map(([name, knob]) => [
      name,
      {
        kind: 'text',
        read: () => `${knob.read()}\n`,
        write: (text, writer) => turn(opened.served.name, name, knob, text, { ...writer, through: 'the mount' }, log),
      },
    ]),
  )

/** The setter of a knob, and the way that the request came. */
interface Turner {
  readonly pid?: number
  readonly uid?: number
  readonly through: 'the mount' | 'the control socket' | 'the console'
}

/** Sets a knob, and logs by whom. */
async function turn(
  device: string,
  name: string,
  knob: Knob,
  value: string,
  { pid, uid, through }: Turner,
  log: Log,
): Promise<string> {
  const answer = await knob.write(value)
  const who = pid === undefined ? '' : ` by process ${pid} of user ${uid}`
  log.info('knob.turned', `${device}: ${name} ${value}${who}, through ${through}: ${answer}`, {
    device,
    knob: name,
    value,
    answer,
    through,
    by_pid: pid ?? null,
    by_uid: uid ?? null,
  })
  return answer
}

/** The parts of a server that answers need. */
interface Answering {
  readonly info: Info
  readonly devices: readonly Opened[]
  readonly statistics: () => Statistics
  readonly log: Log
}

async function answerTo(
  request: Request,
  peer: () => Peer | undefined,
  { info, devices, statistics, log }: Answering,
): Promise<Answers[Request['do']]> {
  switch (request.do) {
    case 'info':
      return info
    case 'stats':
      return { info, ...statistics() }
    case 'explain':
      return explained(named(devices, request.device), request.offset)
    case 'users':
      return named(devices, request.device).users.counts()
    case 'knobs': {
      const { name, value } = request
      const device = named(devices, request.device)
      const knobs = knobsOf(device)
      if (name === undefined) return Object.fromEntries([...knobs].map(([each, knob]) => [each, knob.read()]))
      const knob = knobs.get(name)
      if (knob === undefined)
        throw new Error(
          `there is no knob ${name}; ${knobsElsewhere.get(name) ?? `there are ${[...knobs.keys()].join(', ')}`}`,
        )
      if (value === undefined) return { [name]: knob.read() }
      const turner = { ...peer(), through: 'the control socket' } as const
      return { [name]: await turn(device.served.name, name, knob, value, turner, log) }
    }
    default:
      throw new Error('unknown request: expected info, stats, users, explain or knobs')
  }
}

/** The page at an offset. Throws `RangeError` for an offset outside of the device. */
function explained({ device }: Opened, offset: number): Answers['explain'] {
  const { name, sizeBytes } = device
  if (!Number.isSafeInteger(offset) || offset < 0 || offset >= sizeBytes)
    throw new RangeError(`${name} has bytes 0 to ${sizeBytes - 1}, got offset ${offset}`)
  const report = device.explain(Math.floor(offset / 4096))
  const { codec } = report
  return { device: name, offset, ...report, codecName: codec === null ? null : (codecName(codec) ?? null) }
}

function named(devices: readonly Opened[], name: string): Opened {
  const device = devices.find(({ served }) => served.name === name)
  if (device !== undefined) return device
  throw new Error(`there is no device ${name}; there is ${devices.map(({ served }) => served.name).join(', ')}`)
}

/** Number of moves between places that are recorded of each device for `tmem explain`: 320 KiB. */
export const rememberedMoves = 16_384

/** Options for opening a device that are not from the command line. */
interface Context {
  readonly stack: readonly Layer[]
  /** Whether its first place is the memory of a hypervisor. */
  readonly isVirtual: boolean
  readonly clock: () => number
  readonly wake: () => void
  readonly allocator: Allocator
}

async function opened(
  request: DeviceRequest,
  context: Context,
  { terminal, log }: { readonly terminal: Terminal; readonly log: Log },
): Promise<Pick<Opened, 'device' | 'served' | 'lending'>> {
  const { snapshot: path, writethrough } = request
  const { allocator } = context
  const work = new LongWork(terminal, log, 'server.preparing')
  const onProgress = (what: string, done: number, total: number): void => {
    throwIfInterrupted(terminal.signal)
    work.at(what, done, total)
  }
  try {
    const stopwatch = (): number => performance.now()
    const device = deviceFor(request, { ...context, history: rememberedMoves, onProgress, stopwatch })
    const lending = lendingIn(context.stack)
    if (path === undefined) return { device, served: device, lending }
    const { maxSizeBytes } = device
    const reading = (done: number, total: number): void => onProgress(`reading ${path}`, done, total)
    const served = await openSnapshot(device, { path, writethrough, maxSizeBytes, onProgress: reading, allocator })
    return { device, served, lending }
  } finally {
    work.end()
  }
}

function deviceFor(
  { name, sizeBytes, memlimitBytes, maxSizeBytes }: DeviceRequest,
  {
    isVirtual,
    ...context
  }: Context & { readonly history: number; readonly onProgress: OpenProgress; readonly stopwatch: () => number },
): Ramzswap {
  const limits = {
    ...(memlimitBytes === undefined ? {} : { memlimitBytes }),
    ...(maxSizeBytes === undefined ? {} : { maxSizeBytes }),
  }
  try {
    return (isVirtual ? virtswap : ramzswap)({ name, sizeBytes, ...limits, ...context })
  } catch (error) {
    if (error instanceof RangeError) throw new BadInput(error.message)
    throw error
  }
}

/** Milliseconds between two looks at the progress of closing a device. */
const endMs = 250

/** Closes a device, and shows meanwhile how much is still to be written to its image. */
async function closed(served: Opened['served'], { name, snapshot }: DeviceRequest, work: LongWork): Promise<void> {
  if (snapshot === undefined) return served.close()
  const dirtyBytes = (): number =>
    (served.stats().children.find((child) => child.name === 'snapshot')?.counters['dirty_pages'] ?? 0) * 4096
  const total = dirtyBytes()
  const looking = setInterval(() => {
    work.at(`writing ${name} to ${snapshot}`, Math.max(0, total - dirtyBytes()), total)
  }, endMs)
  try {
    await served.close()
  } finally {
    clearInterval(looking)
    work.end()
  }
}

/** Ends swapping to the files of a mount, and shows meanwhile how much is still to come back. */
async function drained(
  { device }: FuseServer,
  { terminal, log }: { readonly terminal: Terminal; readonly log: Log },
): Promise<void> {
  const work = new LongWork(terminal, log, 'server.draining')
  try {
    await drain(device, (what, done, total) => work.at(what, done, total))
  } finally {
    work.end()
  }
}

const survivalOf = ({ snapshot, writethrough }: DeviceRequest): Survival =>
  snapshot === undefined ? 'nothing' : writethrough ? 'acknowledged' : 'flushed'

/** The valid names of devices, which become names of files beside `stats` and `knobs`. */
export const deviceName: { readonly pattern: RegExp; readonly taken: readonly string[]; readonly rule: string } = {
  pattern: /^[A-Za-z0-9][\w.-]{0,63}$/,
  taken: ['stats', 'knobs'],
  rule: 'expected at most 64 letters, digits, . _ or -, and not stats or knobs',
}

/** `name=swap0,size=1GiB`. */
function deviceOf(text: string): DeviceRequest {
  const values = new Map<string, string>()
  for (const part of text.split(',')) {
    const [, key, value] =
      /^(name|size|memlimit|max|snapshot)=(.+)$/.exec(part) ?? (part === 'writethrough' ? [part, part, ''] : [])
    if (key === undefined || value === undefined || values.has(key))
      throw new BadInput(
        `bad device "${text}": expected name=NAME,size=BYTES[,memlimit=BYTES][,max=BYTES][,snapshot=PATH][,writethrough]`,
      )
    values.set(key, value)
  }
  const amount = (key: string): number | undefined => {
    const value = values.get(key)
    if (value === undefined) return undefined
    const bytes = parseBytes(value)
    if (bytes === undefined || bytes % 4096 !== 0)
      throw new BadInput(`bad device "${text}": ${key}: expected whole pages of 4 KiB, e.g. 64MiB`)
    return bytes
  }
  const name = values.get('name')
  const sizeBytes = amount('size')
  if (name === undefined || sizeBytes === undefined)
    throw new BadInput(`bad device "${text}": expected a name and a size, e.g. name=swap0,size=1GiB`)
  if (!deviceName.pattern.test(name) || deviceName.taken.includes(name))
    throw new BadInput(`bad device name "${name}": ${deviceName.rule}`)
  const memlimitBytes = amount('memlimit')
  const maxSizeBytes = amount('max')
  const snapshot = values.get('snapshot')
  const writethrough = values.has('writethrough')
  if (writethrough && snapshot === undefined)
    throw new BadInput(`bad device "${text}": writethrough needs a snapshot: add snapshot=PATH`)
  return {
    name,
    sizeBytes,
    writethrough,
    ...(snapshot === undefined ? {} : { snapshot: resolve(snapshot) }),
    ...(memlimitBytes === undefined ? {} : { memlimitBytes }),
    ...(maxSizeBytes === undefined ? {} : { maxSizeBytes }),
  }
}

/** The stack of one device, with its `{name}` and `{size}`. Memory of a hypervisor comes first. */
export function stackFor(
  { stack: general, hypervisor }: Pick<ServeOptions, 'stack' | 'hypervisor'>,
  { name, sizeBytes, maxSizeBytes, stack = general }: DeviceRequest,
  factories: readonly LayerFactory[],
): Layer[] {
  const size = formatBytes(maxSizeBytes ?? sizeBytes)
  return [hypervisor ?? [], stack]
    .flat()
    .flatMap((text) => parseStack(text.replaceAll('{name}', name).replaceAll('{size}', size), factories))
}

function described(info: Info, control: string, swappedTo: ReadonlySet<string>): string {
  const lines = info.devices.map(
    ({ name, sizeBytes }) =>
      `${name}: ${formatBytes(sizeBytes)}${swappedTo.has(name) ? ', this host swaps to it' : ''}`,
  )
  for (const address of info.nbd) lines.push(`NBD on ${address}`)
  for (const { name, listen } of info.caches) lines.push(`cache ${name} on ${listen}`)
  if (info.fuse !== null) lines.push(`files in ${info.fuse}`)
  if (info.http !== null) lines.push(`console on ${info.http}`)
  if (info.metrics !== null) lines.push(`metrics on ${info.metrics}`)
  lines.push(`control socket ${control}; process ${info.pid}; Ctrl-C or SIGTERM ends it`)
  return lines.join('\n')
}
