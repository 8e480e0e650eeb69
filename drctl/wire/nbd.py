"""The NBD protocol's names and structures, spelled as its specification spells them. Knows no session, no socket.

Source: doc/proto.md of the NetworkBlockDevice project. All integers on the wire are big-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

MiB = 1024 * 1024

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
NBD_REP_MAGIC = 0x0003E889045565A9
NBD_REQUEST_MAGIC = 0x25609513
NBD_SIMPLE_REPLY_MAGIC = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC = 0x668E33EF

# Handshake flags of the server and of the client.
NBD_FLAG_FIXED_NEWSTYLE = 1 << 0
NBD_FLAG_NO_ZEROES = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE = 1 << 0
NBD_FLAG_C_NO_ZEROES = 1 << 1

# Transmission flags.
NBD_FLAG_HAS_FLAGS = 1 << 0
NBD_FLAG_READ_ONLY = 1 << 1
NBD_FLAG_SEND_FLUSH = 1 << 2
NBD_FLAG_SEND_FUA = 1 << 3
NBD_FLAG_ROTATIONAL = 1 << 4
NBD_FLAG_SEND_TRIM = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES = 1 << 6
NBD_FLAG_SEND_DF = 1 << 7
NBD_FLAG_CAN_MULTI_CONN = 1 << 8
NBD_FLAG_SEND_RESIZE = 1 << 9
NBD_FLAG_SEND_CACHE = 1 << 10
NBD_FLAG_SEND_FAST_ZERO = 1 << 11

NBD_OPT_EXPORT_NAME = 1
NBD_OPT_ABORT = 2
NBD_OPT_LIST = 3
NBD_OPT_STARTTLS = 5
NBD_OPT_INFO = 6
NBD_OPT_GO = 7
NBD_OPT_STRUCTURED_REPLY = 8
NBD_OPT_LIST_META_CONTEXT = 9
NBD_OPT_SET_META_CONTEXT = 10
NBD_OPT_EXTENDED_HEADERS = 11

NBD_REP_ACK = 1
NBD_REP_SERVER = 2
NBD_REP_INFO = 3
NBD_REP_META_CONTEXT = 4
NBD_REP_FLAG_ERROR = 1 << 31
NBD_REP_ERR_UNSUP = NBD_REP_FLAG_ERROR | 1
NBD_REP_ERR_POLICY = NBD_REP_FLAG_ERROR | 2
NBD_REP_ERR_INVALID = NBD_REP_FLAG_ERROR | 3
NBD_REP_ERR_UNKNOWN = NBD_REP_FLAG_ERROR | 6
NBD_REP_ERR_TOO_BIG = NBD_REP_FLAG_ERROR | 9

NBD_INFO_EXPORT = 0
NBD_INFO_NAME = 1
NBD_INFO_DESCRIPTION = 2
NBD_INFO_BLOCK_SIZE = 3

NBD_CMD_READ = 0
NBD_CMD_WRITE = 1
NBD_CMD_DISC = 2
NBD_CMD_FLUSH = 3
NBD_CMD_TRIM = 4
NBD_CMD_CACHE = 5
NBD_CMD_WRITE_ZEROES = 6
NBD_CMD_BLOCK_STATUS = 7

NBD_CMD_FLAG_FUA = 1 << 0
NBD_CMD_FLAG_NO_HOLE = 1 << 1
NBD_CMD_FLAG_DF = 1 << 2
NBD_CMD_FLAG_REQ_ONE = 1 << 3
NBD_CMD_FLAG_FAST_ZERO = 1 << 4

NBD_REPLY_FLAG_DONE = 1 << 0
NBD_REPLY_TYPE_NONE = 0
NBD_REPLY_TYPE_OFFSET_DATA = 1
NBD_REPLY_TYPE_OFFSET_HOLE = 2
NBD_REPLY_TYPE_BLOCK_STATUS = 5
NBD_REPLY_TYPE_ERROR = (1 << 15) | 1
NBD_REPLY_TYPE_ERROR_OFFSET = (1 << 15) | 2
NBD_REPLY_TYPE_ERROR_BIT = 1 << 15

NBD_STATE_HOLE = 1 << 0
NBD_STATE_ZERO = 1 << 1
BASE_ALLOCATION = "base:allocation"

# Error numbers as the protocol fixes them, whatever the host's errno.h says.
NBD_EPERM = 1
NBD_EIO = 5
NBD_ENOMEM = 12
NBD_EINVAL = 22
NBD_ENOSPC = 28
NBD_EOVERFLOW = 75
NBD_ENOTSUP = 95
NBD_ESHUTDOWN = 108

ERROR_NAMES = {
    NBD_EPERM: "EPERM",
    NBD_EIO: "EIO",
    NBD_ENOMEM: "ENOMEM",
    NBD_EINVAL: "EINVAL",
    NBD_ENOSPC: "ENOSPC",
    NBD_EOVERFLOW: "EOVERFLOW",
    NBD_ENOTSUP: "ENOTSUP",
    NBD_ESHUTDOWN: "ESHUTDOWN",
}

#: NBDMAGIC, IHAVEOPT, handshake flags.
SERVER_HELLO = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
#: IHAVEOPT, option, length of the data that follows.
OPTION = struct.Struct(">QII")
#: NBD_REP_MAGIC, option, reply type, length of the data that follows.
OPTION_REPLY = struct.Struct(">QIII")
#: Answer to NBD_OPT_EXPORT_NAME: size, transmission flags; 124 zeroes follow unless NO_ZEROES was agreed.
EXPORT_NAME_REPLY = struct.Struct(">QH")
#: NBD_INFO_EXPORT: info type, size, transmission flags.
INFO_EXPORT = struct.Struct(">HQH")
#: NBD_INFO_BLOCK_SIZE: info type, minimum, preferred, maximum payload.
INFO_BLOCK_SIZE = struct.Struct(">HIII")
#: magic, command flags, command, cookie, offset, length.
REQUEST = struct.Struct(">IHHQQI")
#: magic, error, cookie.
SIMPLE_REPLY = struct.Struct(">IIQ")
#: magic, flags, type, cookie, length of the payload that follows.
STRUCTURED_REPLY = struct.Struct(">IHHQI")
#: Length and NBD_STATE_* flags of one extent in a block status reply.
BLOCK_DESCRIPTOR = struct.Struct(">II")

#: Longest string the protocol allows (export and context names, descriptions).
MAX_STRING = 4096
#: Data of one option: a name, some queries. More is refused before it is read.
MAX_OPTION = 64 * 1024
#: Largest payload of one request or reply; what QEMU sends at most.
MAX_PAYLOAD = 32 * MiB

WRITABLE_FLAGS = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_WRITE_ZEROES
READ_ONLY_FLAGS = NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY | NBD_FLAG_SEND_FLUSH | NBD_FLAG_CAN_MULTI_CONN


class Export(NamedTuple):
    """One disk that a server offers. Sizes in bytes; `flags` are transmission flags."""

    name: str
    size: int
    flags: int
    description: str = ""
    minimum_block: int = 512
    preferred_block: int = 4096
    maximum_payload: int = MAX_PAYLOAD

    @property
    def read_only(self) -> bool:
        return bool(self.flags & NBD_FLAG_READ_ONLY)


def pack_option(option: int, data: bytes = b"") -> bytes:
    """What a client sends to ask for an option."""
    return OPTION.pack(IHAVEOPT, option, len(data)) + data


def pack_option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """What a server answers to an option."""
    return OPTION_REPLY.pack(NBD_REP_MAGIC, option, kind, len(data)) + data


def pack_string(text: str) -> bytes:
    """A string with its length before it, as options carry it."""
    data = text.encode()
    return len(data).to_bytes(4, "big") + data
