/**
 * How a command ends: with an exit code and, unless it is done, with one line on standard error.
 *
 * 0 done, 1 the work failed or data was wrong, 2 bad usage or bad input, 3 a person has to look first, 130 interrupted.
 * The codes are a contract with the programs that call this one.
 */
import { TmemError } from '@tmem/core'
import { CommanderError } from 'commander'

/** What the exit codes mean. */
export const exitCodes: readonly (readonly [code: number, meaning: string])[] = [
  [0, 'done'],
  [1, 'failed or wrong data'],
  [2, 'bad usage or bad input'],
  [3, 'a server lost pages, or was killed and is still in use: look first, then serve --fresh'],
  [130, 'interrupted'],
]

/** Bad usage or bad input: exit code 2. The message is one line that says what is wrong and what to do. */
export class BadInput extends Error {
  /** All mistakes of an input that has several, a line each. */
  readonly mistakes: readonly string[]

  constructor(message: string, mistakes: readonly string[] = []) {
    super(message)
    this.mistakes = mistakes
  }
}

/** The work failed, or data was wrong: exit code 1. The message is one line. */
export class Failed extends Error {}

/**
 * Another try does not help: a person has to look at what a server has left behind, and consent. Exit code 3, after
 * which a supervisor must not start the server again. The message is one line.
 */
export class LookFirst extends Error {}

/** The command that `tmem run` ran ended with this code, and printed its own message. */
export class Ended extends Error {
  readonly code: number

  constructor(code: number) {
    super(`ended with ${code}`)
    this.code = code
  }
}

/** SIGINT, SIGTERM or SIGHUP arrived: exit code 130. */
export class Interrupted extends Error {
  constructor() {
    super('interrupted')
  }
}

/** Throws `Interrupted` if the signal was raised. */
export function throwIfInterrupted(signal: AbortSignal): void {
  if (signal.aborted) throw new Interrupted()
}

/** The exit code of a command that ended with this error, and its message for standard error. */
export function endingOf(error: unknown): { readonly code: number; readonly message: string } {
  if (error instanceof CommanderError) {
    // Commander throws after it has printed help or the version, with exit code 0.
    if (error.exitCode === 0) return { code: 0, message: '' }
    return { code: 2, message: oneLine(error.message.replace(/^error: /, '')) }
  }
  if (error instanceof Interrupted) return { code: 130, message: error.message }
  if (error instanceof LookFirst) return { code: 3, message: oneLine(error.message) }
  if (error instanceof Ended) return { code: error.code, message: '' }
  if (error instanceof BadInput) return { code: 2, message: [error.message, ...error.mistakes].map(oneLine).join('\n') }
  if (error instanceof Failed) return { code: 1, message: oneLine(error.message) }
  if (error instanceof TmemError) {
    const input = error.code === 'TMEM_BAD_STACK' || error.code === 'TMEM_BAD_STACK_TEXT'
    return { code: input ? 2 : 1, message: oneLine(`${error.message} (${error.code})`) }
  }
  // Any other error is a bug in this program: show where.
  return { code: 1, message: error instanceof Error ? (error.stack ?? error.message) : String(error) }
}

const oneLine = (text: string): string => text.trim().replaceAll(/\s*[\r\n]+\s*/g, ' ')
