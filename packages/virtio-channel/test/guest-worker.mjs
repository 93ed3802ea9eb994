// A guest in a thread of its own: puts pages, gets them back and compares them, flushes half; posts what it came to.
import { parentPort, workerData } from 'node:worker_threads'
import { ChannelCommand, ChannelGuest } from '@tmem/virtio-channel'

const { handle, pages, perKick } = workerData
const guest = new ChannelGuest(handle)
const pool = guest.newPool(true)
const chain = guest.pagesPerChain

/** Does an operation on all pages, so many for each notification; how often a result was as it should be. */
function all(command, expected) {
  let right = 0
  for (let from = 0; from < pages; from += perKick) {
    const tickets = []
    for (let at = from; at < Math.min(pages, from + perKick); at += chain) {
      const count = Math.min(chain, from + perKick - at, pages - at)
      const numbers = Array.from({ length: count }, (_, n) => at + n)
      const entries = {
        objects: numbers.map((n) => (n % 2 === 0 ? n % 7 : (1n << 130n) + BigInt(n % 7))),
        indexes: numbers,
        pages: numbers.map((n) => n % guest.pages),
      }
      tickets.push([guest.submit(command, pool, entries, 0, count), at, count])
    }
    guest.wait()
    for (const [ticket, at, count] of tickets) {
      for (let n = 0; n < count; n++) if (guest.result(ticket, n) === expected(at + n)) right++
      guest.release(ticket)
    }
  }
  return right
}

const fill = (n) => (n * 37 + 11) & 0xff
for (let n = 0; n < pages; n++)
  guest
    .page(n)
    .fill(fill(n))
    .set([n & 0xff, n >> 8], 0)
const before = { kicks: guest.kicks, interrupts: guest.interrupts }
const stored = all(ChannelCommand.Put, () => 1)
const counted = { kicks: guest.kicks - before.kicks, interrupts: guest.interrupts - before.interrupts }
for (let n = 0; n < pages; n++) guest.page(n).fill(0)
const got = all(ChannelCommand.Get, () => 1)
let same = 0
for (let n = 0; n < pages; n++) {
  const page = guest.page(n)
  if (page[0] === (n & 0xff) && page[1] === n >> 8 && page.subarray(2).every((byte) => byte === fill(n))) same++
}
all(ChannelCommand.FlushPage, () => 1)
const missed = all(ChannelCommand.Get, () => 0)
parentPort.postMessage({ pool, stored, got, same, missed, ...counted })
guest.close()
