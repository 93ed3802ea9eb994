#!/usr/bin/env node
import { run } from './index.ts'

// Only the code is set: what was printed to a pipe still has to get there.
void run(process.argv.slice(2)).then((code) => {
  process.exitCode = code
})
