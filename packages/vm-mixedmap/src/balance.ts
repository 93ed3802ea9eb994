/** The balance of a whole machine: references, mapcounts, reverse map and rss against what the entries say. */
import { HUGE_PAGES, pageOf } from './memory.ts'
import { vmNormalHugePage, vmNormalPage } from './normal.ts'
import { entriesIn } from './ranges.ts'
import { findVma, type Machine } from './space.ts'

/**
 * Everything that does not add up in a machine; empty when all is well. References are owners + pins + mapcount;
 * mapcount is the number of entries that map the page; rss is what the entries of a space map.
 */
export function auditMachine(machine: Machine): string[] {
  const problems: string[] = []
  const mapped = new Map<number, number>()
  for (const space of machine.spaces) {
    const rss = { anonymous: 0, file: 0 }
    const count = (pfn: number, pages: number): void => {
      mapped.set(pfn, (mapped.get(pfn) ?? 0) + 1)
      rss[pageOf(machine, pfn).use === 'anonymous' ? 'anonymous' : 'file'] += pages
    }
    for (const [vpn, entry] of entriesIn(machine, space, 0, Number.MAX_SAFE_INTEGER)) {
      const vma = findVma(space, vpn)
      if (vma === undefined) problems.push(`space ${space.id}: page ${vpn} is mapped outside all areas`)
      else if (entry.kind === 'huge') {
        const normal = vmNormalHugePage(machine, vma, entry)
        if (normal.kind === 'page') count(normal.pfn, HUGE_PAGES)
      } else {
        const normal = vmNormalPage(machine, vma, vpn, entry.pte, 'may-sleep')
        if (normal.kind === 'page') count(normal.pfn, 1)
      }
    }
    if (rss.anonymous !== space.rssAnon)
      problems.push(`space ${space.id}: rssAnon ${space.rssAnon}, not ${rss.anonymous}`)
    if (rss.file !== space.rssFile) problems.push(`space ${space.id}: rssFile ${space.rssFile}, not ${rss.file}`)
  }
  machine.frames.forEach(({ page }, pfn) => {
    if (page === null) return
    const expected = mapped.get(pfn) ?? 0
    if (page.mapcount !== expected) problems.push(`frame ${pfn}: mapcount ${page.mapcount}, mapped ${expected} times`)
    const sum = page.owners + page.pins + page.mapcount
    if (page.exclusive && page.mapcount > 1) problems.push(`frame ${pfn}: exclusive, and mapped ${expected} times`)
    if (page.count !== sum) problems.push(`frame ${pfn}: count ${page.count}, held ${sum} times`)
    if (page.head === pfn && (page.use === 'free') !== (page.count === 0)) {
      problems.push(`frame ${pfn}: ${page.use} with count ${page.count}`)
    }
  })
  return [...problems, ...machine.badPtes.map((text) => `bad pte: ${text}`)]
}
