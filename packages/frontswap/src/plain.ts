import { closeSync, fdatasync, openSync, read, readSync, unlinkSync, write, writeSync } from 'node:fs'
import type { SwapFile } from './place.ts'

/** A stand-in until the file abstraction is there. */
export function openPlain(path: string): SwapFile {
  const fd = openSync(path, 'wx+', 0o600)
  return {
    directIo: false,
    write: (bytes, at, length, position) =>
      new Promise((resolve, reject) =>
        write(fd, bytes, at, length, position, (error) => (error === null ? resolve() : reject(error))),
      ),
    writeNow: (bytes, at, length, position) => {
      writeSync(fd, bytes, at, length, position)
    },
    read: (bytes, at, length, position) =>
      new Promise((resolve, reject) =>
        read(fd, bytes, at, length, position, (error) => (error === null ? resolve() : reject(error))),
      ),
    readNow: (bytes, at, length, position) => {
      readSync(fd, bytes, at, length, position)
    },
    sync: () =>
      new Promise((resolve, reject) => fdatasync(fd, (error) => (error === null ? resolve() : reject(error)))),
    close: () => {
      closeSync(fd)
      unlinkSync(path)
      return Promise.resolve()
    },
  }
}
