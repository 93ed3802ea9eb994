/** The layers that can be named in the text of a stack, and `tmem stack`. */
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import {
  type Capabilities,
  factoriesIn,
  formatBytes,
  type Layer,
  type LayerFactory,
  type OptionSpec,
  parseStack,
  planStack,
  stackFromData,
} from '@tmem/core'
import { frontswapFactory } from '@tmem/frontswap'
import { memoryFactory } from '@tmem/memory'
import { ramsterFactory } from '@tmem/ramster'
import { sealFactory } from '@tmem/seal'
import { spillFactory } from '@tmem/spill'
import { vramFactory } from '@tmem/vram'
import { zcacheFactory } from '@tmem/zcache'
import pc from 'picocolors'
import { BadInput } from './ending.ts'
import { readGivenFile } from './given-file.ts'

/** More than any stack needs. */
const maxFileBytes = 2 ** 20

import type { Terminal } from './terminal.ts'

/** Every layer of this program. */
export const layerFactories: readonly LayerFactory[] = [
  memoryFactory,
  zcacheFactory,
  frontswapFactory,
  spillFactory,
  ramsterFactory,
  sealFactory,
  vramFactory,
]

/** The layers of this program and those that the modules export. Throws `BadInput`, also for a name that is taken. */
export async function layersWith(modules: readonly string[] = []): Promise<LayerFactory[]> {
  const factories = [...layerFactories]
  for (const path of modules) {
    let exported: Record<string, unknown>
    try {
      exported = (await import(pathToFileURL(resolve(path)).href)) as Record<string, unknown>
    } catch (error) {
      throw new BadInput(`--modules: ${path} cannot be loaded: ${(error as Error).message.split('\n')[0]}`)
    }
    const found = factoriesIn(exported)
    if (found.length === 0)
      throw new BadInput(`--modules: ${path} exports no layer (an object with name, summary, options and create)`)
    for (const factory of found) {
      if (factories.some(({ name }) => name === factory.name))
        throw new BadInput(
          `--modules: ${path} exports a layer ${factory.name}, but that name is taken: rename the layer`,
        )
      factories.push(factory)
    }
  }
  return factories
}

/** Reads a YAML file: a list of layers with their options, or the text of a stack. */
export async function stackFromFile(
  path: string,
  factories: readonly LayerFactory[] = layerFactories,
): Promise<Layer[]> {
  // Slow to load, and needed only here.
  const { parse, YAMLParseError } = await import('yaml')
  let text: string
  try {
    text = readGivenFile(path, maxFileBytes).toString()
  } catch (error) {
    throw new BadInput(`cannot read the stack in ${path}: ${(error as Error).message}`)
  }
  let data: unknown
  try {
    data = parse(text)
  } catch (error) {
    // A ReferenceError: an alias without an anchor, or aliases that expand to too much.
    if (!(error instanceof YAMLParseError || error instanceof ReferenceError)) throw error
    throw new BadInput(`${path} is not YAML: ${error.message.split('\n')[0]}`)
  }
  return stackFromData(data, factories)
}

/** `tmem stack`: lists the available layers; with a stack, says what it can do, or why it cannot work. */
export async function stack(
  text: string | undefined,
  options: { file?: string; modules?: string[]; json?: true },
  terminal: Terminal,
): Promise<void> {
  const json = options.json === true
  if (text !== undefined && options.file !== undefined)
    throw new BadInput('give the text of a stack or --file, not both')
  const factories = await layersWith(options.modules)
  if (text === undefined && options.file === undefined) {
    terminal.print(json ? JSON.stringify({ layers: factories.map(described) }) : factories.map(listed).join('\n\n'))
    return
  }
  const layers = text === undefined ? await stackFromFile(options.file!, factories) : parseStack(text, factories)
  const capabilities = planStack(layers)
  const names = layers.map((layer) => layer.name)
  if (json) terminal.print(JSON.stringify({ stack: names, capabilities }))
  else terminal.print(`${names.join(' > ')} can stand.\n${canDo(capabilities)}`)
}

function described({ name, summary, options }: LayerFactory): object {
  return { name, summary, options }
}

function listed({ name, summary, options }: LayerFactory): string {
  const lines = Object.entries(options).map(
    ([option, spec]) => `  ${option}=${placeholder(spec)}  ${spec.summary}${bounds(spec)}`,
  )
  return [`${pc.bold(name)}: ${summary}`, ...lines].join('\n')
}

function placeholder(spec: OptionSpec): string {
  return (
    spec.choices?.join('|') ??
    { bytes: 'BYTES', integer: 'N', number: 'NUMBER', text: 'TEXT', flag: 'yes|no' }[spec.kind]
  )
}

function bounds({ kind, minimum, maximum, required }: OptionSpec): string {
  const show = (limit: number): string => (kind === 'bytes' ? formatBytes(limit) : `${limit}`)
  const parts = [
    required === true ? 'required' : '',
    minimum === undefined ? '' : `at least ${show(minimum)}`,
    maximum === undefined ? '' : `at most ${show(maximum)}`,
  ].filter((part) => part !== '')
  return parts.length === 0 ? '' : ` (${parts.join(', ')})`
}

function canDo(can: Capabilities): string {
  const kinds = [can.ephemeral && 'ephemeral', can.persistent && 'persistent', can.shared && 'shared'].filter(Boolean)
  return [
    `pools: ${kinds.join(', ')}`,
    `pages: ${formatBytes(can.minPageSize)} to ${formatBytes(can.maxPageSize)}`,
    `a get ${can.deferred ? 'may have to wait (deferred)' : 'never waits'}`,
    `room that is sure: ${formatBytes(can.reservedBytes)}`,
  ].join('\n')
}
