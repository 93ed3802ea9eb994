/** A thread of `tmem explore --list`: receives numbers of rules and answers each with the report on that rule. */
import { parentPort, workerData } from 'node:worker_threads'
import { explore, type RuleEntry, ruleReport } from '@tmem/interleave'
import { pageMappingRules } from '@tmem/mmu-notifier'

/** What a thread gets at its start: the most states of each exploration (default: the explorer's own bound). */
export interface ExplorerData {
  readonly states: number | undefined
}

const { states } = workerData as ExplorerData
const bound = states === undefined ? {} : { maxStates: states }

parentPort!.on('message', (number: number) => {
  const entry = pageMappingRules[number] as RuleEntry
  const [kept, broken] = [explore(entry.scenario(), bound), explore(entry.mutant.scenario(), bound)]
  parentPort!.postMessage(ruleReport(entry, kept, broken))
})
