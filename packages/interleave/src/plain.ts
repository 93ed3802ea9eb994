/**
 * Plain data: copying, an exact encoding for comparing states, and a recording view that tells which places of a state
 * a step reads and writes.
 *
 * The encoding is injective up to the order of keys in objects, so equal encodings mean equal states: a table keyed by
 * it has no collisions to worry about, at the price of longer keys. Small states make that a good trade.
 */

/** A deep copy. Keeps the order of keys. */
export function clonePlain<T>(value: T): T {
  if (typeof value !== 'object' || value === null) return value
  if (Array.isArray(value)) {
    const copy = new Array(value.length)
    for (let i = 0; i < value.length; i++) copy[i] = clonePlain(value[i])
    return copy as T
  }
  const copy: Record<string, unknown> = {}
  for (const key in value) copy[key] = clonePlain((value as Record<string, unknown>)[key])
  return copy as T
}

/**
 * The canonical text of plain data.
 * @throws TypeError with the path, for anything that is not plain.
 */
export function encodePlain(value: unknown, path = 'state'): string {
  switch (typeof value) {
    case 'number':
      if (!Number.isFinite(value)) throw new TypeError(`${path} is ${value}; plain data has finite numbers only`)
      return String(value)
    case 'string':
      return JSON.stringify(value)
    case 'boolean':
      return value ? 'T' : 'F'
    case 'object':
      break
    default:
      throw new TypeError(`${path} is of type ${typeof value}; plain data has no such values`)
  }
  if (value === null) return 'N'
  if (Array.isArray(value)) {
    let text = '['
    for (let i = 0; i < value.length; i++) text += `${encodePlain(value[i], path)},`
    return `${text}]`
  }
  const prototype = Object.getPrototypeOf(value)
  if (prototype !== Object.prototype && prototype !== null) {
    throw new TypeError(`${path} is a ${value.constructor?.name}; plain data has plain objects and arrays only`)
  }
  let text = '{'
  for (const key of Object.keys(value).sort()) {
    text += `${JSON.stringify(key)}:${encodePlain((value as Record<string, unknown>)[key], `${path}.${key}`)},`
  }
  return `${text}}`
}

/** What was touched, as dotted paths. */
export interface Touched {
  readonly reads: Set<string>
  /** Objects of which only the presence was seen, on the way to something inside them or for a test against null. */
  readonly passes: Set<string>
  readonly writes: Set<string>
}

export function touchedNothing(): Touched {
  return { reads: new Set(), passes: new Set(), writes: new Set() }
}

/**
 * A view of a state that notes what is read and written through it. Passing through an object on the way to something
 * inside it is no read of everything in it; asking for its keys or its length is.
 */
export function recording<T extends object>(root: T, touched: Touched): T {
  const originals = new WeakMap<object, object>()
  const views = new WeakMap<object, object>()
  const original = (value: unknown): unknown =>
    typeof value === 'object' && value !== null ? (originals.get(value) ?? value) : value
  const view = (target: object, path: string): object => {
    // One view for an object, so that comparing objects gives what it gives without views.
    const known = views.get(target)
    if (known !== undefined) return known
    const below = (key: string | symbol): string => (path === '' ? String(key) : `${path}.${String(key)}`)
    const proxy = new Proxy(target, {
      get: (inner, key) => {
        const value = Reflect.get(inner, key)
        if (typeof key === 'symbol' || typeof value === 'function') return value
        if (typeof value === 'object' && value !== null) {
          touched.passes.add(below(key))
          return view(value, below(key))
        }
        touched.reads.add(below(key))
        return value
      },
      set: (inner, key, value) => {
        touched.writes.add(below(key))
        return Reflect.set(inner, key, original(value))
      },
      deleteProperty: (inner, key) => {
        touched.writes.add(below(key))
        return Reflect.deleteProperty(inner, key)
      },
      defineProperty: (inner, key, descriptor) => {
        touched.writes.add(below(key))
        return Reflect.defineProperty(inner, key, descriptor)
      },
      has: (inner, key) => {
        touched.reads.add(below(key))
        return Reflect.has(inner, key)
      },
      ownKeys: (inner) => {
        touched.reads.add(path)
        return Reflect.ownKeys(inner)
      },
    })
    originals.set(proxy, target)
    views.set(target, proxy)
    return proxy
  }
  return view(root, '') as T
}

/** Whether one of two dotted paths lies inside the other. */
export function overlaps(one: string, other: string): boolean {
  return covers(one, other) || covers(other, one)
}

/** Whether a path is the outer one or lies inside it. */
export function covers(outer: string, inner: string): boolean {
  return outer === '' || inner === outer || inner.startsWith(`${outer}.`)
}
