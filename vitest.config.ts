import { defineConfig } from 'vitest/config'

// Tests run from source: the condition "@tmem/source" leads an import of a package to its src folder.
const conditions = ['@tmem/source', 'module', 'node', 'development|production']
const system = process.env['TMEM_SYSTEM_TESTS'] === '1'

export default defineConfig({
  resolve: { conditions },
  ssr: { resolve: { conditions } },
  test: {
    include: system ? ['**/test/system/**/*.test.ts'] : ['**/test/**/*.test.ts'],
    exclude: ['**/node_modules/**', '**/dist/**', ...(system ? [] : ['**/test/system/**'])],
    // Where the program looks for the system's tools, too; the PATH of many users lacks these.
    env: { PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin` },
    // Ends what hangs. A machine that is busy with other work takes ten times as long, and nothing is wrong then.
    testTimeout: 90_000,
    hookTimeout: 90_000,
    reporters: ['default', './tools/vitest-reporter.mjs'],
  },
})
