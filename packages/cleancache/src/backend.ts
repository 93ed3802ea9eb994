/**
 * Any page store as a cleancache backend: a client of the transcendent memory API, with an ephemeral pool for each file
 * system, private or shared.
 *
 * DEVIATION: zcache mapped a shared file system to a private pool, so that its machines never shared; here the pool is
 * shared, or the file system is not cached. A uuid for which the client was not authorised is refused (see `Tmem`).
 *
 * Source: drivers/xen/tmem.c and zcache's cleancache operations as described in the reference notes, §1.1, §1.2 and §3.
 */
import { checkOptions, encodePoolFlags, GetOutcome, type StatsNode, type Tmem, type Uuid } from '@tmem/core'
import type { CleancacheBackend } from './cleancache.ts'

/** Largest page index that a backend takes: 32 bits. Pages further on are not cached. */
const maxIndex = 2 ** 32 - 1

/** What the backend is told beside its memory. */
export interface TmemBackendOptions {
  /** What is below, for the tree of statistics. */
  readonly stats?: () => StatsNode
}

/**
 * A backend that keeps the pages of one client in `tmem`. Clients (machines of a cluster) that work on the same `Tmem`
 * and are authorised for a uuid share the pool of that uuid.
 */
export function tmemBackend(tmem: Tmem, client: number, options: TmemBackendOptions = {}): CleancacheBackend {
  checkOptions('tmemBackend', options, { stats: 'function?' })
  const newPool = (uuid: Uuid, shared: boolean, pageSize: number): number => {
    const made = tmem.newPool(client, uuid, encodePoolFlags({ persistent: false, shared, pageSize }))
    return 'poolId' in made ? made.poolId : -made.refusal
  }
  return {
    name: 'tmem',
    initFs: (pageSize) => newPool(0n, false, pageSize),
    initSharedFs: (uuid, pageSize) => newPool(uuidOf(uuid), true, pageSize),
    putPage(pool, key, index, page) {
      if (index <= maxIndex) tmem.putPage(client, pool, key, index, page)
    },
    getPage: (pool, key, index, into) =>
      index <= maxIndex ? tmem.getPage(client, pool, key, index, into) : GetOutcome.Miss,
    async fetchPage(pool, key, index, into) {
      return index <= maxIndex ? tmem.fetchPage(client, pool, key, index, into) : GetOutcome.Miss
    },
    invalidatePage(pool, key, index) {
      if (index <= maxIndex) tmem.flushPage(client, pool, key, index)
    },
    invalidateInode: (pool, key) => tmem.flushObject(client, pool, key),
    invalidateFs: (pool) => tmem.destroyPool(client, pool),
    ...options,
  }
}

/** The number that 16 bytes are: the first byte is the lowest. */
function uuidOf(bytes: Uint8Array): Uuid {
  let uuid = 0n
  for (let at = 15; at >= 0; at--) uuid = (uuid << 8n) | BigInt(bytes[at]!)
  return uuid
}
