/**
 * `tmem bench models`: the claims of mails of March and April 2008 about page mapping, counted on the models. No figure
 * is a time: all are the same on every machine.
 *
 * - The hooks that the VM calls for 100 pages, with `invalidate_page` beside the range pair (mmu notifier #v13) against
 * ranges only.
 * - The memory that 100 guests need besides an image of 1 GiB that they share: page tables, without page descriptors
 * and with them.
 */
import { countHooks, RANGES_ONLY, V13_FIRST_PART, WORKLOADS } from '@tmem/mmu-notifier'
import { structPageSaving } from '@tmem/vm-mixedmap'
import { type Row, ratioRow, type Suite, valueRow } from './frame.ts'

/** The suite. */
export const models: Suite = {
  name: 'models',
  summary: 'what two mails of 2008 claimed of page mapping, counted on the models',
  run: async () => [...hookRows(), ...sharedImageRows()],
}

const pages = 100

function hookRows(): Row[] {
  return WORKLOADS.map((workload) => {
    const [kept, ranges] = [V13_FIRST_PART, RANGES_ONLY].map((shape) => countHooks(shape, workload, pages).hooks)
    return ratioRow(`hooks-${workload}`, 'hooks', kept!, 'ranges-only', ranges!)
  })
}

/** An entry of a page table, for each page of the image in each guest: with descriptors or without. */
const entryBytes = 8
const mebibyte = 2 ** 20

function sharedImageRows(): Row[] {
  const { imagePages, bytes, breakEvenGuests } = structPageSaving({ guests: 100, imageBytes: 2 ** 30 })
  const tables = (100 * imagePages * entryBytes) / mebibyte
  const all = bytes / mebibyte + tables
  return [
    ratioRow('shared-image-descriptors', 'MiB', bytes / mebibyte, 'image', 1024),
    valueRow('shared-image-guests-until-descriptors-exceed-it', 'guests', breakEvenGuests),
    ratioRow('shared-image-page-tables-alone', 'MiB', tables, 'with-descriptors', all),
  ]
}
