/**
 * Finders of places as they were before zsmalloc, for `zcache({ limitBytes, allocator: xvmalloc })`: to see what they
 * cost. Nothing in them moves together again, so what they waste they waste for good.
 */
import type { Arena, ZAllocator } from './arena.ts'
import { Xvmalloc } from './xvmalloc.ts'
import { Zbud } from './zbud.ts'

/** Exact sizes inside page frames, as in ramzswap and in zcache for persistent pages: blocks of up to 4088 bytes. */
export const xvmalloc = (arena: Arena): ZAllocator => new Xvmalloc(arena)

/**
 * Two pages in a page frame at most: the one of Linux 3.9 (blocks of up to 4000 bytes), or the first one, of Linux
 * 2.6.39 (3904 bytes), as in `zcache({ limitBytes, allocator: (arena) => zbud(arena, 1) })`.
 */
export const zbud = (arena: Arena, generation: 1 | 2 = 2): ZAllocator => new Zbud(arena, generation)
