/** A thread of `tmem explore --list`: gets the number of a rule, answers with the report on it, until it is ended. */
import { parentPort, workerData } from 'node:worker_threads'
import { explore, type RuleEntry, ruleReport } from '@tmem/interleave'
import { pageMappingRules } from '@tmem/mmu-notifier'

/** What a thread is given at its start: the bound of each exploration, default that of the explorer. */
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
