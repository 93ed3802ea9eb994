/** A real device that a test may take away: what is in it is gone then, and every call fails as OpenCL's would. */
import { type DeviceBuffer, type DeviceMemory, OpenClError, openDevice } from '../src/index.ts'

/** What the packages are that tests need: pocl registers itself in this file. */
export const pocl = { commands: ['clinfo'], paths: ['/etc/OpenCL/vendors/pocl.icd'] } as const

export class Device {
  /** Every call fails: `at once`, or only when what was begun is waited for. */
  gone: false | 'at once' | 'later' = false
  /** No buffer can be made any more. */
  isFull = false
  opened = 0

  readonly open = (): DeviceMemory => {
    if (this.gone !== false) throw new OpenClError('clCreateContext', -2)
    const inner = openDevice()
    const number = ++this.opened
    const reach = (call: string): void => {
      if (this.gone === 'at once' || number < this.opened) throw new OpenClError(call, -36)
    }
    return {
      name: inner.name,
      bytes: inner.bytes,
      create: (bytes) => {
        reach('clCreateBuffer')
        if (this.isFull) throw new OpenClError('clCreateBuffer', -4)
        return inner.create(bytes)
      },
      release: (buffer: DeviceBuffer) => inner.release(buffer),
      write: (buffer, at, from) => {
        reach('clEnqueueWriteBuffer')
        inner.write(buffer, at, from)
      },
      read: (buffer, at, into) => {
        reach('clEnqueueReadBuffer')
        inner.read(buffer, at, into)
      },
      finish: async () => {
        await inner.finish()
        if (this.gone !== false) throw new OpenClError('clFinish', -36)
      },
      close: () => inner.close(),
    }
  }
}
