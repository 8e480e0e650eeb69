"""The history: what was changed is noted with its outcome, what only reads is not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from drctl.appliance import history as recorded
from drctl.appliance.history import History
from drctl.errors import WrongPhase


def refuse(params, progress):
    raise WrongPhase("web is paused")


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "history.jsonl")


def test_a_changing_method_is_noted_with_who_and_what(history: History) -> None:
    handlers = history.watch({"test.start": lambda params, progress: {"id": "t1"}})
    params = {"group": "web", "checkpoint": "#12", "machines": ["db"], "by": "ann"}
    assert handlers["test.start"](params, print) == {"id": "t1"}
    (entry,) = handlers["appliance.history"]({"group": "", "limit": 5}, print)
    assert entry["user"] == "ann"
    assert (entry["method"], entry["group"], entry["outcome"]) == ("test.start", "web", "done")
    assert entry["detail"] == "checkpoint #12, machines db"


def test_a_failure_is_noted_and_still_raised(history: History) -> None:
    handlers = history.watch({"replicate.pause": refuse})
    with pytest.raises(WrongPhase):
        handlers["replicate.pause"]({"group": "web"}, print)
    assert history.entries()[0]["outcome"] == "wrong-phase"
    assert history.entries()[0]["detail"] == "web is paused"


def test_reading_and_processes_are_no_history(history: History) -> None:
    handlers = history.watch({name: lambda params, progress: {} for name in ("group.status", "shipper.report")})
    for handler in list(handlers.values())[:2]:
        handler({}, print)
    assert history.entries() == []


def test_group_put_is_noted_under_its_group(history: History) -> None:
    history.watch({"group.put": lambda params, progress: {}})["group.put"]({"spec": {"name": "web"}}, print)
    assert [entry["group"] for entry in history.entries("web")] == ["web"]
    assert history.entries("other") == []


def test_newest_entries_oldest_first(history: History) -> None:
    for number in range(5):
        history.note("checkpoint.tag", {"group": "web", "tags": [str(number)]}, "done")
    assert [entry["detail"] for entry in history.entries(limit=2)] == ["tags 3", "tags 4"]


def test_a_torn_last_line_is_left_out(history: History, tmp_path: Path) -> None:
    history.note("commit", {"group": "web"}, "done")
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"time": 1, "met')
    assert [entry["method"] for entry in history.entries()] == ["commit"]


def test_a_full_disk_does_not_fail_what_was_done(tmp_path: Path) -> None:
    history = History(tmp_path / "absent" / "history.jsonl")
    assert history.watch({"commit": lambda params, progress: {"ok": 1}})["commit"]({"group": "web"}, print) == {"ok": 1}


#: Methods that change nothing, or not because a person said so.
READING = {
    "appliance.history", "appliance.info", "appliance.metrics", "certificate.show", "checkpoint.choose", "checkpoint.list",
    "checkpoint.verify", "checkpoint.ages", "recovery.screen", "run.anchored", "run.list", "run.read", "failback.disks", "failback.plan", "failback.sample", "failover.plan", "group.describe", "group.fit", "group.list", "group.picture",
    "group.status", "handover.plan", "host.evacuation", "lease.show", "link.list", "machine.list", "rollback.plan", "support.collect", "test.list",
}  # fmt: skip
#: Between processes; a part of a command that is in it; an act of a run, which has a record of its own.
WITHIN = {
    "shipper.attest", "shipper.order", "shipper.report", "certificate.request", "lease.take", "lease.renew", "lease.release",
    "recovery.agent", "recovery.boot", "recovery.console",
    # A run's record, chained and signed, tells more than a line for each of its lines could.
    "run.anchor", "run.append", "run.begin", "run.end", "run.renew",
}  # fmt: skip


def test_every_method_that_changes_something_is_in_the_history() -> None:
    """Whoever adds a method says here what it is, or in CHANGING."""
    found = set()
    room = Path(recorded.__file__).parent
    # Words of other files that look like methods.
    others = {room / "recovery" / "memory.py", room / "install" / "vm_text.py"}
    for path in set(room.rglob("*.py")) - others:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
                found |= {
                    key
                    for key in keys
                    if re.fullmatch(r"[a-z]+\.[a-z_]+", key) and not key.endswith((".json", ".sock"))
                }
    found |= {"resync", "rollback", "commit"}
    assert found - READING - WITHIN == set(recorded.CHANGING)
