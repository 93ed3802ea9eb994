/** The devices that `tmem bench nbd`, `tmem bench fuse` and `tmem bench ramster` serve. */
import type { BlockDevice } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { memoryDevice } from '@tmem/nbd'
import { ramster, valkey } from '@tmem/ramster'
import { type Ramzswap, ramzswap } from '@tmem/ramzswap'
import { zcache } from '@tmem/zcache'

/** Memory as it is. */
export const plainDevice = (sizeBytes: number): BlockDevice => memoryDevice({ sizeBytes })

/** ramzswap over zcache; what does not shrink rests as it is, and there is room for all of it. */
export const compressedDevice = (sizeBytes: number): Ramzswap =>
  ramzswap({
    name: 'bench',
    sizeBytes,
    stack: [zcache({ limitBytes: sizeBytes }), memory({ limitBytes: Math.ceil(sizeBytes * 1.1) })],
  })

/** What a device over other machines is made of. */
export interface RemoteDeviceParts {
  readonly sizeBytes: number
  /** Ports of this host where the servers are that lend. */
  readonly ports: readonly number[]
  /** A file for what they refuse: it is made, and removed at the end. */
  readonly file: string
  /** Asks for ticks. */
  readonly wake: () => void
}

/** ramzswap over zcache with room for a sixteenth, other machines, and a file. */
export const remoteDevice = ({ sizeBytes, ports, file, wake }: RemoteDeviceParts): Ramzswap =>
  ramzswap({
    name: 'bench',
    sizeBytes,
    wake,
    stack: [
      zcache({ limitBytes: Math.max(2 ** 20, sizeBytes / 16) }),
      ramster({ machines: ports.map((port) => valkey({ host: '127.0.0.1', port })), sizeBytes: 2 * sizeBytes }),
      frontswap({ file, sizeBytes }),
    ],
  })
