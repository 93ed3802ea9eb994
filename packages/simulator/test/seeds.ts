/**
 * Histories in which a fault of the shipped modules was once seen. What a history does may change with the simulator, so each fault has a
 * test by itself, too (`found.test.ts`).
 */
export const found: readonly { readonly seed: number; readonly history: number; readonly what: string }[] = []
