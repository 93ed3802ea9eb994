/**
 * The cost of Xen's interface above the store: a hypercall with a raw structure against the same put or get on the
 * store itself; and LIST with many domains, whose cost should grow with its output alone.
 */
import { basePageSize, compose, GetOutcome, type PageStore, type Pool, PutOutcome } from '@tmem/core'
import { memory } from '@tmem/memory'
import { Command, controlBuffer, GuestMemory, SubOperation, XenHost } from '@tmem/xen-hypercall'
import { zcache } from '@tmem/zcache'
import { Failed } from '../ending.ts'
import { type Bench, type Row, ratioRow, type Suite } from './frame.ts'

const limitBytes = 256 * 2 ** 20
/** Pages of the guest that are put and got; each has a frame of its own. */
const pages = 4096
const domains = 1000
const listBytes = 2 ** 20

/** `tmem bench xen`. */
export const xen: Suite = {
  name: 'xen',
  summary: "hypercalls of Xen's tmem interface, against direct calls of the store",
  run,
}

async function run(bench: Bench): Promise<readonly Row[]> {
  const rows: Row[] = []
  for (const kind of ['memory', 'zcache'] as const) {
    const make = (): PageStore => compose([kind === 'memory' ? memory({ limitBytes }) : zcache({ limitBytes })])
    // Whoever compresses is measured by it, and the goal is for what the interface adds to plain memory.
    rows.push(...(await hypercalls(bench, kind, make, kind === 'memory' ? 1.25 : undefined)))
  }
  rows.push(await lists(bench))
  return rows
}

/** Puts and gets of the same pages in the same order through both. */
async function hypercalls(
  bench: Bench,
  kind: string,
  make: () => PageStore,
  goal: number | undefined,
): Promise<readonly Row[]> {
  const store = make()
  const other = make()
  const host = new XenHost({ store })
  try {
    const bytes = new Uint8Array((pages + 1) * basePageSize)
    host.addDomain({ id: 1, memory: new GuestMemory(bytes) })
    const op = new DataView(bytes.buffer, 0, 56)
    op.setUint32(0, Command.NewPool, true)
    op.setUint32(24, 0x01000001, true)
    if (host.call(1, 0) !== 0) throw new Failed('the host refused the pool')
    op.setUint32(24, 0, true)
    const pool = other.newPool({ client: 1, persistent: true, shared: false, pageSize: basePageSize })
    if (typeof pool === 'number') throw new Failed(`the store refused the pool (${pool})`)
    const views: Uint8Array[] = []
    for (let n = 0; n < pages; n++) {
      const page = bytes.subarray((n + 1) * basePageSize, (n + 2) * basePageSize)
      // Half of it shrinks well, half does not.
      for (let at = 0; at < basePageSize; at++) page[at] = at < 2048 ? (at * n * 2654435761) >>> 13 : n
      views.push(page)
    }
    const call = (command: number, operations: number): void => {
      op.setUint32(0, command, true)
      for (let n = 0; n < operations; n++) {
        const at = n % pages
        op.setUint32(8, at & 7, true)
        op.setUint32(32, at, true)
        op.setUint32(48, at + 1, true)
        if (host.call(1, 0) !== 1) throw new Failed(`command ${command} of page ${at} was refused`)
      }
    }
    const direct = (
      act: (pool: Pool, object: number, index: number, page: Uint8Array) => boolean,
      count: number,
    ): void => {
      for (let n = 0; n < count; n++) {
        const at = n % pages
        if (!act(pool, at & 7, at, views[at]!)) throw new Failed(`page ${at} was refused`)
      }
    }
    const operations = bench.quick ? pages : pages * 4
    const puts = await bench.measure(
      `${kind}, put`,
      {
        hypercall: { run: (count) => call(Command.PutPage, count) },
        direct: { run: (count) => direct((to, ...page) => to.put(...page) === PutOutcome.Stored, count) },
      },
      { operations },
    )
    const gets = await bench.measure(
      `${kind}, get`,
      {
        hypercall: { run: (count) => call(Command.GetPage, count) },
        direct: { run: (count) => direct((to, ...page) => to.get(...page) === GetOutcome.Hit, count) },
      },
      { operations },
    )
    return [
      ratioRow(`hypercall-put-${kind}`, 'ns/page', puts.hypercall, 'direct-put', puts.direct, goal),
      ratioRow(`hypercall-get-${kind}`, 'ns/page', gets.hypercall, 'direct-get', gets.direct, goal),
    ]
  } finally {
    host.close()
    await store.close()
    await other.close()
  }
}

/** LIST of 1,000 domains and of 100, each with two pools and some pages, for each line. */
async function lists(bench: Bench): Promise<Row> {
  const made = [domains, domains / 10].map((count) => {
    const store = compose([zcache({ limitBytes })])
    const host = new XenHost({ store })
    for (let id = 1; id <= count; id++) {
      const bytes = new Uint8Array(2 * basePageSize)
      host.addDomain({ id, memory: new GuestMemory(bytes) })
      const op = new DataView(bytes.buffer, 0, 56)
      for (const flags of [0x01000001, 0x01000000]) {
        op.setUint32(0, Command.NewPool, true)
        op.setUint32(24, flags, true)
        if ((host.call(id, 0) as number) < 0) throw new Failed(`the host refused a pool of domain ${id}`)
      }
      op.setUint32(24, 0, true)
      op.setUint32(0, Command.PutPage, true)
      op.setUint32(4, 0, true)
      op.setUint32(48, 1, true)
      bytes.fill(id, basePageSize)
      for (let index = 0; index < 8; index++) {
        op.setUint32(32, index, true)
        if (host.call(id, 0) !== 1) throw new Failed('the host refused a page')
      }
    }
    const buffer = new Uint8Array(listBytes)
    const request = {
      subOperation: SubOperation.List,
      client: 0xffff,
      arg1: listBytes,
      arg2: 1,
      buffer: controlBuffer(buffer),
    }
    const lines = 2 + 3 * count
    const list = (operations: number): void => {
      for (let done = 0; done < operations; done += lines)
        if (host.control(request) !== 0) throw new Failed('LIST was refused')
    }
    list(1)
    const printed = buffer.subarray(0, buffer.indexOf(0)).filter((byte) => byte === 10).length
    if (printed !== lines) throw new Failed(`LIST printed ${printed} of ${lines} lines`)
    return { store, host, list }
  })
  try {
    const [many, few] = made as [(typeof made)[0], (typeof made)[0]]
    const lines = 3002
    const taken = await bench.measure(
      'list',
      { many: { run: many.list }, few: { run: few.list } },
      { operations: bench.quick ? lines : lines * 10 },
    )
    return ratioRow('list-1000-domains', 'ns/line', taken.many, 'list-100-domains', taken.few, 1.5)
  } finally {
    for (const { host, store } of made) {
      host.close()
      await store.close()
    }
  }
}
