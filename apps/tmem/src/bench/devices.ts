/** The devices that `tmem bench nbd` and `tmem bench fuse` serve. */
import type { BlockDevice } from '@tmem/core'
import { memory } from '@tmem/memory'
import { memoryDevice } from '@tmem/nbd'
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
