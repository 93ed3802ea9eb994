/**
 * The numbers of the NBD protocol, under the names of the protocol document.
 *
 * Source: doc/proto.md of NetworkBlockDevice/nbd (master), and its extension-resize branch for RESIZE.
 */

/** First eight bytes of the greeting, in two halves. */
export const NBDMAGIC = [0x4e42444d, 0x41474943] as const
/** Begins every option, in two halves. */
export const IHAVEOPT = [0x49484156, 0x454f5054] as const
/** Begins every reply to an option, in two halves. */
export const OPTION_REPLY = [0x0003e889, 0x045565a9] as const
export const REQUEST_MAGIC = 0x25609513
export const SIMPLE_REPLY_MAGIC = 0x67446698
export const STRUCTURED_REPLY_MAGIC = 0x668e33ef

/** Flags of the handshake; the client's flags have the same values. */
export const Handshake = { FIXED_NEWSTYLE: 1, NO_ZEROES: 2 } as const

/** Transmission flags of an export. */
export const ExportFlag = {
  HAS_FLAGS: 0x1,
  READ_ONLY: 0x2,
  SEND_FLUSH: 0x4,
  SEND_FUA: 0x8,
  SEND_TRIM: 0x20,
  SEND_WRITE_ZEROES: 0x40,
  SEND_DF: 0x80,
  CAN_MULTI_CONN: 0x100,
  SEND_RESIZE: 0x200,
  SEND_CACHE: 0x400,
  SEND_FAST_ZERO: 0x800,
} as const

export const Option = {
  EXPORT_NAME: 1,
  ABORT: 2,
  LIST: 3,
  STARTTLS: 5,
  INFO: 6,
  GO: 7,
  STRUCTURED_REPLY: 8,
  LIST_META_CONTEXT: 9,
  SET_META_CONTEXT: 10,
} as const

export const Reply = {
  ACK: 1,
  SERVER: 2,
  INFO: 3,
  META_CONTEXT: 4,
  ERR_UNSUP: 0x80000001,
  ERR_POLICY: 0x80000002,
  ERR_INVALID: 0x80000003,
  ERR_TLS_REQD: 0x80000005,
  ERR_UNKNOWN: 0x80000006,
  ERR_SHUTDOWN: 0x80000007,
  ERR_TOO_BIG: 0x80000009,
} as const

export const Info = { EXPORT: 0, NAME: 1, DESCRIPTION: 2, BLOCK_SIZE: 3 } as const

export const Command = {
  READ: 0,
  WRITE: 1,
  DISC: 2,
  FLUSH: 3,
  TRIM: 4,
  CACHE: 5,
  WRITE_ZEROES: 6,
  BLOCK_STATUS: 7,
  RESIZE: 8,
} as const

export const CommandFlag = { FUA: 1, NO_HOLE: 2, DF: 4, REQ_ONE: 8, FAST_ZERO: 16 } as const

/** Chunks of structured replies. */
export const Chunk = { NONE: 0, OFFSET_DATA: 1, BLOCK_STATUS: 5, ERROR: 0x8001 } as const
export const CHUNK_DONE = 1

/** Extent flags of `base:allocation`: a hole that reads as zeros. */
export const STATE_HOLE_ZERO = 3

export const Errno = {
  EPERM: 1,
  EIO: 5,
  ENOMEM: 12,
  EINVAL: 22,
  ENOSPC: 28,
  ENOTSUP: 95,
  ESHUTDOWN: 108,
} as const

/** Strings of the protocol (names of exports, messages) have at most this many bytes. */
export const MAXIMUM_STRING = 4096
/** Largest READ or WRITE: what every client may count on. */
export const MAXIMUM_PAYLOAD = 0x200_0000
export const REQUEST_BYTES = 28
/** Simple reply. */
export const SIMPLE_BYTES = 16
/** Header of a structured chunk. */
export const CHUNK_BYTES = 20
/** Header of an OFFSET_DATA chunk: with the offset. */
export const DATA_CHUNK_BYTES = 28
