"""A group's store with a base, a journal over it, and an oracle: what each disk is at each checkpoint."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from drctl.model.group import GroupDisk, Retention
from drctl.store.group_store import GroupStore
from drctl.store.journal import SealPolicy
from drctl.store.replica import base_path
from drctl.wire.frame import EXTENT, EXTENT_WRITE, EXTENT_ZERO, FrameKind, Span, pack, split

EPOCH = "0123456789abcdef" * 2
FRAME = 65536


class StoreRig:
    """Writes go to the store and to `images` (name → bytearray), `marks` keeps copies of those when asked to."""

    def __init__(self, root: Path, group: str, disks: list[GroupDisk], bases: dict[str, bytes], segment: int = 1 << 26):
        self.root = root
        self.group = group
        self.disks = {disk.name: disk for disk in disks}
        self.images = {disk.name: bytearray(disk.size) for disk in disks}
        self.marks: dict[int, dict[str, bytes]] = {}
        self.sequence = 0
        self.number = 0
        GroupStore.create(root, group, 1, disks, Retention()).close()
        for name, data in bases.items():
            self.images[name][: len(data)] = data
            with base_path(root, self.disks[name]).open("r+b") as file:
                for offset in range(0, len(data), 1 << 20):
                    part = data[offset : offset + (1 << 20)]
                    if part.count(0) != len(part):
                        file.seek(offset)
                        file.write(part)
        self.store = GroupStore.open(root, writer=True, policy=SealPolicy(size=segment))
        self.store.begin_stream("a1", 1, EPOCH)
        self._control(FrameKind.SYNC_BEGIN, sync="a" * 32, mode="initial", disks={})
        self._control(FrameKind.SYNC_END, sync="a" * 32)
        self.store.sync()

    def _span(self, partial: bool = False) -> Span:
        return Span(1, EPOCH, self.sequence, self.sequence, partial)

    def _send(self, *frames: bytes) -> None:
        self.store.append([item for frame in frames for item in split(memoryview(frame), "rig")])

    def _control(self, frame: FrameKind, **fields) -> None:
        self._send(pack(frame, self._span(), None, json.dumps(fields).encode()))

    def define(self, machines: list[dict], spec: dict) -> None:
        """A DEFINITION frame: machines are {name, uuid, definition}."""
        disks = [
            {"number": d.number, "machine": d.machine, "target": d.target, "size": d.size} for d in self.disks.values()
        ]
        self._control(
            FrameKind.DEFINITION,
            version=1,
            spec=spec,
            machines=machines,
            disks=disks,
            source_site="alpha",
            source_host="a1",
        )

    def write(self, name: str, offset: int, data: bytes) -> None:
        self.sequence += 1
        self.images[name][offset : offset + len(data)] = data
        frames = []
        for start in range(0, len(data), FRAME):
            part = data[start : start + FRAME]
            table = self._table(name, offset + start, len(part), EXTENT_WRITE)
            frames.append(pack(FrameKind.DATA, self._span(start + FRAME < len(data)), table, part))
        self._send(*frames)

    def write_many(self, name: str, writes: list[tuple[int, bytes]]) -> None:
        """Small writes packed into frames of 64 KiB, as the shipper does."""
        disk, batch, size = self.disks[name], [], 0
        for index, (offset, data) in enumerate(writes):
            self.images[name][offset : offset + len(data)] = data
            batch.append((offset, data))
            size += len(data)
            if size + 4096 > FRAME or index + 1 == len(writes):
                table, position = np.zeros(len(batch), EXTENT), 0
                for row, (where, payload) in enumerate(batch):
                    table[row] = (where // 512, len(payload) // 512, disk.number, EXTENT_WRITE, 0, position, row)
                    position += len(payload)
                span = Span(1, EPOCH, self.sequence + 1, self.sequence + len(batch))
                self._send(pack(FrameKind.DATA, span, table, b"".join(payload for _, payload in batch)))
                self.sequence += len(batch)
                batch, size = [], 0

    def zero(self, name: str, offset: int, length: int) -> None:
        self.sequence += 1
        self.images[name][offset : offset + length] = bytes(length)
        self._send(pack(FrameKind.DATA, self._span(), self._table(name, offset, length, EXTENT_ZERO), b""))

    def _table(self, name: str, offset: int, length: int, kind: int):
        table = np.zeros(1, EXTENT)
        table[0] = (offset // 512, length // 512, self.disks[name].number, kind, 0, 0, 0)
        return table

    def mark(self, *, keep: bool = True, **fields) -> int:
        """A proven, durable checkpoint."""
        self.number += 1
        if keep:
            self.marks[self.number] = {name: bytes(image) for name, image in self.images.items()}
        body = {"number": self.number, "kind": "crash-consistent", "sequence": self.sequence, **fields}
        self._control(FrameKind.MARK, wall_ns=time.time_ns(), **body)
        self._control(FrameKind.PROOF, number=self.number, wall_ns=time.time_ns())
        self.store.sync()
        return self.number

    def close(self) -> None:
        self.store.close()
