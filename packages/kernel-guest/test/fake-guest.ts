/** A guest without a kernel: its memory in a file, its doorbell, and the ring of tmem_guest.c, played by the test. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { onTestFinished } from 'vitest'
import { mapGuestMemory } from '../src/mapping.ts'

export const frames = { head: 2, entries: 3, bounce: 4, page: 8 } as const
const entries = 64

/** What is asked: fields of `tmem_op` that are not zero. */
export interface Asked {
  readonly cmd: number
  readonly pool?: number
  readonly flags?: number
  readonly object?: number
  readonly index?: number
  readonly frame?: number
}

export class FakeGuest {
  readonly folder: string = mkdtempSync(join(tmpdir(), 'tmem-test-'))
  readonly memory: string = join(this.folder, 'memory')
  readonly doorbell: string = join(this.folder, 'doorbell')
  readonly bytes: Uint8Array
  readonly view: DataView
  readonly #words: Int32Array
  #socket: Socket | undefined
  #head = 0

  constructor() {
    writeFileSync(this.memory, Buffer.alloc(16 * 4096))
    this.bytes = mapGuestMemory(this.memory)
    this.view = new DataView(this.bytes.buffer)
    this.#words = new Int32Array(this.bytes.buffer)
    this.bytes.set(Buffer.from('tmemring'), frames.head * 4096)
    this.view.setUint32(frames.head * 4096 + 8, 1, true)
    this.view.setUint32(frames.head * 4096 + 12, entries, true)
  }

  /** Listens at its doorbell until the test ends. */
  async start(): Promise<this> {
    const server = createServer((socket) => {
      this.#socket = socket
      socket.on('error', () => socket.destroy())
      socket.on('close', () => {
        if (this.#socket === socket) this.#socket = undefined
      })
    })
    await new Promise<void>((resolve) => server.listen(this.doorbell, resolve))
    onTestFinished(() => {
      this.#socket?.destroy()
      server.close()
      rmSync(this.folder, { recursive: true })
    })
    return this
  }

  /** Waits until somebody is at its doorbell. */
  async connected(): Promise<void> {
    while (this.#socket === undefined) await new Promise((resolve) => setTimeout(resolve, 5))
  }

  /** Its machine is switched off. */
  stop(): void {
    this.#socket?.destroy()
  }

  /** What it sends to whoever is connected. */
  ring(text: string = `T${frames.head.toString(16).padStart(8, '0')}\n`): void {
    this.#socket?.write(text)
  }

  page(frame: number): Uint8Array {
    return this.bytes.subarray(frame * 4096, (frame + 1) * 4096)
  }

  set head(value: number) {
    this.#head = value
    Atomics.store(this.#words, frames.head * 1024 + 4, value)
  }

  get tail(): number {
    return Atomics.load(this.#words, frames.head * 1024 + 16)
  }

  /** Leaves a call in the ring; its number. */
  post({ cmd, pool = 0, flags = 0, object = 0, index = 0, frame = 0 }: Asked): number {
    const at = frames.entries * 4096 + (this.#head & (entries - 1)) * 64
    this.bytes.fill(0, at, at + 64)
    this.view.setUint32(at, cmd, true)
    this.view.setInt32(at + 4, pool, true)
    if (cmd === 1) this.view.setUint32(at + 24, flags, true)
    else {
      this.view.setBigUint64(at + 8, BigInt(object), true)
      this.view.setUint32(at + 32, index, true)
      this.view.setBigUint64(at + 48, BigInt(frame), true)
    }
    this.head = this.#head + 1
    return this.#head - 1
  }

  /** Waits for the answer of a call. The line that says where the ring is comes over and over, as from the module. */
  async answer(call: number): Promise<number> {
    while (this.tail <= call) {
      this.ring()
      await new Promise((resolve) => setTimeout(resolve, 5))
    }
    return this.view.getInt32(frames.entries * 4096 + (call & (entries - 1)) * 64 + 56, true)
  }

  ask(asked: Asked): Promise<number> {
    return this.answer(this.post(asked))
  }
}
