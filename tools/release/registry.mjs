// A registry of packages for one rehearsal: on loopback, on a port of the system's choice, in a folder that is given.
// It knows only what is published to it, asks no other registry, and ends with the process that forked it.
import { writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'

const { runServer } = createRequire(import.meta.url)('verdaccio')
const [folder] = process.argv.slice(2)
const everybody = { access: '$all', publish: '$all' }
const config = join(folder, 'config.yaml')
writeFileSync(
  config,
  JSON.stringify({
    storage: join(folder, 'storage'),
    auth: { htpasswd: { file: join(folder, 'users') } },
    uplinks: {},
    packages: { '@*/*': everybody, '**': everybody },
    log: { type: 'file', path: join(folder, 'log'), format: 'json', level: 'warn' },
    max_body_size: '64mb',
    web: { enable: false },
  }),
)
const server = await runServer(config)
server.listen(0, '127.0.0.1', () => process.send(server.address().port))
process.on('disconnect', () => process.exit())
