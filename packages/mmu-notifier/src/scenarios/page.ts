/**
 * The world of the rules of `devices.ts` and `guests.ts`: one page, and what is known of it. Only the order of actions
 * and the locks are modelled there, not the page tables, which are those of the other files.
 */
import {
  type Actor,
  actor,
  edited,
  type HasLocks,
  type RuleEntry,
  requireRule,
  type Scenario,
  type Step,
} from '@tmem/interleave'
import type { Origin } from './world.ts'

/** One page of a DAX file, of a device, or of a guest. */
export interface World extends HasLocks {
  /** The page belongs to whoever the scenario is about; false: it was freed, and somebody else may have it. */
  owned: boolean
  /** Entries of processes that map it. */
  mapped: number
  /** References besides those of the entries (get_user_pages, a fault that is under way). */
  pins: number
  /** Where the process's data is. */
  place: 'system' | 'device'
  /** The guest's memory is private, or shared with its host. */
  attribute: 'private' | 'shared'
  /** Mapped into the guest, as what: '' for not. */
  guest: '' | 'private' | 'shared'
  /** Ranges between invalidate_begin and invalidate_end, and how many have ended. */
  invalidating: number
  sequence: number
  /** The page descriptors of the device's memory exist. */
  descriptors: boolean
  /** The file has the page; false: it was taken out of it, and is freed with the last reference. */
  inFile: boolean
  /** The count of references is frozen: nobody gets one more. */
  frozen: boolean
  /** Which page a device has mapped for DMA, -1 for none; and which one the file has there now. */
  dma: number
  current: number
}

export interface Registers {
  sequence: number
  attribute: string
  has: boolean
}

export type DeviceStep = Step<World, Registers>

export const page = (more: Partial<World> = {}): World => ({
  owned: true,
  mapped: 0,
  pins: 0,
  place: 'system',
  attribute: 'private',
  guest: '',
  invalidating: 0,
  sequence: 0,
  descriptors: true,
  inFile: true,
  frozen: false,
  dma: -1,
  current: 0,
  locks: { invalidate: '', mmu: '', page: '' },
  ...more,
})

export const thread = (name: string, steps: readonly DeviceStep[]): Actor<World> =>
  actor<World, Registers>(name, { sequence: -1, attribute: '', has: false }, steps)

export const step = (
  label: string,
  run: (state: World, me: Registers) => void,
  more: Partial<Omit<DeviceStep, 'label' | 'run'>> = {},
): DeviceStep => ({ label, run, ...more })

/** A rule: the steps that the mutant leaves out, moves or changes. */
export function rule(
  name: string,
  text: string,
  origin: Origin,
  scenario: () => Scenario<World>,
  breaks: string,
  caughtAs: string,
  ...edits: Parameters<typeof edited<World>> extends [unknown, ...infer Edits] ? Edits : never
): RuleEntry<World> {
  return {
    name,
    rule: text,
    ...origin,
    scenario,
    mutant: { breaks, caughtAs, scenario: () => edited(scenario(), ...edits) },
  }
}

export const usable = (state: World, who: string): void =>
  requireRule(state.owned, 'use-after-free', `${who} uses a page that was freed`)

/** Direct I/O pins the mapped block with the lockless walk, and lets a device write to it. */
export const directIo = (): Actor<World> =>
  thread('direct I/O', [
    step(
      'pin the block, if it is mapped',
      (state, me) => {
        me.has = state.mapped > 0
        if (me.has) state.pins++
      },
      { shows: (_, { has }) => (has ? 'pinned' : 'not mapped'), jump: { to: 'end', if: (_, { has }) => !has } },
    ),
    step('the device writes to it', (state) => usable(state, 'the device')),
    step('unpin', (state) => {
      state.pins--
    }),
  ])
