/**
 * Folders for as long as a process needs them. One that is killed leaves its folders behind: the next that makes one of
 * the same kind takes them away, by the mark in them.
 *
 * Invariants: what has no mark of ours, belongs to another user, or is no folder is left alone; so is a folder whose
 * process runs, as far as this one can see.
 */
import { lstatSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { markedProcess, processMark } from '@tmem/core'

/** The file in which a folder says whose it is. */
const markName = 'tmem-process'

/**
 * Makes a folder in `parent` whose name is `prefix`, our number and more, and removes those of that kind whose
 * processes have ended. Who called removes it when it is done. Throws the system's error when it cannot be made.
 */
export function scratchFolder(parent: string, prefix: string): string {
  for (const name of readdirSync(parent)) if (name.startsWith(prefix)) removeDead(join(parent, name))
  const folder = mkdtempSync(join(parent, `${prefix}${process.pid}-`))
  try {
    writeFileSync(join(folder, markName), processMark(), { mode: 0o600, flag: 'wx' })
    return folder
  } catch (error) {
    rmSync(folder, { recursive: true, force: true })
    throw error
  }
}

function removeDead(folder: string): void {
  try {
    const found = lstatSync(folder)
    if (!found.isDirectory() || found.uid !== process.geteuid?.()) return
    if (markedProcess(readFileSync(join(folder, markName), 'utf8'))?.running !== false) return
  } catch (error) {
    // It has no mark, or somebody else was quicker.
    if (['ENOENT', 'ENOTDIR', 'EISDIR', 'EACCES'].includes((error as NodeJS.ErrnoException).code ?? '')) return
    throw error
  }
  rmSync(folder, { recursive: true, force: true })
}
