/**
 * Socket activation: whoever started this process listens already, and hands its sockets over (libnbd, systemd).
 *
 * They are the descriptors from 3 on, `LISTEN_FDS` of them, and meant for the process `LISTEN_PID` alone: a launcher
 * that starts this one as its child keeps them to itself.
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
 * The descriptors that were handed over, none when there are none. Their variables are taken out of `environment`, so
 * that no child believes they are its own. Throws `BadInput` for variables that make no sense, and for what is no
 * socket.
 */
export function activatedDescriptors(environment: NodeJS.ProcessEnv, pid: number): number[] {
  const { LISTEN_FDS: count } = environment
  const isMeant = isActivated(environment, pid)
  for (const name of ['LISTEN_FDS', 'LISTEN_PID', 'LISTEN_FDNAMES']) delete environment[name]
  if (count === undefined || !isMeant) return []
  if (!/^[1-9]\d{0,3}$/.test(count)) throw new BadInput(`LISTEN_FDS must be a number of sockets, not "${count}"`)
  return Array.from({ length: Number(count) }, (_, n) => {
    const descriptor = firstDescriptor + n
    const what = `LISTEN_FDS says that descriptor ${descriptor} is a socket`
    try {
      if (fstatSync(descriptor).isSocket()) return descriptor
    } catch (error) {
      throw new BadInput(`${what}: ${(error as Error).message}`)
    }
    throw new BadInput(`${what}, and it is something else`)
  })
}
