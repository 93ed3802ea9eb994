/**
 * XIP (execute in place): files whose blocks are mapped where they are, without a copy in the page cache.
 *
 * A block is a frame, with or without page descriptor; a hole has none. Reading a hole through a mapping shows a zero
 * page, which has to disappear from all mappings when the hole is filled. The race between "there is a hole, map the
 * zero page" and "fill the hole, unmap the zero pages" is the subject of this file: zero pages are inserted under a
 * mutex, inside a write section of a sequence counter, after a second look for the hole; the unmapper walks without the
 * mutex, and once more with it if the counter has moved.
 *
 * Invariants: a mapping of a file shows either the file's block at that offset, or the zero page while there is a hole,
 * or a private copy. The zero page is never dirty. A block belongs to one file, and is freed only when nothing maps it.
 *
 * DEVIATION: one zero page per file, where the kernel has one for all XIP files. The unmapper finds the mappings
 * through the page's reverse map, and with a page per file that is exactly the walk over the file's areas.
 *
 * DEVIATION: an insert that finds the entry in use (-EBUSY: another thread of the process faulted at the same time)
 * counts as success. 2.6.31 treats it as fatal.
 *
 * Source: mm/filemap_xip.c, fs/ext2/xip.c of 2.6.31, Documentation/filesystems/xip.txt (facts only).
 */
import { type Access, type FaultOutcome, NO_SECONDARY_MMUS, resolvePresent, type SecondaryMmus } from './fault.ts'
import {
  allocatePage,
  frameOf,
  natural,
  PAGE_BYTES,
  type ProgramStep,
  requireRule,
  runProgram,
  takePage,
} from './memory.ts'
import { dropMapped, type InsertOutcome, vmInsertMixed, vmInsertPage } from './normal.ts'
import { zapPte } from './ranges.ts'
import {
  type AddressSpace,
  clearPte,
  findVma,
  type Machine,
  mmap,
  offsetOf,
  readPte,
  spaceOf,
  type Vma,
} from './space.ts'

export interface XipFile {
  id: number
  /** Length in bytes. */
  bytes: number
  /** Frame of each page offset, -1 for a hole. An offset beyond the list is a hole. */
  blocks: number[]
  /** The page that mappings of holes show. */
  zeroPfn: number
}

/** A file system on a device whose blocks are frames of the machine. */
export interface XipFilesystem {
  readOnly: boolean
  files: XipFile[]
  /** Blocks that no file has. */
  freeBlocks: number[]
  /** Odd while a zero page is being inserted. */
  sparseSequence: number
  /** Who holds the mutex of sparse files, "" for nobody. */
  locks: { sparse: string }
}

/** What the programs of this file work on. */
export interface XipWorld {
  machine: Machine
  fs: XipFilesystem
}

/**
 * A file system with all frames of a range as free blocks. Frames that have a descriptor are held by the file system,
 * in use by a file or not: they are the device's, and never ordinary memory.
 * @throws RangeError for frames that do not exist, or that are in use.
 */
export function createXipFilesystem(
  machine: Machine,
  options: { readonly first: number; readonly blocks: number; readonly readOnly?: boolean },
): XipFilesystem {
  const { first, blocks, readOnly = false } = options
  frameOf(machine, natural('first', first) + natural('blocks', blocks, 1) - 1)
  const freeBlocks = Array.from({ length: blocks }, (_, i) => first + i)
  for (const pfn of freeBlocks) if (frameOf(machine, pfn).page !== null) takePage(machine, pfn, 'file')
  return { readOnly, files: [], freeBlocks, sparseSequence: 0, locks: { sparse: '' } }
}

/**
 * A file of `bytes` length, all of it a hole. Takes a page for the zero page.
 * @throws RangeError if there is no page left.
 */
export function createXipFile({ machine, fs }: XipWorld, bytes: number): XipFile {
  const zero = allocatePage(machine, 'file')
  if (zero.kind === 'no-memory') throw new RangeError('no page is left for the zero page')
  const file = { id: fs.files.length, bytes: natural('bytes', bytes), blocks: [], zeroPfn: zero.pfn }
  fs.files.push(file)
  return file
}

export function fileOf(fs: XipFilesystem, id: number): XipFile {
  const file = fs.files[id]
  if (file === undefined) throw new RangeError(`there is no file ${id}`)
  return file
}

/** The block behind a page offset, or why there is none. */
export type XipMemory = { kind: 'frame'; pfn: number } | { kind: '-ENODATA' } | { kind: '-ENOSPC' } | { kind: '-EROFS' }

/**
 * get_xip_mem: the frame of a page offset. A hole is -ENODATA unless `create` asks for a block to be allocated
 * (-ENOSPC: none left; -EROFS: read-only file system).
 */
export function getXipMem(world: XipWorld, file: XipFile, offset: number, create: 'create' | 'look'): XipMemory {
  const { fs } = world
  const pfn = file.blocks[natural('offset', offset)] ?? -1
  if (pfn >= 0) return { kind: 'frame', pfn }
  if (create === 'look') return { kind: '-ENODATA' }
  if (fs.readOnly) return { kind: '-EROFS' }
  const block = fs.freeBlocks.shift()
  if (block === undefined) return { kind: '-ENOSPC' }
  Object.assign(frameOf(world.machine, block), { content: 0, tail: 0 })
  while (file.blocks.length <= offset) file.blocks.push(-1)
  file.blocks[offset] = block
  return { kind: 'frame', pfn: block }
}

/** A block device. `directAccess` says whether its blocks can be addressed as memory; sectors are 512 bytes. */
export interface BlockDevice {
  readonly directAccess: 'supported' | 'missing'
  readonly firstPfn: number
  readonly sectors: number
}

/**
 * direct_access: the frame of a sector. -ENODEV: no device, or none whose blocks are memory; -EINVAL: the sector does
 * not start a page; -ERANGE: past the end.
 */
export function directAccess(
  device: BlockDevice | null,
  sector: number,
): { kind: 'frame'; pfn: number } | { kind: '-ENODEV' } | { kind: '-EINVAL' } | { kind: '-ERANGE' } {
  const perPage = PAGE_BYTES / 512
  if (device === null || device.directAccess === 'missing') return { kind: '-ENODEV' }
  if (natural('sector', sector) % perPage !== 0) return { kind: '-EINVAL' }
  if (sector + perPage > device.sectors) return { kind: '-ERANGE' }
  return { kind: 'frame', pfn: device.firstPfn + sector / perPage }
}

/** Mounting with the xip option: without direct access it is dropped with a warning, and the page cache is used. */
export function mountXip(device: BlockDevice): { kind: 'xip' } | { kind: 'without-xip'; warning: string } {
  if (device.directAccess === 'supported') return { kind: 'xip' }
  return { kind: 'without-xip', warning: 'the device has no direct_access; mounted without xip' }
}

/** Maps a file: a MIXEDMAP area. */
export function xipMmap(
  space: AddressSpace,
  file: XipFile,
  area: {
    readonly first: number
    readonly pages: number
    readonly pgoff?: number
    readonly write?: boolean
    readonly shared?: boolean
  },
): Vma {
  return mmap(space, { ...area, mixedMap: true, backing: { kind: 'xip', file: file.id } })
}

// ---------------------------------------------------------------------------------------------------------------
// Programs

/** Registers of the programs of this file. */
export interface XipRegisters {
  /** Frame found, -1 for none. */
  pfn: number
  /** The sequence counter when the unmapper started. */
  sequence: number
  /** Whether the entry is a hole; set by the looks at the file. */
  hole: boolean
  /** What a fault or write answers; "" until it is known. */
  outcome: FaultOutcome | 'written' | 'failed' | ''
}

export function xipRegisters(): XipRegisters {
  return { pfn: -1, sequence: 0, hole: false, outcome: '' }
}

export type XipStep = ProgramStep<XipWorld, XipRegisters>

/** Who does something where. */
export interface XipFault {
  /** Name of the thread, for the mutex. */
  readonly thread: string
  readonly space: number
  readonly vpn: number
  readonly access: Access
}

/** How secondary MMUs are told; they are found in the world because that is what is copied and compared. */
export type SecondaryOf = (world: XipWorld) => SecondaryMmus

const nobody: SecondaryOf = () => NO_SECONDARY_MMUS

/** A footprint, unless secondary MMUs are told: what they touch is not known here. */
function touching(
  secondary: SecondaryOf,
  touches: NonNullable<XipStep['touches']>,
): { readonly touches?: NonNullable<XipStep['touches']> } {
  return secondary === nobody ? { touches } : {}
}

/**
 * A fault in an XIP area, as a program: look for the block; a store into a hole of a shared writable mapping allocates
 * one; any other access to a hole gets the zero page. Locks, walks and looks are steps of their own.
 */
export function xipFaultProgram(at: XipFault, secondary: SecondaryOf = nobody): XipStep[] {
  const where = (world: XipWorld) => {
    const space = spaceOf(world.machine, at.space)
    const vma = findVma(space, at.vpn)
    return { space, vma, machine: world.machine }
  }
  const target = (world: XipWorld) => {
    const { space, vma } = where(world)
    if (vma?.backing.kind !== 'xip') return null
    const file = fileOf(world.fs, vma.backing.file)
    return { space, vma, file, offset: offsetOf(vma, at.vpn) }
  }
  const look = (world: XipWorld, me: XipRegisters): void => {
    const found = target(world)
    const memory = found === null ? null : getXipMem(world, found.file, found.offset, 'look')
    me.pfn = memory?.kind === 'frame' ? memory.pfn : -1
    me.hole = memory?.kind === '-ENODATA'
  }
  const file = (world: XipWorld): [XipFile, number] => {
    const found = target(world)
    return found === null ? [{ id: -1, bytes: 0, blocks: [], zeroPfn: -1 }, 0] : [found.file, found.offset]
  }
  return [
    {
      label: `fault: ${at.access} page ${at.vpn}`,
      at: 'fault',
      ...touching(secondary, { reads: ['fs'], writes: ['machine'] }),
      run: (world, me) => {
        me.outcome = beginFault(world, target(world), at, secondary)
      },
      shows: (_, { outcome }) => outcome,
      jump: { to: 'end', if: (_, { outcome }) => outcome !== '' },
    },
    {
      label: 'look for the block',
      touches: { reads: ['fs.files', 'fs.readOnly', 'machine.spaces'] },
      run: look,
      shows: (_, { pfn, hole }) => (hole ? 'hole' : `frame ${pfn}`),
      jump: { to: 'insert', if: (_, { hole }) => !hole },
    },
    {
      label: 'may the hole be filled?',
      touches: { reads: ['fs.readOnly', 'machine.spaces'] },
      run: () => {},
      jump: {
        to: 'zero page',
        if: (world) => {
          const { vma } = where(world)
          return world.fs.readOnly || !(vma?.shared && vma.mayWrite)
        },
      },
    },
    ...fillHole(at.thread, file, secondary),
    {
      label: 'insert the frame',
      at: 'insert',
      touches: { writes: ['machine'], reads: ['fs'] },
      run: (world, me) => {
        if (me.outcome === 'failed') me.outcome = 'sigbus'
        else me.outcome = insertBlock(world, target(world), at, me.pfn)
      },
      shows: (_, { outcome }) => outcome,
      jump: { to: 'end', if: () => true },
    },
    { ...lockSparse(at.thread), at: 'zero page' },
    {
      label: 'counter becomes odd',
      touches: { writes: ['fs.sparseSequence'] },
      run: ({ fs }) => {
        fs.sparseSequence++
      },
    },
    {
      label: 'look for the hole again',
      touches: { reads: ['fs.files', 'fs.readOnly', 'machine.spaces'] },
      run: look,
      shows: (_, { hole }) => (hole ? 'still a hole' : 'filled meanwhile'),
      jump: { to: 'even', if: (_, { hole }) => !hole },
    },
    {
      label: 'insert the zero page',
      touches: { writes: ['machine'], reads: ['fs.files'] },
      run: (world, me) => {
        const found = target(world)
        me.outcome =
          found === null
            ? 'sigsegv'
            : faultOutcome(vmInsertPage(world.machine, found.space, found.vma, at.vpn, found.file.zeroPfn))
      },
      shows: (_, { outcome }) => outcome,
    },
    {
      label: 'counter becomes even',
      at: 'even',
      touches: { writes: ['fs.sparseSequence'] },
      run: ({ fs }) => {
        fs.sparseSequence++
      },
    },
    {
      ...unlockSparse(at.thread),
      // Filled meanwhile, or unmapped meanwhile: start again.
      jump: { to: 'fault', if: (_, { outcome }) => outcome === '' },
    },
  ]
}

type FaultTarget = { space: AddressSpace; vma: Vma; file: XipFile; offset: number } | null

/** Everything that needs no look at the file: no area, no permission, beyond the end, or an entry is there already. */
function beginFault(world: XipWorld, found: FaultTarget, at: XipFault, secondary: SecondaryOf): FaultOutcome | '' {
  if (found === null || (at.access === 'write' && !found.vma.write)) return 'sigsegv'
  if (found.offset * PAGE_BYTES >= found.file.bytes) return 'sigbus'
  const pte = readPte(world.machine, found.space, at.vpn)
  // A store to the zero page of a shared mapping must not make that page writable: it has to get a block first.
  const zero = pte?.pfn === found.file.zeroPfn && found.vma.shared && at.access === 'write'
  if (zero) return ''
  const present = resolvePresent(world.machine, found.space, found.vma, at.vpn, at.access, secondary(world))
  return present === 'absent' ? '' : present
}

function insertBlock(world: XipWorld, found: FaultTarget, at: XipFault, pfn: number): FaultOutcome {
  if (found === null) return 'sigsegv'
  if (pfn < 0) return 'sigbus'
  return faultOutcome(vmInsertMixed(world.machine, found.space, found.vma, at.vpn, pfn))
}

/** What a fault answers to an insert. */
export function faultOutcome(inserted: InsertOutcome): FaultOutcome {
  switch (inserted) {
    case 'inserted':
      return 'mapped'
    case '-EBUSY': // DEVIATION (head of the file): another thread was faster
      return 'already'
    case '-ENOMEM':
      return 'oom'
    case '-EFAULT':
    case '-EINVAL':
      return 'sigbus'
  }
}

/** A write to one page of a file, as a program: a hole is filled first. The file grows if needed. */
export function xipWriteProgram(
  at: { readonly thread: string; readonly file: number; readonly offset: number; readonly value: number },
  secondary: SecondaryOf = nobody,
): XipStep[] {
  const file = (world: XipWorld): [XipFile, number] => [fileOf(world.fs, at.file), at.offset]
  return [
    {
      label: `write: look for block ${at.offset}`,
      touches: { reads: ['fs.files', 'fs.readOnly'] },
      run: (world, me) => {
        const memory = getXipMem(world, ...file(world), 'look')
        me.pfn = memory.kind === 'frame' ? memory.pfn : -1
        me.hole = memory.kind === '-ENODATA'
      },
      shows: (_, { pfn, hole }) => (hole ? 'hole' : `frame ${pfn}`),
      jump: { to: 'copy', if: (_, { hole }) => !hole },
    },
    ...fillHole(at.thread, file, secondary),
    {
      label: 'copy the data',
      at: 'copy',
      touches: { writes: ['machine.frames', 'fs.files'] },
      run: (world, me) => {
        if (me.outcome === 'failed') return
        frameOf(world.machine, me.pfn).content = at.value
        const own = fileOf(world.fs, at.file)
        own.bytes = Math.max(own.bytes, (at.offset + 1) * PAGE_BYTES)
        me.outcome = 'written'
      },
      shows: (_, { outcome }) => outcome,
    },
  ]
}

/** Allocates under the mutex, then unmaps the zero page everywhere. Jumps to "copy" or "insert" on failure. */
function fillHole(thread: string, file: (world: XipWorld) => [XipFile, number], secondary: SecondaryOf): XipStep[] {
  return [
    lockSparse(thread),
    {
      label: 'allocate a block',
      touches: { writes: ['fs.files', 'fs.freeBlocks', 'machine.frames'], reads: ['fs.readOnly', 'machine.spaces'] },
      run: (world, me) => {
        const memory = getXipMem(world, ...file(world), 'create')
        me.pfn = memory.kind === 'frame' ? memory.pfn : -1
        if (memory.kind !== 'frame') me.outcome = 'failed'
      },
      shows: (_, { pfn }) => (pfn < 0 ? 'failed' : `frame ${pfn}`),
    },
    unlockSparse(thread),
    {
      label: 'remember the counter',
      touches: { reads: ['fs.sparseSequence'] },
      run: ({ fs }, me) => {
        me.sequence = fs.sparseSequence
      },
      shows: (_, { sequence }) => String(sequence),
    },
    {
      label: 'unmap the zero page everywhere',
      ...touching(secondary, { writes: ['machine'], reads: ['fs'] }),
      run: (world) => unmapZeroPage(world, ...file(world), secondary(world)),
    },
    {
      label: 'has the counter moved?',
      touches: { reads: ['fs.sparseSequence'] },
      run: () => {},
      shows: ({ fs }, { sequence }) => (fs.sparseSequence === sequence ? 'no' : 'yes'),
      jump: { to: 'filled', if: ({ fs }, { sequence }) => fs.sparseSequence === sequence && sequence % 2 === 0 },
    },
    { ...lockSparse(thread), label: 'lock sparse for a second walk' },
    {
      label: 'unmap the zero page once more',
      ...touching(secondary, { writes: ['machine'], reads: ['fs'] }),
      run: (world) => unmapZeroPage(world, ...file(world), secondary(world)),
    },
    { ...unlockSparse(thread), label: 'unlock sparse after the second walk' },
    { label: 'filled', at: 'filled', touches: {}, run: () => {} },
  ]
}

function lockSparse(thread: string): XipStep {
  return {
    label: 'lock sparse',
    touches: { writes: ['fs.locks'] },
    when: ({ fs }) => fs.locks.sparse === '',
    run: ({ fs }) => {
      fs.locks.sparse = thread
    },
  }
}

function unlockSparse(thread: string): XipStep {
  return {
    label: 'unlock sparse',
    touches: { writes: ['fs.locks'] },
    run: ({ fs }) => {
      requireRule(fs.locks.sparse === thread, 'lock-holder', `${thread} unlocks what ${fs.locks.sparse} holds`)
      fs.locks.sparse = ''
    },
  }
}

/**
 * Unmaps the file's zero page at an offset from all spaces (clear, flush, notify, then drop), found through the page's
 * reverse map.
 * @throws RuleViolation "zero-page-dirty" if somebody could write to it.
 */
export function unmapZeroPage(
  { machine }: XipWorld,
  { zeroPfn }: XipFile,
  offset: number,
  secondary: SecondaryMmus = NO_SECONDARY_MMUS,
): void {
  for (const space of machine.spaces) {
    for (const vma of space.vmas) {
      const vpn = vma.first + offset - vma.pgoff
      if (vpn < vma.first || vpn >= vma.end) continue
      const pte = readPte(machine, space, vpn)
      if (pte === null || pte.special || pte.pfn !== zeroPfn) continue
      requireRule(!pte.dirty, 'zero-page-dirty', `the zero page is dirty at page ${vpn} of space ${space.id}`)
      secondary.page(space.id, vpn, () => {
        clearPte(machine, space, vpn)
      })
      dropMapped(machine, space, zeroPfn)
    }
  }
}

/**
 * Shortens or lengthens a file, as a program: mappings beyond the new end go first, then the blocks are freed. The tail
 * of a last block that is cut is cleared; a hole needs nothing.
 */
export function xipTruncateProgram(
  at: { readonly file: number; readonly bytes: number },
  secondary: SecondaryOf = nobody,
): XipStep[] {
  const kept = Math.ceil(natural('bytes', at.bytes) / PAGE_BYTES)
  return [
    {
      label: `truncate: new size ${at.bytes}`,
      touches: { writes: ['fs.files', 'machine.frames'] },
      run: ({ fs, machine }) => {
        const file = fileOf(fs, at.file)
        file.bytes = at.bytes
        const last = file.blocks[kept - 1] ?? -1
        if (at.bytes % PAGE_BYTES !== 0 && last >= 0) frameOf(machine, last).tail = 0
      },
    },
    {
      label: 'unmap beyond the end',
      ...touching(secondary, { writes: ['machine'], reads: ['fs.files'] }),
      run: (world) => unmapFileFrom(world, at.file, kept, secondary(world)),
    },
    {
      label: 'free the blocks',
      touches: { writes: ['fs.files', 'fs.freeBlocks'] },
      run: ({ fs }) => {
        const freed = fileOf(fs, at.file).blocks.splice(kept)
        fs.freeBlocks.push(...freed.filter((pfn) => pfn >= 0))
      },
    },
  ]
}

function unmapFileFrom({ machine }: XipWorld, file: number, from: number, secondary: SecondaryMmus): void {
  for (const space of machine.spaces) {
    for (const vma of space.vmas) {
      if (vma.backing.kind !== 'xip' || vma.backing.file !== file) continue
      const first = Math.max(vma.first, vma.first + from - vma.pgoff)
      if (first >= vma.end) continue
      secondary.range(space.id, first, vma.end, () => {
        for (let vpn = first; vpn < vma.end; vpn++) zapPte(machine, space, vpn)
      })
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------
// The same, with nobody else around

/** A fault in an XIP area. */
export function xipFault(world: XipWorld, space: number, vpn: number, access: Access): FaultOutcome {
  const { outcome } = runProgram(xipFaultProgram({ thread: 'caller', space, vpn, access }), world, xipRegisters())
  return outcome as FaultOutcome
}

/** Reads a page: the block, or zero for a hole. -EINVAL beyond the end. */
export function xipRead(
  world: XipWorld,
  file: XipFile,
  offset: number,
): { kind: 'read'; value: number } | { kind: '-EINVAL' } {
  if (natural('offset', offset) * PAGE_BYTES >= file.bytes) return { kind: '-EINVAL' }
  const memory = getXipMem(world, file, offset, 'look')
  return { kind: 'read', value: memory.kind === 'frame' ? frameOf(world.machine, memory.pfn).content : 0 }
}

/** Writes a page; a hole gets a block. */
export function xipWrite(world: XipWorld, file: XipFile, offset: number, value: number): 'written' | 'failed' {
  const steps = xipWriteProgram({ thread: 'caller', file: file.id, offset, value })
  return runProgram(steps, world, xipRegisters()).outcome === 'written' ? 'written' : 'failed'
}

export function xipTruncate(world: XipWorld, file: XipFile, bytes: number): void {
  runProgram(xipTruncateProgram({ file: file.id, bytes }), world, xipRegisters())
}

/**
 * What is wrong between the mappings of a file system's files and their blocks; empty when all is well. Meant for
 * moments without a fault or write half done.
 */
export function auditXip({ machine, fs }: XipWorld): string[] {
  const problems: string[] = []
  const used = fs.files.flatMap(({ blocks }) => blocks.filter((pfn) => pfn >= 0))
  const all = [...used, ...fs.freeBlocks]
  if (new Set(all).size !== all.length) problems.push(`a block is used twice: ${all.join(' ')}`)
  for (const space of machine.spaces) {
    for (const vma of space.vmas) {
      if (vma.backing.kind !== 'xip') continue
      const file = fileOf(fs, vma.backing.file)
      for (let vpn = vma.first; vpn < vma.end; vpn++) {
        const pte = readPte(machine, space, vpn)
        if (pte === null) continue
        const offset = offsetOf(vma, vpn)
        const block = file.blocks[offset] ?? -1
        const where = `space ${space.id} page ${vpn} (file ${file.id} page ${offset})`
        if (pte.pfn === file.zeroPfn && block >= 0) problems.push(`${where} shows zeros, the file has a block`)
        else if (fs.freeBlocks.includes(pte.pfn)) problems.push(`${where} maps the free block ${pte.pfn}`)
        else if (vma.shared && pte.pfn !== block && pte.pfn !== file.zeroPfn) {
          problems.push(`${where} maps frame ${pte.pfn}, not ${block}`)
        }
      }
    }
  }
  return problems
}
