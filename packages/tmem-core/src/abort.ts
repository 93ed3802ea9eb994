/** Waiting for something that a caller may not want any more. */

/**
 * Resolves or rejects as the promise does, unless the signal aborts before, or has: then it rejects with the signal's
 * reason. What the promise stands for goes on, and nobody is told how it ended.
 */
export async function untilAborted<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return promise
  let abort = (): void => undefined
  const aborted = new Promise<never>((_, reject) => {
    abort = () => reject(signal.reason as Error)
    if (signal.aborted) abort()
    else signal.addEventListener('abort', abort, { once: true })
  })
  try {
    // The signal first: of two that have happened it is the one that counts.
    return await Promise.race([aborted, promise])
  } finally {
    signal.removeEventListener('abort', abort)
  }
}
