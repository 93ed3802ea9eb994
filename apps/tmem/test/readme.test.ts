import { execFile } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { expect, onTestFinished, test } from 'vitest'
import { parse } from 'yaml'
import { temporaryDirectory, tmem } from './tmem.ts'

const root = fileURLToPath(new URL('../../../', import.meta.url))
const readme = readFileSync(join(root, 'README.md'), 'utf8')
const ownReadme = readFileSync(join(root, 'apps/tmem/README.md'), 'utf8')

/** The code blocks of that language. */
const blocks = (markdown: string, language: string): string[] =>
  [...markdown.matchAll(/^```(\w*)\n(.*?)^```$/gms)].filter(([, name]) => name === language).map(([, , code]) => code!)

test('the stack in ten lines has ten lines and works', async () => {
  const [code] = blocks(readme, 'js')
  const lines = code!.split('\n').filter((line) => line.trim() !== '')
  expect(lines).toHaveLength(10)
  const directory = temporaryDirectory()
  const local = code!.replace('/tmp/swap.img', join(directory, 'swap.img'))
  expect(local).not.toBe(code)
  // Below the program's folder, where the packages are found.
  const folder = join(root, 'apps/tmem/.reports')
  mkdirSync(folder, { recursive: true })
  const file = join(folder, `readme-${process.pid}.mjs`)
  onTestFinished(() => rmSync(file, { force: true }))
  writeFileSync(file, local)
  const { stdout } = await promisify(execFile)(process.execPath, [file])
  expect(stdout).toBe('true\ntrue\n')
  expect(readdirSync(directory)).toEqual([])
})

test('the stack that is shown as text can stand', async () => {
  const line = blocks(readme, 'sh').find((code) => code.includes('tmem -- stack'))
  const [, text] = /^npm run -s tmem -- stack '(.*)'$/m.exec(line!)!
  const { code, stdout, stderr } = await tmem(['stack', text!])
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
  expect(stdout).toContain('zcache > frontswap can stand')
})

test('the stack in YAML is the one in text', async () => {
  const [text] = blocks(ownReadme, '')
  const yaml = blocks(ownReadme, 'yaml').find((block) => Array.isArray(parse(block)))
  expect(parse(yaml!)).toHaveLength(2)
  const file = join(temporaryDirectory(), 'stack.yaml')
  writeFileSync(file, yaml!)
  const spoken = await tmem(['stack', text!.trim(), '--json'])
  expect(spoken.code).toBe(0)
  expect(await tmem(['stack', '--file', file, '--json'])).toEqual(spoken)
})

test('the file for tmem up that is shown is right', async () => {
  const folder = temporaryDirectory()
  const text = blocks(ownReadme, 'yaml').find((block) => block.includes('devices:'))
  const file = join(folder, 'tmem.yaml')
  writeFileSync(file, text!)
  const { code, stdout, stderr } = await tmem(['config', 'check', '-f', file])
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
  expect(stdout).toContain('is valid: swap0 of 2GiB, archive of 1GiB')
})

test('the map names every package and nothing else, and links lead somewhere', () => {
  const map = [...readme.matchAll(/^\| \[(\S+)\]\((\S+)\) \|/gm)].map(([, name, folder]) => ({ name, folder }))
  const folders = ['packages', 'apps'].flatMap((group) =>
    readdirSync(join(root, group))
      .map((name) => `${group}/${name}`)
      .filter((folder) => existsSync(join(root, folder, 'package.json'))),
  )
  expect(map.map(({ folder }) => folder).sort()).toEqual(folders.sort())
  for (const { name, folder } of map)
    expect(JSON.parse(readFileSync(join(root, folder!, 'package.json'), 'utf8')).name).toBe(name)
  const links = [...readme.matchAll(/\]\((?!http)([^)#]+)\)/g)].map(([, path]) => path!)
  expect(links.filter((path) => !existsSync(join(root, path)))).toEqual([])
})
