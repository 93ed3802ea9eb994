// A device in a thread of its own, over plain memory, until the guest closes the channel.
import { parentPort, workerData } from 'node:worker_threads'
import { compose } from '@tmem/core'
import { memory } from '@tmem/memory'
import { ChannelDevice } from '@tmem/virtio-channel'

const store = compose([memory({ limitBytes: '16MiB' })])
const device = new ChannelDevice(workerData.handle, store, 1)
await device.serve()
parentPort.postMessage(device.counters)
await store.close()
