"""Builds the files of a big journal directly: real headers, tables, checksums, indexes; payloads that compress well.

Each segment holds 16,384 writes of 4 KiB (64 MiB of guest data) at random places of one disk, in frames of 16; each
64 KiB payload is one repeated byte, `fill(log)`, so that a reader can tell which segment a block came from."""

from __future__ import annotations

import json
import struct
import time
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drctl.model.group import GroupDisk, Retention
from drctl.store.extent_map import entries_of, resolve
from drctl.store.group_info import StoreMode
from drctl.store.group_store import GroupStore
from drctl.store.run import RunWriter, run_path
from drctl.store.segment import HEADER_SIZE, Segment, SegmentHeader, StreamKey, list_segments, segment_path
from drctl.store.tier import Indexer
from drctl.wire.frame import EXTENT, EXTENT_WRITE, FrameKind, Span, pack, split

EPOCH = "0123456789abcdef" * 2
STREAM = StreamKey("host-a", 1, EPOCH)
PER_FRAME = 16
PER_SEGMENT = 16384
BLOCK = 4096
START = 1_700_000_000.0
PIECE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """Whose journal it is, and where in it the generated segments begin. `spacing`: seconds between marks."""

    group: str
    stream: StreamKey
    disk: int
    size: int
    before: int = 0
    marks: int = 0
    start: float = START
    spacing: float = 5.0


def fill(log: int) -> int:
    """The byte that all blocks of a segment consist of; never 0, so that the base shows."""
    return log % 251 + 1


def blocks_of(log: int, disk_size: int) -> np.ndarray:
    """The block numbers that a segment writes, in order."""
    return np.random.default_rng(log).integers(0, disk_size // BLOCK, PER_SEGMENT, dtype=np.uint64)


def _marks(shape: Shape, number: int, sequence: int) -> bytes:
    """A MARK and its PROOF."""
    span = Span(shape.stream.generation, shape.stream.epoch, sequence, sequence)
    wall = int((shape.start + shape.spacing * number) * 1e9)
    mark = {"number": shape.marks + number, "kind": "crash-consistent", "sequence": sequence, "wall_ns": wall}
    proof = {"number": shape.marks + number, "wall_ns": wall}
    return pack(FrameKind.MARK, span, None, json.dumps(mark).encode()) + pack(
        FrameKind.PROOF, span, None, json.dumps(proof).encode()
    )


def _segment(root: Path, shape: Shape, index: int) -> tuple[Segment, np.ndarray, list[int]]:
    """The segment number `index`, counted from 1."""
    log, sequence, stream = shape.before + index, (index - 1) * PER_SEGMENT, shape.stream
    table = np.zeros(PER_SEGMENT, EXTENT)
    table["offset"] = blocks_of(index, shape.size) * np.uint64(BLOCK // 512)
    table["length"] = BLOCK // 512
    table["disk"] = shape.disk
    table["kind"] = EXTENT_WRITE
    table["payload_offset"] = np.arange(PER_SEGMENT) % PER_FRAME * BLOCK
    table["sequence_delta"] = np.arange(PER_SEGMENT) % PER_FRAME
    span = Span(stream.generation, stream.epoch, 1, 16)
    model = pack(FrameKind.DATA, span, table[:PER_FRAME], bytes([fill(index)]) * (PER_FRAME * BLOCK))
    stored = model[64 + PER_FRAME * EXTENT.itemsize :]
    parts = [SegmentHeader(stream, log, log, sequence, shape.marks + index - 1).pack(shape.group)]
    offsets, position = [], HEADER_SIZE
    raw = table.tobytes()
    step = PER_FRAME * EXTENT.itemsize
    frames = PER_SEGMENT // PER_FRAME
    for frame, start in enumerate(range(0, len(raw), step), 1):
        body = raw[start : start + step] + stored
        head = model[:8] + struct.pack("<QQ", sequence + 1, sequence + PER_FRAME) + model[24:36]
        head += zlib.crc32(body).to_bytes(4, "little") + model[40:60]
        parts += (head, zlib.crc32(head).to_bytes(4, "little"), body)
        offsets.append(position)
        position += 64 + len(body)
        sequence += PER_FRAME
        if frame in (frames // 2 + 1, frames):
            controls = _marks(shape, 2 * index - (frame != frames), sequence)
            parts.append(controls)
            position += len(controls)
    path = segment_path(root, stream, log, log)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(parts))
    return Segment(path, log, log, position), table, offsets


def _write(root: Path, shape: Shape, count: int, indexed: int) -> None:
    """`count` segments, the first `indexed` of them with their runs."""
    (root / "runs").mkdir(exist_ok=True)
    for index in range(1, count + 1):
        segment, table, offsets = _segment(root, shape, index)
        if index <= indexed:
            entries = entries_of([table], [0], segment.first)
            entries["frame"] = np.repeat(np.array(offsets, np.uint32), PER_FRAME)
            writer = RunWriter(run_path(root, segment.first, segment.last), [segment])
            writer.add(resolve(entries))
            writer.finish(entries, _controls(segment, shape.stream))


def build(root: Path, records: int, disk_size: int) -> int:
    """Make a store of `records` writes; returns its number of segments. The newest one stays unsealed."""
    GroupStore.create(root, "big", 1, [GroupDisk(1, "web", "vda", disk_size)], Retention(journal_limit=1 << 50)).close()
    store = GroupStore.open(root)
    store.set_mode(StoreMode.JOURNAL)
    store.close()
    count = max(1, records // PER_SEGMENT)
    _write(root, Shape("big", STREAM, 1, disk_size), count, count - 1)
    Indexer(root, "big").build(0)
    GroupStore.open(root, writer=True).close()
    return count


def extend(root: Path, records: int, filled: str, kept: str, kept_bytes: int) -> int:
    """Put `records` writes to disk `filled` behind what a store holds, then the first `kept_bytes` of disk `kept`
    written anew as they are, so that a guest that boots from it reads the journal. Returns the newest checkpoint's
    number. Nobody else may have the store open."""
    with_store = GroupStore.open(root, writer=True)
    info, newest = with_store.info, with_store.newest()
    assert newest is not None
    with_store.seal()
    disks = {disk.name: disk for disk in info.disks}
    view = with_store.open_view(newest.number, newest.epoch)
    content = [bytes(view.disk(kept).read(offset, PIECE)) for offset in range(0, kept_bytes, PIECE)]
    view.close()
    with_store.close()
    tail = list_segments(root)[0].tail
    stream = StreamKey("generator", info.generation, uuid.uuid4().hex)
    count = max(1, records // PER_SEGMENT)
    # All marks of the last minutes: a journal in which nothing is due to be merged or promoted.
    spacing = min(1.0, 600.0 / (2 * count))
    start = time.time() - spacing * (2 * count + 2)
    disk = disks[filled]
    shape = Shape(
        info.group, stream, disk.number, disk.size, tail.last if tail else 0, newest.number, start, spacing
    )  # fmt: skip
    _write(root, shape, count, count)
    Indexer(root, info.group).build(info.base_position)
    return _rewrite(root, stream, count * PER_SEGMENT, disks[kept].number, content, newest.number + 2 * count + 1)


def _rewrite(root: Path, stream: StreamKey, sequence: int, disk: int, content: list[bytes], number: int) -> int:
    """Append `content` and a checkpoint through the store itself."""
    store = GroupStore.open(root, writer=True)
    place = store.begin_stream(stream.host, stream.generation, stream.epoch)
    assert place.sequence == sequence, (place, sequence)
    for index, piece in enumerate(content, 1):
        extent = np.zeros(1, EXTENT)
        extent["offset"], extent["length"] = (index - 1) * PIECE // 512, PIECE // 512
        extent["disk"], extent["kind"] = disk, EXTENT_WRITE
        span = Span(stream.generation, stream.epoch, sequence + index, sequence + index)
        store.append(list(split(memoryview(pack(FrameKind.DATA, span, extent, piece)), "generator")))
    end = sequence + len(content)
    span = Span(stream.generation, stream.epoch, end, end)
    mark = {"number": number, "kind": "crash-consistent", "sequence": end, "wall_ns": time.time_ns()}
    for kind in (FrameKind.MARK, FrameKind.PROOF):
        store.append(list(split(memoryview(pack(kind, span, None, json.dumps(mark).encode())), "generator")))
    store.sync()
    store.seal()
    store.close()
    return number


def _controls(segment: Segment, stream: StreamKey):
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
            controls.append(Control(header.kind, position, position + size, stream.generation, stream.epoch, fields))
        position += size
    return controls
