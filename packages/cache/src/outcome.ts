/** The outcomes of a lookup of an entry. */

/** It is there. */
export const hit = 0
/** It is there, but not fresh any more. */
export const stale = 100

/** Why there was no value. */
export const Miss = {
  /** There is no such entry, as far as anybody remembers. */
  Absent: 1,
  /** Its room was needed. */
  Evicted: 2,
  /** Its time was over. */
  Expired: 3,
  /** It was deleted by a tag. */
  Untagged: 4,
  /** Another key has its hash. */
  Collided: 5,
  /** The stack has lost its page. */
  Vanished: 6,
  /** It is where one has to wait for it: `load`. */
  Deferred: 7,
} as const
export type Miss = (typeof Miss)[keyof typeof Miss]

/** Names of the reasons, by number. */
export const missNames = ['', 'absent', 'evicted', 'expired', 'untagged', 'collided', 'vanished', 'deferred'] as const

/** The name of an outcome. */
export const outcomeName = (outcome: number): string =>
  outcome === hit ? 'hit' : outcome === stale ? 'expired' : missNames[outcome]!
