import { availableParallelism } from 'node:os'
import { defineConfig } from 'vitest/config'

// Tests run from source: the condition "@tmem/source" leads an import of a package to its src folder. Others are
// Node's: what packages have for bundlers ("module") is not always what Node can load.
const conditions = ['@tmem/source', 'node', 'development|production']
/** Tests in folders of their own, which need more of a machine than others, by what asks for them. */
const part = process.env['TMEM_SYSTEM_TESTS'] ?? ''
const apart = { system: ['1', 'alone', 'beside'].includes(part), kernel: process.env['TMEM_KERNEL_TESTS'] === '1' }
const folders = Object.keys(apart) as (keyof typeof apart)[]
const wanted = folders.find((folder) => apart[folder])
/**
 * System tests that change nothing but what is theirs, and look at nothing else: guests, browsers, clients, mounts in
 * folders of their own. They are one part, `beside`; `alone` are all others, which make this host swap and use its
 * devices. In each part one file runs at a time; test:system runs both parts at once.
 */
const beside = [
  '**/{conformance,guest,nbd}/test/system/**/*.test.ts',
  '**/tmem/test/system/{console,guest,metrics,playground,reports}.test.ts',
]

export default defineConfig({
  resolve: { conditions },
  ssr: { resolve: { conditions } },
  test: {
    include: part === 'beside' ? beside : [`**/test/${wanted === undefined ? '' : `${wanted}/`}**/*.test.ts`],
    exclude: [
      '**/node_modules/**',
      '**/dist/**',
      ...(wanted === undefined ? folders.map((folder) => `**/test/${folder}/**`) : []),
      ...(part === 'alone' ? beside : []),
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
