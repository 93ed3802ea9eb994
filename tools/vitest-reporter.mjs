// Writes what tools/bootstrap.mjs adds up: {passed, failed, skipped: {reason: count}} to $TMEM_TEST_REPORT.
// Vitest's own JSON report does not carry the reason given to ctx.skip().
import { mkdirSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'

export default class CountsReporter {
  onTestRunEnd(modules, unhandledErrors) {
    const file = process.env.TMEM_TEST_REPORT
    if (!file) return
    const counts = { passed: 0, failed: unhandledErrors.length, skipped: {} }
    for (const module of modules) {
      for (const test of module.children.allTests()) {
        const { state, note } = test.result()
        if (state === 'passed') counts.passed++
        else if (state === 'failed') counts.failed++
        else {
          const reason = note ?? `no reason given: ${module.relativeModuleId} > ${test.fullName}`
          counts.skipped[reason] = (counts.skipped[reason] ?? 0) + 1
        }
      }
      // A file that cannot be loaded, or a suite whose hook fails, has errors of its own.
      counts.failed += module.errors().length
      for (const suite of module.children.allSuites()) counts.failed += suite.errors().length
    }
    mkdirSync(dirname(file), { recursive: true })
    writeFileSync(file, `${JSON.stringify(counts, null, 2)}\n`)
  }
}
