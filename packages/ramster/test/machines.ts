/** A machine whose network and memory do what a test says. */
import { type Borrower, processMemory, type RemoteMemory, type RemotePlan } from '../src/index.ts'

export class Machine implements RemotePlan {
  readonly name: string
  readonly #plan: RemotePlan
  /** Who borrows now: each message reaches the newest. */
  memory: SwitchedMemory | undefined
  /** What fails: nothing, what goes there, or what comes back. */
  fails: 'nothing' | 'writes' | 'reads' | 'all' = 'nothing'

  constructor(name: string, limitBytes: number) {
    this.name = name
    this.#plan = processMemory({ name, limitBytes })
  }

  borrow(borrower: Borrower): RemoteMemory {
    this.memory = new SwitchedMemory(this, this.#plan.borrow(borrower), borrower)
    return this.memory
  }
}

export class SwitchedMemory implements RemoteMemory {
  readonly name: string
  readonly leaseMs: number | undefined = undefined
  identity: string | undefined
  isOpen = true
  failure: Error | undefined
  /** Keys that were put, given up and asked for, in this order. */
  readonly put_: number[][] = []
  readonly removed: number[][] = []
  readonly asked: number[] = []
  /** What is put waits for this, before and after it is there. */
  before: Promise<void> | undefined
  after: Promise<void> | undefined
  /** Changes what comes back. */
  alter: ((bytes: Uint8Array) => Uint8Array | undefined) | undefined
  /** Reads wait for this. */
  held: Promise<void> | undefined
  inner: RemoteMemory
  readonly #machine: Machine
  readonly #borrower: Borrower
  /** Blocks by key, to know what is left. */
  readonly keys: Set<number> = new Set()

  constructor(machine: Machine, inner: RemoteMemory, borrower: Borrower) {
    this.#machine = machine
    this.name = machine.name
    this.inner = inner
    this.identity = inner.identity
    this.#borrower = borrower
  }

  get freeBytes(): number {
    return this.inner.freeBytes
  }

  /** It wants so many bytes back. */
  excessBytes = 0

  press(bytes: number): void {
    this.excessBytes = bytes
    this.#borrower.pressed()
  }

  /** It has lost these keys, and knows that it may have lost some. */
  async lose(keys: readonly number[]): Promise<void> {
    await this.inner.remove(keys)
    for (const key of keys) this.keys.delete(key)
    this.#borrower.opened('some')
  }

  /** The machine is gone; `comeBack` says in what state it returns. */
  die(): void {
    this.isOpen = false
    this.failure = new Error('no route to host')
  }

  async comeBack(kept: boolean): Promise<void> {
    if (!kept) {
      await this.inner.remove([...this.keys])
      this.keys.clear()
    }
    this.isOpen = true
    this.failure = undefined
    this.#borrower.opened(kept ? 'all' : 'nothing')
  }

  ready(): Promise<void> {
    return this.isOpen ? Promise.resolve() : Promise.reject(this.failure!)
  }

  async put(keys: readonly number[], blocks: readonly Uint8Array[]): Promise<readonly boolean[]> {
    this.#reach('writes')
    this.put_.push([...keys])
    await this.before
    this.#reach('writes')
    const taken = await this.inner.put(keys, blocks)
    for (const [n, key] of keys.entries()) if (taken[n] === true) this.keys.add(key)
    await this.after
    this.#reach('writes')
    return taken
  }

  async get(key: number): Promise<Uint8Array | undefined> {
    this.#reach('reads')
    this.asked.push(key)
    await this.held
    this.#reach('reads')
    const bytes = await this.inner.get(key)
    return bytes === undefined || this.alter === undefined ? bytes : this.alter(bytes.slice())
  }

  async remove(keys: readonly number[]): Promise<void> {
    this.#reach('all')
    this.removed.push([...keys])
    for (const key of keys) this.keys.delete(key)
    await this.inner.remove(keys)
  }

  renew(keys: readonly number[]): Promise<readonly boolean[]> {
    return this.inner.renew(keys)
  }

  close(): Promise<void> {
    return this.inner.close()
  }

  #reach(what: 'writes' | 'reads' | 'all'): void {
    const { fails } = this.#machine
    if (!this.isOpen || fails === 'all' || fails === what) throw this.failure ?? new Error('the network failed')
  }
}
