/**
 * `tmem swap`: makes this host's kernel swap to a device of a server, through its file and a loop device, and undoes
 * both in the opposite order. It reads the state from the kernel each time, and keeps none of its own that could be
 * wrong.
 *
 * Invariants:
 *  - Device and inode identify the file: those of the server's mount, and those that the loop device reports. A path is
 *    only a way to the file.
 *  - A command that turns a device on or off holds a claim on its file, so that of two at one moment only one acts. A
 *    device that anybody else uses is never turned on: `mkswap` would overwrite their data.
 */
import { closeSync, constants, openSync } from 'node:fs'
import { lstat } from 'node:fs/promises'
import { setTimeout } from 'node:timers/promises'
import type { OpenProgress } from '@tmem/core'
import { deviceText } from '@tmem/fuse'
import { systemFiles } from '@tmem/page-file'
import { BadInput, Failed } from '../ending.ts'
import { type Terminal, tableOf, withProgress } from '../terminal.ts'
import { ask, type Info, infoWithin } from './control.ts'
import { type LoopUse, loopsOver, release, tool, useText } from './host.ts'

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
  const info = await infoWithin(options.wait, options.control, terminal.signal)
  if (info.fuse === null || info.fileSystem === null)
    throw new Failed('the server has no files for a loop device: start it with --fuse DIRECTORY')
  if (what === 'status') {
    show(await statesOf(info, namesOf(info, device)), options.json, terminal)
    return
  }
  const names = namesOf(info, device)
  if (names.length !== 1) throw new BadInput(`name one of the devices: ${names.join(', ')}`)
  const name = names[0]!
  await claimed(info, name, async () => {
    if (what === 'on') await on(info, name, options)
    else await withProgress(terminal, (onProgress) => off(info, name, onProgress))
  })
  show(await statesOf(info, [name]), options.json, terminal)
}

/** Number of checks, and milliseconds between them, for a user of a device to leave. */
const looks = 20
const lookMs = 50

/** Acts while the file of a device is open and claimed. Rejects with `Failed` if another process has claimed it. */
async function claimed(info: Info, name: string, act: () => Promise<void>): Promise<void> {
  const file = fileOf(info, name)
  await inodeOf(info, name)
  let descriptor: number
  try {
    descriptor = openSync(file, constants.O_RDWR | constants.O_NOFOLLOW)
  } catch (error) {
    throw new Failed(`${file} cannot be opened: ${(error as Error).message}`)
  }
  try {
    const files = systemFiles()
    const claim = files.claim(descriptor, files.identifyOpen(descriptor), undefined)
    if (claim === undefined) throw new Failed(`another process is turning ${name} on or off: try again`)
    try {
      await act()
    } finally {
      claim.release()
    }
  } finally {
    closeSync(descriptor)
  }
}

async function on(
  info: Info,
  name: string,
  { control, priority }: { readonly control: string; readonly priority: number },
): Promise<void> {
  if (priority > 32767) throw new BadInput(`--priority: expected 0 to 32767, got ${priority}`)
  const before = (await usesBy(info, [name])).get(name)!
  if (before.some((use) => use.swap !== undefined)) throw new Failed(`${name} is active swap already`)
  if (before.length > 0)
    throw new Failed(
      `${name} is in use already, as ${before.map(useText).join('; ')}: end that, and free it with losetup -d`,
    )
  await assertUnused(control, name)
  const loop = await tool('losetup', '-f', '--show', '--direct-io=on', fileOf(info, name))
  try {
    const now = (await usesBy(info, [name])).get(name)!
    if (now.length !== 1 || now[0]!.loop !== loop)
      throw new Failed(`${loop} does not belong to the server's file ${fileOf(info, name)} alone: nothing was written`)
    await tool('mkswap', loop)
    // -d: the kernel discards freed slots, which frees their memory.
    await tool('swapon', '-d', '-p', String(priority), loop)
  } catch (error) {
    await tool('losetup', '-d', loop)
    throw error
  }
}

/** Rejects with `Failed` if others than this process use a device and do not stop. */
async function assertUnused(control: string, name: string): Promise<void> {
  for (let look = 0; ; look++) {
    // One open file is the claimed one; a process that comes too late for the claim has another open for a moment.
    const { clients, opens } = await ask(control, 'users', { device: name })
    if (clients === 0 && opens <= 1) return
    if (look === looks)
      throw new Failed(`${name} is in use already: ${clients} NBD connections, ${opens - 1} open files`)
    await setTimeout(lookMs)
  }
}

async function off(info: Info, name: string, onProgress: OpenProgress): Promise<void> {
  const uses = (await usesBy(info, [name])).get(name)!
  if (uses.length === 0) throw new Failed(`${name} is not active swap`)
  for (const use of uses) await release(use, onProgress)
}

const fileOf = (info: Info, name: string): string => `${info.fuse}/${name}`

/** Inode of a device's file. Rejects with `Failed` if the name leads to another file. */
async function inodeOf(info: Info, name: string): Promise<number> {
  const file = fileOf(info, name)
  const stat = await lstat(file, { bigint: true }).catch((error: Error) => {
    throw new Failed(`${file} cannot be examined: ${error.message}`)
  })
  if (!stat.isFile() || deviceText(stat.dev) !== info.fileSystem)
    throw new Failed(
      `${file} is not a file of the server: another file system is mounted there; the server's is ${info.fileSystem}`,
    )
  return Number(stat.ino)
}

/** How the kernel uses the files of devices, which device and inode identify. */
export async function usesBy(info: Info, names: readonly string[]): Promise<ReadonlyMap<string, readonly LoopUse[]>> {
  const uses = await loopsOver(info.fileSystem!)
  const by = new Map<string, readonly LoopUse[]>()
  for (const name of names) {
    const inode = await inodeOf(info, name)
    by.set(
      name,
      uses.filter((use) => use.inode === inode),
    )
  }
  return by
}

/** The device that was named, or all. */
function namesOf(info: Info, device: string | undefined): string[] {
  const names = info.devices.map(({ name }) => name)
  if (device === undefined) return names
  if (!names.includes(device)) throw new BadInput(`the server has no device "${device}"; it has ${names.join(', ')}`)
  return [device]
}

async function statesOf(info: Info, names: readonly string[]): Promise<State[]> {
  const uses = await usesBy(info, names)
  return names.map((device) => {
    const all = uses.get(device)!
    const use = all.find(({ swap: active }) => active !== undefined) ?? all[0]
    return { device, file: fileOf(info, device), loop: use?.loop ?? null, swap: use?.swap ?? null }
  })
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
