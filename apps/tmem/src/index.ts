/**
 * The program `tmem`: reads the command line, runs one command, and ends with its exit code.
 *
 * The code of a command is loaded only when the command runs, so that help and usage errors appear at once.
 */
import { parseBytes } from '@tmem/core'
import { Argument, Command, InvalidArgumentError, Option } from 'commander'
import { runSuite, suiteOf, suites } from './bench/suites.ts'
import { BadInput, endingOf, exitCodes } from './ending.ts'
import { defaultControl } from './serve/control.ts'
import { processTerminal, type Terminal } from './terminal.ts'
import { programVersion } from './version.ts'
import { defaultXenControl } from './xen/socket.ts'

/** SIGHUP arrives when the terminal closes. Without a handler it would kill a server, and its pages would be lost. */
const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const

/** Standard error is closed: the command goes on without messages. */
const ignoreDeaf = (): void => {}

/**
 * Runs `tmem WORDS…` in this process and resolves to its exit code: 0 done, 1 failed or wrong data, 2 bad usage or bad
 * input, 3 look first, 130 interrupted. Handles SIGINT, SIGTERM and SIGHUP meanwhile; a second one ends the process.
 */
export async function run(words: readonly string[]): Promise<number> {
  const interruption = new AbortController()
  let handler: (() => void) | undefined
  const interrupt = (): void => {
    if (handler !== undefined) {
      handler()
      return
    }
    // Exit handlers still run, and remove what the command made.
    if (interruption.signal.aborted) process.exit(130)
    interruption.abort()
  }
  const deaf = (error: NodeJS.ErrnoException): void => {
    // The reader of the output has gone (`tmem … | head`).
    if (error.code === 'EPIPE') interruption.abort()
    else throw error
  }
  for (const name of signals) process.on(name, interrupt)
  process.stdout.on('error', deaf)
  process.stderr.on('error', ignoreDeaf)
  const terminal = processTerminal(interruption.signal, (taken) => {
    const before = handler
    handler = taken
    return () => {
      handler = before
    }
  })
  try {
    if (words.length === 0) throw new BadInput('name a command; tmem --help lists them')
    await program(terminal).parseAsync(words, { from: 'user' })
    return 0
  } catch (error) {
    const { code, message } = endingOf(error)
    if (message !== '') terminal.note(`tmem: ${message}`)
    return code
  } finally {
    for (const name of signals) process.off(name, interrupt)
    process.stdout.off('error', deaf)
  }
}

function program(terminal: Terminal): Command {
  const tmem = new Command('tmem')
    .description('transcendent memory for user space: memory that a program can use but does not own')
    .version(programVersion())
    .exitOverride()
    // `run` reports errors, each once and in one line.
    .configureOutput({ outputError: () => undefined })
    .helpCommand(false)
    .addHelpText('after', `\nExit codes:\n${exitCodes.map(([code, what]) => `${code}: ${what}`).join('\n')}`)
  const json = (): Option => new Option('--json', 'print one JSON document, and nothing else on standard output')

  const report = (what: string): Option =>
    new Option('--report <file>', `also write an HTML page, one file that needs no network: ${what}`)
  const overwrite = (): Option =>
    new Option('--overwrite', 'let --report replace an existing file that is not a report')

  const modules = (): Option =>
    new Option('--modules <file>', 'a module whose layers the stack may also name (repeat for more)').argParser(list)

  tmem
    .command('demo')
    .description(
      'swap real pages on three machines: one with all the memory, one with half of it and tmem, one with half of it and a swap file',
    )
    .option('--input <path...>', 'files and directories whose bytes fill the pages (default: Node.js and this program)')
    .option('--size <bytes>', 'bytes of pages, e.g. 64MiB (default: 256MiB, or the size of the input)', bytes)
    .option(
      '--budget <bytes>',
      'how much memory tmem gets, and the third machine loses (default: half of --size)',
      bytes,
    )
    .option('--dir <path>', 'where to make the swap files (default: the first temporary directory on a disk)')
    .addOption(new Option('--seed <number>', 'seed of the stream of reads and writes').argParser(seed).default(1))
    .addOption(report('curves over time and the table'))
    .addOption(overwrite())
    .option(
      '--remote',
      'instead run a program of 512MiB (--size) in an eighth of that memory, over two Redis servers, and kill one of them',
    )
    .addOption(json())
    .action(async ({ remote, ...options }) =>
      remote === true
        ? (await import('./demo/remote.ts')).remoteDemo(options, terminal)
        : (await import('./demo/demo.ts')).demo(options, terminal),
    )

  tmem
    .command('bench')
    .description('measure tmem and a reference in the same run')
    .addArgument(new Argument('<suite>', 'what to measure').choices([...Object.keys(suites), 'stack']))
    .option('--quick', 'do about a tenth of the work, for rougher figures')
    .option('--stack <text>', 'for bench stack: the stack whose puts, gets and flushes to measure')
    .addOption(report('every row against its reference and its goal'))
    .addOption(overwrite())
    .addOption(modules())
    .addOption(json())
    .action(async (suite, options) => runSuite(await suiteOf(suite, options), options, terminal))

  tmem
    .command('explore')
    .description('run small concurrent programs through all their interleavings, with a rule kept and with it broken')
    .argument(
      '[scenario]',
      'the scenario to show, or a file (.mjs, .js) with your own (default: a table of all scenarios)',
    )
    .option('--list', 'show the table of all scenarios')
    .option('--states <number>', 'visit at most this many states, and say if there are more (default: 200000)', states)
    .option('--litmus', "print the litmus test of a lockless rule, for herd7 and the kernel's memory model")
    .option('--mutant', "with --litmus: print the litmus test of the rule's mutant")
    .option('--trace <file>', 'instead check a trace of tmem guest run --trace against the rules of the models')
    .addOption(report('the rule, kept and broken, as sequence charts'))
    .addOption(overwrite())
    .addOption(json())
    .action(async (name, options) => (await import('./explore.ts')).explore(name, options, terminal))

  tmem
    .command('simulate')
    .description(
      'run whole stacks over a simulated disk and clock, under faults, and compare every answer with a reference',
    )
    .option('--seconds <number>', 'how long to run (default: 10)', seed)
    .option('--seed <number>', 'seed of all histories (default: random)', seed)
    .option('--history <number>', 'run only this history of the seed', seed)
    .option('--trace', 'print the operations of the history')
    .addOption(json())
    .action(async (options) => (await import('./simulate.ts')).simulate(options, terminal))

  tmem
    .command('soak')
    .description('run servers of this program under clients, knobs and kills, and compare every read with a model')
    .option('--minutes <number>', 'how long to run, e.g. 0.5', minutes, 10)
    .option('--seed <number>', 'seed of all actions of clients, knobs and kills (default: random)', seed)
    .addOption(json())
    .action(async (options) => (await import('./soak.ts')).soak(options, terminal))

  tmem
    .command('stack')
    .description('list the available layers, or check a stack')
    .argument('[text]', 'a stack, e.g. "zcache(limit=64MiB) > frontswap(file=/tmp/swap.img,size=1GiB)"')
    .option('--file <path>', 'read the stack from a YAML file')
    .addOption(modules())
    .addOption(json())
    .action(async (text, options) => (await import('./layers.ts')).stack(text, options, terminal))

  /** Adds the options that name the devices and their stacks, and the ways to serve them other than NBD. */
  const devices = (command: Command): Command =>
    command
      .requiredOption(
        '--stack <text>',
        'the stack of each device, in which {name} and {size} stand for its name and size',
      )
      .addOption(modules())
      .option(
        '--hypervisor <text>',
        'hypervisor memory that is offered each page first, and that may be reclaimed (virtswap)',
      )
      .option(
        '--memory <auto,…>',
        'auto: memory limits follow the free memory of the host; optional: floor=BYTES, ceiling=BYTES, reserve=BYTES',
      )
      .requiredOption(
        '--device <name=NAME,size=BYTES>',
        'a device; optional: memlimit=BYTES, max=BYTES, snapshot=PATH, writethrough (repeat for more)',
        list,
      )
      .option('--fuse <directory>', 'mount a file system here with devices, statistics and knobs as files')
      .option('--busy-turns <number>', 'poll this many times for the next request before sleeping', seed)
      .addOption(
        new Option('--log-level <level>', 'lowest level that is logged (default: info)').choices([
          'error',
          'warn',
          'info',
          'debug',
        ] as const),
      )

  const control = (): Option => new Option('--control <path>', 'control socket of the server').default(defaultControl)

  devices(
    tmem.command('serve').description('serve block devices over a stack, over NBD and as files, in the foreground'),
  )
    .option('--nbd <address>', 'serve over NBD: unix:PATH[,mode=660] or tcp:HOST:PORT (repeat for more)', list)
    .option(
      '--tls-certificates <directory>',
      'use TLS on TCP, with server-cert.pem, server-key.pem and ca-cert.pem from here',
    )
    .option('--tls-verify-peer', 'accept only clients whose certificate ca-cert.pem has signed')
    .option(
      '--nbd-limits <name=value,…>',
      'connections=256, per-address=64 (TCP), requests=128 (of each), bytes=64MiB, handshake=10, keepalive=60 (seconds)',
    )
    .option('--http <address>', 'serve the web console: tcp:PORT (on the loopback) or tcp:HOST:PORT')
    .option(
      '--http-token <file>',
      'file with the token that permits its bearer to set knobs in the console (default: nobody may)',
    )
    .addOption(control())
    .option('--socket-mode <mode>', 'permissions of the control socket and of unix: sockets (default: 600)')
    .option('--socket-group <group>', 'group of these sockets, by name or number, which may then use them (mode 660)')
    .option('--metrics <address>', 'serve metrics for Prometheus over HTTP: tcp:HOST:PORT, e.g. tcp:127.0.0.1:9464')
    .option('--drain', 'on SIGTERM, first end swapping to the devices of the mount')
    .option('--fresh', 'start even if an earlier server was killed and its pages are lost')
    .addOption(
      new Option('--log <format>', 'log format (default: text on a terminal, JSON elsewhere)').choices([
        'text',
        'json',
      ] as const),
    )
    .addOption(json())
    .action(async (options) => (await import('./serve/serve.ts')).serve(options, terminal))

  devices(
    tmem
      .command('run')
      .description('serve block devices while one command runs, which finds them in TMEM_NBD and TMEM_FILE'),
  )
    .argument('<command...>', 'the command and its arguments, after --')
    .action(async (command, options) => (await import('./up/run.ts')).runCommand(command, options, terminal))

  const file = (): Option => new Option('-f, --file <path>', 'the configuration file').default('tmem.yaml')
  const fileControl = (): Option =>
    new Option('--control <path>', 'control socket of the server (default: the one in the file)')

  tmem
    .command('up')
    .description(
      'serve what a configuration file says, in the foreground, and swap to the devices it marks for swapping',
    )
    .addOption(file())
    .addOption(fileControl())
    .option('--fresh', 'start even if an earlier server was killed and its pages are lost')
    .addOption(json())
    .action(async (options) => (await import('./up/up.ts')).up(options, terminal))

  tmem
    .command('down')
    .description('end what tmem up started: first swapping, then the server')
    .addOption(file())
    .addOption(fileControl())
    .option('--wait <seconds>', 'wait at most this long for the server to end', seed, 60)
    .addOption(json())
    .action(async (options) => (await import('./up/up.ts')).down(options, terminal))

  tmem
    .command('status')
    .description('show what is served and swapped to, and every difference from the configuration file')
    .addOption(file())
    .addOption(fileControl())
    .addOption(json())
    .action(async (options) => (await import('./up/up.ts')).status(options, terminal))

  tmem
    .command('config')
    .description('check a configuration file for tmem up, or print its JSON Schema')
    .addArgument(new Argument('<what>', 'what to do').choices(['check', 'schema'] as const))
    .addOption(file())
    .addOption(json())
    .action(async (what, options) => (await import('./up/up.ts')).config(what, options, terminal))

  tmem
    .command('install-unit')
    .description('write the systemd units that serve what a configuration file says')
    .addOption(file())
    .option('--name <name>', 'name of the units, and of their user if they get one of their own', 'tmem')
    .option('--root <directory>', 'directory to use as /, e.g. of an image that is being built', '/')
    .addOption(json())
    .action(async (options) => (await import('./up/unit.ts')).installUnit(options, terminal))

  tmem
    .command('stat')
    .description('show statistics of the devices of a server')
    .addOption(control())
    .option('--wait <seconds>', 'wait at most this long for a server that is starting', seed, 0)
    .option('--watch [seconds]', 'print them again at this interval (default: 1)')
    .addOption(json())
    .action(async (options) => (await import('./serve/stat.ts')).stat(options, terminal))

  tmem
    .command('explain')
    .description('show where a page of a device is: its place, codec, size, age, and last moves')
    .argument('<device>', 'name of the device')
    .argument('<offset>', 'offset of any byte of the page, e.g. 64MiB or 4096', bytes)
    .addOption(control())
    .addOption(json())
    .action(async (device, offset, options) =>
      (await import('./serve/explain.ts')).explain(device, offset, options, terminal),
    )

  tmem
    .command('top')
    .description('show what devices and places do each second, longest waits first')
    .addOption(control())
    .option('--interval <seconds>', 'time between two looks, 0.1 to 3600', interval, 1)
    .option('--once', 'print one interval and end')
    .addOption(json())
    .action(async (options) => (await import('./serve/top.ts')).top(options, terminal))

  tmem
    .command('knob')
    .description('show or set the knobs of a device: its size, limits, writeback, recompression')
    .argument('<device>', 'name of the device')
    .argument('[name]', 'name of the knob (default: show all)')
    .argument('[value...]', 'new value or action, e.g. type=idle max_pages=1000')
    .addOption(control())
    .addOption(json())
    .action(async (device, name, words, options) =>
      (await import('./serve/knob.ts')).knob(device, name, words, options, terminal),
    )

  tmem
    .command('swap')
    .description('start, end or show swapping of this host to a device of a server (over FUSE and a loop device)')
    .addArgument(new Argument('<what>', 'what to do').choices(['on', 'off', 'status']))
    .argument('[device]', 'name of the device (default: the only one)')
    .addOption(control())
    .option('--priority <number>', 'priority of the swap area, 0 to 32767', seed, 100)
    .option('--wait <seconds>', 'wait at most this long for a server that is starting', seed, 0)
    .addOption(json())
    .action(async (what, device, options) => (await import('./serve/swap.ts')).swap(what, device, options, terminal))

  tmem
    .command('doctor')
    .description('show what this host lacks for swapping to tmem, and how to mend it')
    .addOption(control())
    .addOption(json())
    .action(async (options) => (await import('./serve/doctor.ts')).doctor(options, terminal))

  tmem
    .command('guest')
    .description('run Linux guests whose kernels call the hooks of transcendent memory')
    .command('run')
    .description('boot a guest in QEMU that swaps into a stack of this process, and compare the counters of all sides')
    .addOption(
      new Option('--workload <name>', 'what the guest runs and verifies')
        .choices(['hog', 'reread', 'tar', 'compile'] as const)
        .default('hog' as const),
    )
    .option('--memory <bytes>', 'memory of the guest, 96MiB to 2GiB', bytes, 128 * 2 ** 20)
    .option('--size <bytes>', 'memory that the workload uses (default: 1.5 times --memory)', bytes)
    .option('--kernel-with-cleancache', "boot a kernel with cleancache, compiled at the first use, instead of Debian's")
    .option('--stack <text>', "the stack that takes the guest's pages (default: zcache(limit=128MiB))")
    .option('--control <path>', 'socket of a tmem xen host that serves the guest instead of this process')
    .option('--domain <number>', "with --control: the guest's domain number", domain, 1)
    .addOption(modules())
    .option('--cache <path>', "directory for kernel, headers and module (default: in the user's cache directory)")
    .option(
      '--patience <seconds>',
      'how long the guest waits for the host, or for a page that the host has taken, before its kernel stops',
      seed,
      60,
    )
    .option('--no-posted', 'let the guest wait for each flush')
    .option('--trace <file>', "new file for a trace of the kernel's calls: frontswap, and with hog also MMU notifiers")
    .addOption(json())
    .action(async (options) => (await import('./guest/run.ts')).guestRun(options, terminal))

  const xen = tmem.command('xen').description("act as a host with Xen's tmem interface, and as its toolstack")
  xen
    .command('decode')
    .description('explain a raw structure, or a saved domain')
    .argument('<words...>', 'the structure in hex, a file with the structure, raw or in hex, or a file written by save')
    .addOption(
      new Option('--as <structure>', 'kind of structure (default: stream if it begins like one, else op)').choices([
        'op',
        'sysctl',
        'handle',
        'client',
        'pool',
        'stream',
      ] as const),
    )
    .addOption(xenRelease())
    .addOption(
      new Option('--bits <width>', 'word width of the guest').choices(['32', '64'] as const).default('64' as const),
    )
    .addOption(json())
    .action(async (words, options) => (await import('./xen/decode.ts')).decode(words, options, terminal))
  const xenControl = (): Option => new Option('--control <path>', 'socket of the host').default(defaultXenControl)
  const commands = () => import('./xen/commands.ts')
  xen
    .command('host')
    .description('serve guests that connect to a socket, over a stack, in the foreground')
    .requiredOption('--stack <text>', "the stack that takes the guests' pages")
    .addOption(modules())
    .addOption(xenControl())
    .addOption(xenRelease())
    .addOption(
      new Option('--defects <mode>', "behaviour where Xen has defects: mended, or Xen's own")
        .choices(['mended', 'original'] as const)
        .default('mended' as const),
    )
    .option('--max <bytes>', 'most bytes of persistent pages for each domain', bytes)
    .addOption(json())
    .action(async (options) => (await import('./xen/host.ts')).host(options, terminal))
  xen
    .command('list')
    .description('list pools and counters of each domain')
    .argument('[domain]', 'number of a domain (default: all)')
    .option('--long', 'show all fields')
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, options) => (await commands()).list(domain, options, terminal))
  for (const [name, isFrozen] of [
    ['freeze', true],
    ['thaw', false],
  ] as const)
    xen
      .command(name)
      .description(isFrozen ? 'refuse new pages of a domain' : 'take new pages of a domain again')
      .argument('<domain>', 'number of a domain, or all')
      .addOption(xenControl())
      .addOption(json())
      .action(async (domain, options) => (await commands()).freeze(domain, isFrozen, options, terminal))
  xen
    .command('set')
    .description('set weight, cap or compression of a domain')
    .argument('<domain>', 'number of a domain, or all')
    .option('--weight <number>', 'weight of the domain', seed)
    .option('--cap <number>', 'cap of the domain (Xen 4.0 to 4.7; without effect)', seed)
    .addOption(
      new Option('--compress <yes|no>', "whether the domain's pages are compressed").choices(['yes', 'no'] as const),
    )
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, options) => (await commands()).set(domain, options, terminal))
  xen
    .command('shared-auth')
    .description('permit a domain to share pools under a UUID, or withdraw the permission')
    .argument('<domain>', 'number of a domain, or all')
    .requiredOption('--uuid <uuid>', 'UUID of the shared pools')
    .addOption(
      new Option('--permit <yes|no>', 'permit or withdraw').choices(['yes', 'no'] as const).default('yes' as const),
    )
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, options) => (await commands()).sharedAuth(domain, options, terminal))
  xen
    .command('freeable')
    .description('show how much memory a flush could free')
    .addOption(xenControl())
    .addOption(json())
    .action(async (options) => (await commands()).freeable(options, terminal))
  xen
    .command('flush')
    .description('evict ephemeral pages and free their memory')
    .argument('<bytes>', 'how much to free, e.g. 64MiB', bytes)
    .addOption(xenControl())
    .addOption(json())
    .action(async (amount, options) => (await commands()).flush(amount, options, terminal))
  xen
    .command('save')
    .description('save a domain to a file, while it stays in service')
    .argument('<domain>', 'number of a domain')
    .argument('<file>', 'new file for the stream')
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, file, options) => (await commands()).save(domain, file, options, terminal))
  xen
    .command('restore')
    .description('restore a domain from a file of save')
    .argument('<domain>', 'number for the domain')
    .argument('<file>', 'file that save wrote')
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, file, options) => (await commands()).restore(domain, file, options, terminal))
  xen
    .command('attach')
    .description('serve a virtual machine whose kernel has the module of @tmem/kernel-guest')
    .argument('<domain>', 'number for the domain, or the number of the restored domain that belongs to the guest')
    .requiredOption('--memory <path>', "file that is the guest's memory")
    .requiredOption('--doorbell <path>', "socket of the guest's doorbell")
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, options) => (await commands()).attach(domain, options, terminal))
  xen
    .command('migrate')
    .description('migrate a domain to another host while its guest runs')
    .argument('<domain>', 'number of a domain')
    .requiredOption('--to <path>', 'socket of the other host')
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, options) => (await commands()).migrate(domain, options, terminal))

  tmem
    .command('help')
    .description('show help on a command, or its manual page')
    .argument('[command...]', 'name of the command (default: the program)')
    .option('--man', 'print the manual page for man(1)')
    .addOption(json())
    .action(async (names, options) => (await import('./help/help.ts')).help(tmem, names, options, terminal))

  tmem
    .command('completion')
    .description('print the script that makes a shell complete the words of tmem')
    .addArgument(new Argument('<shell>', 'name of the shell').choices(['bash', 'zsh', 'fish'] as const))
    .addOption(json())
    .action(async (shell, options) => (await import('./help/completion.ts')).completion(tmem, shell, options, terminal))

  return tmem
}

function xenRelease(): Option {
  return new Option('--release <release>', 'release of Xen whose interface to use: 4.0.0, 4.0 to 4.12 (default: 4.9)')
}

function list(text: string, before: readonly string[] = []): readonly string[] {
  return [...before, text]
}

function bytes(text: string): number {
  const value = parseBytes(text)
  if (value === undefined) throw new InvalidArgumentError('Expected an amount of bytes such as 64MiB, 1GiB or 65536.')
  return value
}

function seed(text: string): number {
  const value = Number(text)
  if (!/^\d+$/.test(text) || value > 0xffffffff)
    throw new InvalidArgumentError('Expected an integer from 0 to 4294967295.')
  return value
}

function interval(text: string): number {
  const value = Number(text)
  if (!/^\d+(\.\d+)?$/.test(text) || value < 0.1 || value > 3600)
    throw new InvalidArgumentError('Expected seconds from 0.1 to 3600.')
  return value
}

function minutes(text: string): number {
  const value = Number(text)
  if (!/^\d+(\.\d+)?$/.test(text) || value === 0 || value > 100_000)
    throw new InvalidArgumentError('Expected minutes above 0, at most 100000.')
  return value
}

function domain(text: string): number {
  const value = Number(text)
  if (!/^\d+$/.test(text) || value > 32_751) throw new InvalidArgumentError('Expected a number from 0 to 32751.')
  return value
}

function states(text: string): number {
  const value = Number(text)
  if (!/^\d+$/.test(text) || value < 1 || value > 2 ** 24)
    throw new InvalidArgumentError('Expected an integer from 1 to 16777216.')
  return value
}
