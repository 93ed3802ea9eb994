/**
 * One thing has one role: the images, backing files, sockets, record and mount of a server are all different things.
 *
 * The thing decides, not its name, which may be a path, a link, a hard link, or lead through a linked directory. A
 * thing that does not exist yet is its directory (device and inode) and its name there. These checks are for one
 * server, before it touches anything. Claims (@tmem/page-file) and listening sockets protect the things of other
 * servers.
 *
 * Source: stat(2), for device and inode.
 */
import { type BigIntStats, readlinkSync, statSync } from 'node:fs'
import { basename, dirname, join, resolve } from 'node:path'
import type { LayerFactory } from '@tmem/core'
import { BadInput } from '../ending.ts'

/** A path, and the role of the thing there. */
export interface Role {
  /** The role in the words of a message: `the snapshot of a`. */
  readonly role: string
  readonly path: string
}

/** The most links that a kernel follows. */
const mostLinks = 40

/** Throws `BadInput` if two roles have the same thing, or if a thing lies in the directory of the mount. */
export function judgeRoles(roles: readonly Role[], mount: string | undefined): void {
  const seen = new Map<string, Role>()
  const over = mount === undefined ? undefined : look(() => statSync(mount, { bigint: true }))
  for (const each of [...roles, ...(mount === undefined ? [] : [{ role: 'the mount', path: mount }])]) {
    const id = identityOf(each.path)
    const other = seen.get(id)
    if (other !== undefined) {
      const names = other.path === each.path ? other.path : `${other.path} and ${each.path} are the same file, which`
      throw new BadInput(`${names} would be both ${other.role} and ${each.role}: give each its own`)
    }
    seen.set(id, each)
    if (over !== undefined && each.path !== mount && liesIn(each.path, over))
      throw new BadInput(
        `${each.path}, ${each.role}, would lie below the mount ${mount}, which hides it: name another path`,
      )
  }
}

/** The same factories, which report the files that a stack names. */
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

/** The same factories, which report the limits of a stack: the bytes of memory that it may take. */
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

/** The thing to which a path leads. */
function identityOf(path: string): string {
  let at = resolve(path)
  for (let links = 0; links < mostLinks; links++) {
    const there = look(() => statSync(at, { bigint: true }))
    if (there !== undefined) return `${there.dev} ${there.ino}`
    // A dangling link names the path of the thing.
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
 * The attributes of a path. An error, such as that of a mount whose server was killed, appears when the path is used.
 */
function look<T>(at: () => T): T | undefined {
  try {
    return at()
  } catch {
    return undefined
  }
}
