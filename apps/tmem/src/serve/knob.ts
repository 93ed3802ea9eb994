/** `tmem knob`: shows and sets the knobs of a device while it is served. */
import { type Terminal, tableOf } from '../terminal.ts'
import { ask } from './control.ts'

/** Shows all knobs of a device, shows one, or sets one. */
export async function knob(
  device: string,
  name: string | undefined,
  words: readonly string[],
  options: { readonly control: string; readonly json?: true },
  terminal: Terminal,
): Promise<void> {
  const knobs = await ask(options.control, 'knobs', {
    device,
    ...(name === undefined ? {} : { name }),
    ...(words.length === 0 ? {} : { value: words.join(' ') }),
  })
  if (options.json === true) terminal.print(JSON.stringify(knobs))
  else terminal.print(tableOf(['knob', 'value'], Object.entries(knobs), ['left', 'left']))
}
