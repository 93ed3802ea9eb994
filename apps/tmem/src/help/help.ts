/**
 * `tmem help`: help on a command, as `--help` prints it, or as a manual page. Both are made from the definitions that
 * parse the command line, so that they cannot differ.
 *
 * Source: man(7), man-pages(7).
 */
import { nearestName } from '@tmem/core'
import type { Argument, Command, Option } from 'commander'
import { BadInput, exitCodes } from '../ending.ts'
import type { Terminal } from '../terminal.ts'
import { programVersion } from '../version.ts'

/** Prints help. Throws `BadInput` for an unknown command. */
export function help(
  program: Command,
  names: readonly string[],
  { man, json }: { readonly man?: true; readonly json?: true },
  terminal: Terminal,
): void {
  let command = program
  for (const name of names) {
    const found = command.commands.find((one) => one.name() === name)
    const all = command.commands.map((one) => one.name())
    if (found === undefined)
      throw new BadInput(`there is no command ${[...namesOf(command), name].join(' ')}: ${nearestName(name, all)}`)
    command = found
  }
  const text = man === true ? manualPage(command) : command.helpInformation().trimEnd()
  if (json === true) terminal.print(JSON.stringify({ command: namesOf(command).join(' '), text }))
  else terminal.print(text)
}

/** The words that name a command, beginning with the program. */
export function namesOf(command: Command): string[] {
  return command.parent === null ? [command.name()] : [...namesOf(command.parent), command.name()]
}

/** The manual page of a command with all its subcommands. */
function manualPage(command: Command): string {
  const names = namesOf(command)
  const title = names.join('-')
  const parts = [
    `.TH ${roff(title.toUpperCase())} 1 "" ${quoted(`tmem ${programVersion()}`)} "tmem"`,
    section('NAME'),
    `${roff(title)} \\- ${roff(command.description())}`,
    section('SYNOPSIS'),
    synopsis(command),
    section('DESCRIPTION'),
    `${sentence(command.description())}`,
  ]
  if (command.registeredArguments.length > 0)
    parts.push(section('ARGUMENTS'), ...command.registeredArguments.map(argumentText))
  parts.push(section('OPTIONS'), ...optionsOf(command).map(optionText))
  if (command.commands.length > 0) parts.push(section('COMMANDS'), ...command.commands.flatMap(below))
  parts.push(section('EXIT STATUS'), ...exitCodes.map(([code, meaning]) => item(String(code), meaning)))
  if (command.parent !== null) parts.push(section('SEE ALSO'), '.BR tmem (1)')
  return parts.join('\n')
}

/** The sections of a subcommand and of its own subcommands. */
const below = (command: Command): string[] => [
  `.SS ${quoted(namesOf(command).join(' '))}`,
  synopsis(command),
  '.PP',
  sentence(command.description()),
  ...command.registeredArguments.map(argumentText),
  ...optionsOf(command).map(optionText),
  ...command.commands.flatMap(below),
]

/** The options of a command, including --help. */
export const optionsOf = (command: Command): readonly Option[] => command.createHelp().visibleOptions(command)

const synopsis = (command: Command): string => `.B ${roff(namesOf(command).join(' '))}\n${roff(command.usage())}`

const argumentText = (argument: Argument): string =>
  item(argument.name(), [argument.description, choicesText(argument)].filter((text) => text !== '').join('; '))

const optionText = (option: Option): string =>
  item(
    option.flags,
    [option.description, choicesText(option), defaultText(option)].filter((text) => text !== '').join('; '),
  )

const choicesText = ({ argChoices }: { readonly argChoices?: readonly string[] | undefined }): string =>
  argChoices === undefined ? '' : `one of ${argChoices.join(', ')}`

const defaultText = ({ defaultValue }: Option): string =>
  defaultValue === undefined ? '' : `default: ${String(defaultValue)}`

const section = (name: string): string => `.SH ${name}`
const item = (what: string, text: string): string => `.TP\n.B ${roff(what)}\n${sentence(text)}`
const sentence = (text: string): string => roff(text.endsWith('.') || text === '' ? text : `${text}.`)
const quoted = (text: string): string => `"${roff(text).replaceAll('"', '\\(dq')}"`

/** Text in which roff finds neither a request nor an escape. */
const roff = (text: string): string =>
  text
    .replaceAll('\\', '\\e')
    .replaceAll('-', '\\-')
    .replaceAll('"', '\\(dq')
    .replaceAll(/^([.'])/gm, '\\&$1')
