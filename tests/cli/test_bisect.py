"""`drctl checkpoint bisect`: test boots judged by a script, found again after an end, nothing left behind."""

from __future__ import annotations

import json
import threading
import time

import pytest

from drctl.errors import ApplianceUnreachable, OutOfSpace, StepFailed
from tests.cli.appliance import NOW, checkpoint, recovery

#: The last good one is #57; #60 can't be judged.
SCRIPT = """#!/bin/sh
echo "$DRCTL_CHECKPOINT" >> tried
read -r test; echo "$test" | grep -q '"group"' || exit 9
[ "$DRCTL_CHECKPOINT" -eq 60 ] && exit 125
echo "rows: $DRCTL_MACHINES"
[ "$DRCTL_CHECKPOINT" -le 57 ]
"""


@pytest.fixture
def web(world, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    applied = world.applied()
    applied.beta.checkpoints = [checkpoint(number, 1000.0 - number) for number in range(1, 101)]
    applied.lock, applied.at_once, applied.most = threading.Lock(), 0, 0
    write(tmp_path, SCRIPT)

    def start(params, progress):
        with applied.lock:
            number = int(params["checkpoint"].removeprefix("#"))
            test = recovery("test", "web", id=f"t{number}", label=params["label"])
            applied.beta.tests.append(test)
            applied.most = max(applied.most, len(applied.beta.tests))
        return test

    applied.beta.replies["test.start"] = start
    memory(applied, 64, 1)
    return applied


def memory(world, available: int, each: int) -> None:
    """GiB that the host has, and that each of the two machines takes."""
    plan = world.beta.call("failover.plan", {"group": "web"})
    plan["machines"] = [{**one, "memory": each * 2**30} for one in plan["machines"]]
    world.beta.replies["failover.plan"] = plan
    info = world.beta._appliance_info({})
    world.beta.replies["appliance.info"] = info | {
        "memory": {"total": available * 2**31, "available": available * 2**30}
    }


def write(directory, text: str) -> None:
    (directory / "check").write_text(text)
    (directory / "check").chmod(0o755)


def bisect(world, *arguments: str):
    return world("checkpoint", "bisect", "web", "--check", "./check", "--yes", *arguments)


def tried(world) -> list[int]:
    return [int(line) for line in (world.directory / "tried").read_text().split()]


def test_the_newest_good_one_is_found_and_told(web) -> None:
    result = bisect(web, "--parallel", "1")
    assert result.code == 0, result.err
    assert "newest good checkpoint: #57 at " in result.out
    assert "oldest bad one after it: #58 at " in result.out
    assert "to recover to it: drctl failover web --checkpoint '#57' --source-is-down REASON" in result.err
    assert "drctl checkpoint tag web '#57'" in result.err
    assert (tried(web)[0], web.beta.tests) == (100, [])
    assert len(tried(web)) <= 9
    assert "#100, 15m ago: bad (exited with 1: rows: db front; " in result.err


def test_it_is_found_several_at_a_time(web) -> None:
    result = bisect(web, "--parallel", "3", "-o", "json")
    assert (result.code, result.json["good"]["number"], result.json["bad"]["number"]) == (0, 57, 58)
    assert (web.most, web.beta.tests) == (3, [])
    assert result.json["next"].startswith("drctl failover web --checkpoint '#57'")


@pytest.mark.parametrize(("available", "most"), [(64, 4), (6, 2), (3, 1), (1, 1)])
def test_no_more_at_a_time_than_memory_allows(web, available: int, most: int) -> None:
    memory(web, available, 1)
    result = bisect(web)
    assert (result.code, web.most) == (0, most)
    assert f"{most} at a time (2.0 GiB each, {available}.0 GiB available)" in result.err


def test_memory_that_is_not_known_is_one_at_a_time(web) -> None:
    del web.beta.replies["appliance.info"]
    assert bisect(web).code == 0
    assert web.most == 1


def test_ends_that_are_known_are_not_tried(web) -> None:
    result = bisect(web, "--good", "#50", "--bad", "#70", "--parallel", "1", "-o", "json")
    assert (result.code, result.json["good"]["number"]) == (0, 57)
    assert all(50 < number < 70 for number in tried(web))
    assert {one["number"] for one in result.json["tries"]} == set(tried(web))
    assert bisect(web, "--good", "#70", "--bad", "#50").code == 2
    assert bisect(web, "--good", "#700").code == 11


def test_the_newest_is_good(web) -> None:
    write(web.directory, "#!/bin/sh\nexit 0\n")
    result = bisect(web, "--parallel", "1")
    assert (result.code, len(web.beta.called("test.start"))) == (0, 1)
    assert "newest good checkpoint: #100" in result.out
    assert "none after it is bad" in result.out


def test_none_is_good(web) -> None:
    write(web.directory, "#!/bin/sh\nexit 3\n")
    result = bisect(web)
    assert (result.code, "none of the checkpoints of web that were tried is good" in result.err) == (40, True)
    assert web.beta.tests == []


def test_what_was_skipped_and_hides_the_answer_is_3(web) -> None:
    write(web.directory, SCRIPT.replace("-eq 60", "-eq 58"))
    result = bisect(web, "-o", "json")
    assert (result.code, result.json["good"]["number"], result.json["bad"]["number"]) == (3, 57, 59)
    assert result.json["skipped"] == [58]
    assert "could not be judged, and may be good, too: #58" in result.err


def test_one_that_does_not_boot_is_skipped(web) -> None:
    start = web.beta.replies["test.start"]

    def refusing(params, progress):
        if params["checkpoint"] == "#100":
            raise StepFailed("its view can't be opened")
        if params["checkpoint"] == "#50":
            return start(params, progress) | {"state": "failed", "machines": [{"name": "db", "reason": "no disk"}]}
        return start(params, progress)

    web.beta.replies["test.start"] = refusing
    result = bisect(web, "--parallel", "1")
    assert result.code == 0
    assert "#100, 15m ago: skip (its view can't be opened" in result.err
    assert "#50, 15m 50s ago: skip (no machine runs: no disk" in result.err
    assert web.beta.tests == []


def test_a_check_at_its_time_limit_is_bad(web) -> None:
    write(web.directory, "#!/bin/sh\n[ $DRCTL_CHECKPOINT -lt 99 ] || sleep 60\n")
    result = bisect(web, "--check-timeout", "500ms", "--bad", "#100", "--good", "#98")
    assert (result.code, "#99, 15m 1s ago: bad (time limit of 0.5 s" in result.err) == (0, True)


def test_what_can_not_be_run_boots_nothing(web) -> None:
    result = web("checkpoint", "bisect", "web", "--check", "./none", "--yes")
    assert (result.code, web.beta.called("test.start")) == (43, [])
    assert web("checkpoint", "bisect", "web", "--yes").code == 2
    assert web("checkpoint", "bisect", "web", "--check", "'", "--yes").code == 2


def test_it_asks_and_a_dry_run_boots_nothing(web) -> None:
    arguments = ("checkpoint", "bisect", "web", "--check", "./check")
    result = web(*arguments, "--dry-run")
    assert (result.code, "would run ./check for each" in result.err) == (0, True)
    assert "8 tries one after the other at most" in result.err
    assert web(*arguments).code == 14
    assert web(*arguments, typed="n\n").code == 41
    assert web.beta.called("test.start") == []


def test_a_tag_keeps_it(web) -> None:
    assert bisect(web, "--tag", "last-good").code == 0
    assert [row["number"] for row in web.beta.checkpoints if row["tags"]] == [57]


def test_it_goes_on_after_an_appliance_was_gone(web) -> None:
    start, count = web.beta.replies["test.start"], [0]

    def failing(params, progress):
        count[0] += 1
        test = start(params, progress)
        if count[0] == 4:
            raise ApplianceUnreachable("the connection broke")
        return test

    web.beta.replies["test.start"] = failing
    result = bisect(web, "--parallel", "1")
    assert (result.code, web.beta.tests) == (22, []), "what got no answer is removed, too"
    before = tried(web)
    assert len(before) == 3
    again = web("checkpoint", "bisect", "web", "--resume", "--yes", "-o", "json")
    assert (again.code, again.json["good"]["number"]) == (0, 57)
    assert len(tried(web)) == len(set(tried(web))), "none is tried twice"
    assert web("checkpoint", "bisect", "web", "--resume", "--yes").code == 11


@pytest.mark.long  # it interrupts the test process itself
def test_ctrl_c_removes_what_runs_and_it_goes_on_later(web) -> None:
    write(
        web.directory,
        SCRIPT.replace("read -r test", "[ $DRCTL_CHECKPOINT -eq 50 ] && { kill -INT $PPID; sleep 30; }; read -r test"),
    )
    begun = time.monotonic()
    result = bisect(web, "--parallel", "1")
    assert (result.code, web.beta.tests) == (41, [])
    assert time.monotonic() - begun < 15
    assert "drctl checkpoint bisect web --resume" in result.err
    write(web.directory, SCRIPT)
    again = web("checkpoint", "bisect", "web", "--resume", "--yes", "-o", "json")
    assert (again.code, again.json["good"]["number"]) == (0, 57)


def test_a_host_without_room_gets_fewer_at_a_time(web) -> None:
    start = web.beta.replies["test.start"]

    def crowded(params, progress):
        with web.lock:
            full = len(web.beta.tests) >= 2
        if full:
            raise OutOfSpace("a test needs 16 GiB of scratch")
        return start(params, progress)

    web.beta.replies["test.start"] = crowded
    result = bisect(web, "--parallel", "4", "-o", "json")
    assert (result.code, result.json["good"]["number"]) == (0, 57), result.err
    assert web.most <= 2


def test_checkpoints_that_come_meanwhile_are_not_looked_at(web) -> None:
    assert bisect(web, "--parallel", "1").code == 0
    (path,) = (web.directory / "bisects").glob("*.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]))
    web.beta.checkpoints += [checkpoint(number, 1000.0 - number) for number in range(101, 150)]
    web.beta.checkpoints = web.beta.checkpoints[20:]
    again = web("checkpoint", "bisect", "web", "--resume", "--yes", "-o", "json")
    assert (again.code, again.json["good"]["number"]) == (0, 57)
    assert max(tried(web)) == 100


def test_one_of_a_group_at_a_time(web) -> None:
    inner: list[int] = []
    start = web.beta.replies["test.start"]

    def nested(params, progress):
        if not inner:
            inner.append(0)
            inner[0] = bisect(web).code
        return start(params, progress)

    web.beta.replies["test.start"] = nested
    bisect(web, "--parallel", "1")
    assert inner == [13]


def test_the_record_tells_each_step(web) -> None:
    assert bisect(web, "--parallel", "1").code == 0
    (path,) = (web.directory / "bisects").glob("*.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["bisect", "over"]
    assert (events[-1]["good"], events[-1]["bad"]) == (57, 58)
    first = next(event for event in events if event["event"] == "tried")
    assert (first["number"], first["answer"], first["code"], first["output"]) == (100, "bad", 1, "rows: db front\n")
    assert events[0]["time"] == NOW
