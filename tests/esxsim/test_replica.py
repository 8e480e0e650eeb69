"""Disks written to a simulated host's datastore: whole or not there, gone on with, holes kept; and small files."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import HostUnreachable, HypervisorRefused, Interrupted
from drctl.hypervisor.esx.disks import Disks
from drctl.hypervisor.esx.replica import ALIGN, PIECE, CopyNote, ReplicaDisks, part_of, pieces
from drctl.hypervisor.esx.session import Session
from drctl.model.extent import Extent
from tests.esxsim import host as simulator
from tests.esxsim.host import MIB, Door, EsxSim

if reason := simulator.lacking():
    pytest.skip(reason, allow_module_level=True)


class Image:
    """A disk in memory; `data` says where it is no hole."""

    def __init__(self, size: int, data: list[tuple[int, int]]) -> None:
        self.size = size
        self._data = [Extent(offset, length) for offset, length in data]
        content = random.Random(size)
        self.bytes = bytearray(size)
        for one in self._data:
            self.bytes[one.offset : one.end] = content.randbytes(one.length)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.bytes[offset : offset + length])

    def extents(self, offset: int, length: int) -> Iterator[tuple[Extent, bool]]:
        at, end = offset, offset + length
        for one in self._data:
            begin, stop = max(one.offset, at), min(one.end, end)
            if begin >= stop:
                continue
            if begin > at:
                yield Extent(at, begin - at), False
            yield Extent(begin, stop - begin), True
            at = stop
        if at < end:
            yield Extent(at, end - at), False


class Notes:
    def __init__(self) -> None:
        self.notes: dict[str, CopyNote] = {}

    def load(self, path: str) -> CopyNote | None:
        return self.notes.get(path)

    def save(self, note: CopyNote) -> None:
        self.notes[note.path] = note

    def remove(self, path: str) -> None:
        self.notes.pop(path, None)


@pytest.fixture
def sim() -> Iterator[EsxSim]:
    one = EsxSim()
    yield one
    one.close()


def replica(sim: EsxSim, notes: Notes | None = None, door: Door | None = None) -> ReplicaDisks:
    session = Session("esx1", door or Door(sim))
    return ReplicaDisks(session, Disks(session), notes or Notes())


def place(sim: EsxSim, path: str) -> Path:
    return sim.hostd.real(path)


def quietly(done: int, total: int) -> None:
    assert done <= total


IMAGE = Image(12 * MIB, [(0, 512), (2 * MIB, 6 * MIB + 100), (11 * MIB + 512, MIB - 512)])
PATH = "/vmfs/volumes/datastore1/drctl-recovery/web it's/web.vda.vmdk"


@given(
    st.integers(1, 40 * PIECE // ALIGN).flatmap(
        lambda blocks: st.tuples(
            st.just(blocks * ALIGN),
            st.lists(st.tuples(st.integers(0, blocks * ALIGN - 1), st.integers(1, 3 * PIECE)), max_size=8),
            st.integers(0, blocks * ALIGN),
        )
    )
)
@settings(max_examples=50)
def test_pieces_hold_all_data_in_order(drawn: tuple[int, list[tuple[int, int]], int]) -> None:
    size, wanted, begin = drawn
    data, at = [], 0
    for offset, length in sorted(wanted):
        offset = max(offset, at)
        length = min(length, size - offset)
        if length > 0:
            data.append((offset, length))
            at = offset + length
    image = Image.__new__(Image)
    image.size, image._data = size, [Extent(*one) for one in data]
    begin = begin // ALIGN * ALIGN
    found = list(pieces(image, begin))
    assert all(0 < one.length <= PIECE and one.offset % ALIGN == 0 and one.end <= size for one in found)
    assert all(first.end <= second.offset for first, second in itertools.pairwise(found))
    for offset, length in data:
        low = max(offset, begin)
        assert sum(max(0, min(one.end, offset + length) - max(one.offset, low)) for one in found) == max(
            0, offset + length - low
        )


def test_a_disk_is_written_whole_and_thin(sim: EsxSim, tmp_path: Path) -> None:
    notes, told = Notes(), []
    disks = replica(sim, notes)
    disks.write(PATH, IMAGE, "one", lambda done, total: told.append((done, total)))
    flat = place(sim, PATH.replace(".vmdk", "-flat.vmdk"))
    assert flat.read_bytes() == bytes(IMAGE.bytes)
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1]
    assert told[-1][0] <= 8 * MIB
    assert sorted(one.name for one in flat.parent.iterdir()) == ["web.vda-flat.vmdk", "web.vda.vmdk"]
    argv = ["qemu-img", "convert", "-O", "raw", str(place(sim, PATH)), str(tmp_path / "raw")]
    subprocess.run(argv, check=True)
    assert (tmp_path / "raw").read_bytes() == bytes(IMAGE.bytes)
    info = json.loads(
        subprocess.run(
            ["qemu-img", "info", "--output=json", str(place(sim, PATH))], capture_output=True, check=True
        ).stdout
    )
    assert (info["format"], info["virtual-size"]) == ("vmdk", IMAGE.size)
    assert disks.allocated(PATH) > 0
    assert disks.grown(PATH) == 0
    with flat.open("r+b") as file:
        file.seek(9 * MIB)
        file.write(b"x" * 8192)
    assert disks.grown(PATH) == 8192
    before = len(sim.hostd.ran)
    disks.write(PATH, IMAGE, "one", quietly)
    assert len(sim.hostd.ran) == before
    disks.delete(PATH)
    disks.delete(PATH)
    assert not list(flat.parent.iterdir())


def test_a_lost_connection_at_any_command_is_gone_on_with(sim: EsxSim) -> None:
    """Before and after the work of each: the next call ends with the same disk, and nothing else beside it."""
    image = Image(3 * MIB, [(0, 512), (2 * MIB, 512)])
    door = Door(sim)
    whole = replica(sim, door=door)
    whole.write(PATH, image, "one", quietly)
    count = door.count
    whole.delete(PATH)
    for event in ("begin", "end"):
        for number in range(1, count + 1):
            notes, door = Notes(), Door(sim)
            door.drop = (event, number)
            disks = replica(sim, notes, door)
            with pytest.raises(HostUnreachable):
                disks.write(PATH, image, "one", quietly)
            disks.write(PATH, image, "one", quietly)
            flat = place(sim, PATH.replace(".vmdk", "-flat.vmdk"))
            assert flat.read_bytes() == bytes(image.bytes), (event, number)
            assert len(list(flat.parent.iterdir())) == 2, (event, number)
            disks.delete(PATH)


def test_what_was_written_is_not_written_again_but_of_another_origin(sim: EsxSim) -> None:
    notes = Notes()
    disks = replica(sim, notes)

    def stop(done: int, total: int) -> None:
        if done >= PIECE:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        disks.write(PATH, IMAGE, "one", stop)
    notes.notes[PATH] = CopyNote(PATH, "one", 6 * MIB, 4 * MIB)  # as if it had been noted at that moment
    assert not disks.exists(PATH)
    place(sim, part_of(PATH).replace(".vmdk", "-flat.vmdk")).write_bytes(bytes(IMAGE.bytes[: 6 * MIB]) + bytes(6 * MIB))
    first: list[int] = []
    disks.write(PATH, IMAGE, "one", lambda done, _total: first.append(done))
    assert first[0] == 4 * MIB
    assert place(sim, PATH.replace(".vmdk", "-flat.vmdk")).read_bytes() == bytes(IMAGE.bytes)
    disks.delete(PATH)

    other = Image(12 * MIB, [(2 * MIB, MIB)])
    with pytest.raises(Interrupted):
        disks.write(PATH, IMAGE, "one", stop)
    disks.write(PATH, other, "two", quietly)
    assert place(sim, PATH.replace(".vmdk", "-flat.vmdk")).read_bytes() == bytes(other.bytes)


def test_a_disk_that_is_held_or_a_store_that_is_read_only_is_told(sim: EsxSim) -> None:
    disks = replica(sim)
    disks.write(PATH, IMAGE, "one", quietly)
    sim.hostd.held.add(place(sim, PATH.replace(".vmdk", "-flat.vmdk")))
    with pytest.raises(HypervisorRefused):
        disks.delete(PATH)
    sim.hostd.held.clear()
    sim.hostd.datastores[0].read_only = True
    with pytest.raises(HypervisorRefused):
        disks.write(PATH.replace("vda", "vdb"), IMAGE, "one", quietly)


def test_a_small_file_is_there_whole_or_not(sim: EsxSim) -> None:
    door = Door(sim)
    disks = replica(sim, door=door)
    path, data = "/vmfs/volumes/datastore1/drctl-recovery/a b/x.vmx", b'displayName = "x"\n' * 99
    disks.put(path, data)
    count = door.count
    assert place(sim, path).read_bytes() == data
    for event in ("begin", "end"):
        for number in range(1, count + 1):
            door.count, door.drop = 0, (event, number)
            with pytest.raises(HostUnreachable):
                disks.put(path, hashlib.sha256(data).digest())
            assert place(sim, path).read_bytes() in (data, hashlib.sha256(data).digest())
            door.drop = None
            disks.put(path, data)
    disks.remove_directory(path.rpartition("/")[0])
    disks.remove_directory(path.rpartition("/")[0])
    assert not place(sim, path).parent.exists()
