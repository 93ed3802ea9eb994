/** A worker thread of `virtio.ts`: the device of a channel, over a store of plain memory, until the guest closes it. */
import { workerData } from 'node:worker_threads'
import { compose } from '@tmem/core'
import { memory } from '@tmem/memory'
import { ChannelDevice, type ChannelHandle } from '@tmem/virtio-channel'

/** What a worker thread is given at its start. */
export interface DeviceData {
  readonly handle: ChannelHandle
  readonly limitBytes: number
}

const { handle, limitBytes } = workerData as DeviceData
const store = compose([memory({ limitBytes })])
await new ChannelDevice(handle, store, 1).serve()
await store.close()
