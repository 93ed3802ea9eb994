// node --import: koffi has no library for this machine.
import { register } from 'node:module'

register(
  `data:text/javascript,${encodeURIComponent(`
    export async function resolve(name, context, next) {
      if (name === 'koffi' && context.parentURL.includes('/userfault/dist/')) throw new Error('Cannot find the native Koffi module')
      return next(name, context)
    }`)}`,
)
