// Increments words of a buffer in a random order, `turns` times or until `stop`, and counts those that are not as they
// were left. Threads with different offsets use different words of the same pages.
export function increments(buffer, offset, turns, random, stop = () => false) {
  const words = new Uint32Array(buffer)
  const count = words.length / 128
  const expected = new Uint32Array(count)
  let wrong = 0
  for (let n = 0; n < turns && !stop(n); n++) {
    const i = random() % count
    const at = i * 128 + offset
    if (words[at] !== expected[i]) wrong++
    words[at]++
    words[at]++
    expected[i] += 2
  }
  for (let i = 0; i < count; i++) if (words[i * 128 + offset] !== expected[i]) wrong++
  return wrong
}
