/** A Redis or Valkey server of our own, for demos and benches: on a loopback port, with nothing on disk. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { type AddressInfo, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Valkey } from 'iovalkey'
import { Failed } from './ending.ts'

/** What to install where no server can be started. */
export const lackingServer = 'needs valkey-server, redis-server, or Debian’s redis-tools, which has the same program'

/** Programs that are the server, when they are called so: Debian's redis-tools has it under another name. */
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

  /** Starts one; `undefined`: no program for it is there. Rejects with `Failed` when it does not answer. */
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

  /** Starts it, on the same port, with nothing in it. False: there is no such program. */
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
      throw new Failed(`${this.#command} does not answer on port ${this.port}: ${(error as Error).message}`)
    } finally {
      client.disconnect()
    }
    return true
  }

  /** A client of it. */
  client(): Valkey {
    const client = new Valkey({
      host: '127.0.0.1',
      port: this.port,
      maxRetriesPerRequest: 100,
      retryStrategy: () => 50,
    })
    // What fails is told to whoever asked.
    client.on('error', () => undefined)
    return client
  }

  /** Ends it in the middle of whatever it does. */
  async kill(): Promise<void> {
    const child = this.#child
    this.#child = undefined
    if (child === undefined || child.exitCode !== null || child.signalCode !== null) return
    const ended = once(child, 'exit')
    child.kill('SIGKILL')
    await ended
  }

  /** Ends it, and leaves nothing behind. */
  async stop(): Promise<void> {
    await this.kill()
    rmSync(this.#folder, { recursive: true, force: true })
  }
}
