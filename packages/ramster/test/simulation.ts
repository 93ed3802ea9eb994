/**
 * Five nodes that lend memory, two of which borrow from the others, over a network that a seed decides about.
 *
 * A message waits on its link until it is delivered; of one link they are delivered in order, as TCP does, of several
 * in any. A link breaks (some messages have been done by then, without an answer), is cut for a while, or does a
 * message once more, later. A node crashes: its memory is gone, and it is another life of it that comes back. Borrowers
 * take a lender out and another one in, and lenders want memory back. Nothing here waits for time to pass.
 *
 * A *careful* history lets one node be in trouble at a time, and crashes it only while every block has both copies:
 * then every page that was accepted is there at the end, and always while it has two copies. Any other history may lose
 * pages. In both no byte is ever wrong, a flushed page never comes back, and when the network is well again everything
 * settles.
 */
import { makePage } from '@tmem/conformance'
import { compose, GetOutcome, type PageStore, type Pool, PutOutcome, type StatsNode, TmemError } from '@tmem/core'
import { zcache } from '@tmem/zcache'
import { random } from '../../../tools/random.ts'
import { type Borrower, Lenders, type RemoteMemory, type RemotePlan, ramster } from '../src/index.ts'
import { turn } from './world.ts'

const nodeCount = 5
const borrowerCount = 2
const machinesOfBorrower = 3
const handles = 20
const operations = 120

/** A node as a lender. */
class Node {
  readonly name: string
  life = 1
  isUp = true
  isCut = false
  blocks = new Map<string, Uint8Array>()
  /** Blocks that it has room for. */
  readonly room: number

  constructor(name: string, room: number) {
    this.name = name
    this.room = room
  }

  get identity(): string {
    return `${this.name} life ${this.life}`
  }

  crash(): void {
    this.isUp = false
    this.blocks = new Map()
    this.life++
  }
}

interface Message {
  readonly run: () => unknown
  readonly resolve: (answer: never) => void
  readonly reject: (error: Error) => void
}

/** What a borrower has of a node. */
class Link implements RemoteMemory {
  readonly name: string
  readonly leaseMs: undefined = undefined
  readonly node: Node
  readonly queue: Message[] = []
  readonly #borrower: Borrower
  readonly #prefix: string
  readonly #closed: () => void
  identity: string
  isOpen = true
  failure: Error | undefined

  constructor(node: Node, borrower: Borrower, prefix: string, closed: () => void) {
    this.#closed = closed
    this.node = node
    this.name = node.name
    this.#borrower = borrower
    this.#prefix = prefix
    this.identity = node.identity
  }

  excessBytes = 0

  get freeBytes(): number {
    return (this.node.room - this.node.blocks.size) * 4096
  }

  ready(): Promise<void> {
    return Promise.resolve()
  }

  #send<Answer>(run: () => Answer): Promise<Answer> {
    if (!this.isOpen) return Promise.reject(this.failure ?? new Error('closed'))
    return new Promise<Answer>((resolve, reject) => this.queue.push({ run, resolve, reject }))
  }

  put(keys: readonly number[], blocks: readonly Uint8Array[]): Promise<readonly boolean[]> {
    const sent = blocks.map((block) => block.slice())
    return this.#send(() =>
      keys.map((key, n) => {
        if (this.node.blocks.size >= this.node.room) return false
        this.node.blocks.set(this.#prefix + key, sent[n]!)
        return true
      }),
    )
  }

  get(key: number): Promise<Uint8Array | undefined> {
    return this.#send(() => this.node.blocks.get(this.#prefix + key)?.slice())
  }

  remove(keys: readonly number[]): Promise<void> {
    return this.#send(() => {
      for (const key of keys) this.node.blocks.delete(this.#prefix + key)
    })
  }

  renew(keys: readonly number[]): Promise<readonly boolean[]> {
    return this.#send(() => keys.map((key) => this.node.blocks.has(this.#prefix + key)))
  }

  close(): Promise<void> {
    this.break(this.queue.length)
    this.#closed()
    return Promise.resolve()
  }

  /** It wants the memory of so many blocks back. */
  press(blocks: number): void {
    this.excessBytes = blocks * 4096
    this.#borrower.pressed()
    this.excessBytes = 0
  }

  /** Does the first message. `again`: what is to be done once more, later. */
  deliver(again: (() => unknown)[] | undefined): void {
    const message = this.queue.shift()
    if (message === undefined) return
    if (again !== undefined) again.push(message.run)
    message.resolve(message.run() as never)
  }

  /** The connection is gone: the first so many messages were done, which nobody knows here. */
  break(done: number): void {
    this.isOpen = false
    this.failure = new Error('connection lost')
    for (const [n, { run, reject }] of this.queue.splice(0).entries()) {
      if (n < done && this.node.isUp) run()
      reject(this.failure)
    }
  }

  connect(): void {
    const kept = this.identity === this.node.identity
    this.identity = this.node.identity
    this.isOpen = true
    this.failure = undefined
    this.#borrower.opened(kept ? 'all' : 'nothing')
  }
}

/** A fetch under way, and every version that it may answer with: `undefined` is a miss. */
interface Fetching {
  readonly index: number
  readonly allowed: Set<number | undefined>
}

class BorrowingNode {
  readonly store: PageStore
  readonly pool: Pool
  readonly links: Link[] = []
  readonly lenders: Lenders
  readonly #plans: readonly RemotePlan[]
  turned = 0
  readonly versions = new Map<number, number>()
  readonly fetching = new Set<Fetching>()
  readonly underWay = new Set<Promise<void>>()
  fault: Error | undefined

  constructor(name: string, nodes: readonly Node[]) {
    let borrowed = 0
    this.#plans = nodes.map(
      (node): RemotePlan => ({
        name: node.name,
        borrow: (borrower) => {
          // Who is borrowed from anew does not see what was there before.
          const link = new Link(node, borrower, `${name}:${borrowed++}:`, () => {
            this.links.splice(this.links.indexOf(link), 1)
          })
          this.links.push(link)
          return link
        },
      }),
    )
    this.lenders = new Lenders(this.#plans.slice(0, machinesOfBorrower))
    this.store = compose([
      zcache({ limitBytes: 2 ** 19 }),
      ramster({ machines: this.lenders, sizeBytes: 2 ** 20, waitMs: 0 }),
    ])
    this.pool = this.store.newPool({ client: 1, persistent: true, shared: false, pageSize: 4096 }) as Pool
  }

  /** Takes a lender out, or one in that is none. */
  turnOver(random: number): void {
    const now = this.lenders.machines
    const others = this.#plans.filter(({ name }) => now.every((one) => one.name !== name))
    const [other] = others
    const staying = now.filter(({ isLeaving }) => !isLeaving)
    if (random < 0.5 && other !== undefined) this.lenders.add(other)
    else if (staying.length <= 2) return
    else void this.lenders.remove(staying[Math.floor(random * staying.length)]!.name)
    this.turned++
  }

  begin(what: () => Promise<void>): void {
    const running = what()
      .catch((error: unknown) => {
        this.fault ??= error as Error
      })
      .finally(() => this.underWay.delete(running))
    this.underWay.add(running)
  }

  set(index: number, version: number | undefined): void {
    if (version === undefined) this.versions.delete(index)
    else this.versions.set(index, version)
    for (const one of this.fetching) if (one.index === index) one.allowed.add(version)
  }

  put(index: number, version: number): void {
    const outcome = this.pool.put(1, index, pageOf(version))
    this.set(index, outcome === PutOutcome.Stored ? version : undefined)
  }

  async fetch(index: number, mayFail: () => boolean): Promise<void> {
    const one: Fetching = { index, allowed: new Set([this.versions.get(index)]) }
    this.fetching.add(one)
    const into = new Uint8Array(4096)
    try {
      const outcome = await this.pool.fetch(1, index, into)
      const is = [...one.allowed].some((version) =>
        version === undefined
          ? outcome === GetOutcome.Miss
          : outcome === GetOutcome.Hit && Buffer.compare(into, pageOf(version)) === 0,
      )
      if (!is) throw new Error(`page ${index} is none of the versions ${[...one.allowed].join(', ')}`)
    } catch (error) {
      if (!(error instanceof TmemError) || !mayFail()) throw error
    } finally {
      this.fetching.delete(one)
    }
  }

  counter(name: string): number {
    const find = (node: StatsNode): StatsNode | undefined =>
      node.name === 'ramster' ? node : node.children.map(find).find((found) => found !== undefined)
    return find(this.store.stats())!.counters[name]!
  }
}

const pages = new Map<number, Uint8Array>()
/** Noise, so that pages are not small; the same for the same version. */
function pageOf(version: number): Uint8Array {
  const seed = version % 64
  const known = pages.get(seed)
  if (known !== undefined) return known
  const page = makePage('noise', seed, 4096)
  pages.set(seed, page)
  return page
}

/** What has happened in a history: that it was no history of nothing. */
export interface Played {
  crashes: number
  breaks: number
  remoted: number
  healed: number
  /** Blocks that left a lender which was taken out or wanted memory back; lenders that were taken out or in. */
  relieved: number
  turned: number
  fetched: number
}

/** Plays a history. Rejects with what was wrong, and the seed. */
export async function play(seed: number): Promise<Played> {
  try {
    return await new History(seed).run()
  } catch (error) {
    throw new Error(`seed ${seed}: ${(error as Error).message}`, { cause: error })
  }
}

class History {
  readonly #random: () => number
  readonly #isCareful: boolean
  readonly #nodes: readonly Node[]
  readonly #borrowers: readonly BorrowingNode[]
  /** Messages that are done once more. */
  readonly #again: (() => unknown)[] = []
  readonly #played: Played = { crashes: 0, breaks: 0, remoted: 0, healed: 0, relieved: 0, turned: 0, fetched: 0 }
  #version = 0
  #wasCareless = false

  constructor(seed: number) {
    this.#random = random(seed)
    this.#isCareful = seed % 2 === 0
    const isTight = this.#random() < 0.2
    this.#nodes = Array.from({ length: nodeCount }, (_, n) => new Node(`node ${n}`, isTight ? 25 : 10_000))
    this.#borrowers = Array.from({ length: borrowerCount }, (_, n) => {
      const others = this.#nodes.filter((_one, number) => number !== n)
      return new BorrowingNode(`node ${n}`, this.#shuffled(others))
    })
  }

  async run(): Promise<Played> {
    try {
      for (let n = 0; n < operations; n++) {
        this.#step()
        await turn()
        this.#throwFault()
      }
      await this.#settle()
      return this.#played
    } finally {
      // What is under way ends first.
      for (const { links } of this.#borrowers) for (const link of links) link.break(0)
      await Promise.all(this.#borrowers.flatMap(({ underWay }) => [...underWay]))
      for (const { store } of this.#borrowers) await store.close()
    }
  }

  #throwFault(): void {
    for (const { fault } of this.#borrowers) if (fault !== undefined) throw fault
  }

  #upTo(count: number): number {
    return Math.floor(this.#random() * count)
  }

  #pick<Item>(items: readonly Item[]): Item {
    return items[this.#upTo(items.length)]!
  }

  #shuffled<Item>(items: readonly Item[]): Item[] {
    const left = [...items]
    return items.map(() => left.splice(this.#upTo(left.length), 1)[0]!)
  }

  get #links(): Link[] {
    return this.#borrowers.flatMap(({ links }) => links)
  }

  #step(): void {
    const what = this.#random()
    const borrower = this.#pick(this.#borrowers)
    const index = this.#upTo(handles)
    if (what < 0.2) borrower.put(index, ++this.#version)
    else if (what < 0.25) {
      borrower.pool.flushPage(1, index)
      borrower.set(index, undefined)
    } else if (what < 0.36) {
      const indexes = Uint32Array.from({ length: 1 + this.#upTo(8) }, () => this.#upTo(handles))
      borrower.begin(async () => {
        await borrower.pool.sink!(1, indexes, indexes.length, true)
      })
    } else if (what < 0.5) {
      this.#played.fetched++
      // While a block has one copy, and its only machine does not answer, nobody can give it: it is not lost.
      const mayFail = (): boolean => this.#wasCareless || borrower.counter('one_copy_only') > 0
      borrower.begin(() => borrower.fetch(index, mayFail))
    } else if (what < 0.53) borrower.store.tick({ pages: 64 })
    else if (what < 0.54) borrower.turnOver(this.#random())
    else if (what < 0.55) {
      const link = this.#pick(borrower.links)
      if (link.isOpen) link.press(1 + this.#upTo(8))
    } else if (what < 0.9) this.#deliver()
    else this.#trouble()
  }

  #deliver(): void {
    const ready = this.#links.filter(({ queue, node }) => queue.length > 0 && node.isUp && !node.isCut)
    if (ready.length > 0) this.#pick(ready).deliver(this.#random() < 0.1 ? this.#again : undefined)
    else if (this.#again.length > 0) this.#again.splice(this.#upTo(this.#again.length), 1)[0]!()
  }

  #trouble(): void {
    const inTrouble = this.#nodes.filter((node) => !node.isUp || node.isCut || !this.#isWell(node))
    const node =
      inTrouble.length > 0 && (this.#isCareful || this.#random() < 0.6)
        ? this.#pick(inTrouble)
        : this.#pick(this.#nodes)
    const links = this.#links.filter((link) => link.node === node)
    if (inTrouble.includes(node)) {
      this.#recover(node, links)
      return
    }
    if (!this.#isCareful) this.#wasCareless = true
    if (this.#random() < 0.4 && (!this.#isCareful || this.#isSafeToCrash())) {
      this.#played.crashes++
      // Some of what was under way had been done, and was lost with the rest.
      for (const link of links) link.break(this.#upTo(3))
      node.crash()
    } else if (this.#random() < 0.5) node.isCut = true
    else this.#break(links)
  }

  #isWell(node: Node): boolean {
    return this.#links.every((link) => link.node !== node || (link.isOpen && link.identity === node.identity))
  }

  #isSafeToCrash(): boolean {
    return (
      this.#nodes.every((node) => this.#isWell(node)) &&
      this.#borrowers.every((one) => one.counter('one_copy_only') === 0 && one.counter('lost') === 0)
    )
  }

  #break(links: readonly Link[]): void {
    this.#played.breaks++
    for (const link of links) link.break(this.#upTo(link.queue.length + 1))
  }

  #recover(node: Node, links: readonly Link[]): void {
    if (node.isCut) {
      // Who has waited too long gives up; or it forwards again.
      if (this.#random() < 0.5) this.#break(links)
      else node.isCut = false
    } else {
      node.isUp = true
      for (const link of links) if (!link.isOpen) link.connect()
    }
  }

  /** The network is well again: everything ends, every page is there, and no key is left that nobody knows. */
  async #settle(): Promise<void> {
    for (const node of this.#nodes) {
      node.isCut = false
      node.isUp = true
    }
    for (const link of this.#links) if (!link.isOpen || link.identity !== link.node.identity) link.connect()
    await this.#quiet()
    for (const borrower of this.#borrowers) {
      const { store, pool, versions } = borrower
      if (this.#isCareful && borrower.counter('lost') !== 0) throw new Error('blocks were lost')
      for (let index = 0; index < handles; index++) borrower.begin(() => borrower.fetch(index, () => this.#wasCareless))
      await this.#quiet()
      store.check!()
      // Nobody alters anything here: what does not match is another block than that of the key.
      if (borrower.counter('damaged_copies') !== 0) throw new Error('a key had another block')
      this.#played.remoted += borrower.counter('pers_pages_remoted')
      this.#played.healed += borrower.counter('healed_copies')
      this.#played.relieved += borrower.counter('relieved_blocks')
      this.#played.turned += borrower.turned
      if (this.#isCareful && borrower.counter('degraded') !== 0) throw new Error('it is degraded still')
      pool.flushObject(1)
      versions.clear()
      await this.#quiet()
      if (borrower.counter('pending_flushes') !== 0) throw new Error('flushes are left')
      if (borrower.links.some(({ node }) => node.blocks.size > 0) && this.#played.breaks + this.#played.crashes === 0)
        this.#throwLeftovers(borrower)
    }
  }

  /** Without a break and a message that was done twice nothing is left on any node. */
  #throwLeftovers({ links }: BorrowingNode): void {
    const other = this.#borrowers.some(({ versions }) => versions.size > 0)
    if (!other && this.#again.length === 0)
      throw new Error(`keys are left on ${links.map(({ name }) => name).join(', ')}`)
  }

  /** Delivers until nothing is under way any more. */
  async #quiet(): Promise<void> {
    for (let rounds = 0, still = 0; still < 4; rounds++) {
      if (rounds > 5000) throw new Error('it does not settle')
      const busy = this.#links.filter(({ queue }) => queue.length > 0)
      for (const link of busy) link.deliver(undefined)
      for (const { store } of this.#borrowers) store.tick({ pages: 64 })
      await turn()
      this.#throwFault()
      const isStill = busy.length === 0 && this.#borrowers.every(({ underWay }) => underWay.size === 0)
      still = isStill ? still + 1 : 0
    }
  }
}
