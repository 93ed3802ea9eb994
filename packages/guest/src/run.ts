/**
 * A virtual machine for as long as its script takes: QEMU on x86-64 without KVM (TCG), one processor, a serial console,
 * drives.
 *
 * Whatever happens nothing is left: QEMU is killed when the time is over, when the signal aborts, and by the kernel
 * when the thread that called has died; the file with the root directory goes away with it.
 */

import { spawn } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { type ByteAmount, bytesOf, checkOptions } from '@tmem/core'
import type { Kernel } from './initramfs.ts'

/** A block device of the guest. Discards go through. */
export type GuestDrive =
  /** A raw image; with `direct` it is read and written around the host's cache, which its file system must allow. */
  | { readonly file: string; readonly direct?: true }
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
    timeoutMs: 'number?',
    signal: 'object?',
  })
  const { initramfs, timeoutMs = 120_000, signal } = options
  signal?.throwIfAborted()
  const folder = mkdtempSync(join(tmpdir(), 'tmem-guest-'))
  try {
    const root = join(folder, 'initramfs')
    writeFileSync(root, initramfs)
    const started = performance.now()
    const child = spawn('setpriv', ['--pdeathsig', 'KILL', qemu, ...wordsOf(options, root)], {
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    const printed: Buffer[] = []
    let complaint = ''
    child.stdout.on('data', (bytes: Buffer) => printed.push(bytes))
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
  }
}

function wordsOf({ kernel, memoryBytes, drives = [] }: GuestOptions, root: string): string[] {
  const machine = [
    '-accel',
    'tcg',
    '-cpu',
    'max',
    '-machine',
    'q35',
    '-smp',
    '1',
    '-m',
    `size=${bytesOf('runGuest', 'memoryBytes', memoryBytes)}B`,
  ]
  const console = ['-nodefaults', '-no-user-config', '-display', 'none', '-serial', 'stdio', '-no-reboot']
  // A panic reboots at once, which ends QEMU.
  const append = `console=ttyS0 quiet panic=-1 guest_drives=${drives.length}`
  const boot = ['-kernel', kernel.image, '-initrd', root, '-append', append]
  return [...machine, ...console, ...boot, ...drives.flatMap(driveWords)]
}

/** What QEMU is told about a drive, the `n`-th: four words. */
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
  const options = JSON.stringify({ ...node, 'node-name': name, discard: 'unmap' })
  return ['-blockdev', options, '-device', `virtio-blk-pci,drive=${name}`]
}
