/** The zcache as a layer of a stack: its settings, judged before anything is allocated. */
import type { CodecName } from '@tmem/codecs'
import type { Capabilities, Layer, LayerContext, LayerFactory, PageStore } from '@tmem/core'
import { ByteLimit, basePageSize, maxPageSize } from '@tmem/core'
import { assertWriteback, type WritebackOptions } from './writeback.ts'
import { Zcache } from './zcache.ts'

/** Finders of places for compressed pages; see the README for which is chosen when. */
export type AllocatorName = 'zsmalloc' | 'xvmalloc' | 'zbud' | 'zcache1'

/** Settings of a zcache. */
export interface ZcacheOptions {
  /**
   * Bytes that the layer may use, metadata and scratch included: a number of at least 256 KiB, or a `ByteLimit` that can
   * be changed while the layer is in use.
   */
  readonly limitBytes: number | ByteLimit
  /** Codec for new pages (default `lz4`). */
  readonly codec?: CodecName
  /** Codec for pages that have not been touched for long, used by `tick` (default: none). */
  readonly recompress?: CodecName
  /**
   * Who finds places: `zsmalloc` (default); `xvmalloc`; `zbud` with the limits of Linux 3.9; or `zcache1`, as in Linux 2.6.39:
   * ephemeral pages in zbud, persistent ones in xvmalloc.
   */
  readonly allocator?: AllocatorName
  /** Largest compressed persistent page, in bytes per 4 KiB of page (default 3584, as zv_max_zsize). 1 to 4096. */
  readonly zvMaxZsize?: number
  /**
   * A persistent page that compresses to more than this is refused while the mean is above it, too; in bytes per 4 KiB of
   * page (default 2560, as zv_max_mean_zsize). 1 to 4096.
   */
  readonly zvMaxMeanZsize?: number
  /**
   * Persistent pages are refused (`Policy`) above this share of the limit, uncompressed, in percent: 1 to 150 (zcache1's
   * zv_page_count_policy_percent; default: no such rule, as in zcache2).
   */
  readonly zvPageCountPolicyPercent?: number
  /**
   * After the limit was hit, new persistent pages are refused (`Policy`, before any work) until what is live has fallen to
   * this share of what it was then, in percent: 1 to 100. `tick` makes room by passing the oldest ones down, if there is a
   * layer below.
   * DEVIATION: the default is 100 (no hysteresis, freed room is used at once); zswap's accept_threshold_percent is 90.
   */
  readonly acceptThresholdPercent?: number
  /** What becomes of a page that does not shrink enough: `refuse` (default) or `keep` it uncompressed (zsmalloc only). */
  readonly incompressible?: 'refuse' | 'keep'
  /**
   * A file for cold persistent pages of up to 64 KiB (default: none). Then a get may answer `Deferred`, and `tick` starts the
   * writes.
   */
  readonly writeback?: WritebackOptions
}

/** Smallest limit: below it the tables would leave no room for pages. */
export const minLimitBytes: number = 256 * 1024

/** Makes a zcache layer. Throws `RangeError` for settings that make no sense. */
export function zcache(options: ZcacheOptions): Layer {
  const {
    limitBytes,
    codec = 'lz4',
    recompress,
    allocator = 'zsmalloc',
    zvMaxZsize = 3584,
    zvMaxMeanZsize = 2560,
    zvPageCountPolicyPercent,
    acceptThresholdPercent = 100,
    incompressible = 'refuse',
    writeback,
  } = options
  const limit = typeof limitBytes === 'number' ? limitBytes : limitBytes.maximumBytes
  if (!Number.isSafeInteger(limit) || limit < minLimitBytes)
    throw new RangeError(`zcache needs a limit of at least ${minLimitBytes} bytes, got ${limit}`)
  assertRange('zvMaxZsize', zvMaxZsize, basePageSize)
  assertRange('zvMaxMeanZsize', zvMaxMeanZsize, basePageSize)
  assertRange('zvPageCountPolicyPercent', zvPageCountPolicyPercent ?? 100, 150)
  assertRange('acceptThresholdPercent', acceptThresholdPercent, 100)
  assertChoice('incompressible', incompressible, ['refuse', 'keep'])
  assertChoice('allocator', allocator, ['zsmalloc', 'xvmalloc', 'zbud', 'zcache1'])
  if (incompressible === 'keep' && allocator !== 'zsmalloc')
    throw new RangeError(
      `incompressible pages can be kept with allocator zsmalloc only: ${allocator} has no room for 4 KiB`,
    )
  if (writeback !== undefined) assertWriteback(writeback)
  const plan = (below: Capabilities | undefined): Capabilities =>
    Object.freeze({
      ephemeral: true,
      persistent: below?.persistent ?? true,
      shared: true,
      minPageSize: below?.minPageSize ?? basePageSize,
      maxPageSize: below?.maxPageSize ?? maxPageSize,
      deferred: writeback !== undefined || (below?.deferred ?? false),
      split: false,
      reservedBytes: below?.reservedBytes ?? 0,
    })
  return Object.freeze({
    name: 'zcache',
    plan,
    open: (next: PageStore | undefined, context: LayerContext): PageStore =>
      new Zcache(
        {
          limit: typeof limitBytes === 'number' ? new ByteLimit(limitBytes) : limitBytes,
          codec,
          recompress,
          allocator,
          zvMaxZsize,
          zvMaxMeanZsize,
          zvPageCountPolicyPercent,
          acceptThresholdPercent,
          keepsRaw: incompressible === 'keep',
          writeback,
        },
        plan(next?.capabilities),
        next,
        context,
      ),
  })
}

function assertRange(name: string, value: number, maximum: number): void {
  if (!Number.isInteger(value) || value < 1 || value > maximum)
    throw new RangeError(`${name} must be an integer from 1 to ${maximum}, got ${value}`)
}

function assertChoice(name: string, value: string, choices: readonly string[]): void {
  if (!choices.includes(value))
    throw new RangeError(`${name} must be one of ${choices.join(', ')}; got ${String(value)}`)
}

/** The layer in the textual form of a stack: `zcache(limit=64MiB,codec=lz4)`. */
export const zcacheFactory: LayerFactory = Object.freeze({
  name: 'zcache',
  summary: 'compressed pages in bounded memory',
  options: Object.freeze({
    limit: {
      kind: 'bytes',
      summary: 'memory that it may use, metadata included',
      required: true,
      minimum: minLimitBytes,
    },
    codec: { kind: 'text', summary: 'codec for new pages (default lz4)', choices: ['lz4', 'lz4js', 'deflate', 'zstd'] },
    recompress: {
      kind: 'text',
      summary: 'codec for pages untouched for long (default: none)',
      choices: ['deflate', 'zstd', 'lz4', 'lz4js'],
    },
    allocator: {
      kind: 'text',
      summary: 'who finds places (default zsmalloc)',
      choices: ['zsmalloc', 'xvmalloc', 'zbud', 'zcache1'],
    },
    zvMaxZsize: {
      kind: 'integer',
      summary: 'largest compressed persistent page, per 4 KiB (default 3584)',
      minimum: 1,
      maximum: basePageSize,
    },
    zvMaxMeanZsize: {
      kind: 'integer',
      summary: 'mean above which larger persistent pages are refused, per 4 KiB (default 2560)',
      minimum: 1,
      maximum: basePageSize,
    },
    zvPageCountPolicyPercent: {
      kind: 'integer',
      summary: 'persistent pages, uncompressed, in percent of the limit (default: any)',
      minimum: 1,
      maximum: 150,
    },
    acceptThresholdPercent: {
      kind: 'integer',
      summary: 'after the limit was hit, refuse until below this share of it (default 100: at once)',
      minimum: 1,
      maximum: 100,
    },
    incompressible: {
      kind: 'text',
      summary: 'pages that do not shrink enough: refuse (default) or keep them uncompressed',
      choices: ['refuse', 'keep'],
    },
    writebackFile: { kind: 'text', summary: 'file for cold persistent pages (default: none)' },
    writebackSize: { kind: 'bytes', summary: 'size of that file', minimum: 128 * 1024 },
    writebackPerHour: {
      kind: 'bytes',
      summary: 'most that is written to it in an hour (default: any)',
      minimum: 128 * 1024,
    },
  }),
  create: (options) => {
    const { limit, writebackFile, writebackSize, writebackPerHour, ...rest } = options
    if ((writebackFile === undefined) !== (writebackSize === undefined))
      throw new RangeError('zcache: writebackFile and writebackSize belong together')
    const writeback: WritebackOptions | undefined =
      writebackFile === undefined
        ? undefined
        : {
            file: writebackFile as string,
            sizeBytes: writebackSize as number,
            ...(writebackPerHour === undefined ? {} : { bytesPerHour: writebackPerHour as number }),
            // A text can name no clock. This is where a program gives one to the layer, which has none of its own.
            clock: () => performance.now(),
          }
    return zcache({
      limitBytes: limit as number,
      ...(rest as Omit<ZcacheOptions, 'limitBytes'>),
      ...(writeback === undefined ? {} : { writeback }),
    })
  },
} satisfies LayerFactory)
