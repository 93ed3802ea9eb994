/** The release of Xen that `--release` names. */
import { nearestName } from '@tmem/core'
import { defaultRelease, type Release, releases } from '@tmem/xen-hypercall'
import { BadInput } from '../ending.ts'

/** Throws `BadInput` for an unknown name. */
export function releaseOf(name: string | undefined): Release {
  if (name === undefined) return defaultRelease
  const release = releases.find((known) => known === name)
  if (release === undefined) throw new BadInput(`--release: unknown release ${name}; ${nearestName(name, releases)}`)
  return release
}
