/** Rules of XIP files, with their mutants. */
import {
  type Actor,
  acquire,
  actor,
  type Check,
  edited,
  type RuleEntry,
  release,
  requireRule,
  type Scenario,
} from '@tmem/interleave'
import {
  fileOf,
  frameOf,
  getXipMem,
  mmap,
  readPte,
  spaceOf,
  takePage,
  translate,
  vmInsertPage,
  type XipFault,
  type XipRegisters,
  xipFault,
  xipFaultProgram,
  xipMmap,
  xipRegisters,
  xipTruncate,
  xipTruncateProgram,
  xipWrite,
  xipWriteProgram,
} from '@tmem/vm-mixedmap'
import { editedRule, switchedRule } from './list.ts'
import { balanced, fileShown, from, step, type World, world } from './world.ts'

const SOURCE = from('mm/filemap_xip.c', '2.6.31')

/** The file and how it is mapped: page 0 of space i is page 0 of the file. */
interface Mapped {
  readonly write?: boolean
  readonly shared?: boolean
}

function xipWorld(maps: readonly Mapped[], blocks = 1): World {
  const made = world({ spaces: Math.max(1, maps.length), blocks, marks: {} })
  for (const [id, map] of maps.entries()) {
    xipMmap(spaceOf(made.machine, id), fileOf(made.fs, 0), { first: 0, pages: blocks, ...map })
  }
  return made
}

const faulter = (at: Partial<XipFault> = {}): Actor<World> => {
  const { thread = 'fault', space = 0, vpn = 0, access = 'read' } = at
  return actor<World, XipRegisters>(thread, xipRegisters(), xipFaultProgram({ thread, space, vpn, access }))
}

const writer = (value = 5, thread = 'write'): Actor<World> =>
  actor<World, XipRegisters>(thread, xipRegisters(), xipWriteProgram({ thread, file: 0, offset: 0, value }))

/** A reader faults a hole while a writer fills it. */
const faultAndFill = (): Scenario<World> => ({
  initial: () => xipWorld([{}]),
  actors: [faulter(), writer()],
  atEnd: [fileShown, balanced],
})

/** The same, with a writer that allocates without the mutex, as in the first version of the repair. */
const fillWithoutMutex = (): Scenario<World> =>
  edited(faultAndFill(), { actor: 'write', without: ['lock sparse', 'unlock sparse'] })

const allBlocks = (blocks: number): Check<World> => ({
  name: 'no lost block',
  check: ({ fs }) => {
    const used = fs.files.flatMap((file) => file.blocks.filter((pfn) => pfn >= 0)).length
    return used + fs.freeBlocks.length === blocks ? null : `${used} used and ${fs.freeBlocks.length} free of ${blocks}`
  },
})

const freeBlocks = (expected: number): Check<World> => ({
  name: 'blocks left',
  check: ({ fs }) => (fs.freeBlocks.length === expected ? null : `${fs.freeBlocks.length} free, not ${expected}`),
})

const registers = (me: object): XipRegisters => me as XipRegisters

export const xipRules: readonly RuleEntry<World>[] = [
  editedRule(
    'xip-looks-for-the-hole-again',
    'the zero page is inserted only after a second look for the hole, inside the write section',
    SOURCE,
    faultAndFill,
    'the first look is trusted',
    fileShown.name,
    { actor: 'fault', change: { step: 'look for the hole again', to: { run: () => {} } } },
  ),
  {
    name: 'xip-walks-again-if-the-counter-moved',
    rule: 'the unmapper walks once more, under the mutex, if the counter moved or was odd',
    source: `${SOURCE.source}, with blocks allocated outside the mutex as when the counter was introduced`,
    version: SOURCE.version,
    scenario: fillWithoutMutex,
    mutant: {
      breaks: 'it walks once',
      caughtAs: fileShown.name,
      scenario: () =>
        edited(fillWithoutMutex(), {
          actor: 'write',
          change: { step: 'has the counter moved?', to: { jump: { to: 'filled', if: () => true } } },
        }),
    },
  },
  editedRule(
    'xip-filling-unmaps-the-zero-page',
    'who fills a hole unmaps the zero page from all areas',
    SOURCE,
    faultAndFill,
    'mappings keep showing zeros',
    fileShown.name,
    { actor: 'write', change: { step: 'unmap the zero page everywhere', to: { run: () => {} } } },
    { actor: 'write', change: { step: 'unmap the zero page once more', to: { run: () => {} } } },
  ),
  editedRule(
    'xip-allocates-under-the-mutex',
    'a hole is filled under the mutex of sparse files: two writers must not allocate two blocks for it',
    SOURCE,
    () => {
      const thread = (name: string): Actor<World> =>
        actor<World, { hole: boolean }>(name, { hole: false }, [
          acquire('sparse', name),
          step<{ hole: boolean }>('is it still a hole?', (state, me) => {
            me.hole = getXipMem(state, fileOf(state.fs, 0), 0, 'look').kind === '-ENODATA'
          }),
          step<{ hole: boolean }>('take a block', (state, { hole }) => {
            const block = hole ? state.fs.freeBlocks.shift() : undefined
            if (block !== undefined) fileOf(state.fs, 0).blocks[0] = block
          }),
          release('sparse', name),
        ])
      return {
        initial: () => ({ ...xipWorld([], 2), locks: { mmapSem: '', sparse: '' } }),
        actors: [thread('writer A'), thread('writer B')],
        atEnd: [allBlocks(2)],
      }
    },
    'one of them does not take it',
    'no lost block',
    { actor: 'writer A', without: ['lock sparse', 'unlock sparse'] },
  ),
  editedRule(
    'xip-busy-entry-is-success',
    'a fault that finds the entry in use has been overtaken by another thread, and has succeeded',
    from(`${SOURCE.source} treats it as fatal; DEVIATION of this model`, SOURCE.version),
    () => ({
      initial: () => {
        const made = xipWorld([{}])
        xipWrite(made, fileOf(made.fs, 0), 0, 5)
        return made
      },
      actors: [faulter({ thread: 'thread A' }), faulter({ thread: 'thread B' })],
      atEnd: [fileShown, balanced],
    }),
    '-EBUSY is a bug',
    'fatal-busy',
    ...['thread A', 'thread B'].map((name) => ({
      actor: name,
      change: {
        step: 'insert the frame',
        to: {
          run: (state: World, me: object) => {
            const busy = readPte(state.machine, spaceOf(state.machine, 0), 0) !== null
            requireRule(!busy, 'fatal-busy', 'two threads faulted at once: BUG')
            registers(me).outcome = xipFault(state, 0, 0, 'read')
          },
        },
      },
    })),
  ),
  switchedRule(
    'xip-has-a-zero-page-of-its-own',
    'the zero page is not the global one: it is found and unmapped through its reverse map, and others must not notice',
    SOURCE,
    (zero: 'own' | 'global'): Scenario<World> => ({
      initial: () => {
        const made = xipWorld([{}])
        takePage(made.machine, 1, 'reserved') // the global zero page
        const other = mmap(spaceOf(made.machine, 0), { first: 8, pages: 1, backing: { kind: 'device' } })
        vmInsertPage(made.machine, spaceOf(made.machine, 0), other, 8, 1)
        if (zero === 'global') fileOf(made.fs, 0).zeroPfn = 1
        return made
      },
      actors: [faulter(), writer()],
      atEnd: [
        fileShown,
        balanced,
        {
          name: 'others undisturbed',
          check: ({ machine }) =>
            translate(machine, spaceOf(machine, 0), 8, 'read') === 1
              ? null
              : 'a mapping of the global zero page is gone',
        },
      ],
    }),
    'own',
    'it is the global one',
    'others undisturbed',
    'global',
  ),
  editedRule(
    'xip-zero-page-is-never-dirty',
    'the zero page is mapped read-only, in private areas too: a store copies it',
    SOURCE,
    () => ({
      initial: () => xipWorld([{ write: true }, {}]),
      actors: [
        faulter(),
        actor<World>('store', {}, [
          step('stores 9 if it may', (state) => {
            const pte = readPte(state.machine, spaceOf(state.machine, 0), 0)
            if (pte?.writable !== true) return // a fault, which copies
            pte.dirty = true
            frameOf(state.machine, pte.pfn).content = 9
          }),
        ]),
        faulter({ thread: 'other process', space: 1 }),
      ],
      invariants: [
        {
          name: 'zero page is zero',
          reads: ['machine', 'fs.files'],
          check: ({ machine, fs }) => {
            const { content } = frameOf(machine, fileOf(fs, 0).zeroPfn)
            return content === 0 ? null : `the zero page of all mappings holds ${content}`
          },
        },
      ],
      atEnd: [fileShown, balanced],
    }),
    'it is mapped writable',
    'zero page is zero',
    {
      actor: 'fault',
      change: {
        step: 'insert the zero page',
        to: {
          run: (state, me) => {
            registers(me).outcome = 'mapped'
            const space = spaceOf(state.machine, 0)
            const area = space.vmas[0]
            if (area !== undefined) vmInsertPage(state.machine, space, area, 0, fileOf(state.fs, 0).zeroPfn)
            const pte = readPte(state.machine, space, 0)
            if (pte !== null) pte.writable = true
          },
        },
      },
    },
  ),
  editedRule(
    'xip-fault-beyond-the-end',
    'a fault beyond the end of the file is a bus error, hole or not',
    SOURCE,
    () => ({
      initial: () => {
        const made = xipWorld([{}], 2)
        xipTruncate(made, fileOf(made.fs, 0), 4096)
        return made
      },
      actors: [faulter({ vpn: 1 }), faulter({ thread: 'fault inside' })],
      atEnd: [
        fileShown,
        {
          name: 'nothing mapped beyond the end',
          check: ({ machine }) => (readPte(machine, spaceOf(machine, 0), 1) === null ? null : 'page 1 is mapped'),
        },
      ],
    }),
    'a zero page is mapped there',
    'nothing mapped beyond the end',
    { actor: 'fault', change: { step: 'fault: read page 1', to: { run: () => {} } } },
  ),
  editedRule(
    'xip-truncate-unmaps-before-freeing',
    'truncate unmaps blocks before it frees them: nothing counts who maps a frame',
    SOURCE,
    () => ({
      initial: () => {
        const made = xipWorld([{ write: true, shared: true }])
        xipWrite(made, fileOf(made.fs, 0), 0, 5)
        xipFault(made, 0, 0, 'write')
        return made
      },
      actors: [
        actor<World, XipRegisters>('truncate', xipRegisters(), xipTruncateProgram({ file: 0, bytes: 0 })),
        actor<World>('process', {}, [
          step('reads through its mapping', (state) => {
            const pfn = translate(state.machine, spaceOf(state.machine, 0), 0, 'read')
            if (pfn === null) return
            requireRule(!state.fs.freeBlocks.includes(pfn), 'free-block-mapped', `block ${pfn} is free, and mapped`)
          }),
        ]),
      ],
      atEnd: [fileShown, balanced],
    }),
    'it frees them first',
    'free-block-mapped',
    { actor: 'truncate', move: { step: 'free the blocks', before: 'unmap beyond the end' } },
  ),
  editedRule(
    'xip-truncate-clears-the-tail',
    'truncate clears the rest of a last block that it cuts',
    SOURCE,
    () => ({
      initial: () => {
        const made = xipWorld([{}])
        xipWrite(made, fileOf(made.fs, 0), 0, 5)
        for (const frame of made.machine.frames) frame.tail = 9
        return made
      },
      actors: [
        actor<World, XipRegisters>('truncate', xipRegisters(), xipTruncateProgram({ file: 0, bytes: 100 })),
        faulter(),
      ],
      atEnd: [
        {
          name: 'tail cleared',
          check: ({ machine, fs }) => {
            const { tail } = frameOf(machine, fileOf(fs, 0).blocks[0] as number)
            return tail === 0 ? null : `behind the end there is still ${tail}`
          },
        },
      ],
    }),
    'the old bytes come back when the file grows',
    'tail cleared',
    {
      actor: 'truncate',
      change: {
        step: 'truncate: new size 100',
        to: {
          run: (state) => {
            fileOf(state.fs, 0).bytes = 100
          },
        },
      },
    },
  ),
  editedRule(
    'xip-reading-does-not-allocate',
    'get_xip_mem without create answers -ENODATA for a hole and allocates nothing',
    SOURCE,
    () => ({
      initial: () => xipWorld([{}, {}]),
      actors: [faulter(), faulter({ thread: 'other', space: 1 })],
      atEnd: [freeBlocks(1), fileShown, balanced],
    }),
    'a look allocates',
    'blocks left',
    {
      actor: 'fault',
      change: {
        step: 'look for the block',
        to: {
          run: (state, me) => {
            const memory = getXipMem(state, fileOf(state.fs, 0), 0, 'create')
            registers(me).pfn = memory.kind === 'frame' ? memory.pfn : -1
          },
        },
      },
    },
  ),
  editedRule(
    'xip-private-fault-does-not-allocate',
    'only a fault of a shared area that may be written fills a hole; all others get the zero page',
    SOURCE,
    () => ({
      initial: () => xipWorld([{ write: true }, { shared: true }]),
      actors: [faulter({ access: 'write' }), faulter({ thread: 'other', space: 1 })],
      atEnd: [freeBlocks(1), fileShown, balanced],
    }),
    'a store to a private area allocates a block of the file',
    'blocks left',
    { actor: 'fault', change: { step: 'may the hole be filled?', to: { jump: { to: 'zero page', if: () => false } } } },
  ),
  editedRule(
    'xip-read-only-filesystem-gets-zero-page',
    'on a read-only file system a hole is never filled, and a fault in a shared area gets the zero page',
    SOURCE,
    () => ({
      initial: () => {
        const made = xipWorld([{ write: true, shared: true }])
        made.fs.readOnly = true
        return made
      },
      actors: [faulter(), faulter({ thread: 'other' })],
      atEnd: [
        {
          name: 'mapped',
          check: ({ machine }) => (readPte(machine, spaceOf(machine, 0), 0) === null ? 'the fault failed' : null),
        },
        fileShown,
        balanced,
      ],
    }),
    'it tries to allocate, and fails',
    'mapped',
    ...['fault', 'other'].map((name) => ({
      actor: name,
      change: { step: 'may the hole be filled?', to: { jump: { to: 'zero page', if: () => false } } },
    })),
  ),
]
