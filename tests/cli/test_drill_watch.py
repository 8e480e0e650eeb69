"""What watches drills from outside: the monitoring plugin, and the command that is told of runs."""

from __future__ import annotations

import json

import pytest

from drctl.cli.config import load_config
from drctl.errors import ConfigInvalid
from tests.cli.appliance import NOW
from tests.cli.test_check import split

PLAN = """\
plan = "web"
groups = ["web"]
[[stage]]
name = "data"
all_of = ["web"]
[[stage.check]]
kind = "command"
run = ["/bin/sh", "-c", "test ! -e broken"]
interval = "100ms"
retries = 0
"""
DAY = 86400


@pytest.fixture
def plans(world):
    (world.directory / "plans").mkdir()
    (world.directory / "plans/web.toml").write_text(PLAN)
    return world.applied()


def drill(world) -> int:
    return world("plan", "run", "web", "--mode", "test", "--yes").code


def test_a_good_drill_ages(plans) -> None:
    assert drill(plans) == 0
    code, text, perf = split(plans("check", "drill", "web"))
    assert (code, text) == (0, "DRCTL DRILL OK: web: last good drill 0 ms ago")
    assert perf[0] == "'web drill age'=0s;;2592000;0"
    plans.clock.now += 8 * DAY
    assert plans("check", "drill", "web").code == 0
    code, text, _ = split(plans("check", "drill", "web", "--max-age", "7d"))
    assert (code, "last good drill 8d" in text) == (2, True)
    assert plans("check", "drill", "web", "-w", "7d").code == 1
    assert plans("check", "drill").code == 0
    plans.clock.now += 23 * DAY
    assert plans("check", "drill").code == 2


def test_no_drill_and_a_failed_one_are_critical(plans) -> None:
    code, text, perf = split(plans("check", "drill", "web"))
    assert (code, "no good drill here: it was never drilled" in text, "'web drill age'=U;;2592000;0" in perf) == (
        2,
        True,
        True,
    )
    (plans.directory / "plans/broken").touch()
    assert drill(plans) == 40
    assert "no good drill here: its last drill failed (2027" in plans("check", "drill", "web").out
    (plans.directory / "plans/broken").unlink()
    plans.clock.now += DAY
    assert drill(plans) == 0
    assert plans("check", "drill", "web").code == 0
    (plans.directory / "plans/broken").touch()
    plans.clock.now += DAY
    assert drill(plans) == 40
    code, text, _ = split(plans("check", "drill", "web"))
    assert (code, "its last drill failed" in text, "last good drill 1d ago" in text) == (2, True, True)


def test_a_drill_that_somebody_stopped_says_nothing(plans) -> None:
    assert drill(plans) == 0
    path = plans.directory / "plans/web.toml"
    path.write_text(PLAN.replace("test ! -e broken", "kill -INT $PPID; sleep 1"))
    plans.clock.now += DAY
    assert drill(plans) == 41
    path.write_text(PLAN)
    assert split(plans("check", "drill", "web"))[0] == 0


def test_a_plan_that_was_changed_since_is_a_warning(plans) -> None:
    assert drill(plans) == 0
    (plans.directory / "plans/web.toml").write_text(PLAN + "# changed\n")
    code, text, _ = split(plans("check", "drill", "web"))
    assert (code, "the plan was changed since" in text) == (1, True)


def test_what_can_not_be_looked_at_is_unknown(plans) -> None:
    assert split(plans("check", "drill", "wep"))[0] == 3
    (plans.directory / "plans/bad.toml").write_text("plan = 'bad'")
    assert drill(plans) == 0
    assert plans("check", "drill").code == 3
    assert plans("check", "rpo", "--max-age", "1d").code == 3


def test_all_looks_at_the_plans_of_the_group(plans) -> None:
    result = plans("check", "all", "web")
    assert (result.code, "web: no good drill here" in result.out) == (2, True)
    assert drill(plans) == 0
    assert "last good drill" in plans("check", "all", "web").out


def hooked(world, script: str, limit: str = "10s") -> None:
    file = world.directory / "drctl.toml"
    told = json.dumps(["/bin/sh", "-c", script])
    file.write_text(f'notify = {told}\nnotify_timeout = "{limit}"\n' + file.read_text())


def test_a_command_is_told_of_a_runs_beginning_and_end(plans) -> None:
    hooked(plans, 'echo "$DRCTL_EVENT $DRCTL_PLAN $DRCTL_MODE $DRCTL_VERDICT" >> told; cat >> json')
    assert drill(plans) == 0
    told = (plans.directory / "told").read_text().splitlines()
    assert told == ["run-begun web test ", "run-ended web test passed"]
    begun, ended = map(json.loads, (plans.directory / "json").read_text().splitlines())
    assert (begun["format"], begun["event"], begun["resumed"], begun["time"]) == (1, "run-begun", False, NOW)
    assert (ended["verdict"], ended["run"]) == ("passed", begun["run"])
    (plans.directory / "plans/broken").touch()
    assert drill(plans) == 40
    assert "run-ended web test failed" in (plans.directory / "told").read_text()


def test_a_command_that_fails_or_hangs_changes_no_run(plans) -> None:
    hooked(plans, "echo no mail server; exit 3")
    result = plans("plan", "run", "web", "--mode", "test", "--yes")
    assert (result.code, "notify: /bin/sh: exited with 3: no mail server" in result.err) == (0, True)


def test_a_command_that_hangs_is_ended(plans) -> None:
    hooked(plans, "sleep 60 & echo $! >> pids; wait", "1s")
    result = plans("plan", "run", "web", "--mode", "test", "--yes")
    assert result.code == 0
    assert "notify: /bin/sh:" in result.err


def test_what_is_no_command_is_told_by_name(plans) -> None:
    file = plans.directory / "drctl.toml"
    file.write_text('notify = "mail"\n' + file.read_text())
    with pytest.raises(ConfigInvalid, match="notify"):
        load_config(plans.directory)
