"""One site's wall clock off by an hour: everybody is told, and nothing that is told about time becomes wrong by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from drctl.lab import layout, process, site, user
from tests.integration.fault_rig import FaultRig, protect

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(600)]
HOUR = 3600
#: What a busy machine may add to an RPO of one interval (1 s), and to the reading of a clock.
SLACK = 15.0
CLOCK_SKEW = 34


@pytest.fixture(scope="module")
def faults(make_lab) -> Iterator[FaultRig]:
    made = protect(make_lab(guests=1, rate=20, slots=256))
    source = Path(__file__).with_name("shifted_clock.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library(made), source], check=True)
    library(made).chmod(0o755)
    yield made
    made.close()


def library(faults: FaultRig) -> Path:
    return faults.rig.directory / "shifted_clock.so"


@contextmanager
def shifted(faults: FaultRig, name: str, seconds: int) -> Iterator[None]:
    """The appliance of a site, and the children that read the wall clock, under another clock; then as they were."""
    _end(faults, name)
    place = faults.rig.layout.site(name)
    entry = user.ensure() if user.is_root() else None
    own: dict[str, Any] = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []} if entry else {}
    with (place.logs / "appliance.log").open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "drctl.appliance.daemon", "--home", str(place.home)],
            env={**site.environment(place), "LD_PRELOAD": str(library(faults)), "SHIFTED_CLOCK": str(seconds)},
            cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **own,
        )  # fmt: skip
    try:
        faults.await_(lambda: abs(clock_of(faults, name) - seconds) < SLACK, "the clock is off", 30)
        yield
    finally:
        supervisor.terminate()
        supervisor.wait(20)
        _end(faults, name)
        faults.up()
        faults.await_(lambda: abs(clock_of(faults, name)) < SLACK, "the clock is right", 30)


def _end(faults: FaultRig, name: str) -> None:
    """End the site's supervisor, and its shipper or receiver: their successors are started by the next one."""
    state = layout.load(faults.rig.directory)
    assert state is not None
    known = state.process(f"{name}/appliance")
    assert known is not None
    process.stop([known])
    for what in ("shipper",) if name == "alpha" else ("receiver",):
        with suppress(ProcessLookupError, FileNotFoundError):
            faults.kill(what)


def clock_of(faults: FaultRig, name: str) -> float:
    """How far the appliance's clock is from ours, seconds."""
    return float(faults.call(name, "appliance.info")["wall_ns"]) / 1e9 - time.time()


def offset_of(faults: FaultRig) -> float:
    """The recovery site's clock minus the source's, as the link measures it, seconds; infinite while it has not."""
    offset = faults.status()["link"]["offset_ms"]
    return float("inf") if offset is None else float(offset) / 1000


def drctl(faults: FaultRig, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "drctl.cli", "--config", str(faults.rig.directory), *arguments, "--output", "json"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONWARNINGS": "error"}, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def newer(faults: FaultRig, count: int) -> list[dict[str, Any]]:
    """The next checkpoints, by their numbers: times are what is in question here."""
    newest = faults.checkpoints()[-1]["number"]
    faults.await_(lambda: faults.checkpoints()[-1]["number"] >= newest + count, f"{count} more checkpoints", 60)
    return [each for each in faults.checkpoints() if each["number"] > newest]


@pytest.mark.parametrize(("name", "seconds"), [("alpha", HOUR), ("alpha", -HOUR), ("beta", HOUR), ("beta", -HOUR)])
def test_a_clock_that_is_off_by_an_hour_is_named_and_misleads_nobody(faults, name, seconds):
    faults.await_live()
    at_recovery = seconds if name == "beta" else 0
    offset = seconds if name == "beta" else -seconds
    with shifted(faults, name, seconds):
        # What was marked before the link came back is dated by the clock as it was then: the first is not counted.
        faults.await_(lambda: abs(offset_of(faults) - offset) < 2, "the link has measured it", 30)
        newer(faults, 1)
        made = newer(faults, 5)
        now = time.time()
        # A checkpoint is dated by the recovery site's clock, whichever of the two is wrong.
        for each in made:
            assert abs(each["time"] - at_recovery - now) < SLACK, (each, now)
        status = faults.status()
        assert abs(offset_of(faults) - offset) < 2
        assert 0 <= status["rpo_seconds"] < SLACK
        stored = faults.call("beta", "group.status")
        assert 0 <= stored["wall_ns"] / 1e9 - stored["checkpoints"]["newest"]["time"] < SLACK
        _told(faults, name)
    # What comes after is the newest, though its time may be an hour before that of others.
    after = newer(faults, 3)[-1]
    chosen = faults.call("beta", "failover.plan", checkpoint="latest")
    assert chosen["checkpoint"]["number"] >= after["number"]
    assert chosen["loss_seconds"] < SLACK
    assert faults.judge_listed(most=25) > 5


def _told(faults: FaultRig, name: str) -> None:
    """By doctor, which has an exit code for it, and by the status, whose RPO is right all the same."""
    code, answer = drctl(faults, "doctor")
    errors = [each for each in answer["findings"] if each["severity"] == "error"]
    assert {each["error"] for each in errors} == {"clock-skew"}, errors
    assert {each["subject"] for each in errors} == {f"{name}-1", "web"}, errors
    assert code == CLOCK_SKEW
    _, told = drctl(faults, "status", "web")
    group = told["groups"][0]
    assert group["rpo_seconds"] < SLACK, group
