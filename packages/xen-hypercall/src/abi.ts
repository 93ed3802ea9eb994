/**
 * The numbers and layouts of Xen's tmem interface, as data: commands, sub-operations, flags, error numbers, and where
 * each field of each structure lies, by release and by the width of the guest.
 *
 * Invariant: nothing else in this package knows an offset. The tests compare the layouts with what a C compiler says of
 * the public header, and of declarations of our own where no header has them any more.
 *
 * Source: the reference notes on the hypercall and toolstack ABI, §2, §3 and §5; all integers are little endian.
 */
import type { ObjectId } from '@tmem/core'

/** Releases whose behaviour can be chosen. `4.0` stands for 4.0.2 and later, which speak another ABI than `4.0.0`. */
export const releases = [
  '4.0.0',
  '4.0',
  '4.1',
  '4.2',
  '4.3',
  '4.4',
  '4.5',
  '4.6',
  '4.7',
  '4.8',
  '4.9',
  '4.10',
  '4.11',
  '4.12',
] as const
/** A release of Xen; `4.1` and `4.2` are those with the corrections of September 2012 (4.1.4, 4.2.1). */
export type Release = (typeof releases)[number]
/** The release that is emulated unless another one is asked for: the interface as it was for the last three years. */
export const defaultRelease: Release = '4.9'

/** Whether `release` is `other` or came later. */
export const isSince = (release: Release, other: Release): boolean =>
  releases.indexOf(release) >= releases.indexOf(other)

/** Number of the tmem hypercall, and of the one that administers the machine. */
export const tmemHypercall = 38
export const sysctlHypercall = 35
/** `cmd` of the sysctl that administers tmem. */
export const sysctlTmem = 24
/** Pools of a client, and shared pools in all. */
export const maxPools = 16
/** Client number that means all of them. */
export const allClients = 0xffff
export const pageBytes = 4096

/** Commands of the hypercall. */
export const Command = {
  Control: 0,
  NewPool: 1,
  DestroyPool: 2,
  NewPage: 3,
  PutPage: 4,
  GetPage: 5,
  FlushPage: 6,
  FlushObject: 7,
  Read: 8,
  Write: 9,
  Exchange: 10,
  Auth: 101,
  RestoreNew: 102,
} as const
export type Command = (typeof Command)[keyof typeof Command]

/** Sub-operations of control. Some numbers mean one thing up to 4.7 and another, or nothing, from 4.8 on. */
export const SubOperation = {
  Thaw: 0,
  Freeze: 1,
  Flush: 2,
  Destroy: 3,
  List: 4,
  /** Up to 4.7. */
  SetWeight: 5,
  SetCap: 6,
  SetCompress: 7,
  /** From 4.8 on. */
  GetClientInfo: 5,
  SetClientInfo: 6,
  GetPools: 7,
  QueryFreeable: 8,
  /** From 4.9 on. */
  SetPools: 9,
  SaveBegin: 10,
  /** Up to 4.7. */
  SaveGetVersion: 11,
  SaveGetMaxPools: 12,
  SaveGetWeight: 13,
  SaveGetCap: 14,
  SaveGetFlags: 15,
  SaveGetPoolFlags: 16,
  SaveGetPoolPages: 17,
  SaveGetPoolUuid: 18,
  /** From 4.9 on. */
  SetAuth: 11,
  SaveGetNextPage: 19,
  SaveGetNextInvalidation: 20,
  SaveEnd: 21,
  RestoreBegin: 30,
  RestorePutPage: 32,
  RestoreFlushPage: 33,
} as const

/** Error numbers; a hypercall returns them negated. */
export const Errno = {
  EPERM: 1,
  ENOENT: 2,
  E2BIG: 7,
  ENOMEM: 12,
  EACCES: 13,
  EFAULT: 14,
  EEXIST: 17,
  ENODEV: 19,
  EINVAL: 22,
  ENOSPC: 28,
  ERANGE: 34,
  ENOSYS: 38,
  EOPNOTSUPP: 95,
  EFROZEN: 1000,
  EEMPTY: 1001,
} as const

/** Bits of the flags of NEW_POOL; bit 3 has no name, and is not among those that must be zero. */
export const PoolBit = { Persistent: 1, Shared: 2, Precompressed: 4, Reserved: 0x00ffff00 } as const
export const pageSizeShift = 4
export const versionShift = 24

/** Bits of the client flags in the streams of 4.0 to 4.7. */
export const OldClientBit = { Compress: 1, FrozenBefore: 2 } as const
/** Bits of `flags` in the client information of 4.8 and later: the first two have changed places. */
export const ClientBit = { Frozen: 1, Compress: 2, Migrating: 4 } as const

/** Width of a guest. */
export type Bits = 32 | 64

/** A field: an integer, or several of 8 bytes one after the other. */
export interface Field {
  /** Bytes from the start of the structure. */
  readonly at: number
  readonly bytes: 4 | 8
  readonly signed?: true
  /** Integers, one after the other (default 1). */
  readonly count?: number
}

/** A structure: its bytes, and its fields by name. */
export interface Layout<Name extends string = string> {
  readonly bytes: number
  readonly fields: Readonly<Record<Name, Field>>
}

const u32 = (at: number): Field => ({ at, bytes: 4 })
const s32 = (at: number): Field => ({ at, bytes: 4, signed: true })
const u64 = (at: number, count?: number): Field => (count === undefined ? { at, bytes: 8 } : { at, bytes: 8, count })
const address = (at: number, bits: Bits): Field => ({ at, bytes: bits === 64 ? 8 : 4 })

/** The arms of the union in `tmem_op`. */
export interface OperationLayouts {
  readonly creat: Layout<'cmd' | 'pool_id' | 'uuid' | 'flags' | 'arg1'>
  /** Up to 4.5; in 4.0.0 the object id is one word, `arg3`. */
  readonly ctrl: Layout<'cmd' | 'pool_id' | 'subop' | 'cli_id' | 'arg1' | 'arg2' | 'oid' | 'buf'> | undefined
  readonly gen: Layout<'cmd' | 'pool_id' | 'oid' | 'index' | 'tmem_offset' | 'pfn_offset' | 'len' | 'cmfn'>
}

/** `struct tmem_op` of a release, for guests of a width. */
export function operationLayouts(release: Release, bits: Bits): OperationLayouts {
  const head = { cmd: u32(0), pool_id: s32(4) }
  const creat = { ...head, uuid: u64(8, 2), flags: u32(24), arg1: u32(28) }
  const ctrl = { ...head, subop: u32(8), cli_id: u32(12), arg1: u32(16), arg2: u32(20) }
  if (release === '4.0.0') {
    const bytes = bits === 64 ? 40 : 36
    return {
      creat: { bytes, fields: creat },
      ctrl: { bytes, fields: { ...ctrl, oid: u64(24), buf: address(32, bits) } },
      gen: {
        bytes,
        fields: {
          ...head,
          oid: u64(8),
          index: u32(16),
          tmem_offset: u32(20),
          pfn_offset: u32(24),
          len: u32(28),
          cmfn: address(32, bits),
        },
      },
    }
  }
  const bytes = bits === 64 ? 56 : 52
  return {
    creat: { bytes, fields: creat },
    ctrl: isSince(release, '4.6') ? undefined : { bytes, fields: { ...ctrl, oid: u64(24, 3), buf: address(48, bits) } },
    gen: {
      bytes,
      fields: {
        ...head,
        oid: u64(8, 3),
        index: u32(32),
        tmem_offset: u32(36),
        pfn_offset: u32(40),
        len: u32(44),
        cmfn: address(48, bits),
      },
    },
  }
}

/** `struct tmem_handle`: what names a page in buffers of control. */
export const handleLayout = (release: Release): Layout<'pool_id' | 'index' | 'oid'> =>
  release === '4.0.0'
    ? { bytes: 16, fields: { pool_id: u32(0), index: u32(4), oid: u64(8) } }
    : { bytes: 32, fields: { pool_id: u32(0), index: u32(4), oid: u64(8, 3) } }

/** The head of the sysctl structure: the body of tmem begins at `body`. */
export const sysctlHead: Layout<'cmd' | 'interface_version' | 'body'> = {
  bytes: 8 + 128,
  fields: { cmd: u32(0), interface_version: u32(4), body: u64(8, 16) },
}

/**
 * Body of the sysctl, the same for both widths. Up to 4.7 the fourth and fifth field are called arg1 and arg2, from 4.8
 * on len and arg.
 */
export const sysctlLayout: Layout<'cmd' | 'pool_id' | 'cli_id' | 'arg1' | 'arg2' | 'pad' | 'oid' | 'buffer'> = {
  bytes: 56,
  fields: {
    cmd: u32(0),
    pool_id: s32(4),
    cli_id: u32(8),
    arg1: u32(12),
    arg2: u32(16),
    pad: u32(20),
    oid: u64(24, 3),
    buffer: u64(48),
  },
}

/** Interface version that a sysctl must say; `undefined`: the release has control in the hypercall. */
export const interfaceVersion = (release: Release): number | undefined =>
  isSince(release, '4.6') ? 0xc + releases.indexOf(release) - releases.indexOf('4.6') : undefined

/** Information on a client, from 4.8 on. */
export const clientInfoLayout: Layout<'version' | 'maxpools' | 'nr_pools' | 'flags' | 'weight'> = {
  bytes: 20,
  fields: { version: u32(0), maxpools: u32(4), nr_pools: u32(8), flags: u32(12), weight: u32(16) },
}

/** Information on a pool, from 4.8 on. Bit 2 of its flags means "auth" (from 4.9 on). */
export const poolInfoLayout: Layout<'flags' | 'id' | 'n_pages' | 'uuid'> = {
  bytes: 32,
  fields: { flags: u32(0), id: u32(4), n_pages: u64(8), uuid: u64(16, 2) },
}

/** The id that names no object: all bits set. */
export const invalidObject: bigint = (1n << 192n) - 1n

/**
 * Object ids as they lie in memory: three words of 64 bits, the lowest first (one in 4.0.0). All bits set, in that one
 * word too, is `invalidObject`.
 */
export function readObject(view: DataView, { at, count = 1 }: Field): ObjectId | typeof invalidObject {
  const low = view.getUint32(at, true)
  const high = view.getUint32(at + 4, true)
  let rest = 0
  for (let word = at + 8; word < at + count * 8; word += 4) rest |= view.getUint32(word, true)
  if (rest === 0 && high < 0x200000) return high * 2 ** 32 + low
  let object = 0n
  for (let word = count - 1; word >= 0; word--) object = (object << 64n) | view.getBigUint64(at + word * 8, true)
  return object === (1n << BigInt(count * 64)) - 1n ? invalidObject : object
}

/** Writes an object id as `readObject` reads it; what does not fit the words of the field is cut off. */
export function writeObject(view: DataView, { at, count = 1 }: Field, object: ObjectId): void {
  if (typeof object === 'number') {
    view.setUint32(at, object, true)
    view.setUint32(at + 4, object / 2 ** 32, true)
    for (let word = at + 8; word < at + count * 8; word += 4) view.setUint32(word, 0, true)
    return
  }
  let rest = object
  for (let word = 0; word < count; word++) {
    view.setBigUint64(at + word * 8, rest, true)
    rest >>= 64n
  }
}

/** The first integer of a field; one of 8 bytes beyond 2^53 is rounded. */
export function readField(view: DataView, { at, bytes, signed }: Field): number {
  if (bytes === 4) return signed === true ? view.getInt32(at, true) : view.getUint32(at, true)
  return view.getUint32(at + 4, true) * 2 ** 32 + view.getUint32(at, true)
}

/** Writes the first integer of a field. */
export function writeField(view: DataView, { at, bytes }: Field, value: number): void {
  view.setUint32(at, value, true)
  if (bytes === 8) view.setUint32(at + 4, Math.floor(value / 2 ** 32), true)
}

/** A uuid: two words of 64 bits, the low half first. */
export function readUuid(view: DataView, { at }: Field): bigint {
  return view.getBigUint64(at, true) | (view.getBigUint64(at + 8, true) << 64n)
}

export function writeUuid(view: DataView, { at }: Field, uuid: bigint): void {
  view.setBigUint64(at, uuid, true)
  view.setBigUint64(at + 8, uuid >> 64n, true)
}

/** The uuid that means none: all bits set. */
export const noUuid: bigint = (1n << 128n) - 1n
