/**
 * Raw structures as a guest or a toolstack writes them, byte for byte, with what is in them. Put together by hand from
 * the tables of the reference, not by the code that is tested: a space is only there for the eye.
 */
import type { Bits, Release } from '../src/index.ts'

export interface Vector {
  readonly name: string
  readonly release: Release
  readonly bits: Bits
  /** The arm of tmem_op, or another structure. */
  readonly kind: 'creat' | 'ctrl' | 'gen' | 'handle' | 'sysctl' | 'client' | 'pool'
  readonly hex: string
  /** By field: its integers. */
  readonly fields: Readonly<Record<string, readonly (number | bigint)[]>>
}

const zeros = (bytes: number): string => '00'.repeat(bytes)

export const vectors: readonly Vector[] = [
  {
    name: 'NEW_POOL, shared ephemeral, 64-bit',
    release: '4.9',
    bits: 64,
    kind: 'creat',
    hex: `01000000 00000000 efcdab8967452301 1032547698badcfe 02000001 00000000 ${zeros(24)}`,
    fields: {
      cmd: [1],
      pool_id: [0],
      uuid: [0x0123456789abcdefn, 0xfedcba9876543210n],
      flags: [0x01000002],
      arg1: [0],
    },
  },
  {
    name: 'RESTORE_NEW for domain 5, slot 3, 32-bit',
    release: '4.5',
    bits: 32,
    kind: 'creat',
    hex: `66000000 03000000 ${zeros(16)} 01000001 05000000 ${zeros(20)}`,
    fields: { cmd: [102], pool_id: [3], uuid: [0n, 0n], flags: [0x01000001], arg1: [5] },
  },
  {
    name: 'PUT_PAGE, all fields set, 64-bit',
    release: '4.9',
    bits: 64,
    kind: 'gen',
    hex: '04000000 0f000000 0100000000000080 0200000000000000 0300000000000000 78563412 11000000 22000000 33000000 44332211 88776655',
    fields: {
      cmd: [4],
      pool_id: [15],
      oid: [0x8000000000000001n, 2n, 3n],
      index: [0x12345678],
      tmem_offset: [0x11],
      pfn_offset: [0x22],
      len: [0x33],
      cmfn: [0x5566778811223344n],
    },
  },
  {
    name: 'GET_PAGE of pool -1, 32-bit',
    release: '4.2',
    bits: 32,
    kind: 'gen',
    hex: '05000000 ffffffff 2a00000000000000 0000000000000000 0000000000000000 07000000 00000000 00000000 00100000 cdab0000',
    fields: {
      cmd: [5],
      pool_id: [-1],
      oid: [42n, 0n, 0n],
      index: [7],
      tmem_offset: [0],
      pfn_offset: [0],
      len: [4096],
      cmfn: [0xabcd],
    },
  },
  {
    name: 'CONTROL: LIST of all, long, 64-bit',
    release: '4.5',
    bits: 64,
    kind: 'ctrl',
    hex: `00000000 00000000 04000000 ffff0000 00800000 01000000 ${zeros(24)} 0010000000000000`,
    fields: {
      cmd: [0],
      pool_id: [0],
      subop: [4],
      cli_id: [0xffff],
      arg1: [32768],
      arg2: [1],
      oid: [0n, 0n, 0n],
      buf: [0x1000n],
    },
  },
  {
    name: 'CONTROL: RESTORE_PUT_PAGE, 32-bit',
    release: '4.0',
    bits: 32,
    kind: 'ctrl',
    hex: '00000000 02000000 20000000 07000000 00100000 09000000 0500000000000000 0600000000000000 0700000000000000 00f0ff0f',
    fields: {
      cmd: [0],
      pool_id: [2],
      subop: [32],
      cli_id: [7],
      arg1: [4096],
      arg2: [9],
      oid: [5n, 6n, 7n],
      buf: [0x0ffff000],
    },
  },
  {
    name: 'PUT_PAGE of 4.0.0, 64-bit: an object id of one word',
    release: '4.0.0',
    bits: 64,
    kind: 'gen',
    hex: '04000000 00000000 efcdab8967452301 0a000000 00000000 00000000 00000000 0c00000000000000',
    fields: {
      cmd: [4],
      pool_id: [0],
      oid: [0x0123456789abcdefn],
      index: [10],
      tmem_offset: [0],
      pfn_offset: [0],
      len: [0],
      cmfn: [12n],
    },
  },
  {
    name: 'CONTROL of 4.0.0, 32-bit: FREEZE',
    release: '4.0.0',
    bits: 32,
    kind: 'ctrl',
    hex: '00000000 00000000 01000000 03000000 00000000 00000000 1100000000000000 00000000',
    fields: { cmd: [0], pool_id: [0], subop: [1], cli_id: [3], arg1: [0], arg2: [0], oid: [0x11n], buf: [0] },
  },
  {
    name: 'a handle',
    release: '4.9',
    bits: 64,
    kind: 'handle',
    hex: '01000000 02000000 0300000000000000 0400000000000000 0500000000000000',
    fields: { pool_id: [1], index: [2], oid: [3n, 4n, 5n] },
  },
  {
    name: 'a handle of 4.0.0',
    release: '4.0.0',
    bits: 64,
    kind: 'handle',
    hex: '01000000 02000000 0300000000000000',
    fields: { pool_id: [1], index: [2], oid: [3n] },
  },
  {
    name: 'sysctl body: RESTORE_PUT_PAGE',
    release: '4.9',
    bits: 64,
    kind: 'sysctl',
    hex: '20000000 01000000 05000000 00100000 0d000000 00000000 0100000000000000 0200000000000000 0300000000000000 0020000000000000',
    fields: {
      cmd: [32],
      pool_id: [1],
      cli_id: [5],
      arg1: [4096],
      arg2: [13],
      pad: [0],
      oid: [1n, 2n, 3n],
      buffer: [0x2000n],
    },
  },
  {
    name: 'client information: compressed and frozen, weight 250',
    release: '4.9',
    bits: 64,
    kind: 'client',
    hex: '01000000 10000000 02000000 03000000 fa000000',
    fields: { version: [1], maxpools: [16], nr_pools: [2], flags: [3], weight: [250] },
  },
  {
    name: 'pool information: slot 4, persistent, 2^33 pages',
    release: '4.9',
    bits: 64,
    kind: 'pool',
    hex: '01000001 04000000 0000000002000000 1111111111111111 2222222222222222',
    fields: { flags: [0x01000001], id: [4], n_pages: [2n ** 33n], uuid: [0x1111111111111111n, 0x2222222222222222n] },
  },
]

/** The bytes of a vector. */
export const bytesOf = ({ hex }: Vector): Uint8Array<ArrayBuffer> =>
  Uint8Array.from(hex.replaceAll(' ', '').match(/../g)!, (pair) => Number.parseInt(pair, 16))
