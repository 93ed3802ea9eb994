/** The layouts: against vectors written by hand, and against what a C compiler says of headers and declarations. */
import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { unpacked } from '../../../tools/debian-packages.mjs'
import { requires } from '../../../tools/requires.ts'
import {
  type Bits,
  Command,
  clientInfoLayout,
  Errno,
  handleLayout,
  interfaceVersion,
  type Layout,
  operationLayouts,
  PoolBit,
  poolInfoLayout,
  type Release,
  readField,
  readObject,
  releases,
  sysctlHead,
  sysctlLayout,
  writeObject,
} from '../src/index.ts'
import { bytesOf, type Vector, vectors } from './vectors.ts'

const layoutOf = ({ kind, release, bits }: Pick<Vector, 'kind' | 'release' | 'bits'>): Layout => {
  const arms = operationLayouts(release, bits)
  return {
    creat: arms.creat,
    ctrl: arms.ctrl!,
    gen: arms.gen,
    handle: handleLayout(release),
    sysctl: sysctlLayout,
    client: clientInfoLayout,
    pool: poolInfoLayout,
  }[kind]
}

describe('vectors', () => {
  test.each(vectors)('$name', (vector) => {
    const bytes = bytesOf(vector)
    const layout = layoutOf(vector)
    expect(bytes.length).toBe(layout.bytes)
    expect(Object.keys(layout.fields).sort()).toEqual(Object.keys(vector.fields).sort())
    const view = new DataView(bytes.buffer)
    for (const [name, values] of Object.entries(vector.fields)) {
      const field = layout.fields[name]!
      const found: (number | bigint)[] = []
      for (let n = 0; n < (field.count ?? 1); n++) {
        const at = field.at + n * field.bytes
        found.push(field.bytes === 8 ? view.getBigUint64(at, true) : readField(view, { ...field, at }))
      }
      expect([name, ...found]).toEqual([name, ...(field.bytes === 8 ? values.map(BigInt) : values)])
    }
  })

  test('object ids have one form for each value, and come back as they were', () => {
    for (const object of [0, 1, 2 ** 53 - 1, 2n ** 53n, 2n ** 64n - 1n, 2n ** 64n, 2n ** 191n + 5n, 2n ** 192n - 1n]) {
      const bytes = new DataView(new ArrayBuffer(32))
      const field = { at: 8, bytes: 8, count: 3 } as const
      writeObject(bytes, field, object)
      expect(readObject(bytes, field)).toBe(object)
    }
  })

  test('interface versions of the sysctl', () => {
    expect(releases.map((release) => interfaceVersion(release))).toEqual([
      ...new Array<undefined>(7).fill(undefined),
      0xc,
      0xd,
      0xe,
      0xf,
      0x10,
      0x11,
      0x12,
    ])
  })
})

/** Assertions of a layout in C: `path` leads to the members from the structure `type`. */
function assertions(type: string, path: Readonly<Record<string, string>>, { bytes, fields }: Layout): string[] {
  const lines = [`_Static_assert(sizeof(${type}) == ${bytes}, "${type}");`]
  for (const [name, { at, bytes: size, count = 1 }] of Object.entries(fields)) {
    const member = path[name] ?? name
    lines.push(`_Static_assert(offsetof(${type}, ${member}) == ${at}, "${type} ${name}");`)
    lines.push(`_Static_assert(sizeof(((${type} *)0)->${member}) == ${size * count}, "${type} ${name}");`)
  }
  return lines
}

/** Compiles without linking; what the compiler says against it. */
function compile(code: string, words: readonly string[]): string {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-xen-'))
  try {
    writeFileSync(join(folder, 'check.c'), code)
    const run = spawnSync('cc', ['-std=gnu11', '-ffreestanding', '-fsyntax-only', ...words, join(folder, 'check.c')], {
      encoding: 'utf8',
    })
    return run.status === 0 ? '' : `${run.error?.message ?? ''}${run.stderr}`
  } finally {
    rmSync(folder, { recursive: true })
  }
}

/** Members of an arm of tmem_op, by field. */
const inArm = (arm: string, layout: Layout, renamed: Readonly<Record<string, string>> = {}): Record<string, string> => {
  const path: Record<string, string> = {}
  for (const name of Object.keys(layout.fields))
    path[name] = name === 'cmd' || name === 'pool_id' ? name : `u.${arm}.${renamed[name] ?? name}`
  return path
}

/** Our own declarations, for what no header has any more. */
const declarations = `
#include <stddef.h>
#include <stdint.h>
typedef char *handle;
struct op_400 {
  uint32_t cmd; int32_t pool_id;
  union {
    struct { uint64_t uuid[2]; uint32_t flags; uint32_t arg1; } new;
    struct { uint32_t subop, cli_id, arg1, arg2; uint64_t arg3; handle buf; } ctrl;
    struct { uint64_t object; uint32_t index, tmem_offset, pfn_offset, len; unsigned long cmfn; } gen;
  } u;
};
struct op_402 {
  uint32_t cmd; int32_t pool_id;
  union {
    struct { uint64_t uuid[2]; uint32_t flags; uint32_t arg1; } creat;
    struct { uint32_t subop, cli_id, arg1, arg2; uint64_t oid[3]; handle buf; } ctrl;
    struct { uint64_t oid[3]; uint32_t index, tmem_offset, pfn_offset, len; unsigned long cmfn; } gen;
  } u;
};
struct handle_400 { uint32_t pool_id, index; uint64_t object; };
struct handle_402 { uint32_t pool_id, index; uint64_t oid[3]; };
typedef union { handle p; uint64_t __attribute__((aligned(8))) q; } handle64;
struct sysctl_body {
  uint32_t cmd; int32_t pool_id; uint32_t cli_id, arg1, arg2, pad; uint64_t oid[3]; handle64 buffer;
};
struct sysctl { uint32_t cmd, interface_version; union { struct sysctl_body tmem; uint8_t pad[128]; } u; };
struct client { uint32_t version, maxpools, nr_pools, flags, weight; };
struct pool { uint32_t flags, id; uint64_t n_pages, uuid[2]; };
`

const widths: readonly { readonly bits: Bits }[] = [{ bits: 32 }, { bits: 64 }]

describe.each(widths)('C, guests of $bits bits', ({ bits }) => {
  const needs = { commands: ['cc'] }
  const flag = `-m${bits}`

  test('our own declarations', (ctx) => {
    requires(ctx, needs)
    if (process.arch !== 'x64') ctx.skip('needs a compiler for x86')
    const first = operationLayouts('4.0.0', bits)
    const later = operationLayouts('4.5', bits)
    const lines = [
      declarations,
      ...assertions('struct op_400', inArm('new', first.creat), first.creat),
      ...assertions('struct op_400', inArm('ctrl', first.ctrl!, { oid: 'arg3' }), first.ctrl!),
      ...assertions('struct op_400', inArm('gen', first.gen, { oid: 'object' }), first.gen),
      ...assertions('struct op_402', inArm('creat', later.creat), later.creat),
      ...assertions('struct op_402', inArm('ctrl', later.ctrl!), later.ctrl!),
      ...assertions('struct op_402', inArm('gen', later.gen), later.gen),
      ...assertions('struct handle_400', { oid: 'object' }, handleLayout('4.0.0')),
      ...assertions('struct handle_402', {}, handleLayout('4.9')),
      ...assertions('struct sysctl_body', {}, sysctlLayout),
      ...assertions('struct sysctl', { body: 'u' }, sysctlHead),
      ...assertions('struct client', {}, clientInfoLayout),
      ...assertions('struct pool', {}, poolInfoLayout),
    ]
    expect(compile(lines.join('\n'), [flag])).toBe('')
  })

  test('the public header', (ctx) => {
    requires(ctx, { ...needs, packages: ['libxen-dev'] })
    if (process.arch !== 'x64') ctx.skip('needs a compiler for x86')
    // Callers of an old interface see the plain array of words, later ones a structure of the same bytes.
    const asked: readonly (readonly [number, Release])[] = [
      [0x00040300, '4.2'],
      [0x00040700, '4.9'],
    ]
    for (const [version, release] of asked) {
      const { creat, gen } = operationLayouts(release, bits)
      const numbers: Record<string, number> = {
        TMEM_NEW_POOL: Command.NewPool,
        TMEM_DESTROY_POOL: Command.DestroyPool,
        TMEM_PUT_PAGE: Command.PutPage,
        TMEM_GET_PAGE: Command.GetPage,
        TMEM_FLUSH_PAGE: Command.FlushPage,
        TMEM_FLUSH_OBJECT: Command.FlushObject,
        TMEM_AUTH: Command.Auth,
        TMEM_RESTORE_NEW: Command.RestoreNew,
        TMEM_POOL_PERSIST: PoolBit.Persistent,
        TMEM_POOL_SHARED: PoolBit.Shared,
        TMEM_POOL_PRECOMPRESSED: PoolBit.Precompressed,
        TMEM_POOL_RESERVED_BITS: PoolBit.Reserved,
        EFROZEN: Errno.EFROZEN,
        EEMPTY: Errno.EEMPTY,
        __HYPERVISOR_tmem_op: 38,
        ...(release === '4.2'
          ? {
              TMEM_NEW_PAGE: Command.NewPage,
              TMEM_READ: Command.Read,
              TMEM_WRITE: Command.Write,
              TMEM_XCHG: Command.Exchange,
            }
          : {}),
      }
      const lines = [
        `#define __XEN_INTERFACE_VERSION__ ${version}`,
        '#include <stddef.h>',
        '#include <stdint.h>',
        '#include <xen/xen.h>',
        '#include <xen/tmem.h>',
        ...assertions('struct tmem_op', inArm('creat', creat), creat),
        ...assertions('struct tmem_op', inArm('gen', gen), gen),
        ...Object.entries(numbers).map(([name, value]) => `_Static_assert(${name} == ${value}, "${name}");`),
      ]
      expect(compile(lines.join('\n'), [flag, '-I', join(unpacked('libxen-dev'), 'usr/include')])).toBe('')
    }
  })
})
