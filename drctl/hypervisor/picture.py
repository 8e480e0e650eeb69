"""A machine's screen as a small PNG: what fits into a record and a report. Pure."""

from __future__ import annotations

import re
import struct
import zlib

import numpy as np
import numpy.typing as npt

from drctl.errors import IntegrityError

#: A text console of 80 columns is still read at that.
WIDTH = 480
#: A display larger than that is no machine's screen.
MOST_PIXELS = 64 * 1024 * 1024
PNG = b"\x89PNG\r\n\x1a\n"
#: A binary portable pixmap, as QEMU dumps a screen; comments are not made by it.
_HEAD = re.compile(rb"P6\s+(\d{1,5})\s+(\d{1,5})\s+255\s", re.DOTALL)


def small_png(data: bytes) -> bytes:
    """A PNG of 256 fixed colours, at most WIDTH pixels wide, of a screen dump; a PNG stays as it is.

    Raises IntegrityError when it is neither."""
    if data.startswith(PNG):
        return data
    head = _HEAD.match(data)
    if head is None:
        raise IntegrityError("the screen's picture is neither PPM nor PNG")
    width, height = int(head[1]), int(head[2])
    size = width * height * 3
    if not 0 < width * height <= MOST_PIXELS or len(data) < head.end() + size:
        raise IntegrityError(f"the screen's picture is not whole: {width} by {height} in {len(data)} bytes")
    pixels = np.frombuffer(data, np.uint8, size, head.end()).reshape(height, width, 3)
    return _encode(_colours(_shrunk(pixels)))


def _shrunk(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Each square of pixels becomes their mean, so that thin letters stay visible."""
    height, width, _ = pixels.shape
    factor = -(-width // WIDTH)
    if factor == 1:
        return pixels
    height, width = max(1, height // factor), max(1, width // factor)
    squares = pixels[: height * factor, : width * factor].reshape(height, -1, width, factor, 3)
    means: npt.NDArray[np.uint8] = squares.mean(axis=(1, 3)).astype(np.uint8)
    return means


def _colours(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Indexes into the palette: three bits of red and green, two of blue."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    indexes: npt.NDArray[np.uint8] = ((red & 0xE0) | ((green & 0xE0) >> 3) | (blue >> 6)).astype(np.uint8)
    return indexes


def _palette() -> bytes:
    levels = [(index >> 5, index >> 2 & 7, index & 3) for index in range(256)]
    return bytes(part for red, green, blue in levels for part in (red * 255 // 7, green * 255 // 7, blue * 85))


def _encode(indexes: npt.NDArray[np.uint8]) -> bytes:
    height, width = indexes.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter: none
    rows[:, 1:] = indexes
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    body = zlib.compress(rows.tobytes(), 9)
    return PNG + b"".join(
        _chunk(*each) for each in ((b"IHDR", head), (b"PLTE", _palette()), (b"IDAT", body), (b"IEND", b""))
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
