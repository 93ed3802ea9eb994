/**
 * Files that a user names. A name may lead to anything, such as a pipe without a writer or a device without an end.
 *
 * Invariant: anything but a regular file, and a file that is too large, is refused before a byte is read.
 */
import { closeSync, constants, fstatSync, openSync, readFileSync } from 'node:fs'

/** Opens a file. Throws the system's error, or an `Error` for anything but a regular file. */
export function openGivenFile(path: string): number {
  // Without O_NONBLOCK, opening a pipe would wait for a writer.
  const file = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK)
  if (fstatSync(file).isFile()) return file
  closeSync(file)
  throw new Error(`${path} is not a regular file`)
}

/** All bytes of a file. Throws as `openGivenFile` does, and an `Error` if the file has more than `mostBytes`. */
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
