/**
 * TLS on an endpoint: connections become secured ones, and what is wrong with a client's certificate is said.
 *
 * A certificate is judged here and not by the runtime, which would close the connection without a word. Who shows none
 * that is good is handed on with the reason, and may hear that and nothing else (see negotiation.ts). So sessions are
 * never resumed: of a resumed one the runtime says that it was authorized, whoever began it.
 */

import { constants } from 'node:crypto'
import type { Socket } from 'node:net'
import { createServer, type TLSSocket, type TlsOptions, type Server as TlsServer } from 'node:tls'
import { checkOptions, type OptionNames } from '@tmem/core'

/** TLS on a TCP endpoint: what clients are shown, and whom they have to be. */
export interface NbdTls extends Pick<TlsOptions, 'key' | 'cert' | 'ca' | 'crl' | 'minVersion' | 'passphrase'> {
  /** Clients must show a certificate that `ca` has signed. */
  readonly verifyClients?: boolean
  /** Clients may also go on without TLS. Only for a network that is trusted anyway. */
  readonly optional?: boolean
}

const tlsNames: OptionNames<NbdTls> = {
  key: 'any?',
  cert: 'any?',
  ca: 'any?',
  crl: 'any?',
  minVersion: 'any?',
  passphrase: 'any?',
  verifyClients: 'flag?',
  optional: 'flag?',
}

/** What becomes of a connection that began TLS. */
export interface Secured {
  /** It is secured; `refusal`: why its client may not go on. */
  secured(socket: Socket, refusal: string | undefined): void
  /** The handshake failed; the connection is closed by whoever began. */
  failed(reason: string): void
}

/** Turns connections into secured ones. */
export class Securing {
  readonly optional: boolean
  readonly #server: TlsServer
  readonly #verifies: boolean
  /** Who began, by address: a secured socket does not tell from which one it was made. */
  readonly #begun = new Map<string, Secured>()

  /** Throws for keys, certificates or settings that cannot be. */
  constructor(tls: NbdTls, handshakeMs: number) {
    checkOptions('tls of nbdServer', tls, tlsNames)
    const { verifyClients = false, optional = false, ...context } = tls
    if (verifyClients && context.ca === undefined) throw new TypeError('verifyClients needs ca: who signs for clients')
    this.optional = optional
    this.#verifies = verifyClients
    this.#server = createServer({
      minVersion: 'TLSv1.2',
      ...context,
      requestCert: verifyClients,
      rejectUnauthorized: false,
      handshakeTimeout: handshakeMs,
      secureOptions: constants.SSL_OP_NO_TICKET,
    })
    this.#server.on('secureConnection', (socket) => {
      const begun = this.#begun.get(addressOf(socket))
      // Nobody waits for it any more.
      if (begun === undefined) socket.destroy()
      else begun.secured(socket, this.#verifies ? refusalOf(socket) : undefined)
    })
    this.#server.on('tlsClientError', (error, socket) => this.#begun.get(addressOf(socket))?.failed(error.message))
  }

  /** Begins TLS on a connection whose client was told to. */
  begin(socket: Socket, secured: Secured): void {
    const address = addressOf(socket)
    this.#begun.set(address, secured)
    socket.on('close', () => this.#begun.delete(address))
    this.#server.emit('connection', socket)
  }
}

/** Why a client is not who it has to be. */
function refusalOf(socket: TLSSocket): string | undefined {
  if (socket.isSessionReused()) return 'it resumed a session, which does not show who it is'
  if (socket.authorized) return undefined
  if (Object.keys(socket.getPeerCertificate()).length === 0) return 'it showed no certificate'
  return `its certificate is not accepted: ${socket.authorizationError?.toString() ?? 'unknown reason'}`
}

const addressOf = ({ remoteAddress, remotePort }: Socket): string => `${remoteAddress} ${remotePort}`
