/**
 * What the streams of node:fs call instead of the system (their option `fs`) when they read and write a file of a page
 * cache.
 *
 * Source: the documentation of fs.createReadStream and fs.createWriteStream (`fs`).
 */

/** The file below a stream. */
export interface StreamedFile {
  read(
    into: Uint8Array,
    at: number,
    length: number,
    position: number | null,
  ): Promise<{ readonly bytesRead: number; readonly buffer: Uint8Array }>
  write(
    from: Uint8Array,
    at: number,
    length: number,
    position: number | null,
  ): Promise<{ readonly bytesWritten: number; readonly buffer: Uint8Array }>
  writev(
    from: readonly Uint8Array[],
    position: number | null,
  ): Promise<{ readonly bytesWritten: number; readonly buffers: readonly Uint8Array[] }>
  sync(): Promise<void>
}

type Done = (error: unknown, count?: number, buffer?: unknown) => void

/** The operations of one stream. `close`: the stream is done with the file. */
export function streamOperations(file: StreamedFile, close: () => Promise<void>): object {
  return {
    read: (_: number, into: Uint8Array, at: number, length: number, position: number | undefined, done: Done) =>
      tell(done, async () => {
        const { bytesRead, buffer } = await file.read(into, at, length, placeOf(position))
        return [bytesRead, buffer]
      }),
    write: (_: number, from: Uint8Array, at: number, length: number, position: number | undefined, done: Done) =>
      tell(done, async () => {
        const { bytesWritten, buffer } = await file.write(from, at, length, placeOf(position))
        return [bytesWritten, buffer]
      }),
    writev: (_: number, from: readonly Uint8Array[], position: number | undefined, done: Done) =>
      tell(done, async () => {
        const { bytesWritten, buffers } = await file.writev(from, placeOf(position))
        return [bytesWritten, buffers]
      }),
    fsync: (_: number, done: Done) =>
      tell(done, async () => {
        await file.sync()
        return []
      }),
    close: (_: number, done: Done) =>
      tell(done, async () => {
        await close()
        return []
      }),
  }
}

async function tell(done: Done, work: () => Promise<[count?: number, buffer?: unknown]>): Promise<void> {
  let result: [count?: number, buffer?: unknown]
  try {
    result = await work()
  } catch (error) {
    done(error)
    return
  }
  done(null, ...result)
}

/** A stream without a start counts from `undefined`, which gives NaN once a part of a piece was written. */
const placeOf = (position: number | undefined): number | null =>
  position === undefined || Number.isNaN(position) ? null : position
