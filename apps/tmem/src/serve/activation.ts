/**
 * Socket activation: the parent process (systemd, libnbd) listens already and hands its sockets over.
 *
 * The sockets are the `LISTEN_FDS` descriptors from 3 on, for the process `LISTEN_PID` alone: the sockets of a launcher
 * that starts this program as a child stay its own.
 *
 * Source: sd_listen_fds(3).
 */
import { fstatSync } from 'node:fs'
import { BadInput } from '../ending.ts'

const firstDescriptor = 3

/** Whether sockets were handed over to this process. */
export const isActivated = ({ LISTEN_FDS: count, LISTEN_PID: meant }: NodeJS.ProcessEnv, pid: number): boolean =>
  count !== undefined && meant === String(pid)

/**
 * The descriptors that were handed over, perhaps none. Removes the variables from `environment`, so that no child takes
 * the sockets for its own. Throws `BadInput` for bad variables and for a descriptor that is not a socket.
 */
export function activatedDescriptors(environment: NodeJS.ProcessEnv, pid: number): number[] {
  const { LISTEN_FDS: count } = environment
  const isMeant = isActivated(environment, pid)
  for (const name of ['LISTEN_FDS', 'LISTEN_PID', 'LISTEN_FDNAMES']) delete environment[name]
  if (count === undefined || !isMeant) return []
  if (!/^[1-9]\d{0,3}$/.test(count)) throw new BadInput(`LISTEN_FDS: expected a number of sockets, got "${count}"`)
  return Array.from({ length: Number(count) }, (_, n) => {
    const descriptor = firstDescriptor + n
    const what = `LISTEN_FDS says that descriptor ${descriptor} is a socket`
    try {
      if (fstatSync(descriptor).isSocket()) return descriptor
    } catch (error) {
      throw new BadInput(`${what}: ${(error as Error).message}`)
    }
    throw new BadInput(`${what}, but it is not`)
  })
}
