/** Pages about tmem, and who serves them: the console of a server, and reports as single files. See the README. */
export {
  type BenchData,
  type Curve,
  type DemoData,
  type ExploreData,
  type ExploreSide,
  type ReportData,
  type ReportMachine,
  reportMark,
  reportPage,
} from './report.ts'
export { type Console, type ConsoleOptions, type ConsoleSubject, serveConsole } from './server.ts'
export type {
  ConsoleAges,
  ConsoleDevice,
  ConsoleEvent,
  ConsoleServer,
  ConsoleState,
  ConsoleSwap,
  ExplainedSlot,
} from './state.ts'
