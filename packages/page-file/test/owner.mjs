// Opens page files as it is told, as a process or as a thread of its own: messages {id, open, close, write, at, exit};
// answers {id, ...}.
import { isMainThread, parentPort, threadId } from 'node:worker_threads'
import { PageFile, systemFiles } from '@tmem/page-file'

const say = (message) => (isMainThread ? process.send(message) : parentPort.postMessage(message))
let file

const acts = {
  // At a time that others are told, too.
  open({ request, native, at = 0 }) {
    const files = systemFiles({ native })
    while (Date.now() < at);
    try {
      file = PageFile.open({ ...request, files })
      return { open: true, found: file.found, locks: file.locks, thread: threadId, direct: file.directIo }
    } catch (error) {
      return { open: false, code: error.code, message: error.message }
    }
  },
  close: async () => {
    await file?.close()
    file = undefined
    return {}
  },
  // Writes all over the file, something else each time, in four places at once.
  write() {
    const length = (file.bytes - 4096) / 4
    const again = (place, bytes) =>
      file.write(bytes.fill(bytes[0] + 1), 0, length, 4096 + place * length).then(() => again(place, bytes))
    for (let place = 0; place < 4; place++) again(place, new Uint8Array(length))
    return {}
  },
}

const answer = async (message) => say({ id: message.id, ...(await acts[message.act](message)) })
const onMessage = (message) => void answer(message)
if (isMainThread) process.on('message', onMessage)
else parentPort.on('message', onMessage)
