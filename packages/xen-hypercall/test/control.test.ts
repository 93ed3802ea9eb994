/** What toolstacks ask: sub-operations of both generations, privilege, LIST, and pages that lie on a disk. */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { compose } from '@tmem/core'
import { frontswap } from '@tmem/frontswap'
import { zcache } from '@tmem/zcache'
import { describe, expect, onTestFinished, test } from 'vitest'
import {
  Command,
  clientInfoLayout,
  Errno,
  poolInfoLayout,
  type Release,
  SubOperation as Sub,
  XenHost,
} from '../src/index.ts'
import { firstFrame, flags, Guest, world } from './guest.ts'

const all = 0xffff
const uuid = 0x0123456789abcdef_fedcba9876543210n
/** Where tests have buffers: frame 4 and on. */
const buf = 4 * 4096

interface Setting {
  readonly host: XenHost
  readonly dom0: Guest
  readonly guest: Guest
}

function setting(release: Release, defects: 'mended' | 'original' = 'mended'): Setting {
  const { host } = world({ release, defects })
  const dom0 = new Guest(host, 0, 64, 32)
  const guest = new Guest(host, 1)
  guest.newPool(flags.persistent)
  guest.newPool(flags.ephemeral)
  return { host, dom0, guest }
}

describe('privilege', () => {
  test.each([
    { release: '4.0' as const, defects: 'mended' as const, answer: -Errno.EPERM },
    { release: '4.0' as const, defects: 'original' as const, answer: 0 },
    { release: '4.2' as const, defects: 'original' as const, answer: -Errno.EPERM },
    { release: '4.5' as const, defects: 'mended' as const, answer: -Errno.EPERM },
    { release: '4.6' as const, defects: 'mended' as const, answer: -Errno.EPERM },
    { release: '4.9' as const, defects: 'original' as const, answer: -Errno.EPERM },
  ])('of a guest in $release, $defects: $answer', ({ release, defects, answer }) => {
    const { guest, host } = setting(release, defects)
    expect(guest.control(Sub.Freeze, { cli_id: 1 })).toBe(answer)
    expect(host.clients.get(1)!.isFrozen).toBe(answer === 0)
  })

  test('the security module is asked for every call, and for control', () => {
    const asked: string[] = []
    const refused = new Set<string>()
    const security = (domain: number, isControl: boolean): boolean => {
      const name = `${domain}${isControl ? ' control' : ''}`
      asked.push(name)
      return !refused.has(name)
    }
    for (const release of ['4.2', '4.4', '4.9'] as const) {
      asked.length = 0
      refused.clear()
      const { host } = world({ release, security })
      const dom0 = new Guest(host, 0, 64, 32)
      const guest = new Guest(host, 1)
      expect(guest.newPool(flags.persistent)).toBe(0)
      expect(dom0.control(Sub.Freeze, { cli_id: 1 })).toBe(0)
      refused.add('1').add('0 control')
      const isAsked = release !== '4.2'
      expect(asked).toEqual(isAsked ? (release === '4.9' ? ['1', '0 control'] : ['1', '0', '0 control']) : [])
      const before = host.counters.Tt
      expect(guest.newPool(flags.persistent)).toBe(isAsked ? -Errno.EPERM : 1)
      // What the security module refuses is not counted.
      expect(host.counters.Tt).toBe(isAsked ? before : before + 1)
      expect(dom0.control(Sub.Thaw, { cli_id: 1 })).toBe(isAsked ? -Errno.EPERM : 0)
    }
  })

  test('the sysctl: version, then privilege, then the body', () => {
    const { guest, dom0, host } = setting('4.9')
    expect(guest.sysctl({ cmd: Sub.Freeze, cli_id: 1 }, { interface_version: 0xe })).toBe(-Errno.EACCES)
    expect(guest.sysctl({ cmd: Sub.Freeze, cli_id: 1 })).toBe(-Errno.EPERM)
    expect(dom0.sysctl({ cmd: Sub.Freeze, cli_id: 1 }, { cmd: 1 })).toBe(-Errno.ENOSYS)
    expect(dom0.sysctl({ cmd: Sub.Freeze, cli_id: 1, pad: 1 })).toBe(-Errno.EINVAL)
    expect(dom0.host.sysctl(0, dom0.bytes.length - 10)).toBe(-Errno.EFAULT)
    expect(dom0.sysctl({ cmd: Sub.Freeze, cli_id: 1 })).toBe(0)
    expect(host.clients.get(1)!.isFrozen).toBe(true)
    const old = setting('4.5')
    expect(old.host.sysctl(0, 0)).toBe(-Errno.ENOSYS)
  })
})

describe.each((['4.0', '4.2', '4.5', '4.6', '4.8', '4.9'] as const).map((release) => ({ release })))(
  'common sub-operations of $release',
  ({ release }) => {
    const isNew = release === '4.8' || release === '4.9'
    const value = isNew ? 'arg2' : 'arg1'

    test('freeze, thaw, destroy', () => {
      const { dom0, host } = setting(release)
      const client = host.clients.get(1)!
      for (const id of [1, all]) {
        expect(dom0.control(Sub.Freeze, { cli_id: id })).toBe(0)
        expect(client.isFrozen).toBe(true)
        expect(dom0.control(Sub.Thaw, { cli_id: id })).toBe(0)
        expect(client.isFrozen).toBe(false)
        client.isFrozen = true
        // It only thaws.
        expect(dom0.control(Sub.Destroy, { cli_id: id })).toBe(0)
        expect(client.isFrozen).toBe(false)
      }
      for (const sub of [Sub.Freeze, Sub.Thaw, Sub.Destroy]) expect(dom0.control(sub, { cli_id: 9 })).toBe(-1)
      for (const sub of [22, 29, 31, 34, 1000, 2 ** 32 - 1]) expect(dom0.control(sub, { cli_id: 1 })).toBe(-1)
    })

    test('freeable and flush', () => {
      const { dom0, guest } = setting(release)
      for (let n = 0; n < 8; n++) guest.put(1, 1n, n, n)
      expect(dom0.control(Sub.QueryFreeable)).toBe(0)
      expect(dom0.control(Sub.Flush, { cli_id: 1, [value]: 4 })).toBe(-1)
      expect(dom0.control(Sub.Flush, { cli_id: all, [value]: 0 })).toBe(0)
      // Compressed pages are small: all of them are less than one page, and what is left over counts later.
      const freed = dom0.control(Sub.Flush, { cli_id: all, [value]: 64 }) as number
      expect(freed % 4).toBe(0)
      expect(guest.get(1, 1n, 7)).toBe(-Errno.EEMPTY)
    })

    test('LIST: fields, order, and a buffer that is too small', () => {
      const { dom0, guest, host } = setting(release)
      guest.put(0, 1n, 1, 5)
      guest.get(0, 1n, 1)
      guest.get(0, 1n, 2)
      const cap = isNew ? '' : ',ca:0'
      expect(dom0.control(Sub.List, { cli_id: 1, arg1: 32768, buf })).toBe(0)
      const short = [
        `C=CI:1,ww:0${cap},co:1,fr:0,Tc:0,Ge:0,Pp:1,Gp:1`,
        'P=CI:1,PI:0,PT:PP,U0:0,U1:0',
        'P=CI:1,PI:1,PT:EP,U0:0,U1:0',
        '',
      ].join('\n')
      expect(dom0.text(buf)).toBe(short)
      expect(dom0.control(Sub.List, { cli_id: 1, arg1: 32768, arg2: 1, buf })).toBe(0)
      expect(dom0.text(buf)).toContain(
        'P=CI:1,PI:0,PT:PP,U0:0,U1:0,Pc:1,Pm:1,Oc:1,Om:1,Nc:0,Nm:0,ps:1,pt:1,pd:0,pr:0,px:0,gs:1,gt:2,fs:0,ft:0,os:0,ot:0\n',
      )
      expect(dom0.control(Sub.List, { cli_id: all, arg1: 32768, arg2: 1, buf })).toBe(0)
      const lines = dom0.text(buf).split('\n')
      expect(lines.map((line) => line[0]).join('')).toBe(release === '4.0' || release === '4.2' ? 'GCPP' : 'GCPPT')
      expect(lines[0]).toMatch(
        /^G=Tt:\d+,Te:0,Cf:0,Af:0,Pf:0,Ta:0,Lm:0,Et:0,Ea:0,Rt:0,Ra:0,Rx:0,Fp:0,Ec:0,Em:0,Oc:1,Om:1,/,
      )
      // As long as the text and a zero, and shorter byte by byte: whole lines, and nothing behind them.
      for (let length = 0; length <= short.length + 2; length++) {
        dom0.bytes.fill(0xee, buf, buf + 4096)
        expect(dom0.control(Sub.List, { cli_id: 1, arg1: length, buf })).toBe(0)
        const end = dom0.bytes.indexOf(0xee, buf) - buf
        expect(end).toBeLessThanOrEqual(length)
        const text = Buffer.from(dom0.bytes.subarray(buf, buf + Math.max(0, end - 1))).toString()
        expect(short.startsWith(text)).toBe(true)
        expect(text === '' || text.endsWith('\n')).toBe(true)
        expect(text === short).toBe(length > short.length)
      }
      expect(dom0.control(Sub.List, { cli_id: 9, arg1: 32768, buf })).toBe(-1)
      expect(dom0.control(Sub.List, { cli_id: 1, arg1: 32768, buf: 2 ** 31 })).toBe(-Errno.EFAULT)
      expect(host.clients.size).toBe(1)
    })
  },
)

test('shared pools in LIST, and the head that the original repeated', () => {
  for (const defects of ['mended', 'original'] as const) {
    const { dom0, guest } = setting('4.8', defects)
    guest.newPool(flags.shared, uuid)
    guest.newPool(flags.shared, 5n)
    dom0.control(Sub.List, { cli_id: all, arg1: 32768, buf })
    const shared = dom0
      .text(buf)
      .split('\n')
      .filter((line) => line.startsWith('S='))
    expect(shared).toEqual([
      'S=SI:0,PT:ES,U0:fedcba9876543210,U1:123456789abcdef,SC:1',
      defects === 'mended' ? 'S=SI:1,PT:ES,U0:5,U1:0,SC:1' : 'S=SI:0,PT:ES,U0:fedcba9876543210,U1:123456789abcdef,SC:1',
    ])
  }
})

describe('up to 4.7', () => {
  test('weight, cap, compression', () => {
    for (const release of ['4.2', '4.6'] as const) {
      const { dom0, host } = setting(release)
      const client = host.clients.get(1)!
      expect(dom0.control(Sub.SetWeight, { cli_id: 1, arg1: 2 ** 32 - 1 })).toBe(0)
      expect(dom0.control(Sub.SetCap, { cli_id: all, arg1: 7 })).toBe(0)
      expect(dom0.control(Sub.SetCompress, { cli_id: all, arg1: 0 })).toBe(0)
      expect([client.weight, client.cap, client.compress]).toEqual([2 ** 32 - 1, 7, false])
      for (const sub of [Sub.SetWeight, Sub.SetCap, Sub.SetCompress])
        expect(dom0.control(sub, { cli_id: 3, arg1: 1 })).toBe(-1)
      // A real -1 is told as -2.
      expect(dom0.control(Sub.SaveGetWeight, { cli_id: 1 })).toBe(-2)
      expect(dom0.control(Sub.SaveGetCap, { cli_id: 1 })).toBe(7)
      const { host: empty } = world({ release })
      expect(new Guest(empty, 0).control(Sub.SetCompress, { cli_id: all, arg1: 1 })).toBe(release === '4.2' ? 0 : -1)
    }
  })

  test('what a save asks for', () => {
    const { dom0, host } = setting('4.5')
    expect(dom0.control(Sub.SaveGetVersion)).toBe(1)
    expect(dom0.control(Sub.SaveGetMaxPools)).toBe(16)
    expect(dom0.control(Sub.SaveGetFlags, { cli_id: 1 })).toBe(1)
    host.freeze(host.clients.get(1)!, true)
    expect(dom0.control(Sub.SaveBegin, { cli_id: 1 })).toBe(1)
    expect(dom0.control(Sub.SaveGetFlags, { cli_id: 1 })).toBe(3)
    expect(dom0.control(Sub.SaveBegin, { cli_id: 7 })).toBe(0)
    expect(dom0.control(Sub.SaveGetPoolFlags, { cli_id: 1, pool_id: 0 })).toBe(0x01000001)
    expect(dom0.control(Sub.SaveGetPoolPages, { cli_id: 1, pool_id: 1 })).toBe(0)
    for (const pool of [2, 15, 16, -1])
      for (const sub of [Sub.SaveGetPoolFlags, Sub.SaveGetPoolPages, Sub.SaveGetPoolUuid])
        expect(dom0.control(sub, { cli_id: 1, pool_id: pool, buf })).toBe(-1)
    expect(dom0.control(Sub.SaveGetPoolUuid, { cli_id: 1, pool_id: 0, buf })).toBe(0)
    expect(dom0.control(Sub.SaveEnd, { cli_id: 1 })).toBe(0)
    expect(host.clients.get(1)!.isFrozen).toBe(true)
    expect(dom0.control(Sub.SaveEnd, { cli_id: 7 })).toBe(-1)
    expect(dom0.control(Sub.RestoreBegin, { cli_id: 1 })).toBe(-1)
    const fresh = new Guest(host, 8)
    expect(dom0.control(Sub.RestoreBegin, { cli_id: 8 })).toBe(1)
    expect(dom0.control(Sub.RestoreBegin, { cli_id: 9 })).toBe(-1)
    expect(dom0.call('creat', { cmd: Command.RestoreNew, arg1: 8, pool_id: 5, flags: flags.persistent })).toBe(5)
    expect(dom0.call('creat', { cmd: Command.RestoreNew, arg1: 8, pool_id: 5, flags: flags.persistent })).toBe(
      -Errno.EPERM,
    )
    for (const slot of [16, -1, 2 ** 31 - 1])
      expect(dom0.call('creat', { cmd: Command.RestoreNew, arg1: 8, pool_id: slot, flags: flags.persistent })).toBe(
        -Errno.EPERM,
      )
    expect(dom0.call('creat', { cmd: Command.RestoreNew, arg1: 9, pool_id: 0, flags: flags.persistent })).toBe(
      -Errno.EPERM,
    )
    expect(fresh.put(5, 1n, 1, 1)).toBe(1)
  })

  test('the missing break of 4.0: asking for a uuid ended the save', () => {
    for (const defects of ['mended', 'original'] as const) {
      const { dom0, host } = setting('4.0', defects)
      dom0.control(Sub.SaveBegin, { cli_id: 1, arg1: 1 })
      expect(dom0.control(Sub.SaveGetPoolUuid, { cli_id: 1, pool_id: 0, buf })).toBe(0)
      expect(host.clients.get(1)!.isMigrating).toBe(defects === 'mended')
      expect(host.clients.get(1)!.isFrozen).toBe(defects === 'mended')
      expect(dom0.control(Sub.SaveGetPoolFlags, { cli_id: 1, pool_id: 0 })).toBe(defects === 'mended' ? 0x01000001 : 1)
    }
  })
})

describe('4.8 and later', () => {
  const info = (dom0: Guest, fields: Record<string, number>): void => dom0.write(clientInfoLayout, fields, buf)

  test('client information', () => {
    const { dom0, host } = setting('4.9')
    const client = host.clients.get(1)!
    host.freeze(client, true)
    expect(dom0.control(Sub.GetClientInfo, { cli_id: 1, buf })).toBe(0)
    expect([...new Uint32Array(dom0.bytes.slice(buf, buf + 20).buffer)]).toEqual([1, 16, 2, 3, 0])
    expect(dom0.control(Sub.GetClientInfo, { cli_id: 99, buf })).toBe(0)
    expect([...new Uint32Array(dom0.bytes.slice(buf, buf + 20).buffer)]).toEqual([1, 16, 0, 0, 0])
    expect(dom0.control(Sub.GetClientInfo, { cli_id: 1, buf: 2 ** 40 })).toBe(-Errno.EFAULT)
    const set = (id: number, at = buf): unknown => dom0.control(Sub.SetClientInfo, { cli_id: id, buf: at })
    info(dom0, { version: 2, maxpools: 99 })
    expect(set(99)).toBe(-Errno.ENOENT)
    expect(set(1, 2 ** 40)).toBe(-Errno.EFAULT)
    expect(set(1)).toBe(-Errno.EOPNOTSUPP)
    info(dom0, { version: 1, maxpools: 17 })
    expect(set(1)).toBe(-Errno.ERANGE)
    info(dom0, { version: 1, maxpools: 16, flags: 0, weight: 250 })
    expect(set(all)).toBe(0)
    // Frozen is not set by it.
    expect([client.weight, client.compress, client.isFrozen]).toEqual([250, false, true])
    const { host: empty } = world()
    const alone = new Guest(empty, 0, 64, 32)
    info(alone, { version: 1 })
    expect(alone.control(Sub.SetClientInfo, { cli_id: all, buf })).toBe(-Errno.ENOENT)
  })

  test('arrays of pools', () => {
    const { dom0, guest, host } = setting('4.9')
    guest.put(0, 1n, 1, 1)
    const get = (length: number, id = 1, at = buf): unknown =>
      dom0.control(Sub.GetPools, { cli_id: id, arg1: length, buf: at })
    expect(get(33)).toBe(-Errno.EINVAL)
    expect(get(17 * 32)).toBe(-Errno.E2BIG)
    expect(get(32, 99)).toBe(-Errno.EINVAL)
    expect(get(32, 1, 2 ** 40)).toBe(-Errno.EFAULT)
    expect(get(16 * 32)).toBe(2)
    expect([...new Uint32Array(dom0.bytes.slice(buf, buf + 48).buffer)]).toEqual([
      0x01000001, 0, 1, 0, 0, 0, 0, 0, 0x01000000, 1, 0, 0,
    ])
    expect([get(32), get(0)]).toEqual([1, 1])

    const set = (sub: number, entries: readonly Record<string, number | readonly bigint[]>[], id = 8): unknown => {
      for (const [n, entry] of entries.entries()) dom0.write(poolInfoLayout, entry, buf + n * 32)
      return dom0.control(sub, { cli_id: id, arg1: entries.length * 32, buf })
    }
    expect(set(Sub.SetPools, [{ flags: flags.persistent, id: 3 }])).toBe(-Errno.ENOMEM)
    const fresh = new Guest(host, 8)
    expect(
      set(Sub.SetPools, [
        { flags: flags.persistent, id: 0 },
        { flags: flags.ephemeral, id: 4 },
      ]),
    ).toBe(4)
    expect(
      set(Sub.SetPools, [
        { flags: flags.persistent, id: 5 },
        { flags: 0, id: 6 },
        { flags: flags.persistent, id: 7 },
      ]),
    ).toBe(-Errno.EPERM)
    expect(set(Sub.SetPools, [{ flags: flags.persistent, id: 6, n_pages: 1 }])).toBe(-Errno.EINVAL)
    expect(set(Sub.SetPools, [{ flags: flags.persistent, id: 16 }])).toBe(-Errno.EPERM)
    expect(
      host.clients
        .get(8)!
        .slots.map((pool) => (pool === undefined ? '.' : 'x'))
        .join(''),
    ).toBe('x...xx..........')

    const words = [BigInt.asUintN(64, uuid), uuid >> 64n]
    expect(
      set(Sub.SetAuth, [
        { flags: 4, uuid: words },
        { flags: 4, uuid: [7n, 7n] },
      ]),
    ).toBe(1)
    expect(host.clients.get(8)!.slots[fresh.newPool(flags.shared, uuid)]!.isShared).toBe(true)
    expect(set(Sub.SetAuth, [{ flags: 0, uuid: words }])).toBe(1)
    // The result of the last one is 0: then the number of entries is told.
    expect(set(Sub.SetAuth, [{ flags: 0, uuid: words }])).toBe(1)
    expect(host.clients.get(8)!.slots[fresh.newPool(flags.shared, uuid)]!.isShared).toBe(false)
    expect(set(Sub.SetAuth, [{ flags: 4 }], all)).toBe(1)
    expect(host.everybodyShares).toBe(true)
    const old = setting('4.9', 'original')
    old.dom0.write(poolInfoLayout, { flags: 4 }, buf)
    expect(old.dom0.control(Sub.SetAuth, { cli_id: all, arg1: 32, buf })).toBe(-Errno.ENOMEM)
    expect(setting('4.8').dom0.control(Sub.SetPools, { cli_id: 1, arg1: 32, buf })).toBe(-1)
  })

  test('saving and restoring answer with error numbers', () => {
    const { dom0, guest } = setting('4.9')
    guest.put(0, 2n ** 130n, 9, 5)
    expect(dom0.control(Sub.SaveBegin, { cli_id: 99 })).toBe(-Errno.ENOENT)
    expect(dom0.control(Sub.SaveEnd, { cli_id: 99 })).toBe(-Errno.ENOENT)
    expect(dom0.control(Sub.RestoreBegin, { cli_id: 1 })).toBe(-Errno.EEXIST)
    expect(dom0.control(Sub.RestoreBegin, { cli_id: 99 })).toBe(-Errno.ENOMEM)
    expect(dom0.control(Sub.SaveBegin, { cli_id: 1, arg2: 1 })).toBe(0)
    const next = (pool: number, length: number, at = buf): unknown =>
      dom0.control(Sub.SaveGetNextPage, { cli_id: 1, pool_id: pool, arg1: length, buf: at })
    expect([next(1, 4128), next(2, 4128), next(16, 4128), next(0, 4127)]).toEqual([-1, -1, -1, -Errno.ENOMEM])
    expect(next(0, 4128)).toBe(1)
    const view = new DataView(dom0.bytes.buffer, buf)
    expect([
      view.getUint32(0, true),
      view.getUint32(4, true),
      view.getBigUint64(8, true),
      view.getBigUint64(24, true),
      view.getUint8(32),
    ]).toEqual([0, 9, 0n, 4n, 5])
    expect([next(0, 4128), next(0, 4128)]).toEqual([-1, -1])
    // A page that is flushed, or put anew, has to go at the other machine, too; once it is told it begins anew.
    expect(guest.put(0, 2n ** 130n, 9, 6)).toBe(-Errno.ENOSPC)
    expect(guest.put(0, 5n, 9, 6)).toBe(-Errno.EFROZEN)
    const gone = (length = 32): unknown => dom0.control(Sub.SaveGetNextInvalidation, { cli_id: 1, arg1: length, buf })
    expect([gone(31), gone(), gone(), gone(), gone()]).toEqual([0, 1, 0, 1, 0])
    expect(dom0.control(Sub.SaveEnd, { cli_id: 1 })).toBe(0)
    expect(gone()).toBe(0)
    const put = (length: number, pool: number, at = buf): unknown =>
      dom0.control(Sub.RestorePutPage, { cli_id: 1, pool_id: pool, arg1: length, arg2: 9, oid: [1n, 0n, 0n], buf: at })
    expect([put(4096, 9), put(4095, 0), put(4096, 0, 2 ** 40)]).toEqual([-1, -Errno.EINVAL, -Errno.EFAULT])
    dom0.bytes.fill(8, buf, buf + 4096)
    expect(put(4096, 0)).toBe(1)
    expect(guest.get(0, 1n, 9)).toBe(8)
    expect(dom0.control(Sub.RestoreFlushPage, { cli_id: 1, pool_id: 0, arg2: 9, oid: [1n, 0n, 0n] })).toBe(1)
    expect(dom0.control(Sub.RestoreFlushPage, { cli_id: 1, pool_id: 9 })).toBe(-1)
  })
})

describe('pages that lie on a disk', () => {
  const withFile = async (): Promise<{ host: XenHost; guest: Guest; sink: () => Promise<unknown> }> => {
    const folder = mkdtempSync(join(tmpdir(), 'tmem-xen-'))
    const store = compose([
      zcache({ limitBytes: '1MiB' }),
      frontswap({ file: join(folder, 'swap'), sizeBytes: '4MiB' }),
    ])
    onTestFinished(async () => {
      await store.close()
      rmSync(folder, { recursive: true })
    })
    await store.ready?.()
    const host = new XenHost({ store })
    const guest = new Guest(host, 1)
    guest.newPool(flags.persistent)
    for (let n = 0; n < 4; n++) guest.put(0, 1n, n, n + 1)
    const sink = (): Promise<unknown> =>
      host.clients.get(1)!.slots[0]!.pool.sink!(1, Uint32Array.of(0, 1, 2, 3), 4, true)
    await sink()
    return { host, guest, sink }
  }

  test('are waited for', async () => {
    const { guest } = await withFile()
    const answer = guest.ask(Command.GetPage, 0, 1n, 2, firstFrame + 1)
    expect(answer).toBeInstanceOf(Promise)
    expect(await answer).toBe(1)
    expect(guest.bytes[(firstFrame + 1) * 4096]).toBe(3)
  })

  test('a domain that is killed meanwhile learns nothing, and its memory is left alone', async () => {
    const { host, guest } = await withFile()
    const frame = guest.memory.frame(firstFrame + 1)!.fill(0xaa)
    const answer = guest.ask(Command.GetPage, 0, 1n, 2, firstFrame + 1)
    host.killDomain(1)
    expect(await answer).toBe(-Errno.ENODEV)
    expect(frame.every((byte) => byte === 0xaa)).toBe(true)
  })

  test('a frame that goes meanwhile is answered, and nothing is written', async () => {
    const { guest } = await withFile()
    const answer = guest.ask(Command.GetPage, 0, 1n, 2, firstFrame + 1)
    guest.memory.map(firstFrame + 1, -1)
    expect(await answer).toBe(-Errno.EFAULT)
    expect(await guest.ask(Command.GetPage, 0, 1n, 2, firstFrame)).toBe(1)
  })
})
