/** Block devices, and files that are block devices of this host, as things of a server: root's alone to set up. */
import { execFileSync } from 'node:child_process'
import { linkSync, mkdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, onTestFinished, type TestContext, test } from 'vitest'
import { requires } from '../../../../tools/requires.ts'
import { serve } from '../../src/serve/serve.ts'
import { silentTerminal, temporaryDirectory } from '../tmem.ts'

const run = (command: string, ...words: string[]): string => execFileSync(command, words, { encoding: 'utf8' }).trim()

/**
 * A mounted file system on a loop device, with a file in it: the device, the file under it, and what becomes of its
 * content.
 */
function mounted(ctx: TestContext): { device: string; image: string; point: string } {
  requires(ctx, { root: true, commands: ['losetup', 'mkfs.ext4'], paths: ['/dev/loop-control'] })
  const folder = temporaryDirectory()
  const [image, point] = [join(folder, 'image'), join(folder, 'mount')]
  writeFileSync(image, '')
  truncateSync(image, 8 * 2 ** 20)
  const device = run('losetup', '-f', '--show', image)
  onTestFinished(() => void run('losetup', '-d', device))
  run('mkfs.ext4', '-q', device)
  mkdirSync(point)
  run('mount', device, point)
  onTestFinished(() => void run('umount', point))
  writeFileSync(join(point, 'file'), 'what was there')
  return { device, image, point }
}

test('what is mounted is neither a backing file nor an image, by its device or by its file', async (ctx) => {
  const { device, image, point } = mounted(ctx)
  const own = temporaryDirectory()
  linkSync(image, `${image}-hard`)
  const common = { nbd: [`unix:${own}/nbd`], control: join(own, 'control') }
  const sized = 'name=a,size=8MiB'
  for (const [stack, snapshot, message] of [
    [`frontswap(file=${device},size=8MiB,existing=yes)`, '', /in use/],
    [`frontswap(file=${device},size=8MiB)`, '', /in use|none of ours|block device/],
    [`frontswap(file=${image},size=8MiB)`, '', /it is the file of \/dev\/loop/],
    [`frontswap(file=${image}-hard,size=8MiB)`, '', /it is the file of \/dev\/loop/],
    ['memory(limit=16MiB)', `,snapshot=${device}`, /it is a block device/],
    ['memory(limit=16MiB)', `,snapshot=${image}`, /it is the file of \/dev\/loop/],
    ['memory(limit=16MiB)', `,snapshot=${image}-hard`, /it is the file of \/dev\/loop/],
  ] as const)
    await expect(serve({ stack, device: [`${sized}${snapshot}`], ...common }, silentTerminal())).rejects.toThrow(
      message,
    )
  run('sync', '-f', point)
  run('fsck.ext4', '-n', '-f', device)
  expect(readFileSync(join(point, 'file'), 'utf8')).toBe('what was there')
})
