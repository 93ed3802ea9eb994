import { conformance, everyAllocation } from '@tmem/conformance'
import { compose, type Layer } from '@tmem/core'
import { memory } from '@tmem/memory'
import { describe, expect, it } from 'vitest'
import { frontswap } from '../src/index.ts'
import { Disk, testFolder } from './device.ts'

const MiB = 2 ** 20
const folder = testFolder()

const file = (): Layer => frontswap({ file: folder.file(), sizeBytes: 4 * MiB })
const onDisk = (sizeBytes: number): Layer => {
  const disk = new Disk()
  return frontswap({ file: disk.path, sizeBytes, files: disk.files })
}

const small = [4096, 65536]
const all = [...small, 2 * MiB]
const stacks: [name: string, layers: () => Layer[], runs: number, pageSizes: number[]][] = [
  ['frontswap over a file', () => [file()], 20, small],
  ['frontswap over a disk in memory', () => [onDisk(32 * MiB)], 40, all],
  ['memory over frontswap', () => [memory({ limitBytes: 400_000 }), onDisk(8 * MiB)], 40, small],
]
for (const [name, layers, runs, pageSizes] of stacks)
  await conformance(
    {
      name,
      open: (context) => compose(layers(), { ...context, check: 'model' }),
      manifest: {
        pageSizes,
        property: { runs },
        refusals: {
          NoMemory: { by: 'filling', bytes: 80 * MiB },
          Quota: 'pages on disk are bounded by the size of the file, not by the memory of a client',
          Unavailable: 'only a disk that fails brings this about: see layer.test.ts',
        },
      },
    },
    { describe, it },
  )

it('every allocation, failed once: opened whole or not at all', async () => {
  const report = await everyAllocation((context) => compose([file()], { ...context, check: 'model' }), undefined, {
    afterRun: () => expect(folder.files()).toEqual([]),
  })
  expect([...report.sites.keys()]).toEqual(expect.arrayContaining(['frontswap.map', 'pageFile.buffers']))
  expect(report.notOpened).toBeGreaterThan(2)
})
