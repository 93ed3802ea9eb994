/** A soak of a server: clients, knobs, kills, and a model of what must be read back. */
export type { Ask, Counts, Trouble } from './life.ts'
export { type Change, DeviceModel, type Left, type Reading, sectorBytes, type Wrong } from './model.ts'
export { type SoakFailure, type SoakOptions, type SoakReport, soak } from './soak.ts'
