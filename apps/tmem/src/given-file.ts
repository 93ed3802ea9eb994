/**
 * Files that a user names. A name may lead to anything: a pipe that nobody writes to, a device without an end.
 *
 * Invariant: what is no regular file, or too large, is refused before a byte of it is read.
 */
import { closeSync, constants, fstatSync, openSync, readFileSync } from 'node:fs'

/** A file, open. Throws the system's error, and an `Error` that says so for what is no file. */
export function openGivenFile(path: string): number {
  // Opening a pipe would wait for who writes to it.
  const file = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)
  if (fstatSync(file).isFile()) return file
  closeSync(file)
  throw new Error(`${path} is no file`)
}

/** All bytes of a file. Throws as `openGivenFile`, and an `Error` that says so for one of more bytes. */
export function readGivenFile(path: string, mostBytes: number): Buffer {
  const file = openGivenFile(path)
  try {
    const { size } = fstatSync(file)
    if (size > mostBytes) throw new Error(`${path} has ${size} bytes, more than ${mostBytes}`)
    return readFileSync(file)
  } finally {
    closeSync(file)
  }
}
