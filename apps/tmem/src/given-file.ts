/**
 * Small files that a user names. A name may lead to anything: a pipe that nobody writes to, a device without an end.
 *
 * Invariant: what is no regular file, or too large, is refused before a byte of it is read.
 */
import { closeSync, constants, fstatSync, openSync, readFileSync } from 'node:fs'

/** All bytes of a file. Throws the system's error, and an `Error` that says why for what is no file of that size. */
export function readGivenFile(path: string, mostBytes: number): Buffer {
  // Opening a pipe would wait for who writes to it.
  const file = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)
  try {
    const found = fstatSync(file)
    if (!found.isFile()) throw new Error(`${path} is no file`)
    if (found.size > mostBytes) throw new Error(`${path} has ${found.size} bytes, more than ${mostBytes}`)
    return readFileSync(file)
  } finally {
    closeSync(file)
  }
}
