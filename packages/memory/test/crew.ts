/** Worker threads that carry out the tasks of `threads-worker.mjs`, with a bound to every wait. */
import { readdirSync, statSync } from 'node:fs'
import { Worker } from 'node:worker_threads'

/** Longest time that a task may take, in milliseconds. */
const patience = 15_000

export class Crew {
  readonly #workers: Worker[]
  readonly #progress: Int32Array
  readonly #waiting = new Map<number, { answer(value: unknown): void; fail(error: Error): void }>()
  #nextId = 1
  #ended: string | undefined

  private constructor(count: number) {
    assertBuilt()
    this.#progress = new Int32Array(new SharedArrayBuffer(count * 8))
    this.#workers = Array.from({ length: count }, (_, thread) => {
      const worker = new Worker(new URL('./threads-worker.mjs', import.meta.url), {
        workerData: { thread, progress: this.#progress },
        // Not the test runner's: its conditions lead to the sources, which a worker cannot load.
        execArgv: [],
      })
      worker.on('message', ({ id, value, error, stack }) => {
        const waiting = this.#waiting.get(id)
        this.#waiting.delete(id)
        if (error === undefined) waiting?.answer(value)
        else waiting?.fail(new Error(`thread ${thread}: ${error}`, { cause: stack }))
      })
      worker.on('error', (error) => this.#failAll(error))
      return worker
    })
  }

  static start(count: number): Crew {
    return new Crew(count)
  }

  get size(): number {
    return this.#workers.length
  }

  /**
   * Has one thread carry out a task. When it does not answer in time, which a deadlock looks like, all threads are
   * ended and the promise rejects with how far they came.
   */
  run<T>(thread: number, task: string, args: object): Promise<T> {
    if (this.#ended !== undefined) return Promise.reject(new Error(this.#ended))
    const id = this.#nextId++
    return new Promise<T>((resolve, reject) => {
      const timer = setTimeout(() => {
        const states = this.#workers.map(
          (_, i) => `thread ${i} at ${this.#progress[i * 2]}/${this.#progress[i * 2 + 1]}`,
        )
        const message = `thread ${thread} did not finish ${task} within ${patience} ms; ${states.join(', ')}`
        this.#failAll(new Error(message))
        void this.close()
      }, patience)
      this.#waiting.set(id, {
        answer(value) {
          clearTimeout(timer)
          resolve(value as T)
        },
        fail(error) {
          clearTimeout(timer)
          reject(error)
        },
      })
      this.#workers[thread]!.postMessage({ id, task, args })
    })
  }

  /** Has every thread carry out a task, and waits for all, also when one fails. */
  async all<T>(count: number, task: string, argsOf: (thread: number) => object): Promise<T[]> {
    const runs = Array.from({ length: count }, (_, thread) => this.run<T>(thread, task, argsOf(thread)))
    return settled(runs)
  }

  /** Ends all threads. */
  async close(): Promise<void> {
    this.#failAll(new Error('the threads were ended'))
    await Promise.all(this.#workers.map((worker) => worker.terminate()))
  }

  #failAll(error: Error): void {
    this.#ended ??= error.message
    const waiting = [...this.#waiting.values()]
    this.#waiting.clear()
    for (const one of waiting) one.fail(error)
  }
}

/** The answers of all; failures only when all have answered, so that nobody works on meanwhile. */
export async function settled<T>(runs: readonly Promise<T>[]): Promise<T[]> {
  const results = await Promise.allSettled(runs)
  const failures = results.flatMap((result) => (result.status === 'rejected' ? [String(result.reason)] : []))
  if (failures.length > 0) throw new Error(failures.join('\n'))
  return results.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []))
}

/** Worker threads load what was built: it must not be older than the sources. */
function assertBuilt(): void {
  for (const folder of ['../', '../../tmem-core/', '../../conformance/']) {
    const source = new URL(`${folder}src/`, import.meta.url)
    const newest = Math.max(...readdirSync(source).map((file) => statSync(new URL(file, source)).mtimeMs))
    const built = statSync(new URL(`${folder}dist/.tsbuildinfo`, import.meta.url), { throwIfNoEntry: false })?.mtimeMs
    if (built === undefined || built < newest)
      throw new Error('worker threads run what was built, which is older than the sources: npm run build')
  }
}
