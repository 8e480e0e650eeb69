"""A disk as its frozen layers have it together, read over SSH in large pieces, the next one ahead of who reads on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from drctl.errors import UnsupportedFormat
from drctl.hypervisor.redo_log import ZERO, RedoLog
from drctl.model.extent import Extent, MiB

#: A round trip costs some 20 ms, 8 MiB over SSH some 40: large enough that the first does not count.
WINDOW = 8 * MiB
#: Windows that are kept: those of the reads that are under way, and the next ones.
KEPT = 6
#: Windows that are fetched at a time.
AHEAD = 2

#: The bytes of a file at these ranges. Raises HostUnreachable, HypervisorRefused.
Fetch = Callable[[str, Sequence[Extent]], Sequence[bytes]]


class FrozenDisk:
    """A base file and the redo logs over it, oldest first. Any thread may read.

    Raises what `fetch` raises; UnsupportedFormat for a redo log of odd grains. A place beyond the disk's end is a
    ValueError."""

    def __init__(self, fetch: Fetch, base: str, size: int, logs: Sequence[tuple[str, RedoLog]] = ()) -> None:
        if odd := next((log for _, log in logs if WINDOW % log.grain), None):
            raise UnsupportedFormat(f"a {odd.kind} redo log with grains of {odd.grain} bytes")
        self.size = size
        self._fetch = fetch
        self._base = base
        self._logs = tuple(logs)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AHEAD, "frozen")
        #: What was fetched, or is being fetched; an empty window reads as zeroes.
        self._windows: OrderedDict[int, Future[bytes]] = OrderedDict()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with what the disk has from `offset` on."""
        end = offset + len(buffer)
        if offset < 0 or end > self.size:
            raise ValueError(f"{len(buffer)} bytes at {offset} of a disk of {self.size}")
        for begin in range(offset // WINDOW * WINDOW, end, WINDOW):
            data = self._window(begin).result()
            first, last = max(offset, begin), min(end, begin + WINDOW)
            part = data[first - begin : last - begin] if data else bytes(last - first)
            buffer[first - offset : last - offset] = part

    def extents(self, offset: int, length: int) -> Iterator[tuple[Extent, bool]]:
        """All of it as data: what is a hole there is not known before it is read."""
        if length:
            yield Extent(offset, length), True

    def _window(self, begin: int) -> Future[bytes]:
        """A window, and those after it begun."""
        with self._lock:
            wanted = self._begun(begin)
            for ahead in range(1, AHEAD):
                if begin + ahead * WINDOW < self.size:
                    self._begun(begin + ahead * WINDOW)
            self._windows.move_to_end(begin)
            while len(self._windows) > KEPT:
                self._windows.popitem(last=False)
            return wanted

    def _begun(self, begin: int) -> Future[bytes]:
        found = self._windows.get(begin)
        # One that failed is fetched anew by whoever asks again: the connection may be back.
        if found is None or (found.done() and found.exception() is not None):
            found = self._windows[begin] = self._pool.submit(self._gather, begin)
        return found

    def _gather(self, begin: int) -> bytes:
        """The base's bytes, with those of each redo log over them."""
        length = min(WINDOW, self.size - begin)
        (below,) = self._fetch(self._base, [Extent(begin, length)])
        # A base that ends early is one that was never written there.
        data = bytearray(below.ljust(length, b"\0"))
        for path, log in self._logs:
            self._overlay(data, begin, path, log)
        return b"" if data.count(0) == len(data) else bytes(data)

    def _overlay(self, data: bytearray, begin: int, path: str, log: RedoLog) -> None:
        """Put a redo log's grains over the window. Grains are smaller than windows and never lie across them."""
        first, last = (int(at) for at in np.searchsorted(log.offsets, [begin, begin + len(data)]))
        offsets, places = log.offsets[first:last] - begin, log.places[first:last]
        for offset in offsets[places == ZERO].tolist():
            end = min(offset + log.grain, len(data))
            data[offset:end] = bytes(end - offset)
        there = places != ZERO
        offsets, places = offsets[there], places[there]
        if not len(offsets):
            return
        breaks = np.flatnonzero((np.diff(places) != log.grain) | (np.diff(offsets) != log.grain)) + 1
        starts, ends = [0, *breaks.tolist()], [*breaks.tolist(), len(offsets)]
        ranges = [Extent(int(places[a]), (b - a) * log.grain) for a, b in zip(starts, ends, strict=True)]
        for a, wanted, got in zip(starts, ranges, self._fetch(path, ranges), strict=True):
            offset = int(offsets[a])
            end = min(offset + wanted.length, len(data))
            # ESXi may not have written the last grain to its end.
            data[offset:end] = got.ljust(wanted.length, b"\0")[: end - offset]
