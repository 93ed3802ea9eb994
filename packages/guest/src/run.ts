/**
 * A virtual machine for as long as its script takes: QEMU on x86-64 without KVM (TCG), one processor, a serial console,
 * drives.
 *
 * Whatever happens nothing is left: QEMU is killed when the time is over, when the signal aborts, and by the kernel
 * when the thread that called has died; the file with the root directory goes away with it, or, of a process that was
 * killed, when the next guest starts.
 */

import { spawn } from 'node:child_process'
import { closeSync, existsSync, ftruncateSync, openSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { type ByteAmount, bytesOf, checkOptions } from '@tmem/core'
import type { Kernel } from './initramfs.ts'
import { scratchFolder } from './scratch.ts'

/** A block device of the guest. Discards go through. */
export type GuestDrive =
  /**
   * A raw image; with `direct` it is read and written around the host's cache, which its file system must allow. It
   * does at most `requestsPerSecond`, as a disk would.
   */
  | { readonly file: string; readonly direct?: true; readonly requestsPerSecond?: number }
  /**
   * An NBD export on a unix socket. When the connection breaks, requests wait until there is a server again, at most
   * `reconnectSeconds` (default 0: they fail), and are sent again.
   */
  | { readonly socket: string; readonly exportName: string; readonly reconnectSeconds?: number }

export interface GuestOptions {
  readonly kernel: Kernel
  /** From `initramfs`. */
  readonly initramfs: Uint8Array
  readonly memoryBytes: ByteAmount
  readonly drives?: readonly GuestDrive[]
  /**
   * Where the guest's memory is, for others to map: a file that is made for it (mode 0600), best on a tmpfs, and that
   * goes with it. Byte n of it is byte n of the guest's memory, which has at most 2 GiB then.
   */
  readonly memoryFile?: string
  /**
   * A unix socket that is made for the guest: bytes that it writes to its I/O port 0x505 come to whoever is connected,
   * one at a time. Without anybody they are lost.
   */
  readonly doorbell?: string
  /** More words for the command line of the guest's kernel. */
  readonly kernelWords?: string
  /** Told what the guest prints, as it comes. */
  readonly onConsole?: (text: string) => void
  /** Default: 2 minutes. */
  readonly timeoutMs?: number
  readonly signal?: AbortSignal
}

export interface GuestRun {
  /** What the guest printed, with `\n` at the end of lines. */
  readonly console: string
  /** The exit code of the script; `died`: the machine ended before the script did (a panic, for example). */
  readonly exit: number | 'died' | 'timeout'
  /** From the start of QEMU to its end. */
  readonly seconds: number
}

const qemu = 'qemu-system-x86_64'
/** The port of a guest's doorbell. */
const doorbellPort = 0x505

/**
 * Boots a guest and waits for its end. Rejects with the signal's reason when that aborts, and with an Error that has
 * QEMU's own words when QEMU does not do what it is asked.
 */
export async function runGuest(options: GuestOptions): Promise<GuestRun> {
  checkOptions('runGuest', options, {
    kernel: 'object',
    initramfs: 'object',
    memoryBytes: 'bytes',
    drives: 'list?',
    memoryFile: 'text?',
    doorbell: 'text?',
    kernelWords: 'text?',
    onConsole: 'function?',
    timeoutMs: 'number?',
    signal: 'object?',
  })
  const { initramfs, memoryFile, doorbell, onConsole, timeoutMs = 120_000, signal } = options
  signal?.throwIfAborted()
  const memoryBytes = bytesOf('runGuest', 'memoryBytes', options.memoryBytes)
  if (memoryFile !== undefined && memoryBytes > 2 ** 31)
    throw new RangeError(`runGuest: with a memoryFile there are at most 2 GiB, got ${memoryBytes} bytes`)
  const folder = scratchFolder(tmpdir(), 'tmem-guest-')
  const made: string[] = []
  try {
    if (memoryFile !== undefined) {
      const file = openSync(memoryFile, 'wx', 0o600)
      made.push(memoryFile)
      try {
        ftruncateSync(file, memoryBytes)
      } finally {
        closeSync(file)
      }
    }
    if (doorbell !== undefined) {
      if (existsSync(doorbell)) throw new Error(`runGuest: ${doorbell}, where the doorbell is to be, is there already`)
      made.push(doorbell)
    }
    const root = join(folder, 'initramfs')
    writeFileSync(root, initramfs)
    const started = performance.now()
    const child = spawn('setpriv', ['--pdeathsig', 'KILL', qemu, ...wordsOf(options, root)], {
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    const printed: Buffer[] = []
    let complaint = ''
    // A character may come in two pieces.
    const decoder = new TextDecoder()
    child.stdout.on('data', (bytes: Buffer) => {
      printed.push(bytes)
      onConsole?.(decoder.decode(bytes, { stream: true }).replaceAll('\r', ''))
    })
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      complaint += text
    })
    let late = false
    const kill = (): void => {
      child.kill('SIGKILL')
    }
    const timer = setTimeout(() => {
      late = true
      kill()
    }, timeoutMs)
    signal?.addEventListener('abort', kill)
    let status: number | null
    try {
      status = await new Promise<number | null>((settle, fail) => {
        child.once('close', settle)
        child.once('error', (error) => fail(new Error(`cannot run setpriv: ${error.message}`, { cause: error })))
      })
    } finally {
      clearTimeout(timer)
      signal?.removeEventListener('abort', kill)
    }
    const seconds = (performance.now() - started) / 1000
    signal?.throwIfAborted()
    if (!late && status !== 0) throw new Error(`${qemu} ended with ${status ?? 'a signal'}: ${complaint.trim()}`)
    const text = Buffer.concat(printed).toString('utf8').replaceAll('\r\n', '\n')
    const end = text.lastIndexOf('\nguest ended with ')
    const code = /^\nguest ended with (\d+)\n/.exec(text.slice(end))?.[1]
    const exit = code !== undefined ? Number(code) : late ? 'timeout' : 'died'
    return { console: code !== undefined ? text.slice(0, end) : text, exit, seconds }
  } finally {
    rmSync(folder, { recursive: true, force: true })
    for (const path of made) rmSync(path, { force: true })
  }
}

function wordsOf(options: GuestOptions, root: string): string[] {
  const { kernel, drives = [], memoryFile, doorbell, kernelWords = '' } = options
  const bytes = bytesOf('runGuest', 'memoryBytes', options.memoryBytes)
  const type = memoryFile === undefined ? 'q35' : 'q35,memory-backend=memory'
  const machine = ['-accel', 'tcg', '-cpu', 'max', '-machine', type, '-smp', '1', '-m', `size=${bytes}B`]
  if (memoryFile !== undefined) {
    const backend = { 'qom-type': 'memory-backend-file', id: 'memory', 'mem-path': resolve(memoryFile) }
    machine.push('-object', JSON.stringify({ ...backend, size: bytes, share: true }))
  }
  // QEMU takes the path out of such words, in which a comma stands for itself when it is there twice.
  if (doorbell !== undefined) {
    const socket = `socket,id=doorbell,server=on,wait=off,path=${resolve(doorbell).replaceAll(',', ',,')}`
    machine.push('-chardev', socket, '-device', `isa-debugcon,iobase=${doorbellPort},chardev=doorbell`)
  }
  const console = ['-nodefaults', '-no-user-config', '-display', 'none', '-serial', 'stdio', '-no-reboot']
  // A panic reboots at once, which ends QEMU.
  const append = `console=ttyS0 quiet panic=-1 guest_drives=${drives.length} ${kernelWords}`.trimEnd()
  const boot = ['-kernel', kernel.image, '-initrd', root, '-append', append]
  return [...machine, ...console, ...boot, ...drives.flatMap(driveWords)]
}

/** What QEMU is told about a drive, the `n`-th: four words, and two more where it is held up. */
export function driveWords(drive: GuestDrive, n: number): string[] {
  const node =
    'file' in drive
      ? { driver: 'file', filename: resolve(drive.file), ...(drive.direct === true ? { cache: { direct: true } } : {}) }
      : {
          driver: 'nbd',
          server: { type: 'unix', path: resolve(drive.socket) },
          export: drive.exportName,
          'reconnect-delay': drive.reconnectSeconds ?? 0,
        }
  const name = `drive${n}`
  const device = ['-device', `virtio-blk-pci,drive=${name}`]
  if ('file' in drive && drive.requestsPerSecond !== undefined) {
    const limits = { 'iops-total': drive.requestsPerSecond }
    const group = { 'qom-type': 'throttle-group', id: `${name}-group`, limits }
    const throttle = { driver: 'throttle', 'node-name': name, 'throttle-group': group.id, discard: 'unmap' }
    const file = { ...node, discard: 'unmap' }
    return ['-object', JSON.stringify(group), '-blockdev', JSON.stringify({ ...throttle, file }), ...device]
  }
  return ['-blockdev', JSON.stringify({ ...node, 'node-name': name, discard: 'unmap' }), ...device]
}
