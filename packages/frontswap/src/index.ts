/** The swap file that ends a stack; and the frontswap core with its swap areas, as Linux had them. */
export * from './frontswap.ts'
export { frontswap, frontswapFactory, type SwapFileOptions } from './layer.ts'
export { roomFor, type SwapFile, SwapPlace, type SwapPlaceOptions } from './place.ts'
export * from './swap-area.ts'
