/**
 * The lockless rules as litmus tests: the accesses on which the rule hangs, and the same with the rule broken. Both
 * judges must say the same of both: the explorer, for which accesses never pass each other, and herd7 under the memory
 * model of the kernel, for which the fences are.
 *
 * One shape is met again and again (SB): who takes something away stores that it is gone and then looks for references;
 * who wants a reference takes it and then looks whether the thing is still there. Not both may miss the other.
 */
import type { LitmusStep, LitmusTest, LitmusThread } from '@tmem/interleave'

/** A rule's test, and its mutant's. */
export interface LitmusPair {
  readonly kept: LitmusTest
  readonly broken: LitmusTest
}

const pair = (
  name: string,
  initial: LitmusTest['initial'],
  forbidden: LitmusTest['forbidden'],
  kept: readonly LitmusThread[],
  broken: readonly LitmusThread[],
): LitmusPair => ({
  kept: { name, initial, threads: kept, forbidden },
  broken: { name: `${name}-broken`, initial, threads: broken, forbidden },
})

const mb: LitmusStep = { fence: 'mb' }
const rmb: LitmusStep = { fence: 'rmb' }
const wmb: LitmusStep = { fence: 'wmb' }

/** The entry at some level goes, its flush is a full fence; then the references are looked at. */
const takeAway = (name: string, entry: string): LitmusThread => ({
  name,
  steps: [{ write: entry, value: 0 }, mb, { read: 'refs', into: 'found' }],
})

/** A speculative reference on what the entry led to; then the entry once more, or (broken) only before it. */
const speculate = (entry: string, again: boolean): LitmusThread => {
  const take: LitmusStep = { add: 'refs', value: 1, into: 'references' }
  const look: LitmusStep = { read: entry, into: 'seen' }
  return { name: 'lockless walk', steps: again ? [take, look] : [look, take] }
}

/** The walk has seen the entry, and who takes it away has found one reference, its own: each goes on. */
const speculation = (name: string, who: string, entry: string): LitmusPair =>
  pair(
    name,
    { [entry]: 1, refs: 1 },
    [{ found: 1 }, { seen: 1 }],
    [takeAway(who, entry), speculate(entry, true)],
    [takeAway(who, entry), speculate(entry, false)],
  )

const lookFirst = (who: string): LitmusThread => ({
  name: who,
  steps: [{ read: 'refs', into: 'found' }, mb, { write: 'entry', value: 0 }],
})

/** Who takes an entry away looks at the references after that, or (broken) before. */
const unmapping = (name: string, who: string): LitmusPair =>
  pair(
    name,
    { entry: 1, refs: 1 },
    [{ found: 1 }, { seen: 1 }],
    [takeAway(who, 'entry'), speculate('entry', true)],
    [lookFirst(who), speculate('entry', true)],
  )

const faultPrecheck: LitmusThread = {
  name: 'fault, which read sequence 0 before',
  steps: [{ read: 'count', into: 'active' }, rmb, { read: 'sequence', into: 'now' }],
}

const pae = (steps: readonly LitmusStep[]): readonly LitmusThread[] => [
  {
    name: 'set a new entry, high half 2, over the old one, high half 1',
    steps: [{ write: 'low', value: 0 }, wmb, { write: 'high', value: 2 }, wmb, { write: 'low', value: 3 }],
  },
  { name: 'lockless walk', steps },
]

/** By the name of the rule in the catalogue. */
export const litmusPairs: Readonly<Record<string, LitmusPair>> = {
  'kvm-sequence-before-count': pair(
    'kvm-sequence-before-count',
    { count: 1, sequence: 0 },
    [{}, { active: 0, now: 0 }],
    [{ name: 'end', steps: [{ write: 'sequence', value: 1 }, wmb, { write: 'count', value: 0 }] }, faultPrecheck],
    [{ name: 'end', steps: [{ write: 'count', value: 0 }, wmb, { write: 'sequence', value: 1 }] }, faultPrecheck],
  ),
  'gup-reads-the-entry-again': speculation('gup-reads-the-entry-again', 'unmap', 'pte'),
  'gup-reads-the-directory-again': speculation('gup-reads-the-directory-again', 'collapse', 'pmd'),
  'gup-pae-reads-the-low-half-again': pair(
    'gup-pae-reads-the-low-half-again',
    { low: 1, high: 1 },
    [{}, { first: 1, upper: 2, second: 1 }],
    pae([{ read: 'low', into: 'first' }, rmb, { read: 'high', into: 'upper' }, rmb, { read: 'low', into: 'second' }]),
    pae([{ read: 'low', into: 'first' }, rmb, { read: 'low', into: 'second' }, rmb, { read: 'high', into: 'upper' }]),
  ),
  'dax-unmaps-before-it-looks-at-pins': unmapping('dax-unmaps-before-it-looks-at-pins', 'truncate'),
  'hmm-entry-goes-before-the-count': unmapping('hmm-entry-goes-before-the-count', 'migrate'),
}
