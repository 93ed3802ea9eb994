/**
 * `tmem xen host`: a process in the role of the hypervisor. It has the domains of guests that connect to its socket,
 * over one stack, and answers the requests of toolstacks.
 *
 * A guest is a connection: its domain begins and ends with the connection, unless the domain was restored before (the
 * guest that connects then gets it) or has moved away. Calls of a guest are done one after the other. A guest stands
 * still while its domain is saved. During a move it goes on, and stands still only while the names of pages that it
 * flushed meanwhile are sent. To a virtual machine, whose kernel has the module of @tmem/kernel-guest, the host
 * connects itself (`attach`); the machine's connection moves with its domain.
 *
 * Invariants: a domain that could not be restored completely is removed; one that could not be moved goes on where it
 * is.
 */
import { createServer, type Server, type Socket } from 'node:net'
import { compose, createAccounts, parseStack } from '@tmem/core'
import { type AttachedGuest, attachGuest } from '@tmem/kernel-guest'
import { listenAtPath } from '@tmem/nbd'
import {
  controlBuffer,
  endSave,
  GuestMemory,
  poolInfoLayout,
  restoreDomain,
  SubOperation,
  saveDomain,
  saveFlushed,
  writeField,
  writeUuid,
  XenHost,
} from '@tmem/xen-hypercall'
import { Failed } from '../ending.ts'
import { layersWith } from '../layers.ts'
import { socketPath } from '../serve/endpoints.ts'
import { Ticking } from '../serve/ticking.ts'
import type { Terminal } from '../terminal.ts'
import { releaseOf } from './release.ts'
import {
  answerOf,
  ask,
  brokenPiece,
  lastPiece,
  open,
  SocketReader,
  streamPatienceMs,
  write,
  writeLine,
  writePieces,
} from './socket.ts'

/** Options of the command. */
export interface HostOptions {
  readonly stack: string
  readonly modules?: readonly string[]
  readonly control: string
  /** Name of the release; `undefined` for the default. */
  readonly release?: string
  readonly defects: 'mended' | 'original'
  /** Bytes of persistent pages that each domain may have. */
  readonly max?: number
  readonly json?: true
}

const pageBytes = 4096
const operationBytes = 56
/** Largest buffer of a control request: the text of a list. */
const maxBuffer = 2 ** 20

/** Runs a host until it is interrupted. */
export async function host(options: HostOptions, terminal: Terminal): Promise<void> {
  const release = releaseOf(options.release)
  const layers = parseStack(options.stack, await layersWith(options.modules))
  const control = socketPath(options.control)
  const accounts = createAccounts(options.max === undefined ? {} : { maximumBytes: options.max })
  let ticking: Ticking | undefined
  const store = compose(layers, { accounts, wake: () => ticking?.wake() })
  let broken: Error | undefined
  const host = new XenHost({ store, accounts, release, defects: options.defects })
  const machine = new Machine(host, (line) => terminal.note(`tmem xen host: ${line}`))
  let server: Server | undefined
  try {
    await store.ready?.()
    const stopped = new Promise<void>((resolve) => {
      terminal.takeSignals(resolve)
      ticking = new Ticking(
        () => store.tick({ pages: 4096 }),
        (error) => {
          broken = error
          resolve()
        },
      )
    })
    server = createServer({ allowHalfOpen: true }, (socket) => machine.serve(socket))
    await listenAtPath(server, control).catch((error: Error) => {
      throw new Failed(`the socket ${control} cannot be created: ${error.message}`)
    })
    const facts = { pid: process.pid, control: options.control, release }
    terminal.print(options.json === true ? JSON.stringify(facts) : `Xen ${release} at ${options.control}`)
    await stopped
    if (broken !== undefined) throw new Failed(`the stack has failed: ${broken.message}`)
  } finally {
    ticking?.stop()
    server?.close()
    await machine.close()
    await store.close()
  }
}

/** A guest: a connection to us, or one of ours to its doorbell. */
interface Guest {
  /** Stops the guest between two calls; resolves to the function that lets it go on. */
  stop(): Promise<() => void>
  /** Ends the connection: its domain is gone from here. */
  end(): Promise<void> | void
  /** The paths of a virtual machine's memory and doorbell, which the next host of its domain needs. */
  readonly place?: Place
}

interface Place {
  readonly memory: string
  readonly doorbell: string
}

/** How long a virtual machine may take to make its doorbell. */
const doorbellMs = 20_000

/** A domain and its guest. */
interface Running {
  guest: Guest | undefined
  /** Calls of the guest wait for this. */
  gate: Promise<void>
  /** The call that is being done. */
  call: Promise<unknown>
  /** It is being saved or moved; and its guest has gone meanwhile. */
  isBusy: boolean
  isLeft: boolean
}

type Asked = Readonly<Record<string, unknown>>

class Machine {
  readonly #host: XenHost
  readonly #running = new Map<number, Running>()
  readonly #sockets = new Set<Socket>()
  readonly #serving = new Set<Promise<void>>()
  readonly #links = new Set<AttachedGuest>()
  readonly #note: (line: string) => void

  /** `note` is called with the reason when a guest cannot be served any more. */
  constructor(host: XenHost, note: (line: string) => void) {
    this.#host = host
    this.#note = note
  }

  async close(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy()
    await Promise.all(this.#serving)
    await Promise.all([...this.#links].map((link) => link.detach()))
    this.#host.close()
  }

  serve(socket: Socket): void {
    this.#sockets.add(socket)
    // What comes of it is seen by whoever reads or writes.
    socket.on('error', () => socket.destroy())
    const serving = this.#serve(socket).finally(() => {
      this.#sockets.delete(socket)
      this.#serving.delete(serving)
      socket.end()
    })
    this.#serving.add(serving)
  }

  async #serve(socket: Socket): Promise<void> {
    const reader = new SocketReader(socket)
    try {
      const asked = await reader.line()
      if (typeof asked !== 'object' || asked === null) throw new Error('bad request: expected a JSON object')
      await this.#answer(asked as Asked, socket, reader)
    } catch (error) {
      if (!socket.destroyed) socket.write(`${JSON.stringify({ error: (error as Error).message })}\n`)
    }
  }

  async #answer(asked: Asked, socket: Socket, reader: SocketReader): Promise<void> {
    switch (asked['do']) {
      case 'info':
        return writeLine(socket, { pid: process.pid, release: this.#host.release, domains: [...this.#running.keys()] })
      case 'control':
        return writeLine(socket, await this.#control(asked))
      case 'authorize':
        return writeLine(socket, { result: await this.#authorize(asked) })
      case 'guest':
        return this.#guest(domainOf(asked), socket, reader)
      case 'attach':
        return this.#attach(domainOf(asked), placeOf(asked), socket)
      case 'save':
        return this.#save(domainOf(asked), socket)
      case 'restore':
        return this.#restore(domainOf(asked), asked['live'] === true, socket, reader)
      case 'migrate':
        return this.#migrate(domainOf(asked), String(asked['to']), socket)
      default:
        throw new Error(`unknown request ${String(asked['do'])}`)
    }
  }

  // ---- Toolstacks ---------------------------------------------------------------------------------------------------

  async #control(asked: Asked): Promise<object> {
    const data = typeof asked['data'] === 'string' ? Buffer.from(asked['data'], 'base64') : undefined
    const length = data?.length ?? numberOf(asked, 'length')
    if (length > maxBuffer) throw new Error(`bad buffer of ${length} bytes: expected at most ${maxBuffer}`)
    const bytes = new Uint8Array(length)
    if (data !== undefined) bytes.set(data)
    const result = await this.#host.control({
      subOperation: numberOf(asked, 'subOperation'),
      client: numberOf(asked, 'client'),
      poolId: numberOf(asked, 'poolId'),
      arg1: numberOf(asked, 'arg1'),
      arg2: numberOf(asked, 'arg2'),
      buffer: controlBuffer(bytes),
    })
    // Most of the buffer of a list is empty.
    const used = bytes.findLastIndex((byte) => byte !== 0) + 1
    return length === 0 ? { result } : { result, data: Buffer.from(bytes.subarray(0, used)).toString('base64') }
  }

  #authorize(asked: Asked): number | Promise<number> {
    const client = numberOf(asked, 'client')
    const uuid = BigInt(String(asked['uuid']))
    const isPermitted = asked['permit'] === true
    if (!this.#host.isSince('4.9')) return this.#host.authorize(client, uuid, isPermitted)
    const { bytes, fields } = poolInfoLayout
    const view = new DataView(new ArrayBuffer(bytes))
    writeField(view, fields.flags, isPermitted ? 4 : 0)
    writeUuid(view, fields.uuid, uuid)
    const buffer = controlBuffer(new Uint8Array(view.buffer))
    return this.#host.control({ subOperation: SubOperation.SetAuth, client, arg1: bytes, buffer })
  }

  // ---- Guests -------------------------------------------------------------------------------------------------------

  #begin(id: number): Running {
    const running: Running = {
      guest: undefined,
      gate: Promise.resolve(),
      call: Promise.resolve(),
      isBusy: false,
      isLeft: false,
    }
    this.#host.addDomain({ id, memory: new GuestMemory(new Uint8Array(2 * pageBytes)) })
    this.#running.set(id, running)
    return running
  }

  #end(id: number): void {
    if (this.#host.hasDomain(id)) this.#host.killDomain(id)
    this.#running.delete(id)
  }

  async #guest(id: number, socket: Socket, reader: SocketReader): Promise<void> {
    const running = this.#running.get(id) ?? this.#begin(id)
    if (running.guest !== undefined) throw new Error(`domain ${id} has a guest already`)
    running.guest = { stop: () => stopBetweenCalls(running), end: () => void socket.end() }
    const { memory } = this.#host.domain(id)
    try {
      await writeLine(socket, { domain: id, release: this.#host.release })
      for (;;) {
        const asked = await reader.take(operationBytes + pageBytes)
        if (asked === undefined) return
        // Another request may close the guest before this one is done.
        for (let gate: Promise<void> | undefined; gate !== running.gate; ) {
          gate = running.gate
          await gate
        }
        if (this.#running.get(id) !== running) return
        memory.bytes.set(asked.subarray(0, operationBytes))
        memory.bytes.set(asked.subarray(operationBytes), pageBytes)
        // Its page is frame 1, unless it uses another arm of the structure.
        if (asked.readUInt32LE() >= 4 && asked.readUInt32LE() <= 5)
          new DataView(memory.bytes.buffer).setUint32(48, 1, true)
        const call = Promise.resolve(this.#host.call(id, 0))
        running.call = call
        const result = await call
        const answer = Buffer.alloc(4 + pageBytes)
        answer.writeInt32LE(result)
        answer.set(memory.bytes.subarray(pageBytes), 4)
        await write(socket, answer)
      }
    } finally {
      this.#left(id, running)
    }
  }

  /** Connects to a guest by its doorbell, answers once it is connected, and serves it until it ends. */
  async #attach(id: number, place: Place, socket: Socket): Promise<void> {
    const isRestored = this.#running.has(id)
    const running = this.#running.get(id) ?? this.#begin(id)
    if (running.guest !== undefined) throw new Error(`domain ${id} has a guest already`)
    // Nobody else takes it meanwhile.
    running.guest = { stop: () => stopBetweenCalls(running), end: () => undefined, place }
    try {
      const signal = AbortSignal.timeout(doorbellMs)
      const link = await attachGuest({ host: this.#host, domain: id, ...place, signal })
      running.guest = { stop: () => link.pause(), end: () => link.detach(), place }
      this.#links.add(link)
      const serving = link.ended.finally(() => {
        this.#links.delete(link)
        this.#left(id, running)
      })
      serving.catch((error: Error) => this.#note(`domain ${id} has ended: ${error.message}`))
    } catch (error) {
      running.guest = undefined
      if (!isRestored) this.#end(id)
      throw error
    }
    await writeLine(socket, { domain: id, release: this.#host.release })
  }

  /** Called when the guest of a domain has gone. A domain that has moved now belongs to another host. */
  #left(id: number, running: Running): void {
    if (this.#running.get(id) !== running) return
    running.guest = undefined
    if (running.isBusy) running.isLeft = true
    else this.#end(id)
  }

  /** Stops a guest between two calls; resolves to the function that lets it go on. */
  async #stop(running: Running): Promise<() => void> {
    return (running.guest ?? { stop: () => stopBetweenCalls(running) }).stop()
  }

  #claim(id: number): Running {
    const running = this.#running.get(id)
    if (running === undefined) throw new Error(`there is no domain ${id}`)
    if (running.isBusy) throw new Error(`domain ${id} is being saved or moved already`)
    running.isBusy = true
    return running
  }

  #free(id: number, running: Running): void {
    running.isBusy = false
    if (running.isLeft && this.#running.get(id) === running) this.#end(id)
  }

  async #save(id: number, socket: Socket): Promise<void> {
    let running: Running
    try {
      running = this.#claim(id)
    } catch (error) {
      socket.write(brokenPiece)
      throw error
    }
    const goOn = await this.#stop(running)
    try {
      const bytes = await writePieces(socket, saveDomain(this.#host, id))
      if (bytes === 0) throw new Error(`domain ${id} has no pools: there is nothing to save`)
      await write(socket, lastPiece)
      await writeLine(socket, { bytes })
    } catch (error) {
      if (!socket.destroyed) socket.write(brokenPiece)
      throw error
    } finally {
      endSave(this.#host, id)
      goOn()
      this.#free(id, running)
    }
  }

  async #restore(id: number, isLive: boolean, socket: Socket, reader: SocketReader): Promise<void> {
    if (this.#host.hasDomain(id)) throw new Error(`there is a domain ${id} already`)
    const running = this.#begin(id)
    // No guest takes it before it is whole.
    running.guest = { stop: () => stopBetweenCalls(running), end: () => undefined }
    try {
      const restored = await restoreDomain(this.#host, id, reader.pieces(), isLive)
      if (restored.pools === 0) throw new Error('the stream is empty: nothing was saved')
      await writeLine(socket, { restored })
      running.guest = undefined
    } catch (error) {
      this.#end(id)
      throw error
    }
  }

  async #migrate(id: number, to: string, socket: Socket): Promise<void> {
    const running = this.#claim(id)
    let goOn: () => void = () => undefined
    try {
      const { socket: there, reader } = await open(to, { do: 'restore', domain: id, live: true })
      try {
        const live = await writePieces(there, saveDomain(this.#host, id, true))
        if (live === 0) throw new Error(`domain ${id} has no pools: there is nothing to move`)
        goOn = await this.#stop(running)
        const begun = performance.now()
        const rest = await writePieces(there, saveFlushed(this.#host, id))
        await write(there, lastPiece)
        // The target drops a domain that is not completed, so that a late answer does not matter.
        const patience = setTimeout(() => there.destroy(), streamPatienceMs)
        const { restored } = await answerOf(to, reader).finally(() => clearTimeout(patience))
        // From here on it is there. Its guest learns by the end of its connection.
        this.#running.delete(id)
        this.#host.killDomain(id)
        const { guest } = running
        await guest?.end()
        if (guest?.place !== undefined) await ask(to, { do: 'attach', domain: id, ...guest.place })
        await writeLine(socket, { restored, bytes: live + rest, stoppedMs: performance.now() - begun })
      } finally {
        there.destroy()
      }
    } finally {
      if (this.#host.hasDomain(id) && this.#running.get(id) === running) endSave(this.#host, id)
      goOn()
      this.#free(id, running)
    }
  }
}

/** Stops a guest that has connected to us. */
async function stopBetweenCalls(running: Running): Promise<() => void> {
  let open: () => void = () => undefined
  running.gate = new Promise((resolve) => {
    open = resolve
  })
  await running.call
  return open
}

function placeOf({ memory, doorbell }: Asked): Place {
  if (typeof memory !== 'string' || typeof doorbell !== 'string')
    throw new Error('bad request: expected memory and doorbell as paths')
  return { memory, doorbell }
}

function domainOf(asked: Asked): number {
  const { domain } = asked
  if (typeof domain !== 'number') throw new Error('bad request: expected domain as a number')
  return domain
}

function numberOf(asked: Asked, name: string): number {
  const value = asked[name] ?? 0
  if (typeof value !== 'number' || !Number.isInteger(value))
    throw new Error(`bad request: expected ${name} as an integer`)
  return value
}
