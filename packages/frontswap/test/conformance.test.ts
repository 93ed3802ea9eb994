import { conformance, everyAllocation } from '@tmem/conformance'
import { compose, type Layer } from '@tmem/core'
import { delay } from '@tmem/faults'
import { memory } from '@tmem/memory'
import { describe, expect, it } from 'vitest'
import { frontswap } from '../src/index.ts'
import { onDevice, testFolder } from './device.ts'

const MiB = 2 ** 20
const folder = testFolder()

const small = [4096, 65536]
const all = [...small, 2 * MiB]
const stacks: [name: string, layer: () => Layer, runs: number, pageSizes: number[]][] = [
  ['frontswap over a file', () => frontswap({ file: folder.file(), sizeBytes: 4 * MiB }), 20, small],
  ['frontswap over a device in memory', () => frontswap(onDevice(8192).options), 60, all],
  [
    'frontswap with a store in front',
    () => frontswap({ ...onDevice(1024).options, front: [memory({ limitBytes: 200_000 })] }),
    30,
    small,
  ],
  [
    'frontswap with a store far away in front, and writethrough, over two areas',
    () =>
      frontswap({
        areas: [
          onDevice(512).options,
          { ...onDevice(512).options, priority: 3, frontswap: false },
          onDevice(99).options,
        ],
        front: [delay({ turn: () => Promise.resolve() }), memory({ limitBytes: 200_000 })],
        writethrough: true,
      }),
    30,
    small,
  ],
]
for (const [name, layer, runs, pageSizes] of stacks)
  await conformance(
    {
      name,
      open: (context) => compose([layer()], { ...context, check: 'model' }),
      manifest: {
        pageSizes,
        property: { runs },
        refusals: {
          NoMemory: { by: 'filling', bytes: 40 * MiB },
          Quota: 'pages on disk are bounded by the size of the area, not by the memory of a client',
          Unavailable: 'only a device that fails brings this about: see layer.test.ts',
        },
      },
    },
    { describe, it },
  )

it.each([
  ['alone', false],
  ['with a store in front', true],
])('every allocation, failed once: %s', async (_name, front) => {
  const report = await everyAllocation(
    (context) =>
      compose(
        [
          frontswap({
            file: folder.file(),
            sizeBytes: 4 * MiB,
            ...(front ? { front: [memory({ limitBytes: 400_000 })] } : {}),
          }),
        ],
        { ...context, check: 'model' },
      ),
    undefined,
    { afterRun: () => expect(folder.files()).toEqual([]) },
  )
  expect([...report.sites.keys()]).toEqual(
    expect.arrayContaining(['frontswap.io', 'frontswap.map', 'frontswap.entries']),
  )
  expect(report.runs).toBeGreaterThan(20)
  expect(report.notOpened).toBeGreaterThan(20)
})
