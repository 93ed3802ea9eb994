// Layers for tests, named in the text of a stack; loaded by the pager's thread.
import { GetOutcome, idle, Pending, PutOutcome } from '@tmem/core'

const can = {
  ephemeral: true,
  persistent: true,
  shared: true,
  minPageSize: 4096,
  maxPageSize: 4096,
  deferred: false,
  split: false,
  reservedBytes: 0,
}

/** A terminal store over a Map; `before` sees every operation and may answer in its place. */
class MapPool {
  #pages = new Map()
  #before
  #wait

  constructor(attributes, before, wait) {
    this.attributes = attributes
    this.#before = before
    this.#wait = wait
  }

  put(object, index, page) {
    const outcome = this.#before('put', index) ?? PutOutcome.Stored
    if (outcome === PutOutcome.Stored) this.#pages.set(index, page.slice())
    else this.#pages.delete(index)
    return outcome
  }

  get(object, index, into) {
    const instead = this.#before('get', index)
    if (instead !== undefined) return instead
    const page = this.#pages.get(index)
    if (page === undefined) return GetOutcome.Miss
    into.set(page)
    return GetOutcome.Hit
  }

  async fetch(object, index, into) {
    await this.#wait(index)
    into.set(this.#pages.get(index))
    return GetOutcome.Hit
  }

  flushPage(object, index) {
    this.#before('flush', index)
    this.#pages.delete(index)
  }

  putMany(batch) {
    let stored = 0
    for (let i = 0; i < batch.length; i++) {
      const at = batch.offsets[i]
      if (batch.outcomes[i] === Pending)
        batch.outcomes[i] = this.put(batch.objects[i], batch.indexes[i], batch.bytes.subarray(at, at + batch.pageSize))
      if (batch.outcomes[i] === PutOutcome.Stored) stored++
    }
    return stored
  }

  getMany(batch) {
    let hits = 0
    for (let i = 0; i < batch.length; i++) {
      const at = batch.offsets[i]
      if (batch.outcomes[i] === Pending)
        batch.outcomes[i] = this.get(batch.objects[i], batch.indexes[i], batch.bytes.subarray(at, at + batch.pageSize))
      if (batch.outcomes[i] === GetOutcome.Hit) hits++
    }
    return hits
  }

  destroy() {
    this.#pages.clear()
  }
}

function factory(name, options, capabilities, make) {
  return {
    name,
    summary: 'for tests',
    options,
    create: (values) => ({
      name,
      plan: () => capabilities,
      open: () => {
        const { before = () => undefined, wait, close = async () => {} } = make(values)
        return {
          name,
          capabilities,
          newPool: (attributes) => new MapPool(attributes, before, wait),
          tick: () => idle,
          stats: () => ({ name, counters: {}, children: [] }),
          close,
        }
      },
    }),
  }
}

/** Refuses puts number `from` to `to` - 1. */
export const moody = factory('moody', { from: { kind: 'integer' }, to: { kind: 'integer' } }, can, ({ from, to }) => {
  let puts = 0
  return {
    before: (operation) => {
      if (operation !== 'put') return undefined
      puts++
      return puts > from && puts <= to ? PutOutcome.Policy : undefined
    },
  }
})

/** Every get has to wait: so many milliseconds. */
export const slow = factory('slow', { delay: { kind: 'integer' } }, { ...can, deferred: true }, ({ delay }) => ({
  before: (operation) => (operation === 'get' ? GetOutcome.Deferred : undefined),
  wait: () => new Promise((resolve) => setTimeout(resolve, delay)),
}))

/** What it stored cannot be read. */
export const unreadable = factory('unreadable', {}, { ...can, deferred: true }, () => ({
  before: (operation) => (operation === 'get' ? GetOutcome.Deferred : undefined),
  wait: () => Promise.reject(new Error('the disk is gone')),
}))

/** Its n-th put ends the thread in one of several ways. */
export const deadly = factory('deadly', { at: { kind: 'integer' }, how: { kind: 'text' } }, can, ({ at, how }) => {
  let puts = 0
  return {
    before: (operation) => {
      if (operation !== 'put' || ++puts < at) return undefined
      if (how === 'throw') throw new Error('the layer is broken')
      if (how === 'exit') process.exit(0)
      const heap = []
      for (;;) heap.push(new Array(100_000).fill({}))
    },
  }
})

/** Says that it does not have what it stored. */
export const forgetful = factory('forgetful', {}, can, () => ({
  before: (operation) => (operation === 'get' ? GetOutcome.Miss : undefined),
}))

/** Makes garbage with every operation. */
export const litter = factory('litter', {}, can, () => {
  let trash = []
  return {
    before: () => {
      for (let i = 0; i < 4; i++) trash.push(new Array(200).fill({ trash: trash.length }))
      if (trash.length > 2000) trash = []
      return undefined
    },
  }
})

/** Fails when it is closed. */
export const clinging = factory('clinging', {}, can, () => ({
  close: () => Promise.reject(new Error('the door is stuck')),
}))
