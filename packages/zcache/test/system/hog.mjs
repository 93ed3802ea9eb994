/**
 * A process whose memory grows fast and stays, as with mlockall, until its standard input ends: arguments MiB, MiB per
 * step of 100 ms. Says when it has all of it.
 */
import { once } from 'node:events'

const [total, step] = process.argv.slice(2).map(Number)
const held = []
for (let taken = 0; taken < total; taken += step) {
  // Filled, so that it is real memory.
  held.push(Buffer.alloc(step * 2 ** 20, taken + 1))
  await new Promise((resolve) => setTimeout(resolve, 100))
}
console.log(`grown in ${held.length} steps`)
await once(process.stdin.resume(), 'end')
