/**
 * `SwappableBuffer`: an ArrayBuffer with less memory behind it than it has bytes.
 *
 * It is real anonymous memory of this process, watched by a userfaultfd. Touching a page that is not there stops the
 * thread that touched it, wherever it is: in JavaScript, in a system call, in a thread of the runtime's pool. A thread
 * of its own, the pager (`pager.ts`), fetches the page from a page store and lets it go on; what was not used for long
 * goes to the store.
 *
 * Invariants:
 *  - the memory stays mapped for as long as the ArrayBuffer can be reached, also after `close` (it then reads as
 *    zeros);
 *  - the process does not outlive its pager: a thread that waits for a page would wait for ever, or find zeros;
 *  - at most one command is under way, and the pager answers it without the owner.
 *
 * Source: userfaultfd(2); the rules for the pager are in `pager.ts`.
 */
import { constants } from 'node:buffer'
import { MessageChannel, type MessagePort, receiveMessageOnPort, Worker } from 'node:worker_threads'
import { type ByteAmount, bytesOf, checkOptions, type StatsNode, TmemError } from '@tmem/core'
import {
  argumentAt,
  COMMAND,
  Command,
  DONE,
  type PagerMessage,
  type PagerTask,
  sharedBytes,
  sharedWords,
} from './protocol.ts'
import { System } from './system.ts'

/** What a `SwappableBuffer` is made of. */
export interface SwappableBufferOptions {
  /** Bytes of the buffer: a positive multiple of the system's page size, at most `buffer.constants.MAX_LENGTH`. */
  readonly bytes: ByteAmount
  /** Bytes of it that may be in memory at once: a multiple of the page size, at least 64 pages. */
  readonly residentBytes: ByteAmount
  /**
   * The stack that the other pages rest in: its text, e.g. `zcache(limit=64MiB)`, or the same as plain data (see
   * `stackFromData` of @tmem/core). It must keep persistent pages. It is opened in the pager's thread.
   */
  readonly stack: unknown
  /**
   * Modules whose exports are the layers that `stack` names, as URLs: `[import.meta.resolve('@tmem/zcache')]`. They are
   * imported in the pager's thread; every export that is a `LayerFactory` counts. `memory` is always there.
   */
  readonly modules?: readonly string[]
  /**
   * Keeps the calling thread and the pager on this processor, until `close`. A fault is answered sooner when no other
   * processor has to be woken up for it; but the two never run at the same time, and threads and processes that this
   * thread starts meanwhile are kept there, too. Default: both run wherever the system likes.
   */
  readonly cpu?: number
}

/** Least pages in memory: what one system call touches at once, and room for the faults of other threads. */
const minResidentPages = 64

/** Buffers that can be reached no more are unmapped. Holds no buffer. */
const unreachable = new FinalizationRegistry<{ system: System; address: number; length: number }>(
  ({ system, address, length }) => system.unmap(address, length),
)

/** Whether page faults can be handled here: `undefined`, or why not and how to get it. */
export async function userfaultUnsupported(): Promise<string | undefined> {
  try {
    const system = await System.load()
    system.close(system.openUserfaultfd())
    return undefined
  } catch (error) {
    if (error instanceof TmemError && error.code === 'TMEM_UNSUPPORTED') return error.message
    throw error
  }
}

/** An ArrayBuffer whose cold pages rest in a page store. Linux only. */
export class SwappableBuffer {
  /**
   * The memory, made outside of V8, which Node marks as not to be transferred. After `close` it reads as zeros (Node 20
   * offers no way to detach it). It cannot be transferred, to a worker or by `structuredClone`: from Node 21 on that
   * throws `DataCloneError`; Node 20 makes a copy of ordinary memory instead, and nothing can make it refuse.
   */
  readonly buffer: ArrayBuffer
  readonly #system: System
  readonly #worker: Worker
  readonly #address: number
  readonly #bell: number
  readonly #port: MessagePort
  readonly #words: Int32Array
  readonly #argument: Float64Array
  /** Where the owner could run before it was pinned. */
  readonly #affinity: Uint8Array | undefined
  readonly #atExit: () => void
  #closing: Promise<void> | undefined

  private constructor(
    system: System,
    worker: Worker,
    task: PagerTask,
    port: MessagePort,
    buffer: ArrayBuffer,
    affinity: Uint8Array | undefined,
  ) {
    this.buffer = buffer
    this.#system = system
    this.#worker = worker
    this.#address = task.address
    this.#bell = task.bell
    this.#port = port
    this.#words = new Int32Array(task.shared, 0, sharedWords)
    this.#argument = new Float64Array(task.shared, argumentAt, 1)
    this.#affinity = affinity
    // The runtime ends its threads when it exits; this one would take the process down with the wrong exit code.
    this.#atExit = () => this.#command(Command.disarm, 0)
    process.on('exit', this.#atExit)
  }

  /**
   * Makes a buffer. Throws `RangeError` for sizes that make no sense; rejects with `TmemError`: `TMEM_UNSUPPORTED` says
   * what this machine lacks and how to get it, `TMEM_BAD_STACK_TEXT` and `TMEM_BAD_STACK` what is wrong with the stack,
   * `TMEM_NO_MEMORY` that it cannot have its memory; and with whatever a module or a layer throws when it is opened.
   */
  static async open(options: SwappableBufferOptions): Promise<SwappableBuffer> {
    checkOptions('SwappableBuffer.open', options, {
      bytes: 'bytes',
      residentBytes: 'bytes',
      stack: 'any',
      modules: 'list?',
      cpu: 'number?',
    })
    const { stack, modules = [], cpu } = options
    const bytes = bytesOf('SwappableBuffer.open', 'bytes', options.bytes)
    const residentBytes = bytesOf('SwappableBuffer.open', 'residentBytes', options.residentBytes)
    const system = await System.load()
    const { pageSize } = system
    checkSize('bytes', bytes, 1, pageSize, constants.MAX_LENGTH)
    checkSize('residentBytes', residentBytes, minResidentPages, pageSize, Number.MAX_SAFE_INTEGER)
    if (cpu !== undefined && (!Number.isInteger(cpu) || cpu < 0 || cpu > 8191))
      throw new RangeError(`cpu must be the number of a processor, got ${cpu}`)
    const fd = system.openUserfaultfd()
    const undo: (() => void)[] = [() => system.close(fd)]
    try {
      const { address, buffer } = system.map(bytes)
      unreachable.register(buffer, { system, address, length: bytes })
      system.keepPlain(address, bytes)
      system.register(fd, address, bytes)
      const bell = system.openBell()
      undo.push(() => system.close(bell))
      let affinity: Uint8Array | undefined
      if (cpu !== undefined) {
        const before = system.affinity()
        undo.push(() => system.setAffinity(before))
        system.pin(cpu)
        affinity = before
      }
      const { port1: port, port2 } = new MessageChannel()
      undo.push(() => port.close())
      const task: PagerTask = {
        fd,
        bell,
        address,
        pages: bytes / pageSize,
        limit: Math.min(bytes, residentBytes) / pageSize,
        shared: new SharedArrayBuffer(sharedBytes),
        port: port2,
        stack,
        modules,
        cpu,
      }
      const worker = await startPager(task)
      return new SwappableBuffer(system, worker, task, port, buffer, affinity)
    } catch (error) {
      for (const step of undo.reverse()) step()
      throw error
    }
  }

  /**
   * Moves cold pages to the store until that many bytes of memory were given back, or the store refuses. Returns how
   * many it were. They come back when they are touched.
   */
  trim(bytes: number): number {
    if (!(bytes >= 0)) throw new RangeError(`bytes must not be negative, got ${bytes}`)
    this.#assertOpen()
    return this.#command(Command.trim, bytes)
  }

  /** Counters of the pager, and those of the stack below. */
  stats(): StatsNode {
    this.#assertOpen()
    this.#command(Command.stats, 0)
    const received = receiveMessageOnPort(this.#port) as { message: StatsNode } | undefined
    if (received === undefined) throw new TmemError('TMEM_BROKEN', 'userfault: the pager posted no statistics')
    return received.message
  }

  /**
   * Ends the paging: the content is given up, the stack is closed, the memory is given back. Whoever touches the buffer
   * at that time or later, in whatever thread, finds zeros. Idempotent. Rejects with what the stack's own close rejects
   * with.
   */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    const closed = nextMessage(this.#worker)
    this.#command(Command.close, 0)
    process.off('exit', this.#atExit)
    const message = await closed
    this.#port.close()
    this.#system.drop(this.#address, this.buffer.byteLength)
    this.#system.close(this.#bell)
    if (this.#affinity !== undefined) this.#system.setAffinity(this.#affinity)
    if (message.kind === 'closed' && message.error !== undefined)
      throw new TmemError('TMEM_IO', `userfault: the stack could not be closed: ${message.error}`, {
        layer: 'userfault',
      })
  }

  #assertOpen(): void {
    if (this.#closing !== undefined)
      throw new TmemError('TMEM_CLOSED', 'this SwappableBuffer was closed', { layer: 'userfault' })
  }

  /** Has the pager do something, and waits for it: a dead pager ends the process. */
  #command(command: Command, argument: number): number {
    this.#argument[0] = argument
    Atomics.store(this.#words, DONE, 0)
    Atomics.store(this.#words, COMMAND, command)
    this.#system.ring(this.#bell)
    while (Atomics.load(this.#words, DONE) === 0) Atomics.wait(this.#words, DONE, 0)
    return this.#argument[0]
  }
}

/** Starts the pager's thread and waits until it watches. */
async function startPager(task: PagerTask): Promise<Worker> {
  const worker = new Worker(new URL('./pager.js', import.meta.url), {
    name: 'tmem pager',
    workerData: task,
    transferList: [task.port],
    // Flags of the program (a loader, --eval, a test runner's conditions) are not the pager's.
    execArgv: [],
  })
  const message = await nextMessage(worker)
  if (message.kind === 'open') {
    // It does not keep the program running.
    worker.unref()
    return worker
  }
  await exited(worker)
  if (message.kind !== 'failed') throw new TmemError('TMEM_BROKEN', `userfault: the pager began with ${message.kind}`)
  if (message.code === undefined) throw new Error(message.message)
  throw new TmemError(message.code, message.message, { layer: 'userfault' })
}

/**
 * The next thing that the pager has to say. Rejects when its thread ends without a word: the runtime delivers what a
 * worker posted to its parent before it says that the worker has ended (which holds for no other port).
 */
function nextMessage(worker: Worker): Promise<PagerMessage> {
  worker.ref()
  return new Promise((resolve, reject) => {
    const finish = (): void => {
      worker.off('message', onMessage)
      worker.off('error', onError)
      worker.off('exit', onExit)
    }
    const onMessage = (message: PagerMessage): void => {
      finish()
      resolve(message)
    }
    const onError = (error: unknown): void => {
      finish()
      reject(error instanceof Error ? error : new Error(String(error)))
    }
    const onExit = (code: number): void => onError(new Error(`the pager's thread ended with code ${code}`))
    worker.on('message', onMessage)
    worker.on('error', onError)
    worker.on('exit', onExit)
  })
}

function exited(worker: Worker): Promise<void> {
  return worker.threadId === -1 ? Promise.resolve() : new Promise((resolve) => worker.once('exit', () => resolve()))
}

function checkSize(name: string, bytes: number, minPages: number, pageSize: number, maximum: number): void {
  if (Number.isSafeInteger(bytes) && bytes % pageSize === 0 && bytes >= minPages * pageSize && bytes <= maximum) return
  throw new RangeError(
    `${name} must be a multiple of ${pageSize} from ${minPages * pageSize} to ${maximum}, got ${bytes}`,
  )
}
