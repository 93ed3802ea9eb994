/** The example server is run as it stands there, with fewer records. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

test('the example server says what it takes, and answers out of the cache', { timeout: 120_000 }, async () => {
  const program = fileURLToPath(new URL('../examples/server.mjs', import.meta.url))
  const child = spawn(process.execPath, [program, '--records', '2000', '--memory', '12MiB', '--port', '0'], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const ended = once(child, 'exit')
  try {
    let text = ''
    for await (const more of child.stdout) {
      text += String(more)
      if (/http:\S+/.test(text)) break
    }
    // Two keys of one hash displace each other: of 20,000 there are two in one run of twenty, of 2,000 in one of two
    // thousand.
    expect(text).toMatch(/^2,000 records of \d+ bytes of JSON/)
    expect(text).toMatch(/of 2,000 that were looked for, 2,000 are there/)
    expect(text).toMatch(/lru-cache would take +\d+\.\d MiB/)
    const origin = /http:\/\/[^/]+/.exec(text)![0]
    expect(await (await fetch(`${origin}/records/1711`)).json()).toMatchObject({ id: 1711 })
    expect((await fetch(`${origin}/records/2000`)).status).toBe(404)
    const stats = (await (await fetch(`${origin}/stats`)).json()) as { loads: number; misses: object; entries: number }
    expect(stats).toMatchObject({ loads: 0, entries: 2000 })
  } finally {
    child.kill()
    await ended
  }
})
