/** What may be wider than its window, and is moved within it: by keyboard, too. */
import type { ComponentChildren, VNode } from 'preact'

export interface ScrollProps {
  /** What it is, for who does not see it. */
  readonly label: string
  readonly children: ComponentChildren
}

export function Scroll({ label, children }: ScrollProps): VNode {
  return (
    // biome-ignore lint/a11y/noNoninteractiveTabindex: who has only a keyboard could not move it otherwise
    <section class="scroll" tabIndex={0} aria-label={label}>
      {children}
    </section>
  )
}
