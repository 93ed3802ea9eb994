/** A history as a sequence chart: a column for each actor, a row for each step, and a mark at the step of now. */
import type { VNode } from 'preact'

/** One step that somebody took. */
export interface SequenceStep {
  readonly actor: number
  readonly label: string
  readonly shows: string
}

export interface SequenceProps {
  readonly caption: string
  readonly actors: readonly string[]
  readonly history: readonly SequenceStep[]
  /** Steps that are done; those after them are pale. */
  readonly at: number
}

export function Sequence({ caption, actors, history, at }: SequenceProps): VNode {
  return (
    <table class="sequence">
      <caption class="hidden">{caption}</caption>
      <thead>
        <tr>
          <th scope="col">
            <span class="hidden">step</span>
          </th>
          {actors.map((name, n) => (
            <th scope="col" key={n}>
              {name}
            </th>
          ))}
        </tr>
      </thead>
      <tbody>
        {history.map(({ actor, label, shows }, n) => (
          <tr
            key={n}
            class={n === at - 1 ? 'now' : n >= at ? 'later' : ''}
            aria-current={n === at - 1 ? 'step' : undefined}
          >
            <th scope="row">{n + 1}</th>
            {actors.map((_, column) => (
              <td key={column} class={column === actor ? 'step' : ''}>
                {column === actor && label}
                {column === actor && shows !== '' && <span class="shows">{shows}</span>}
              </td>
            ))}
          </tr>
        ))}
      </tbody>
    </table>
  )
}
