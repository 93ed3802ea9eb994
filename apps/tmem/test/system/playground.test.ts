/** The playground in Chromium: the packages themselves at work in a page, opened as a file and from a console. */
import { fileURLToPath, pathToFileURL } from 'node:url'
import type { Browser, Page } from 'playwright-core'
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest'
import { lacking, requires } from '../../../../tools/requires.ts'
import { looked, opened, startBrowser } from '../browser.ts'
import { serving } from '../serving.ts'

const needs = { commands: ['chromium'] }
const file = pathToFileURL(fileURLToPath(new URL('../../../console/dist/static/playground.html', import.meta.url))).href

let browser: Browser
beforeAll(async () => {
  if (lacking(needs) === undefined) browser = await startBrowser()
})
afterAll(() => browser?.close())

/** Plays the trace of the page to its end. */
async function played(page: Page): Promise<void> {
  await page.locator('#speed').fill('2000')
  await page.getByRole('button', { name: 'Open and play' }).click()
  await expect
    .poll(() => page.locator('#pages small').textContent(), { timeout: 60_000 })
    .toMatch(/^([\d,]+) of \1 accesses$/)
}

/** Figures of a place in the table of what moved, by its name. */
const moved = (page: Page, place: string): Promise<number[]> =>
  page
    .locator('[aria-labelledby="counts"] tbody tr', { hasText: place })
    .locator('td')
    .evaluateAll((all) => all.map((cell) => Number(cell.textContent!.replaceAll(',', ''))))

test('a stack at work, offline: pages sink and rise, and each is what was written', async (ctx) => {
  requires(ctx, needs)
  const context = await browser.newContext({ offline: true })
  onTestFinished(() => context.close())
  const { page, complaints } = await opened(context, file)
  await played(page)
  const [pages, , , rose, down] = await moved(page, 'zcache')
  const [below, , sunk] = await moved(page, 'slowMemory')
  expect(pages).toBeGreaterThan(0)
  expect(below).toBeGreaterThan(0)
  expect(sunk).toBeGreaterThan(0)
  expect(down).toBeGreaterThan(0)
  expect(rose).toBeGreaterThan(0)
  const shown = await page.locator('[aria-labelledby="pages"] .legend b').allTextContents()
  expect(shown.reduce((sum, text) => sum + Number(text), 0)).toBe(256)
  await looked(page, 'playground-stack')
  expect(complaints).toEqual([])
})

test('a text that is wrong, and a trace that is, say where', async (ctx) => {
  requires(ctx, needs)
  const context = await browser.newContext({ offline: true })
  onTestFinished(() => context.close())
  const { page } = await opened(context, file)
  const said = page.locator('[aria-labelledby="compose"] [role="status"]')
  await page.getByLabel('text of the stack').fill('zcach(limit=1MiB)')
  await page.getByRole('button', { name: 'Step' }).click()
  await expect.poll(() => said.textContent()).toContain('zcache')
  await page.getByLabel('text of the stack').fill('zcache(limit=1MiB)')
  await page.getByLabel('trace', { exact: true }).fill('w 1\nx 2')
  await page.getByRole('button', { name: 'Step' }).click()
  await expect.poll(() => said.textContent()).toContain('line 2: expected w, r or d')
  await page.getByLabel('trace', { exact: true }).fill('w 1\nr 1')
  await page.getByRole('button', { name: 'Step' }).click()
  await expect.poll(() => page.locator('#pages small').textContent()).toBe('1 of 2 accesses')
  expect(await said.textContent()).toBe('')
})

test('a race, step by step: the broken rule breaks, and the same turns do no harm where it is kept', async (ctx) => {
  requires(ctx, needs)
  const context = await browser.newContext({ offline: true })
  onTestFinished(() => context.close())
  const { page, complaints } = await opened(context, file)
  await page.keyboard.press('2')
  for (const [button, verdict] of [
    ['Rule broken', 'bad'],
    ['Rule kept', 'good'],
  ] as const) {
    await page.getByRole('button', { name: button }).click()
    await page.getByRole('button', { name: 'Run all interleavings' }).click()
    await page.locator('h1').click()
    for (let n = 0; n < 200 && (await page.locator('.verdict').count()) === 0; n++)
      await page.keyboard.press('ArrowRight')
    expect(await page.locator(`.verdict.${verdict}`).count()).toBe(1)
  }
  await page.keyboard.press('ArrowLeft')
  expect(await page.locator('.verdict').count()).toBe(0)
  await looked(page, 'playground-race')
  expect(complaints).toEqual([])
})

test('served by a console, under its policy', async (ctx) => {
  requires(ctx, needs)
  const { info, stop } = await serving('memory(limit=4MiB)', '--http', 'tcp:0', '--device', 'name=a,size=1MiB')
  const context = await browser.newContext()
  onTestFinished(() => context.close())
  const { page, complaints } = await opened(context, `${info.http}playground.html`)
  await played(page)
  expect(complaints).toEqual([])
  expect((await stop()).code).toBe(0)
})
