"""Builds the files of a big journal directly: real headers, tables, checksums, indexes; payloads that compress well.

Each segment holds 16,384 writes of 4 KiB (64 MiB of guest data) at random places of one disk, in frames of 16; each
64 KiB payload is one repeated byte, `fill(log)`, so that a reader can tell which segment a block came from."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np

from drctl.model.group import GroupDisk, Retention
from drctl.store.extent_map import entries_of, resolve
from drctl.store.group_info import StoreMode
from drctl.store.group_store import GroupStore
from drctl.store.run import RunWriter, run_path
from drctl.store.segment import HEADER_SIZE, Segment, SegmentHeader, StreamKey, segment_path
from drctl.store.tier import Indexer
from drctl.wire.frame import EXTENT, EXTENT_WRITE, FrameKind, Span, pack

EPOCH = "0123456789abcdef" * 2
STREAM = StreamKey("host-a", 1, EPOCH)
PER_FRAME = 16
PER_SEGMENT = 16384
BLOCK = 4096
START = 1_700_000_000.0


def fill(log: int) -> int:
    """The byte that all blocks of a segment consist of; never 0, so that the base shows."""
    return log % 251 + 1


def blocks_of(log: int, disk_size: int) -> np.ndarray:
    """The block numbers that a segment writes, in order."""
    return np.random.default_rng(log).integers(0, disk_size // BLOCK, PER_SEGMENT, dtype=np.uint64)


def _control(kind: FrameKind, sequence: int, /, **fields) -> bytes:
    return pack(kind, Span(1, EPOCH, sequence, sequence), None, json.dumps(fields).encode())


def _segment(root: Path, log: int, disk_size: int) -> tuple[Segment, np.ndarray, list[int]]:
    sequence = (log - 1) * PER_SEGMENT
    table = np.zeros(PER_SEGMENT, EXTENT)
    table["offset"] = blocks_of(log, disk_size) * np.uint64(BLOCK // 512)
    table["length"] = BLOCK // 512
    table["disk"] = 1
    table["kind"] = EXTENT_WRITE
    table["payload_offset"] = np.arange(PER_SEGMENT) % PER_FRAME * BLOCK
    table["sequence_delta"] = np.arange(PER_SEGMENT) % PER_FRAME
    model = pack(FrameKind.DATA, Span(1, EPOCH, 1, 16), table[:PER_FRAME], bytes([fill(log)]) * (PER_FRAME * BLOCK))
    stored = model[64 + PER_FRAME * EXTENT.itemsize :]
    parts = [SegmentHeader(STREAM, log, log, sequence, log - 1).pack("big")]
    offsets, position = [], HEADER_SIZE
    raw = table.tobytes()
    step = PER_FRAME * EXTENT.itemsize
    for start in range(0, len(raw), step):
        body = raw[start : start + step] + stored
        head = model[:8] + struct.pack("<QQ", sequence + 1, sequence + PER_FRAME) + model[24:36]
        head += zlib.crc32(body).to_bytes(4, "little") + model[40:60]
        parts += (head, zlib.crc32(head).to_bytes(4, "little"), body)
        offsets.append(position)
        position += 64 + len(body)
        sequence += PER_FRAME
        if start // step in (PER_SEGMENT // PER_FRAME // 2, PER_SEGMENT // PER_FRAME - 1):
            number = 2 * log - (1 if start // step < PER_SEGMENT // PER_FRAME - 1 else 0)
            wall = int((START + 5 * number) * 1e9)
            control = _control(
                FrameKind.MARK, sequence, number=number, kind="crash-consistent", sequence=sequence, wall_ns=wall
            ) + _control(FrameKind.PROOF, sequence, number=number, wall_ns=wall)
            parts.append(control)
            position += len(control)
    path = segment_path(root, STREAM, log, log)
    path.write_bytes(b"".join(parts))
    return Segment(path, log, log, position), table, offsets


def build(root: Path, records: int, disk_size: int) -> int:
    """Make a store of `records` writes; returns its number of segments. The newest one stays unsealed."""
    GroupStore.create(root, "big", 1, [GroupDisk(1, "web", "vda", disk_size)], Retention(journal_limit=1 << 50)).close()
    store = GroupStore.open(root)
    store.set_mode(StoreMode.JOURNAL)
    store.close()
    segment_path(root, STREAM, 1, 1).parent.mkdir(parents=True)
    (root / "runs").mkdir()
    count = max(1, records // PER_SEGMENT)
    for log in range(1, count + 1):
        segment, table, offsets = _segment(root, log, disk_size)
        if log < count:
            entries = entries_of([table], [0], log)
            entries["frame"] = np.repeat(np.array(offsets, np.uint32), PER_FRAME)
            writer = RunWriter(run_path(root, log, log), [segment])
            writer.add(resolve(entries))
            writer.finish(entries, _controls(segment))
    Indexer(root, "big").build(0)
    GroupStore.open(root, writer=True).close()
    return count


def _controls(segment: Segment):
    """The control frames, as the writer would have seen them: found by their kind, in a file just written."""
    from drctl.store.content import Control, control_fields
    from drctl.store.segment import PlacedFrame
    from drctl.wire.frame import unpack_header

    data, controls, position = memoryview(segment.path.read_bytes()), [], HEADER_SIZE
    while position < len(data):
        lengths = struct.unpack_from("<III", data, position + 24)
        size = 64 + lengths[0] * EXTENT.itemsize + lengths[2]
        if data[position + 5] > FrameKind.SYNC:
            header = unpack_header(data[position : position + 64], "")
            frame = PlacedFrame(position, header, data[position : position + size])
            fields = control_fields(frame)
            controls.append(Control(header.kind, position, position + size, 1, EPOCH, fields))
        position += size
    return controls
