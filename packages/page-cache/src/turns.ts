/** Work that is done one after the other, in the order in which it was asked for, however each of it ends. */
export class Turns {
  #last: Promise<unknown> = Promise.resolve()

  /** Does it after all that was asked for before; settles as it does. */
  take<T>(work: () => Promise<T>): Promise<T> {
    const mine = this.#last.then(work)
    // The next one does not care how this one ended: its caller does.
    this.#last = mine.catch(() => undefined)
    return mine
  }
}
