"""Screens as small PNGs, read back here by PNG's own rules."""

from __future__ import annotations

import struct
import zlib

import pytest

from drctl.errors import IntegrityError
from drctl.hypervisor.picture import PNG, small_png


def decoded(png: bytes) -> tuple[int, int, list[list[tuple[int, int, int]]]]:
    """Width, height and colours; every chunk's checksum is looked at."""
    assert png.startswith(PNG)
    at, chunks = len(PNG), {}
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length)[0] == zlib.crc32(kind + data)
        chunks[kind] = data
        at += 12 + length
    width, height, depth, colour = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    assert (depth, colour, list(chunks)[-1]) == (8, 3, b"IEND")
    palette = [tuple(chunks[b"PLTE"][3 * n : 3 * n + 3]) for n in range(256)]
    raw = zlib.decompress(chunks[b"IDAT"])
    rows = [raw[y * (width + 1) : (y + 1) * (width + 1)] for y in range(height)]
    assert all(row[0] == 0 for row in rows)
    return width, height, [[palette[index] for index in row[1:]] for row in rows]


def ppm(width: int, height: int, *colours: tuple[int, int, int]) -> bytes:
    pixels = (colours * (width * height))[: width * height] if len(colours) == 1 else colours
    return b"P6\n%d %d\n255\n" % (width, height) + b"".join(bytes(one) for one in pixels)


def test_a_small_screen_keeps_its_pixels() -> None:
    dump = ppm(2, 2, (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
    red, green, blue, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    assert decoded(small_png(dump)) == (2, 2, [[red, green], [blue, white]])


@pytest.mark.parametrize(
    ("size", "shrunk"), [((720, 400), (360, 200)), ((1920, 1080), (480, 270)), ((481, 3), (240, 1))]
)
def test_a_large_one_is_shrunk(size: tuple[int, int], shrunk: tuple[int, int]) -> None:
    width, height, rows = decoded(small_png(ppm(*size, (255, 255, 255))))
    assert ((width, height), rows[0][0]) == (shrunk, (255, 255, 255))


def test_an_empty_text_screen_takes_little() -> None:
    assert len(small_png(ppm(720, 400, (0, 0, 0)))) < 1500


def test_a_png_stays_as_it_is() -> None:
    png = small_png(ppm(1, 1, (1, 2, 3)))
    assert small_png(png) is png


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"P6\n2 2\n255\nxx", b"P6\n0 5\n255\n", b"P6\n99999 99999\n255\nx"])
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        small_png(data)
