/**
 * What a mount shows: directories, block devices as files, and texts that are made when they are opened.
 *
 * A directory is asked for its entries whenever they are needed; so a tree of statistics is always that of the moment.
 * Nodes get their inode numbers by path and keep them.
 */
import type { BlockDevice, StatsNode } from '@tmem/core'

/** A device as a file of its size. Reads may be of any length; writes are in whole blocks of the device. */
export interface FuseDevice {
  readonly kind: 'device'
  readonly device: BlockDevice
  /** Asked before each opening: false answers EBUSY. Default: it may be opened at any time. */
  readonly mayOpen?: () => boolean
}

/** A text: its bytes are fixed when the file is opened. With `write` it is a knob. */
export interface FuseText {
  readonly kind: 'text'
  read(): string
  /**
   * Takes what was written with one write, without the blanks around it. Throws or rejects for what it does not
   * understand or cannot do: with the system's own error as its cause, or itself, where that says more than EIO.
   */
  write?(text: string, writer: FuseWriter): undefined | Promise<unknown>
}

/** Who writes to a file, as the kernel says. */
export interface FuseWriter {
  /** Its process, in the server's own namespace; 0: none that can be seen from there. */
  readonly pid: number
  readonly uid: number
}

export interface FuseDirectory {
  readonly kind: 'directory'
  entries(): ReadonlyMap<string, FuseNode>
}

export type FuseNode = FuseDevice | FuseText | FuseDirectory

/**
 * A tree of statistics as directories: a file for each counter, a directory for each section. Sections of the same name
 * in one place are numbered from the second on (`memory`, `memory.2`).
 */
export function statisticsTree(stats: () => StatsNode): FuseDirectory {
  return {
    kind: 'directory',
    entries: () => {
      const { counters, children } = stats()
      const texts = Object.keys(counters).map((name): [string, FuseNode] => [
        name,
        { kind: 'text', read: () => `${stats().counters[name] ?? 0}\n` },
      ])
      const sections = children.map(({ name }, n): [string, FuseNode] => [
        name,
        statisticsTree(() => stats().children[n] ?? { name, counters: {}, children: [] }),
      ])
      return namedApart([...texts, ...sections])
    },
  }
}

/** Nodes by names that files can have: none is hidden by another one of its name, the later ones are numbered. */
export function namedApart(nodes: Iterable<readonly [string, FuseNode]>): Map<string, FuseNode> {
  const entries = new Map<string, FuseNode>()
  for (const [wanted, node] of nodes) {
    const plain = fileName(wanted)
    let name = plain
    for (let count = 2; entries.has(name); count++) name = `${plain}.${count}`
    entries.set(name, node)
  }
  return entries
}

/** A name that a file can have. */
const fileName = (name: string): string =>
  name === '' || name === '.' || name === '..' ? '_' : name.replaceAll(/[/\0]/g, '_')

/** The nodes that were named so far, by inode number. The root is 1. */
export class Inodes {
  readonly #byNumber = new Map<number, { readonly path: string; node: FuseNode }>()
  readonly #byPath = new Map<string, number>()
  #next = 2

  constructor(root: FuseDirectory) {
    this.#byNumber.set(1, { path: '', node: root })
  }

  /** The node of a number, or `undefined`. */
  node(number: number): FuseNode | undefined {
    return this.#byNumber.get(number)?.node
  }

  /** The numbers under which a device was found. */
  numbersOf(device: BlockDevice): number[] {
    return [...this.#byNumber].flatMap(([number, { node }]) =>
      node.kind === 'device' && node.device === device ? [number] : [],
    )
  }

  /** The number of an entry of a directory; the same for the same path, for good. */
  enter(directory: number, name: string, node: FuseNode): number {
    const path = `${this.#byNumber.get(directory)!.path}/${name}`
    let number = this.#byPath.get(path)
    if (number === undefined) {
      number = this.#next++
      this.#byPath.set(path, number)
      this.#byNumber.set(number, { path, node })
    } else this.#byNumber.get(number)!.node = node
    return number
  }
}
