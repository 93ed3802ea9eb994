/** A guest as a test sees it: writes raw structures into its memory, and makes calls. */
import { compose, type Layer, type PageStore } from '@tmem/core'
import { zcache } from '@tmem/zcache'
import {
  type Answer,
  type Bits,
  Command,
  type Domain,
  GuestMemory,
  interfaceVersion,
  type Layout,
  operationLayouts,
  sysctlHead,
  sysctlLayout,
  writeField,
  XenHost,
  type XenHostOptions,
} from '../src/index.ts'

export const flags = { ephemeral: 0x01000000, persistent: 0x01000001, shared: 0x01000002 } as const

/** Frames 0 and 1 are for structures, the others for pages. */
export const firstFrame = 2

export interface Fields {
  readonly [name: string]: number | bigint | readonly bigint[]
}

/** An answer that is there. */
export function now(answer: Answer): number {
  if (typeof answer !== 'number') throw new TypeError('the answer has to be waited for')
  return answer
}

export class Guest {
  readonly host: XenHost
  readonly domain: Domain
  readonly memory: GuestMemory
  readonly bytes: Uint8Array
  readonly bits: Bits

  constructor(host: XenHost, id: number, bits: Bits = 64, frames = 16, privileged = id === 0) {
    this.host = host
    this.bits = bits
    this.bytes = new Uint8Array(frames * 4096)
    this.memory = new GuestMemory(this.bytes)
    this.domain = host.addDomain({ id, memory: this.memory, bits, privileged })
  }

  get id(): number {
    return this.domain.id
  }

  /** Writes a structure to an address. */
  write(layout: Layout, fields: Fields, address: number): void {
    this.bytes.fill(0, address, address + layout.bytes)
    const view = new DataView(this.bytes.buffer)
    for (const [name, value] of Object.entries(fields)) {
      const field = layout.fields[name]
      if (field === undefined) throw new Error(`there is no field ${name}`)
      const words = Array.isArray(value) ? (value as readonly bigint[]) : [value as number | bigint]
      for (const [n, word] of words.entries()) {
        const at = address + field.at + n * field.bytes
        if (typeof word === 'bigint' && field.bytes === 8) view.setBigUint64(at, word, true)
        else writeField(view, { ...field, at }, Number(word))
      }
    }
  }

  call(arm: 'creat' | 'gen' | 'ctrl', fields: Fields, address = 0): Answer {
    this.write(operationLayouts(this.host.release, this.bits)[arm]!, fields, address)
    return this.host.call(this.id, address)
  }

  newPool(flags: number, uuid: bigint = 0n): number {
    const words = [BigInt.asUintN(64, uuid), uuid >> 64n]
    return this.call('creat', { cmd: Command.NewPool, flags, uuid: words }) as number
  }

  destroyPool(pool: number): number {
    return this.call('gen', { cmd: Command.DestroyPool, pool_id: pool }) as number
  }

  /** A command on a page that the store answers at once. */
  page(...words: Parameters<Guest['ask']>): number {
    return now(this.ask(...words))
  }

  ask(command: number, pool: number, object: bigint, index: number, frame = firstFrame, more: Fields = {}): Answer {
    const one = this.host.release === '4.0.0'
    const oid = one ? [object] : [0n, 64n, 128n].map((shift) => BigInt.asUintN(64, object >> shift))
    return this.call('gen', { cmd: command, pool_id: pool, oid, index, cmfn: frame, ...more })
  }

  /** Puts a page that is filled with a number. */
  put(pool: number, object: bigint, index: number, fill: number): number {
    this.fill(firstFrame, fill)
    return this.page(Command.PutPage, pool, object, index)
  }

  /** Gets a page into frame 3, and answers its first byte, or the error. */
  get(pool: number, object: bigint, index: number): number {
    const answer = this.page(Command.GetPage, pool, object, index, firstFrame + 1)
    return answer === 1 ? this.bytes[(firstFrame + 1) * 4096]! : answer
  }

  /** Pages that do not repeat one word, so that they take room. */
  fill(frame: number, fill: number): void {
    this.bytes.fill(fill, frame * 4096, frame * 4096 + 4096)
    this.bytes[frame * 4096 + 4095] = fill ^ 0xff
  }

  control(subop: number, fields: Fields = {}): number {
    return now(this.#control(subop, fields))
  }

  #control(subop: number, fields: Fields): Answer {
    if (interfaceVersion(this.host.release) === undefined)
      return this.call('ctrl', { cmd: Command.Control, subop, ...fields })
    const { buf, ...rest } = fields
    return this.sysctl({ cmd: subop, ...rest, ...(buf === undefined ? {} : { buffer: buf }) })
  }

  sysctl(fields: Fields, head: Fields = {}): Answer {
    this.write(sysctlLayout, fields, sysctlHead.fields.body.at)
    const view = new DataView(this.bytes.buffer)
    const { cmd, interface_version } = { cmd: 24, interface_version: interfaceVersion(this.host.release), ...head }
    view.setUint32(0, Number(cmd), true)
    view.setUint32(4, Number(interface_version), true)
    return this.host.sysctl(this.id, 0)
  }

  /** The text at an address, up to the zero. */
  text(address: number): string {
    const end = this.bytes.indexOf(0, address)
    return Buffer.from(this.bytes.subarray(address, end)).toString()
  }
}

export interface World {
  readonly host: XenHost
  readonly store: PageStore
}

/** A host over a stack. */
export function world(
  options: Partial<XenHostOptions> = {},
  layers: readonly Layer[] = [zcache({ limitBytes: '4MiB' })],
): World {
  const store = options.store ?? compose(layers, options.accounts === undefined ? {} : { accounts: options.accounts })
  return { host: new XenHost({ ...options, store }), store }
}
