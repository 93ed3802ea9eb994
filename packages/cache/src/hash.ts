/**
 * Hashes of keys: HalfSipHash-1-3, a keyed function for hash tables. Without the seed nobody can choose keys that
 * collide.
 *
 * Strings are hashed as their code units, one byte each where all are below 256 and two bytes each otherwise; so every
 * string has a hash of its own form, lone surrogates included, and nothing is encoded for it.
 *
 * Source: J.-P. Aumasson and D. J. Bernstein, "SipHash: a fast short-input PRF" (2012); the 32-bit variant as Linux has
 * it (hsiphash), whose test vectors are in the tests.
 */

/** How the bytes of a key came about: keys of different kinds are different keys. */
export const KeyKind = {
  /** A string of code units below 256: a byte each. */
  Narrow: 0,
  /** Any other string: two bytes for each code unit, the lower one first. */
  Wide: 1,
  /** A `Uint8Array`. */
  Bytes: 2,
} as const
export type KeyKind = (typeof KeyKind)[keyof typeof KeyKind]

/** Hashes keys with a seed. `kind` and `length` are those of the last one. */
export class KeyHash {
  /** How the last key is written, and its bytes. */
  kind: KeyKind = KeyKind.Narrow
  length = 0
  readonly seed0: number
  readonly seed1: number
  #v0 = 0
  #v1 = 0
  #v2 = 0
  #v3 = 0

  /** @param seed0 any 32 bits @param seed1 any 32 bits */
  constructor(seed0: number, seed1: number) {
    this.seed0 = seed0 | 0
    this.seed1 = seed1 | 0
  }

  /** The hash of a string or of bytes: 32 bits, signed. */
  of(key: string | Uint8Array): number {
    if (typeof key !== 'string') {
      this.kind = KeyKind.Bytes
      this.length = key.length
      return this.bytes(key, 0, key.length, KeyKind.Bytes)
    }
    const { length } = key
    this.#begin(KeyKind.Narrow)
    let word = 0
    for (let i = 0; i < length; i++) {
      const unit = key.charCodeAt(i)
      if (unit > 0xff) return this.#wide(key)
      word |= unit << ((i & 3) << 3)
      if ((i & 3) === 3) {
        this.#mix(word)
        word = 0
      }
    }
    this.kind = KeyKind.Narrow
    this.length = length
    return this.#end(word | (length << 24))
  }

  /** The hash of a key whose bytes are `length` bytes of `bytes` from `at` on. */
  bytes(bytes: Uint8Array, at: number, length: number, kind: KeyKind): number {
    this.#begin(kind)
    let word = 0
    for (let i = 0; i < length; i++) {
      word |= bytes[at + i]! << ((i & 3) << 3)
      if ((i & 3) === 3) {
        this.#mix(word)
        word = 0
      }
    }
    return this.#end(word | (length << 24))
  }

  #wide(key: string): number {
    this.#begin(KeyKind.Wide)
    const { length } = key
    for (let i = 0; i + 1 < length; i += 2) this.#mix(key.charCodeAt(i) | (key.charCodeAt(i + 1) << 16))
    const last = length % 2 === 1 ? key.charCodeAt(length - 1) : 0
    this.kind = KeyKind.Wide
    this.length = length * 2
    return this.#end(last | ((length * 2) << 24))
  }

  #begin(kind: KeyKind): void {
    // The kind is part of the key of the function: a string and its bytes have nothing to do with each other.
    this.#v0 = this.seed0
    this.#v1 = this.seed1 ^ kind
    this.#v2 = this.seed0 ^ 0x6c796765
    this.#v3 = this.seed1 ^ kind ^ 0x74656462
  }

  #mix(word: number): void {
    this.#v3 ^= word
    this.#round()
    this.#v0 ^= word
  }

  #end(last: number): number {
    this.#mix(last)
    this.#v2 ^= 0xff
    this.#round()
    this.#round()
    this.#round()
    return this.#v1 ^ this.#v3
  }

  #round(): void {
    let v0 = this.#v0
    let v1 = this.#v1
    let v2 = this.#v2
    let v3 = this.#v3
    v0 = (v0 + v1) | 0
    v1 = (v1 << 5) | (v1 >>> 27)
    v1 ^= v0
    v0 = (v0 << 16) | (v0 >>> 16)
    v2 = (v2 + v3) | 0
    v3 = (v3 << 8) | (v3 >>> 24)
    v3 ^= v2
    v0 = (v0 + v3) | 0
    v3 = (v3 << 7) | (v3 >>> 25)
    v3 ^= v0
    v2 = (v2 + v1) | 0
    v1 = (v1 << 13) | (v1 >>> 19)
    v1 ^= v2
    v2 = (v2 << 16) | (v2 >>> 16)
    this.#v0 = v0
    this.#v1 = v1
    this.#v2 = v2
    this.#v3 = v3
  }
}
