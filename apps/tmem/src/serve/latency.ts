/**
 * The times of requests and moves of a server; the device itself times pages (@tmem/ramzswap). A request lasts from the
 * moment when a server hands it to the device until the device has done it. A move is a transfer of many blocks to a
 * place that waits.
 *
 * Wrappers measure: servers get a device that counts, the stack a place that counts. One in 61 requests that are done
 * at once is timed and counts for 61, as reading the clock twice costs a tenth of a page. Every request that waits is
 * timed: waits matter most, and the cost of the clock does not show in them.
 */
import {
  type BlockDevice,
  type Completion,
  Durations,
  type Flight,
  isSlow,
  type Layer,
  placeNames,
  type SlowPlace,
  type StatsNode,
} from '@tmem/core'
import { passingPlace } from '@tmem/faults'

const millionth = 1e6

/** A prime, so that periodic requests do not always have the same one timed. */
const every = 61

/** The kinds of requests, under the names that servers use. */
const operations = ['read', 'write', 'discard', 'zero', 'flush'] as const
type Operation = (typeof operations)[number]

/** Requests of one kind. */
class Requests {
  readonly durations: Durations = new Durations()
  #left = every

  /** Called before a request: its start, for `done`; -1 if the request is not timed. */
  begin(): number {
    if (--this.#left > 0) return -1
    this.#left = every
    return performance.now()
  }

  /** Called after a request. A failed one counts among the errors. */
  done(begun: number, completion: Completion): Completion {
    if (completion !== undefined) return this.#waited(begun < 0 ? performance.now() : begun, completion)
    if (begun >= 0) this.durations.add((performance.now() - begun) * millionth, every)
    return undefined
  }

  async #waited(begun: number, completion: Promise<void>): Promise<void> {
    await completion
    this.durations.add((performance.now() - begun) * millionth)
  }
}

/** The server that makes the requests. */
type Asker = 'nbd' | 'fuse'

/** The times of one device. */
export class Latencies {
  readonly #moves = new Map<string, Durations>()
  readonly #requests = new Map<Asker, Record<Operation, Requests>>()

  /** The same stack, in which each transfer to a place that waits is timed. */
  withMoves(stack: readonly Layer[]): Layer[] {
    const names = placeNames(stack)
    return stack.map((layer, n) => {
      const { place } = layer
      if (place?.traits.waits !== true) return layer
      const durations = new Durations()
      this.#moves.set(names[n]!, durations)
      // The other methods of the layer stay.
      return {
        ...layer,
        place: {
          traits: place.traits,
          open: (context) => {
            const open = place.open(context)
            return isSlow(open) ? timedPlace(open, durations) : open
          },
        },
      }
    })
  }

  /** The device for one of the servers. */
  timed(device: BlockDevice, asker: Asker): BlockDevice {
    const requests = Object.fromEntries(operations.map((name) => [name, new Requests()])) as Record<Operation, Requests>
    this.#requests.set(asker, requests)
    return new TimedDevice(device, requests)
  }

  /** The statistics of a device, whose section `latency` also has `move` by place, and `nbd` and `fuse` by request. */
  complete(stats: StatsNode): StatsNode {
    const pages = stats.children.find(({ name }) => name === 'latency')
    const section = {
      name: 'latency',
      counters: {},
      children: [
        ...(pages?.children ?? []),
        kindsOf('move', [...this.#moves]),
        ...[...this.#requests].map(([asker, requests]) =>
          kindsOf(
            asker,
            operations.map((name) => [name, requests[name].durations]),
          ),
        ),
      ],
    }
    return { ...stats, children: [...stats.children.filter((child) => child !== pages), section] }
  }
}

/** A section with the times of each kind. */
const kindsOf = (name: string, kinds: readonly (readonly [string, Durations])[]): StatsNode => ({
  name,
  counters: {},
  children: kinds.flatMap(([kind, durations]) =>
    durations.count === 0 ? [] : [{ name: kind, counters: durations.counters(), children: [] }],
  ),
})

function timedPlace(place: SlowPlace, durations: Durations): SlowPlace {
  return passingPlace<SlowPlace>(place, {
    write: async (flight: Flight) => {
      const begun = performance.now()
      await place.write(flight)
      durations.add((performance.now() - begun) * millionth)
    },
    writeNow: (flight: Flight) => {
      const begun = performance.now()
      place.writeNow!(flight)
      durations.add((performance.now() - begun) * millionth)
    },
  })
}

/** A device whose requests are timed. All its methods are those of the device, including `close`. */
class TimedDevice implements BlockDevice {
  readonly name: string
  readonly blockSize: number
  readonly preferredBlockSize: number
  readonly readOnly: boolean
  /** Absent if the device cannot change its size. */
  readonly resize?: (sizeBytes: number) => void
  readonly #device: BlockDevice
  readonly #requests: Readonly<Record<Operation, Requests>>

  constructor(device: BlockDevice, requests: Readonly<Record<Operation, Requests>>) {
    this.#device = device
    this.#requests = requests
    this.name = device.name
    this.blockSize = device.blockSize
    this.preferredBlockSize = device.preferredBlockSize
    this.readOnly = device.readOnly
    if (device.resize !== undefined) this.resize = (sizeBytes) => device.resize!(sizeBytes)
  }

  get sizeBytes(): number {
    return this.#device.sizeBytes
  }

  get allocatedBytes(): number | undefined {
    return this.#device.allocatedBytes
  }

  read(at: number, into: Uint8Array): Completion {
    const requests = this.#requests.read
    const begun = requests.begin()
    return requests.done(begun, this.#device.read(at, into))
  }

  write(at: number, bytes: Uint8Array): Completion {
    const requests = this.#requests.write
    const begun = requests.begin()
    return requests.done(begun, this.#device.write(at, bytes))
  }

  discard(at: number, length: number): Completion {
    const requests = this.#requests.discard
    const begun = requests.begin()
    return requests.done(begun, this.#device.discard(at, length))
  }

  zero(at: number, length: number, keep?: boolean): Completion {
    const requests = this.#requests.zero
    const begun = requests.begin()
    return requests.done(begun, this.#device.zero(at, length, keep))
  }

  flush(): Completion {
    const requests = this.#requests.flush
    const begun = requests.begin()
    return requests.done(begun, this.#device.flush())
  }

  map(at: number, length: number, report: (length: number, allocated: boolean) => boolean): void {
    this.#device.map(at, length, report)
  }

  stats(): StatsNode {
    return this.#device.stats()
  }

  close(): Promise<void> {
    return this.#device.close()
  }
}
