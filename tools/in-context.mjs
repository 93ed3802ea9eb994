// Loads built packages, and the neighbours that they import, into a `vm` context, as test runners such as Jest do:
// there `Error` is not the `Error` of what node:fs throws. For programs that tests start with
// --experimental-vm-modules.
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'
import { createContext, SourceTextModule, SyntheticModule } from 'node:vm'

/**
 * The exports of packages, all together in a context of its own.
 * @param {readonly string[]} names of packages that `from` may import
 * @param {string} from the URL of the program that asks
 * @param {object} globals what the context has beside the language itself
 * @param {{ strings: boolean, wasm: boolean }} codeGeneration what may be compiled there
 */
export async function loadInContext(names, from, globals, codeGeneration = { strings: true, wasm: true }) {
  const context = createContext(globals, { codeGeneration })
  const modules = new Map()
  const resolve = (what, url) =>
    what.startsWith('.') ? new URL(what, url) : pathToFileURL(createRequire(url).resolve(what))
  const moduleOf = (url) => {
    const { href } = url
    const initializeImportMeta = (meta) => Object.assign(meta, { url: href })
    if (!modules.has(href))
      modules.set(
        href,
        new SourceTextModule(readFileSync(url, 'utf8'), { context, identifier: href, initializeImportMeta }),
      )
    return modules.get(href)
  }
  const link = async (what, { identifier }) => {
    if (what.startsWith('.') || what.startsWith('@tmem/')) return moduleOf(resolve(what, identifier))
    // What others have made, and the system's own, is that of this program.
    const outside = await import(what.startsWith('node:') ? what : resolve(what, identifier))
    const exported = Object.keys(outside)
    const set = function () {
      for (const one of exported) this.setExport(one, outside[one])
    }
    return new SyntheticModule(exported, set, { context })
  }
  const exports = {}
  for (const name of names) {
    const module = moduleOf(resolve(name, from))
    if (module.status === 'unlinked') await module.link(link)
    await module.evaluate()
    Object.assign(exports, module.namespace)
  }
  return exports
}
