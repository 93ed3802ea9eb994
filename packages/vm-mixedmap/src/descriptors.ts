/**
 * What page descriptors cost when many virtual machines map the same read-only image, and what XIP without descriptors
 * saves: the case for VM_MIXEDMAP in the mail of 12 March 2008 ("if you have 100 guests, you already need to allocate
 * more memory for the struct pages than the size of the image").
 *
 * Each guest has descriptors of its own, because each kernel has its own array of them.
 */
import { translate } from './fault.ts'
import { frameOf, HUGE_PAGES, natural, PAGE_BYTES } from './memory.ts'
import { createMachine, createSpace, type Machine } from './space.ts'
import { createXipFile, createXipFilesystem, getXipMem, xipFault, xipMmap } from './xip.ts'

/** Bytes of a struct page of a 64-bit kernel of 2008 without debugging options. Today it is 64. */
export const DESCRIPTOR_BYTES_2008 = 56

export interface SavingInput {
  /** Virtual machines that map the image. */
  readonly guests: number
  /** Size of the image in bytes, rounded up to pages. */
  readonly imageBytes: number
  /** Size of a descriptor in bytes; default DESCRIPTOR_BYTES_2008. */
  readonly descriptorBytes?: number
}

export interface Saving {
  readonly imagePages: number
  /** Descriptors of all guests together if every frame of the image has one in every guest. */
  readonly descriptors: number
  /** The memory they take, which XIP without descriptors does not need. */
  readonly bytes: number
  /** That memory divided by the size of the image. */
  readonly ofImage: number
  /** From this number of guests on, the descriptors take at least as much memory as the image. */
  readonly breakEvenGuests: number
}

/** @throws RangeError unless guests, image and descriptors are positive integers. */
export function structPageSaving(input: SavingInput): Saving {
  const { guests, imageBytes, descriptorBytes = DESCRIPTOR_BYTES_2008 } = input
  natural('guests', guests, 1)
  natural('descriptorBytes', descriptorBytes, 1)
  const imagePages = Math.ceil(natural('imageBytes', imageBytes, 1) / PAGE_BYTES)
  const descriptors = guests * imagePages
  const bytes = descriptors * descriptorBytes
  return {
    imagePages,
    descriptors,
    bytes,
    ofImage: bytes / (imagePages * PAGE_BYTES),
    breakEvenGuests: Math.ceil(PAGE_BYTES / descriptorBytes),
  }
}

export interface SharedImage {
  /** Descriptors of all guests for frames of the image, counted in the machines. */
  readonly imageDescriptors: number
  /** Descriptors of all guests for their own memory. */
  readonly ownDescriptors: number
  /** Pages of the image that processes of the guests mapped and read, all with the right content. */
  readonly pagesRead: number
}

/**
 * The same as a running model: every guest is a machine with a little memory of its own and the image's frames behind
 * it; a process of each maps the image and reads every page.
 * @throws RangeError for sizes that are no positive integers, or an image of more than 512 pages.
 */
export function runSharedImage(options: {
  readonly guests: number
  readonly imagePages: number
  readonly descriptors: 'for-the-image-too' | 'only-for-own-memory'
}): SharedImage {
  const { guests, imagePages, descriptors } = options
  natural('guests', guests, 1)
  if (natural('imagePages', imagePages, 1) > HUGE_PAGES) throw new RangeError('the image is larger than 512 pages')
  const sum = { imageDescriptors: 0, ownDescriptors: 0, pagesRead: 0 }
  for (let guest = 0; guest < guests; guest++) {
    const machine = bootGuest(imagePages, descriptors)
    machine.frames.forEach(({ page }, pfn) => {
      if (page === null) return
      if (pfn < OWN_FRAMES) sum.ownDescriptors++
      else sum.imageDescriptors++
    })
    sum.pagesRead += readImage(machine, imagePages)
  }
  return sum
}

const OWN_FRAMES = 4

function bootGuest(imagePages: number, descriptors: 'for-the-image-too' | 'only-for-own-memory'): Machine {
  const frames = OWN_FRAMES + imagePages
  const covered = descriptors === 'for-the-image-too' ? frames : OWN_FRAMES
  return createMachine({ memory: { kind: 'flat', frames: covered }, frames, pteSpecial: true })
}

function readImage(machine: Machine, imagePages: number): number {
  const fs = createXipFilesystem(machine, { first: OWN_FRAMES, blocks: imagePages })
  const world = { machine, fs }
  const image = createXipFile(world, imagePages * PAGE_BYTES)
  for (let offset = 0; offset < imagePages; offset++) {
    const block = getXipMem(world, image, offset, 'create')
    if (block.kind === 'frame') frameOf(machine, block.pfn).content = offset + 1
  }
  fs.readOnly = true
  const space = createSpace(machine)
  xipMmap(space, image, { first: 0, pages: imagePages })
  let right = 0
  for (let vpn = 0; vpn < imagePages; vpn++) {
    if (xipFault(world, space.id, vpn, 'read') !== 'mapped') continue
    const pfn = translate(machine, space, vpn, 'read')
    if (pfn !== null && frameOf(machine, pfn).content === vpn + 1) right++
  }
  return right
}
