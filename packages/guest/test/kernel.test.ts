/** Which kernel is found, and which of its modules. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import { findKernel, initramfs } from '../src/index.ts'

function tree(...paths: readonly string[]): string {
  const root = mkdtempSync(join(tmpdir(), 'tmem-kernel-'))
  onTestFinished(() => rmSync(root, { recursive: true, force: true }))
  for (const path of paths) {
    mkdirSync(dirname(join(root, path)), { recursive: true })
    writeFileSync(join(root, path), path)
  }
  return root
}

test('the newest kernel that has modules, and the modules in the order asked for', () => {
  const root = tree(
    'boot/vmlinuz-6.1.0-9-amd64',
    'boot/vmlinuz-6.1.0-10-amd64',
    'boot/vmlinuz-6.2.0-1-amd64',
    'boot/config-6.1.0-10-amd64',
    'lib/modules/6.1.0-9-amd64/kernel/drivers/virtio/virtio.ko',
    'lib/modules/6.1.0-10-amd64/kernel/drivers/virtio/virtio.ko',
    'lib/modules/6.1.0-10-amd64/kernel/drivers/block/virtio_blk.ko',
    'lib/modules/6.1.0-10-amd64/kernel/drivers/char/virtio-rng.ko',
    'lib/modules/6.1.0-10-amd64/kernel/drivers/net/virtio_net.ko',
    'lib/modules/6.1.0-10-amd64/kernel/fs/virtio.ko.xz',
  )
  const folder = join(root, 'lib/modules/6.1.0-10-amd64/kernel')
  expect(findKernel(root)).toEqual({
    image: join(root, 'boot/vmlinuz-6.1.0-10-amd64'),
    release: '6.1.0-10-amd64',
    modules: [join(folder, 'drivers/virtio/virtio.ko'), join(folder, 'drivers/block/virtio_blk.ko')],
  })
  expect(findKernel(root, ['virtio_rng', 'virtio', 'built_in'])?.modules).toEqual([
    join(folder, 'drivers/char/virtio-rng.ko'),
    join(folder, 'drivers/virtio/virtio.ko'),
  ])
})

test('no kernel, no folder: undefined', () => {
  expect(findKernel(tree('boot/config-6.1.0-10-amd64'))).toBeUndefined()
  expect(findKernel(join(tree(), 'nothing'))).toBeUndefined()
})

test('modules keep their order in the root directory, and its own files cannot be replaced', () => {
  const root = tree('boot/vmlinuz-1', 'lib/modules/1/kernel/b/one.ko', 'lib/modules/1/kernel/a/two.ko', 'busybox')
  const kernel = findKernel(root, ['one', 'two'])!
  const options = { kernel, busybox: join(root, 'busybox'), script: 'true' }
  const archive = Buffer.from(initramfs({ ...options, files: [{ path: 'bin/hog', data: 'hog' }] })).toString('latin1')
  for (const name of ['lib/modules/00-one.ko', 'lib/modules/01-two.ko', 'bin/hog', 'bin/busybox', 'script'])
    expect(archive).toContain(`${name}\0`)
  expect(() => initramfs({ ...options, files: [{ path: 'init', data: '' }] })).toThrow('init is there twice')
})
