/**
 * A process whose memory grows fast and stays, as with mlockall: arguments MiB, MiB per step of 100 ms, seconds to
 * stay.
 */
const [total, step, seconds] = process.argv.slice(2).map(Number)
const held = []
for (let taken = 0; taken < total; taken += step) {
  // Filled, so that it is real memory.
  held.push(Buffer.alloc(step * 2 ** 20, taken + 1))
  await new Promise((resolve) => setTimeout(resolve, 100))
}
await new Promise((resolve) => setTimeout(resolve, seconds * 1000))
console.log(held.length)
