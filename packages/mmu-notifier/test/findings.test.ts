/** What the explorer says beyond the rules: bad luck, and things that the sources do not say or got wrong. */
import { actor, edited, explore, type Scenario } from '@tmem/interleave'
import {
  auditMachine,
  auditXip,
  createMachine,
  createSpace,
  createXipFile,
  createXipFilesystem,
  munmap,
  readPte,
  spaceOf,
  type XipRegisters,
  type XipWorld,
  xipFaultProgram,
  xipMmap,
  xipRegisters,
  xipTruncateProgram,
  xipWrite,
  xipWriteProgram,
} from '@tmem/vm-mixedmap'
import { expect, test } from 'vitest'

function fileWorld(): XipWorld {
  const machine = createMachine({ memory: { kind: 'flat', frames: 2 }, frames: 3, pteSpecial: true })
  const fs = createXipFilesystem(machine, { first: 2, blocks: 1 })
  const file = createXipFile({ machine, fs }, 4096)
  xipMmap(createSpace(machine), file, { first: 0, pages: 1 })
  return { machine, fs }
}

const fault = actor<XipWorld, XipRegisters>(
  'fault',
  xipRegisters(),
  xipFaultProgram({ thread: 'fault', space: 0, vpn: 0, access: 'read' }),
)
const write = actor<XipWorld, XipRegisters>(
  'write',
  xipRegisters(),
  xipWriteProgram({ thread: 'write', file: 0, offset: 0, value: 5 }),
)
const showsZeros = {
  name: 'shows the file',
  check: ({ machine, fs }: XipWorld) => {
    const pte = readPte(machine, spaceOf(machine, 0), 0)
    return pte !== null && pte.pfn !== fs.files[0]?.blocks[0] ? 'shows zeros, the file has a block' : null
  },
}

test('with blocks allocated under the mutex, the second walk of the unmapper is not needed', () => {
  const scenario: Scenario<XipWorld> = { initial: fileWorld, actors: [fault, write], atEnd: [showsZeros] }
  const once = { step: 'has the counter moved?', to: { jump: { to: 'filled', if: () => true } } }
  expect(explore(edited(scenario, { actor: 'write', change: once })).kind).toBe('holds')
  const outside = edited(scenario, { actor: 'write', without: ['lock sparse', 'unlock sparse'] })
  expect(explore(outside).kind).toBe('holds')
  expect(explore(edited(outside, { actor: 'write', change: once })).kind).toBe('violated')
})

test.each(['read', 'write'] as const)(
  'an area unmapped during a fault (%s): no entry is left, nothing is lost',
  (access) => {
    const scenario: Scenario<XipWorld> = {
      initial: () => {
        const made = fileWorld()
        spaceOf(made.machine, 0).vmas = []
        xipMmap(spaceOf(made.machine, 0), made.fs.files[0]!, {
          first: 0,
          pages: 1,
          shared: true,
          write: access === 'write',
        })
        return made
      },
      actors: [
        actor('fault', xipRegisters(), [
          ...xipFaultProgram({ thread: 'fault', space: 0, vpn: 0, access }),
          { label: 'done', run: () => {} },
        ]),
        actor('munmap', {}, [
          { label: 'munmap', run: ({ machine }: XipWorld) => munmap(machine, spaceOf(machine, 0), 0, 1) },
        ]),
      ],
      atEnd: [
        {
          name: 'nothing left',
          check: (world) =>
            [...auditMachine(world.machine), ...auditXip(world)][0] ??
            (readPte(world.machine, spaceOf(world.machine, 0), 0) === null ? null : 'an entry is left') ??
            (world.fs.locks.sparse === '' ? null : 'the mutex is still held'),
        },
      ],
    }
    expect(explore(scenario)).toMatchObject({ kind: 'holds' })
  },
)

test('nothing keeps an XIP fault that has found its block from mapping it after a truncate has freed it', () => {
  const scenario: Scenario<XipWorld> = {
    initial: () => {
      const made = fileWorld()
      xipWrite(made, made.fs.files[0]!, 0, 5)
      return made
    },
    actors: [fault, actor('truncate', xipRegisters(), xipTruncateProgram({ file: 0, bytes: 0 }))],
    atEnd: [
      {
        name: 'no free block mapped',
        check: ({ machine, fs }) => {
          const pte = readPte(machine, spaceOf(machine, 0), 0)
          return pte !== null && fs.freeBlocks.includes(pte.pfn) ? `block ${pte.pfn} is free, and mapped` : null
        },
      },
    ],
  }
  expect(explore(scenario)).toMatchObject({ kind: 'violated', name: 'no free block mapped' })
})
