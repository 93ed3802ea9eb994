/** Starts Redis or Valkey servers for demos and benches: on a loopback port, with nothing on disk. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { type AddressInfo, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Valkey } from 'iovalkey'
import { Failed } from './ending.ts'

/** What to install if no server can be started. */
export const lackingServer = 'needs a lending server: install valkey-server, redis-server or redis-tools (Debian)'

/** Programs that contain the server. The one in Debian's redis-tools acts as the server if its argv[0] says so. */
export const serverCommands: readonly string[] = ['valkey-server', 'redis-server', 'redis-check-rdb']

export class LendingServer {
  readonly port: number
  readonly #command: string
  readonly #folder: string
  #child: ChildProcess | undefined

  private constructor(port: number, command: string) {
    this.port = port
    this.#command = command
    this.#folder = mkdtempSync(join(tmpdir(), 'tmem-lender-'))
  }

  /** Starts a server; `undefined` if no program is installed. Rejects with `Failed` if the server does not answer. */
  static async start(): Promise<LendingServer | undefined> {
    const probe = createServer().listen(0, '127.0.0.1')
    await once(probe, 'listening')
    const { port } = probe.address() as AddressInfo
    probe.close()
    await once(probe, 'close')
    for (const command of serverCommands) {
      const server = new LendingServer(port, command)
      if (await server.restart()) return server
      await server.stop()
    }
    return undefined
  }

  /** Starts the server again, empty, on the same port. False if the program is not installed. */
  async restart(): Promise<boolean> {
    const fixed = ['--port', `${this.port}`, '--bind', '127.0.0.1', '--save', '', '--appendonly', 'no']
    const child = spawn(this.#command, [...fixed, '--dir', this.#folder], { argv0: 'redis-server', stdio: 'ignore' })
    const began = await new Promise<boolean>((resolve) => {
      child.once('spawn', () => resolve(true))
      child.once('error', () => resolve(false))
    })
    if (!began) return false
    this.#child = child
    const client = this.client()
    try {
      await client.ping()
    } catch (error) {
      await this.stop()
      throw new Failed(
        `${this.#command} was started and does not answer on port ${this.port}: ${(error as Error).message}`,
      )
    } finally {
      client.disconnect()
    }
    return true
  }

  /** A new client of the server. */
  client(): Valkey {
    const client = new Valkey({
      host: '127.0.0.1',
      port: this.port,
      maxRetriesPerRequest: 100,
      retryStrategy: () => 50,
    })
    // The caller of each command gets its error.
    client.on('error', () => undefined)
    return client
  }

  /** Kills the server with SIGKILL. */
  async kill(): Promise<void> {
    const child = this.#child
    this.#child = undefined
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return
    const ended = once(child, 'exit')
    child.kill('SIGKILL')
    await ended
  }

  /** Ends the server and removes its directory. */
  async stop(): Promise<void> {
    await this.kill()
    rmSync(this.#folder, { recursive: true, force: true })
  }
}
