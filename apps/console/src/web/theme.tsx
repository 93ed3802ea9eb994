/** Dark or light: as the system has it, until somebody says otherwise here. */
import type { VNode } from 'preact'
import { useEffect, useLayoutEffect, useState } from 'preact/hooks'

const key = 'tmem-theme'
const dark = matchMedia('(prefers-color-scheme: dark)')

/** What was chosen before; a page that is a file may have no place to keep that. */
function chosen(): string | null {
  try {
    return localStorage.getItem(key)
  } catch (error) {
    if (error instanceof DOMException) return null
    throw error
  }
}

function keep(theme: string): void {
  try {
    localStorage.setItem(key, theme)
  } catch (error) {
    // It lasts as long as the page then.
    if (!(error instanceof DOMException)) throw error
  }
}

/** The theme that is shown, and what changes it. */
export function useTheme(): readonly [string, () => void] {
  const [theme, set] = useState(() => chosen() ?? (dark.matches ? 'dark' : 'light'))
  useEffect(() => {
    const follow = (): void => {
      if (chosen() === null) set(dark.matches ? 'dark' : 'light')
    }
    dark.addEventListener('change', follow)
    return () => dark.removeEventListener('change', follow)
  }, [])
  document.documentElement.dataset['theme'] = theme
  const other = (): void => {
    const next = theme === 'dark' ? 'light' : 'dark'
    keep(next)
    set(next)
  }
  return [theme, other]
}

export function ThemeButton({ theme, change }: { readonly theme: string; readonly change: () => void }): VNode {
  return (
    <button type="button" onClick={change} title="key: t">
      {theme === 'dark' ? 'Light' : 'Dark'}
    </button>
  )
}

/** Calls `act` for a key that is pressed while nobody types. */
export function useKeys(act: (key: string) => boolean): void {
  // Before the page is painted: a key that is pressed at once counts.
  useLayoutEffect(() => {
    const pressed = (event: KeyboardEvent): void => {
      const { target } = event
      const isTyping = target instanceof HTMLInputElement || target instanceof HTMLTextAreaElement
      if (isTyping || target instanceof HTMLSelectElement || event.ctrlKey || event.metaKey || event.altKey) return
      if (act(event.key)) event.preventDefault()
    }
    addEventListener('keydown', pressed)
    return () => removeEventListener('keydown', pressed)
  })
}
