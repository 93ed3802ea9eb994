// Opens a swap file as a stack of its own, says so, and keeps it until it is killed: node owner.mjs FILE BYTES
import { compose } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'

const [, , file, bytes] = process.argv
compose([frontswap({ file, sizeBytes: Number(bytes) })])
console.log('open')
setInterval(() => undefined, 1000)
