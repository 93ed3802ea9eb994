/** The stacks that the suite is run on. Each is opened with the model boundary, so that every layer is checked twice. */
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Layer, LayerContext, PageStore } from '@tmem/core'
import { compose, memory } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { zcache } from '@tmem/zcache'
import type { Manifest, Subject } from '../src/index.ts'

export const MiB = 2 ** 20
export const small: readonly number[] = [4096, 8192, 65_536]

/** A stack under test. */
export const stack = (name: string, layers: () => readonly Layer[], manifest: Manifest): Subject => ({
  name,
  open: (context: LayerContext): PageStore => compose(layers(), { ...context, check: 'model' }),
  manifest,
})

/** A folder for swap files, gone when the tests of a file are over. */
export function swapFolder(): { file(): string; files(): string[]; remove(): void } {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-conformance-'))
  let count = 0
  return {
    file: () => join(folder, `swap-${count++}.img`),
    files: () => readdirSync(folder),
    remove: () => rmSync(folder, { recursive: true, force: true }),
  }
}

export const layers = {
  memory: (limitBytes: number = 64 * MiB): Layer => memory({ limitBytes }),
  zcache: (limitBytes: number = 32 * MiB): Layer => zcache({ limitBytes }),
  frontswap: (file: string, sizeBytes: number = 4 * MiB): Layer => frontswap({ file, sizeBytes }),
}
