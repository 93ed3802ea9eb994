/**
 * A descriptor that is no socket in the event loop: its loop waits for it and reads from it, as it does for a pipe.
 *
 * The runtime has no documented way to do that. Where its inside is not as expected `watch` answers `undefined`, and
 * the descriptor has to be waited for in another thread; each request then takes two more wake-ups.
 */
import { Socket, type SocketConstructorOpts } from 'node:net'

/** What is done with what comes. */
export interface Watcher {
  /** Where to read to: asked for at the beginning and after each `received`. */
  readonly room: () => Uint8Array
  /** So many bytes are there. False: no more until `resume`. */
  readonly received: (count: number) => boolean
  /** Nothing more will come; the descriptor is closed. */
  readonly closed: () => void
}

/** A descriptor that is watched. It belongs to the watch, which closes it. */
export interface Watch {
  pause(): void
  resume(): void
  close(): void
}

interface PipeHandle {
  open(descriptor: number): number
}
interface PipeBinding {
  readonly Pipe: new (type: number) => PipeHandle
  readonly constants: { readonly SOCKET: number }
}
interface WatchOptions extends SocketConstructorOpts {
  handle: PipeHandle
  pauseOnCreate: boolean
  onread: { buffer: () => Uint8Array; callback: (count: number) => boolean }
}

/**
 * Watches a descriptor that does not block. `undefined` where the runtime does not allow it: then nothing has happened.
 */
export function watch(descriptor: number, { room, received, closed }: Watcher): Watch | undefined {
  const handle = pipeOf(descriptor)
  if (handle === undefined) return undefined
  const options: WatchOptions = { handle, pauseOnCreate: true, onread: { buffer: room, callback: received } }
  const socket = new Socket(options)
  // ENODEV: unmounted. Whatever it is: nothing can be read any more, and `close` follows.
  socket.on('error', () => {})
  socket.on('close', closed)
  socket.resume()
  return {
    pause() {
      socket.pause()
    },
    resume() {
      socket.resume()
    },
    close() {
      socket.destroy()
    },
  }
}

/** The runtime's handle of a pipe, over the descriptor. */
function pipeOf(descriptor: number): PipeHandle | undefined {
  const runtime = process as unknown as { binding?: (name: string) => PipeBinding }
  try {
    const binding = runtime.binding?.('pipe_wrap')
    if (binding === undefined) return undefined
    const handle = new binding.Pipe(binding.constants.SOCKET)
    return handle.open(descriptor) === 0 ? handle : undefined
  } catch {
    // Forbidden, or not what it was.
    return undefined
  }
}
