/** Block devices and statistics as files of a Linux mount, over the raw FUSE protocol. */
export * from './server.ts'
export {
  type FuseDevice,
  type FuseDirectory,
  type FuseNode,
  type FuseText,
  type FuseWriter,
  statisticsTree,
} from './tree.ts'
