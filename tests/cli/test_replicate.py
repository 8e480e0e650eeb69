"""Start waits for the first sync where somebody looks; pause, resume, stop say what they do before they do it."""

from __future__ import annotations

import pytest

from drctl.errors import HypervisorRefused, NotFound
from tests.cli.appliance import checkpoint


class Sync:
    """The source's status while it syncs: `steps` are the phases that it is found in, one after the other."""

    def __init__(self, world, *steps: str) -> None:
        self.status = world.alpha.call("group.status", {"group": "web"})
        self.steps = list(steps)
        world.alpha.replies["replicate.start"] = self.start
        self.world = world
        world.alpha.replies["group.status"] = self
        self.seen = 0

    def resume(self, params, progress):
        self.world.alpha.phases["web"] = "live"
        return self.start(params, progress)

    def start(self, params, progress):
        self.world.beta.checkpoints.append(checkpoint(13, 0.0))
        return {"group": "web", "phase": "syncing"}

    def __call__(self, params, progress):
        phase = self.steps[min(self.seen, len(self.steps) - 1)]
        self.seen += 1
        total = 2**30
        sync = {"mode": "initial", "done_bytes": self.seen * total // 10, "total_bytes": total, "eta": 30.0}
        return self.status | {"phase": phase, "reason": "tap died", "sync": sync if phase == "syncing" else None}


@pytest.fixture
def web(world):
    return world.applied("unprotected")


def test_start_tells_what_it_will_read_then_asks(web) -> None:
    result = web("replicate", "start", "web", typed="n\n")
    assert result.code == 41
    assert (
        "will replicate web from alpha/a1 to beta/b1\nwill read db vda, 1.0 GiB\nwill read front vda, 1.0 GiB"
        in result.err
    )
    assert not web.alpha.called("replicate.start")


def test_start_tells_what_becomes_of_the_machines_there(web) -> None:
    def finding(severity: str, message: str) -> dict[str, str]:
        return {"severity": severity, "subject": "db", "message": message, "hint": ""}

    notes = [finding("info", "cdrom sda"), finding("error", "tpm: no swtpm"), finding("warning", "machine type")]
    web.beta.replies["group.fit"] = {"group": "web", "findings": notes}
    result = web("replicate", "start", "web", typed="n\n")
    assert "WILL NOT RUN THERE: db: tpm: no swtpm\nwarning: db: machine type\ndb: cdrom sda\nwill " in result.err
    assert web.alpha.called("group.describe")


def test_start_goes_on_where_that_can_not_be_told(web) -> None:
    Sync(web, "unprotected")
    web.beta.replies["group.fit"] = NotFound("method", "group.fit")
    result = web("replicate", "start", "web", "--yes")
    assert result.code == 0
    assert "what its machines need at the recovery site was not looked at: " in result.err


def test_start_without_a_terminal_does_not_wait(web) -> None:
    Sync(web, "unprotected")
    result = web("replicate", "start", "web", "--yes")
    assert result.code == 0
    assert result.out == "web is attached; see: drctl status web --watch\n"


def test_start_waits_until_live_with_progress(web) -> None:
    Sync(web, "unprotected", "syncing", "syncing", "live")
    result = web("replicate", "start", "web", "--yes", "--wait")
    assert result.code == 0
    assert result.out.startswith("web is live; newest checkpoint #13 at ")
    assert "web: 20 % syncing, 204.8 MiB of 1.0 GiB, 30.0 s left" in result.err


def test_start_waits_by_itself_where_somebody_looks(web) -> None:
    Sync(web, "unprotected", "syncing", "live")
    assert web("replicate", "start", "web", typed="y\n").out.startswith("web is live")


def test_start_is_not_done_before_something_can_be_recovered(web) -> None:
    Sync(web, "unprotected", "live")
    web.alpha.replies["replicate.start"] = {"group": "web", "phase": "syncing"}
    web.beta.checkpoints = []
    result = web("replicate", "start", "web", "--yes", "--wait", "--timeout", "10s")
    assert result.code == 3
    assert "web is not live after 10.0 s; it goes on" in result.err


def test_start_ends_with_40_when_the_group_breaks(web) -> None:
    Sync(web, "unprotected", "syncing", "broken")
    result = web("replicate", "start", "web", "--yes", "--wait")
    assert result.code == 40
    assert "web is broken: tap died" in result.err


def test_start_of_a_live_group_changes_nothing(web) -> None:
    web.alpha.phases["web"] = "live"
    result = web("replicate", "start", "web", "--yes", "--wait")
    assert result.code == 0
    assert "web is live already" in result.err
    assert not web.alpha.called("replicate.start")


def test_start_passes_a_refusal_on(web) -> None:
    web.alpha.replies["replicate.start"] = HypervisorRefused("db has a shared disk")
    assert web("replicate", "start", "web", "--yes").code == 21


def test_dry_runs_change_nothing(web) -> None:
    for verb, phase in (("start", "unprotected"), ("pause", "live"), ("resume", "paused"), ("stop", "live")):
        web.alpha.phases["web"] = phase
        result = web("replicate", verb, "web", "--dry-run")
        assert result.code == 0
        assert "dry run: nothing was changed" in result.err
        assert web.alpha.phases["web"] == phase


def test_pause_and_resume(web) -> None:
    web.alpha.phases["web"] = "live"
    assert web("replicate", "pause", "web", "--yes").out == "web is paused\n"
    assert web("replicate", "pause", "web", "--yes").out == "web is paused already\n"
    # What was restorable before is no proof that the resume has come to anything.
    assert web("replicate", "resume", "web", "--wait", "--timeout", "9s").code == 3
    web.alpha.phases["web"] = "paused"
    web.alpha.replies["replicate.resume"] = Sync(web, "paused", "live").resume
    result = web("replicate", "resume", "web", "--wait")
    assert result.out.startswith("web is live; newest checkpoint #13")
    assert "web is live already" in web("replicate", "resume", "web", "--yes").err


def test_resume_is_not_start(web) -> None:
    result = web("replicate", "resume", "web", "--yes")
    assert result.code == 12
    assert "drctl replicate start web" in result.err


def test_a_failed_over_group_is_not_started_at_its_old_source(web) -> None:
    web.beta.call("failover.run", {"group": "web"})
    for verb in ("start", "resume", "pause"):
        result = web("replicate", verb, "web", "--yes")
        assert result.code == 14
        assert "it reigns at beta/b1 now" in result.err


def test_stop_keeps_the_replica_for_a_week(web) -> None:
    web.alpha.phases["web"] = "live"
    result = web("replicate", "stop", "web", "--yes")
    assert result.code == 0
    assert "will delete its replica and checkpoints at beta/b1 after 7d" in result.err
    assert web.beta.called("replicate.stop")[0]["keep_replica_seconds"] == 7 * 86400
    assert "replica kept until 2027-01-22T" in result.out


def test_stop_keeps_the_replica_as_long_as_said(web) -> None:
    web("replicate", "stop", "web", "--yes", "--keep-replica", "1h")
    assert web.beta.called("replicate.stop")[0]["keep_replica_seconds"] == 3600


def test_stop_says_when_the_other_side_was_not_told(web) -> None:
    web.beta.replies["replicate.stop"] = NotFound("method", "replicate.stop")
    web.alpha.phases["web"] = "live"
    result = web("replicate", "stop", "web", "--yes")
    assert result.code == 3
    assert "is kept without a limit" in result.err
    assert web.alpha.phases["web"] == "unprotected"


def test_a_group_that_nobody_knows(world) -> None:
    result = world("replicate", "start", "web", "--yes")
    assert result.code == 11
    assert "drctl apply sends groups out" in result.err


def test_a_source_that_does_not_answer(web) -> None:
    web.alpha.down = True
    result = web("replicate", "pause", "web", "--yes")
    assert result.code == 22
    assert "no answer from a1" in result.err


def test_start_names_the_machines_when_the_source_has_not_looked_yet(web) -> None:
    status = web.alpha.call("group.status", {"group": "web"})
    web.alpha.replies["group.status"] = status | {"machines": []}
    assert (
        "will read all disks of db\nwill read all disks of front" in web("replicate", "start", "web", typed="n\n").err
    )


def test_a_command_holds_a_lease_and_gives_it_back(world) -> None:
    world.applied("live")
    assert world("replicate", "pause", "web", "--yes").code == 0
    (taken,) = world.beta.called("lease.take")
    assert taken["verb"] == "replicate pause"
    assert world.alpha.called("replicate.pause")[0]["lease"] == "t"
    assert world.beta.called("lease.release")[0]["token"] == "t"


def test_somebody_elses_lease_is_named_and_nothing_is_done(world) -> None:
    from drctl.errors import Locked

    world.applied("live")
    world.beta.replies["lease.take"] = Locked("web is being worked on: ann@desk, switchover, its lease ends in 20.0 s")
    result = world("replicate", "stop", "web", "--yes")
    assert result.code == 13
    assert "ann@desk" in result.err
    assert world.alpha.called("replicate.stop") == []


def test_a_pause_needs_no_lease_of_a_site_that_is_silent(world) -> None:
    world.applied("live")
    world.beta.down = True
    result = world("replicate", "pause", "web", "--yes")
    assert result.code == 0
    assert "no lease on web" in result.err
    assert world.alpha.called("replicate.pause")
