/** The thread that has the stream of all pages of a browser. */
import { type Pages, share } from './connection.ts'

share(globalThis as unknown as Pages)
