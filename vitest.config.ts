import { availableParallelism } from 'node:os'
import { defineConfig } from 'vitest/config'

// Tests run from source: the condition "@tmem/source" leads an import of a package to its src folder. Others are
// Node's: what packages have for bundlers ("module") is not always what Node can load.
const conditions = ['@tmem/source', 'node', 'development|production']
/** Tests in folders of their own, which need more of a machine than others, by what asks for them. */
const apart = { system: process.env['TMEM_SYSTEM_TESTS'] === '1', kernel: process.env['TMEM_KERNEL_TESTS'] === '1' }
const folders = Object.keys(apart) as (keyof typeof apart)[]
const wanted = folders.find((folder) => apart[folder])

export default defineConfig({
  resolve: { conditions },
  ssr: { resolve: { conditions } },
  test: {
    include: [`**/test/${wanted === undefined ? '' : `${wanted}/`}**/*.test.ts`],
    exclude: [
      '**/node_modules/**',
      '**/dist/**',
      ...(wanted === undefined ? folders.map((folder) => `**/test/${folder}/**`) : []),
    ],
    // Where the program looks for the system's tools, too; the PATH of many users lacks these.
    env: { PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin` },
    // Ends what hangs. A machine that is busy with other work takes ten times as long, and nothing is wrong then.
    testTimeout: 90_000,
    hookTimeout: 90_000,
    // Two files at once also on two processors: many of them wait for servers and clients. What looks at the whole
    // machine goes alone.
    maxWorkers: wanted !== undefined ? 1 : Math.max(2, availableParallelism() - 1),
    reporters: ['default', './tools/vitest-reporter.mjs'],
  },
})
