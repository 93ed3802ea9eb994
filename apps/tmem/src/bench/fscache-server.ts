/**
 * The process that `tmem bench fscache` asks: `fscache-server.js SIGN`. Ends with SIGTERM.
 *
 * It writes its port to the file SIGN, once it listens. `/DELAY/POLICY/BYTES/NAME` is a file of so many bytes, whose
 * first byte comes after DELAY milliseconds; POLICY is `fresh` (for an hour) or `asked` (each time). `/sent` tells how
 * many bytes of bodies it has sent.
 */
import { renameSync, writeFileSync } from 'node:fs'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'

const sign = process.argv[2]!
const contents = new Map<number, Buffer>()
let sent = 0

/** Bytes of which about half do not compress, as those of most files. */
function contentsOf(bytes: number): Buffer {
  let all = contents.get(bytes)
  if (all === undefined) {
    all = Buffer.alloc(bytes)
    let state = 1
    for (let at = 0; at + 4 <= bytes; at += 8) {
      state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
      all.writeUInt32LE(state, at)
    }
    contents.set(bytes, all)
  }
  return all
}

function answer(request: IncomingMessage, response: ServerResponse, policy: string, bytes: Buffer): void {
  const headers = {
    etag: '"1"',
    'content-type': 'application/octet-stream',
    'cache-control': policy === 'fresh' ? 'max-age=3600' : 'no-cache',
  }
  if (request.headers['if-none-match'] === headers.etag) {
    response.writeHead(304, headers).end()
    return
  }
  const range = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '')
  const [start, end] = range === null ? [0, bytes.length] : [Number(range[1]), Number(range[2]) + 1]
  const body = bytes.subarray(start, end)
  if (range === null) response.writeHead(200, { ...headers, 'content-length': body.length })
  else {
    const part = `bytes ${start}-${end - 1}/${bytes.length}`
    response.writeHead(206, { ...headers, 'content-length': body.length, 'content-range': part })
  }
  if (request.method === 'HEAD') {
    response.end()
    return
  }
  sent += body.length
  response.end(body)
}

const server = createServer({ keepAliveTimeout: 60_000 }, (request, response) => {
  const [, delay, policy, bytes] = request.url!.split('/')
  if (policy === undefined) {
    response.end(String(sent))
    return
  }
  const all = contentsOf(Number(bytes))
  if (delay === '0') answer(request, response, policy, all)
  else setTimeout(() => answer(request, response, policy, all), Number(delay))
})
server.listen(0, '127.0.0.1', () => {
  // All or nothing: whoever sees it finds a number.
  writeFileSync(`${sign}.new`, String((server.address() as AddressInfo).port))
  renameSync(`${sign}.new`, sign)
})
