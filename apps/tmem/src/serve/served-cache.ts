/**
 * A cache of values for clients of Redis: its entries, its address, and the counters of both. `@tmem/cache/resp` has
 * the protocol; this file connects it to sockets and to the server.
 *
 * Everybody who reaches the socket may read, write and empty the cache. A unix socket is open to its owner alone, as
 * all sockets of the program are, and `isOpen` marks an address that other hosts can reach.
 */
import { type AddressInfo, createServer, type Server } from 'node:net'
import { Cache } from '@tmem/cache'
import { RespServer, respWorkBytes } from '@tmem/cache/resp'
import { type Allocator, idle, type Progress, type StatsNode } from '@tmem/core'
import { listenAtPath } from '@tmem/nbd'
import { BadInput, Failed } from '../ending.ts'
import { type CacheEndpoint, isLoopback } from './endpoints.ts'

/** A cache to serve. */
export interface ServedCacheRequest {
  readonly name: string
  readonly memoryBytes: number
  /** A file below the memory. */
  readonly file?: { readonly path: string; readonly sizeBytes: number }
  /** Default lifetime of a value in milliseconds (without it, values stay until their room is needed). */
  readonly ttlMs?: number
  /** `unix:PATH` or `tcp:HOST:PORT`. */
  readonly listen: string
}

/** With what it is opened. */
interface Context {
  /** Who must have all memory ahead says where from. */
  readonly allocator?: Allocator
  readonly onError: (error: Error) => void
  readonly onRefused: (why: string) => void
}

const largestValue = 64 * 2 ** 20

/** Most bytes that a cache takes, including data on its way to and from its clients. */
export function servedCacheBytes({ memoryBytes, file }: ServedCacheRequest): number {
  return memoryBytes + respWorkBytes(Math.min(largestValue, (memoryBytes + (file?.sizeBytes ?? 0)) / 2))
}

export class ServedCache {
  readonly name: string
  readonly #cache: Cache<Uint8Array>
  readonly #resp: RespServer
  #listener: Server | undefined

  private constructor(name: string, cache: Cache<Uint8Array>, resp: RespServer) {
    this.name = name
    this.#cache = cache
    this.#resp = resp
  }

  /**
   * Opens a cache with the entries of its file. Rejects with `BadInput` if the memory is too small for the file, with
   * `TmemError` if another process uses the file or it fails.
   */
  static async open(request: ServedCacheRequest, { allocator, onError, onRefused }: Context): Promise<ServedCache> {
    const { name, memoryBytes: memory, file, ttlMs: ttl } = request
    let cache: Cache<Uint8Array>
    try {
      cache = new Cache({
        memory,
        ...(file === undefined ? {} : { file: { path: file.path, size: file.sizeBytes } }),
        ...(allocator === undefined ? {} : { allocator }),
      })
    } catch (error) {
      if (error instanceof RangeError) throw new BadInput(`cache ${name}: ${error.message}`)
      throw error
    }
    try {
      await cache.ready()
      const resp = new RespServer({ cache, onError, onRefused, ...(ttl === undefined ? {} : { ttl }) })
      return new ServedCache(name, cache, resp)
    } catch (error) {
      await cache.close()
      throw error
    }
  }

  /** Listens until `close`. Resolves to the address, and whether other hosts can reach it. Rejects with `Failed`. */
  async listen(endpoint: CacheEndpoint): Promise<{ readonly address: string; readonly isOpen: boolean }> {
    const server = createServer({ allowHalfOpen: true, noDelay: true, keepAlive: true }, (socket) =>
      this.#resp.accept(socket),
    )
    try {
      if ('path' in endpoint) await listenAtPath(server, endpoint.path, endpoint.mode, endpoint.gid)
      else await listening(server, endpoint.host, endpoint.port)
    } catch (error) {
      throw new Failed(`cache ${this.name} cannot listen: ${(error as Error).message}`)
    }
    this.#listener = server
    if ('path' in endpoint) return { address: `unix:${endpoint.path}`, isOpen: false }
    const { address, port } = server.address() as AddressInfo
    return { address: `tcp:${address}:${port}`, isOpen: !isLoopback(endpoint.host) }
  }

  /** Lets the cache do background work. */
  tick(pages: number): Progress {
    return { ...idle, pending: this.#cache.tick(pages) }
  }

  stats(): StatsNode {
    const stats = this.#cache.stats()
    const section = (name: string, counters: Readonly<Record<string, number>>): StatsNode => ({
      name,
      counters,
      children: [],
    })
    return {
      name: this.name,
      counters: {
        entries: stats.entries,
        limit_bytes: stats.limitBytes,
        memory_bytes: stats.memoryBytes,
        table_bytes: stats.tableBytes,
        page_table_bytes: stats.pageTableBytes,
        window_bytes: stats.windowBytes,
        largest_bytes: stats.largestBytes,
        hits: stats.hits,
        sets: stats.sets,
        deletes: stats.deletes,
        kept: stats.kept,
        pages_read: stats.pagesRead,
        pages_written: stats.pagesWritten,
      },
      children: [
        section('misses', stats.misses),
        section('evictions', stats.evictions),
        section('refused', stats.refused),
        {
          name: 'places',
          counters: {},
          children: stats.places.map(({ name, pages, bytes, usedBytes }) =>
            section(name, { pages, bytes, used_bytes: usedBytes }),
          ),
        },
        this.#resp.stats(),
      ],
    }
  }

  /** Disconnects all clients, then writes the entries in memory to the file, if there is one. */
  async close(): Promise<void> {
    const listener = this.#listener
    const stopped = new Promise<void>((resolve) => {
      if (listener === undefined) resolve()
      else listener.close(() => resolve())
    })
    await this.#resp.close()
    await stopped
    await this.#cache.close()
  }
}

function listening(server: Server, host: string, port: number): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', ({ code, message }: NodeJS.ErrnoException) => {
      const advice = code === 'EADDRINUSE' ? ': another process listens there, name another port' : ''
      reject(new Error(`${message}${advice}`))
    })
    server.listen(port, host, resolve)
  })
}
