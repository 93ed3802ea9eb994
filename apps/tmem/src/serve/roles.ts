/**
 * One thing has one role: what a server is told to use as an image, a backing file, a socket, its record or its mount
 * is each a thing of its own.
 *
 * What decides is the thing, not what it is called: a path, a link, a hard link, a folder that is a link. Where there
 * is nothing yet, it is the folder (device and inode) and the name in it. This is about one server, before it touches
 * anything. What another one uses is its own by a claim (@tmem/page-file), or because it listens there.
 *
 * Source: stat(2), for device and inode.
 */
import { type BigIntStats, readlinkSync, statSync } from 'node:fs'
import { basename, dirname, join, resolve } from 'node:path'
import type { LayerFactory } from '@tmem/core'
import { BadInput } from '../ending.ts'

/** Something with a name, and what it is to be. */
export interface Role {
  /** As it is said in a message: `the snapshot of a`. */
  readonly role: string
  readonly path: string
}

/** As many links as a kernel follows. */
const mostLinks = 40

/** Throws `BadInput` when two of them are one thing, or when one lies in the directory that is to be a mount. */
export function judgeRoles(roles: readonly Role[], mount: string | undefined): void {
  const seen = new Map<string, Role>()
  const over = mount === undefined ? undefined : look(() => statSync(mount, { bigint: true }))
  for (const each of [...roles, ...(mount === undefined ? [] : [{ role: 'the mount', path: mount }])]) {
    const id = identityOf(each.path)
    const other = seen.get(id)
    if (other !== undefined) {
      const names = other.path === each.path ? other.path : `${other.path} and ${each.path} are one thing, which`
      throw new BadInput(`${names} would be both ${other.role} and ${each.role}: give each its own`)
    }
    seen.set(id, each)
    if (over !== undefined && each.path !== mount && liesIn(each.path, over))
      throw new BadInput(`${each.path}, ${each.role}, would lie below the mount ${mount}, which hides it: name another`)
  }
}

/** The same factories, which tell the files that a stack names. */
export function toldFiles(factories: readonly LayerFactory[], tell: (path: string) => void): LayerFactory[] {
  return factories.map((factory) => ({
    ...factory,
    create: (options) => {
      const { file } = options
      if (typeof file === 'string') tell(resolve(file))
      return factory.create(options)
    },
  }))
}

/** The same factories, which tell the bytes of memory that a stack may take: the limits that it says. */
export function toldLimits(factories: readonly LayerFactory[], tell: (bytes: number) => void): LayerFactory[] {
  return factories.map((factory) => ({
    ...factory,
    create: (options) => {
      const { limit } = options
      if (factory.options['limit']?.kind === 'bytes' && typeof limit === 'number') tell(limit)
      return factory.create(options)
    },
  }))
}

/** Which thing a path leads to. */
function identityOf(path: string): string {
  let at = resolve(path)
  for (let links = 0; links < mostLinks; links++) {
    const there = look(() => statSync(at, { bigint: true }))
    if (there !== undefined) return `${there.dev} ${there.ino}`
    // A link that leads nowhere says where it would be.
    const target = look(() => readlinkSync(at))
    if (target === undefined) break
    at = resolve(dirname(at), target)
  }
  const folder = look(() => statSync(dirname(at), { bigint: true }))
  return folder === undefined ? at : join(`${folder.dev} ${folder.ino}`, basename(at))
}

/** Whether a path leads through a directory. */
function liesIn(path: string, directory: BigIntStats): boolean {
  for (let at = dirname(resolve(path)); ; at = dirname(at)) {
    const there = look(() => statSync(at, { bigint: true }))
    if (there?.dev === directory.dev && there.ino === directory.ino) return true
    if (at === dirname(at)) return false
  }
}

/**
 * What is seen there. Whatever keeps it from being seen (a mount whose server was killed), whoever uses the path says.
 */
function look<T>(at: () => T): T | undefined {
  try {
    return at()
  } catch {
    return undefined
  }
}
