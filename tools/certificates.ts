// Certificates for tests of TLS, made by openssl: they hold for two days, for localhost and 127.0.0.1.
import { execFileSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'

/**
 * Makes `NAME.key` and `NAME.pem` in a folder: for each authority, and for those that it vouches for. Throws what
 * `execFileSync` does, with the code ENOENT where there is no openssl.
 */
export function makeCertificates(folder: string, authorities: Readonly<Record<string, readonly string[]>>): void {
  const openssl = (...words: string[]): void => {
    execFileSync('openssl', words, { cwd: folder, stdio: 'ignore' })
  }
  const request = (name: string): string[] => {
    const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', `${name}.key`]
    return ['req', ...key, '-subj', `/CN=${name}`]
  }
  writeFileSync(join(folder, 'names'), 'subjectAltName=DNS:localhost,IP:127.0.0.1\n')
  for (const [authority, names] of Object.entries(authorities)) {
    openssl(...request(authority), '-x509', '-days', '2', '-out', `${authority}.pem`)
    const by = ['-CA', `${authority}.pem`, '-CAkey', `${authority}.key`, '-CAcreateserial']
    for (const name of names) {
      openssl(...request(name), '-out', `${name}.csr`)
      openssl('x509', '-req', '-in', `${name}.csr`, ...by, '-days', '2', '-extfile', 'names', '-out', `${name}.pem`)
    }
  }
}
