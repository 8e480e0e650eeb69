"""Files that are sent to a simulated host: whole or not at all, going on after a lost connection."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from drctl.errors import HostUnreachable, HypervisorRefused, IntegrityError
from drctl.hypervisor.esx import upload
from drctl.hypervisor.esx.session import Session
from drctl.hypervisor.esx.upload import Uploads
from tests.esxsim.host import Door, EsxSim, lacking

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())


@pytest.fixture
def sim() -> Iterator[EsxSim]:
    sim = EsxSim()
    yield sim
    sim.close()


@pytest.mark.long
def test_a_file_goes_on_after_a_connection_lost_at_any_command(
    sim: EsxSim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "CHUNK", 1000)
    source = tmp_path / "file"
    source.write_bytes(os.urandom(2500))
    place = "/vmfs/volumes/datastore1/it's a file"
    count = 1
    for event in ("begin", "end"):
        for number in range(1, 30):
            door = Door(sim)
            uploads = Uploads(Session("esx1", door), door)
            door.drop = (event, number)
            try:
                uploads.put(place, source)
            except HostUnreachable:
                pass
            else:
                assert number > 5
                break
            door.drop = None
            uploads.put(place, source)
            assert sim.hostd.real(place).read_bytes() == source.read_bytes()
            assert not sim.hostd.real(f"{place}.part").exists()
            sim.hostd.real(place).unlink()
            count += 1
        sim.hostd.real(place).unlink()
    assert count > 12
    door = Door(sim)
    uploads = Uploads(Session("esx1", door), door)
    assert uploads.put(place, source)
    assert not uploads.put(place, source)


def test_what_arrives_otherwise_is_thrown_away(sim: EsxSim, tmp_path: Path) -> None:
    door = Door(sim)
    uploads = Uploads(Session("esx1", door), door)
    source = tmp_path / "file"
    source.write_bytes(b"x" * 2000)
    sim.hostd.real("/vmfs/volumes/datastore1/f.part").write_bytes(b"y" * 100)
    with pytest.raises(IntegrityError, match="arrived damaged"):
        uploads.put("/vmfs/volumes/datastore1/f", source)
    assert uploads.put("/vmfs/volumes/datastore1/f", source)
    sim.hostd.real("/vmfs/volumes/datastore1/g.part").write_bytes(b"y" * 3000)
    assert uploads.put("/vmfs/volumes/datastore1/g", source)
    assert uploads.put_text("/vmfs/volumes/datastore1/h", b"one")
    assert not uploads.put_text("/vmfs/volumes/datastore1/h", b"one")
    assert uploads.put_text("/vmfs/volumes/datastore1/h", b"two")
    assert sim.hostd.real("/vmfs/volumes/datastore1/h").read_bytes() == b"two"
    with pytest.raises(HypervisorRefused, match="can't be written"):
        uploads.put("/vmfs/volumes/datastore1/no/such", source)
