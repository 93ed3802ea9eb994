/**
 * What Prometheus' own program says of the metrics of a server with a mount, of the alert rules, and of what the
 * dashboard asks for.
 */
import { execFileSync, spawnSync } from 'node:child_process'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { unpacked } from '../../../../tools/debian-packages.mjs'
import { requires } from '../../../../tools/requires.ts'
import { servingIn } from '../serving.ts'
import { temporaryDirectory, tmem } from '../tmem.ts'

const needs = { packages: ['prometheus'] }

/** Runs promtool: what it finds wrong, `''` for nothing. */
function promtool(words: readonly string[], input = ''): string {
  const command = join(unpacked('prometheus'), 'usr/bin/promtool')
  const { status, stdout, stderr, error } = spawnSync(command, words, { input, encoding: 'utf8' })
  if (error !== undefined) throw error
  return status === 0 && stderr === '' ? '' : `${status}: ${stdout}${stderr}`
}

const monitoring = fileURLToPath(new URL('../../monitoring/', import.meta.url))

test('promtool finds nothing wrong with the metrics, and every name of the mount is there', {
  timeout: 60_000,
}, async (ctx) => {
  requires(ctx, { ...needs, root: true, paths: ['/dev/fuse'] })
  const folder = temporaryDirectory()
  mkdirSync(join(folder, 'mount'))
  const server = await servingIn(
    folder,
    'zcache(limit=4MiB,recompress=deflate) > frontswap(file=FOLDER/x,size=8MiB)',
    '--device',
    'name=a,size=4MiB,snapshot=FOLDER/image',
    '--fuse',
    'FOLDER/mount',
    '--metrics',
    'tcp:127.0.0.1:0',
  )
  execFileSync('dd', ['if=/dev/urandom', `of=${folder}/mount/a`, 'bs=4k', 'count=512', 'conv=notrunc'], {
    stdio: 'ignore',
  })
  execFileSync('dd', [`if=${folder}/mount/a`, 'of=/dev/null', 'bs=64k', 'iflag=direct'], { stdio: 'ignore' })
  const { metrics } = server.info as unknown as { metrics: string }
  const text = await (await fetch(metrics)).text()
  expect(promtool(['check', 'metrics'], text)).toBe('')
  expect(text).not.toContain('tmem_layer_value')
  for (const line of [
    /^tmem_fuse_requests_total\{operation="read"\} [1-9]/m,
    /^tmem_fuse_read_bytes_total \d/m,
    /^tmem_fuse_written_bytes_total 2097152$/m,
    /^tmem_request_duration_seconds_count\{device="a",server="fuse",operation="write"\} [1-9]/m,
    /^tmem_snapshot_dirty_pages\{device="a"\} \d/m,
  ])
    expect(text).toMatch(line)
  expect((await server.stop()).code).toBe(0)
})

test('promtool finds nothing wrong with the metrics of caches', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { ...needs, commands: ['redis-cli'] })
  const folder = temporaryDirectory()
  const file = join(folder, 'tmem.yaml')
  writeFileSync(
    file,
    `caches:
  a: { memory: 4MiB, file: { path: a.cache, size: 16MiB }, listen: unix:a.sock }
  b: { memory: 2MiB, listen: unix:b.sock }
control: control.sock
metrics: tcp:127.0.0.1:0
`,
  )
  await tmem(['up', '-f', file, '--json'], {
    during: async (server) => {
      const info = JSON.parse(String(await new Promise((resolve) => server.stdout.once('data', resolve))))
      execFileSync('redis-cli', ['-s', join(folder, 'a.sock'), 'SET', 'x', '1'])
      const large = 'x'.repeat(2 ** 20 + 1)
      execFileSync('redis-cli', ['-s', join(folder, 'b.sock'), '-x', 'SET', 'x'], { input: large })
      const text = await (await fetch(info.metrics)).text()
      expect(promtool(['check', 'metrics'], text)).toBe('')
      expect(text).toContain('tmem_cache_entries{cache="a"} 1\n')
      expect(text).toContain('tmem_cache_refused_writes_total{cache="b",reason="large"} 1\n')
      expect(text).not.toContain('tmem_layer_value')
      server.kill('SIGTERM')
    },
  })
})

test('promtool takes the alert rules, and each expression of the dashboard', (ctx) => {
  requires(ctx, needs)
  expect(promtool(['check', 'rules', '--lint-fatal', join(monitoring, 'alerts.yaml')])).toBe('')
  const { panels } = JSON.parse(readFileSync(join(monitoring, 'dashboard.json'), 'utf8')) as {
    panels: { targets: { expr: string }[] }[]
  }
  const rules = panels
    .flatMap(({ targets }) => targets)
    .map(({ expr }, n) => ({ record: `dashboard:${n}`, expr: expr.replaceAll('$__rate_interval', '5m') }))
  expect(rules.length).toBeGreaterThan(20)
  const file = join(temporaryDirectory(), 'rules.yaml')
  // JSON is YAML.
  writeFileSync(file, JSON.stringify({ groups: [{ name: 'dashboard', rules }] }))
  expect(promtool(['check', 'rules', file])).toBe('')
})
