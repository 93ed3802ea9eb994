// What other threads do with a shared cache: tasks by name, and one that never ends until the thread does.
import { parentPort, workerData } from 'node:worker_threads'
import { Cache } from '@tmem/cache'

/** Numbers from a seed: below `end`. */
export function randomOf(seed) {
  let state = seed | 0
  return (end) => {
    state = (Math.imul(state, 1664525) + 1013904223) | 0
    return (state >>> 8) % end
  }
}

/** A value that says whose it is, and where it ends. */
export const valueFor = (key, turn, length) => `${key}|${turn}|${`${key}${turn} `.repeat(length)}|end`
const isWhole = (key, value) => {
  const [of, turn, text, end] = value.split('|')
  return of === key && end === 'end' && text === `${key}${turn} `.repeat(text.length / `${key}${turn} `.length)
}

const now = () => performance.timeOrigin + performance.now()

/** What a thread does in a turn, with keys of its own and with those of all. Returns what was wrong. */
export function turnOf(cache, random, name, turn, model) {
  const own = `${name} ${random(200)}`
  const common = `common ${random(50)}`
  const length = random(20) === 0 ? 200 + random(3000) : random(30)
  const wrong = []
  switch (random(8)) {
    case 0:
    case 1: {
      const value = valueFor(own, turn, length)
      const ttl = random(4) === 0 ? 1 + random(30) : undefined
      const stored = cache.set(own, value, { tags: [name], ttl })
      if (stored) model.set(own, { value, expiry: ttl === undefined ? Number.POSITIVE_INFINITY : now() + ttl })
      else model.delete(own)
      break
    }
    case 2:
      cache.set(common, valueFor(common, turn, length), random(3) === 0 ? { ttl: 1 + random(20) } : {})
      break
    case 3: {
      const wasThere = cache.delete(own)
      if (wasThere && !model.has(own)) wrong.push(`${own} was deleted twice`)
      model.delete(own)
      break
    }
    case 4:
      if (random(100) === 0) {
        cache.deleteByTag(name)
        model.clear()
      }
      break
    case 5: {
      const value = cache.get(common)
      if (value !== undefined && !isWhole(common, value)) wrong.push(`${common} is ${value}`)
      break
    }
    default: {
      const time = now()
      const value = cache.get(own)
      const wanted = model.get(own)
      // It may have had to go; it is never an old one, never somebody else's, and gone when its time is over.
      if (value !== undefined && (value !== wanted?.value || time > wanted.expiry + 1))
        wrong.push(`${own} is ${value}, not ${JSON.stringify(wanted)} at ${time}`)
    }
  }
  return wrong
}

const tasks = {
  /** Random operations. */
  hammer({ shared, name, seed, turns }) {
    const cache = Cache.join(shared)
    const random = randomOf(seed)
    const model = new Map()
    const wrong = []
    for (let turn = 0; turn < turns; turn++) wrong.push(...turnOf(cache, random, name, turn, model))
    return { wrong, hits: cache.stats().hits, known: model.size }
  },

  /** Gets of keys that somebody else has set. */
  read({ shared, keys }) {
    const cache = Cache.join(shared)
    return cache.getMany(keys)
  },

  /** What the cache says when it is called with hardly any stack left, at every depth. */
  overflow({ shared }) {
    const cache = Cache.join(shared)
    let failures = 0
    const dive = (depth) => {
      try {
        dive(depth + 1)
      } catch {
        failures++
      }
      // Here the stack ends, and one call after the other has a little more of it.
      if (failures < 400) {
        try {
          cache.set(`depth ${failures}`, 'x'.repeat(500))
          cache.get(`depth ${failures}`)
        } catch {
          failures++
        }
      }
    }
    dive(0)
    return failures
  },

  /** Loads a key slowly. */
  async load({ shared, key, value, flags }) {
    const cache = Cache.join(shared)
    return await cache.fetch(key, async () => {
      Atomics.store(flags, 0, 1)
      Atomics.notify(flags, 0)
      Atomics.wait(flags, 1, 0, 10_000)
      return value
    })
  },
}

if (workerData?.forever !== undefined) {
  const { shared, name, seed, started } = workerData.forever
  const cache = Cache.join(shared)
  const random = randomOf(seed)
  // Values are made before: so the thread is under a lock most of the time.
  const values = Array.from({ length: 60 }, (_, n) => [
    `${name} ${n}`,
    valueFor(`${name} ${n}`, n, n % 6 === 0 ? 4000 : n),
  ])
  Atomics.store(started, 0, 1)
  Atomics.notify(started, 0)
  for (;;) {
    const [key, value] = values[random(values.length)]
    cache.set(key, value)
    if (random(4) === 0) cache.get(key)
  }
}

const answer = async ({ task, args }) => {
  try {
    parentPort.postMessage({ value: await tasks[task](args) })
  } catch (error) {
    parentPort.postMessage({ error: error.stack })
  }
}
parentPort?.on('message', (message) => void answer(message))
