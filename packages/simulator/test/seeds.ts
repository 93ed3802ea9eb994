/**
 * Histories in which a fault of the shipped modules, or of the reference, was once seen. What a history does may change
 * with the simulator, so each fault has a test by itself, too, where it was mended.
 */
export const found: readonly { readonly seed: number; readonly history: number; readonly what: string }[] = [
  { seed: 6, history: 186, what: 'a spill whose table cannot be read is left open' },
  { seed: 1820515375, history: 14228, what: 'two pages of a batch cannot be had, for two reasons' },
  { seed: 3405691582, history: 7906, what: 'an ephemeral page goes to a copy that was given up for it' },
  { seed: 3405691582, history: 27357, what: 'an older page was read before a newer one was put' },
  { seed: 4002160828, history: 7313, what: 'an older page is left by a lie after memory has rotted' },
  { seed: 1001, history: 69874, what: 'a page put back in a batch is flushed while memory is taken for the next one' },
]
