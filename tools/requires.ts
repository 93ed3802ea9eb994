// What a test needs of the machine. Where that is missing the test is skipped, and the reason is shown at the end:
//   test("…", (ctx) => { requires(ctx, { commands: ["lz4"] }); … });
import { accessSync } from 'node:fs'
import { has, unpacked } from './debian-packages.mjs'

export interface Needs {
  /** Programs on PATH; tools/debian-packages.json lists those that the test set-up installs. */
  readonly commands?: readonly string[]
  readonly root?: boolean
  /** Packages that tools/debian-packages.json has unpacked into `.cache`. */
  readonly packages?: readonly string[]
  /** Files or devices that must be there. */
  readonly paths?: readonly string[]
}

/** The reason why a test cannot run here, or undefined. */
export function lacking(needs: Needs): string | undefined {
  if (needs.root && process.getuid?.() !== 0) return 'needs root'
  const command = needs.commands?.find((name) => !has(name))
  if (command !== undefined) return `needs the program ${command}`
  const missing = needs.packages?.find((name) => !readable(unpacked(name)))
  if (missing !== undefined) return `needs the package ${missing}`
  const path = needs.paths?.find((name) => !readable(name))
  return path === undefined ? undefined : `needs ${path}`
}

export function requires(ctx: { skip(note?: string): never }, needs: Needs): void {
  const reason = lacking(needs)
  if (reason !== undefined) ctx.skip(reason)
}

function readable(path: string): boolean {
  try {
    accessSync(path)
    return true
  } catch {
    return false
  }
}
