/** The places that there are pass the rules for places. */
import { ByteLimit, type LayerContext, type Place } from '@tmem/core'
import { type SlowFrame, slowMemory } from '@tmem/faults'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { type PageFileIo, systemFiles } from '@tmem/page-file'
import { zcache } from '@tmem/zcache'
import { afterAll, describe, expect, it, vi } from 'vitest'
import { type PlaceManifest, placeConformance } from '../src/index.ts'
import { calm, MapPlace, SlowMapPlace } from './places.ts'
import { MiB, swapFolder } from './subjects.ts'

const folder = swapFolder()
afterAll(() => folder.remove())

const runner = { describe, it }
vi.setConfig({ testTimeout: 120_000 })

await placeConformance(
  { name: 'a map', open: (context) => new MapPlace(MiB, context), manifest: { filledBy: 2 * MiB } },
  runner,
)

const zcacheLimit = new ByteLimit(MiB)
await placeConformance(
  {
    name: 'zcache',
    open: (context) => zcache({ limitBytes: zcacheLimit }).place!.open(context),
    manifest: { filledBy: 2 * MiB, limit: zcacheLimit },
  },
  runner,
)

const memoryLimit = new ByteLimit(MiB)
await placeConformance(
  {
    name: 'memory',
    open: (context) => memory({ limitBytes: memoryLimit }).place!.open(context),
    manifest: { filledBy: 2 * MiB, limit: memoryLimit },
  },
  runner,
)

const outside = calm()
await placeConformance(
  {
    name: 'a slow map',
    open: (context) => new SlowMapPlace(MiB, outside, context),
    manifest: {
      filledBy: 2 * MiB,
      fail: (what) => {
        outside.failing = what
      },
    },
  },
  runner,
)

await placeConformance(
  {
    name: 'slow memory',
    open: (context) => slowMemory({ sizeBytes: MiB, ephemeral: true, moves: 2 }).place!.open(context),
    manifest: { filledBy: 2 * MiB },
  },
  runner,
)

/** Frames that outlive the place which has them. */
let left = new Map<number, SlowFrame>()
const surviving = (context: LayerContext): Place => slowMemory({ sizeBytes: MiB, frames: left }).place!.open(context)
await placeConformance(
  {
    name: 'slow memory that survives',
    open: (context) => {
      left = new Map()
      return surviving(context)
    },
    manifest: { filledBy: 2 * MiB, reopen: surviving },
  },
  runner,
)

/** Real files whose transfers fail when they are told to. */
let failing: 'nothing' | 'writes' | 'reads' = 'nothing'
const real = systemFiles()
const error = (): Error => Object.assign(new Error('EIO: i/o error'), { code: 'EIO' })
const files: PageFileIo = new Proxy(real, {
  get: (target, name) => {
    const value: unknown = Reflect.get(target, name)
    if (typeof value !== 'function') return value
    return (...args: readonly unknown[]): unknown => {
      const isWrite = name === 'write' || name === 'writeNow'
      const isRead = name === 'read' || name === 'readNow'
      if ((failing === 'writes' && isWrite) || (failing === 'reads' && isRead)) {
        if (name === 'write' || name === 'read') return Promise.reject(error())
        throw error()
      }
      return (value as (...all: readonly unknown[]) => unknown).apply(target, args as unknown[])
    }
  },
})

const swapManifest: PlaceManifest = {
  filledBy: 10 * MiB,
  fail: (what) => {
    failing = what
  },
  afterCase: () => expect(folder.files()).toEqual([]),
}
await placeConformance(
  {
    name: 'frontswap',
    open: (context) => frontswap({ file: folder.file(), sizeBytes: 4 * MiB, files }).place!.open(context),
    manifest: swapManifest,
  },
  runner,
)
