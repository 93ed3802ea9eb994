/**
 * An allocator that says no when it is told to, and remembers who asked.
 *
 * Nothing is random: the n-th request fails, or every request of a site, so that a run can be repeated with each of
 * its allocations failing once.
 */
import type { Allocator } from '@tmem/core'

/** Which requests fail. `all` and `none` speak for themselves. */
export type FailurePlan =
  | 'all'
  | 'none'
  /** The n-th request from now, counted from 1; only that one. */
  | { readonly nth: number }
  /** Every request of these sites. */
  | { readonly sites: readonly string[] }

/** An allocator whose requests can be counted and made to fail. */
export interface FailingAllocator extends Allocator {
  /** Requests since the last call of `fail` (or since it was made). */
  readonly requests: number
  /** Requests that were made to fail since then. */
  readonly failures: number
  /** Requests by site since then, in the order in which the sites were first seen. */
  readonly sites: ReadonlyMap<string, number>
  /** Sets which requests fail from now on, and starts counting again. */
  fail(plan: FailurePlan): void
}

/**
 * Wraps an allocator. Throws `RangeError` when `nth` is not a positive integer.
 *
 * @param inner where memory really comes from
 * @param plan which requests fail (default: none, which records)
 */
export function failingAllocator(inner: Allocator, plan: FailurePlan = 'none'): FailingAllocator {
  let current: FailurePlan = 'none'
  let requests = 0
  let failures = 0
  let sites = new Map<string, number>()
  const due = (site: string): boolean => {
    if (typeof current === 'string') return current === 'all'
    return 'nth' in current ? requests === current.nth : current.sites.includes(site)
  }
  const allocator: FailingAllocator = {
    get requests() {
      return requests
    },
    get failures() {
      return failures
    },
    get sites() {
      return sites
    },
    fail(next) {
      if (typeof next === 'object' && 'nth' in next && !(Number.isInteger(next.nth) && next.nth > 0))
        throw new RangeError(`nth must be a positive integer, got ${next.nth}`)
      current = next
      requests = 0
      failures = 0
      sites = new Map()
    },
    allocate(bytes, site) {
      requests++
      sites.set(site, (sites.get(site) ?? 0) + 1)
      if (!due(site)) return inner.allocate(bytes, site)
      failures++
      return undefined
    },
    ...(inner.ahead === undefined ? {} : { ahead: inner.ahead }),
    ...(inner.free === undefined ? {} : { free: (memory, site) => inner.free!(memory, site) }),
  }
  allocator.fail(plan)
  return allocator
}
