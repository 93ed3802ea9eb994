/** One thing in two roles: each pair of roles, by each way to name a thing, within one server and between two. */
import { execFileSync } from 'node:child_process'
import {
  linkSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { basename, dirname, join, relative } from 'node:path'
import { describe, expect, test } from 'vitest'
import { Client } from '../../../packages/nbd/test/client.ts'
import { type ServeOptions, serve } from '../src/serve/serve.ts'
import { servingIn } from './serving.ts'
import { silentTerminal, temporaryDirectory } from './tmem.ts'

/** How a thing may be called; `exists`: only one that is there. */
const ways: Readonly<Record<string, { readonly exists?: true; readonly name: (path: string) => string }>> = {
  'the same path': { name: (path) => path },
  'a relative path': { name: (path) => relative(process.cwd(), path) },
  'a path with dots': { name: (path) => `${dirname(path)}/./../${basename(dirname(path))}//${basename(path)}` },
  'a symbolic link': {
    name: (path) => {
      symlinkSync(path, `${path}-soft.record`)
      return `${path}-soft.record`
    },
  },
  'a link to a link': {
    name: (path) => {
      symlinkSync(basename(path), `${path}-first`)
      symlinkSync(`${path}-first`, `${path}-second.record`)
      return `${path}-second.record`
    },
  },
  'a hard link': {
    exists: true,
    name: (path) => {
      linkSync(path, `${path}-hard.record`)
      return `${path}-hard.record`
    },
  },
  'a folder that is a link': {
    name: (path) => {
      symlinkSync(dirname(path), `${dirname(path)}/folder`)
      return join(dirname(path), 'folder', basename(path))
    },
  },
}

/** What a server is told to use in each role. */
interface Told {
  snapshot?: string
  snapshot2?: string
  file?: string
  file2?: string
  nbd?: string
  nbd2?: string
  control?: string
}

/** The roles; how a path comes to be used in one, `undefined` where it cannot be. */
const roles: Readonly<Record<string, (path: string, second: boolean) => Told | undefined>> = {
  image: (path, second) => (second ? { snapshot2: path } : { snapshot: path }),
  'backing file': (path, second) => (second ? { file2: path } : { file: path }),
  'NBD socket': (path, second) => (second ? { nbd2: path } : { nbd: path }),
  'control socket': (path) => ({ control: path }),
  record: (path) => (path.endsWith('.record') ? { control: path.slice(0, -'.record'.length) } : undefined),
}

/** Options of a server with its own things in a folder, but for those that are told. */
function optionsOf(folder: string, told: Told): ServeOptions {
  const { snapshot, snapshot2, file = join(folder, 'own.img'), file2, nbd = join(folder, 'own.nbd'), nbd2 } = told
  const device = [snapshot, snapshot2].map((path, n) =>
    path === undefined ? [] : [`name=d${n},size=1MiB,snapshot=${path}`],
  )
  const names = device.flat()
  return {
    // Two devices cannot have one backing file, so they have none.
    stack:
      names.length > 1
        ? 'memory(limit=4MiB)'
        : [file, ...(file2 === undefined ? [] : [file2])]
            .map((path) => `frontswap(file="${path}",size=2MiB)`)
            .join(' > '),
    device: names.length > 0 ? names : ['name=d0,size=1MiB'],
    nbd: [nbd, ...(nbd2 === undefined ? [] : [nbd2])].map((path) => `unix:${path}`),
    control: told.control ?? join(folder, 'own.sock'),
  }
}

/** What lies in a folder: name, kind, inode, and the content of files. */
const listing = (folder: string): string[] =>
  readdirSync(folder)
    .sort()
    .map((name) => {
      const stat = lstatSync(join(folder, name))
      return `${name} ${stat.mode} ${stat.ino} ${stat.isFile() ? readFileSync(join(folder, name), 'latin1') : ''}`
    })

const refused = async (options: ServeOptions): Promise<string> =>
  serve(options, silentTerminal()).then(
    () => 'it served',
    (error: Error) => error.message,
  )

describe('within one server', () => {
  const names = Object.keys(roles)
  const cells = names.flatMap((one, n) =>
    names
      .slice(n)
      // A server has one control socket, and the record beside that.
      .filter((other) => !['control socket', 'record'].includes(one) || !['control socket', 'record'].includes(other))
      .flatMap((other) =>
        Object.entries(ways).flatMap(([way, { exists = false }]) =>
          [true, false].filter((there) => there || !exists).map((there) => ({ one, other, way, there })),
        ),
      ),
  )
  test.each(cells)('$one and $other, by $way (there: $there)', async ({ one, other, way, there }) => {
    const folder = temporaryDirectory()
    const things = join(folder, 'things')
    mkdirSync(things)
    const thing = join(things, 'thing.record')
    // Content that an image can have. A socket's place is empty, or it is said by itself.
    if (there) writeFileSync(thing, Buffer.alloc(2 ** 20, 'content '))
    const told = { ...roles[one]!(thing, false), ...roles[other]!(ways[way]!.name(thing), true) }
    const before = listing(things)
    expect(Object.keys(told)).toHaveLength(2)
    const message = await refused(optionsOf(folder, told))
    expect(message).toMatch(
      there && (one.endsWith('socket') || other.endsWith('socket'))
        ? /would be both|exists and is not a socket/
        : /would be both/,
    )
    expect([listing(things), readdirSync(folder)]).toEqual([before, ['things']])
  })
})

test('what is no file is no backing file, no image and no record', async () => {
  const folder = temporaryDirectory()
  const things = join(folder, 'things')
  mkdirSync(things)
  execFileSync('mkfifo', [join(things, 'pipe.record')])
  mkdirSync(join(things, 'folder.record'))
  symlinkSync('/dev/null', join(things, 'null.record'))
  const before = listing(things)
  for (const thing of readdirSync(things))
    for (const use of Object.values(roles)) {
      const told = use(join(things, thing), false)!
      expect(await refused(optionsOf(folder, told))).toMatch(
        /it is a (FIFO|directory|character device|symbolic link)|not a socket|EADDRINUSE/,
      )
      expect([listing(things), readdirSync(folder)]).toEqual([before, ['things']])
    }
})

test('nothing lies in the directory that is to be the mount', async () => {
  const folder = temporaryDirectory()
  const mount = join(folder, 'mount')
  mkdirSync(mount)
  symlinkSync(mount, join(folder, 'link'))
  for (const [n, use] of Object.values(roles).entries())
    for (const path of [join(mount, 'thing.record'), join(folder, 'link', 'thing.record')])
      expect(await refused({ ...optionsOf(folder, use(path, false)!), fuse: mount }), `${n}`).toMatch(
        /would lie below the mount/,
      )
  expect(readdirSync(mount)).toEqual([])
})

test('between two servers: the second one is refused, whatever it is told, and the first one is as it was', async () => {
  const server = await servingIn(
    temporaryDirectory(),
    'memory(limit=1MiB) > frontswap(file="FOLDER/a.img",size=2MiB)',
    '--device',
    'name=a,size=1MiB,snapshot=FOLDER/a.raw',
  )
  const { folder } = server
  const client = await Client.ready({ path: join(folder, 'nbd.sock') }, { name: 'a' })
  const content = Buffer.alloc(2 ** 20, 'content ')
  expect((await client.write(0, content)).error).toBe(0)
  const things = {
    image: 'a.raw',
    'backing file': 'a.img',
    'NBD socket': 'nbd.sock',
    'control socket': 'control.sock',
    record: 'control.sock.record',
  }
  const before = listing(folder)
  let cells = 0
  for (const [what, thing] of Object.entries(things))
    for (const [way, { name }] of Object.entries(ways))
      for (const [role, use] of Object.entries(roles)) {
        const links = new Set(readdirSync(folder))
        const path = name(join(folder, thing))
        const made = readdirSync(folder).filter((each) => !links.has(each))
        // Where no record can have that name, the control socket has it.
        const told = use(path, false) ?? { control: path }
        const own = temporaryDirectory()
        const message = await refused(optionsOf(own, told))
        expect(`${what} as ${role} by ${way}: ${message}`).toMatch(
          /uses it|serves on|none of ours|not a socket|it is a (socket|symbolic link)|EADDRINUSE|not a record of a server/,
        )
        expect([what, role, way, readdirSync(own)]).toEqual([what, role, way, []])
        cells++
        for (const each of made) unlinkSync(join(folder, each))
        expect(listing(folder)).toEqual(before)
      }
  expect(cells).toBe(5 * 7 * 5)
  expect((await client.read(0, 2 ** 20)).data.equals(content)).toBe(true)
  expect((await server.stop()).code).toBe(0)
  expect(readFileSync(join(folder, 'a.raw')).equals(content)).toBe(true)
}, 120_000)
