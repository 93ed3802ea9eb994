/**
 * A channel to a host's page store for guests, over shared memory: a virtqueue that carries many pages per
 * notification.
 */
export * from './device.ts'
export * from './guest.ts'
export {
  ChannelCommand,
  type ChannelHandle,
  type ChannelOptions,
  ChannelShape,
  ChannelStatus,
  createChannel,
  DescriptorFlag,
  needsEvent,
} from './shape.ts'
