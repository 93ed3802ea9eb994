/**
 * The parts of a guest: Debian's last kernel with the frontswap hooks (5.10, bullseye), its headers, busybox, and our
 * module, built for that kernel. Packages are downloaded with apt and unpacked into a directory of this package;
 * nothing is installed, and the system's apt stays unchanged.
 *
 * Debian builds its kernels without cleancache. A kernel with cleancache is compiled from Debian's source of the same
 * version, with `cleancache.config` and little else; flex, bison and m4, which the build needs, are unpacked beside it.
 *
 * Invariant: each part appears whole or not at all; several processes may prepare the same directory. The next process
 * removes unfinished work of a killed one.
 *
 * The mirror is the one that the system's own apt uses for Debian.
 */
import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  accessSync,
  constants,
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { availableParallelism } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { checkOptions } from '@tmem/core'
import { findKernel, type Kernel, scratchFolder } from '@tmem/guest'

/** What a guest boots. */
export interface GuestParts {
  /** With the modules of its drives, and without ours. */
  readonly kernel: Kernel
  /** The kernel has cleancache. */
  readonly hasCleancache: boolean
  /** Paths of busybox, and of our module. */
  readonly busybox: string
  readonly module: string
  /** Folder with tcc and its C library, if it was asked for. */
  readonly compiler?: string
}

/** Where they come from. */
export interface PartsOptions {
  /** Folder that they are kept in; it is made. Some 350 MiB; 1.5 GiB while a kernel with cleancache is compiled. */
  readonly cache: string
  /** A kernel with cleancache, which is compiled the first time: minutes (default: Debian's, without). */
  readonly cleancache?: boolean
  /** What the workload `compile` compiles with, too: 3 MiB (default: not). */
  readonly compiler?: boolean
  /** Told what is being done, in a few words. */
  readonly onStep?: (what: string) => void
  readonly signal?: AbortSignal
}

/** A program that is missing, or that failed: one line that says what to do. */
export class PartsError extends Error {}

const suite = 'bullseye'
const defaultMirror = 'http://deb.debian.org/debian'
/** Programs, and the packages that have them. */
const programs: Readonly<Record<string, string>> = Object.freeze({
  'qemu-system-x86_64': 'qemu-system-x86',
  setpriv: 'util-linux',
  'apt-get': 'apt',
  'dpkg-deb': 'dpkg',
  make: 'make',
  gcc: 'gcc libc6-dev',
})

/** The needs of a guest that this machine lacks, as one line; `undefined` if it lacks nothing. */
export function lacksForGuests(): string | undefined {
  if (process.platform !== 'linux' || process.arch !== 'x64')
    return `a guest runs on Linux on x86-64, and this is ${process.platform} on ${process.arch}`
  const missing = Object.keys(programs).filter((name) => !isProgram(name))
  if (missing.length === 0) return undefined
  const packages = missing.map((name) => programs[name]).join(' ')
  return `${missing.join(', ')} missing; install: apt-get install --no-install-recommends ${packages}`
}

function isProgram(name: string): boolean {
  return (process.env['PATH'] ?? '').split(delimiter).some((folder) => {
    try {
      accessSync(join(folder, name), constants.X_OK)
      return true
    } catch {
      return false
    }
  })
}

/**
 * Prepares what is not there yet: downloads about 45 MiB, unpacks, compiles; a minute the first time. With `cleancache`
 * 120 MiB more, and some minutes. Rejects with `PartsError` when that fails, with the signal's reason when it aborts.
 */
export async function prepareParts(options: PartsOptions): Promise<GuestParts> {
  checkOptions('prepareParts', options, {
    cache: 'text',
    cleancache: 'flag?',
    compiler: 'flag?',
    onStep: 'function?',
    signal: 'object?',
  })
  const lacks = lacksForGuests()
  if (lacks !== undefined) throw new PartsError(lacks)
  return new Preparation(options).run()
}

interface RunOptions {
  readonly cwd?: string
  readonly env?: Readonly<Record<string, string>>
}

/** Of a built kernel what a module is compiled with. */
const keptForModules = ['Makefile', '.config', 'include', 'scripts', 'arch/x86/include']

class Preparation {
  readonly #folder: string
  readonly #cleancache: boolean
  readonly #compiler: boolean
  readonly #onStep: (what: string) => void
  readonly #signal: AbortSignal | undefined

  constructor({ cache, cleancache = false, compiler = false, onStep = () => undefined, signal }: PartsOptions) {
    mkdirSync(cache, { recursive: true })
    this.#folder = realpathSync(cache)
    this.#cleancache = cleancache
    this.#compiler = compiler
    this.#onStep = onStep
    this.#signal = signal
    // The kernel's own makefiles refuse such paths.
    if (/[\s:]/.test(this.#folder))
      throw new PartsError(`${this.#folder} has a space or colon in it, which building a module does not allow`)
  }

  async run(): Promise<GuestParts> {
    const root = join(this.#folder, 'debian')
    await this.#made(root, (target) => this.#unpack(target))
    const busybox = join(root, 'bin/busybox')
    const booted = this.#cleancache ? await this.#withCleancache(busybox) : await this.#withoutCleancache(root)
    const parts = { ...booted, busybox, hasCleancache: this.#cleancache }
    if (!this.#compiler) return parts
    const compiler = join(this.#folder, 'compiler')
    await this.#made(compiler, async (target) =>
      this.#packages(await this.#apt(dirname(target)), ['tcc', 'libc6'], target),
    )
    return { ...parts, compiler }
  }

  async #withoutCleancache(root: string): Promise<Pick<GuestParts, 'kernel' | 'module'>> {
    const kernel = findKernel(root)
    if (kernel === undefined) throw new PartsError(`there is no kernel in ${root}: remove that folder, and try again`)
    const module = await this.#module(kernel.release, async (folder) => {
      // Its makefile names the folders where it would be installed.
      const headers = join(root, 'usr/src', `linux-headers-${kernel.release}`)
      const makefile = readFileSync(join(headers, 'Makefile'), 'utf8').replaceAll(' /usr/', ` ${root}/usr/`)
      const own = join(folder, 'Makefile.headers')
      writeFileSync(own, makefile)
      return ['-C', headers, '-f', own]
    })
    return { kernel, module }
  }

  async #withCleancache(busybox: string): Promise<Pick<GuestParts, 'kernel' | 'module'>> {
    const config = readFileSync(sourceOf('cleancache.config'))
    const digest = createHash('sha256').update(config).digest('hex').slice(0, 16)
    const tree = join(this.#folder, `cleancache-${digest}`)
    await this.#made(tree, (target) => this.#buildKernel(target, busybox))
    const release = readFileSync(join(tree, 'include/config/kernel.release'), 'utf8').trim()
    const module = await this.#module(`${release} ${digest}`, async () => ['-C', tree, 'ARCH=x86_64'])
    return { kernel: { image: join(tree, 'bzImage'), release, modules: [] }, module }
  }

  /** Makes a file or folder under another name first; whoever was as quick has made as good a one. */
  async #made(target: string, make: (scratch: string) => Promise<void>): Promise<void> {
    if (existsSync(target)) return
    const scratch = scratchFolder(this.#folder, 'making-')
    try {
      const whole = join(scratch, 'whole')
      await make(whole)
      try {
        renameSync(whole, target)
      } catch (error) {
        if (!['ENOTEMPTY', 'EEXIST'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error
      }
    } finally {
      rmSync(scratch, { recursive: true, force: true })
    }
  }

  async #unpack(target: string): Promise<void> {
    const settings = await this.#apt(dirname(target))
    const shown = async (name: string): Promise<string> =>
      this.#run('apt-cache', [...settings, 'show', '--no-all-versions', name])
    const depends = async (name: string, wanted: RegExp): Promise<string[]> => {
      const line = /^Depends: (.*)$/m.exec(await shown(name))?.[1] ?? ''
      const found = line
        .split(',')
        .map((word) => word.trim().split(' ')[0]!)
        .filter((word) => wanted.test(word))
      if (found.length === 0) throw new PartsError(`the package ${name} of ${suite} depends on nothing like ${wanted}`)
      return found
    }
    const [headers] = await depends('linux-headers-cloud-amd64', /^linux-headers-5\.10\.0-.*-cloud-amd64$/)
    const packages = [
      headers!,
      headers!.replace('headers', 'image'),
      ...(await depends(headers!, /^linux-(headers-.*-common|kbuild-)/)),
      'busybox-static',
    ]
    await this.#packages(settings, packages, target)
  }

  /** Prepares a folder for apt; what its programs are told to use it. */
  async #apt(folder: string): Promise<string[]> {
    const apt = join(folder, 'apt')
    for (const name of ['lists/partial', 'cache/archives/partial']) mkdirSync(join(apt, name), { recursive: true })
    writeFileSync(join(apt, 'status'), '')
    this.#onStep('asking which mirror the system uses')
    const mirror = await this.#mirror()
    const security = mirror.replace(/\/debian\/?$/, '/debian-security')
    const suites = [`deb ${mirror} ${suite} main`, `deb ${security} ${suite}-security main`]
    writeFileSync(join(apt, 'sources.list'), `${suites.join('\n')}\n`)
    const settings = Object.entries({
      'Dir::Etc::sourcelist': join(apt, 'sources.list'),
      'Dir::Etc::sourceparts': '-',
      'Dir::State::lists': join(apt, 'lists'),
      'Dir::State::status': join(apt, 'status'),
      'Dir::Cache': join(apt, 'cache'),
      'APT::Architecture': 'amd64',
      // The suite is old: nobody renews its lists any more.
      'Acquire::Check-Valid-Until': 'false',
      'Acquire::Languages': 'none',
      // Lists that cannot be read are its error, not those of the first package that is in none.
      'APT::Update::Error-Mode': 'any',
      // Else root's downloads are done by a user who may not write here.
      'APT::Sandbox::User': process.getuid?.() === 0 ? 'root' : '',
    }).flatMap(([name, value]) => ['-o', `${name}=${value}`])
    this.#onStep(`reading the lists of ${suite} at ${mirror}`)
    await this.#run('apt-get', [...settings, 'update', '-qq'])
    return settings
  }

  /** Downloads packages, and unpacks them into a new folder. */
  async #packages(settings: readonly string[], packages: readonly string[], target: string): Promise<void> {
    const archives = `${target}.archives`
    mkdirSync(archives)
    this.#onStep(`downloading ${packages.join(', ')}`)
    await this.#run('apt-get', [...settings, 'download', '-qq', ...packages], { cwd: archives })
    mkdirSync(target)
    for (const file of readdirSync(archives)) {
      this.#onStep(`unpacking ${file}`)
      await this.#run('dpkg-deb', ['-x', join(archives, file), target])
    }
    rmSync(archives, { recursive: true })
  }

  /** Where the system's apt finds Debian. */
  async #mirror(): Promise<string> {
    const lines = await this.#run('apt-get', ['indextargets', '--format', '$(ORIGIN) $(SITE)', 'Created-By: Packages'])
    const sites = lines.split('\n').flatMap((line) => /^Debian (\S+\/debian)\/?$/.exec(line)?.[1] ?? [])
    return sites[0] ?? defaultMirror
  }

  /** Compiles a kernel with cleancache; of its tree what modules are compiled with is kept. */
  async #buildKernel(target: string, busybox: string): Promise<void> {
    const scratch = dirname(target)
    const unpacked = join(scratch, 'packages')
    const packages = ['linux-source-5.10', 'flex', 'bison', 'm4', 'libsigsegv2']
    await this.#packages(await this.#apt(scratch), packages, unpacked)
    const source = join(scratch, 'source')
    mkdirSync(source)
    this.#onStep('unpacking the source of Linux 5.10')
    const archive = join(unpacked, 'usr/src/linux-source-5.10.tar.xz')
    await this.#run(busybox, ['tar', '-xJf', archive, '-C', source])
    const tree = join(source, 'linux-source-5.10')
    // What the kernel asks for itself only with KVM, and our module needs.
    const options = join(tree, 'mm/Kconfig')
    writeFileSync(
      options,
      readFileSync(options, 'utf8').replace('config MMU_NOTIFIER\n\tbool\n', 'config MMU_NOTIFIER\n\tdef_bool y\n'),
    )
    const bin = join(unpacked, 'usr/bin')
    symlinkSync(busybox, join(bin, 'bc'))
    const env = {
      PATH: `${bin}${delimiter}${process.env['PATH'] ?? ''}`,
      LD_LIBRARY_PATH: join(unpacked, 'usr/lib/x86_64-linux-gnu'),
      BISON_PKGDATADIR: join(unpacked, 'usr/share/bison'),
      M4: join(bin, 'm4'),
    }
    const make = (...words: readonly string[]): Promise<string> =>
      this.#run('make', ['-s', '-C', tree, 'ARCH=x86_64', 'CC=gcc', 'SKIP_STACK_VALIDATION=1', ...words], { env })
    this.#onStep('compiling Linux 5.10 with cleancache: some minutes')
    const config = sourceOf('cleancache.config')
    await make(`KCONFIG_ALLCONFIG=${config}`, 'allnoconfig')
    const taken = readFileSync(join(tree, '.config'), 'utf8').split('\n')
    const missing = readFileSync(config, 'utf8')
      .split('\n')
      .filter((line) => line.startsWith('CONFIG_') && !taken.includes(line))
    if (missing.length > 0) throw new PartsError(`the kernel's configuration does not take ${missing.join(', ')}`)
    await make(`-j${availableParallelism()}`, 'bzImage', 'modules_prepare')
    for (const name of readdirSync(join(tree, 'arch/x86')))
      if (name.startsWith('Makefile')) keep(join('arch/x86', name))
    for (const name of keptForModules) keep(name)
    copyFileSync(join(tree, 'arch/x86/boot/bzImage'), join(target, 'bzImage'))
    // What modules may use: without modules of its own the kernel's build leaves it under this name.
    copyFileSync(join(tree, 'vmlinux.symvers'), join(target, 'Module.symvers'))

    function keep(name: string): void {
      mkdirSync(dirname(join(target, name)), { recursive: true })
      renameSync(join(tree, name), join(target, name))
    }
  }

  /** The module for a kernel; `words` tells make where that is. */
  async #module(release: string, words: (folder: string) => Promise<string[]>): Promise<string> {
    const sources = ['tmem_guest.c', 'Kbuild'].map((name) => readFileSync(sourceOf(name)))
    const digest = createHash('sha256').update(Buffer.concat(sources)).update(release).digest('hex')
    const module = join(this.#folder, `tmem_guest-${digest.slice(0, 16)}.ko`)
    await this.#made(module, async (target) => {
      this.#onStep(`compiling the module for ${release}`)
      const folder = join(dirname(target), 'module')
      mkdirSync(folder)
      for (const name of ['tmem_guest.c', 'Kbuild']) copyFileSync(sourceOf(name), join(folder, name))
      const where = await words(folder)
      await this.#run('make', [...where, `M=${folder}`, 'CC=gcc', 'SKIP_STACK_VALIDATION=1', 'modules'])
      copyFileSync(join(folder, 'tmem_guest.ko'), target)
    })
    return module
  }

  /** Runs a program and answers what it printed. Rejects with `PartsError` that has its own last words. */
  #run(program: string, words: readonly string[], { cwd, env = {} }: RunOptions = {}): Promise<string> {
    this.#signal?.throwIfAborted()
    return new Promise((resolve, reject) => {
      const child = spawn(program, words, {
        stdio: ['ignore', 'pipe', 'pipe'],
        env: { ...process.env, LC_ALL: 'C', ...env },
        ...(cwd === undefined ? {} : { cwd }),
        ...(this.#signal === undefined ? {} : { signal: this.#signal }),
      })
      let printed = ''
      let complaint = ''
      child.stdout.setEncoding('utf8').on('data', (text: string) => {
        printed += text
      })
      child.stderr.setEncoding('utf8').on('data', (text: string) => {
        complaint += text
      })
      child.once('error', (error) => {
        reject(
          this.#signal?.aborted === true
            ? (this.#signal.reason as Error)
            : new PartsError(`${program}: ${error.message}`),
        )
      })
      child.once('close', (status) => {
        if (status === 0) resolve(printed)
        else reject(new PartsError(`${program} ended with ${status ?? 'a signal'}: ${lastOf(complaint || printed)}`))
      })
    })
  }
}

const lastOf = (text: string): string => text.trim().split('\n').slice(-4).join(' / ')
const sourceOf = (name: string): string => fileURLToPath(new URL(`../src/${name}`, import.meta.url))
