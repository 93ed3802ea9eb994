/**
 * Real file servers, each a process of its own for as long as a test takes; and a wire that counts what comes over it.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { type AddressInfo, connect, createServer, type Socket } from 'node:net'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import type { Needs } from '../../../../tools/requires.ts'

const unpacked = (name: string): string => fileURLToPath(new URL(`../../../../.cache/debian/${name}`, import.meta.url))

/** Where a server works: `root` is served, `state` is its own. */
interface Place {
  readonly root: string
  readonly state: string
  readonly port: number
}

/** A file server of somebody else. */
export interface FileServer {
  readonly name: string
  readonly needs: Needs
  /** True: it lets its answers be used for an hour. */
  readonly fresh?: true
  /** Whether its files have strong ETags, and parts those of their files. */
  readonly parts: 'parts' | 'none' | 'wrong'
  readonly command: (place: Place) => { words: readonly string[]; env?: Readonly<Record<string, string>> }
}

function nginx(setting: string, name: string): FileServer {
  return {
    name: `nginx, ${name}`,
    needs: { packages: ['nginx'] },
    parts: 'parts',
    ...(setting.includes('expires') ? { fresh: true } : {}),
    command: ({ root, state, port }) => {
      const temporary = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(
        (what) => `${what}_temp_path ${state};`,
      )
      writeFileSync(
        join(state, 'nginx.conf'),
        `daemon off; master_process off; pid ${state}/pid; error_log stderr; events {}
        http { access_log off; types { text/html html; text/plain txt; } ${temporary.join(' ')} ${setting}
          server { listen 127.0.0.1:${port}; root ${root}; } }`,
      )
      return { words: [join(unpacked('nginx'), 'usr/sbin/nginx'), '-c', join(state, 'nginx.conf'), '-e', 'stderr'] }
    },
  }
}

function node([name, parts]: readonly [string, FileServer['parts']]): FileServer {
  const program = fileURLToPath(new URL('node.mjs', import.meta.url))
  return {
    name,
    needs: {},
    parts,
    command: ({ root, port }) => ({ words: [process.execPath, program, name, root, String(port)] }),
  }
}

/** Those that serve most of the files that there are. */
export const fileServers: readonly FileServer[] = Object.freeze([
  nginx('', 'as it comes'),
  nginx('gzip on; gzip_min_length 100; gzip_vary on; max_ranges 0;', 'compressed, without ranges'),
  nginx('expires 1h; add_header Cache-Control "public, immutable";', 'for an hour'),
  {
    name: 'apache',
    needs: { packages: ['apache2-bin', 'libapr1', 'libaprutil1'] },
    parts: 'parts',
    command: ({ root, state, port }) => {
      const modules = join(unpacked('apache2-bin'), 'usr/lib/apache2/modules')
      const names = ['mpm_event', 'authz_core', 'filter', 'deflate', 'mime']
      // In a folder that has the name of the architecture.
      const libraries = ['libapr1', 'libaprutil1'].flatMap((name) => {
        const folder = join(unpacked(name), 'usr/lib')
        return readdirSync(folder).map((architecture) => join(folder, architecture))
      })
      writeFileSync(join(state, 'types'), 'text/html html\ntext/plain txt\n')
      writeFileSync(
        join(state, 'apache.conf'),
        `${names.map((name) => `LoadModule ${name}_module "${modules}/mod_${name}.so"`).join('\n')}
        ServerName localhost\nListen 127.0.0.1:${port}\nDefaultRuntimeDir "${state}"\nPidFile "${state}/pid"\nErrorLog "${state}/errors"
        User www-data\nGroup www-data\nTypesConfig "${state}/types"\nDocumentRoot "${root}"
        AddOutputFilterByType DEFLATE text/html
        <Directory "${root}">\nRequire all granted\n</Directory>\n`,
      )
      const words = [join(unpacked('apache2-bin'), 'usr/sbin/apache2'), '-X', '-f', join(state, 'apache.conf')]
      return { words, env: { LD_LIBRARY_PATH: libraries.join(':') } }
    },
  },
  {
    name: 'caddy',
    needs: { packages: ['caddy'] },
    parts: 'parts',
    command: ({ root, state, port }) => {
      writeFileSync(
        join(state, 'Caddyfile'),
        `{\nadmin off\nauto_https off\n}\nhttp://127.0.0.1:${port} {\nbind 127.0.0.1\nroot * "${root}"\nencode gzip\nfile_server\n}\n`,
      )
      const words = [join(unpacked('caddy'), 'usr/bin/caddy'), 'run', '--adapter', 'caddyfile', '--config']
      return { words: [...words, join(state, 'Caddyfile')], env: { HOME: state } }
    },
  },
  {
    // Its memory of what files are like is off: for a second it would give a changed file the old ETag, also to
    // `fetch`.
    name: 'lighttpd',
    needs: { packages: ['lighttpd'] },
    parts: 'parts',
    command: ({ root, state, port }) => {
      writeFileSync(
        join(state, 'lighttpd.conf'),
        `server.document-root = "${root}"\nserver.port = ${port}\nserver.bind = "127.0.0.1"
        server.stat-cache-engine = "disable"
        mimetype.assign = (".html" => "text/html", ".txt" => "text/plain", "" => "application/octet-stream")\n`,
      )
      const folder = unpacked('lighttpd')
      const words = [join(folder, 'usr/sbin/lighttpd'), '-D', '-m', join(folder, 'usr/lib/lighttpd'), '-f']
      return { words: [...words, join(state, 'lighttpd.conf')] }
    },
  },
  ...(
    [
      ['express', 'none'],
      ['fastify', 'none'],
      ['koa', 'none'],
      ['hono', 'wrong'],
      ['sirv', 'none'],
      ['serve-handler', 'parts'],
    ] as const
  ).map(node),
  {
    name: 'python',
    needs: { commands: ['python3'] },
    parts: 'none',
    command: ({ root, port }) => ({
      words: ['python3', '-m', 'http.server', '--bind', '127.0.0.1', '--directory', root, String(port)],
    }),
  },
])

/** A server that runs. */
export interface Running {
  /** Where it is reached through the wire. */
  readonly origin: string
  /** Bytes that it has sent, headers included, and connections to it. */
  readonly wire: { bytes: number; connections: number }
  stop(): Promise<void>
}

/**
 * Starts a server of the files in `root`; `state` is a folder for its own. Rejects with what it printed when it does
 * not answer.
 */
export async function start(server: FileServer, root: string, state: string): Promise<Running> {
  mkdirSync(state, { recursive: true })
  const port = await freePort()
  const { words, env = {} } = server.command({ root, state, port })
  const child = spawn(words[0]!, words.slice(1), { env: { ...process.env, ...env }, stdio: ['ignore', 'pipe', 'pipe'] })
  let printed = ''
  for (const stream of [child.stdout, child.stderr]) stream.on('data', (text) => (printed += String(text)))
  const ended = new Promise<string>((resolve) => {
    child.once('error', (error) => resolve(error.message))
    child.once('exit', (code, signal) => resolve(`it ended with ${code ?? signal}`))
  })
  const why = await Promise.race([ended, answers(port)])
  if (why !== undefined) {
    child.kill('SIGKILL')
    throw new Error(`${server.name} does not answer: ${why}\n${printed}`)
  }
  const wire = { bytes: 0, connections: 0 }
  const sockets = new Set<Socket>()
  const between = createServer((client) => {
    wire.connections++
    const far = connect(port, '127.0.0.1')
    far.on('data', (bytes) => (wire.bytes += bytes.length))
    for (const [one, other] of [
      [client, far],
      [far, client],
    ] as const) {
      sockets.add(one)
      one.pipe(other)
      // Whoever breaks off, breaks off both.
      one.on('error', () => other.destroy())
      one.on('close', () => {
        sockets.delete(one)
        // Not before what has come from this side is sent.
        other.destroySoon()
      })
    }
  })
  await new Promise<void>((resolve) => between.listen(0, '127.0.0.1', resolve))
  return {
    origin: `http://127.0.0.1:${(between.address() as AddressInfo).port}`,
    wire,
    async stop() {
      for (const socket of sockets) socket.destroy()
      between.close()
      await end(child, ended)
    },
  }
}

async function end(child: ChildProcess, ended: Promise<unknown>): Promise<void> {
  child.kill('SIGKILL')
  await ended
}

async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  const { port } = server.address() as AddressInfo
  await new Promise((resolve) => server.close(resolve))
  return port
}

/** Undefined once somebody listens at the port; a reason when nobody does. */
async function answers(port: number): Promise<string | undefined> {
  for (let turn = 0; turn < 400; turn++) {
    const there = await new Promise<boolean>((resolve) => {
      const socket = connect(port, '127.0.0.1', () => resolve(true))
      socket.on('error', () => resolve(false)).on('connect', () => socket.destroy())
    })
    if (there) return undefined
    await setTimeout(25)
  }
  return 'nobody listens after 10 s'
}
