/**
 * What is said to a Valkey or Redis server, and to a cluster of them: the same few questions, asked in the way that
 * suits each.
 *
 * A server gets many keys in one message. Of a cluster each key may be with another server, so each is a message of its
 * own, which the library sends on where the answer is MOVED or ASK, and again where the server has just died and a
 * replica may take over (16 times, 100 ms apart, at most). A key never has another value than this one, so a message
 * that is done twice does no harm.
 */
import { Cluster, type RedisOptions, Valkey } from 'iovalkey'

/** What a machine says of itself. */
export interface Said {
  /** INFO of each server that takes writes. */
  readonly servers: readonly ReadonlyMap<string, string>[]
  readonly isCluster: boolean
  /** Which machine it is. */
  readonly identity: string
  /** Why it cannot be used now, as far as its servers do not say so themselves. */
  readonly problem: string | undefined
}

/** A reply, or the error that was replied. */
type Reply = unknown

export interface Connection {
  readonly client: Valkey | Cluster
  ask(): Promise<Said>
  /** For each key `OK`, or the error. */
  set(keys: readonly string[], blocks: readonly Uint8Array[], leaseMs: number): Promise<readonly Reply[]>
  /**
   * For each key its value, null when there is none, or the error. Something else than a string, which somebody else
   * has put there, is as good as none.
   */
  get(keys: readonly string[]): Promise<readonly (Uint8Array | null | Error)[]>
  unlink(keys: readonly string[]): Promise<void>
  /** For each key 1, or 0 when it is not there, or the error. */
  renew(keys: readonly string[], leaseMs: number): Promise<readonly Reply[]>
}

/** Milliseconds between two attempts to connect: doubled each time, up to the second. */
const firstRetryMs = 50
const lastRetryMs = 3000
const retryMs = (times: number): number => Math.min(lastRetryMs, firstRetryMs * 2 ** Math.min(times - 1, 10))

/** What is the same for every connection. */
const common = {
  disconnectTimeout: 100,
  autoResendUnfulfilledCommands: false,
  keepAlive: 10_000,
} as const satisfies RedisOptions

/** A connection to one server. */
export function serverConnection(options: RedisOptions): Connection {
  const client = new Valkey({
    ...common,
    ...options,
    enableOfflineQueue: false,
    enableReadyCheck: false,
    maxRetriesPerRequest: 0,
    retryStrategy: retryMs,
  })
  const repliesOf = (replies: [Error | null, unknown][] | null): Reply[] =>
    replies!.map(([error, reply]) => error ?? reply)
  return {
    client,
    async ask() {
      const said = infoOf(await client.info())
      return { servers: [said], isCluster: false, identity: said.get('run_id') ?? '', problem: undefined }
    },
    async set(keys, blocks, leaseMs) {
      const pipeline = client.pipeline()
      for (const [n, key] of keys.entries()) pipeline.set(key, bufferOf(blocks[n]!), 'PX', leaseMs)
      return repliesOf(await pipeline.exec())
    },
    get: (keys) => client.mgetBuffer([...keys]),
    async unlink(keys) {
      await client.unlink([...keys])
    },
    async renew(keys, leaseMs) {
      const pipeline = client.pipeline()
      for (const key of keys) pipeline.pexpire(key, leaseMs)
      return repliesOf(await pipeline.exec())
    },
  }
}

/** A connection to a cluster, some of whose servers are these. */
export function clusterConnection(
  nodes: readonly { readonly host: string; readonly port: number }[],
  options: RedisOptions & { readonly connectTimeout: number },
): Connection {
  const { connectTimeout } = options
  const client = new Cluster([...nodes], {
    enableOfflineQueue: false,
    slotsRefreshTimeout: connectTimeout,
    clusterRetryStrategy: retryMs,
    // The library asks one of them how the cluster is when it connects, which may stand still. Whoever asks later gives
    // the connection up before that.
    redisOptions: { ...common, ...options, commandTimeout: 2 * connectTimeout },
  })
  // What fails at one of them is told as the cluster's, also when it is no longer in use.
  client.on('+node', (node: Valkey) => node.on('error', (error: Error) => client.emit('error', error)))
  return {
    client,
    async ask() {
      const state = infoOf(String(await client.cluster('INFO'))).get('cluster_state')
      // Ids of all servers, one at the start of each line.
      const ids = String(await client.cluster('NODES'))
        .split('\n')
        .filter((line) => line !== '')
        .map((line) => line.split(' ')[0]!)
      const primaries = client.nodes('master')
      const servers = await Promise.all(primaries.map(async (node) => infoOf(await node.info())))
      const problem =
        state === 'ok' && servers.length > 0 ? undefined : `its cluster_state is ${state}: some slots are not served`
      return { servers, isCluster: true, identity: `cluster of ${ids.toSorted()[0]}`, problem }
    },
    set: (keys, blocks, leaseMs) =>
      Promise.all(keys.map((key, n) => replyOf(client.set(key, bufferOf(blocks[n]!), 'PX', leaseMs)))),
    get: (keys) =>
      Promise.all(
        keys.map(async (key) => {
          const reply = await replyOf(client.getBuffer(key))
          return reply instanceof Error && reply.message.startsWith('WRONGTYPE') ? null : reply
        }),
      ),
    async unlink(keys) {
      await Promise.all(keys.map((key) => client.unlink(key)))
    },
    renew: (keys, leaseMs) => Promise.all(keys.map((key) => replyOf(client.pexpire(key, leaseMs)))),
  }
}

const bufferOf = ({ buffer, byteOffset, length }: Uint8Array): Buffer => Buffer.from(buffer, byteOffset, length)

/** A reply, or the error of it. */
async function replyOf<Answer>(asked: Promise<Answer>): Promise<Answer | Error> {
  try {
    return await asked
  } catch (error) {
    if (error instanceof Error) return error
    throw error
  }
}

/** What INFO has said, by name. */
function infoOf(text: string): Map<string, string> {
  const said = new Map<string, string>()
  for (const line of text.split('\r\n')) {
    const colon = line.indexOf(':')
    if (colon > 0) said.set(line.slice(0, colon), line.slice(colon + 1))
  }
  return said
}
