/** A program that uses more memory than there is, and verifies every byte of it: see hog.c. */
import { execFileSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'

/**
 * Compiles it with `cc`, linked statically, so that it runs in a guest that has no libraries. Its arguments are the MiB
 * that it uses and how often it goes round; perhaps 1, if it shall look at some pages more often than at others (else
 * 0); and perhaps a file that is open meanwhile. It prints `PAGES pages, WRONG wrong` and exits with 0 if none was
 * wrong, 1 otherwise, 2 without memory.
 */
export function compileHog(path: string): void {
  const source = fileURLToPath(new URL('../src/hog.c', import.meta.url))
  try {
    execFileSync('cc', ['-O2', '-static', '-o', path, source], { stdio: 'pipe' })
  } catch (error) {
    throw new Error(`cannot compile ${source}: ${(error as Error).message}`, { cause: error })
  }
}
