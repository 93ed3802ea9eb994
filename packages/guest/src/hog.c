// Uses more memory than it may, and verifies every byte: `hog MEBIBYTES ROUNDS [SKEW [FILE]]`. Exit code 0: all right, 1: wrong bytes,
// 2: no memory. FILE, if there is one, is open as long as it runs.
//
// First it fills all pages. Each round then looks at as many pages as there are, in no order, and writes half of them anew. With SKEW 1
// it has favourites: the last pages; a share x of all pages, the least liked ones, gets x + (1 - x) ln(1 - x) of the looks (2 % for a
// fifth of them). At the end it looks at all of them. A page depends on its number and on how often it was written: what belongs elsewhere, and what is
// old, is wrong. Of 16 pages three have the same word everywhere, one is noise, and twelve shrink to less than half.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { words = 4096 / sizeof(uint64_t) };

// What word `i` of page `page` must be in its `version`.
static inline uint64_t word(uint64_t page, uint64_t version, uint64_t i) {
  uint64_t x = page * 0x9e3779b97f4a7c15u + version;
  switch (page % 16) {
    case 0: case 5: case 10: return x;
    case 15:
      x += i * 0xbf58476d1ce4e5b9u;
      x ^= x >> 31;
      x *= 0x94d049bb133111ebu;
      return x ^ (x >> 29);
    default: return i % 2 == 0 ? x : (x & 0xffffffff00000000u) | (uint32_t)((x + i) * 0x9e3779b1u);
  }
}

static void fill(uint64_t *page, uint64_t number, uint64_t version) {
  for (int i = 0; i < words; i++) page[i] = word(number, version, i);
}

static int check(const uint64_t *page, uint64_t number, uint64_t version) {
  for (int i = 0; i < words; i++)
    if (page[i] != word(number, version, i)) return 1;
  return 0;
}

int main(int count, char **arguments) {
  uint64_t pages = count > 1 ? strtoull(arguments[1], NULL, 10) * 256 : 0;
  int rounds = count > 2 ? atoi(arguments[2]) : 1;
  int skew = count > 3 && atoi(arguments[3]) != 0;
  if (pages == 0 || (count > 4 && open(arguments[4], O_RDONLY) < 0)) return 2;
  uint64_t *memory = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  uint8_t *versions = calloc(pages, 1);
  if (memory == MAP_FAILED || versions == NULL) return 2;
  madvise(memory, pages * 4096, MADV_NOHUGEPAGE);
  uint64_t wrong = 0;
  for (uint64_t n = 0; n < pages; n++) fill(memory + n * words, n, 0);
  uint32_t state = 1;
  for (int round = 0; round < rounds; round++)
    for (uint64_t k = 0; k < pages; k++) {
      state = state * 1664525u + 1013904223u;
      uint64_t n = (state >> 8) % pages;
      if (skew) {
        // The product of two fractions of 24 bits: a small one more often than a large one.
        uint64_t fraction = state >> 8;
        state = state * 1664525u + 1013904223u;
        n = pages - 1 - ((((fraction * (state >> 8)) >> 24) * pages) >> 24);
      }
      if (state >> 31) fill(memory + n * words, n, ++versions[n]);
      else wrong += check(memory + n * words, n, versions[n]);
    }
  for (uint64_t n = 0; n < pages; n++) wrong += check(memory + n * words, n, versions[n]);
  printf("%llu pages, %llu wrong\n", (unsigned long long)pages, (unsigned long long)wrong);
  return wrong == 0 ? 0 : 1;
}
