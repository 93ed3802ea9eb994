/**
 * `tmem swap`: makes this host's kernel swap to a device of a server, through its file and a loop device, and undoes that in the
 * opposite order. What is on is read from the kernel each time: there is no state of its own that could be wrong.
 */
import { setTimeout } from 'node:timers/promises'
import { BadInput, Failed, throwIfInterrupted } from '../ending.ts'
import { type Terminal, tableOf } from '../terminal.ts'
import { ask, type Info } from './control.ts'
import { type LoopUse, loopsBelow, tool } from './host.ts'

interface State {
  readonly device: string
  readonly file: string
  readonly loop: string | null
  readonly swap: LoopUse['swap'] | null
}

/** Turns swapping on or off, or shows it. */
export async function swap(
  what: 'on' | 'off' | 'status',
  device: string | undefined,
  options: { readonly control: string; readonly priority: number; readonly wait: number; readonly json?: true },
  terminal: Terminal,
): Promise<void> {
  const info = await infoWithin(options.wait, options.control, terminal)
  if (info.fuse === null) throw new Failed('the server has no files for a loop device: start it with --fuse DIRECTORY')
  if (what === 'status') {
    show(statesOf(info, device), options.json, terminal)
    return
  }
  const state = theOne(statesOf(info, device))
  if (what === 'on') await on(state, options.priority)
  else await off(state)
  show(statesOf(info, state.device), options.json, terminal)
}

const retryMs = 200

/** Asks until a server answers: who starts one in the background cannot know when it serves. */
async function infoWithin(seconds: number, control: string, terminal: Terminal): Promise<Info> {
  const end = performance.now() + seconds * 1000
  for (;;) {
    try {
      return await ask(control, 'info')
    } catch (error) {
      if (performance.now() >= end) throw error
    }
    await setTimeout(retryMs, undefined, { signal: terminal.signal }).catch(() => undefined)
    throwIfInterrupted(terminal.signal)
  }
}

async function on({ device, file, loop: before, swap: active }: State, priority: number): Promise<void> {
  if (priority > 32767) throw new BadInput(`a priority is 0 to 32767, got ${priority}`)
  if (active !== null) throw new Failed(`${device} is active swap already`)
  if (before !== null) throw new Failed(`${device} is in use already, as ${before}: free it with losetup -d ${before}`)
  const loop = await tool('losetup', '-f', '--show', '--direct-io=on', file)
  try {
    await tool('mkswap', loop)
    // -d: freed slots are discarded, so that their memory comes back.
    await tool('swapon', '-d', '-p', String(priority), loop)
  } catch (error) {
    await tool('losetup', '-d', loop)
    throw error
  }
}

async function off({ device, loop, swap: active }: State): Promise<void> {
  if (loop === null) throw new Failed(`${device} is not on`)
  if (active !== null) await tool('swapoff', loop)
  await tool('losetup', '-d', loop)
}

function statesOf(info: Info, device: string | undefined): State[] {
  const uses = loopsBelow(info.fuse!)
  const names = info.devices.map(({ name }) => name)
  if (device !== undefined && !names.includes(device))
    throw new BadInput(`the server has no device "${device}"; it has ${names.join(', ')}`)
  return names
    .filter((name) => device === undefined || name === device)
    .map((name) => {
      const file = `${info.fuse}/${name}`
      const use = uses.find((one) => one.file === file)
      return { device: name, file, loop: use?.loop ?? null, swap: use?.swap ?? null }
    })
}

function theOne(states: readonly State[]): State {
  if (states.length !== 1) throw new BadInput(`say which device: ${states.map(({ device }) => device).join(', ')}`)
  return states[0]!
}

function show(states: readonly State[], json: true | undefined, terminal: Terminal): void {
  if (json === true) {
    terminal.print(JSON.stringify({ devices: states }))
    return
  }
  const pages = (bytes: number | undefined): string => (bytes === undefined ? '-' : String(bytes / 4096))
  terminal.print(
    tableOf(
      ['device', 'swap', 'loop', 'pages', 'used', 'priority'],
      states.map(({ device, loop, swap: active }) => [
        device,
        active === null ? 'off' : 'on',
        loop ?? '-',
        pages(active?.sizeBytes),
        pages(active?.usedBytes),
        active === null ? '-' : String(active?.priority),
      ]),
    ),
  )
}
