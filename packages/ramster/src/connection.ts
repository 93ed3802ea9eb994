/**
 * The commands for a Valkey or Redis server and for a cluster: the same few requests, each in the form that suits the
 * target.
 *
 * A single server gets many keys in one message. Each server of a cluster gets, in one write, one command for each of
 * its keys, by the map of slots. A command that fails (MOVED, ASK, a broken connection) is repeated alone: the library
 * redirects it, and retries it after the death of a server, when a replica may take over (at most 16 times, 100 ms
 * apart). Repeating is safe, as a key never has another value.
 */
import slotOf from 'cluster-key-slot'
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
  /** Keys of one `get`, where there are many to ask for. */
  readonly getsAtOnce: number
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
    // While the first are looked at here, the server looks the next ones up.
    getsAtOnce: 64,
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
  // What fails at one of them is told as the cluster's, also when it is no longer in use, and what fails while it is
  // asked how the cluster is: the library does that over copies of its connections, and listens to none of them.
  client.on('+node', (node: Valkey) => {
    const tell = (error: Error): boolean => client.emit('error', error)
    node.on('error', tell)
    const duplicate = node.duplicate.bind(node)
    node.duplicate = (override) => duplicate(override).on('error', tell)
  })
  /** The replies to commands, or the errors: for each server that has keys of theirs one write. */
  const each = async (commands: readonly Command[], call: 'call' | 'callBuffer' = 'call'): Promise<Reply[]> => {
    const nodes = new Map(client.nodes('master').map((node) => [`${node.options.host}:${node.options.port}`, node]))
    const byNode = new Map<Valkey | undefined, number[]>()
    for (const [n, [, key]] of commands.entries()) {
      const node = nodes.get(client.slots[slotOf(key)]?.[0] ?? '')
      const ofNode = byNode.get(node)
      if (ofNode === undefined) byNode.set(node, [n])
      else ofNode.push(n)
    }
    const replies: Reply[] = []
    const sent = [...byNode].map(async ([node, ofNode]) => {
      let alone = ofNode
      if (node !== undefined) {
        const pipeline = node.pipeline()
        for (const n of ofNode) pipeline[call](...commands[n]!)
        for (const [at, [error, reply]] of (await pipeline.exec())!.entries()) replies[ofNode[at]!] = error ?? reply
        alone = ofNode.filter((n) => isForElsewhere(replies[n]))
      }
      const answers = await Promise.all(alone.map((n) => replyOf(client[call](...commands[n]!))))
      for (const [at, n] of alone.entries()) replies[n] = answers[at]
    })
    await Promise.all(sent)
    return replies
  }
  return {
    client,
    // The servers of a cluster answer one after the other anyway.
    getsAtOnce: Number.POSITIVE_INFINITY,
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
      each(keys.map((key, n): Command => ['set', key, bufferOf(blocks[n]!), 'PX', leaseMs])),
    async get(keys) {
      const replies = await each(
        keys.map((key): Command => ['get', key]),
        'callBuffer',
      )
      const isOther = (reply: Reply): boolean => reply instanceof Error && reply.message.startsWith('WRONGTYPE')
      return replies.map((reply) => (isOther(reply) ? null : (reply as Uint8Array | null | Error)))
    },
    async unlink(keys) {
      const replies = await each(keys.map((key): Command => ['unlink', key]))
      const failed = replies.find((reply) => reply instanceof Error)
      if (failed !== undefined) throw failed
    },
    renew: (keys, leaseMs) => each(keys.map((key): Command => ['pexpire', key, leaseMs])),
  }
}

/** What the library says of a connection that ended, for whatever reason. */
export const closed = 'Connection is closed.'

/** A command of a cluster: its name, its key, and what follows. */
type Command = readonly [name: string, key: string, ...(string | number | Buffer)[]]

/** Whether a command was not done for where it went, or for the connection: the library knows where else to go. */
const isForElsewhere = (reply: Reply): boolean =>
  reply instanceof Error && (/^(MOVED|ASK|TRYAGAIN|CLUSTERDOWN)\b/.test(reply.message) || reply.message === closed)

/** Why a cluster cannot be reached: what the last of its servers failed with, when all have. */
export const reasonOf = (error: Error): Error =>
  'lastNodeError' in error && error.lastNodeError instanceof Error ? error.lastNodeError : error

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
