/** Guests that do what they should, and guests that do not. */
import { spawn } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { runInThisContext } from 'node:vm'
import { afterAll, describe, expect, onTestFinished, type TestContext, test } from 'vitest'
import { unpacked } from '../../../../tools/debian-packages.mjs'
import { requires } from '../../../../tools/requires.ts'
import * as own from '../../src/index.ts'

const { findKernel, initramfs, runGuest } = own
const busybox = join(unpacked('busybox-static'), 'bin/busybox')

function kernelFor(ctx: TestContext): own.Kernel {
  requires(ctx, {
    commands: ['qemu-system-x86_64', 'setpriv'],
    packages: ['linux-image-cloud-amd64', 'busybox-static'],
  })
  return findKernel(unpacked('linux-image-cloud-amd64'))!
}

function temporary(): string {
  const folder = mkdtempSync(join(tmpdir(), 'tmem-test-'))
  onTestFinished(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

const run = (kernel: own.Kernel, script: string, more: Partial<own.GuestOptions> = {}): Promise<own.GuestRun> =>
  runGuest({ kernel, initramfs: initramfs({ kernel, busybox, script }), memoryBytes: 2 ** 27, ...more })

/** Virtual machines that descend from a process. */
function machinesOf(pid: number): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((other) => {
      try {
        const [, name, parent] = /\((.*)\) . (\d+)/.exec(readFileSync(`/proc/${other}/stat`, 'latin1'))!
        return Number(parent) === pid && name!.startsWith('qemu-system')
      } catch {
        return false
      }
    })
}

// Other runs on this machine have theirs elsewhere.
const usual = process.env['TMPDIR']
const scratch = mkdtempSync(join(tmpdir(), 'tmem-test-'))
process.env['TMPDIR'] = scratch
afterAll(() => {
  if (usual === undefined) delete process.env['TMPDIR']
  else process.env['TMPDIR'] = usual
  rmSync(scratch, { recursive: true })
})
const folders = (): string[] => readdirSync(scratch).filter((name) => name.startsWith('tmem-guest-'))

describe('a guest', { timeout: 150_000 }, () => {
  test('the example of the README works', async (ctx) => {
    kernelFor(ctx)
    const folder = temporary()
    symlinkSync(unpacked('linux-image-cloud-amd64'), join(folder, 'linux'))
    symlinkSync(unpacked('busybox-static'), join(folder, 'busybox'))
    const readme = readFileSync(new URL('../../README.md', import.meta.url), 'utf8')
    const code = /```ts\n([\s\S]*?)```/
      .exec(readme)![1]!
      .replace(/^import .*\n/gm, '')
      .replaceAll("'./", `'${folder}/`)
    const lines: string[] = []
    const example = runInThisContext(
      `async (modules, console) => { const { findKernel, initramfs, runGuest } = modules; ${code} }`,
    )
    await example(own, { log: (...words: unknown[]) => lines.push(words.join(' ')) })
    expect(lines).toEqual(['hello from Linux 3'])
  })

  test('has its drives in order, and reads and writes them', async (ctx) => {
    const kernel = kernelFor(ctx)
    const folder = temporary()
    const files = [1, 2].map((n) => join(folder, `${n}.img`))
    for (const [n, file] of files.entries()) writeFileSync(file, Buffer.alloc(2 ** 20 * (n + 1), `${n}`))
    const script = `
      cat /sys/block/vda/size /sys/block/vdb/size
      head -c 3 /dev/vdb; echo
      printf 'from the guest' | dd of=/dev/vda bs=1 seek=4096 conv=fsync 2>/dev/null
      printf 'no newline at the end'`
    const { console, exit, seconds } = await run(kernel, script, { drives: files.map((file) => ({ file })) })
    expect({ console, exit }).toEqual({ console: '2048\n4096\n111\nno newline at the end', exit: 0 })
    expect(seconds).toBeGreaterThan(0)
    expect(readFileSync(files[0]!).toString('latin1', 4095, 4111)).toBe('0from the guest0')
    expect(folders()).toEqual([])
  })

  test('that hangs is killed when the time is over', async (ctx) => {
    const kernel = kernelFor(ctx)
    const { console, exit } = await run(kernel, 'echo before; sleep 1000; echo after', { timeoutMs: 20_000 })
    expect({ console, exit }).toEqual({ console: 'before\n', exit: 'timeout' })
    expect(machinesOf(process.pid)).toEqual([])
    expect(folders()).toEqual([])
  })

  test('that panics has died, and what it said last is there', async (ctx) => {
    const { console, exit } = await run(kernelFor(ctx), 'echo before; echo c > /proc/sysrq-trigger')
    expect(exit).toBe('died')
    expect(console).toMatch(/^before\n.*Kernel panic/s)
  })

  test('is killed when the signal aborts', async (ctx) => {
    const kernel = kernelFor(ctx)
    const controller = new AbortController()
    const running = run(kernel, 'sleep 1000', { signal: controller.signal })
    while (machinesOf(process.pid).length === 0) await setTimeout(50)
    const reason = new Error('enough')
    controller.abort(reason)
    await expect(running).rejects.toBe(reason)
    expect(machinesOf(process.pid)).toEqual([])
    expect(folders()).toEqual([])
    await expect(run(kernel, 'true', { signal: controller.signal })).rejects.toBe(reason)
  })

  test('ends with the process that wants it, also when that is killed', async (ctx) => {
    const kernel = kernelFor(ctx)
    const folder = temporary()
    const entry = new URL('../../dist/index.js', import.meta.url)
    const code = `const { initramfs, runGuest } = await import(${JSON.stringify(entry.href)})
      const [kernel, busybox] = ${JSON.stringify([kernel, busybox])}
      await runGuest({ kernel, initramfs: initramfs({ kernel, busybox, script: 'sleep 1000' }), memoryBytes: 2 ** 27 })`
    const child = spawn(process.execPath, ['--input-type=module', '-e', code], {
      stdio: 'ignore',
      env: { ...process.env, TMPDIR: folder },
    })
    const ended = new Promise((resolve) => child.once('exit', resolve))
    let machines: number[] = []
    while (machines.length === 0) {
      await setTimeout(50)
      machines = machinesOf(child.pid!)
    }
    child.kill('SIGKILL')
    await ended
    onTestFinished(() => {
      if (alive()) process.kill(machines[0]!, 'SIGKILL')
    })
    const alive = (): boolean => {
      try {
        return !/^State:\s+Z/m.test(readFileSync(`/proc/${machines[0]}/status`, 'latin1'))
      } catch {
        return false
      }
    }
    await expect.poll(alive, { timeout: 10_000 }).toBe(false)
  })

  test('a drive that is not there is told in the words of QEMU', async (ctx) => {
    const drives = [{ file: '/nowhere/a.img' }]
    await expect(run(kernelFor(ctx), 'true', { drives })).rejects.toThrow(
      /^qemu-system-x86_64 ended with 1: .*\/nowhere\/a\.img.*No such file/s,
    )
    expect(folders()).toEqual([])
  })
})
