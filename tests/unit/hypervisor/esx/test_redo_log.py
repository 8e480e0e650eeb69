"""The reader of redo logs against the simulator's writer and qemu-img; every wrong bit of structure is refused or harmless."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drctl.errors import HostUnreachable, IntegrityError, UnsupportedFormat
from drctl.hypervisor import redo_log
from drctl.hypervisor.esx.frozen import FrozenDisk
from drctl.model.extent import Extent
from tests.esxsim import formats

MIB = 1 << 20
SIZE = 4 * MIB
KINDS = {"seSparse": (formats.SeSparse, "-sesparse.vmdk"), "vmfsSparse": (formats.VmfsSparse, "-delta.vmdk")}
kinds = pytest.mark.parametrize("kind", list(KINDS))
writes = st.lists(st.tuples(st.integers(0, SIZE // 4096 - 1), st.integers(1, 5)), max_size=12)


def reader(data: bytes) -> redo_log.Read:
    def read(ranges: Sequence[Extent]) -> list[bytes]:
        return [data[one.offset : one.end] for one in ranges]

    return read


def make(kind: str, place: Path, size: int = SIZE) -> tuple[formats.SeSparse | formats.VmfsSparse, Path]:
    """An empty redo log on a base of bytes that are no zeroes, and its descriptor."""
    cls, suffix = KINDS[kind]
    (place / "a-flat.vmdk").write_bytes(b"\x11" * size)
    (place / "a.vmdk").write_text(formats.descriptor("vmfs", size // 512, "a-flat.vmdk"))
    text = formats.descriptor(kind, size // 512, f"a-000001{suffix}", parent=("fffffffe", "a.vmdk"))
    (place / "a-000001.vmdk").write_text(text)
    return cls.create(place / f"a-000001{suffix}", size), place / "a-000001.vmdk"


def over_base(log: redo_log.RedoLog, data: bytes, size: int = SIZE, at_once: int = redo_log.READ) -> bytes:
    """The base with the redo log's grains on it."""
    disk = bytearray(b"\x11" * size)
    for extent, is_data in log.extents():
        if not is_data:
            disk[extent.offset : extent.end] = bytes(extent.length)
    for offset, piece in redo_log.grains(log, reader(data), at_once=at_once):
        disk[offset : offset + len(piece)] = piece
    return bytes(disk)


@kinds
@given(writes, st.integers(0, 2**32), st.sampled_from([512, 8192, redo_log.READ]))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_is_read(
    kind: str, tmp_path: Path, places: list[tuple[int, int]], seed: int, at_once: int
) -> None:
    file, _ = make(kind, tmp_path)
    model, chance = bytearray(b"\x11" * SIZE), random.Random(seed)
    for grain, count in places:
        data = chance.randbytes(min(count * 4096, SIZE - grain * 4096))
        file.write(grain * 4096, data)
        model[grain * 4096 : grain * 4096 + len(data)] = data
        if isinstance(file, formats.SeSparse) and chance.random() < 0.3:
            file.mark(grain * 4096, chance.choice([1, 2]))
            model[grain * 4096 : (grain + 1) * 4096] = bytes(4096)
    raw = file.path.read_bytes()
    log = redo_log.parse(reader(raw), len(raw))
    assert over_base(log, raw, at_once=at_once) == bytes(model)
    extents = [extent for extent, _ in log.extents()]
    assert all(one.end <= other.offset for one, other in pairwise(extents))
    # What qemu judges of the same file is in test_qemu_reads_the_same.


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")
@kinds
@pytest.mark.parametrize("seed", range(3))
def test_qemu_reads_the_same(kind: str, seed: int, tmp_path: Path) -> None:
    size = 20 * MIB if kind == "seSparse" else SIZE  # more than one table
    file, descriptor = make(kind, tmp_path, size)
    chance = random.Random(seed)
    for _ in range(40):
        offset = chance.randrange(size // 4096) * 4096
        file.write(offset, chance.randbytes(4096 * chance.randint(1, 8))[: size - offset])
    if isinstance(file, formats.SeSparse):
        for kind_of in (1, 2):
            file.mark(chance.randrange(size // 4096) * 4096, kind_of)
    argv = ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(descriptor), str(tmp_path / "raw")]
    subprocess.run(argv, check=True)
    raw = file.path.read_bytes()
    log = redo_log.parse(reader(raw), len(raw))
    assert over_base(log, raw, size) == (tmp_path / "raw").read_bytes()


@kinds
def test_an_empty_one(kind: str, tmp_path: Path) -> None:
    file, _ = make(kind, tmp_path)
    raw = file.path.read_bytes()
    log = redo_log.parse(reader(raw), len(raw))
    assert (log.kind, log.capacity, log.extents(), log.data_bytes) == (kind, SIZE, [], 0)
    assert list(redo_log.grains(log, reader(raw))) == []


def test_a_disk_that_ends_within_a_grain(tmp_path: Path) -> None:
    size = SIZE + 512
    file, _ = make("seSparse", tmp_path, size)
    file.write(SIZE, b"\x22" * 4096)
    raw = file.path.read_bytes()
    log = redo_log.parse(reader(raw), len(raw))
    assert log.extents() == [(Extent(SIZE, 512), True)]
    assert [(offset, len(piece)) for offset, piece in redo_log.grains(log, reader(raw))] == [(SIZE, 512)]


def test_one_with_a_journal_is_refused(tmp_path: Path) -> None:
    file, _ = make("seSparse", tmp_path)
    assert isinstance(file, formats.SeSparse)
    file.set_dirty(True)
    raw = file.path.read_bytes()
    with pytest.raises(IntegrityError, match="journal to be replayed"):
        redo_log.parse(reader(raw), len(raw))


@kinds
def test_what_is_cut_is_refused(kind: str, tmp_path: Path) -> None:
    file, _ = make(kind, tmp_path)
    for grain in (0, 5, 900):
        file.write(grain * 4096, b"x" * 4096)
    raw = file.path.read_bytes()
    for cut in [*range(1, 4096, 97), len(raw) // 2, len(raw) - 1]:
        short = raw[:-cut]
        try:
            log = redo_log.parse(reader(short), len(short))
            pieces = b"".join(bytes(piece) for _, piece in redo_log.grains(log, reader(short)))
        except IntegrityError:
            continue
        assert cut < log.grain, cut  # a last grain that was not written to its end
        assert len(pieces) == 3 * 4096


@kinds
@given(st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_wrong_bit_of_structure_never_ends_in_another_error(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever the file says: refused, or extents within the disk."""
    file, _ = make(kind, tmp_path)
    file.write(8192, b"x" * 12288)
    raw = bytearray(file.path.read_bytes())
    hot = [0, 2048, 512, MIB, MIB + 512] if kind == "seSparse" else [0, 2048, 2560]
    place = data.draw(st.sampled_from(hot)) + data.draw(st.integers(0, 60))
    raw[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        log = redo_log.parse(reader(bytes(raw)), len(raw))
        list(redo_log.grains(log, reader(bytes(raw))))
    except IntegrityError:
        return
    assert all(extent.end <= log.capacity for extent, _ in log.extents())


@pytest.mark.parametrize("data", [b"", b"x" * 512, b"KDMV" + bytes(508), struct.pack("<Q", 0xCAFEBABE)])
def test_what_is_no_redo_log(data: bytes) -> None:
    with pytest.raises(UnsupportedFormat):
        redo_log.parse(reader(data), len(data))


@kinds
@given(writes, writes, st.integers(0, 2**32))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_frozen_chain_is_read_as_one_disk(
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
    older: list[tuple[int, int]],
    newer: list[tuple[int, int]],
    seed: int,
) -> None:
    """A base and two redo logs, over several windows and at odd places, against a plain array."""
    size = 20 * MIB + 512
    chance, disk = random.Random(seed), bytearray(b"\x11" * size)
    files, logs = {"base": bytes(disk)}, []
    for name, some in (("older", older), ("newer", newer)):
        log, descriptor = make(kind, tmp_path_factory.mktemp("chain"), size)
        for block, count in [*some, (size // 4096 - 1, 1)]:
            offset = block * 4096 + chance.choice([0, 8 * MIB, 12 * MIB])
            data = chance.choice([chance.randbytes(4096 * count), bytes(4096 * count)])[: size - offset]
            formats.write(descriptor, offset, data)
            disk[offset : offset + len(data)] = data
        files[name] = log.path.read_bytes()
        logs.append((name, redo_log.parse(reader(files[name]), len(files[name]))))
    frozen = FrozenDisk(lambda path, ranges: reader(files[path])(ranges), "base", size, logs)
    try:
        assert frozen.read(0, size) == bytes(disk)
        for _ in range(5):
            offset = chance.randrange(size)
            length = chance.randrange(size - offset)
            assert frozen.read(offset, length) == bytes(disk[offset : offset + length])
        with pytest.raises(ValueError):
            frozen.read(size - 1, 2)
    finally:
        frozen.close()


def test_a_window_that_could_not_be_fetched_is_fetched_anew() -> None:
    failing = [True]

    def fetch(path: str, ranges: Sequence[Extent]) -> list[bytes]:
        if failing[0]:
            raise HostUnreachable("away")
        return [b"\x22" * one.length for one in ranges]

    frozen = FrozenDisk(fetch, "base", MIB)
    with pytest.raises(HostUnreachable):
        frozen.read(0, 10)
    failing[0] = False
    assert frozen.read(0, 10) == b"\x22" * 10
    frozen.close()
