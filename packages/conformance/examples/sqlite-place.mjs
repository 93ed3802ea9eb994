// A place of one's own: blocks in a database in memory, by node:sqlite (Node 22.13 or newer). Use it as
//
//   tmem stack --modules sqlite-place.mjs 'zcache(limit=16MiB) > sqlite(limit=64MiB)'
import { DatabaseSync } from 'node:sqlite'
import { PutOutcome } from '@tmem/core'

/** Bytes that a row takes beside its block, more or less. */
const rowBytes = 64

class SqlitePlace {
  name = 'sqlite'
  used = 0
  charged = 0

  constructor(limitBytes, traits) {
    this.limitBytes = limitBytes
    this.traits = traits
    this.database = new DatabaseSync(':memory:')
    this.database.exec('CREATE TABLE block (location INTEGER PRIMARY KEY, owner INTEGER, bytes BLOB)')
    this.insert = this.database.prepare('INSERT INTO block (owner, bytes) VALUES (?, ?)')
    this.select = this.database.prepare('SELECT bytes FROM block WHERE location = ?')
    this.remove = this.database.prepare('DELETE FROM block WHERE location = ?')
  }

  get usedBytes() {
    return this.used + this.charged
  }
  sizeOf = (length) => length + rowBytes
  excess = () => this.usedBytes - Math.floor(0.95 * this.limitBytes)
  charge(bytes) {
    if (this.usedBytes + bytes > this.limitBytes) return false
    this.charged += bytes
    return true
  }
  put({ bytes, at, length }, owner) {
    if (this.usedBytes + this.sizeOf(length) > this.limitBytes) return -PutOutcome.NoMemory
    const { lastInsertRowid } = this.insert.run(owner, bytes.subarray(at, at + length))
    this.used += this.sizeOf(length)
    return Number(lastInsertRowid)
  }
  get(location, into) {
    into.bytes.set(this.select.get(location).bytes, into.at)
  }
  free(location, length) {
    this.remove.run(location)
    this.used -= this.sizeOf(length)
  }
  check(owns) {
    for (const { owner, location } of this.database.prepare('SELECT owner, location FROM block').all())
      if (!owns(owner, location)) throw new Error(`sqlite: whose is ${location}?`)
  }
  stats = () => ({ name: 'sqlite', counters: { used_bytes: this.usedBytes }, children: [] })
  close = async () => {
    if (this.database.isOpen) this.database.close()
  }
}

export const sqliteFactory = {
  name: 'sqlite',
  summary: 'blocks in a database in memory',
  options: { limit: { kind: 'bytes', summary: 'bytes that it may use', required: true, minimum: 2 ** 19 } },
  create({ limit }) {
    const capacity = Math.ceil(limit / 512)
    const more = { persistent: true, ephemeral: true, waits: false, rawOnly: false, reservedBytes: 0 }
    const traits = Object.freeze({ ...more, survives: 'nothing', capacity, maxPageSize: 2 ** 21 })
    return { name: 'sqlite', place: { traits, open: () => new SqlitePlace(limit, traits) } }
  },
}
