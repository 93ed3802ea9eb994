/** The zcache as a layer of a stack: its settings, judged before anything is allocated. */
import type { CodecName } from '@tmem/codecs'
import type {
  BlockCodec,
  ByteAmount,
  ByteLimit,
  Layer,
  LayerContext,
  LayerFactory,
  OptionNames,
  PlaceTraits,
} from '@tmem/core'
import { basePageSize, checkOptions, limitOf, maxEntries, maxPageSize } from '@tmem/core'
import type { Arena, ZAllocator } from './arena.ts'
import { blockCodec } from './block-codec.ts'
import { ZcachePlace } from './place.ts'
import { Zsmalloc } from './zsmalloc.ts'

/** Settings of a zcache. */
export interface ZcacheOptions {
  /**
   * Bytes that the layer may use, metadata included: at least 256 KiB; or a `ByteLimit` that can be changed while the
   * layer is in use.
   */
  readonly limitBytes: ByteAmount | ByteLimit
  /** Codec for new pages (default `lz4`); or one that is open, which several stacks of a thread may share. */
  readonly codec?: CodecName | BlockCodec
  /** Codec for pages that rest, which background work and `Pool.recompress` use (default: none). */
  readonly recompress?: CodecName
  /** What becomes of a page that does not shrink: `keep` it as it is (default), or `refuse` it. */
  readonly incompressible?: 'keep' | 'refuse'
  /**
   * Largest block that is taken of a persistent page, in bytes per 4 KiB of page (zv_max_zsize, 3584 in 2011; default:
   * any). 1 to 4096.
   */
  readonly zvMaxZsize?: number
  /**
   * Larger blocks are refused while the mean is above this; in bytes per 4 KiB of page (zv_max_mean_zsize, 2560 in
   * 2011; default: no such rule). 1 to 4096.
   */
  readonly zvMaxMeanZsize?: number
  /**
   * Pages are refused above this share of the limit, uncompressed, in percent: 1 to 150 (zv_page_count_policy_percent;
   * default: no such rule).
   */
  readonly zvPageCountPolicyPercent?: number
  /** Who finds places (default: zsmalloc). `@tmem/zcache/history` has those of 2009 to 2013. */
  readonly allocator?: (arena: Arena) => ZAllocator
}

const names: OptionNames<ZcacheOptions> = {
  limitBytes: true,
  codec: 'any?',
  recompress: 'text?',
  incompressible: 'text?',
  zvMaxZsize: 'number?',
  zvMaxMeanZsize: 'number?',
  zvPageCountPolicyPercent: 'number?',
  allocator: 'function?',
}

/** Smallest limit: below it the tables would leave no room for pages. */
export const minLimitBytes: number = 256 * 1024

/** Largest number of pages that a zcache of that limit holds: one per 512 bytes, at most 2^24-1. */
export const maxPagesFor = (limitBytes: number): number => Math.min(maxEntries, Math.floor(limitBytes / 512))

/** Makes a zcache layer. Throws `TypeError` for unknown options, `RangeError` for settings that make no sense. */
export function zcache(options: ZcacheOptions): Layer {
  checkOptions('zcache', options, names)
  const { limitBytes, codec = 'lz4', recompress, incompressible = 'keep', zvMaxZsize, zvMaxMeanZsize } = options
  const { zvPageCountPolicyPercent, allocator = (arena: Arena): ZAllocator => new Zsmalloc(arena) } = options
  const budget = limitOf('zcache', 'limitBytes', limitBytes)
  const limit = budget.maximumBytes
  if (!Number.isSafeInteger(limit) || limit < minLimitBytes)
    throw new RangeError(`zcache needs a limit of at least ${minLimitBytes} bytes, got ${limit}`)
  assertRange('zvMaxZsize', zvMaxZsize, basePageSize)
  assertRange('zvMaxMeanZsize', zvMaxMeanZsize, basePageSize)
  assertRange('zvPageCountPolicyPercent', zvPageCountPolicyPercent, 150)
  if (recompress !== undefined && recompress === codec)
    throw new RangeError(`recompress must be another codec than that of new pages, ${recompress}`)
  if (incompressible !== 'keep' && incompressible !== 'refuse')
    throw new RangeError(`incompressible must be one of keep, refuse; got ${String(incompressible)}`)
  const traits: PlaceTraits = Object.freeze({
    persistent: true,
    ephemeral: true,
    waits: false,
    survives: 'nothing',
    rawOnly: false,
    capacity: maxPagesFor(limit),
    reservedBytes: 0,
    maxPageSize,
  })
  return Object.freeze({
    name: 'zcache',
    place: {
      traits,
      open: (context: LayerContext) =>
        new ZcachePlace(
          budget,
          typeof codec === 'string' ? blockCodec(codec) : codec,
          recompress === undefined ? undefined : blockCodec(recompress),
          {
            keepsRaw: incompressible === 'keep',
            maxZsize: zvMaxZsize,
            maxMeanZsize: zvMaxMeanZsize,
            pageCountPercent: zvPageCountPolicyPercent,
          },
          allocator,
          traits,
          context,
        ),
    },
  })
}

function assertRange(name: string, value: number | undefined, maximum: number): void {
  if (value !== undefined && (!Number.isInteger(value) || value < 1 || value > maximum))
    throw new RangeError(`${name} must be an integer from 1 to ${maximum}, got ${value}`)
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
    recompress: { kind: 'text', summary: 'codec for pages that rest (default: none)', choices: ['deflate', 'zstd'] },
    incompressible: {
      kind: 'text',
      summary: 'pages that do not shrink: keep them as they are (default) or refuse them',
      choices: ['keep', 'refuse'],
    },
    zvMaxZsize: {
      kind: 'integer',
      summary: 'largest block of a persistent page, per 4 KiB (3584 in 2011; default: any)',
      minimum: 1,
      maximum: basePageSize,
    },
    zvMaxMeanZsize: {
      kind: 'integer',
      summary: 'mean above which larger blocks are refused, per 4 KiB (2560 in 2011; default: no such rule)',
      minimum: 1,
      maximum: basePageSize,
    },
    zvPageCountPolicyPercent: {
      kind: 'integer',
      summary: 'pages, uncompressed, in percent of the limit (default: any)',
      minimum: 1,
      maximum: 150,
    },
  }),
  create: ({ limit, ...rest }) =>
    zcache({ limitBytes: limit as number, ...(rest as Omit<ZcacheOptions, 'limitBytes'>) }),
} satisfies LayerFactory)
