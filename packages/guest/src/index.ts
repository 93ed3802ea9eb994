/** Boots a Linux kernel in QEMU, without KVM, for a test or a benchmark. */
export { type CpioEntry, cpio } from './cpio.ts'
export { compileHog } from './hog.ts'
export { findKernel, type InitramfsOptions, initramfs, type Kernel } from './initramfs.ts'
export { driveWords, type GuestDrive, type GuestOptions, type GuestRun, runGuest } from './run.ts'
export { scratchFolder } from './scratch.ts'
