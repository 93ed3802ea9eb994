/** Block devices and statistics as files of a Linux mount, over the raw FUSE protocol. */
export { deviceText, type Mount, mounts, type Place, placeOf, unescaped } from './mounts.ts'
export * from './server.ts'
export {
  type FuseDevice,
  type FuseDirectory,
  type FuseNode,
  type FuseText,
  type FuseWriter,
  namedApart,
  statisticsTree,
} from './tree.ts'
