"""The lab itself: two libvirt sites, guests that witness, the judge on their real disks, and its end without a trace."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from drctl.errors import StepFailed
from drctl.lab import lab, layout, process
from drctl.lab.disk import FileDisk, dump
from drctl.lab.judge import judge, loss
from drctl.lab.record import slot_of, unpack_superblock

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


def guest_lines(rig, guest):
    return rig.layout.serial(guest).read_text(errors="replace").splitlines()


def pause(rig):
    for guest in rig.guests():
        rig.virsh("alpha", "suspend", guest)


def resume(rig):
    for guest in rig.guests():
        rig.virsh("alpha", "resume", guest)


def write_more(rig, count=20):
    """Returns when every chain of every guest has `count` records more than now."""
    for guest in rig.guests():
        rig.observer.await_more(guest, "alpha", count, timeout=300)


def copies(rig, directory):
    """Copies of the paused guests' disks, as {guest: [path of vda, path of vdb]}."""
    return {g: [Path(shutil.copy(p, directory / p.name)) for p in rig.images(g)] for g in rig.guests()}


def verdict_of(paths):
    with ExitStack() as stack:
        return judge({g: [stack.enter_context(FileDisk(p)) for p in pair] for g, pair in paths.items()})


def test_the_sites_are_real_separate_and_not_roots(lab_rig):
    status = lab.status(lab_rig.directory)
    assert status.running
    assert set(status.sites) == {"alpha", "beta"}
    assert lab_rig.virsh("alpha", "list", "--name").split() == ["web-1", "web-2"]
    assert lab_rig.virsh("beta", "list", "--name", "--all").split() == []
    state = layout.load(lab_rig.directory)
    for known in state.processes:
        owner = Path(f"/proc/{known.pid}").stat().st_uid
        assert owner != 0
        assert pwd.getpwuid(owner).pw_name == state.user


def test_a_guest_proves_its_boot_disk_before_its_first_line(lab_rig):
    for guest in lab_rig.guests():
        own = [line for line in guest_lines(lab_rig, guest) if "DRCTL" in line]
        assert own[0].startswith(f"DRCTL-GUEST-UP {guest} boot ")
        assert own[0].endswith("payload 67108864 bytes verified")
        read = int(lab_rig.virsh("alpha", "domblkstat", guest, "vda").split("rd_bytes ")[1].split()[0])
        assert read >= 64 * 1024 * 1024


def test_paused_guests_are_a_true_prefix_with_all_that_was_acknowledged(lab_rig):
    write_more(lab_rig)
    pause(lab_rig)
    moment = time.time_ns()
    verdict = lab_rig.judge(payload=True)
    resume(lab_rig)
    assert verdict.true_prefix, str(verdict)
    assert min(min(guest.newest) for guest in verdict.guests.values()) >= 20
    for lost in loss(verdict, lab_rig.observer.logs("alpha"), moment).values():
        assert (lost.missing, lost.rpo_seconds) == ((0, 0, 0, 0), 0.0)


def test_the_guests_refer_to_each_other(lab_rig):
    """Without tokens that name the other guest, a group's consistency over machines would go unproven."""
    pause(lab_rig)
    with ExitStack() as stack:
        disks = {g: [stack.enter_context(FileDisk(p)) for p in lab_rig.images(g)] for g in lab_rig.guests()}
        verdict = judge(disks)
        for guest, other in (("web-1", "web-2"), ("web-2", "web-1")):
            from drctl.lab.record import AREA_OFFSETS, unpack_record

            superblock = unpack_superblock(disks[guest][0].read(AREA_OFFSETS[0], 4096), guest)
            number = verdict.guests[guest].newest[0]
            disk, offset = slot_of(superblock, 0, number)
            record = unpack_record(disks[guest][disk].read(offset, 4096))
            assert record.token.guest == other
            assert 0 < record.token.number <= verdict.guests[other].newest[0]
    resume(lab_rig)


def test_the_judge_refuses_real_disks_that_were_damaged(lab_rig, tmp_path):
    pause(lab_rig)
    early = copies(lab_rig, tmp_path)
    resume(lab_rig)
    write_more(lab_rig, 10)
    pause(lab_rig)
    late = {g: lab_rig.images(g) for g in lab_rig.guests()}
    try:
        assert verdict_of(early).true_prefix
        assert verdict_of(late).true_prefix
        one_disk_behind = verdict_of({g: [early[g][0], late[g][1]] for g in late})
        assert one_disk_behind.reasons
        one_guest_behind = verdict_of({"web-1": early["web-1"], "web-2": late["web-2"]})
        assert {reason.guest for reason in one_guest_behind.reasons} == {"web-2"}
        whole = verdict_of(early)
        number = whole.guests["web-1"].newest[1] - 7
        with early["web-1"][number % 2].open("r+b") as file:
            file.seek(176 * 2**20)
            superblock = unpack_superblock(FileDisk(early["web-1"][0]).read(176 * 2**20, 4096), "web-1")
            _, offset = slot_of(superblock, 1, number)
            file.seek(offset + 2000)
            file.write(b"\0\1")
        (reason,) = verdict_of(early).reasons
        assert (reason.guest, reason.chain, reason.number, reason.offset) == ("web-1", 1, number, offset)
    finally:
        resume(lab_rig)


def test_commands_reach_the_guests(lab_rig):
    assert lab_rig.observer.send("rate 30", wait=60) == ["web-1", "web-2"]
    lab_rig.observer.send("stop", wait=60)
    time.sleep(0.3)
    before = {seen.guest: seen.numbers for seen in lab_rig.observer.seen()}
    time.sleep(0.5)
    assert {seen.guest: seen.numbers for seen in lab_rig.observer.seen()} == before
    assert lab_rig.judge().true_prefix
    lab_rig.observer.send("go", wait=60)
    write_more(lab_rig, 5)
    with pytest.raises(StepFailed, match="knows no command"):
        lab_rig.observer.send("format c:")


def test_the_agent_freezes_a_real_file_system(lab_rig):
    fsinfo = '{"execute": "guest-get-fsinfo"}'
    deadline = time.monotonic() + 120
    while True:  # the agent starts a little after the witness
        try:
            lab_rig.virsh("alpha", "domfsfreeze", "web-1")
            break
        except StepFailed:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    status = '{"execute": "guest-fsfreeze-status"}'
    assert "frozen" in lab_rig.virsh("alpha", "qemu-agent-command", "web-1", status)
    lab_rig.virsh("alpha", "domfsthaw", "web-1")
    assert "thawed" in lab_rig.virsh("alpha", "qemu-agent-command", "web-1", status)
    assert '"mountpoint":"/data"' in lab_rig.virsh("alpha", "qemu-agent-command", "web-1", fsinfo).replace(" ", "")


def test_a_reboot_goes_on_where_it_was(lab_rig):
    begun = time.time_ns()
    before = next(seen.numbers for seen in lab_rig.observer.seen() if seen.guest == "web-2")
    lab_rig.observer.send("reboot", guest="web-2")
    lab_rig.observer.await_up("web-2", "alpha", after_ns=begun, timeout=300)
    lab_rig.observer.await_more("web-2", "alpha", 5, timeout=300)
    resumed = [int(line.split()[-1]) for line in guest_lines(lab_rig, "web-2") if line.startswith("resumed")]
    assert all(now >= then for now, then in zip(resumed[-4:], before, strict=True))
    pause(lab_rig)
    verdict = lab_rig.judge()
    resume(lab_rig)
    assert verdict.true_prefix, str(verdict)


def test_a_pulled_plug_leaves_a_true_prefix_and_the_next_boot_goes_on(lab_rig):
    write_more(lab_rig)
    for guest in lab_rig.guests():
        lab_rig.virsh("alpha", "destroy", guest)
    moment = time.time_ns()
    verdict = lab_rig.judge()
    assert verdict.true_prefix, str(verdict)
    for lost in loss(verdict, lab_rig.observer.logs("alpha"), moment).values():
        assert lost.missing == (0, 0, 0, 0), "what was acknowledged is on the disk"
    for guest in lab_rig.guests():
        lab_rig.virsh("alpha", "start", guest)
    for guest in lab_rig.guests():
        lab_rig.observer.await_up(guest, "alpha", after_ns=moment, timeout=300)
        lab_rig.observer.await_more(guest, "alpha", 5, timeout=300)
        seen = next(seen for seen in lab_rig.observer.seen() if (seen.guest, seen.site) == (guest, "alpha"))
        assert all(now > then for now, then in zip(seen.numbers, verdict.guests[guest].newest, strict=True))


def test_a_copy_boots_at_the_other_site_beside_its_original(lab_rig, tmp_path):
    """What a recovery does, by hand: the definition moves as it is, but for name, uuid and disks."""
    pause(lab_rig)
    beta = lab_rig.layout.site("beta")
    paths = {g: [Path(shutil.copy(p, beta.images / p.name)) for p in lab_rig.images(g)] for g in lab_rig.guests()}
    then = lab_rig.judge("beta")
    resume(lab_rig)
    begun = time.time_ns()
    for guest in lab_rig.guests():
        for path in paths[guest]:
            shutil.chown(path, layout.load(lab_rig.directory).user)
        xml = lab_rig.virsh("alpha", "dumpxml", "--inactive", guest)
        path = tmp_path / f"{guest}.xml"
        path.write_text(xml.replace(str(lab_rig.layout.site("alpha").images), str(beta.images)))
        lab_rig.virsh("beta", "create", str(path))
    for guest in lab_rig.guests():
        lab_rig.observer.await_up(guest, "beta", after_ns=begun, timeout=300)
        lab_rig.observer.await_more(guest, "beta", 5, timeout=300)
    for guest in lab_rig.guests():
        lab_rig.virsh("beta", "destroy", guest)
    now = lab_rig.judge("beta")
    assert now.true_prefix, str(now)
    for guest in lab_rig.guests():
        pairs = zip(now.guests[guest].newest, then.guests[guest].newest, strict=True)
        assert all(later > earlier for later, earlier in pairs)
    write_more(lab_rig, 5)
    pause(lab_rig)
    assert lab_rig.judge("alpha").true_prefix, "the copies' tokens must not reach the originals"
    resume(lab_rig)


def test_qcow2_and_nbd_reach_the_judge_as_dumps(lab_rig, tmp_path):
    pause(lab_rig)
    paths = copies(lab_rig, tmp_path)
    resume(lab_rig)
    subprocess.run(
        ["qemu-img", "convert", "-O", "qcow2", str(paths["web-1"][0]), str(tmp_path / "vda.qcow2")], check=True
    )
    with (
        dump(str(tmp_path / "vda.qcow2"), tmp_path / "vda.dump", image_format="qcow2") as vda,
        FileDisk(paths["web-1"][1]) as vdb,
    ):
        assert judge({"web-1": [vda, vdb]}, payload=True).true_prefix


def test_shutdown_by_libvirt_ends_a_guest_in_order(lab_rig):
    lab_rig.virsh("alpha", "shutdown", "web-2")
    deadline = time.monotonic() + 120
    while lab_rig.state("alpha", "web-2") != "shut off":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert any("DRCTL-GUEST-ENDING" in line for line in guest_lines(lab_rig, "web-2")[-3:])


def test_ransomware_is_seen_by_the_judge(lab_rig):
    lab_rig.observer.send("corrupt", guest="web-1", wait=300)
    lab_rig.virsh("alpha", "suspend", "web-1")
    verdict = lab_rig.judge()
    assert {reason.guest for reason in verdict.reasons} == {"web-1"}
    assert "no witness superblock" in str(verdict.reasons[0])


def test_up_again_changes_nothing_and_leaves_stopped_guests_to_the_operator(lab_rig):
    before = layout.load(lab_rig.directory)
    report = lab.up(lab_rig.directory)
    assert layout.load(lab_rig.directory) == before
    states = {guest.name: guest.state for guest in report.guests if guest.site == "alpha"}
    assert states == {"web-1": "paused", "web-2": "shut off"}


def test_down_leaves_nothing_even_when_libvirtd_was_killed(make_lab):
    rig = make_lab(guests=1, appliances=False, agent=False, chains=2, image_format="qcow2")
    assert "web-1.vda.qcow2" in rig.virsh("alpha", "domblklist", "web-1")
    state = layout.load(rig.directory)
    run = Path(state.run)
    daemon = state.process("alpha/libvirtd")
    os.kill(daemon.pid, 9)
    machines = [pid for pid in os.listdir("/proc") if pid.isdigit() and names(pid, run)]
    assert len([pid for pid in machines if "qemu" in os.readlink(f"/proc/{pid}/exe")]) == 1
    lab.down(rig.directory)
    assert not rig.directory.exists()
    assert not run.exists()
    assert not any(process.alive(known) for known in state.processes)
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and names(pid, run)]
    assert lab.status(rig.directory).running is False
    lab.down(rig.directory)


def test_two_labs_run_beside_each_other(make_lab, lab_rig):
    other = make_lab(guests=1, appliances=False, start=False)
    one, two = layout.load(lab_rig.directory), layout.load(other.directory)
    assert one.run != two.run
    assert not set(one.links.values()) & set(two.links.values())
    assert other.virsh("alpha", "list", "--all", "--name").split() == ["web-1"]
    lab.down(other.directory)
    assert lab.status(lab_rig.directory).processes == dict.fromkeys(
        ("alpha/libvirtd", "beta/libvirtd", "recorder"), True
    )


def test_status_can_be_told_as_json(lab_rig):
    import msgspec

    facts = json.loads(msgspec.json.encode(lab.status(lab_rig.directory)))
    assert facts["directory"] == str(lab_rig.directory)


def names(pid, run):
    try:
        return os.fsencode(run) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
