/** The console in Chromium, over a server with real pages: what it shows, what it can do, and what it survives. */
import { randomBytes } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import type { AddressInfo } from 'node:net'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import type { Browser, Page } from 'playwright-core'
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest'
import { Client } from '../../../../packages/nbd/test/client.ts'
import { lacking, requires } from '../../../../tools/requires.ts'
import { bytesText, count } from '../../../console/src/web/model.ts'
import { looked, opened, startBrowser } from '../browser.ts'
import { type Serving, serving, servingIn } from '../serving.ts'
import { temporaryDirectory, tmem } from '../tmem.ts'

const needs = { commands: ['chromium'] }

let browser: Browser
beforeAll(async () => {
  if (lacking(needs) === undefined) browser = await startBrowser()
})
afterAll(() => browser?.close())

const mebibyte = 2 ** 20
const stack = 'zcache(limit=3MiB) > frontswap(file="FOLDER/{name}.img",size={size})'
const devices = ['--device', 'name=swap0,size=32MiB', '--device', 'name=cache1,size=16MiB']

/** A port that is free now. */
async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  await new Promise((resolve) => server.close(resolve))
  return port
}

/** Writes pages that shrink, and some that do not; reads some again. */
async function work({ folder }: Serving, name: string, mebibytes: number): Promise<void> {
  const client = await Client.ready({ path: join(folder, 'nbd.sock') }, { name })
  const part = 64 * 1024
  for (let n = 0; n < mebibytes * 16; n++) {
    const bytes = Buffer.alloc(part, `pages of ${name}, of which this is part ${n}, with words that come again. `)
    for (let at = 0; at < part; at += 4096) bytes.write(String(n * at), at)
    randomBytes(part / 4).copy(bytes)
    if (n % 8 === 7) bytes.fill(0, 0, 4096)
    expect((await client.write(n * part, bytes)).error).toBe(0)
  }
  for (let n = 0; n < 64; n++) await client.read((n % (mebibytes * 16)) * part, part)
  client.socket.destroy()
}

const isLive = (page: Page): Promise<void> => page.getByText('live', { exact: true }).waitFor()

/** Cells of the table of bytes, by place. */
const cells = (page: Page): Promise<Record<string, string[]>> =>
  page.evaluate<Record<string, string[]>>(
    `Object.fromEntries([...document.querySelectorAll('[aria-labelledby="bytes"] tbody tr')].map((row) => [
      row.dataset.place, [...row.querySelectorAll('td')].map((cell) => cell.textContent)]))`,
  )

test('shows what tmem stat says, looks right in all sizes, dark and light, and axe finds nothing', async (ctx) => {
  requires(ctx, needs)
  const served = await serving(stack, '--http', 'tcp:0', ...devices)
  await work(served, 'swap0', 24)
  await work(served, 'cache1', 2)
  const context = await browser.newContext({ bypassCSP: true })
  onTestFinished(() => context.close())
  const { page, complaints } = await opened(context, served.info.http!)
  await isLive(page)
  // Nobody writes any more; what the stack does by itself comes to its end.
  const deviceNow = async () =>
    JSON.parse((await tmem(['stat', '--json', '--control', served.control])).stdout).devices[0]
  let device = await deviceNow()
  for (let before: unknown; !isDeepStrictEqual(device.counters, before); device = await deviceNow()) {
    before = device.counters
    await page.waitForTimeout(1500)
  }
  const places = device.children.find(({ name }: { name: string }) => name === 'places').children
  const told = places.map(({ name, counters }: { name: string; counters: Record<string, number> }) => [
    name,
    count(counters['pages']!),
    bytesText(counters['pages']! * 4096),
    bytesText(counters['bytes']!),
  ])
  // It is told once a second.
  const table = async () => Object.entries(await cells(page)).map(([name, row]) => [name, ...row.slice(0, 3)])
  await expect.poll(table, { timeout: 30_000 }).toEqual(expect.arrayContaining(told))
  expect((await cells(page))['zcache']!.at(-1)).toBe(bytesText(device.counters.mem_used_total))
  const slots = device.children.find(({ name }: { name: string }) => name === 'slots').counters
  const figures = await page.locator('.figures').textContent()
  expect(figures).toContain(bytesText((slots.slots - slots.empty) * 4096))
  expect(figures).toContain((device.counters.orig_data_size / device.counters.mem_used_total).toFixed(2))

  // While pages come and go.
  let isOver = false
  const busy = (async () => {
    while (!isOver) await work(served, 'swap0', 24)
  })()
  await page.waitForTimeout(8000)
  await looked(page, 'console')
  isOver = true
  await busy
  expect(complaints).toEqual([])
  expect((await served.stop()).code).toBe(0)
})

test('by keyboard: devices, a page explained, dark and light', async (ctx) => {
  requires(ctx, needs)
  const served = await serving(stack, '--http', 'tcp:0', ...devices)
  await work(served, 'cache1', 1)
  const context = await browser.newContext({ colorScheme: 'light' })
  onTestFinished(() => context.close())
  const { page, complaints } = await opened(context, served.info.http!)
  await isLive(page)
  const current = page.locator('nav [aria-current="true"]')
  expect(await current.textContent()).toBe('swap0')
  await page.keyboard.press('2')
  expect(await current.textContent()).toBe('cache1')
  await page.keyboard.press('/')
  await page.keyboard.type('page 3')
  await page.keyboard.press('Enter')
  await page.locator('[aria-labelledby="explain"] dl').waitFor()
  expect(await page.locator('[aria-labelledby="explain"] dl').textContent()).toMatch(/zcache/)
  await page.locator('#offset').fill('page 999999')
  await page.keyboard.press('Enter')
  await page.locator('[aria-labelledby="explain"] .error').waitFor()
  await page.locator('h1').click()
  await page.keyboard.press('t')
  expect(await page.evaluate('document.documentElement.dataset.theme')).toBe('dark')
  // The browser itself says that a request came to nothing.
  expect(complaints.filter((text) => !text.startsWith('Failed to load resource'))).toEqual([])
})

test('a knob is turned by who has the token, and by nobody else', async (ctx) => {
  requires(ctx, needs)
  const folder = temporaryDirectory()
  const token = join(folder, 'token')
  writeFileSync(token, 'a token that-has-no-blanks\n'.replaceAll(' ', '-'), { mode: 0o600 })
  const served = await servingIn(folder, stack, '--http', 'tcp:0', '--http-token', token, ...devices)
  const context = await browser.newContext()
  onTestFinished(() => context.close())
  const { page } = await opened(context, served.info.http!)
  await isLive(page)
  const said = page.locator('[aria-labelledby="knobs"] [role="status"]')
  const value = page.getByLabel('new value of mem_limit')
  const limit = async (): Promise<number> =>
    JSON.parse((await tmem(['stat', '--json', '--control', served.control])).stdout).devices[0].counters.memlimit
  await value.fill('1MiB')
  await page.getByLabel('turn mem_limit').click()
  await expect.poll(() => said.textContent()).toContain('this is not the token')
  expect(await limit()).toBe(0)
  await page.locator('#token').fill('a-token-that-has-no-blanks')
  await page.getByLabel('turn mem_limit').click()
  await expect.poll(() => said.textContent()).toContain('mem_limit 1MiB: 1048576')
  expect(await limit()).toBe(mebibyte)
  await expect.poll(() => page.locator('.events').textContent()).toContain('mem_limit 1MiB, through the console')
  await value.fill('much')
  await page.getByLabel('turn mem_limit').click()
  await expect.poll(() => said.textContent()).toContain('expected an amount of bytes')
})

test('many pages of one browser have one stream, and each is live', async (ctx) => {
  requires(ctx, needs)
  const { info, stop } = await serving(stack, '--http', 'tcp:0', ...devices)
  const context = await browser.newContext()
  onTestFinished(() => context.close())
  const pages: Page[] = []
  for (let n = 0; n < 20; n++) {
    const { page } = await opened(context, info.http!)
    await isLive(page)
    pages.push(page)
  }
  // All but one go: the last one is still told.
  for (const page of pages.splice(1)) await page.close()
  const before = await pages[0]!.locator('.figures').textContent()
  expect(before).toContain('swap0')
  await pages[0]!.waitForTimeout(5000)
  expect(await pages[0]!.locator('.banner').count()).toBe(0)
  expect((await stop()).code).toBe(0)
})

test('names that look like markup are text', async (ctx) => {
  requires(ctx, needs)
  const hostile = '<img src=x onerror="globalThis.hit=1"><script>globalThis.hit=1</script>'
  const folder = temporaryDirectory()
  const path = join(folder, `${hostile.replaceAll('/', ':')}.img`).replaceAll('"', String.raw`\"`)
  const served = await servingIn(
    folder,
    `zcache(limit=1MiB) > frontswap(file="${path}",size={size})`,
    '--http',
    'tcp:0',
    '--device',
    'name=a,size=4MiB',
  )
  const context = await browser.newContext()
  onTestFinished(() => context.close())
  const { page, complaints } = await opened(context, served.info.http!)
  await isLive(page)
  expect(await page.locator('.about').textContent()).toContain('<img src=x')
  expect(await page.evaluate('[document.images.length, "hit" in globalThis]')).toEqual([0, false])
  expect(complaints).toEqual([])
})

test('a server that is killed and started again, with other devices: the page says so, and comes back', async (ctx) => {
  requires(ctx, needs)
  const folder = temporaryDirectory()
  const http = ['--http', `tcp:${await freePort()}`]
  const first = await servingIn(folder, stack, ...http, ...devices)
  await work(first, 'swap0', 1)
  const context = await browser.newContext()
  onTestFinished(() => context.close())
  const { page } = await opened(context, first.info.http!)
  await isLive(page)
  expect(await page.locator('nav').textContent()).toMatch(/swap0\s*cache1/)
  await first.kill()
  await page.locator('.banner').waitFor()
  expect(await page.locator('.banner').textContent()).toContain('there is no connection')
  // What was known stays.
  expect((await cells(page))['zcache']![0]).not.toBe('0')
  const second = await servingIn(
    folder,
    stack,
    '--fresh',
    ...http,
    '--device',
    'name=cache1,size=16MiB',
    '--device',
    'name=late2,size=8MiB',
  )
  await isLive(page)
  await expect.poll(() => page.locator('nav').textContent()).toMatch(/cache1\s*late2/)
  expect(await page.locator('.banner').count()).toBe(0)
  await expect.poll(() => page.locator('.foot').textContent()).toContain(`process ${second.info.pid}`)
  expect((await second.stop()).code).toBe(0)
})
