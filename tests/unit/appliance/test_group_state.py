"""The source's memory of a group: whole on disk, numbers never reused, a machine in one group only."""

from pathlib import Path

import pytest

from drctl.appliance.source.group_state import Desired, GroupFiles, GroupState, spec_from
from drctl.errors import AlreadyExists, IntegrityError, NotFound
from drctl.model.group import GroupSpec
from drctl.model.machine import Disk, Machine, MachineState


def _spec(name: str = "web", *machines: str) -> GroupSpec:
    return GroupSpec(name, "alpha", "beta", machines or ("web-1",))


def _machine(name: str, *targets: str) -> Machine:
    disks = tuple(Disk(target, f"/images/{name}.{target}", "raw", 4096) for target in targets)
    return Machine(name, "uuid", MachineState.RUNNING, disks)


def test_what_is_put_is_loaded_by_the_next_supervisor(tmp_path: Path) -> None:
    state = GroupFiles(tmp_path).put(_spec())
    assert GroupFiles(tmp_path).load("web") == state


def test_a_changed_spec_keeps_the_rest(tmp_path: Path) -> None:
    files = GroupFiles(tmp_path)
    files.put(_spec())
    import msgspec

    files.save(msgspec.structs.replace(files.load("web"), generation=7, desired=Desired.PROTECTED))
    changed = files.put(GroupSpec("web", "alpha", "beta", ("web-1",), checkpoint_interval=2.0))
    assert (changed.generation, changed.desired, changed.spec.checkpoint_interval) == (7, Desired.PROTECTED, 2.0)


def test_a_machine_belongs_to_one_group(tmp_path: Path) -> None:
    files = GroupFiles(tmp_path)
    files.put(_spec("web", "web-1", "web-2"))
    with pytest.raises(AlreadyExists, match="'web-2' is protected by group 'web' already"):
        files.put(_spec("db", "db-1", "web-2"))
    assert files.names() == ["web"]


def test_numbers_of_disks_are_never_reused() -> None:
    state = GroupState(_spec("web", "a", "b")).with_machines([_machine("a", "vda", "vdb"), _machine("b", "vda")])
    assert [(d.name, d.number) for d in state.disks] == [("a.vda", 0), ("a.vdb", 1), ("b.vda", 2)]
    fewer = state.with_machines([_machine("a", "vda"), _machine("b", "vda")])
    again = fewer.with_machines([_machine("a", "vda", "vdb"), _machine("b", "vda")])
    assert [(d.name, d.number) for d in again.disks] == [("a.vda", 0), ("a.vdb", 3), ("b.vda", 2)]


def test_a_damaged_file_is_named_and_not_believed(tmp_path: Path) -> None:
    files = GroupFiles(tmp_path)
    files.put(_spec())
    (tmp_path / "web.json").write_text('{"spec": 3}')
    with pytest.raises(IntegrityError, match=r"web\.json"):
        files.load("web")


def test_an_unknown_group_tells_the_known_ones(tmp_path: Path) -> None:
    files = GroupFiles(tmp_path)
    files.put(_spec())
    with pytest.raises(NotFound) as caught:
        files.load("wbe")
    assert "web" in caught.value.hint


def test_a_spec_of_another_version_is_refused() -> None:
    with pytest.raises(IntegrityError, match="not a group"):
        spec_from({"name": "web"})
