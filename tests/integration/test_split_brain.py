"""The old source comes back: it asks before it starts guests, and neither runs nor replicates what reigns elsewhere."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import time
from contextlib import redirect_stdout, suppress
from dataclasses import replace

import pytest

from drctl.appliance import libvirt_hook
from drctl.cli.app import run
from drctl.errors import Locked
from drctl.lab import layout, process, site
from drctl.lab.teardown import appliance_children
from tests.integration.fault_rig import GROUP, apply, protect

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(600)]

KEPT_DOWN_SECONDS = 6.0


@pytest.fixture(scope="module")
def split(make_lab):
    rig = make_lab(guests=2, rate=20)
    rig.virsh("alpha", "autostart", "web-1")
    faults = protect(rig)
    yield faults
    faults.close()


def autostart(split, guest):
    return "enable" in next(
        row for row in split.rig.virsh("alpha", "dominfo", guest).splitlines() if "Autostart" in row
    )


def cut_power(split):
    """Everything of alpha is gone at once, and with it what its memory held."""
    state = layout.load(split.rig.directory)
    daemons = [known for known in state.processes if known.name.startswith("alpha/")]
    victims = [*site.stray_machines(split.alpha), *daemons, *appliance_children(split.alpha)]
    for victim in victims:
        if process.alive(victim):
            with suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
    split.await_(lambda: not any(process.alive(victim) for victim in victims), "alpha is dark", 10)
    for path in (split.alpha.appliance_run, split.alpha.run / "r" / "libvirt"):
        shutil.rmtree(path)


def cli(split, *arguments):
    """(exit code, stdout) of the operator's command."""
    with redirect_stdout(io.StringIO()) as out:
        code = run(["--config", str(split.rig.directory), *arguments])
    return code, out.getvalue()


def keeps_down(split, *guests):
    """No guest of these runs at alpha for some seconds."""
    end = time.monotonic() + KEPT_DOWN_SECONDS
    while time.monotonic() < end:
        assert {split.rig.state("alpha", guest) for guest in guests} == {"shut off"}
        time.sleep(0.2)


def test_autostart_is_taken_over_and_given_back(split):
    split.await_(lambda: not autostart(split, "web-1"), "libvirt would not start it", 5)
    split.call("alpha", "replicate.stop")
    assert autostart(split, "web-1")
    assert not autostart(split, "web-2")
    split.call("alpha", "replicate.start")
    split.await_live(180)
    assert not autostart(split, "web-1")


def test_a_live_group_is_watched(split):
    """The plugins and the metrics of a real group: good while it is, and bad in time when the link is cut."""
    code, text = cli(split, "check", "rpo", GROUP)
    assert code == 0, text
    assert text.startswith(f"DRCTL RPO OK: {GROUP}: RPO ")
    code, text = cli(split, "check", "all", GROUP, "--warning", "1")
    assert code == 3
    for what in ("certificate", "space"):
        code, text = cli(split, "check", what, GROUP)
        assert code == 0, text
    # The witnesses write so much that a week of history does not fit: that is forecast, and a warning.
    code, text = cli(split, "check", "journal", GROUP)
    assert code in (0, 1), text
    assert f"{GROUP}: journal 0 %" in text
    code, text = cli(split, "check", "clock", GROUP)
    assert code == 0, text
    assert f"'{GROUP} clock'=" in text
    code, text = cli(split, "metrics", "beta-1")
    assert code == 0
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert 0 <= float(samples[f'drctl_recovery_point_age_seconds{{group="{GROUP}"}}']) < 30
    assert float(samples["drctl_certificate_expiry_timestamp_seconds"]) > time.time() + 300 * 86400
    code, text = cli(split, "metrics", "alpha-1")
    assert f'drctl_group_phase{{group="{GROUP}",phase="live"}} 1.0' in text
    assert f'drctl_link_connected{{group="{GROUP}"}} 1.0' in text
    split.relay.cut()
    try:
        split.await_(lambda: cli(split, "check", "rpo", GROUP, "--critical", "3s")[0] == 2, "the RPO is critical", 30)
        split.await_(lambda: "drctl_link_connected" in cli(split, "metrics", "alpha-1")[1], "the link is told", 30)
        found = cli(split, "metrics", "alpha-1")[1]
        assert f'drctl_link_connected{{group="{GROUP}"}} 0.0' in found
    finally:
        split.relay.restore()
    split.await_live(60)


def test_one_operator_at_a_time(split):
    lease = split.call("beta", "lease.take", holder="ann@desk (pid 7)", verb="switchover", seconds=60)
    assert lease["generation"] == 1
    code, _ = cli(split, "replicate", "pause", GROUP, "--yes")
    assert code == 13
    with pytest.raises(Locked, match="ann@desk"):
        split.call("beta", "failover.run", source_is_down="x", confirmed=GROUP)
    assert split.status()["phase"] == "live"
    split.kill("beta-supervisor")
    split.up()
    split.await_(lambda: split.call("beta", "lease.show")["holder"] == "ann@desk (pid 7)", "the lease outlives it", 30)
    assert split.call("beta", "lease.release", token=lease["token"])["released"]
    assert split.call("beta", "lease.show") is None
    assert split.call("beta", "appliance.history")[-1]["outcome"] == "locked"


def test_a_source_that_comes_up_alone_waits_and_goes_on_when_the_link_is_back(split):
    split.relay.cut()
    cut_power(split)
    split.up()
    boot = split.await_(lambda: (found := split.status()["boot"]) and found["state"] == "waiting" and found, "it waits")
    assert "boot_without_peer = wait" in boot["reason"]
    assert boot["autostart"] == ["web-1"]
    keeps_down(split, "web-1", "web-2")
    code, text = cli(split, "status", GROUP)
    assert code == 0
    assert "guests web-1: waiting: no link to" in text
    code, text = cli(split, "doctor")
    assert code == 42
    assert "wait to be started since the host's boot" in text
    split.relay.restore()
    split.await_(lambda: split.status()["boot"]["state"] == "started", "the guests were started", 30)
    assert split.rig.state("alpha", "web-1") == "running"
    # Its flag was off before drctl came: nobody asked for it to start at boot.
    assert split.rig.state("alpha", "web-2") == "shut off"
    split.rig.virsh("alpha", "start", "web-2")
    split.await_live(180)


def test_a_restarted_supervisor_starts_nothing(split):
    split.rig.virsh("alpha", "destroy", "web-1")
    split.kill("supervisor")
    split.up()
    split.await_(lambda: split.status()["boot"] is None, "it knows that this was no boot")
    keeps_down(split, "web-1")
    split.rig.virsh("alpha", "start", "web-1")
    split.await_live(180)


def test_a_superseded_source_neither_runs_nor_replicates_and_says_why(split):
    cut_power(split)
    answer = split.call("beta", "failover.run", 120, checkpoint="latest", source_is_down="no power", confirmed=GROUP)
    assert answer["state"] == "running"
    split.up()
    status = split.await_(lambda: (now := split.status())["phase"] == "failed-over" and now, "alpha knows", 60)
    assert status["reason"].startswith("superseded: beta says: web has failed over")
    split.await_(lambda: split.status()["boot"]["state"] == "refused", "no guest is started by us", 30)
    keeps_down(split, "web-1", "web-2")
    assert split.status()["epoch"] == ""
    assert split.status()["generation"] < split.call("beta", "group.status")["generation"]
    log = (split.alpha.logs / "appliance.log").read_text()
    assert "superseded" in log
    assert "NOT started" in log or "reigns" in log or "web: superseded: beta says" in log
    code, text = cli(split, "status", GROUP)
    assert code == 0
    assert "failed-over" in text
    # A second start of the supervisor knows it without asking, and a start of replication is refused.
    split.relay.cut()
    split.kill("supervisor")
    split.up()
    split.await_(lambda: split.status()["phase"] == "failed-over", "it remembers")
    keeps_down(split, "web-1", "web-2")
    split.relay.restore()


def hook(split, guest, xml):
    script = split.rig.directory / "hook"
    script.write_text(libvirt_hook.script(split.alpha.home))
    return subprocess.run(
        ["sh", str(script), guest, "prepare", "begin", "-"], input=xml, capture_output=True, text=True, timeout=10
    )


def test_the_hook_refuses_the_old_guests_and_no_others(split):
    xml = split.rig.virsh("alpha", "dumpxml", "web-1")
    done = split.await_(
        lambda: (found := hook(split, "web-1", xml)).returncode and found, "the guard's file is there", 10
    )
    assert "may not run here: generation 1 is superseded" in done.stderr
    other = split.rig.virsh("beta", "dumpxml", "web-1").replace(site_uuid(xml), "00000000-0000-4000-8000-000000000000")
    assert hook(split, "other", other).returncode == 0
    assert list((split.beta.home / "guard").iterdir()) == []


def site_uuid(xml):
    return xml.partition("<uuid>")[2].partition("</uuid>")[0]


def test_one_started_by_hand_is_told_loudly_and_stopped_where_that_is_wished(split):
    split.rig.virsh("alpha", "start", "web-1")
    split.await_(lambda: split.status()["strays"] == ["web-1"], "the stray is seen", 10)
    code, text = cli(split, "status", GROUP)
    assert "TWO OF ONE" in text
    code, text = cli(split, "doctor")
    assert code == 42
    assert "two of one" in text
    assert split.rig.state("alpha", "web-1") == "running"
    apply(split, replace(split.spec, superseded_guest="stop"))
    split.await_(lambda: split.rig.state("alpha", "web-1") == "shut off", "it is stopped", 10)
    split.await_(lambda: split.status()["strays"] == [], "and no stray any more", 10)
    assert split.rig.state("beta", "web-1") == "running"
