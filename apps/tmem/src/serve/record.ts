/**
 * The record of a server: what is lost if it does not end cleanly, and which server owns a control path.
 *
 * NBD clients reconnect, and nothing in the protocol tells them that a device has become empty: they would read zeros
 * instead of their data. So a server keeps a record beside its control socket while it serves, and removes it if it
 * ends without loss. A later server that finds a record refuses to serve, unless the user consents to the loss
 * (`--fresh`) or every device has a snapshot, so that nothing is lost.
 *
 * The record is a page file (@tmem/page-file). Its claim is the server's claim to the control path: the first thing
 * that a server takes and the last that it gives back. A line of JSON follows the mark.
 *
 * Invariants:
 *  - Of several servers on one control path, only the owner of the record touches sockets, devices and the earlier
 *    record.
 *  - The earlier record stays unchanged until the devices of the next server are open.
 *  - A record is removed only if nothing was lost: a loss at a regular end is reported like the loss of a kill.
 */
import { lstatSync } from 'node:fs'
import { markedProcess, processMark, TmemError } from '@tmem/core'
import { PageFile } from '@tmem/page-file'
import { Failed, LookFirst } from '../ending.ts'

/** The part of a device that survives a kill of its server: nothing, what was flushed, or all that was acknowledged. */
export type Survival = 'nothing' | 'flushed' | 'acknowledged'

/** A device, and the part of it that survives. */
export interface Kept {
  readonly name: string
  readonly survives: Survival
}

/** The content of a record. */
export interface Content {
  readonly mark: string
  readonly devices: readonly Kept[]
  /** The server ended regularly, and these devices have lost pages. */
  readonly ended?: boolean
}

/** The file beside a control socket. */
export const recordPath = (control: string): string => `${control}.record`

const blockBytes = 4096

/** A server that left its record behind. */
export interface FormerServer {
  readonly pid: number
  /** The server has not ended. */
  readonly running: boolean
  /** How the server ended, once it has. */
  readonly end: string
  /**
   * Once the server has ended: the devices that are lost, and the devices with their flushed pages alone; `''` for
   * none.
   */
  readonly lost: string
  readonly partly: string
  readonly content: Content
}

/** The server whose record is beside a control socket, if any. Throws `Failed` for a file that is not a record. */
export function formerServer(control: string): FormerServer | undefined {
  const path = recordPath(control)
  let file: PageFile
  try {
    file = PageFile.open({ path, mode: 'read', through: 'cache', io: 'blocking' })
  } catch (error) {
    // The server may remove the file at any time.
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
    new Failed(`${file.path} is not a record of a server: check whether a server runs, and remove the file if not`)
  if (file.bytes < 2 * blockBytes) throw spoilt()
  const bytes = Buffer.alloc(file.bytes - blockBytes)
  file.readNow(bytes, 0, bytes.length, blockBytes)
  const text = bytes.toString().replace(/\0+$/, '')
  // The server ended before it served.
  if (text === '') return undefined
  let content: Content
  try {
    content = JSON.parse(text) as Content
  } catch {
    // The advice is the same for every kind of damage.
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
   * Claims a control path. Throws `Failed`, with nothing touched, if another server has it or the file beside it is not
   * a record.
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
        // The record need not survive a crash of the host, whose clients crash with it.
        through: 'cache',
        io: 'blocking',
      })
    } catch (error) {
      if (!(error instanceof TmemError)) throw error
      const former = formerServer(control)
      if (former?.running === true)
        throw new Failed(`process ${former.pid} serves on ${control}: stop it, or name another --control`)
      throw new Failed(`the record beside the control socket cannot be opened: ${error.message}`)
    }
    try {
      this.#former = contentOf(this.#file)
    } catch (error) {
      this.#file.closeNow()
      throw error
    }
  }

  /**
   * Lines about the earlier server for the log. Throws `LookFirst` if pages are lost and `fresh` does not consent to
   * that.
   */
  judge(fresh: boolean): string[] {
    if (this.#former === undefined) return []
    const { pid, end, lost, partly } = this.#former
    const what = `process ${pid}, the earlier server, ${end}`
    if (lost !== '' && !fresh)
      throw new LookFirst(
        `${what}: the pages of ${lost} are lost, as there was no snapshot. Clients would read zeros: end them, then start with --fresh`,
      )
    return [
      ...(lost === '' ? [] : [`${what}: the pages of ${lost} are lost`]),
      ...(partly === '' ? [] : [`${what}: ${partly} has all that was flushed, and perhaps a part of later writes`]),
    ]
  }

  /** Writes the record: from here on the next server learns how this process ended. Throws `Failed`. */
  keep(devices: readonly Kept[]): void {
    this.#write({ mark: processMark(), devices })
    this.#isKept = true
  }

  /**
   * Gives the control path back. Leaves a record of lost pages for the next server, or the earlier record if this
   * server never served; otherwise leaves nothing. Throws `Failed`.
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
