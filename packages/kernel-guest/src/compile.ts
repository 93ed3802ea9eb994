/**
 * The workload `compile`: a program of many parts is compiled in the guest, part by part, linked, and run. Its output
 * must equal that of one part that is called as often, which shows a part whose source or object came back wrong.
 *
 * The compiler is tcc, with the C library that it was built for; what it compiles needs no library.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { CpioEntry } from '@tmem/guest'

/** Of a part: it has functions, and a text, over which it computes. */
const functions = 200
const textLines = 16_384
/** MiB that a part takes: its source, its object, and twice that while all are linked. */
const mebibytesOfPart = 4.4

/** The folder of the guest in which all of it is. */
const place = 'compiler'
const loader = 'ld-linux-x86-64.so.2'
const libraries = ['libc.so.6', 'libm.so.6', 'libdl.so.2', 'libpthread.so.0']

/** What the guest compiles with, and what; `unpacked` has the packages tcc and libc6. */
export function compileFiles(unpacked: string, mebibytes: number): CpioEntry[] {
  const library = (name: string): Buffer => readFileSync(join(unpacked, 'lib/x86_64-linux-gnu', name))
  const parts = partsOf(mebibytes)
  const all = Array.from({ length: parts }, (_, n) => `x = part_${n}(x);\n`).join('')
  const declared = Array.from({ length: parts }, (_, n) => `unsigned part_${n}(unsigned);\n`).join('')
  return [
    { path: `${place}/tcc`, data: readFileSync(join(unpacked, 'usr/bin/tcc')), mode: 0o755 },
    { path: `${place}/${loader}`, data: library(loader), mode: 0o755 },
    ...libraries.map((name) => ({ path: `${place}/${name}`, data: library(name) })),
    { path: `${place}/body.c`, data: body() },
    { path: `${place}/all.c`, data: `${declared}${programOf(all)}` },
    {
      path: `${place}/one.c`,
      data: `unsigned part_0(unsigned);\n${programOf(`for (int n = 0; n < ${parts}; n++) x = part_0(x);\n`)}`,
    },
  ]
}

/** Defines `work`; `mounted` mounts something on /scratch. */
export const compileScript = (mebibytes: number): string => `work() {
  mounted && cd /scratch || return 2
  tcc() { /${place}/${loader} --library-path /${place} /${place}/tcc "$@"; }
  part=0
  while [ $part -lt ${partsOf(mebibytes)} ]; do
    { echo "#define PART part_$part"; cat /${place}/body.c; } >$part.c
    part=$((part + 1))
  done
  for source in *.c; do tcc -c $source || return 4; done
  tcc -nostdlib -static -o all /${place}/all.c *.o && tcc -nostdlib -static -o one /${place}/one.c 0.o || return 5
  expected=$(./one) && [ -n "$expected" ] && [ "$(./all)" = "$expected" ]
  wrong=$?
  echo "${partsOf(mebibytes)} parts, $wrong wrong"
  cd / && umount /scratch || return 3
  return $wrong
}`

const partsOf = (mebibytes: number): number => Math.max(1, Math.floor(mebibytes / mebibytesOfPart))

/** Source of a part but for its name. */
function body(): string {
  const lines = ['static const char text[] =']
  let state = 1
  for (let line = 0; line < textLines; line++) {
    let letters = ''
    for (let n = 0; n < 64; n++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0
      letters += String.fromCharCode(97 + ((state >>> 16) % 26))
    }
    lines.push(`"${letters}"`)
  }
  lines.push(';', '#define JOIN(a, b) a##b', '#define G(n) JOIN(g_, n)')
  for (let k = 0; k < functions; k++) {
    const fill = `for (i = 0; i < 8; i++) a[i] = x * ${Math.imul(k, 0x9e3779b1) >>> 0}u + (i << ${k % 13});`
    const mix = `for (i = 1; i < 8; i++) a[i] ^= a[i - 1] >> ${(k % 7) + 1};`
    lines.push(`static unsigned G(${k})(unsigned x) { unsigned a[8], i; ${fill} ${mix} return a[7] + a[${k % 8}]; }`)
  }
  lines.push('unsigned PART(unsigned x) {', 'for (unsigned i = 0; i < sizeof text; i++) x = x * 31 + text[i];')
  for (let k = 0; k < functions; k++) lines.push(`x ^= G(${k})(x);`)
  return `${lines.join('\n')}\nreturn x; }\n`
}

/** A program without a library: it prints a number, and ends. */
const programOf = (statements: string): string => `
static long call(long number, long a, const char *b, long c) {
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "0"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
  return result;
}
void _start(void) {
  char text[11];
  int at = 10;
  unsigned x = 1;
  ${statements}
  text[at] = '\\n';
  do text[--at] = '0' + x % 10; while (x /= 10);
  call(1, 1, text + at, 11 - at);
  call(60, 0, 0, 0);
}
`
