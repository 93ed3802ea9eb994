/**
 * Litmus tests: the few accesses of a lockless rule on which the order hangs, written down once, for two judges. As a
 * scenario the explorer runs them in every order of whole accesses (sequential consistency: fences mean nothing there);
 * as text herd7 judges them under the memory model of the kernel, where accesses of one thread pass each other unless a
 * fence keeps them.
 *
 * The text is a "C" litmus test for `herd7 -conf linux-kernel.cfg` (tools/memory-model of the kernel): accesses are
 * READ_ONCE, WRITE_ONCE, atomic_add_return (which is a full fence, as in the kernel) and atomic_read.
 */
import { type Actor, actor, type Scenario, type Step } from './scenario.ts'

/** An access to a location, or a fence. */
export type LitmusStep =
  | { readonly write: string; readonly value: number }
  /** `into` is a register, unique in its thread. */
  | { readonly read: string; readonly into: string }
  /** Adds atomically; `into` is the new value. */
  | { readonly add: string; readonly value: number; readonly into: string }
  | { readonly fence: 'rmb' | 'wmb' | 'mb' }

export interface LitmusThread {
  readonly name: string
  readonly steps: readonly LitmusStep[]
}

export interface LitmusTest {
  /** Letters, digits, `-`, `_`, `+` and `.`. */
  readonly name: string
  /** Every location with its first value. */
  readonly initial: Readonly<Record<string, number>>
  readonly threads: readonly LitmusThread[]
  /** The outcome that the rule forbids: register and value, for each thread by its number; all of them together. */
  readonly forbidden: readonly Readonly<Record<string, number>>[]
}

/** The test for herd7. @throws RangeError if it names a location or a register that there is not. */
export function litmusText(test: LitmusTest): string {
  assertLitmus(test)
  const atomic = new Set(test.threads.flatMap(({ steps }) => steps.flatMap((step) => ('add' in step ? step.add : []))))
  const initial = Object.entries(test.initial).map(([at, value]) => `${at}=${value};`)
  const threads = test.threads.map(({ name, steps }, number) => {
    const used = [...new Set(steps.map(locationOf).filter((at) => at !== undefined))]
    const parameters = used.map((at) => `${atomic.has(at) ? 'atomic_t' : 'int'} *${at}`).join(', ')
    const registers = steps.flatMap((step) => ('into' in step ? [`\tint ${step.into};`] : []))
    const lines = steps.map((step) => `\t${statement(step, atomic)}`)
    return [`// ${name}`, `P${number}(${parameters})`, '{', ...registers, ...lines, '}', ''].join('\n')
  })
  const exists = conditions(test).map(([thread, register, value]) => `${thread}:${register}=${value}`)
  return `C ${test.name}\n\n{ ${initial.join(' ')} }\n\n${threads.join('\n')}\nexists (${exists.join(' /\\ ')})\n`
}

function statement(step: LitmusStep, atomic: ReadonlySet<string>): string {
  if ('fence' in step) return `smp_${step.fence}();`
  if ('write' in step) return atomic.has(step.write) ? `atomic_set(${step.write}, ${step.value});` : once(step)
  if ('add' in step) return `${step.into} = atomic_add_return(${step.value}, ${step.add});`
  return `${step.into} = ${atomic.has(step.read) ? `atomic_read(${step.read})` : `READ_ONCE(*${step.read})`};`
}

const once = ({ write, value }: { write: string; value: number }): string => `WRITE_ONCE(*${write}, ${value});`

interface State {
  memory: Record<string, number>
  registers: Record<string, number>
}

/** The test as a scenario: its end "forbidden" fails where the forbidden outcome comes about. */
export function litmusScenario(test: LitmusTest): Scenario<State> {
  assertLitmus(test)
  const actors = test.threads.map(({ name, steps }, number): Actor<State> => {
    const accesses = steps.filter((step) => !('fence' in step))
    return actor(
      name,
      {},
      accesses.map((step) => access(step, number)),
    )
  })
  const check = ({ registers }: Readonly<State>): string | null =>
    conditions(test).every(([thread, register, value]) => registers[`${thread}:${register}`] === value)
      ? conditions(test)
          .map((condition) => `${condition[0]}:${condition[1]}=${condition[2]}`)
          .join(', ')
      : null
  return {
    initial: () => ({ memory: { ...test.initial }, registers: {} }),
    actors,
    atEnd: [{ name: 'forbidden', check }],
  }
}

function access(step: LitmusStep, thread: number): Step<State> {
  if ('write' in step) {
    const run = ({ memory }: State): void => {
      memory[step.write] = step.value
    }
    return { label: `${step.write} = ${step.value}`, run }
  }
  if ('add' in step) {
    const register = `${thread}:${step.into}`
    const run = ({ memory, registers }: State): void => {
      memory[step.add] = (memory[step.add] as number) + step.value
      registers[register] = memory[step.add] as number
    }
    return { label: `${step.into} = ${step.add} += ${step.value}`, run }
  }
  if ('read' in step) {
    const register = `${thread}:${step.into}`
    const run = ({ memory, registers }: State): void => {
      registers[register] = memory[step.read] as number
    }
    return { label: `${step.into} = ${step.read}`, run, shows: ({ registers }) => `${registers[register]}` }
  }
  throw new RangeError('a fence is no access')
}

const locationOf = (step: LitmusStep): string | undefined =>
  'write' in step ? step.write : 'read' in step ? step.read : 'add' in step ? step.add : undefined

const conditions = ({ forbidden }: LitmusTest): [number, string, number][] =>
  forbidden.flatMap((registers, thread) =>
    Object.entries(registers).map(([register, value]): [number, string, number] => [thread, register, value]),
  )

function assertLitmus(test: LitmusTest): void {
  const { name, threads, initial } = test
  if (!/^[\w.+-]+$/.test(name)) throw new RangeError(`"${name}" cannot be the name of a litmus test`)
  for (const { name: thread, steps } of threads)
    for (const at of steps.map(locationOf))
      if (at !== undefined && initial[at] === undefined)
        throw new RangeError(`${thread} of ${name} uses ${at}, which has no first value`)
  for (const [thread, register] of conditions(test))
    if (threads[thread]?.steps.some((step) => 'into' in step && step.into === register) !== true)
      throw new RangeError(`the outcome of ${name} names register ${register} of thread ${thread}, which has none`)
}
