/** What the stacks that the suite is run on are made of. */
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Layer, LayerContext, PageStore, StatsNode } from '@tmem/core'
import { compose } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { memory } from '@tmem/memory'
import { zcache } from '@tmem/zcache'
import type { Manifest, Subject } from '../src/index.ts'

export const MiB = 2 ** 20
export const small: readonly number[] = [4096, 8192, 65_536]

/** A stack under test, with the model boundary between its layers, so that every layer is checked twice. */
export const stack = (name: string, layers: () => readonly Layer[], manifest: Manifest): Subject => ({
  name,
  open: (context: LayerContext): PageStore => compose(layers(), { ...context, check: 'model' }),
  manifest,
})

/** The same with the ordinary boundary: for huge pages, whose checksums would take longer than everything else. */
export const plainStack = (name: string, layers: () => readonly Layer[], manifest: Manifest): Subject => ({
  name,
  open: (context: LayerContext): PageStore => compose(layers(), context),
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

/** Counters of every layer of that name, from the top. */
export function countersOf(store: PageStore, name: string): Readonly<Record<string, number>>[] {
  const found: Readonly<Record<string, number>>[] = []
  const visit = (node: StatsNode): void => {
    if (node.name === name) found.push(node.counters)
    for (const child of node.children) visit(child)
  }
  visit(store.stats())
  return found
}
