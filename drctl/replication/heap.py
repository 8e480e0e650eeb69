"""glibc's heap, tuned for processes that make and drop buffers of a MiB all day.

By default such a buffer is mapped anew each time: 256 page faults and 256 cleared pages per MiB, measured as the
largest single cost of shipper and receiver. With these settings it is reused, and given back when the stream rests.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
#: Larger than any message of the link.
_LARGEST = 8 * 1024 * 1024
#: Free memory that stays ours while data flows.
_KEPT = 32 * 1024 * 1024
#: Buffers pass from thread to thread; an arena for each would keep a peak for each.
_ARENAS = 2
#: Without a byte for so long the memory is given back.
REST_SECONDS = 2.0


def settle() -> None:
    """To be called once, before there are threads. Does nothing where the C library is not glibc."""
    with suppress(AttributeError):
        library = ctypes.CDLL(None)
        for option, value in ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _KEPT), (_M_ARENA_MAX, _ARENAS)):
            library.mallopt(ctypes.c_int(option), ctypes.c_int(value))


def trim() -> None:
    """Give free memory back to the system: takes a few ms."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


class Rest:
    """Trims once after each time that data flowed. `look` is called now and then with a count of bytes."""

    def __init__(self) -> None:
        self._count = 0
        self._since = 0.0
        self._trimmed = 0

    def look(self, count: int, now: float) -> None:
        """`count`: all bytes that have passed; `now`: seconds. The same count for REST_SECONDS is a rest."""
        if count != self._count:
            self._count, self._since = count, now
        elif count != self._trimmed and now - self._since >= REST_SECONDS:
            self._trimmed = count
            trim()
