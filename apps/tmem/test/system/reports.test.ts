/** Reports and the playground in Chromium, opened as files: no server, no network. */
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import type { Browser, BrowserContext } from 'playwright-core'
import { afterAll, beforeAll, expect, onTestFinished, test } from 'vitest'
import { lacking, requires } from '../../../../tools/requires.ts'
import { looked, opened, startBrowser } from '../browser.ts'
import { temporaryDirectory, tmem } from '../tmem.ts'

const needs = { commands: ['chromium'] }

let browser: Browser
beforeAll(async () => {
  if (lacking(needs) === undefined) browser = await startBrowser()
})
afterAll(() => browser?.close())

async function offline(): Promise<BrowserContext> {
  const context = await browser.newContext({ bypassCSP: true, offline: true })
  onTestFinished(() => context.close())
  return context
}

async function report(...words: string[]): Promise<string> {
  const path = join(temporaryDirectory(), 'report.html')
  expect((await tmem([...words, '--report', path])).code).toBe(0)
  return pathToFileURL(path).href
}

test('the demo: curves and the table', async (ctx) => {
  requires(ctx, needs)
  const { page, complaints } = await opened(await offline(), await report('demo', '--size', '4MiB'))
  expect(await page.locator('canvas').count()).toBe(4)
  // The curves are drawn: not all of a chart is empty.
  const inked = await page.evaluate(
    `[...document.querySelectorAll('canvas')].map((canvas) =>
      canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value !== 0))`,
  )
  expect(inked).toEqual([true, true, true, true])
  expect(await page.locator('table').textContent()).toMatch(/disk I\/O avoided/)
  await looked(page, 'demo')
  expect(complaints).toEqual([])
})

test('a bench: every row against its goal', async (ctx) => {
  requires(ctx, needs)
  const { page, complaints } = await opened(await offline(), await report('bench', 'models'))
  expect(await page.locator('tbody tr').count()).toBeGreaterThan(5)
  await looked(page, 'bench')
  expect(complaints).toEqual([])
})

test('an interleaving: rule and mutant side by side, step by step by keyboard', async (ctx) => {
  requires(ctx, needs)
  const { page, complaints } = await opened(await offline(), await report('explore', 'cow-fork-copies-pinned-pages'))
  const done = (): Promise<number> => page.locator('.sides .panel:last-child tbody tr:not(.later)').count()
  expect(await page.locator('.sides .panel').count()).toBe(2)
  expect(await done()).toBe(0)
  await page.keyboard.press('ArrowRight')
  await page.keyboard.press('ArrowRight')
  expect(await done()).toBe(2)
  await page.keyboard.press('ArrowLeft')
  expect(await done()).toBe(1)
  await page.keyboard.press('End')
  expect(await page.locator('.verdict.bad').count()).toBe(1)
  expect(await page.locator('.verdict.good').count()).toBe(1)
  await looked(page, 'explore')
  expect(complaints).toEqual([])
})
