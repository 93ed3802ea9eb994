/** A real server on loopback, which a test may stop, kill and start again; and a network before it that can fail. */
import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { type AddressInfo, createServer, type Server, Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'
import { type RedisOptions, Valkey } from 'iovalkey'
import { makeCertificates } from '../../../tools/certificates.ts'

const run = promisify(execFile)

/** The program of Debian's redis-tools: it is the server when it is called so. */
export const serverCommand = 'redis-check-rdb'

/** A port that nobody listens on. */
async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}

export class RealServer {
  readonly port: number
  readonly #folder: string = mkdtempSync(join(tmpdir(), 'ramster-server-'))
  readonly #options: readonly string[]
  /** How its owner reaches it. */
  readonly #access: RedisOptions
  #process: ChildProcess | undefined

  private constructor(port: number, options: readonly string[], access: RedisOptions) {
    this.port = port
    this.#options = options
    this.#access = access
  }

  /** Starts a server with these settings, e.g. `--maxmemory 32mb`; `PORT` in them is its port. */
  static start(...options: string[]): Promise<RealServer> {
    return RealServer.startFor({}, ...options)
  }

  /** The same, where its owner needs more than its port to reach it. */
  static async startFor(access: RedisOptions, ...options: string[]): Promise<RealServer> {
    const port = await freePort()
    const server = new RealServer(
      port,
      options.map((word) => (word === 'PORT' ? `${port}` : word)),
      access,
    )
    await server.start()
    return server
  }

  async start(...more: string[]): Promise<void> {
    const fixed = ['--port', `${this.port}`, '--bind', '127.0.0.1', '--save', '', '--appendonly', 'no']
    this.#process = spawn(serverCommand, [...fixed, '--dir', this.#folder, ...this.#options, ...more], {
      argv0: 'redis-server',
      stdio: 'ignore',
    })
    for (let n = 0; n < 500; n++) {
      if (await this.#answers()) return
      await sleep(10)
    }
    throw new Error(`the server on port ${this.port} did not start`)
  }

  async #answers(): Promise<boolean> {
    const socket = new Socket()
    const connected = new Promise<boolean>((resolve) => {
      socket.on('connect', () => resolve(true))
      socket.on('error', () => resolve(false))
    })
    socket.connect(this.port, '127.0.0.1')
    const answer = await connected
    socket.destroy()
    return answer
  }

  /** Ends it in the middle of whatever it does. */
  async kill(): Promise<void> {
    const ended = once(this.#process!, 'exit')
    this.#process!.kill('SIGKILL')
    await ended
    this.#process = undefined
  }

  get isRunning(): boolean {
    return this.#process !== undefined
  }

  /** It does nothing any more, and does not say so. */
  stall(): void {
    this.#process!.kill('SIGSTOP')
  }

  resume(): void {
    this.#process!.kill('SIGCONT')
  }

  /** Asks it something as its owner. */
  async ask<Answer>(question: (client: Valkey) => Promise<Answer>, password?: string): Promise<Answer> {
    const client = new Valkey({
      host: '127.0.0.1',
      port: this.port,
      enableReadyCheck: false,
      ...this.#access,
      ...(password === undefined ? {} : { password }),
    })
    try {
      return await question(client)
    } finally {
      client.disconnect()
    }
  }

  keys(): Promise<number> {
    return this.ask((client) => client.dbsize())
  }

  async stop(): Promise<void> {
    if (this.#process !== undefined) await this.kill()
    rmSync(this.#folder, { recursive: true, force: true })
  }
}

/** Servers of one cluster: primaries, and a replica of each. */
export class RealCluster {
  readonly servers: readonly RealServer[]

  private constructor(servers: readonly RealServer[]) {
    this.servers = servers
  }

  /** Starts three primaries and three replicas; one that is away for a second and a half is replaced. */
  static start(...options: string[]): Promise<RealCluster> {
    return RealCluster.startFor({}, [], ...options)
  }

  /** The same, where their owner, and redis-cli, need more than ports to reach them. */
  static async startFor(access: RedisOptions, words: readonly string[], ...options: string[]): Promise<RealCluster> {
    const settings = [
      '--cluster-enabled',
      'yes',
      '--cluster-node-timeout',
      '1500',
      '--cluster-replica-no-failover',
      'no',
    ]
    const servers: RealServer[] = []
    const cluster = new RealCluster(servers)
    try {
      for (let n = 0; n < 6; n++)
        servers.push(
          await RealServer.startFor(
            access,
            ...settings,
            '--cluster-port',
            `${await freePort()}`,
            '--repl-diskless-sync-delay',
            '0',
            ...options,
          ),
        )
      const addresses = servers.map(({ port }) => `127.0.0.1:${port}`)
      const create = ['--cluster', 'create', ...addresses, '--cluster-replicas', '1', '--cluster-yes']
      await run('redis-cli', [...words, ...create])
      await cluster.isWell()
      return cluster
    } catch (error) {
      await cluster.stop()
      throw error
    }
  }

  /** Waits until all slots are served and every replica has what its primary has. */
  async isWell(): Promise<void> {
    for (let n = 0; n < 600; n++) {
      const states = await Promise.all(
        this.running.map((one) =>
          one.ask(async (client) => `${await client.cluster('INFO')}${await client.info('replication')}`),
        ),
      )
      const isReady = (text: string): boolean =>
        text.includes('cluster_state:ok') && (text.includes('role:master') || text.includes('master_link_status:up'))
      if (states.every(isReady)) return
      await sleep(50)
    }
    throw new Error('the cluster does not come up')
  }

  get running(): RealServer[] {
    return this.servers.filter(({ isRunning }) => isRunning)
  }

  /** Servers that take writes now. */
  async primaries(): Promise<RealServer[]> {
    const roles = await Promise.all(
      this.running.map(async (one) => ({ one, text: await one.ask((client) => client.info('replication')) })),
    )
    return roles.filter(({ text }) => text.includes('role:master')).map(({ one }) => one)
  }

  /** Keys of all primaries. */
  async keys(): Promise<number> {
    const counts = await Promise.all((await this.primaries()).map((one) => one.keys()))
    return counts.reduce((sum, count) => sum + count, 0)
  }

  async stop(): Promise<void> {
    for (const server of this.servers) await server.stop()
  }
}

/** A network before a server: it forwards, stands still, is slow, or is cut after so many bytes of an answer. */
export class Network {
  readonly port: number
  readonly #server: Server
  readonly #sockets: Set<Socket> = new Set()
  mode: 'forwards' | 'stands' = 'forwards'
  delayMs = 0
  /** Bytes of answers that are let through before all connections are cut. */
  cutAfter: number = Number.POSITIVE_INFINITY
  /** Changes answers. */
  alter: ((bytes: Buffer) => Buffer) | undefined

  private constructor(server: Server, port: number) {
    this.#server = server
    this.port = port
  }

  static async before(target: RealServer): Promise<Network> {
    const server = createServer().listen(0, '127.0.0.1')
    await once(server, 'listening')
    const network = new Network(server, (server.address() as AddressInfo).port)
    server.on('connection', (near) => network.#connect(near, target.port))
    return network
  }

  #connect(near: Socket, port: number): void {
    const far = new Socket().connect(port, '127.0.0.1')
    for (const socket of [near, far]) {
      this.#sockets.add(socket)
      // What fails ends; the other end with it.
      socket.on('error', () => socket.destroy())
      socket.on('close', () => {
        this.#sockets.delete(socket)
        if (this.mode === 'stands') return
        near.destroy()
        far.destroy()
      })
    }
    near.on('data', (bytes) => void this.#forward(bytes, far, false))
    far.on('data', (bytes) => void this.#forward(bytes, near, true))
  }

  async #forward(bytes: Buffer, to: Socket, isAnswer: boolean): Promise<void> {
    if (this.mode === 'stands') return
    if (this.delayMs > 0) await sleep(this.delayMs)
    if (to.destroyed) return
    if (!isAnswer) {
      to.write(bytes)
      return
    }
    const through = bytes.subarray(0, this.cutAfter)
    this.cutAfter -= through.length
    to.write(this.alter?.(through) ?? through)
    if (this.cutAfter > 0) return
    this.cutAfter = Number.POSITIVE_INFINITY
    for (const socket of this.#sockets) socket.destroySoon()
  }

  async close(): Promise<void> {
    this.mode = 'forwards'
    for (const socket of this.#sockets) socket.destroy()
    this.#server.close()
    await once(this.#server, 'close')
  }
}

/** What TLS needs, in a folder of its own, which `remove` takes away. */
export interface Certificates {
  /** Path of a file there. `ca.pem` vouches for the servers, `stranger.pem` for nobody. */
  readonly path: (name: string) => string
  /** Settings of a server that takes TLS only. */
  readonly settings: readonly string[]
  /** What its owner needs. */
  readonly access: RedisOptions
  readonly remove: () => void
}

/** Makes a certificate for 127.0.0.1 and localhost that `ca.pem` vouches for, and `stranger.pem` of somebody else. */
export function serverCertificates(): Certificates {
  const folder = mkdtempSync(join(tmpdir(), 'ramster-tls-'))
  makeCertificates(folder, { ca: ['server'], stranger: [] })
  const path = (name: string): string => join(folder, name)
  const files = ['--tls-cert-file', path('server.pem'), '--tls-key-file', path('server.key')]
  const authority = ['--tls-ca-cert-file', path('ca.pem'), '--tls-auth-clients', 'no']
  return {
    path,
    settings: ['--port', '0', '--tls-port', 'PORT', ...files, ...authority],
    access: { tls: { ca: readFileSync(path('ca.pem')) } },
    remove: () => rmSync(folder, { recursive: true }),
  }
}
