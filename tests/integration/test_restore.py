"""Disks and files out of a checkpoint by real tools: qemu-nbd in the appliance's place, a file system with a dirty journal."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from drctl.cli import guest_disk
from drctl.errors import PreconditionFailed, SetupFailed
from tests.cli.conftest import World

TOOLS = (*guest_disk.TOOLS, "mkfs.ext4", "mount")


def able() -> bool:
    return os.geteuid() == 0 and all(shutil.which(name) for name in TOOLS) and os.access("/dev/fuse", os.W_OK)


pytestmark = pytest.mark.skipif(not able(), reason=f"needs root, /dev/fuse and {', '.join(TOOLS)}")
MIB = 1 << 20


def run(*command: str, **more) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **more).stdout


def loop_devices() -> list[str]:
    return [
        line
        for line in run("losetup", "--list", "--noheadings", "--output", "BACK-FILE").splitlines()
        if "drctl-" in line
    ]


def file_system(path: Path, place: Path, offset: int, size: int) -> None:
    """An ext4 that was not shut down: copied while it was mounted, so its journal is to be replayed."""
    image = path.with_suffix(".ext4")
    image.write_bytes(b"")
    os.truncate(image, size)
    run("mkfs.ext4", "-q", "-L", "data", str(image))
    place.mkdir()
    run("mount", "-o", "loop", str(image), str(place))
    try:
        (place / "etc").mkdir()
        (place / "etc/shop.conf").write_text("a = 1\n")
        (place / "orders.db").write_bytes(os.urandom(3 * MIB))
        (place / "hosts").symlink_to("/etc/shop.conf")
        os.mkfifo(place / "pipe")
        os.sync()
        with path.open("r+b") as disk:
            disk.seek(offset)
            disk.write(image.read_bytes())
    finally:
        run("umount", str(place))
    image.unlink()


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    """Two partitions: swap-like noise without a file system, and an ext4 that needs its journal replayed."""
    directory = tmp_path_factory.mktemp("disk")
    path = directory / "disk.raw"
    path.write_bytes(b"")
    os.truncate(path, 96 * MIB)
    run("sfdisk", "--quiet", str(path), input="label: gpt\nstart=2048, size=16384\nstart=32768, size=131072\n")
    file_system(path, directory / "m", 32768 * 512, 64 * MIB)
    told = run("dumpe2fs", "-h", f"{path}?offset={32768 * 512}") if shutil.which("dumpe2fs") else ""
    assert "needs_recovery" in told or not told
    return path


@pytest.fixture
def served(tmp_path, disk, capsys, monkeypatch):
    """A command line whose recovery site serves the disk, as `db.vda`, read-only."""
    directory = tmp_path / "config"
    directory.mkdir()
    world = World(directory, capsys, monkeypatch).applied()
    socket = tmp_path / "v.sock"
    command = ["qemu-nbd", "-r", "-t", "-e", "16", "-f", "raw", "-x", "db.vda", "-k", str(socket), str(disk)]
    process = subprocess.Popen(command)
    while not socket.exists():
        assert process.poll() is None
        time.sleep(0.02)

    def serve(params, progress):
        facts = {"socket": str(socket), "address": None, "disks": [{"name": "db.vda", "size": disk.stat().st_size}]}
        while True:
            progress(facts | {"checkpoint": {"number": 12}})
            time.sleep(0.05)

    world.beta.replies["checkpoint.serve"] = serve
    monkeypatch.setattr("drctl.cli.guest_fish.present", lambda: False)
    before, threads = hashlib.sha256(disk.read_bytes()).hexdigest(), threading.active_count()
    yield world
    process.terminate()
    process.wait()
    assert hashlib.sha256(disk.read_bytes()).hexdigest() == before, "the checkpoint was written to"
    assert loop_devices() == []
    assert "drctl-" not in Path("/proc/mounts").read_text()
    assert list(Path("/var/tmp").glob("drctl-files-*")) == []
    assert threading.active_count() < threads + 20


def test_file_systems_and_their_tops_are_shown(served) -> None:
    result = served("restore", "files", "web/db/vda")
    assert result.code == 0, result.err
    assert "2          64.0 MiB  ext4         data" in result.out
    assert "hosts -> /etc/shop.conf" in result.out
    listed = served("restore", "files", "web/db/vda", "/etc", "--list")
    assert (listed.code, "shop.conf" in listed.out, "orders.db" in listed.out) == (0, True, False)


def test_files_are_copied_out(served, tmp_path) -> None:
    out = tmp_path / "out"
    result = served(
        "restore", "files", "web/db/vda", "/hosts", "/orders.db", "/", "-k", "#11", "--output", str(out), "--yes"
    )
    assert result.code == 0, result.err
    assert (out / "shop.conf").read_text() == "a = 1\n", "the link leads where the guest would find itself"
    assert (out / "orders.db").read_bytes() == (out / "root/orders.db").read_bytes()
    assert len((out / "orders.db").read_bytes()) == 3 * MIB
    assert "passed over: /pipe: a device, pipe or socket" in result.err
    again = served("restore", "files", "web/db/vda", "/orders.db", "--output", str(out), "--yes")
    assert (again.code, "is there already" in again.err) == (12, True)


def test_what_is_not_there(served, tmp_path) -> None:
    assert served("restore", "files", "web/db/vda", "/none", "-o", str(tmp_path / "o"), "--yes").code == 11
    assert served("restore", "files", "web/db/vda", "--partition", "3").code == 11
    wrong = served("restore", "files", "web/db/vda", "--partition", "1")
    assert (wrong.code, "partition 1 holds nothing that is known" in wrong.err) == (42, True)
    assert served("restore", "files", "web-db-vda").code == 2
    assert served("restore", "files", "web/db/vda", "/etc").code == 2


def test_a_disk_is_copied_and_compared(served, tmp_path, disk) -> None:
    file = tmp_path / "out/db.raw"
    result = served("restore", "disk", "web/db/vda", "--checkpoint", "#11", "--output", str(file), "--yes")
    assert result.code == 0, result.err
    assert file.read_bytes() == disk.read_bytes()
    assert served("restore", "disk", "web/db/vda", "--output", str(file), "--yes").code == 12
    image = tmp_path / "db.qcow2"
    assert served("restore", "disk", "web/db/vda", "-f", "qcow2", "-o", str(image), "--yes").code == 0
    assert "qcow2" in run("qemu-img", "info", str(image))
    assert not served("restore", "disk", "web/db/vda", "-o", str(tmp_path / "n"), "--dry-run").code
    assert not (tmp_path / "n").exists()


def test_a_disk_of_volumes_in_volumes_says_what_can_be_done(tmp_path) -> None:
    found = [guest_disk.Volume(1, 0, MIB, "LVM2_member", ""), guest_disk.Volume(2, MIB, MIB, "swap", "")]
    with pytest.raises(PreconditionFailed, match="no file system that can be mounted") as caught:
        guest_disk.pick(found, None)
    assert "guestmount" in caught.value.hint
    two = [guest_disk.Volume(n, n * MIB, MIB, "ext4", "") for n in (1, 2)]
    with pytest.raises(PreconditionFailed, match="several file systems"):
        guest_disk.pick(two, None)
    assert guest_disk.pick(two, 2).number == 2


def test_what_is_missing_is_told_by_its_package(served, monkeypatch) -> None:
    monkeypatch.setattr(guest_disk.shutil, "which", lambda name: None if name == "nbdfuse" else "/bin/x")
    result = served("restore", "files", "web/db/vda")
    assert (result.code, "nbdfuse is in libnbd-bin (Debian)" in result.err) == (43, True)
    monkeypatch.setattr(guest_disk.os, "geteuid", lambda: 1000)
    with pytest.raises(SetupFailed, match="only root"):
        guest_disk.demand_tools()
