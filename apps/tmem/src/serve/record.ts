/**
 * What a server that did not end cleanly has taken with it.
 *
 * Clients of NBD reconnect, and nothing in the protocol tells them that a device is empty now: they would read zeros where their data was. So a
 * server keeps a record beside its control socket while it serves, and takes it away when it ends. The next one finds what a killed one has
 * left, and does not serve unless the loss is consented to (`--fresh`), or nothing was lost, because every device has a snapshot.
 */
import { readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { markedProcess, processMark } from '@tmem/core'
import { Failed } from '../ending.ts'

/** What of a device is there after its server was killed: nothing, what was flushed, or all that was acknowledged. */
export type Survival = 'nothing' | 'flushed' | 'acknowledged'

interface Content {
  readonly mark: string
  readonly devices: readonly { readonly name: string; readonly survives: Survival }[]
}

const pathOf = (control: string): string => `${control}.record`

/** A server that left its record behind. */
export interface FormerServer {
  readonly pid: number
  /** It has not ended. */
  readonly running: boolean
  /** Devices of which nothing is left, and devices of which what was flushed is left, once it has ended; `''`: none. */
  readonly lost: string
  readonly partly: string
}

/** Whose record is beside a control socket, if one is. Throws `Failed` for what is none. */
export function formerServer(control: string): FormerServer | undefined {
  const path = pathOf(control)
  const content = read(path)
  if (content === undefined) return undefined
  const owner = markedProcess(content.mark)
  if (owner === undefined) throw spoilt(path)
  const names = (survives: Survival): string =>
    content.devices
      .filter((device) => device.survives === survives)
      .map(({ name }) => name)
      .join(', ')
  return { ...owner, lost: names('nothing'), partly: names('flushed') }
}

/**
 * Judges the record beside a control socket: lines to tell about a server that was killed. Throws `Failed` when the server still runs,
 * and when pages are lost and `fresh` does not consent to that.
 */
export function judgeRecord(control: string, fresh: boolean): string[] {
  const former = formerServer(control)
  if (former === undefined) return []
  const { pid, running, lost, partly } = former
  if (running) throw new Failed(`process ${pid} serves on ${control}: stop it, or give another --control`)
  const what = `process ${pid}, the server before, was killed`
  if (lost !== '' && !fresh)
    throw new Failed(
      `${what}: what it held of ${lost} is lost, as there was no snapshot. Its clients would read zeros: end them, then start with --fresh`,
    )
  return [
    ...(lost === '' ? [] : [`${what}: what it held of ${lost} is lost`]),
    ...(partly === '' ? [] : [`${what}: of ${partly} what was flushed is there, of later writes perhaps a part`]),
  ]
}

/** Writes the record of this process; what it returns takes it away. */
export function keepRecord(control: string, devices: Content['devices']): () => void {
  const path = pathOf(control)
  const content: Content = { mark: processMark(), devices }
  // Never half a record.
  const draft = `${path}-${process.pid}`
  try {
    writeFileSync(draft, JSON.stringify(content), { mode: 0o600 })
    renameSync(draft, path)
  } catch (error) {
    rmSync(draft, { force: true })
    throw new Failed(`${path} cannot be written: ${(error as Error).message}`)
  }
  return () => {
    if (read(path)?.mark === content.mark) rmSync(path)
  }
}

function read(path: string): Content | undefined {
  let text: string
  try {
    text = readFileSync(path, 'utf8')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw new Failed(`${path} cannot be read: ${(error as Error).message}`)
  }
  try {
    const { mark, devices } = JSON.parse(text) as Content
    const known = ['nothing', 'flushed', 'acknowledged']
    if (
      typeof mark === 'string' &&
      devices.every(({ name, survives }) => typeof name === 'string' && known.includes(survives))
    )
      return { mark, devices }
  } catch {
    // Whatever is wrong with it, what to do is the same.
  }
  throw spoilt(path)
}

const spoilt = (path: string): Failed =>
  new Failed(`${path} is no record of a server: see whether one runs, and remove it if not`)
