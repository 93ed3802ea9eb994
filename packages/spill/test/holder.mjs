// Holds a spill file until it is killed: node holder.mjs FILE
import { compose, PutOutcome } from '@tmem/core'
import { spill } from '@tmem/spill'

const store = compose([spill({ file: process.argv[2], sizeBytes: 2 ** 20 })])
const pool = store.newPool({ client: 1, persistent: false, shared: true, pageSize: 4096 })
if (pool.put(1, 2, new Uint8Array(4096).fill(2)) !== PutOutcome.Stored) throw new Error('it does not take a page')
console.log('held')
setInterval(() => {}, 1000)
