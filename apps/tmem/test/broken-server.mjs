/**
 * Loaded into a server before the program: breaks it as BREAK says, so that tests of the soak see whether it is found.
 * A write to an image, or to a device, in so many that is not done; a descriptor that each look at idle pages leaves.
 */
import { openSync } from 'node:fs'
import { PageFile } from '@tmem/page-file'
import { Ramzswap } from '@tmem/ramzswap'

/** The method of a class as it was, to be called for an object. */
const was = (of, name) => {
  const method = Reflect.get(of.prototype, name)
  return (self, ...words) => Reflect.apply(method, self, words)
}
const write = was(Ramzswap, 'write')
const idle = was(Ramzswap, 'idle')
const writeFile = was(PageFile, 'write')
let writes = 0
const breaks = {
  image: () => {
    PageFile.prototype.write = function (...words) {
      return this.path.endsWith('.img') && ++writes % 20 === 0 ? Promise.resolve() : writeFile(this, ...words)
    }
  },
  write: () => {
    Ramzswap.prototype.write = function (at, bytes) {
      return ++writes % 100 === 0 ? undefined : write(this, at, bytes)
    }
  },
  descriptors: () => {
    Ramzswap.prototype.idle = function (age) {
      openSync('/dev/null')
      return idle(this, age)
    }
  },
}
breaks[process.env.BREAK]()
