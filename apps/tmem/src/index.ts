/**
 * The program `tmem`: reads the command line, runs one command, and ends with its exit code.
 *
 * A command's own code is loaded when it runs: help and mistakes are answered at once.
 */
import { parseBytes } from '@tmem/core'
import { Argument, Command, InvalidArgumentError, Option } from 'commander'
import { runSuite, suiteOf, suites } from './bench/suites.ts'
import { BadInput, endingOf, exitCodes } from './ending.ts'
import { defaultControl } from './serve/control.ts'
import { processTerminal, type Terminal } from './terminal.ts'
import { programVersion } from './version.ts'
import { defaultXenControl } from './xen/socket.ts'

/** SIGHUP comes when the terminal goes: what a server serves may not go with it. */
const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const

/** Nobody reads messages any more; what they are about goes on. */
const ignoreDeaf = (): void => {}

/**
 * Runs `tmem WORDS…` in this process and answers its exit code: 0 done, 1 failed or wrong data, 2 bad usage or bad
 * input, 130 interrupted. Takes SIGINT, SIGTERM and SIGHUP while it runs; a second one ends the process at once.
 */
export async function run(words: readonly string[]): Promise<number> {
  const interruption = new AbortController()
  let handler: (() => void) | undefined
  const interrupt = (): void => {
    if (handler !== undefined) {
      handler()
      return
    }
    // Nothing of a command's is left behind even then: exit handlers run.
    if (interruption.signal.aborted) process.exit(130)
    interruption.abort()
  }
  const deaf = (error: NodeJS.ErrnoException): void => {
    // Whoever read our output has gone (`tmem … | head`): nobody is left to tell.
    if (error.code === 'EPIPE') interruption.abort()
    else throw error
  }
  for (const name of signals) process.on(name, interrupt)
  process.stdout.on('error', deaf)
  process.stderr.on('error', ignoreDeaf)
  const terminal = processTerminal(interruption.signal, (taken) => {
    handler = taken
    return () => {
      handler = undefined
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
    // Mistakes are told once, in one line, by `run`.
    .configureOutput({ outputError: () => undefined })
    .helpCommand(false)
    .addHelpText('after', `\nExit codes:\n${exitCodes.map(([code, what]) => `${code}: ${what}`).join('\n')}`)
  const json = (): Option => new Option('--json', 'print one JSON document, and nothing else on standard output')

  const report = (what: string): Option =>
    new Option('--report <file>', `also write a page to look at, one file that needs no network: ${what}`)
  const overwrite = (): Option =>
    new Option('--overwrite', 'write the report also over a file that is there and is no report')

  const modules = (): Option =>
    new Option('--modules <file>', 'a module whose layers the stack may name, too (repeat for more)').argParser(list)

  tmem
    .command('demo')
    .description('swap real pages: all the memory, half of it with tmem, and half of it with a swap file alone')
    .option('--input <path...>', 'files and directories whose bytes fill the pages (default: Node.js and this program)')
    .option('--size <bytes>', 'bytes of pages, e.g. 64MiB (default: 256MiB, or what the input has)', bytes)
    .option(
      '--budget <bytes>',
      'how much memory tmem is given, beside half of --size for the program (default: the other half)',
      bytes,
    )
    .option('--dir <path>', 'where the swap files are made (default: the first temporary directory on a disk)')
    .addOption(new Option('--seed <number>', 'seed of the stream of reads and writes').argParser(seed).default(1))
    .addOption(report('curves over time and the table'))
    .addOption(overwrite())
    .option(
      '--remote',
      'instead: a program of 512MiB (--size) with an eighth of that, over two Redis servers, one of which is killed',
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
    .option('--quick', 'about a tenth of the work; figures are rougher')
    .option('--stack <text>', 'bench stack: the stack whose puts, gets and flushes are measured')
    .addOption(report('every row against its reference and its goal'))
    .addOption(overwrite())
    .addOption(modules())
    .addOption(json())
    .action(async (suite, options) => runSuite(await suiteOf(suite, options), options, terminal))

  tmem
    .command('explore')
    .description('run small concurrent programs through all their interleavings, with a rule kept and broken')
    .argument(
      '[scenario]',
      'the scenario to show, or a file (.mjs, .js) with one of your own (default: a table of all)',
    )
    .option('--list', 'the table of all')
    .option(
      '--states <number>',
      'visit so many states at most, and say so where there are more (default: 200000)',
      states,
    )
    .option('--litmus', 'print the litmus test of a lockless rule, for herd7 and the memory model of the kernel')
    .option('--mutant', 'that of its mutant')
    .option('--trace <file>', 'instead: check what tmem guest run --trace has recorded against the rules of the models')
    .addOption(report('the rule kept and broken as sequence charts'))
    .addOption(overwrite())
    .addOption(json())
    .action(async (name, options) => (await import('./explore.ts')).explore(name, options, terminal))

  tmem
    .command('simulate')
    .description(
      'play whole stacks over a simulated disk and clock, under faults, and compare every answer with a reference',
    )
    .option('--seconds <number>', 'how long (default: 10)', seed)
    .option('--seed <number>', 'what decides everything (default: drawn)', seed)
    .option('--history <number>', 'play that history of the seed alone', seed)
    .option('--trace', 'print the operations of that history')
    .addOption(json())
    .action(async (options) => (await import('./simulate.ts')).simulate(options, terminal))

  tmem
    .command('soak')
    .description(
      'run servers of this program under clients, knobs and kills, and compare all that is read with a model',
    )
    .option('--minutes <number>', 'how long, e.g. 0.5', minutes, 10)
    .option('--seed <number>', 'what decides what everybody does (default: drawn)', seed)
    .addOption(json())
    .action(async (options) => (await import('./soak.ts')).soak(options, terminal))

  tmem
    .command('stack')
    .description('list the layers that stacks are made of, or check a stack')
    .argument('[text]', 'a stack, e.g. "zcache(limit=64MiB) > frontswap(file=/tmp/swap.img,size=1GiB)"')
    .option('--file <path>', 'read the stack from a YAML file')
    .addOption(modules())
    .addOption(json())
    .action(async (text, options) => (await import('./layers.ts')).stack(text, options, terminal))

  /** Which devices over which stacks, and how they are served apart from NBD. */
  const devices = (command: Command): Command =>
    command
      .requiredOption('--stack <text>', "the stack of each device; {name} and {size} in it are the device's own")
      .addOption(modules())
      .option('--hypervisor <text>', 'memory that is offered each page first, and may be wanted back (virtswap)')
      .option(
        '--memory <auto,…>',
        'auto: limits that follow the host; perhaps with floor=BYTES, ceiling=BYTES, reserve=BYTES',
      )
      .requiredOption(
        '--device <name=NAME,size=BYTES>',
        'a device, perhaps with memlimit=BYTES, max=BYTES, snapshot=PATH, writethrough (repeat for more)',
        list,
      )
      .option('--fuse <directory>', 'serve as files of a mount: devices, statistics, knobs')
      .option('--busy-turns <number>', 'look so many times for the next request before sleeping', seed)
      .addOption(
        new Option('--log-level <level>', 'the least that is said (default: info)').choices([
          'error',
          'warn',
          'info',
          'debug',
        ] as const),
      )

  const control = (): Option =>
    new Option('--control <path>', 'socket on which the server answers').default(defaultControl)

  devices(
    tmem.command('serve').description('serve block devices over a stack, in the foreground, over NBD and as files'),
  )
    .option('--nbd <address>', 'serve over NBD: unix:PATH[,mode=660] or tcp:HOST:PORT (repeat for more)', list)
    .option('--tls-certificates <directory>', 'TLS on TCP: server-cert.pem, server-key.pem, ca-cert.pem')
    .option('--tls-verify-peer', 'let in only clients whose certificate ca-cert.pem has signed')
    .option(
      '--nbd-limits <name=value,…>',
      'connections=256, per-address=64 (TCP), requests=128 (of each), bytes=64MiB, handshake=10, keepalive=60 (seconds)',
    )
    .option('--http <address>', 'serve the web console: tcp:PORT (on the loopback) or tcp:HOST:PORT')
    .option('--http-token <file>', 'who says what this file holds may turn knobs there (default: nobody may)')
    .addOption(control())
    .option('--socket-mode <mode>', 'permissions of the control socket and of unix: sockets (default: 600)')
    .option('--socket-group <group>', 'name or number of their group, which then may use them (mode 660)')
    .option('--metrics <address>', 'serve metrics for Prometheus over HTTP: tcp:HOST:PORT, e.g. tcp:127.0.0.1:9464')
    .option('--drain', 'on SIGTERM end swapping to the devices of the mount first')
    .option('--fresh', 'serve also where a server before was killed and its pages are lost')
    .addOption(
      new Option('--log <format>', 'how it says what happens (default: text on a terminal, JSON elsewhere)').choices([
        'text',
        'json',
      ] as const),
    )
    .addOption(json())
    .action(async (options) => (await import('./serve/serve.ts')).serve(options, terminal))

  devices(
    tmem
      .command('run')
      .description('serve block devices for one command, which finds them in TMEM_NBD and TMEM_FILE, and end with it'),
  )
    .argument('<command...>', 'the command and its arguments, after --')
    .action(async (command, options) => (await import('./up/run.ts')).runCommand(command, options, terminal))

  const file = (): Option => new Option('-f, --file <path>', 'the file that says what is served').default('tmem.yaml')
  const fileControl = (): Option => new Option('--control <path>', 'socket of the server, instead of that in the file')

  tmem
    .command('up')
    .description('serve what a file says, in the foreground, and swap to it where it says so')
    .addOption(file())
    .addOption(fileControl())
    .option('--fresh', 'serve also where a server before was killed and its pages are lost')
    .addOption(json())
    .action(async (options) => (await import('./up/up.ts')).up(options, terminal))

  tmem
    .command('down')
    .description('end what tmem up has begun: swap first, then the server')
    .addOption(file())
    .addOption(fileControl())
    .option('--wait <seconds>', 'wait so long for its end', seed, 60)
    .addOption(json())
    .action(async (options) => (await import('./up/up.ts')).down(options, terminal))

  tmem
    .command('status')
    .description('what is served and swapped to, and where that differs from the file')
    .addOption(file())
    .addOption(fileControl())
    .addOption(json())
    .action(async (options) => (await import('./up/up.ts')).status(options, terminal))

  tmem
    .command('config')
    .description('check a file for tmem up, or print its JSON Schema')
    .addArgument(new Argument('<what>', 'what to do').choices(['check', 'schema'] as const))
    .addOption(file())
    .addOption(json())
    .action(async (what, options) => (await import('./up/up.ts')).config(what, options, terminal))

  tmem
    .command('install-unit')
    .description('write the systemd units that run what a file says')
    .addOption(file())
    .option('--name <name>', 'name of the units, and of the user where it gets one of its own', 'tmem')
    .option('--root <directory>', 'the folder that stands for /, e.g. of an image that is being made', '/')
    .addOption(json())
    .action(async (options) => (await import('./up/unit.ts')).installUnit(options, terminal))

  tmem
    .command('stat')
    .description('statistics of the devices of a server')
    .addOption(control())
    .option('--wait <seconds>', 'wait so long for a server that is just being started', seed, 0)
    .option('--watch [seconds]', 'again and again (default: every second)')
    .addOption(json())
    .action(async (options) => (await import('./serve/stat.ts')).stat(options, terminal))

  tmem
    .command('explain')
    .description('where a page of a device is: its place, codec, size, age, and last moves')
    .argument('<device>', 'name of the device')
    .argument('<offset>', 'a byte of the page, e.g. 64MiB or 4096', bytes)
    .addOption(control())
    .addOption(json())
    .action(async (device, offset, options) =>
      (await import('./serve/explain.ts')).explain(device, offset, options, terminal),
    )

  tmem
    .command('top')
    .description('what devices and places do in each second, those first that are waited for longest')
    .addOption(control())
    .option('--interval <seconds>', 'how often to look, 0.1 to 3600', interval, 1)
    .option('--once', 'look for one interval, print it, and end')
    .addOption(json())
    .action(async (options) => (await import('./serve/top.ts')).top(options, terminal))

  tmem
    .command('knob')
    .description('show or turn what can be set on a device of a server: its size, limits, writeback, recompression')
    .argument('<device>', 'name of the device')
    .argument('[name]', 'name of the knob (default: all are shown)')
    .argument('[value...]', 'what to set or do, e.g. type=idle max_pages=1000')
    .addOption(control())
    .addOption(json())
    .action(async (device, name, words, options) =>
      (await import('./serve/knob.ts')).knob(device, name, words, options, terminal),
    )

  tmem
    .command('swap')
    .description('swap to a device of a server on this host (FUSE and a loop device), stop that, or show it')
    .addArgument(new Argument('<what>', 'what to do').choices(['on', 'off', 'status']))
    .argument('[device]', 'name of the device (default: the only one)')
    .addOption(control())
    .option('--priority <number>', 'priority of the swap area, 0 to 32767', seed, 100)
    .option('--wait <seconds>', 'wait so long for a server that is just being started', seed, 0)
    .addOption(json())
    .action(async (what, device, options) => (await import('./serve/swap.ts')).swap(what, device, options, terminal))

  tmem
    .command('doctor')
    .description('what this host lacks for swapping to tmem, and what to do about it')
    .addOption(control())
    .addOption(json())
    .action(async (options) => (await import('./serve/doctor.ts')).doctor(options, terminal))

  tmem
    .command('guest')
    .description('Linux guests whose kernels call the hooks of transcendent memory')
    .command('run')
    .description('boot a guest in QEMU that swaps into a stack of this process, and compare what all sides count')
    .addOption(
      new Option('--workload <name>', 'what the guest does, and verifies')
        .choices(['hog', 'reread', 'tar', 'compile'] as const)
        .default('hog' as const),
    )
    .option('--memory <bytes>', 'of the guest: 96MiB to 2GiB', bytes, 128 * 2 ** 20)
    .option('--size <bytes>', 'what the workload uses (default: half as much again as the memory)', bytes)
    .option('--kernel-with-cleancache', "compile a kernel with cleancache once, and boot that instead of Debian's")
    .option('--stack <text>', 'where its pages go (default: zcache(limit=128MiB))')
    .option('--control <path>', 'the socket of a tmem xen host that serves it, instead of this process')
    .option('--domain <number>', 'its number there', domain, 1)
    .addOption(modules())
    .option('--cache <path>', "folder that kernel, headers and module are kept in (default: in the user's cache)")
    .option(
      '--patience <seconds>',
      'how long the guest waits for us, or for a page that we took, before its kernel stops',
      seed,
      60,
    )
    .option('--no-posted', 'the guest waits for each flush')
    .option('--trace <file>', 'a new file for what the kernel calls: frontswap, and MMU notifiers on hog')
    .addOption(json())
    .action(async (options) => (await import('./guest/run.ts')).guestRun(options, terminal))

  const xen = tmem.command('xen').description("Xen's tmem interface")
  xen
    .command('decode')
    .description('a raw structure, or a saved domain, in words')
    .argument('<words...>', 'the structure in hex, or a file that has it, raw or in hex; or what save wrote')
    .addOption(
      new Option('--as <structure>', 'what it is (default: a stream where it begins as one, else op)').choices([
        'op',
        'sysctl',
        'handle',
        'client',
        'pool',
        'stream',
      ] as const),
    )
    .addOption(xenRelease())
    .addOption(new Option('--bits <width>', 'width of the guest').choices(['32', '64'] as const).default('64' as const))
    .addOption(json())
    .action(async (words, options) => (await import('./xen/decode.ts')).decode(words, options, terminal))
  const xenControl = (): Option => new Option('--control <path>', 'socket of the host').default(defaultXenControl)
  const commands = () => import('./xen/commands.ts')
  xen
    .command('host')
    .description('a host for guests that connect to its socket, over a stack, in the foreground')
    .requiredOption('--stack <text>', 'where pages go')
    .addOption(modules())
    .addOption(xenControl())
    .addOption(xenRelease())
    .addOption(
      new Option('--defects <mode>', 'what Xen got wrong: mended, or as in the original')
        .choices(['mended', 'original'] as const)
        .default('mended' as const),
    )
    .option('--max <bytes>', 'persistent pages that each domain may have', bytes)
    .addOption(json())
    .action(async (options) => (await import('./xen/host.ts')).host(options, terminal))
  xen
    .command('list')
    .description('what each domain has')
    .argument('[domain]', 'number of a domain (default: all)')
    .option('--long', 'all fields')
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
    .option('--weight <number>', 'its weight', seed)
    .option('--cap <number>', 'its cap (up to 4.7; it does nothing)', seed)
    .addOption(new Option('--compress <yes|no>', 'whether it is compressed').choices(['yes', 'no'] as const))
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, options) => (await commands()).set(domain, options, terminal))
  xen
    .command('shared-auth')
    .description('permit a domain to share under a uuid, or withdraw that')
    .argument('<domain>', 'number of a domain, or all')
    .requiredOption('--uuid <uuid>', 'the uuid')
    .addOption(
      new Option('--permit <yes|no>', 'permit or withdraw').choices(['yes', 'no'] as const).default('yes' as const),
    )
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, options) => (await commands()).sharedAuth(domain, options, terminal))
  xen
    .command('freeable')
    .description('how much memory could be had back')
    .addOption(xenControl())
    .addOption(json())
    .action(async (options) => (await commands()).freeable(options, terminal))
  xen
    .command('flush')
    .description('evict ephemeral pages, and give their memory back')
    .argument('<bytes>', 'how much, e.g. 64MiB', bytes)
    .addOption(xenControl())
    .addOption(json())
    .action(async (amount, options) => (await commands()).flush(amount, options, terminal))
  xen
    .command('save')
    .description('save a domain to a file; it goes on')
    .argument('<domain>', 'number of a domain')
    .argument('<file>', 'a file that there is not yet')
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, file, options) => (await commands()).save(domain, file, options, terminal))
  xen
    .command('restore')
    .description('restore a domain from a file')
    .argument('<domain>', 'the number that it gets')
    .argument('<file>', 'what save wrote')
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, file, options) => (await commands()).restore(domain, file, options, terminal))
  xen
    .command('attach')
    .description('serve the guest of a virtual machine, whose kernel has the module of @tmem/kernel-guest')
    .argument('<domain>', 'the number that it gets, or that its domain was restored under')
    .requiredOption('--memory <path>', "the file that is the guest's memory")
    .requiredOption('--doorbell <path>', 'the socket of its doorbell')
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, options) => (await commands()).attach(domain, options, terminal))
  xen
    .command('migrate')
    .description('move a domain to another host while its guest runs')
    .argument('<domain>', 'number of a domain')
    .requiredOption('--to <path>', 'socket of the other host')
    .addOption(xenControl())
    .addOption(json())
    .action(async (domain, options) => (await commands()).migrate(domain, options, terminal))

  tmem
    .command('help')
    .description('what a command is for and takes, or manual pages')
    .argument('[command...]', 'which (default: the program)')
    .option('--man', 'print the manual page instead, for man(1)')
    .addOption(json())
    .action(async (names, options) => (await import('./help/help.ts')).help(tmem, names, options, terminal))

  tmem
    .command('completion')
    .description('print the script with which a shell completes the words of tmem')
    .addArgument(new Argument('<shell>', 'which shell').choices(['bash', 'zsh', 'fish'] as const))
    .addOption(json())
    .action(async (shell, options) => (await import('./help/completion.ts')).completion(tmem, shell, options, terminal))

  return tmem
}

function xenRelease(): Option {
  return new Option('--release <release>', 'whose interface: 4.0.0, 4.0 to 4.12 (default: 4.9)')
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
