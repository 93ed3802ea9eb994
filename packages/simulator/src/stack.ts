/**
 * Stacks that a history is played on: places as they ship, over a simulated disk, in sizes so small that everything
 * overflows.
 */
import {
  type Accounts,
  type BlockCodec,
  ByteLimit,
  compose,
  type Layer,
  type LayerContext,
  type PageStore,
  type Place,
} from '@tmem/core'
import { frontswap, roomFor, SwapPlace } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { spill } from '@tmem/spill'
import { zcache } from '@tmem/zcache'
import type { Random } from './random.ts'
import { SimulatedDisk, type World } from './world.ts'

const KiB = 1024
const spillFile = '/simulated/spill'

/** A stack before it is opened; it can be opened again after a restart. */
export interface Shape {
  /** As in the text of a stack, with what has no text behind it. */
  readonly text: string
  readonly layers: readonly Layer[]
  readonly limits: readonly ByteLimit[]
  readonly io: 'pool' | 'blocking'
  /**
   * Bytes of persistent pages that are sure to find room: in places that wait, and in memory while limits and accounts
   * allow it.
   */
  readonly reservedSlow: number
  readonly reservedMemory: number
  /** Bytes of pages that find room at once, roughly. */
  readonly room: number
  /** What comes off a disk is told from what was written. */
  readonly verifies: boolean
  /** Pages may be found again when it is opened again. */
  readonly survives: boolean
}

interface Part {
  readonly text: string
  readonly layer: Layer
  readonly limit?: ByteLimit
  readonly reserved: number
  readonly room: number
  readonly waits: boolean
  readonly verifies: boolean
}

/** Draws a stack. */
export function drawShape(random: Random, codec: BlockCodec): Shape {
  const parts: Part[] = []
  const form = random.weighted([6, 3, 3, 2, 1, 1, 3, 2, 1, 1, 2])
  const z = ['zcache']
  const mz = ['memory', 'zcache']
  const memories = [z, mz, ['memory'], [], z, mz, z, z, mz, [], z][form]!
  const slow = [1, 1, 1, 1, 0, 0, 2, 0, 0, 0, 1][form]!
  const spills = form > 6
  for (const name of memories) parts.push(name === 'zcache' ? drawZcache(random, codec) : drawMemory(random))
  for (let n = 0; n < slow; n++) parts.push(drawSwap(random, n === slow - 1))
  if (spills) parts.push(drawSpill(random))
  const io = random.below(6) === 0 ? 'blocking' : 'pool'
  const sum = (of: (part: Part) => number): number => parts.reduce((total, part) => total + of(part), 0)
  return {
    text: `${parts.map(({ text }) => text).join(' > ')}${io === 'blocking' ? ' (blocking)' : ''}`,
    layers: parts.map(({ layer }) => layer),
    limits: parts.flatMap(({ limit }) => (limit === undefined ? [] : [limit])),
    io,
    reservedSlow: sum(({ waits, reserved }) => (waits ? reserved : 0)),
    reservedMemory: sum(({ waits, reserved }) => (waits ? 0 : reserved)),
    room: sum(({ room }) => room),
    verifies: parts.every(({ verifies }) => verifies),
    survives: spills,
  }
}

function drawZcache(random: Random, codec: BlockCodec): Part {
  const bytes = random.of([256, 384, 512, 768]) * KiB
  const limit = new ByteLimit(bytes)
  const incompressible = random.below(6) === 0 ? 'refuse' : 'keep'
  const rules =
    random.below(8) === 0 ? { zvMaxZsize: 3584, zvMaxMeanZsize: 2560, zvPageCountPolicyPercent: 150 } : undefined
  const recompress = random.below(40) === 0 ? { recompress: 'deflate' as const } : undefined
  const layer = zcache({ limitBytes: limit, codec, incompressible, ...rules, ...recompress })
  const more = `${recompress === undefined ? '' : ',recompress=deflate'}${incompressible === 'keep' ? '' : ',incompressible=refuse'}${rules === undefined ? '' : ',zv…'}`
  return {
    text: `zcache(limit=${bytes / KiB}KiB${more})`,
    layer: watched(layer),
    limit,
    reserved: 0,
    room: bytes * 2,
    waits: false,
    verifies: true,
  }
}

function drawMemory(random: Random): Part {
  const bytes = random.of([64, 128, 256, 512]) * KiB
  const limit = new ByteLimit(bytes)
  const layer = memory({ limitBytes: limit })
  return {
    text: `memory(limit=${bytes / KiB}KiB)`,
    layer: watched(layer),
    limit,
    reserved: layer.place!.traits.reservedBytes,
    room: bytes,
    waits: false,
    verifies: true,
  }
}

/** A swap file. Some promise more than theirs do, so that the chain's ways for such places are taken, too. */
function drawSwap(random: Random, isLast: boolean): Part {
  const sizeBytes = random.of([16, 48, 128, 200, 300]) * 4 * KiB
  const existing = random.below(7) === 0
  const ephemeral = random.below(4) === 0
  const survives = random.below(4) === 0
  const bytesPerHour = !isLast || random.below(6) === 0 ? random.of([256, 4096, 65536]) * KiB : undefined
  const base = frontswap({ file: '/simulated', sizeBytes, existing }).place!.traits
  const traits = Object.freeze({ ...base, ephemeral, survives: survives ? ('process' as const) : base.survives })
  const roomBytes = existing ? sizeBytes + 4 * KiB : roomFor(sizeBytes)
  const from = existing ? 0 : 4 * KiB
  const open = (context: LayerContext): Place =>
    new SwapPlace(
      {
        file: new SimulatedDisk(context.allocator as World, from + roomBytes, survives),
        traits,
        from,
        roomBytes,
        slots: existing,
        bytesPerHour,
      },
      context,
    )
  const more = [
    existing ? ',existing' : '',
    ephemeral ? ',ephemeral' : '',
    survives ? ',survives' : '',
    bytesPerHour === undefined ? '' : `,perHour=${bytesPerHour / KiB}KiB`,
  ]
  return {
    text: `frontswap(size=${sizeBytes / KiB}KiB${more.join('')})`,
    layer: watched({ name: 'frontswap', place: { traits, open } }),
    // Ephemeral pages take room, too; and without room to spare, so do pages that were flushed while they were on their
    // way.
    reserved: ephemeral ? 0 : Math.max(0, sizeBytes - (existing ? 3 * 128 * KiB : 0)),
    room: sizeBytes,
    waits: true,
    verifies: !existing,
  }
}

/** A file of ephemeral pages, which survives the process, among the files of the world. */
function drawSpill(random: Random): Part {
  const sizeBytes = random.of([64, 128, 256, 1024]) * KiB
  const plan = spill({ file: spillFile, sizeBytes }).place!
  const open = (context: LayerContext): Place => {
    const { files, boot } = context.allocator as World
    return spill({ file: spillFile, sizeBytes, files, boot: `boot ${boot}` }).place!.open(context)
  }
  return {
    text: `spill(size=${sizeBytes / KiB}KiB)`,
    layer: watched({ name: 'spill', place: { traits: plan.traits, open } }),
    reserved: 0,
    room: sizeBytes,
    waits: true,
    verifies: true,
  }
}

/** The same layer; its places are noted in the world, and what comes out of checked memory may have a bit flipped. */
function watched(layer: Layer): Layer {
  const plan = layer.place!
  const { traits } = plan
  return Object.freeze({
    name: layer.name,
    place: {
      traits,
      open: (context: LayerContext) => {
        const world = context.allocator as World
        const place = plan.open(context)
        world.places.push(place)
        world.hasSlots ||= traits.rawOnly
        if ('get' in place && !traits.rawOnly) {
          const get = place.get.bind(place)
          place.get = (location, into) => {
            get(location, into)
            if (!world.strikes('memoryRot')) return
            const byte = into.at + world.random.below(into.length)
            into.bytes[byte] = into.bytes[byte]! ^ (1 << world.random.below(8))
          }
        }
        return place
      },
    },
  })
}

/** Opens a stack in a world. Throws what `compose` throws. */
export const openShape = (shape: Shape, world: World, accounts: Accounts): PageStore =>
  compose(shape.layers, {
    allocator: world,
    accounts,
    clock: () => world.events.now,
    wake: () => {
      world.isWoken = true
    },
    io: shape.io,
  })
