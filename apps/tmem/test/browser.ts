/** Debian's Chromium, as tests drive it: what people see, checked by axe, and kept as pictures to be looked at. */
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import axe from 'axe-core'
import { type Browser, type BrowserContext, chromium, type Page } from 'playwright-core'
import { expect } from 'vitest'

/** Where pictures are left for whoever wants to see them. */
export const pictures: string = fileURLToPath(new URL('../.reports/pictures/', import.meta.url))

/** Starts it; root has no sandbox. */
export const startBrowser = (): Promise<Browser> =>
  chromium.launch({ executablePath: '/usr/bin/chromium', args: ['--no-sandbox', '--disable-dev-shm-usage'] })

/** A page, and what it complains of. */
export interface Opened {
  readonly page: Page
  readonly complaints: string[]
}

/** Opens a page; `complaints` are errors of scripts and what the policy of the page has blocked. */
export async function opened(context: BrowserContext, url: string): Promise<Opened> {
  const page = await context.newPage()
  const complaints: string[] = []
  page.on('pageerror', ({ message }) => complaints.push(message))
  page.on('console', (message) => {
    if (message.type() === 'error') complaints.push(message.text())
  })
  await page.goto(url)
  return { page, complaints }
}

/** Widths and heights of a small telephone, of a notebook, of a large screen, and of one with 4k. */
const windows = [
  [360, 740],
  [1280, 800],
  [2560, 1440],
  [3840, 2160],
] as const

/**
 * Pictures of a page in all sizes, dark and light. Nothing is wider than its window, which the page uses, a table shows
 * figures beside its names without being moved, and axe finds nothing. The context must have `bypassCSP`, or the page
 * no policy.
 */
export async function looked(page: Page, name: string): Promise<void> {
  mkdirSync(pictures, { recursive: true })
  await page.evaluate(axe.source)
  for (const [width, height] of windows)
    for (const colorScheme of ['light', 'dark'] as const) {
      await page.setViewportSize({ width, height })
      await page.emulateMedia({ colorScheme })
      // The page draws its charts anew.
      await page.waitForTimeout(400)
      const inner = await page.evaluate<number>('document.documentElement.scrollWidth')
      expect(inner, `${name} at ${width} px is as wide as its window`).toBeLessThanOrEqual(width)
      const used = await page.evaluate<number>('document.querySelector(".page").clientWidth')
      expect(used, `${name} at ${width} px uses its window`).toBeGreaterThan(0.95 * width)
      const hidden = await page.evaluate<string[]>(
        `[...document.querySelectorAll('.scroll')].filter((scroll) => [...scroll.querySelectorAll('tbody tr > :nth-child(2)')]
          .some((cell) => cell.getBoundingClientRect().right > scroll.getBoundingClientRect().right + 1))
          .map((scroll) => scroll.ariaLabel)`,
      )
      expect(hidden, `${name} at ${width} px has figures in sight`).toEqual([])
      const found = await page.evaluate<string[]>(
        'axe.run({ preload: false }).then(({ violations }) => violations.map(({ id, nodes }) => id + ": " + nodes[0].html))',
      )
      expect(found, `${name} at ${width} px, ${colorScheme}`).toEqual([])
      await page.screenshot({ path: join(pictures, `${name}-${width}-${colorScheme}.png`), fullPage: true })
    }
}
