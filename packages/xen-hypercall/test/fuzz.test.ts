/**
 * A hostile guest: any bytes as structures, in any order, on all releases. Whatever it does it gets a number, sees no
 * page of anybody else's, harms nobody, and takes no more than it may. Seeds are fixed; a failure names its own.
 */
import { compose, createAccounts } from '@tmem/core'
import { zcache } from '@tmem/zcache'
import { describe, expect, test } from 'vitest'
import {
  Command,
  interfaceVersion,
  maxPools,
  noFrame,
  operationLayouts,
  releases,
  sysctlHead,
  sysctlLayout,
  XenHost,
} from '../src/index.ts'
import { firstFrame, Guest } from './guest.ts'

const operations = 4000

/** Numbers from a seed: xorshift. */
function numbers(seed: number): (below: number) => number {
  let state = seed
  return (below) => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) % below
  }
}

/** Words that are wrong in an interesting way, among others. */
const edges = [
  0, 1, 2, 3, 15, 16, 0xffff, 0x10000, 0x7fffffff, 0x80000000, 0xffffffff, 0x01000000, 0x01000001, 0x01000002, 4096,
]
const commands = [...Object.values(Command), 11, 100, 103, 0xffffffff]

describe.each(releases.flatMap((release) => ([32, 64] as const).map((bits) => ({ release, bits }))))(
  'release $release, guest of $bits bits',
  ({ release, bits }) => {
    test('sees nothing that is not its own', async () => {
      const seed = 1700 + releases.indexOf(release) * 2 + bits / 64
      const any = numbers(seed)
      const accounts = createAccounts({ maximumBytes: 256 * 1024 })
      const store = compose([zcache({ limitBytes: '1MiB' })], { accounts, check: 'model' })
      const host = new XenHost({ store, release, accounts })
      const version = release === '4.0.0' ? 0 : 0x01000000
      const victim = new Guest(host, 2, 64, 8)
      const kept = victim.newPool(version | 1)
      const secret = 0x5e
      const mark = Buffer.alloc(16, secret)
      victim.bytes.fill(secret, firstFrame * 4096, firstFrame * 4096 + 4096)
      victim.bytes.fill(1, firstFrame * 4096, firstFrame * 4096 + 8)
      for (let n = 0; n < 8; n++) expect(victim.page(Command.PutPage, kept, BigInt(n), n)).toBe(1)

      const guest = new Guest(host, 1, bits, 24)
      // Frame 20 is a hole.
      guest.memory.map(20, noFrame)
      const { bytes } = operationLayouts(release, bits).gen
      const view = new DataView(guest.bytes.buffer)
      const word = (): number => (any(3) === 0 ? any(2 ** 32) : edges[any(edges.length)]!)
      let successes = 0
      for (let n = 0; n < operations; n++) {
        const isTame = any(3) > 0
        const size = guest.bytes.length
        const address = isTame
          ? any(2) * 4090
          : [0, 4096 - bytes, 4096 - 8, 20 * 4096 - 8, size - bytes, size - 8, size, 2 ** 40][any(8)]!
        const at = Math.min(address, size - 200)
        for (let offset = 0; offset < 64; offset += 4) view.setUint32(at + offset, any(2) === 0 ? 0 : word(), true)
        view.setUint32(at, any(20) === 0 ? word() : commands[any(commands.length)]!, true)
        if (isTame) {
          // As a good guest writes it, and then perhaps one word of it wrong.
          view.setUint32(at, [1, 2, 4, 4, 4, 4, 5, 5, 5, 6][any(10)]!, true)
          view.setUint32(at + 4, any(4), true)
          for (let offset = 8; offset < bytes; offset += 4) view.setUint32(at + offset, 0, true)
          if (view.getUint32(at, true) === Command.NewPool) view.setUint32(at + 24, version | any(4), true)
          else {
            view.setUint32(at + 8, any(4), true)
            view.setUint32(at + operationLayouts(release, bits).gen.fields.index.at, any(4), true)
            view.setUint32(at + bytes - (bits === 64 ? 8 : 4), 2 + any(22), true)
          }
          if (any(4) === 0) view.setUint32(at + 4 * any(bytes / 4), word(), true)
        }
        let answer = host.call(1, address)
        if (any(10) === 0) {
          view.setUint32(0, sysctlHead.bytes, true)
          view.setUint32(4, interfaceVersion(release) ?? 0, true)
          answer = host.sysctl(1, any(2) * (guest.bytes.length - sysctlLayout.bytes))
        }
        answer = await answer
        if (answer > 0) successes++
        if (!Number.isInteger(answer)) throw new Error(`seed ${seed}, operation ${n}: answered ${answer}`)
        if (Buffer.from(guest.bytes.buffer).includes(mark))
          throw new Error(`seed ${seed}, operation ${n}: a page of another domain`)
      }
      expect(successes).toBeGreaterThan(operations / 20)
      // Nobody else has noticed, and what it takes is bounded.
      for (let n = 0; n < 8; n++) {
        expect(victim.page(Command.GetPage, kept, BigInt(n), n, firstFrame + 1)).toBe(1)
        expect(victim.bytes[(firstFrame + 1) * 4096 + 100]).toBe(secret)
      }
      expect(accounts.charged(1)).toBeLessThanOrEqual(256 * 1024)
      const client = host.clients.get(1)!
      expect([client.slots.length, client.permits.length, client.invalidations.length]).toEqual([maxPools, maxPools, 0])
      expect(client.isFrozen).toBe(false)
      store.check?.()
      host.close()
      store.check?.()
      await store.close()
    })
  },
)
