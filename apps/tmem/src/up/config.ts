/**
 * The configuration file of `tmem up`: a whole server as YAML, checked completely before anything starts.
 *
 * All mistakes are reported at once, each in a line of its own: `FILE:LINE:COLUMN: what is wrong`. A misspelt name is a
 * mistake, and its report suggests the nearest name. The same schema is the JSON Schema from which editors complete
 * (`tmem config schema`).
 *
 * Paths in the file, including those in the texts of stacks, are relative to the directory of the file.
 */
import { dirname, resolve } from 'node:path'
import { formatBytes, nearestName, parseBytes, parseStack, planStack, TmemError } from '@tmem/core'
import { planDevice } from '@tmem/ramzswap'
import { type Document, isMap, isNode, isPair, LineCounter, parseDocument, visit } from 'yaml'
import { z } from 'zod'
import { BadInput } from '../ending.ts'
import { readGivenFile } from '../given-file.ts'
import { layersWith } from '../layers.ts'
import { httpPlanOf } from '../serve/http.ts'
import type { LogFormat, LogLevel } from '../serve/log.ts'
import { type DeviceRequest, deviceName, type ServeOptions, stackFor } from '../serve/serve.ts'

const pageBytes = 4096
/** The first level of a page cache has at least 16 pages. */
const leastCacheBytes = 16 * pageBytes
/** What a cache of values needs, and its file. */
const leastValueCacheBytes = 2 * 2 ** 20
/** With a file, memory that is not for its tables; and of that file, what its tables take at most. */
const leastBesideFile = 3 * 2 ** 20
const fileShare = 32
const leastFileBytes = 64 * 1024
const mostFileBytes = 256 * 2 ** 30

/** A file of a thousand devices has a tenth of that. */
const maxFileBytes = 2 ** 20

/** An object with a fixed set of names. Any other name is a mistake, a line each, with the nearest name. */
function named<Shape extends z.ZodRawShape>(shape: Shape): z.ZodObject<Shape, z.core.$strict> {
  return z.strictObject(shape, {
    error: (issue) =>
      issue.code === 'unrecognized_keys'
        ? issue.keys.map((key) => `unknown name ${key}: ${nearestName(key, Object.keys(shape))}`).join('\n')
        : `expected names and values: ${Object.keys(shape).join(', ')}`,
  })
}

const text = (what: string): z.ZodString => z.string({ error: `expected ${what}` }).min(1, `expected ${what}`)
const flag = (): z.ZodBoolean => z.boolean({ error: 'expected true or false' })
const wholeNumber = (least: number, most: number): z.ZodNumber => {
  const error = `expected a whole number from ${least} to ${most}`
  return z.number({ error }).int(error).min(least, error).max(most, error)
}

const amountText = 'expected an amount of bytes such as 64MiB, 1GiB or 65536'

/** An amount of bytes, as text or as a number. */
const amount = (): z.ZodType<number, string | number> =>
  z.union([z.string(), z.number()], { error: amountText }).transform((value, context) => {
    const bytes = typeof value === 'string' ? parseBytes(value) : value
    if (bytes !== undefined && Number.isSafeInteger(bytes) && bytes >= 0) return bytes
    context.addIssue({ code: 'custom', message: amountText })
    return z.NEVER
  })

/** An amount of bytes that is whole pages. */
const pages = (): z.ZodType<number, string | number> =>
  amount().refine((bytes) => bytes > 0 && bytes % pageBytes === 0, 'expected whole pages of 4 KiB, e.g. 64MiB')

const swapSchema = z.union(
  [flag(), named({ priority: wholeNumber(0, 32767).optional().describe('priority of the swap area') })],
  { error: 'expected true, or priority: 0 to 32767' },
)

const deviceSchema = named({
  size: pages().describe('size of the device, in whole pages of 4 KiB'),
  stack: text('the text of a stack').optional().describe('stack of this device, instead of the general one'),
  memlimit: pages().optional().describe('most bytes of memory for its pages; pages beyond it sink'),
  max: pages().optional().describe('largest size to which it can grow while it is served'),
  snapshot: text('a path').optional().describe('image file that is loaded at the start and written by flushes'),
  writethrough: flag().optional().describe('write each page to the image before the write is acknowledged'),
  swap: swapSchema.optional().describe('let the kernel of this host swap to the device while it is served'),
})

const pageCacheSchema = named({
  file: text('a path').describe('the file to serve, of whole sectors, such as a disk image'),
  memory: pages().describe('bytes of the first level, at least 64KiB'),
  stack: text('the text of a stack')
    .optional()
    .describe('stack for the second chance, which keeps pages that the first level evicts'),
})

const cacheSchema = named({
  memory: amount().describe('bytes of memory, everything included: at least 2MiB; with a file 3MiB and a 32nd of it'),
  ttl: wholeNumber(1, 2 ** 31 - 1)
    .optional()
    .describe('seconds that a value lives whose client says nothing of it (default: until its room is needed)'),
  file: named({
    path: text('a path').describe('where it is; made if it is not there'),
    size: amount().describe('its size: 64KiB to 256GiB'),
  })
    .optional()
    .describe('where entries go that are not used, and are found again after a restart'),
  listen: text('unix:PATH or tcp:HOST:PORT')
    .regex(/^(?:unix:.+|tcp:.+:\d{1,5})$/, 'expected unix:PATH or tcp:HOST:PORT, e.g. tcp:127.0.0.1:6380')
    .describe('where clients of Redis find it: unix:PATH[,mode=660] or tcp:HOST:PORT'),
})

const schema = named({
  stack: text('the text of a stack')
    .optional()
    .describe(
      'the stack of each device without one of its own, in which {name} and {size} stand for its name and size',
    ),
  devices: z
    .record(z.string(), deviceSchema, { error: 'expected devices by name, each with a size' })
    .optional()
    .describe('block devices by name'),
  'page-caches': z
    .record(z.string(), pageCacheSchema, { error: 'expected page caches by name, each with a file and memory' })
    .optional()
    .describe('files to serve read-only, by name, each through a page cache'),
  caches: z
    .record(z.string(), cacheSchema, { error: 'expected caches by name, each with memory and listen' })
    .optional()
    .describe('caches of values for clients of Redis, by name, each on an address of its own'),
  nbd: z
    .array(text('unix:PATH or tcp:HOST:PORT'), { error: 'expected a list of addresses: unix:PATH or tcp:HOST:PORT' })
    .optional()
    .describe('addresses for NBD: unix:PATH[,mode=660] or tcp:HOST:PORT'),
  limits: named({
    connections: wholeNumber(1, 2 ** 31 - 1).optional(),
    'per-address': wholeNumber(1, 2 ** 31 - 1).optional(),
    requests: wholeNumber(1, 2 ** 31 - 1).optional(),
    bytes: amount().optional(),
    handshake: wholeNumber(1, 86_400).optional().describe('seconds'),
    keepalive: wholeNumber(0, 86_400).optional().describe('seconds between keepalive probes; 0: none'),
  })
    .optional()
    .describe('limits on NBD clients'),
  tls: named({
    certificates: text('a directory').describe('directory with server-cert.pem, server-key.pem and ca-cert.pem'),
    'verify-peer': flag().optional().describe('accept only clients whose certificate ca-cert.pem has signed'),
  })
    .optional()
    .describe('TLS for NBD on TCP'),
  fuse: text('a directory').optional().describe('directory for a mount with devices, statistics and knobs as files'),
  metrics: text('tcp:HOST:PORT, e.g. tcp:127.0.0.1:9464')
    .regex(/^tcp:.+:\d{1,5}$/, 'expected tcp:HOST:PORT, e.g. tcp:127.0.0.1:9464')
    .optional()
    .describe('address of the metrics for Prometheus over HTTP: tcp:HOST:PORT'),
  sockets: named({
    mode: text('permissions such as "660"')
      .regex(/^0?[0-7]{3}$/, 'expected three octal digits in quotes, such as "660"')
      .optional(),
    group: z.union([z.string(), z.number()], { error: 'expected a group' }).optional().describe('name or number'),
  })
    .optional()
    .describe('permissions of the sockets that the server makes (default: its own user alone)'),
  http: named({
    listen: text('tcp:PORT or tcp:HOST:PORT')
      .optional()
      .describe('tcp:PORT, on the loopback, or tcp:HOST:PORT (default: tcp:127.0.0.1:8780)'),
    token: text('a path')
      .optional()
      .describe('file with the token that permits its bearer to set knobs in the console (default: nobody may)'),
  })
    .optional()
    .describe('the web console'),
  'busy-turns': wholeNumber(0, 2 ** 32 - 1)
    .optional()
    .describe('poll this many times for the next request before sleeping'),
  control: text('a path').optional().describe('control socket of the server'),
  memory: text('auto, perhaps with floor=BYTES, ceiling=BYTES, reserve=BYTES')
    .optional()
    .describe('auto: memory limits follow the free memory of the host; optional: floor=, ceiling=, reserve='),
  hypervisor: text('the text of a stack')
    .optional()
    .describe('hypervisor memory that is offered each page first (virtswap)'),
  modules: z
    .array(text('a path'), { error: 'expected a list of modules' })
    .optional()
    .describe('modules whose layers the stacks may also name'),
  log: named({
    format: z.enum(['text', 'json'], { error: 'expected text or json' }).optional(),
    level: z.enum(['error', 'warn', 'info', 'debug'], { error: 'expected error, warn, info or debug' }).optional(),
  })
    .optional()
    .describe('format and level of the log'),
})

type Content = z.infer<typeof schema>

/** The content of a valid file: what to serve, and what to swap to. */
export interface Config {
  /** Absolute path of the file. */
  readonly path: string
  /** Directory to which its paths are relative. */
  readonly folder: string
  readonly control: string | undefined
  readonly serve: Omit<ServeOptions, 'control' | 'fresh' | 'json'>
}

/** The JSON Schema of the file. */
export const configSchema = (): object =>
  z.toJSONSchema(schema, { io: 'input', unrepresentable: 'any', reused: 'inline' })

/** Reads and checks a file. Rejects with `BadInput`, with a line for each mistake. */
export async function readConfig(file: string): Promise<Config> {
  const path = resolve(file)
  let source: string
  try {
    source = readGivenFile(path, maxFileBytes).toString()
  } catch (error) {
    throw new BadInput(`cannot read ${file}: ${(error as Error).message}`)
  }
  const lines = new LineCounter()
  const document = parseDocument(source, { lineCounter: lines, prettyErrors: false })
  const mistakes = new Mistakes(file, document, lines)
  for (const { pos, message } of [...document.errors, ...document.warnings]) mistakes.at(pos[0], message)
  mistakes.judge()
  const parsed = schema.safeParse(contentOf(document, mistakes) ?? {})
  if (!parsed.success)
    for (const { path: where, ...issue } of parsed.error.issues) {
      if (issue.code !== 'unrecognized_keys') mistakes.of(where, issue.message)
      else for (const [n, line] of issue.message.split('\n').entries()) mistakes.of([...where, issue.keys[n]!], line)
    }
  mistakes.judge()
  const config = configOf(path, parsed.data!)
  await judge(parsed.data!, config, mistakes)
  mistakes.judge()
  return config
}

/**
 * The content of a file as values. Throws `BadInput` for aliases without an anchor and for aliases that expand to too
 * much.
 */
function contentOf(document: Document, mistakes: Mistakes): unknown {
  visit(document, {
    Alias: (_, alias) => {
      if (alias.resolve(document) === undefined)
        mistakes.at(alias.range?.[0] ?? 0, `there is no anchor ${alias.source}`)
    },
    Pair: (_, { key }) => {
      // As a key it would set the prototype, and its value would be lost.
      if (isNode(key) && String(key) === '__proto__')
        mistakes.at(key.range?.[0] ?? 0, '__proto__ cannot be used as a name')
    },
  })
  mistakes.judge()
  try {
    return document.toJS()
  } catch (error) {
    if (!(error instanceof ReferenceError)) throw error
    let first: number | undefined
    visit(document, {
      Alias: (_, alias) => {
        first ??= alias.range?.[0]
      },
    })
    mistakes.at(first ?? 0, 'its aliases expand to too much: write the values out')
    return mistakes.judge()
  }
}

/** The rules that the schema alone cannot express. */
async function judge(content: Content, { serve }: Config, mistakes: Mistakes): Promise<void> {
  const { devices = {} } = content
  const caches = serve.pageCaches ?? []
  const exported = Object.keys(devices).length + caches.length
  if (exported + (serve.caches ?? []).length === 0)
    mistakes.of(['devices'], 'expected at least one device, page cache or cache')
  else if (exported > 0 && content.nbd === undefined && content.fuse === undefined)
    mistakes.of([], 'say how to serve: nbd, a list of addresses, or fuse, a directory')
  const factories = await layersWith(serve.modules).catch((error: Error) => {
    mistakes.of(['modules'], error.message.replace('--modules: ', ''))
    return undefined
  })
  try {
    httpPlanOf(serve)
  } catch (error) {
    if (!(error instanceof BadInput)) throw error
    mistakes.of(['http'], error.message)
  }
  for (const { name, memoryBytes, stack } of caches) {
    const where = ['page-caches', name]
    if (!deviceName.pattern.test(name) || deviceName.taken.includes(name)) mistakes.of(where, deviceName.rule)
    if (devices[name] !== undefined) mistakes.of(where, 'a device has this name')
    if (memoryBytes < leastCacheBytes) mistakes.of([...where, 'memory'], 'expected at least 64KiB')
    if (stack !== undefined && factories !== undefined)
      judgeStack(mistakes, [...where, 'stack'], () =>
        planStack(parseStack(stack.replaceAll('{name}', name), factories), {
          by: `page cache ${name}`,
          ephemeral: true,
          pageSize: pageBytes,
        }),
      )
  }
  for (const { name, memoryBytes, file, listen } of serve.caches ?? []) {
    const where = ['caches', name]
    if (!deviceName.pattern.test(name) || deviceName.taken.includes(name)) mistakes.of(where, deviceName.rule)
    if (devices[name] !== undefined) mistakes.of(where, 'a device has this name')
    if (content['page-caches']?.[name] !== undefined) mistakes.of(where, 'a page cache has this name')
    if (file === undefined) {
      if (memoryBytes < leastValueCacheBytes) mistakes.of([...where, 'memory'], 'expected at least 2MiB')
    } else if (file.sizeBytes < leastFileBytes || file.sizeBytes > mostFileBytes)
      mistakes.of([...where, 'file', 'size'], 'expected 64KiB to 256GiB')
    else if (memoryBytes < leastBesideFile + file.sizeBytes / fileShare)
      mistakes.of(
        [...where, 'memory'],
        `expected at least 3MiB and a ${fileShare}nd of the file, for the tables of what is in it`,
      )
    if (Number(/^tcp:.+:(\d+)$/.exec(listen)?.[1] ?? 0) > 65_535)
      mistakes.of([...where, 'listen'], 'expected unix:PATH or tcp:HOST:PORT, a port up to 65535')
    const other = serve.caches!.find((one) => one.listen === listen)!
    if (other.name !== name && !listen.endsWith(':0'))
      mistakes.of([...where, 'listen'], `${other.name} listens there already: give each its own`)
  }
  const isVirtual = serve.hypervisor !== undefined
  for (const request of serve.device as readonly DeviceRequest[]) {
    const { name, stack, sizeBytes, maxSizeBytes, writethrough, snapshot } = request
    const where = ['devices', name]
    if (!deviceName.pattern.test(name) || deviceName.taken.includes(name)) mistakes.of(where, deviceName.rule)
    if (maxSizeBytes !== undefined && maxSizeBytes < sizeBytes)
      mistakes.of([...where, 'max'], `expected at least the size, ${formatBytes(sizeBytes)}`)
    if (writethrough && snapshot === undefined)
      mistakes.of([...where, 'writethrough'], 'is how a snapshot is written: add snapshot')
    if (devices[name]!.swap !== undefined && content.fuse === undefined)
      mistakes.of([...where, 'swap'], 'the kernel swaps to a file of the mount: add fuse, a directory')
    if (stack === '') mistakes.of(where, 'expected a stack, here or for all devices')
    else if (factories !== undefined)
      judgeStack(mistakes, devices[name]!.stack === undefined ? ['stack'] : [...where, 'stack'], () =>
        planDevice(name, maxSizeBytes ?? sizeBytes, stackFor(serve, request, factories), { isVirtual }),
      )
  }
}

/** Notes what is wrong with a stack as a mistake in what says it. */
function judgeStack(mistakes: Mistakes, where: readonly string[], plan: () => unknown): void {
  try {
    plan()
  } catch (error) {
    if (!(error instanceof TmemError || error instanceof RangeError)) throw error
    mistakes.of(where, error.message)
  }
}

function configOf(path: string, content: Content): Config {
  const {
    nbd,
    tls,
    limits,
    fuse,
    memory,
    hypervisor,
    modules,
    log,
    sockets,
    metrics,
    http,
    'busy-turns': busyTurns,
  } = content
  const folder = dirname(path)
  const device = Object.entries(content.devices ?? {}).map(([name, one]): DeviceRequest => {
    const { size, memlimit, max, snapshot, writethrough = false, swap } = one
    return {
      name,
      sizeBytes: size,
      writethrough,
      stack: one.stack ?? content.stack ?? '',
      ...(memlimit === undefined ? {} : { memlimitBytes: memlimit }),
      ...(max === undefined ? {} : { maxSizeBytes: max }),
      ...(snapshot === undefined ? {} : { snapshot: resolve(folder, snapshot) }),
      ...(swap === undefined || swap === false
        ? {}
        : { swapPriority: (swap === true ? undefined : swap.priority) ?? defaultPriority }),
    }
  })
  const pageCaches = Object.entries(content['page-caches'] ?? {}).map(
    ([name, { file, memory: memoryBytes, stack }]) => ({
      name,
      file: resolve(folder, file),
      memoryBytes,
      ...(stack === undefined ? {} : { stack }),
    }),
  )
  const caches = Object.entries(content.caches ?? {}).map(([name, { memory: memoryBytes, ttl, file, listen }]) => ({
    name,
    memoryBytes,
    listen,
    ...(ttl === undefined ? {} : { ttlMs: ttl * 1000 }),
    ...(file === undefined ? {} : { file: { path: resolve(folder, file.path), sizeBytes: file.size } }),
  }))
  return {
    path,
    folder,
    control: content.control,
    serve: {
      stack: content.stack ?? '',
      device,
      drain: true,
      ...(nbd === undefined ? {} : { nbd }),
      ...(fuse === undefined ? {} : { fuse }),
      ...(pageCaches.length === 0 ? {} : { pageCaches }),
      ...(caches.length === 0 ? {} : { caches }),
      ...(metrics === undefined ? {} : { metrics }),
      ...(memory === undefined ? {} : { memory }),
      ...(hypervisor === undefined ? {} : { hypervisor }),
      ...(modules === undefined ? {} : { modules: modules.map((module) => resolve(folder, module)) }),
      ...(tls === undefined ? {} : { tlsCertificates: tls.certificates }),
      ...(tls?.['verify-peer'] === true ? { tlsVerifyPeer: true as const } : {}),
      ...(limits === undefined ? {} : { nbdLimits: limitsText(limits) }),
      ...(sockets?.mode === undefined ? {} : { socketMode: sockets.mode }),
      ...(sockets?.group === undefined ? {} : { socketGroup: String(sockets.group) }),
      ...(http === undefined ? {} : { http: http.listen ?? defaultHttp }),
      ...(http?.token === undefined ? {} : { httpToken: resolve(folder, http.token) }),
      ...(busyTurns === undefined ? {} : { busyTurns }),
      ...(log?.format === undefined ? {} : { log: log.format satisfies LogFormat }),
      ...(log?.level === undefined ? {} : { logLevel: log.level satisfies LogLevel }),
    },
  }
}

/** Where the console is, unless the file says so. */
const defaultHttp = 'tcp:127.0.0.1:8780'

/** What `tmem swap on` takes, too. */
const defaultPriority = 100

const limitsText = (limits: NonNullable<Content['limits']>): string =>
  Object.entries(limits)
    .map(([name, value]) => `${name}=${value}`)
    .join(',')

/** Mistakes in a file, in the order of their lines. */
class Mistakes {
  readonly #file: string
  readonly #document: Document
  readonly #lines: LineCounter
  readonly #found: { readonly at: number; readonly message: string }[] = []

  constructor(file: string, document: Document, lines: LineCounter) {
    this.#file = file
    this.#document = document
    this.#lines = lines
  }

  /** A mistake at an offset. */
  at(at: number, message: string): void {
    this.#found.push({ at, message })
  }

  /** A mistake in what a path of names leads to, or in the nearest thing above that is there. */
  of(path: readonly PropertyKey[], message: string): void {
    const names = path.map(String)
    const what = names.length === 0 ? '' : `${names.join('.')}: `
    this.at(this.#offset(names), `${what}${message}`)
  }

  /** Throws `BadInput` when there are any. */
  judge(): void {
    if (this.#found.length === 0) return
    const told = this.#found
      .toSorted((a, b) => a.at - b.at)
      .map(({ at, message }) => {
        const { line, col } = this.#lines.linePos(at)
        return `${this.#file}:${line || 1}:${col || 1}: ${message.split('\n')[0]}`
      })
    throw new BadInput(`${this.#file} has mistakes`, told)
  }

  /** Where the name at the end of a path stands. */
  #offset(names: readonly string[]): number {
    let at = 0
    let node: unknown = this.#document.contents
    for (const name of names) {
      const pair = isMap(node) ? node.items.find(({ key }) => String(key) === name) : undefined
      const item =
        pair ??
        (isNode(node) && 'get' in node
          ? (node as { get(n: number, keep: true): unknown }).get(Number(name), true)
          : undefined)
      const key = isPair(item) ? item.key : item
      if (!isNode(key)) return at
      at = key.range?.[0] ?? at
      node = isPair(item) ? item.value : item
    }
    return at
  }
}
