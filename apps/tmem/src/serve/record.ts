/**
 * What a server that did not end cleanly has taken with it, and which server has a control path.
 *
 * Clients of NBD reconnect, and nothing in the protocol tells them that a device is empty now: they would read zeros
 * where their data was. So a server keeps a record beside its control socket while it serves, and takes it away when it
 * ends with nothing lost. The next one finds what another one has left, and does not serve unless the loss is consented
 * to (`--fresh`), or nothing was lost, because every device has a snapshot.
 *
 * The record is a page file (@tmem/page-file), and its claim is the server's claim to the control path: the first thing
 * that a server takes and the last that it gives back. Behind the mark stands a line of JSON.
 *
 * Invariants:
 *  - Of servers on one control path only the owner of the record touches anything: sockets, devices, the record of the
 *    one before.
 *  - The record of the one before stays as it is until the devices of the next one are open.
 *  - It is taken away only where nothing was lost: what was lost at an end that was asked for is told as that of a kill
 *    is.
 */
import { lstatSync } from 'node:fs'
import { markedProcess, processMark, TmemError } from '@tmem/core'
import { PageFile } from '@tmem/page-file'
import { Failed, LookFirst } from '../ending.ts'

/** What of a device is there after its server was killed: nothing, what was flushed, or all that was acknowledged. */
export type Survival = 'nothing' | 'flushed' | 'acknowledged'

/** A device, and what of it is there again. */
export interface Kept {
  readonly name: string
  readonly survives: Survival
}

/** What stands in a record. */
export interface Content {
  readonly mark: string
  readonly devices: readonly Kept[]
  /** It ended because it was asked to, and these devices have lost something. */
  readonly ended?: boolean
}

/** The file beside a control socket. */
export const recordPath = (control: string): string => `${control}.record`

const blockBytes = 4096

/** A server that left its record behind. */
export interface FormerServer {
  readonly pid: number
  /** It has not ended. */
  readonly running: boolean
  /** How it ended, once it has. */
  readonly end: string
  /** Devices of which nothing is left, and devices of which what was flushed is left, once it has ended; `''`: none. */
  readonly lost: string
  readonly partly: string
  readonly content: Content
}

/** Whose record is beside a control socket, if one is. Throws `Failed` for what is none. */
export function formerServer(control: string): FormerServer | undefined {
  const path = recordPath(control)
  let file: PageFile
  try {
    file = PageFile.open({ path, mode: 'read', through: 'cache', io: 'blocking' })
  } catch (error) {
    // It may be taken away at any time.
    if (lstatSync(path, { throwIfNoEntry: false }) === undefined) return undefined
    throw new Failed(`${path} cannot be read: ${(error as Error).message}`)
  }
  try {
    return contentOf(file)
  } finally {
    file.closeNow()
  }
}

function contentOf(file: PageFile): FormerServer | undefined {
  const spoilt = (): Failed =>
    new Failed(`${file.path} is no record of a server: see whether one runs, and remove it if not`)
  if (file.bytes < 2 * blockBytes) throw spoilt()
  const bytes = Buffer.alloc(file.bytes - blockBytes)
  file.readNow(bytes, 0, bytes.length, blockBytes)
  const text = bytes.toString().replace(/\0+$/, '')
  // Its server ended before it served.
  if (text === '') return undefined
  let content: Content
  try {
    content = JSON.parse(text) as Content
  } catch {
    // Whatever is wrong with it, what to do is the same.
    throw spoilt()
  }
  const owner = typeof content?.mark === 'string' ? markedProcess(content.mark) : undefined
  if (owner === undefined || !Array.isArray(content.devices)) throw spoilt()
  const names = (survives: Survival): string =>
    content.devices
      .filter((device) => device.survives === survives)
      .map(({ name }) => name)
      .join(', ')
  const end = content.ended === true ? 'could not keep all when it ended' : 'was killed'
  return { ...owner, end, lost: names('nothing'), partly: names('flushed'), content }
}

/** The record of this process. */
export class ServerRecord {
  readonly #file: PageFile
  readonly #former: FormerServer | undefined
  #isKept = false

  /**
   * Claims a control path. Throws `Failed`, with nothing touched, when another server has it, or when what is beside it
   * is none of ours.
   */
  constructor(control: string) {
    const path = recordPath(control)
    try {
      this.#file = PageFile.open({
        path,
        mode: 'ours',
        bytes: 2 * blockBytes,
        content: { name: 'tmem serve record' },
        keep: true,
        // Nothing of it is to survive the host, whose clients go with it.
        through: 'cache',
        io: 'blocking',
      })
    } catch (error) {
      if (!(error instanceof TmemError)) throw error
      const former = formerServer(control)
      if (former?.running === true)
        throw new Failed(`process ${former.pid} serves on ${control}: stop it, or give another --control`)
      throw new Failed(`the record beside the control socket cannot be had: ${error.message}`)
    }
    try {
      this.#former = contentOf(this.#file)
    } catch (error) {
      this.#file.closeNow()
      throw error
    }
  }

  /**
   * Lines to tell about the server before. Throws `LookFirst` when pages are lost and `fresh` does not consent to that.
   */
  judge(fresh: boolean): string[] {
    if (this.#former === undefined) return []
    const { pid, end, lost, partly } = this.#former
    const what = `process ${pid}, the server before, ${end}`
    if (lost !== '' && !fresh)
      throw new LookFirst(
        `${what}: what it held of ${lost} is lost, as there was no snapshot. Its clients would read zeros: end them, then start with --fresh`,
      )
    return [
      ...(lost === '' ? [] : [`${what}: what it held of ${lost} is lost`]),
      ...(partly === '' ? [] : [`${what}: of ${partly} what was flushed is there, of later writes perhaps a part`]),
    ]
  }

  /** From here on the end of this process is told as it will have been. Throws `Failed`. */
  keep(devices: readonly Kept[]): void {
    this.#write({ mark: processMark(), devices })
    this.#isKept = true
  }

  /**
   * Gives the control path back. What was lost is left for the next one; so is the record of the server before, where
   * this one never served; else nothing is. Throws `Failed`.
   */
  end(lost: readonly Kept[], served: boolean): void {
    const isClean = lost.length === 0 && (served || this.#former === undefined)
    try {
      if (lost.length > 0) this.#write({ mark: processMark(), devices: lost, ended: true })
      else if (!isClean && this.#isKept) this.#write(this.#former!.content)
    } finally {
      this.#file.closeNow({ remove: isClean })
    }
  }

  #write(content: Content): void {
    const text = Buffer.from(JSON.stringify(content))
    const bytes = Math.ceil(text.length / blockBytes) * blockBytes
    try {
      this.#file.resize(blockBytes + Math.max(bytes, this.#file.bytes - blockBytes))
      const all = Buffer.alloc(this.#file.bytes - blockBytes)
      all.set(text)
      this.#file.writeNow(all, 0, all.length, blockBytes)
    } catch (error) {
      throw new Failed(`the record of this server cannot be written: ${(error as Error).message}`)
    }
  }
}
