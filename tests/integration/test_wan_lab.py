"""What a WAN and an operator do to a protected lab: limits, exports, served checkpoints, a replica that has rotted, and
resyncs in which everything is killed. Given as an operator gives it, judged by the witness."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress

import pytest

from drctl.lab.disk import FileDisk
from drctl.lab.judge import judge
from tests.integration.fault_rig import GROUP, protect
from tests.integration.test_failback import MIB, Sites

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(1800)]
#: Kills of one process each, at random moments of resyncs. test_failback.py has 20 in a failback.
KILLS = 60
VICTIMS = ("shipper", "tap", "receiver", "supervisor", "beta-supervisor")
#: A file of a disk that no guest writes: the payload that the witness reads at its boot.
QUIET = 64 * MIB


@pytest.fixture(scope="module")
def sites(make_lab):
    faults = protect(make_lab(guests=2, rate=50))
    yield Sites(faults)
    faults.close()


def shipper(sites):
    return sites.faults.call("alpha", "group.status")


def test_a_limit_holds_the_stream_back_and_lets_it_go_again(sites):
    rate = 50_000  # what the two guests write is some ten times that
    sites.drctl("link", "limit", "set", "alpha", "beta", f"{rate * 8 // 1000} kbit/s", "--yes")
    sites.faults.await_(lambda: shipper(sites)["backlog_bytes"] > MIB, "what can't leave waits", 30)
    sent, begun = sites.sent("alpha"), time.monotonic()
    time.sleep(8)
    passed, seconds = sites.sent("alpha") - sent, time.monotonic() - begun
    assert passed <= rate * seconds * 1.1 + 65536, f"{passed / seconds:.0f} bytes/s"
    assert passed >= rate * seconds * 0.5, f"{passed / seconds:.0f} bytes/s"
    shown = json.loads(sites.drctl("link", "limit", "show", "-o", "json")[0])
    assert str(rate) in json.dumps(shown)
    sites.write_more("alpha")  # the guests feel nothing of it
    sites.drctl("link", "limit", "clear", "alpha", "beta", "--yes")
    sites.faults.await_live(60)
    assert sites.faults.judge_listed(most=5) > 0


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_an_exported_checkpoint_is_a_point_in_the_guests_lives(sites, tmp_path, form):
    sites.write_more("alpha")
    sites.drctl("checkpoint", "export", GROUP, "latest", "--output", str(tmp_path), "--format", form, "--yes")
    names = [f"{guest}.{target}" for guest in sites.rig.guests() for target in ("vda", "vdb")]
    files = {name: next(path for path in sorted(tmp_path.iterdir()) if name in path.name) for name in names}
    if form != "raw":
        for name, path in files.items():
            files[name] = tmp_path / f"{name}.unpacked"
            subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", path, files[name]], check=True)
    with ExitStack() as stack:
        disks = {name: stack.enter_context(FileDisk(path)) for name, path in files.items()}
        guests = sites.rig.guests()
        verdict = judge({guest: [disks[f"{guest}.vda"], disks[f"{guest}.vdb"]] for guest in guests}, payload=True)
    assert verdict.true_prefix, str(verdict)


def test_a_served_checkpoint_is_read_by_another_tool(sites, tmp_path):
    """nbdcopy takes all disks while the guests write on, and the checkpoint stays what it was."""
    command = sites.command("checkpoint", "serve", GROUP, "latest", "--port", "0", "--for", "2m", "-o", "json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        try:
            document = json.loads(serving.stdout.readline())
            for disk in document["disks"]:
                subprocess.run(["nbdcopy", disk["uri"], tmp_path / f"{disk['name']}.raw"], check=True, timeout=120)
        finally:
            serving.send_signal(signal.SIGINT)
            serving.wait(30)
    guests = sites.rig.guests()
    with ExitStack() as stack:
        disks = {
            guest: [stack.enter_context(FileDisk(tmp_path / f"{guest}.{target}.raw")) for target in ("vda", "vdb")]
            for guest in guests
        }
        verdict = judge(disks, payload=True)
    assert verdict.true_prefix, str(verdict)


def base(sites, name):
    return sites.place("beta").home / "store" / GROUP / "disks" / name / "base.raw"


def test_a_bit_that_turned_at_the_recovery_site_is_found_and_mended(sites):
    """While the guests write, by the command alone."""
    sites.drctl("checkpoint", "verify", GROUP, "--source")
    path = base(sites, "web-2.vda")
    with path.open("r+b") as file:
        file.seek(QUIET + 12345)
        byte = file.read(1)[0]
        file.seek(QUIET + 12345)
        file.write(bytes([byte ^ 8]))
    sites.drctl("checkpoint", "verify", GROUP, "--source", "--dry-run")
    told, said = sites.drctl("checkpoint", "verify", GROUP, "--source", code=31)
    block = (QUIET + 12345) // 4096 * 4096
    assert f"web-2.vda at {block}, 4.0 KiB" in told + said
    told, _ = sites.drctl("checkpoint", "verify", GROUP, "--source", "--repair", "--yes", code=3)
    assert "4.0 KiB repaired" in told
    sites.drctl("checkpoint", "verify", GROUP, "--source")
    newest = sites.faults.await_live(60) and sites.faults.checkpoints()[-1]["number"]
    verdict = sites.judge("beta", newest)
    assert verdict.true_prefix, str(verdict)


def test_everything_is_killed_again_and_again_during_resyncs(sites):
    """One process at a time, each at a random moment of a resync; then what is listed is judged."""
    dice, killed = random.Random(17), {}
    faults, guests = sites.faults, sites.rig.guests()
    pids = {guest: faults.qemu_pid(guest) for guest in guests}
    begun, inside = time.time(), 0
    for count in range(KILLS):
        if count % 10 == 0:
            faults.await_live(180)
            judged = faults.judge_listed(since=begun - 3, most=5)
            sys.stderr.write(f"  after {count} kills: live, {judged} judged, {time.time() - begun:.0f} s\n")
        with subprocess.Popen(
            sites.command("resync", GROUP, "--yes", "--timeout", "60s"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as running:
            with suppress(subprocess.TimeoutExpired):
                running.communicate(timeout=dice.uniform(0.4, 2.0))
            inside += running.returncode is None
            victim = dice.choice(VICTIMS)
            with suppress(ProcessLookupError, OSError):
                faults.kill(victim)
                killed[victim] = killed.get(victim, 0) + 1
            faults.up()
            running.kill()
    faults.await_live(180)
    sites.drctl("resync", GROUP, "--yes")
    faults.await_live(60)
    faults.assert_unharmed(pids)
    for guest in guests:
        sites.rig.observer.await_more(guest, "alpha", 5)
    judged = faults.judge_listed(since=begun - 3)
    sys.stderr.write(
        f"  killed: {killed}, {inside} of {KILLS} before the command was done; {judged} judged at the end\n"
    )
    assert sum(killed.values()) >= KILLS * 0.9
    assert inside >= KILLS / 2
