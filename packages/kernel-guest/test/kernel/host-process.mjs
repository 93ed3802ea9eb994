// A host in a process of its own, to be killed: node host-process.mjs MEMORY DOORBELL [SAVED]. It prints a line when it
// is attached, with the pages that it has from SAVED, and a line with its counters every 50 ms.
import { compose } from '@tmem/core'
import { attachGuest, SavedPages } from '@tmem/kernel-guest'
import { XenHost } from '@tmem/xen-hypercall'
import { zcache } from '@tmem/zcache'

const [memory, doorbell, file] = process.argv.slice(2)
const store = compose([zcache({ limitBytes: 2 ** 27 })])
const host = new XenHost({ store })
const saved = file === undefined ? {} : { saved: SavedPages.open({ file, sizeBytes: 2 ** 28 }) }
const signal = AbortSignal.timeout(20_000)
const guest = await attachGuest({ host, domain: 1, memory, doorbell, signal, ...saved })
console.log(JSON.stringify({ restored: guest.restoredPages }))
const timer = setInterval(() => console.log(JSON.stringify(guest.counters)), 50)
await guest.ended
clearInterval(timer)
console.log(JSON.stringify(guest.counters))
