/** Xen hosts as processes of the built program, and a guest that speaks to them over their sockets. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import type { Socket } from 'node:net'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { onTestFinished } from 'vitest'
import { open, type SocketReader, write } from '../src/xen/socket.ts'
import { bin } from './serving.ts'
import { temporaryDirectory } from './tmem.ts'

const pageBytes = 4096

/** A host that runs. */
export interface Hosting {
  readonly control: string
  readonly pid: number
  /** Sends SIGTERM; the exit code. */
  readonly stop: () => Promise<number | null>
}

/** Starts a host. */
export async function hosting(...words: string[]): Promise<Hosting> {
  const control = join(temporaryDirectory(), 'xen.sock')
  const stack = words.includes('--stack') ? [] : ['--stack', 'zcache(limit=64MiB)']
  const child = spawn(process.execPath, [bin, 'xen', 'host', '--json', '--control', control, ...stack, ...words], {
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  onTestFinished(() => void child.kill('SIGKILL'))
  let stderr = ''
  child.stderr.on('data', (text: Buffer) => {
    stderr += text.toString()
  })
  const lines = createInterface({ input: child.stdout })
  const closed = new Promise<number | null>((resolve) => child.once('close', resolve))
  const [line] = (await Promise.race([
    once(lines, 'line'),
    closed.then((code) => Promise.reject(new Error(`it ended with ${code}: ${stderr}`))),
  ])) as [string]
  return {
    ...(JSON.parse(line) as { control: string; pid: number }),
    stop: () => {
      child.kill('SIGTERM')
      return closed
    },
  }
}

/** A guest of a host. */
export class SocketGuest {
  readonly #socket: Socket
  readonly #reader: SocketReader
  readonly page: Uint8Array = new Uint8Array(pageBytes)

  private constructor(socket: Socket, reader: SocketReader) {
    this.#socket = socket
    this.#reader = reader
  }

  static async connect(control: string, domain: number): Promise<SocketGuest> {
    const { socket, reader } = await open(control, { do: 'guest', domain })
    const answer = (await reader.line()) as { error?: string }
    if (answer.error !== undefined) throw new Error(answer.error)
    return new SocketGuest(socket, reader)
  }

  /** A call with `page`, which has the guest's page afterwards; `undefined`: the host has ended the connection. */
  async call(command: number, pool: number, object: number, index: number, flags = 0): Promise<number | undefined> {
    const asked = Buffer.alloc(56 + pageBytes)
    asked.writeUInt32LE(command)
    asked.writeInt32LE(pool, 4)
    asked.writeUInt32LE(object, 8)
    asked.writeUInt32LE(flags, 24)
    asked.writeUInt32LE(index, 32)
    asked.set(this.page, 56)
    try {
      await write(this.#socket, asked)
    } catch {
      return undefined
    }
    const answer = await this.#reader.take(4 + pageBytes).catch(() => undefined)
    if (answer === undefined) return undefined
    this.page.set(answer.subarray(4))
    return answer.readInt32LE()
  }

  newPool(flags: number): Promise<number | undefined> {
    return this.call(1, 0, 0, 0, flags)
  }

  close(): void {
    this.#socket.destroy()
  }
}
