/**
 * The endpoint for Prometheus: `GET /metrics` over HTTP, and nothing else.
 *
 * It shows how much this host swaps to everybody who reaches its address; it shows no content and takes no commands. A
 * client that sends requests and does not read holds one answer, and there are at most `maxConnections` clients.
 */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { Failed } from '../ending.ts'
import type { TcpAddress } from '../serve/endpoints.ts'
import { programVersion } from '../version.ts'
import { Metrics, type Statistics } from './metrics.ts'

/** Enough for two servers of Prometheus and for people. */
const maxConnections = 16

/** A running endpoint. */
export interface MetricsEndpoint {
  /** `http://HOST:PORT/metrics`. */
  readonly url: string
  close(): Promise<void>
}

/** Serves the result of `read` as metrics. Rejects with `Failed` if it cannot listen on the address. */
export async function serveMetrics({ host, port }: TcpAddress, read: () => Statistics): Promise<MetricsEndpoint> {
  const metrics = new Metrics(read, programVersion())
  const server = createServer((request, response) => void answer(request, response, metrics))
  server.maxConnections = maxConnections
  await listening(server, host, port)
  const { port: given } = server.address() as AddressInfo
  return {
    url: `http://${host.includes(':') ? `[${host}]` : host}:${given}/metrics`,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve())
        server.closeAllConnections()
      }),
  }
}

function listening(server: Server, host: string, port: number): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once('error', ({ code, message }: NodeJS.ErrnoException) => {
      const advice = code === 'EADDRINUSE' ? ': another process listens there, name another port' : ''
      reject(new Failed(`metrics cannot be served on tcp:${host}:${port}: ${message}${advice}`))
    })
    server.listen(port, host, resolve)
  })
}

async function answer(request: IncomingMessage, response: ServerResponse, metrics: Metrics): Promise<void> {
  const path = (request.url ?? '').replace(/[?#].*$/s, '')
  const plain = { 'content-type': 'text/plain; charset=utf-8' }
  if (request.method !== 'GET' && request.method !== 'HEAD')
    response.writeHead(405, { ...plain, allow: 'GET, HEAD' }).end('use GET\n')
  else if (path !== '/metrics') response.writeHead(404, plain).end('not found: use /metrics\n')
  else {
    try {
      const text = await metrics.text()
      response.writeHead(200, { 'content-type': metrics.contentType, 'cache-control': 'no-store' }).end(text)
    } catch (error) {
      // A broken device fails this request, and the server goes on.
      response.writeHead(500, plain).end(`${(error as Error).message}\n`)
    }
  }
}
