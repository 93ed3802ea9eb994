/** docs/operating.md, where it swaps: its commands work as they stand, and leave nothing. */
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { codeIn, localTo, root, shellIn } from '../operating.ts'
import { temporaryDirectory } from '../tmem.ts'

/** Loop devices over files below a folder. */
const loopsOver = (folder: string): string[] =>
  readdirSync('/sys/block').filter((name) => {
    const note = join('/sys/block', name, 'loop/backing_file')
    return existsSync(note) && readFileSync(note, 'utf8').startsWith(folder)
  })

test('a host swaps to it, and the server ends when it does not any more', { timeout: 120_000 }, async (ctx) => {
  requires(ctx, {
    root: true,
    commands: ['losetup', 'mkswap', 'swapon', 'swapoff'],
    paths: ['/dev/fuse', '/dev/loop-control'],
  })
  const folder = temporaryDirectory()
  const local = localTo(folder)
  // The port of the console may be somebody's.
  const file = readFileSync(join(root, 'docs/swap.yaml'), 'utf8').replace(':8780', ':0')
  writeFileSync(join(folder, 'etc/swap.yaml'), local(file))
  const shell = shellIn(folder)
  onTestFinished(() => {
    for (const name of loopsOver(folder)) {
      spawnSync('swapoff', [`/dev/${name}`], { timeout: 30_000 })
      spawnSync('losetup', ['-d', `/dev/${name}`], { timeout: 30_000 })
    }
    shell.end()
    spawnSync('umount', ['-l', join(folder, 'run')], { timeout: 30_000, stdio: 'ignore' })
  })
  await shell.run(local(codeIn('sh').get('Install')!))
  const lines = local(codeIn('sh').get('Swap on the same host')!).trim().split('\n')
  const status = lines.indexOf('tmem swap status')
  await shell.run(lines.slice(0, status).join('\n'))
  // It answers before it swaps.
  let said = ''
  while (!/^swap0 +on /m.test(said)) said = await shell.run(lines[status]!)
  const [loop, ...others] = loopsOver(folder)
  expect(others).toEqual([])
  expect(readFileSync('/proc/swaps', 'utf8')).toMatch(new RegExp(`^/dev/${loop}\\s`, 'm'))
  expect(await shell.run(lines.slice(status + 1).join('\n'))).toContain('has ended')
  await shell.run('wait')
  expect(loopsOver(folder)).toEqual([])
  expect(readFileSync('/proc/self/mounts', 'utf8')).not.toContain(folder)
  expect(readdirSync(join(folder, 'lib'))).toEqual([])
})
