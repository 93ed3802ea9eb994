/**
 * A hostile client of `tmem bench nbd`: `nbd-hostile.js SOCKET PATTERN`. Says when it begins; goes on until it is
 * killed.
 */
import { BenchClient, hostilePatterns } from './nbd-client.ts'

const [path, pattern] = process.argv.slice(2)
const bytes = hostilePatterns[pattern!]!()
const { socket } = await BenchClient.connect(path!, pattern === 'block-status')
socket.removeAllListeners('data').resume()
const again = (): void => {
  if (!socket.destroyed) socket.write(bytes, again)
}
again()
process.stdout.write('begun\n')
