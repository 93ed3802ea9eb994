/**
 * Random numbers that are the same in every run: a generator with 128 bits of state, seeded by two numbers.
 *
 * Source: sfc32 of PractRand (Chris Doty-Humphrey); MurmurHash3's finaliser scatters the seed.
 */

/** Scatters a word over 32 bits, one to one. */
export function scatter(word: number): number {
  let h = Math.imul(word ^ (word >>> 16), 0x85ebca6b)
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35)
  return (h ^ (h >>> 16)) >>> 0
}

export class Random {
  #a: number
  #b: number
  #c: number
  #count = 1

  /** @param seed and `stream`: 32 bits each; streams of one seed have nothing in common */
  constructor(seed: number, stream: number) {
    this.#a = scatter(seed ^ 0x9e3779b9)
    this.#b = scatter(stream ^ 0x7f4a7c15)
    this.#c = scatter(this.#a ^ Math.imul(stream, 0x2545f491))
    for (let n = 0; n < 12; n++) this.word()
  }

  /** 32 bits. */
  word(): number {
    const sum = (this.#a + this.#b + this.#count) | 0
    this.#count = (this.#count + 1) | 0
    this.#a = this.#b ^ (this.#b >>> 9)
    this.#b = (this.#c + (this.#c << 3)) | 0
    this.#c = (((this.#c << 21) | (this.#c >>> 11)) + sum) | 0
    return sum >>> 0
  }

  /** An integer from 0 to `limit - 1`. */
  below(limit: number): number {
    return Math.floor((this.word() / 2 ** 32) * limit)
  }

  /** An integer from `least` to `most`. */
  from(least: number, most: number): number {
    return least + this.below(most - least + 1)
  }

  /** True `times` times of a thousand. */
  chance(times: number): boolean {
    // A chance of zero costs nothing, so that a kind of fault that is off does not move the others.
    return times > 0 && this.below(1000) < times
  }

  /** One of the list. */
  of<T>(list: readonly T[]): T {
    return list[this.below(list.length)]!
  }

  /** An index of `weights`, whose sum is `sum`, as often as its weight says. */
  weighted(weights: readonly number[], sum: number = weights.reduce((all, weight) => all + weight)): number {
    let left = this.below(sum)
    let chosen = 0
    while (left >= weights[chosen]!) left -= weights[chosen++]!
    return chosen
  }

  /**
   * Swarm weights: about a quarter of the kinds is off, the others are of very different weight, so that histories
   * differ in what they are made of. (Groce and others, Swarm Testing, 2012: what is left out finds as much as what is
   * put in.)
   */
  swarm(kinds: number): number[] {
    const weights: number[] = []
    for (let n = 0; n < kinds; n++) weights.push(this.below(4) === 0 ? 0 : 2 ** this.below(7))
    return weights
  }
}
