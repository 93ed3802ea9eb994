/**
 * Limits of zcache and memory that follow the host: `limit=auto` in a stack, and `--memory auto`.
 *
 * One governor (@tmem/zcache) steers one budget for all such places, each of which has an equal share: several
 * governors would all take the same free memory. The memory of such a place is not reserved, so that it does not count
 * towards the room that a device needs.
 *
 * A server to which the kernel of this host swaps must take all memory ahead, and cannot use this.
 */
import { ByteLimit, type Layer, type LayerFactory, type MemoryPlace, type OptionValue, parseBytes } from '@tmem/core'
import { memory, memoryFactory } from '@tmem/memory'
import { Decision, Governor, type ReadText, readHostMemory, zcache, zcacheFactory } from '@tmem/zcache'
import { BadInput } from '../ending.ts'
import { readText } from './host.ts'

interface Settings {
  readonly floorBytes?: number
  readonly ceilingBytes?: number
  readonly reserveBytes?: number
}

/** The smallest useful shared budget. */
const leastShareBytes = 1024 * 1024

export class AutoMemory {
  readonly #settings: Settings | undefined
  readonly #read: ReadText
  readonly #limits: ByteLimit[] = []
  readonly #places: MemoryPlace[] = []
  #total: ByteLimit | undefined
  #governor: Governor | undefined

  /**
   * `text`: the value of `--memory`, `auto[,floor=BYTES][,ceiling=BYTES][,reserve=BYTES]`, or `undefined` without it.
   * Throws `BadInput` for any other text.
   */
  constructor(text: string | undefined, read: ReadText = readText) {
    this.#settings = text === undefined ? undefined : settingsOf(text)
    this.#read = read
  }

  /** The given factories, of which zcache and memory also accept `limit=auto`. */
  factories(plain: readonly LayerFactory[]): LayerFactory[] {
    const makes: Record<string, (limitBytes: ByteLimit, rest: Readonly<Record<string, OptionValue>>) => Layer> = {
      [zcacheFactory.name]: (limitBytes, rest) => zcache({ ...rest, limitBytes }),
      [memoryFactory.name]: (limitBytes) => memory({ limitBytes }),
    }
    return plain.map((factory) => {
      const make = makes[factory.name]
      const limit = factory.options['limit']
      if (make === undefined || limit === undefined) return factory
      return {
        ...factory,
        options: { ...factory.options, limit: { ...limit, choices: ['auto'], required: this.#settings === undefined } },
        create: ({ limit: given = 'auto', ...rest }) =>
          given === 'auto' ? this.#governed(make(this.#newLimit(), rest)) : factory.create({ ...rest, limit: given }),
      }
    })
  }

  /** Whether a limit follows the host. */
  get isUsed(): boolean {
    return this.#limits.length > 0
  }

  /**
   * Starts once all stacks are parsed, with every limit at its share of the floor. Throws `BadInput` for bad settings,
   * and if the host does not say how much memory it has.
   */
  begin(): void {
    if (!this.isUsed) {
      if (this.#settings === undefined) return
      throw new BadInput('--memory auto needs a zcache or memory without a limit, or with limit=auto, in a stack')
    }
    const ceiling = this.#ceiling()
    const { floorBytes, reserveBytes } = this.#settings ?? {}
    const least = this.#limits.length * leastShareBytes
    if (ceiling < least)
      throw new BadInput(
        `--memory auto: ceiling=${ceiling} is too small: ${this.#limits.length} places need at least ${least} bytes`,
      )
    this.#total = new ByteLimit(ceiling)
    try {
      this.#governor = new Governor({
        limit: this.#total,
        ...(floorBytes === undefined ? {} : { floorBytes }),
        ...(reserveBytes === undefined ? {} : { reserveBytes }),
      })
    } catch (error) {
      if (error instanceof RangeError) throw new BadInput(`--memory auto: ${error.message}`)
      throw error
    }
    this.#share()
  }

  /**
   * Looks at the host, about once a second. True if the pages take more than the budget, so that their stores must
   * tick.
   */
  step(nowMs: number): boolean {
    const host = this.#governor === undefined ? undefined : readHostMemory(this.#read)
    if (host === undefined) return false
    const used = this.#places.reduce((sum, { usedBytes }) => sum + usedBytes, 0)
    const decision = this.#governor!.step(nowMs, used, host)
    this.#share()
    return decision === Decision.Shrink
  }

  #governed({ name, place }: Layer): Layer {
    const traits = Object.freeze({ ...place!.traits, reservedBytes: 0 })
    return {
      name,
      place: {
        traits,
        open: (context) => {
          const open = place!.open(context) as MemoryPlace
          this.#places.push(open)
          return open
        },
      },
    }
  }

  #newLimit(): ByteLimit {
    const limit = new ByteLimit(this.#ceiling())
    this.#limits.push(limit)
    return limit
  }

  #share(): void {
    const each = Math.floor(this.#total!.bytes / this.#limits.length)
    for (const limit of this.#limits) limit.bytes = each
  }

  /** The given ceiling, or half of the memory that the host has available now. */
  #ceiling(): number {
    const given = this.#settings?.ceilingBytes
    if (given !== undefined) return given
    this.#found ??= readHostMemory(this.#read)?.availableBytes
    if (this.#found === undefined)
      throw new BadInput('limit=auto: this host does not say how much memory it has; set limits in bytes')
    return Math.floor(this.#found / 2)
  }

  #found: number | undefined
}

function settingsOf(text: string): Settings {
  const wrong = (): never => {
    throw new BadInput(`bad --memory "${text}": expected auto[,floor=BYTES][,ceiling=BYTES][,reserve=BYTES]`)
  }
  const [first, ...parts] = text.split(',')
  if (first !== 'auto') wrong()
  const settings: Record<string, number> = {}
  for (const part of parts) {
    const [, name, value] = /^(floor|ceiling|reserve)=(.+)$/.exec(part) ?? wrong()
    const bytes = parseBytes(value!)
    if (bytes === undefined || `${name}Bytes` in settings) wrong()
    settings[`${name}Bytes`] = bytes!
  }
  if (settings['ceilingBytes'] === 0) wrong()
  return settings
}
