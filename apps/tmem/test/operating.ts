/** docs/operating.md as tests read it: its commands by section, with folders and sizes of a test's own. */

import { spawn } from 'node:child_process'
import { chmodSync, mkdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root: string = fileURLToPath(new URL('../../../', import.meta.url))
const markdown: string = readFileSync(join(root, 'docs/operating.md'), 'utf8')

/** The code of that language, by the heading above it. Each section has one block of it at most. */
export function codeIn(language: string): ReadonlyMap<string, string> {
  const sections = markdown.split(/^## /m).slice(1)
  return new Map(
    sections.flatMap((section) => {
      const blocks = [...section.matchAll(/^```(\w*)\n(.*?)^```$/gms)].filter(([, name]) => name === language)
      const heading = section.slice(0, section.indexOf('\n'))
      if (blocks.length > 1) throw new Error(`"${heading}" has several blocks of ${language}`)
      return blocks.map(([, , code]) => [heading, code!] as const)
    }),
  )
}

/** What the page names, as it is below `folder`. */
export function localTo(folder: string, ports: readonly number[] = []): (text: string) => string {
  for (const name of ['etc', 'lib', 'run', 'bin']) mkdirSync(join(folder, name), { recursive: true })
  chmodSync(folder, 0o755)
  const [metrics = 9464, http = 8780, cache = 6380] = ports
  const names = new Map([
    ['/opt/tmem/apps/tmem/dist/bin.js', `"${join(root, 'apps/tmem/dist/bin.js')}"`],
    ['exec node', `exec "${process.execPath}"`],
    ['/usr/local/bin', join(folder, 'bin')],
    ['/etc/tmem', join(folder, 'etc')],
    ['/var/lib/tmem', join(folder, 'lib')],
    ['/var/tmp', join(folder, 'lib')],
    ['/run/tmem', join(folder, 'run')],
    ['docs/swap.yaml', join(folder, 'etc/swap.yaml')],
    [':9464', `:${metrics}`],
    [':8780', `:${http}`],
    [':6380', `:${cache}`],
    ['-p 6380', `-p ${cache}`],
    ['512MiB', '16MiB'],
    ['256MiB', '8MiB'],
    ['2GiB', '32MiB'],
    ['1GiB', '8MiB'],
  ])
  // In one pass: what a name becomes may have another one in it.
  const any = new RegExp([...names.keys()].map((name) => name.replaceAll('.', '\\.')).join('|'), 'g')
  return (text) => text.replace(any, (name) => names.get(name)!)
}

/** One shell, as somebody at a terminal has it. */
export interface Shell {
  /** Runs lines to their end; resolves to what they said. Rejects where one of them fails. */
  readonly run: (lines: string) => Promise<string>
  /** Ends it: no process of it is left. */
  readonly end: () => void
}

/** A shell that finds the program below `folder`, as the page installs it. */
export function shellIn(folder: string): Shell {
  const env: NodeJS.ProcessEnv = {
    ...process.env,
    PATH: `${join(folder, 'bin')}:${process.env['PATH']}`,
    NO_COLOR: '1',
    // Where the control socket is that no command names.
    XDG_RUNTIME_DIR: folder,
  }
  const shell = spawn('bash', ['-e'], { stdio: ['pipe', 'pipe', 'pipe'], env, cwd: folder, detached: true })
  let said = ''
  for (const stream of [shell.stdout, shell.stderr])
    stream.setEncoding('utf8').on('data', (text: string) => {
      said += text
      look()
    })
  let look = (): void => undefined
  let count = 0
  let isOver = false
  shell.once('close', () => {
    isOver = true
    look()
  })
  return {
    run: (lines) =>
      new Promise((resolve, reject) => {
        const mark = `== ${++count} done`
        said = ''
        look = () => {
          if (said.includes(mark)) resolve(said.slice(0, said.indexOf(mark)))
          else if (isOver) reject(new Error(`a command failed:\n${lines}${said}`))
        }
        shell.stdin.write(`${lines.trimEnd()}\necho '${mark}'\n`)
      }),
    end: () => {
      if (!isOver) process.kill(-shell.pid!, 'SIGKILL')
    },
  }
}
