// What a process does that will be killed, so that others know what must be left of it.

/** The n-th change: a page is put, or one in seven times flushed. */
export const changeOf = (number) => ({ index: (number * 31) % 300, flush: number % 7 === 6 })

/** A page that tells the change that put it; every third one does not shrink. */
export function pageOf(number) {
  const page = new Uint8Array(4096).fill(number)
  new DataView(page.buffer).setUint32(0, number)
  if (number % 3 === 0)
    for (let at = 4, state = number + 1; at < page.length; at++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0
      page[at] = state >>> 24
    }
  return page
}
