// How a rehearsal runs programs: their output is kept, and shown when they fail; steps are told with their time.
import { spawn } from 'node:child_process'

/**
 * Runs a program to its end, and resolves with what it wrote to standard output. Rejects with everything that it said
 * when it fails, or takes more than `seconds` (default: 300).
 */
export function run(cwd, [name, ...words], { env = process.env, seconds = 300 } = {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(name, words, { cwd, env, stdio: ['ignore', 'pipe', 'pipe'] })
    const said = { stdout: [], stderr: [] }
    for (const stream of ['stdout', 'stderr']) child[stream].on('data', (bytes) => said[stream].push(bytes))
    const late = setTimeout(() => child.kill('SIGKILL'), seconds * 1000)
    const text = (stream) => Buffer.concat(said[stream]).toString()
    child.on('error', reject)
    child.on('close', (status, signal) => {
      clearTimeout(late)
      if (status === 0) return resolve(text('stdout'))
      const how = signal === null ? `ended with ${status}` : `was ended by ${signal}`
      reject(new Error(`${[name, ...words].join(' ')} ${how} in ${cwd}:\n${text('stdout')}${text('stderr')}`))
    })
  })
}

/** Does all of the tasks, so many at a time, also when some fail; then throws what the first one threw. */
export async function together(width, tasks) {
  const waiting = [...tasks]
  const errors = []
  const worker = async () => {
    for (let task = waiting.shift(); task !== undefined; task = waiting.shift()) {
      await task().catch((error) => errors.push(error))
    }
  }
  await Promise.all(Array.from({ length: width }, worker))
  if (errors.length === 0) return
  for (const error of errors.slice(1)) console.log(error.message)
  throw errors[0]
}

/** Does one step, and says how long it took and what came of it. */
export async function step(what, action) {
  const start = performance.now()
  const result = await action()
  const seconds = ((performance.now() - start) / 1000).toFixed(1)
  console.log(`${seconds.padStart(6)} s  ${what}${typeof result === 'string' ? `: ${result}` : ''}`)
  return result
}
