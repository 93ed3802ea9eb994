/** Swap areas over real files, the frontswap core, and the layer that ends a stack. */
export * from './block-file.ts'
export * from './frontswap.ts'
export * from './layer.ts'
export { roomFor, type SwapFile, SwapPlace } from './place.ts'
export * from './swap-area.ts'
