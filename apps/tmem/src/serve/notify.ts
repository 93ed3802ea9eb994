/**
 * Tells the service manager when this process serves, and when it begins to end (`Type=notify`).
 *
 * Node has no unix datagram sockets, so that systemd's own program sends the message, and a unit needs
 * `NotifyAccess=all`. Without a manager that wants messages, nothing happens.
 *
 * Source: sd_notify(3), systemd-notify(1).
 */
import { execFile } from 'node:child_process'
import type { Log } from './log.ts'

export class ServiceManager {
  readonly #socket: string | undefined
  readonly #log: Log

  /** Removes the address from `environment`, so that no child takes it for its own. */
  constructor(environment: NodeJS.ProcessEnv, log: Log) {
    this.#socket = environment['NOTIFY_SOCKET']
    delete environment['NOTIFY_SOCKET']
    this.#log = log
  }

  /** Reports that it serves, with `status`, a line for people. Resolves when the message is sent or has failed. */
  ready(status: string): Promise<void> {
    return this.#tell('READY=1', `STATUS=${status}`)
  }

  /** Reports that it begins to end. */
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
            `the service manager cannot be notified (systemd-notify ${words[0]}): ${stderr.trim() || error.message}`,
          )
        resolve()
      })
    })
  }
}
