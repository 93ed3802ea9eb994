/** Manual pages and completion: read by man, and by the shells themselves. */
import { spawnSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { requires } from '../../../tools/requires.ts'
import { temporaryDirectory, tmem } from './tmem.ts'

const page = async (...names: string[]): Promise<string> => (await tmem(['help', ...names, '--man'])).stdout

/** What man shows of a page, and what it warns of. */
function shown(text: string): { text: string; warnings: string } {
  const file = join(temporaryDirectory(), 'page.1')
  writeFileSync(file, text)
  const { stdout, stderr } = spawnSync('man', ['--warnings=all', '-E', 'UTF-8', '-l', file], {
    encoding: 'utf8',
    env: { ...process.env, MANWIDTH: '100', MANROFFOPT: '', LC_ALL: 'C.UTF-8' },
  })
  return { text: stdout, warnings: stderr }
}

test('the manual page has every command and option, and man finds nothing to warn of', {
  timeout: 60_000,
}, async (ctx) => {
  requires(ctx, { commands: ['man', 'groff'] })
  const { text, warnings } = shown(await page())
  expect(warnings).toBe('')
  const { stdout } = await tmem(['--help'])
  const commands = [...stdout.matchAll(/^ {2}([a-z][\w-]+)/gm)].map(([, name]) => name!)
  expect(commands).toContain('install-unit')
  for (const name of commands) {
    expect(text).toMatch(new RegExp(`^ +tmem ${name}$`, 'm'))
    const options = [...(await tmem([name, '--help'])).stdout.matchAll(/^ {2}(-\S.*?)(?: {2,}|$)/gm)].map(
      ([, flags]) => flags!,
    )
    for (const flags of options) expect(text).toContain(flags)
  }
  expect(text).toMatch(/^EXIT STATUS\n +0 +done\.$/m)
})

test('each command has a page of its own, with those below it', async (ctx) => {
  requires(ctx, { commands: ['man', 'groff'] })
  const { text, warnings } = shown(await page('xen'))
  expect(warnings).toBe('')
  expect(text).toMatch(/^NAME\n +tmem-xen - act as a host with Xen's tmem interface, and as its toolstack$/m)
  expect(text).toContain('tmem xen migrate')
  expect(await page('xen', 'list')).toMatch(/^\.TH TMEM\\-XEN\\-LIST 1 /)
})

test('help is what --help says, and a command that there is not is told', async () => {
  expect((await tmem(['help', 'serve'])).stdout.trimEnd()).toBe((await tmem(['serve', '--help'])).stdout.trimEnd())
  expect(await tmem(['help', 'xen', 'lisst'])).toEqual({
    code: 2,
    stdout: '',
    stderr: expect.stringMatching(/^tmem: there is no command tmem xen lisst: did you mean list\?[^\n]*\n$/),
  })
  expect(await tmem(['completion', 'csh'])).toMatchObject({
    code: 2,
    stdout: '',
    stderr: expect.stringContaining('bash, zsh, fish'),
  })
  for (const words of [
    ['help', '--json'],
    ['help', 'serve', '--man', '--json'],
    ['completion', 'fish', '--json'],
  ])
    expect(typeof JSON.parse((await tmem(words)).stdout).text).toBe('string')
})

/** What each shell has to offer after these words. */
const cases: readonly (readonly [words: readonly string[], some: readonly string[], none: readonly string[]])[] = [
  [['se'], ['serve'], ['demo', 'stat']],
  [['serve', '--fu'], ['--fuse'], ['--nbd']],
  [['swap', 'o'], ['on', 'off'], ['status']],
  [['serve', '--log-level', 'w'], ['warn'], ['info']],
  [['xen', 'mi'], ['migrate'], ['list']],
  [['xen', 'decode', '--as', 'sy'], ['sysctl'], ['op']],
  [['config', 'check', '--file', 'tm'], ['tmem.yaml'], ['check']],
]

async function script(shell: string): Promise<{ folder: string; file: string }> {
  const folder = temporaryDirectory()
  const file = join(folder, '_tmem')
  writeFileSync(file, (await tmem(['completion', shell])).stdout)
  writeFileSync(join(folder, 'tmem.yaml'), '')
  return { folder, file }
}

/** Of which words a shell does not offer what it should, or offers what it should not. */
const wrong = (offered: (words: readonly string[]) => string[]): object[] =>
  cases.flatMap(([words, some, none]) => {
    const found = offered(words)
    const isRight = some.every((word) => found.includes(word)) && !none.some((word) => found.includes(word))
    return isRight ? [] : [{ words, found }]
  })

test('bash completes', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: ['bash'] })
  const { folder, file } = await script('bash')
  const found = wrong((words) => {
    const run = 'source "$1"; shift; COMP_WORDS=(tmem "$@"); COMP_CWORD=$#; _tmem; declare -p COMPREPLY'
    const { stdout, stderr } = spawnSync('bash', ['--norc', '-c', run, 'bash', file, ...words], {
      encoding: 'utf8',
      cwd: folder,
    })
    expect(stderr).toBe('')
    return [...stdout.matchAll(/\]="([^"]*)"/g)].map(([, word]) => word!)
  })
  expect(found).toEqual([])
})

test('fish completes', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: ['fish'] })
  const { folder, file } = await script('fish')
  const found = wrong((words) => {
    const run = 'source $argv[1]; complete -C (string join -- " " tmem $argv[2..])'
    const { stdout, stderr } = spawnSync('fish', ['--no-config', '-c', run, file, ...words], {
      encoding: 'utf8',
      cwd: folder,
      env: { ...process.env, HOME: folder },
    })
    expect(stderr).toBe('')
    return stdout.split('\n').map((line) => line.split('\t')[0]!)
  })
  expect(found).toEqual([])
})

test('zsh completes', { timeout: 60_000 }, async (ctx) => {
  requires(ctx, { commands: ['zsh'] })
  const { folder } = await script('zsh')
  // A shell of its own on a terminal of its own, which is asked for the list as a person asks for it. Keys that wait
  // would end what it does for the one before.
  const run = `
zmodload zsh/zpty
zpty s zsh -f -i
zpty -w s 'PROMPT=; fpath=(${folder} $fpath); autoload -U compinit; compinit -u -D; cd ${folder}'
zpty -w s 'compadd() {
  local -a found
  [[ " \${(j: :)\${@[1,(i)(-|--)]}} " == *" -"[OAD]" "* ]] || { builtin compadd -O found "$@"; print -rl -- "<"\${^found}">" }
  builtin compadd "$@"
}'
zpty -w s 'told() { zle expand-or-complete; print TO""LD }; zle -N told; bindkey "^I" told'
zpty -w s 'print BE""GUN'
while zpty -r s line; do [[ $line == *BEGUN* ]] && break; done
zpty -n -w s "tmem $*"$'\\t'
while zpty -r s line; do print -r -- "$line"; [[ $line == *TOLD* ]] && break; done
zpty -d s
`
  const found = wrong((words) => {
    const { stdout } = spawnSync('zsh', ['-f', '-c', run, 'zsh', ...words], {
      encoding: 'utf8',
      cwd: folder,
      timeout: 20_000,
    })
    return [...stdout.matchAll(/<([^<>\r\n]+)>/g)].map(([, word]) => word!)
  })
  expect(found).toEqual([])
})
