"""Layout of a ring: the tmpfs file in which acknowledged writes live until the other site has them.

Written by one tap, read by one shipper, looked at by the watchdog. Layout (also in docs/formats.md), native 64-bit
words so that each store is one instruction:

    0       8192  header: 1024 words, see Word
    8192    slots × 48  descriptors; sequence s lives in slot s % slots
    then    data area, `data_capacity` bytes, page aligned

    descriptor (48 bytes)
         0    8  sequence
         8    8  data_position: monotonic; the bytes are at data_position % data_capacity, never wrapped inside a record
        16    8  offset on the disk, in sectors
        24    4  length, in sectors
        28    2  disk number
        30    1  kind: 1 write, 2 zero (no data)
        31    1  zero
        32    8  monotonic nanoseconds when it was accepted
        40    4  data_checksum: CRC-32 of the data, sampled when it is long, see data_checksum
        44    4  descriptor_checksum: CRC-32 of the 44 bytes before

A record is published (Word.PUBLISHED) after it is whole and before the write is acknowledged. Law:
released <= shipped <= published; published - released <= slots - 1.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from zlib import crc32

MAGIC = int.from_bytes(b"DRRING02", "little")
HEADER_SIZE = 8192
DESCRIPTOR = struct.Struct("<QQQIHBBQII")
DESCRIPTOR_SIZE = DESCRIPTOR.size
RECORD_WRITE = 1
RECORD_ZERO = 2
#: First word of the per-disk table, and words per disk (see DiskWord).
DISK_TABLE = 64
DISK_WORDS = 7
#: Disks of one group on one host, bounded by the header's space. Entries stand in the order in which the creator
#: named them; DiskWord.NUMBER tells whose each is.
MAX_DISKS = (HEADER_SIZE // 8 - DISK_TABLE) // DISK_WORDS

#: Data up to this length is summed whole; of longer data the first 4 KiB of each 64 KiB, and the last 4 KiB.
_SUMMED_WHOLE = 16 * 1024
_SAMPLE = 4 * 1024
_STRIDE = 64 * 1024


def data_checksum(data: bytes | memoryview) -> int:
    """The checksum of a record's data.

    It finds records that were overwritten or that are not where their descriptor says: those differ at their edges
    first. zlib sums 3.7 GB/s (measured), so a whole sum would cost a large write more than receiving it does, and the
    guest waits. From the shipper on, frames carry checksums of every byte."""
    length = len(data)
    if length <= _SUMMED_WHOLE:
        return crc32(data)
    checksum = crc32(data[length - _SAMPLE :])
    for start in range(0, length, _STRIDE):
        checksum = crc32(data[start : start + _SAMPLE], checksum)
    return checksum


class Word(IntEnum):
    """Index of each header word. Who writes it stands in brackets."""

    MAGIC = 0  # [creator]
    GENERATION = 1  # [creator]
    EPOCH_HIGH = 2  # [creator]
    EPOCH_LOW = 3  # [creator]
    SLOTS = 4  # [creator]
    DATA_CAPACITY = 5  # [creator]
    TAP_PID = 6  # [tap]
    HEARTBEAT = 7  # [tap] CLOCK_MONOTONIC nanoseconds, at least every 100 ms
    PUBLISHED = 8  # [tap] sequence of the newest whole record, 0 at first
    RELEASED = 9  # [shipper] all up to here is durable at the other site, or in the spill (store/spill.py)
    DATA_HEAD = 10  # [tap] next data_position
    ORDER_STAMP = 11  # [tap] +1 at every loss of order, before another write is accepted
    ORDERED_STAMP = 12  # [supervisor] the ORDER_STAMP for which order was proven
    ORDERED_SEQUENCE = 13  # [supervisor] first ordered position under that stamp
    DROPPING = 14  # [tap] 1: payloads are dropped and bits set in the dirty maps
    DROPPED = 15  # [tap] writes dropped so far
    DRAIN_REQUEST = 16  # [shipper] +1: swap the dirty maps, please
    DRAIN_DONE = 17  # [tap] = DRAIN_REQUEST once swapped
    ACTIVE_MAP = 18  # [tap] 0 or 1: where drops are noted; the other belongs to the shipper
    READER_WAITING = 19  # [shipper sets 1, tap clears when it has rung the bell]
    SHIPPER_PID = 20  # [shipper]
    SHIPPER_HEARTBEAT = 21  # [shipper] CLOCK_MONOTONIC nanoseconds
    DISKS = 22  # [creator] number of disks
    LAST_REASON = 23  # [tap] OrderReason of the newest ORDER_STAMP
    CONNECTIONS = 24  # [tap] connection numbers given so far under this epoch
    LOSSES = 25  # [tap] +1 at every loss of order but the end of a connection that said goodbye
    ORDERED_LOSSES = 26  # [supervisor] LOSSES when order was proven for ORDERED_STAMP


class DiskWord(IntEnum):
    """Index in a disk's words. [tap]"""

    CONNECTION = 0  # number of the current connection, 0 when there is none; never reused under one epoch
    WRITES = 1
    BYTES = 2
    SIZE = 3  # [creator] bytes
    NUMBER = 4  # [creator] the disk's number in its group
    ENDED = 5  # CLOCK_MONOTONIC nanoseconds when its newest connection ended by a goodbye; 0: it lives, or was lost
    WRITTEN = 6  # CLOCK_MONOTONIC nanoseconds at which its newest record was published, 0: none


class OrderReason(IntEnum):
    """Why order was lost."""

    NONE = 0
    TAP_RESTARTED = 1
    CONNECTION_LOST = 2
    WRITE_REFUSED = 3
    RING_FULL = 4
    CYCLE = 5  # a snapshot cycle is being written (ESX): the disks are no point in time
