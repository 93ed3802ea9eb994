// Opens a page file as it is told and is killed before the given one of the calls that it makes of the system.
import { PageFile, systemFiles } from '@tmem/page-file'

const [request, calls] = process.argv.slice(2)
let made = 0
const files = new Proxy(systemFiles(), {
  get(target, name) {
    const value = Reflect.get(target, name, target)
    if (typeof value !== 'function') return value
    return (...words) => {
      if (++made === Number(calls)) process.kill(process.pid, 'SIGKILL')
      return Reflect.apply(value, target, words)
    }
  },
})
PageFile.open({ ...JSON.parse(request), files }).closeNow()
