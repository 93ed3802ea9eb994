/**
 * `tmem completion`: scripts that make shells complete commands, options, the choices of an option, and files where a
 * path is expected. They are made from the definitions that parse the command line.
 *
 * Sources: bash(1), Programmable Completion; zshcompsys(1); fish's complete(1).
 */
import type { Argument, Command, Option } from 'commander'
import type { Terminal } from '../terminal.ts'
import { namesOf, optionsOf } from './help.ts'

/** Prints the script for a shell. */
export function completion(
  program: Command,
  shell: 'bash' | 'zsh' | 'fish',
  { json }: { readonly json?: true },
  terminal: Terminal,
): void {
  const text = { bash, zsh, fish }[shell](commandsFrom(program)).trimEnd()
  terminal.print(json === true ? JSON.stringify({ shell, text }) : text)
}

/** The parts of a command that can be completed. */
interface Known {
  /** The words after the program's name; empty for the program itself. */
  readonly words: readonly string[]
  readonly summary: string
  readonly commands: readonly Command[]
  readonly options: readonly Option[]
  readonly arguments: readonly Argument[]
}

/** A command and all its subcommands. */
function commandsFrom(command: Command): Known[] {
  const { commands, registeredArguments } = command
  const known = {
    words: namesOf(command).slice(1),
    summary: command.description(),
    commands,
    options: optionsOf(command),
    arguments: registeredArguments,
  }
  return [known, ...commands.flatMap(commandsFrom)]
}

/** The values of an option: one of these words, a file, or anything. */
type Values = readonly string[] | 'file' | 'any' | undefined

/** The values of an option; `undefined` if it takes none. */
function valuesOf({ argChoices, flags, required, optional }: Option): Values {
  if (argChoices !== undefined) return argChoices
  if (!required && !optional) return undefined
  return /<(?:path|file|directory)(?:\.\.\.)?>/.test(flags) ? 'file' : 'any'
}

const valuesOfArgument = (argument: Argument): Values =>
  argument.argChoices ?? (/file|path|words|scenario/.test(argument.name()) ? 'file' : 'any')

const flagsOf = ({ short, long }: Option): string[] => [short, long].filter((flag) => flag !== undefined)

/** A word in single quotes, in which a shell finds nothing special. */
const quoted = (text: string): string => `'${text.replaceAll("'", "'\\''")}'`

function bash(all: readonly Known[]): string {
  const paths = all.filter(({ words }) => words.length > 0).map(({ words }) => quoted(` ${words.join(' ')}`))
  const cases = all.map(({ words, commands, options, arguments: given }) => {
    const path = words.map((word) => ` ${word}`).join('')
    const offered = [
      ...commands.map((one) => one.name()),
      ...given.flatMap((argument) => argument.argChoices ?? []),
      ...options.flatMap(flagsOf),
    ]
    const takesFile = given.some((argument) => valuesOfArgument(argument) === 'file')
    const byOption = options.flatMap((option) => {
      const values = valuesOf(option)
      if (values === undefined) return []
      const reply = values === 'file' ? 'COMPREPLY=($(compgen -f -- "$cur"))' : values === 'any' ? ':' : replyOf(values)
      return [`      ${flagsOf(option).join('|')}) ${reply}; return ;;`]
    })
    return `    ${quoted(path)})
      case "$prev" in
${byOption.map((line) => `  ${line}\n`).join('')}      esac
      ${replyOf(offered)}
${takesFile ? '      COMPREPLY+=($(compgen -f -- "$cur"))\n' : ''}      ;;`
  })
  return `# Completion of tmem for bash: tmem completion bash > /usr/share/bash-completion/completions/tmem
_tmem() {
  local cur="\${COMP_WORDS[COMP_CWORD]}" prev="\${COMP_WORDS[COMP_CWORD-1]}" path='' n
  COMPREPLY=()
  for ((n = 1; n < COMP_CWORD; n++)); do
    case "$path \${COMP_WORDS[n]}" in
      ${paths.join('|')}) path="$path \${COMP_WORDS[n]}" ;;
    esac
  done
  case "$path" in
${cases.join('\n')}
  esac
}
complete -o filenames -F _tmem tmem
`
}

const replyOf = (words: readonly string[]): string => `COMPREPLY=($(compgen -W ${quoted(words.join(' '))} -- "$cur"))`

function zsh(all: readonly Known[]): string {
  const functions = all.map(({ words, commands, options, arguments: given }) => {
    const specs = [
      ...options.flatMap((option) => zshOption(option)),
      ...given.map((argument) => {
        const many = argument.variadic ? '*' : ''
        return quoted(`${many}:${zshText(argument.name())}:${zshAction(valuesOfArgument(argument))}`)
      }),
    ]
    const name = functionName(words)
    if (commands.length === 0) return `${name}() {\n  _arguments -s \\\n    ${specs.join(' \\\n    ')}\n}`
    const described = commands.map((one) => quoted(`${one.name()}:${one.description()}`))
    const further = commands.map((one) => `        ${one.name()}) ${functionName([...words, one.name()])} ;;`)
    return `${name}() {
  local context curcontext="$curcontext" state line
  local -a commands
  _arguments -C \\
    ${[...specs, quoted('1:command:->command'), quoted('*::argument:->argument')].join(' \\\n    ')}
  case "$state" in
    command)
      commands=(
        ${described.join('\n        ')}
      )
      _describe command commands
      ;;
    argument)
      case "$line[1]" in
${further.join('\n')}
      esac
      ;;
  esac
}`
  })
  return `#compdef tmem
# Completion of tmem for zsh: tmem completion zsh > "\${fpath[1]}/_tmem"
${functions.join('\n')}
if [ "$funcstack[1]" = _tmem ]; then _tmem "$@"; else compdef _tmem tmem; fi
`
}

const functionName = (words: readonly string[]): string => ['_tmem', ...words].join('_').replaceAll('-', '_')

function zshOption(option: Option): string[] {
  const values = valuesOf(option)
  const value = values === undefined ? '' : `${option.optional ? '::' : ':'}value:${zshAction(values)}`
  const repeats = option.variadic || option.parseArg !== undefined ? '*' : ''
  return flagsOf(option).map((flag) => quoted(`${repeats}${flag}[${zshText(option.description)}]${value}`))
}

function zshAction(values: Values): string {
  if (values === undefined || values === 'any') return ' '
  return values === 'file' ? '_files' : `(${values.join(' ')})`
}

const zshText = (text: string): string => text.replaceAll(/[\\:[\]]/g, '\\$&')

function fish(all: readonly Known[]): string {
  const lines = all.flatMap(({ words, commands, options, arguments: given }) => {
    const below = commands.map((one) => one.name())
    const seen = words.map((word) => `__fish_seen_subcommand_from ${word}`)
    const none = below.length === 0 ? [] : [`not __fish_seen_subcommand_from ${below.join(' ')}`]
    const condition = [...seen, ...none].join('; and ')
    const when = condition === '' ? '' : ` -n ${quoted(condition)}`
    return [
      ...commands.map((one) => `complete -c tmem${when} -a ${one.name()} -d ${quoted(one.description())}`),
      ...given.flatMap((argument) => {
        const values = valuesOfArgument(argument)
        if (values === 'file') return [`complete -c tmem${when} -F`]
        return Array.isArray(values) ? [`complete -c tmem${when} -a ${quoted(values.join(' '))}`] : []
      }),
      ...options.map((option) => `complete -c tmem${when} ${fishOption(option)} -d ${quoted(option.description)}`),
    ]
  })
  return `# Completion of tmem for fish: tmem completion fish > ~/.config/fish/completions/tmem.fish
complete -c tmem -f
${lines.join('\n')}
`
}

function fishOption(option: Option): string {
  const values = valuesOf(option)
  const flags = [
    ...(option.short === undefined ? [] : [`-s ${option.short.slice(1)}`]),
    ...(option.long === undefined ? [] : [`-l ${option.long.slice(2)}`]),
  ]
  if (values === 'file') flags.push('-r -F')
  else if (values === 'any') flags.push(option.optional ? '-f' : '-x')
  else if (values !== undefined) flags.push(`-x -a ${quoted(values.join(' '))}`)
  return flags.join(' ')
}
