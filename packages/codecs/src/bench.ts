/**
 * Measures codecs on pages of this machine's own files, against lz4-napi and C's liblz4 in the same run.
 *
 * All subjects take turns, one pass over all pages each, and the median of the rounds counts: on a machine that others
 * use too, single times mean little, but the ratio of two medians of interleaved rounds holds. Passes go over many
 * pages, because a branch predictor learns a few by heart (8 pages again and again: half the time a page).
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import {
  closeSync,
  type Dirent,
  fstatSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import type { Codec } from './codec.ts'

/** Pages to compress. */
export interface Corpus {
  readonly pageBytes: number
  /** All pages in one piece. */
  readonly bytes: Uint8Array
  /** The same, each page an array of its own over `bytes`. */
  readonly pages: readonly Uint8Array[]
  /** How many pages come from where. */
  readonly sources: readonly { readonly name: string; readonly pages: number }[]
}

/** Something that is measured: both functions take every page once and return ns per page and the bytes they made. */
export interface Subject {
  readonly name: string
  compress(): Pass | Promise<Pass>
  decompress(): Pass | Promise<Pass>
  close?(): void
}

/** One pass over all pages. */
export interface Pass {
  readonly nsPerPage: number
  readonly bytes: number
}

/** Medians of one subject. */
export interface Measured {
  readonly name: string
  readonly compressNs: number
  readonly decompressNs: number
  /** Sum of the compressed sizes of all pages. */
  readonly bytes: number
}

/** The part of lz4-napi that is measured. */
export interface Lz4Napi {
  compressSync(data: Uint8Array): Uint8Array
  uncompressSync(data: Uint8Array): Uint8Array
}

/**
 * Builds the mixed corpus: 30 % executables, 20 % shared libraries, 12 % headers, 13 % JavaScript, 5 % random bytes,
 * the rest zero pages, in random order. Which pages of which files is decided by `seed`. A kind that the machine does
 * not have is replaced by pages of the running Node, and `sources` says so.
 */
export function mixedCorpus(pages: number, pageBytes = 4096, seed = 1): Corpus {
  let state = seed >>> 0
  const random = (below: number): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return Math.floor((state / 2 ** 32) * below)
  }
  const prefix = dirname(dirname(process.execPath))
  const kinds: readonly (readonly [string, number, readonly string[], RegExp])[] = [
    ['executables', 0.3, ['/usr/bin'], /^[^.]+$/],
    ['shared libraries', 0.2, ['/usr/lib'], /\.so(\.|$)/],
    ['headers', 0.12, ['/usr/include', join(prefix, 'include')], /\.h$/],
    [
      'JavaScript',
      0.13,
      [join(prefix, 'lib/node_modules'), '/usr/share/nodejs', join(prefix, 'share/nodejs')],
      /\.js$/,
    ],
  ]
  const ordered = new Uint8Array(pages * pageBytes)
  const sources: { name: string; pages: number }[] = []
  let filled = 0
  for (const [name, share, folders, pattern] of kinds) {
    const files = folders.flatMap((folder) => filesUnder(folder, pattern))
    const wanted = Math.round(pages * share)
    const end = filled + wanted
    // Files shorter than a page give none; so many of them that nothing is found are no source.
    for (let tries = wanted * 50; filled < end && files.length > 0 && tries > 0; tries--) {
      const file = files[random(files.length)] as string
      if (readPage(file, random, ordered, filled * pageBytes, pageBytes)) filled++
    }
    sources.push({ name, pages: wanted - (end - filled) })
    if (filled < end) sources.push({ name: `${name} (none here: the running program instead)`, pages: end - filled })
    for (; filled < end; filled++) readPage(process.execPath, random, ordered, filled * pageBytes, pageBytes)
  }
  const randomPages = Math.round(pages * 0.05)
  for (let at = filled * pageBytes; at < (filled + randomPages) * pageBytes; at++) ordered[at] = random(256)
  filled += randomPages
  sources.push({ name: 'random', pages: randomPages }, { name: 'zero', pages: pages - filled })

  const order = Array.from({ length: pages }, (_, index) => index)
  for (let i = pages - 1; i > 0; i--) {
    const j = random(i + 1)
    const held = order[i] as number
    order[i] = order[j] as number
    order[j] = held
  }
  const bytes = new Uint8Array(pages * pageBytes)
  for (const [to, from] of order.entries()) {
    bytes.set(ordered.subarray(from * pageBytes, (from + 1) * pageBytes), to * pageBytes)
  }
  return {
    pageBytes,
    bytes,
    pages: order.map((_, index) => bytes.subarray(index * pageBytes, (index + 1) * pageBytes)),
    sources,
  }
}

/** Regular files under a folder in the order of their names; what cannot be read is left out. */
function filesUnder(folder: string, pattern: RegExp): string[] {
  let entries: Dirent[]
  try {
    entries = readdirSync(folder, { withFileTypes: true })
  } catch {
    return []
  }
  return entries
    .sort((a, b) => (a.name < b.name ? -1 : 1))
    .flatMap((entry) => {
      const path = join(folder, entry.name)
      if (entry.isDirectory()) return filesUnder(path, pattern)
      return entry.isFile() && pattern.test(entry.name) ? [path] : []
    })
}

/** Reads one page of a file, chosen at random, to `into[at]`. False when the file has none or cannot be read. */
function readPage(
  path: string,
  random: (below: number) => number,
  into: Uint8Array,
  at: number,
  length: number,
): boolean {
  let file: number
  try {
    file = openSync(path, 'r')
  } catch {
    return false
  }
  try {
    const pages = Math.floor(fstatSync(file).size / length)
    return pages > 0 && readSync(file, into, at, length, random(pages) * length) === length
  } finally {
    closeSync(file)
  }
}

function pass(pages: number, page: (index: number) => number): Pass {
  let bytes = 0
  const start = process.hrtime.bigint()
  for (let index = 0; index < pages; index++) bytes += page(index)
  return { nsPerPage: Number(process.hrtime.bigint() - start) / pages, bytes }
}

/**
 * A codec that compresses every page to its place in `store`, which has room for all (`storeBytes`), and back to one
 * page. `store` may lie in an arena.
 */
export function codecSubject(name: string, codec: Codec, corpus: Corpus, store: Uint8Array): Subject {
  const { pages, pageBytes } = corpus
  const room = codec.bound(pageBytes)
  const lengths = new Int32Array(pages.length)
  const into = new Uint8Array(pageBytes)
  return {
    name,
    compress: () =>
      pass(pages.length, (index) => {
        const written = codec.compress(pages[index] as Uint8Array, 0, pageBytes, store, index * room, room)
        lengths[index] = written
        return written
      }),
    decompress: () =>
      pass(pages.length, (index) =>
        codec.decompress(store, index * room, lengths[index] as number, into, 0, pageBytes),
      ),
  }
}

/** Bytes that `codecSubject` needs for the blocks of a corpus. */
export function storeBytes(codec: Codec, corpus: Corpus): number {
  return codec.bound(corpus.pageBytes) * corpus.pages.length
}

/** lz4-napi's synchronous functions, which make a Buffer for every result. Its sizes are counted without its prefix. */
export function napiSubject(napi: Lz4Napi, corpus: Corpus): Subject {
  const pages = corpus.pages.map((page) => Buffer.from(page.buffer, page.byteOffset, page.length))
  const blocks: Uint8Array[] = []
  return {
    name: 'lz4-napi',
    compress: () =>
      pass(pages.length, (index) => {
        const block = napi.compressSync(pages[index] as Buffer)
        blocks[index] = block
        return block.length - 4
      }),
    decompress: () => pass(pages.length, (index) => napi.uncompressSync(blocks[index] as Uint8Array).length),
  }
}

/** Reads pages from a file and, for each line on standard input, makes one pass and tells its time and bytes. */
const LIBLZ4_PROGRAM = `
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
int LZ4_compress_default(const char *, char *, int, int);
int LZ4_decompress_safe(const char *, char *, int, int);
static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e9 + t.tv_nsec;
}
int main(int count, char **words) {
  int page = atoi(words[2]), room = page + page / 255 + 16;
  long pages = atol(words[3]);
  char *in = malloc(pages * page), *out = malloc(pages * room), *back = malloc(page), line[16];
  int *lengths = calloc(pages, sizeof *lengths);
  FILE *file = fopen(words[1], "rb");
  if (count != 4 || !file || fread(in, page, pages, file) != (size_t)pages) return 1;
  memset(out, 0, pages * room);
  while (fgets(line, sizeof line, stdin)) {
    long bytes = 0;
    double start = now();
    if (line[0] == 'c')
      for (long i = 0; i < pages; i++)
        bytes += lengths[i] = LZ4_compress_default(in + i * page, out + i * room, page, room);
    else
      for (long i = 0; i < pages; i++) bytes += LZ4_decompress_safe(out + i * room, back, lengths[i], page);
    printf("%.1f %ld\\n", (now() - start) / pages, bytes);
    fflush(stdout);
  }
}
`

/** C's liblz4, called from a small C program that is compiled for it. Throws without gcc or liblz4.so.1. */
export function liblz4Subject(corpus: Corpus): Subject {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-codecs-'))
  let child: ChildProcess
  try {
    writeFileSync(join(folder, 'pages'), corpus.bytes)
    writeFileSync(join(folder, 'main.c'), LIBLZ4_PROGRAM)
    execFileSync('gcc', ['-O2', '-o', join(folder, 'main'), join(folder, 'main.c'), '-l:liblz4.so.1'], {
      stdio: 'pipe',
    })
    child = spawn(join(folder, 'main'), [join(folder, 'pages'), `${corpus.pageBytes}`, `${corpus.pages.length}`])
  } catch (error) {
    rmSync(folder, { recursive: true })
    throw error
  }
  let answered: ((line: string) => void) | undefined
  let text = ''
  child.stdout?.on('data', (chunk: Buffer) => {
    text += chunk.toString()
    const end = text.indexOf('\n')
    if (end < 0) return
    const line = text.slice(0, end)
    text = text.slice(end + 1)
    answered?.(line)
  })
  const ask = (command: string): Promise<Pass> =>
    new Promise((resolve) => {
      answered = (line) => {
        const [nsPerPage, bytes] = line.split(' ').map(Number)
        resolve({ nsPerPage: nsPerPage as number, bytes: bytes as number })
      }
      child.stdin?.write(`${command}\n`)
    })
  return {
    name: 'liblz4',
    compress: () => ask('c'),
    decompress: () => ask('d'),
    close: () => {
      child.stdin?.end()
      rmSync(folder, { recursive: true })
    },
  }
}

/** Runs all subjects in turn, `rounds` times each way after two rounds that are not counted. */
export async function interleave(subjects: readonly Subject[], rounds: number): Promise<Measured[]> {
  const compress = subjects.map((): number[] => [])
  const decompress = subjects.map((): number[] => [])
  const bytes = subjects.map(() => 0)
  for (let round = -2; round < rounds; round++) {
    for (const [index, subject] of subjects.entries()) {
      const { nsPerPage, bytes: made } = await subject.compress()
      bytes[index] = made
      if (round >= 0) compress[index]?.push(nsPerPage)
    }
    for (const [index, subject] of subjects.entries()) {
      const { nsPerPage } = await subject.decompress()
      if (round >= 0) decompress[index]?.push(nsPerPage)
    }
  }
  return subjects.map(({ name }, index) => ({
    name,
    compressNs: median(compress[index] ?? []),
    decompressNs: median(decompress[index] ?? []),
    bytes: bytes[index] as number,
  }))
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1] ?? Number.NaN
}
