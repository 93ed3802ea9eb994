/** Lines over time, drawn by uPlot in the colours of the page; the values of now stand above as text. */
import type { VNode } from 'preact'
import { useEffect, useRef } from 'preact/hooks'
import uPlot from 'uplot'

/** One line. */
export interface Line {
  readonly label: string
  /** Class of its colour: c0 to c4. */
  readonly color: string
  readonly values: readonly (number | null)[]
}

export interface ChartProps {
  /** What is shown, for who cannot see it. */
  readonly title: string
  /** Seconds, since 1970 (`isClock`) or since the start. */
  readonly times: readonly number[]
  readonly isClock: boolean
  /** Lines go on where another one has a value (default: they end where they have none). */
  readonly spansGaps?: boolean
  readonly lines: readonly Line[]
  /** A value in words. */
  readonly text: (value: number) => string
  /** Distances of the lines that a scale may have (default: tenths, fifths, quarters of powers of ten). */
  readonly steps?: readonly number[]
  /** Changes when the colours do. */
  readonly theme: string
  /** Lines of text (default: 14): on a large screen both are larger. */
  readonly height?: number
}

/** Powers of two: for bytes. */
export const bytesSteps: readonly number[] = Array.from({ length: 50 }, (_, n) => 2 ** n)

/** The colour that a class or a custom property has here. */
function colorOf(host: HTMLElement, className: string, property: string): string {
  const probe = document.createElement('span')
  probe.className = className
  if (property !== '') probe.style.color = `var(${property})`
  host.append(probe)
  const { color } = getComputedStyle(probe)
  probe.remove()
  return color
}

export function Chart({
  title,
  times,
  isClock,
  spansGaps = false,
  lines,
  text,
  steps,
  theme,
  height = 14,
}: ChartProps): VNode {
  const host = useRef<HTMLDivElement>(null)
  const plot = useRef<uPlot | undefined>(undefined)
  const data = [times, ...lines.map(({ values }) => values)] as uPlot.AlignedData
  const newest = useRef(data)
  newest.current = data
  const shape = lines.map(({ label, color }) => `${label} ${color}`).join()
  useEffect(() => {
    const element = host.current!
    const quiet = colorOf(element, '', '--quiet')
    const grid = colorOf(element, '', '--line')
    const { fontSize } = getComputedStyle(element)
    const em = Number.parseFloat(fontSize)
    const heightPx = Math.round(height * em)
    const axis: uPlot.Axis = {
      stroke: quiet,
      font: `${fontSize} system-ui, sans-serif`,
      grid: { stroke: grid, width: 1 },
      ticks: { stroke: grid, width: 1 },
    }
    const timeOf = (seconds: number): string =>
      isClock ? new Date(seconds * 1000).toTimeString().slice(0, 8) : `${Number(seconds.toFixed(2))} s`
    const made = new uPlot(
      {
        width: Math.max(200, element.clientWidth),
        height: heightPx,
        legend: { show: false },
        cursor: { show: false },
        padding: [null, em * 2, 0, 0],
        scales: {
          x: isClock ? { time: true } : { time: false, range: (_, __, last) => [0, last] },
          y: { range: (_, __, most) => [0, Math.max(1, most * 1.08)] },
        },
        axes: [
          { ...axis, size: em * 2.4, space: em * 6, values: (_, splits) => splits.map(timeOf) },
          {
            ...axis,
            size: em * 5.6,
            values: (_, splits) => splits.map(text),
            ...(steps === undefined ? {} : { incrs: [...steps] }),
          },
        ],
        series: [
          {},
          ...lines.map(({ label, color }) => ({
            label,
            stroke: colorOf(element, color, ''),
            width: em * 0.1,
            spanGaps: spansGaps,
            points: { show: false },
          })),
        ],
      },
      newest.current,
      element,
    )
    plot.current = made
    const sized = new ResizeObserver(() =>
      made.setSize({ width: Math.max(200, element.clientWidth), height: heightPx }),
    )
    sized.observe(element)
    return () => {
      sized.disconnect()
      made.destroy()
      plot.current = undefined
    }
  }, [theme, shape, height])
  useEffect(() => plot.current?.setData(newest.current))
  return (
    <div>
      <div class="legend">
        {lines.map(({ label, color, values }) => (
          <span key={label}>
            <i class={`swatch ${color}`} />
            {label} <b class="value">{lastText(values, text, spansGaps)}</b>
          </span>
        ))}
      </div>
      <div class="chart" role="img" aria-label={title} ref={host} />
    </div>
  )
}

function lastText(values: readonly (number | null)[], text: (value: number) => string, spansGaps: boolean): string {
  const last = spansGaps ? values.findLast((value) => value !== null) : values.at(-1)
  return last === undefined || last === null ? '–' : text(last)
}
