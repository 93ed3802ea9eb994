/**
 * What layers of this workspace share and nobody else should build on yet: it may change or go in any release but a
 * patch. The table of handles, because the words of an entry change whenever the directory needs another one; the
 * boundary around one place, because what it looks at follows the rules of `place.ts`.
 */
export { type Broken, checkedPlace } from './checked-place.ts'
export { entryWords, HandleTable, type HandleTableMemory, type HandleTableOptions } from './handles.ts'
