/** In a browser there are no files: the same names, and one that is used says so. */
import { type Layer, type LayerFactory, TmemError } from '@tmem/core'
import type { SpillOptions } from './spill.ts'

export type { SpillOptions }

/** Throws `TmemError`: a browser has no files. */
export function spill(_options: SpillOptions): Layer {
  throw new TmemError('TMEM_UNSUPPORTED', 'a spill needs files, and a browser has none: leave it out of the stack', {
    layer: 'spill',
  })
}

/** As in Node.js; what it creates fails. */
export const spillFactory: LayerFactory = Object.freeze({
  name: 'spill',
  summary: 'ephemeral pages in a file, which a browser does not have',
  options: Object.freeze({
    file: { kind: 'text', summary: 'path of the file', required: true },
    size: { kind: 'bytes', summary: 'bytes of the file', required: true },
  } as const),
  create: () => spill({ file: '', sizeBytes: 0 }),
})
