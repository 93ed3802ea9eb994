/**
 * Tells the service manager that started this process when it serves, and when it begins to end (`Type=notify`).
 *
 * The runtime has no datagram sockets of the unix kind, so systemd's own program sends the message: a unit needs
 * `NotifyAccess=all`. Where nobody asked to be told, nothing is done.
 *
 * Source: sd_notify(3), systemd-notify(1).
 */
import { execFile } from 'node:child_process'
import type { Log } from './log.ts'

export class ServiceManager {
  readonly #socket: string | undefined
  readonly #log: Log

  /** Takes the address out of `environment`, so that no child believes that it is asked. */
  constructor(environment: NodeJS.ProcessEnv, log: Log) {
    this.#socket = environment['NOTIFY_SOCKET']
    delete environment['NOTIFY_SOCKET']
    this.#log = log
  }

  /** It serves; `status`: what, in a line for people. Resolves when that is told, or was said to be impossible. */
  ready(status: string): Promise<void> {
    return this.#tell('READY=1', `STATUS=${status}`)
  }

  /** It begins to end. */
  stopping(): Promise<void> {
    return this.#tell('STOPPING=1')
  }

  #tell(...words: string[]): Promise<void> {
    const socket = this.#socket
    if (socket === undefined || socket === '') return Promise.resolve()
    return new Promise((resolve) => {
      execFile('systemd-notify', words, { env: { ...process.env, NOTIFY_SOCKET: socket } }, (error, _, stderr) => {
        if (error !== null)
          this.#log.warn(
            'server.notify',
            `the service manager cannot be told (systemd-notify ${words[0]}): ${stderr.trim() || error.message}`,
          )
        resolve()
      })
    })
  }
}
