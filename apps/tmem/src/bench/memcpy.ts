/** C's `memcpy` to and from random places, as the limit that the machine itself sets; needs a C compiler. */
import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Bench, type Row, skippedRow, valueRow } from './frame.ts'

const program = `
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1e9 + t.tv_nsec; }
static int compare(const void *a, const void *b) { double x = *(double *)a, y = *(double *)b; return (x > y) - (x < y); }
int main(int argc, char **argv) {
  size_t pages = strtoul(argv[1], 0, 10), operations = 50000;
  char *memory = mmap(0, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return 1;
  madvise(memory, pages * 4096, MADV_NOHUGEPAGE);
  memset(memory, 1, pages * 4096);
  static char page[4096];
  uint32_t *order = malloc(operations * 4), seed = 0x2545f491;
  for (size_t i = 0; i < operations; i++) {
    seed = seed * 1664525u + 1013904223u;
    order[i] = (uint32_t)(((uint64_t)seed * pages) >> 32);
  }
  double in[9], out[9];
  for (int round = 0; round < 9; round++) {
    double start = now();
    for (size_t i = 0; i < operations; i++) memcpy(memory + (size_t)order[i] * 4096, page, 4096);
    in[round] = (now() - start) / operations;
    start = now();
    for (size_t i = 0; i < operations; i++) { memcpy(page, memory + (size_t)order[i] * 4096, 4096); __asm__ volatile("" ::: "memory"); }
    out[round] = (now() - start) / operations;
  }
  qsort(in, 9, sizeof *in, compare);
  qsort(out, 9, sizeof *out, compare);
  printf("%f %f\\n", in[4], out[4]);
  return 0;
}
`

/** The rows, or one that says why there are none. */
export async function measureMemcpy(bench: Bench): Promise<Row[]> {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-memcpy-'))
  try {
    const source = join(folder, 'memcpy.c')
    const binary = join(folder, 'memcpy')
    writeFileSync(source, program)
    const compiled = spawnSync('cc', ['-O2', '-o', binary, source], { encoding: 'utf8' })
    if (compiled.error !== undefined || compiled.status !== 0)
      return [skippedRow('memcpy-c-4k', 'there is no C compiler (cc) that could build the measuring program')]
    const rows: Row[] = []
    for (const pages of bench.quick ? [100_000] : [100_000, 1_000_000]) {
      const ran = spawnSync(binary, [String(pages)], { encoding: 'utf8' })
      const [copyIn, copyOut] = ran.stdout.split(' ').map(Number)
      const size = `4k-${pages / 1000}k`
      if (ran.status !== 0 || !Number.isFinite(copyIn) || !Number.isFinite(copyOut))
        rows.push(skippedRow(`memcpy-c-${size}`, `the measuring program failed (status ${ran.status})`))
      else
        rows.push(
          valueRow(`memcpy-c-in-${size}`, 'ns/page', copyIn),
          valueRow(`memcpy-c-out-${size}`, 'ns/page', copyOut),
        )
    }
    return rows
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
}
