/** The release of Xen that `--release` names. */
import { nearestName } from '@tmem/core'
import { defaultRelease, type Release, releases } from '@tmem/xen-hypercall'
import { BadInput } from '../ending.ts'

/** Throws `BadInput` for a name of none. */
export function releaseOf(name: string | undefined): Release {
  if (name === undefined) return defaultRelease
  const release = releases.find((known) => known === name)
  if (release === undefined) throw new BadInput(`--release: there is no ${name}; ${nearestName(name, releases)}`)
  return release
}
