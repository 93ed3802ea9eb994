/**
 * The packages that need no system beneath them, in a browser: bundled without a setting, in a page that may share
 * memory between threads. Chromium passes as many cases as Node.
 */
import { execFile, spawn } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { afterAll, expect, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'

const run = promisify(execFile)
const portable = fileURLToPath(new URL('../portable', import.meta.url))
const tools = fileURLToPath(new URL('../../../../tools/release', import.meta.url))
const scratch = mkdtempSync(join(tmpdir(), 'tmem-browser-'))
/** Browsers that have not ended, by the number of their process group: a test that took too long leaves one. */
const open = new Set<number>()
afterAll(() => {
  for (const group of open) process.kill(-group, 'SIGKILL')
  rmSync(scratch, { recursive: true, force: true, maxRetries: 10, retryDelay: 200 })
})

interface Result {
  readonly passed: number
  readonly failed: readonly string[]
  readonly isolated?: boolean
}

/** Bundles the page and its thread; the bytes that came of it. */
async function bundle(bundler: string, folder: string): Promise<number> {
  const entries = ['page.mjs', 'thread.mjs'].map((name) => join(portable, name))
  const { stdout, stderr } = await run(process.execPath, ['bundle.mjs', bundler, folder, ...entries], { cwd: tools })
  expect(stderr).toBe('')
  return Number(stdout)
}

/** Shows a page in Chromium, isolated from other origins, until it has posted its result. */
async function show(folder: string, query: string): Promise<Result> {
  writeFileSync(join(folder, 'index.html'), '<!doctype html><script type="module" src="/page.js"></script>')
  let done: (result: Result) => void
  let failed: (error: Error) => void
  const posted = new Promise<Result>((resolve, reject) => {
    done = resolve
    failed = reject
  })
  const server = createServer((request, response) => {
    const path = new URL(request.url ?? '/', 'http://localhost').pathname
    if (request.method === 'POST') {
      let body = ''
      request.on('data', (bytes) => {
        body += String(bytes)
      })
      request.on('end', () => {
        response.end()
        done(JSON.parse(body) as Result)
      })
      return
    }
    const file = join(folder, path === '/' ? 'index.html' : path)
    response.setHeader('cross-origin-opener-policy', 'same-origin')
    response.setHeader('cross-origin-embedder-policy', 'require-corp')
    response.setHeader('content-type', file.endsWith('.js') ? 'text/javascript' : 'text/html')
    if (existsSync(file)) response.end(readFileSync(file))
    else response.writeHead(404).end()
  })
  await new Promise<void>((resolve) => {
    server.listen(0, '127.0.0.1', resolve)
  })
  const { port } = server.address() as AddressInfo
  const profile = mkdtempSync(join(scratch, 'profile-'))
  // Its crash handler would be a process of another group; with `--disable-crashpad-for-testing`, too, Chromium's
  // network process ends at its start, again and again.
  const flags = [
    '--disable-breakpad',
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-dev-shm-usage',
    '--no-first-run',
  ]
  const url = `http://127.0.0.1:${port}/${query}`
  const browser = spawn('chromium', [...flags, `--user-data-dir=${profile}`, url], { stdio: 'ignore', detached: true })
  open.add(browser.pid!)
  browser.once('exit', (code) => failed(new Error(`chromium ended with ${code} before the page was done`)))
  const ended = new Promise((resolve) => browser.once('exit', resolve))
  try {
    return await posted
  } finally {
    // It and all of its own processes.
    process.kill(-browser.pid!, 'SIGKILL')
    await ended
    open.delete(browser.pid!)
    server.closeAllConnections()
    server.close()
  }
}

const needs = { commands: ['chromium'], paths: [join(tools, 'node_modules/esbuild')] }

/** A busy machine takes its time to bundle and to start a browser. */
const patience = { timeout: 300_000 }

test('Chromium passes as many cases as Node, worker threads and shared memory included', patience, async (ctx) => {
  requires(ctx, needs)
  const folder = mkdtempSync(join(scratch, 'esbuild-'))
  await bundle('esbuild', folder)
  const node = await run(process.execPath, [join(portable, 'main.mjs')], { maxBuffer: 2 ** 26 })
  const here = JSON.parse(node.stdout) as Result
  const there = await show(folder, '')
  expect(there.failed).toEqual([])
  expect(there.isolated).toBe(true)
  expect(there.passed).toBe(here.passed)
  expect(there.passed).toBeGreaterThan(100)
})

const bundlers = ['esbuild', 'webpack', 'vite']

test.for(bundlers)('%s bundles the packages without a setting, and they work', patience, async (name, ctx) => {
  requires(ctx, needs)
  const folder = mkdtempSync(join(scratch, `${name}-`))
  const bytes = await bundle(name, folder)
  expect(bytes).toBeLessThan(2 * 2 ** 20)
  expect(await show(folder, '?quick')).toEqual({ passed: 7, failed: [], isolated: true })
})
