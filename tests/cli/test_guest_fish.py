"""Files by libguestfs: what it is asked, which file system is meant, and what is done where it can't start."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from drctl.cli import guest_fish
from drctl.cli.guest_fish import FileSystem
from drctl.errors import NotFound, PreconditionFailed, SetupFailed, StepFailed

URI = "nbd+unix:///db.vda?socket=/run/drctl/views/v.sock"
FOUND = [FileSystem("/dev/sda1", "vfat"), FileSystem("/dev/sda2", "swap"), FileSystem("/dev/vg/root", "xfs")]


def program(directory: Path, name: str, body: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """What stands for guestfish and guestmount: a disk with one file system that has one file."""
    directory = tmp_path / "bin"
    directory.mkdir()
    log = f'echo "$(basename $0) $*" >> {tmp_path}/calls'
    program(directory, "guestfish", f"{log}\necho /dev/sda1: swap; echo /dev/vg/root: ext4")
    program(directory, "guestmount", f'{log}\nfor place; do :; done; echo "a = 1" > $place/shop.conf')
    program(directory, "guestunmount", f"{log}\nrm $1/shop.conf")
    monkeypatch.setenv("PATH", str(directory), prepend=":")
    return directory


@pytest.fixture
def served(world, programs):
    def serve(params, progress):
        facts = {"socket": "/run/v.sock", "address": None, "disks": [{"name": "db.vda", "size": 1 << 20}]}
        while True:
            progress(facts | {"checkpoint": {"number": 12}})

    world.applied().beta.replies["checkpoint.serve"] = serve
    return world


def test_the_export_is_named_as_libguestfs_names_it() -> None:
    assert guest_fish.address(URI) == "nbd:///db.vda?socket=/run/drctl/views/v.sock"
    assert guest_fish.address("nbd://127.0.0.1:10809/db.vda") == "nbd://127.0.0.1:10809/db.vda"
    with pytest.raises(StepFailed):
        guest_fish.address("/dev/sda")


def test_which_file_system_is_meant() -> None:
    assert guest_fish.pick(FOUND, "/dev/vg/root").kind == "xfs"
    assert guest_fish.pick(FOUND, "1").kind == "vfat"
    assert guest_fish.pick([FileSystem("/dev/sda", "ext4")], "0").kind == "ext4"
    assert guest_fish.pick(FOUND[1:], "").name == "/dev/vg/root"
    with pytest.raises(PreconditionFailed, match="several file systems"):
        guest_fish.pick(FOUND, "")
    with pytest.raises(PreconditionFailed, match="holds swap"):
        guest_fish.pick(FOUND, "2")
    with pytest.raises(NotFound):
        guest_fish.pick(FOUND, "3")
    with pytest.raises(PreconditionFailed, match="no file system"):
        guest_fish.pick([FileSystem("/dev/sda1", "crypto_LUKS")], "")


def test_files_are_shown_and_copied_and_the_mount_is_gone(served, programs, tmp_path) -> None:
    shown = served("restore", "files", "web/db/vda")
    assert (shown.code, "/dev/vg/root" in shown.out, "shop.conf" in shown.out) == (0, True, True), shown.err
    out = tmp_path / "out"
    copied = served("restore", "files", "web/db/vda", "/shop.conf", "--output", str(out), "--yes")
    assert (copied.code, (out / "shop.conf").read_text()) == (0, "a = 1\n"), copied.err
    calls = (tmp_path / "calls").read_text().splitlines()
    uri = "nbd:///db.vda?socket=/run/v.sock"
    assert calls[0] == f"guestfish --ro --format=raw -a {uri} run : list-filesystems"
    assert calls[1].startswith(f"guestmount --ro --format=raw -a {uri} -m /dev/vg/root /var/tmp/drctl-mount-")
    assert calls[2].startswith("guestunmount /var/tmp/drctl-mount-")


def test_where_its_machine_can_not_start_the_kernel_is_asked(served, programs, monkeypatch) -> None:
    program(programs, "guestfish", "echo 'libguestfs: error: /usr/bin/supermin exited with error status 1' >&2; exit 1")
    asked: list[str] = []

    def opened(uri, scratch):
        asked.append(uri)
        raise StepFailed("qemu-nbd does not serve: nothing is there")

    monkeypatch.setattr("drctl.cli.guest_disk.demand_tools", lambda: None)
    monkeypatch.setattr("drctl.cli.guest_disk.opened", opened)
    result = served("restore", "files", "web/db/vda")
    assert "libguestfs can't start its machine" in result.err
    assert "this host's kernel reads the disk instead" in result.err
    assert asked == ["nbd+unix:///db.vda?socket=/run/v.sock"]
    must = served("restore", "files", "web/db/vda", "--by", "libguestfs")
    assert (must.code, len(asked)) == (SetupFailed.exit_code, 1)
    served("restore", "files", "web/db/vda", "--by", "kernel")
    assert len(asked) == 2
    named = served("restore", "files", "web/db/vda", "--by", "kernel", "--partition", "/dev/vg/root")
    assert (named.code, "only libguestfs knows" in named.err) == (PreconditionFailed.exit_code, True)


def test_what_it_says_of_a_damaged_disk_is_no_reason_to_ask_the_kernel(served, programs) -> None:
    program(programs, "guestmount", "echo 'guestmount: mount: wrong fs type' >&2; exit 1")
    result = served("restore", "files", "web/db/vda")
    assert (result.code, "wrong fs type" in result.err) == (StepFailed.exit_code, True)


def test_what_is_missing_is_told_by_its_package(served, programs, monkeypatch) -> None:
    monkeypatch.setattr("drctl.cli.guest_fish.shutil.which", lambda name: None)
    result = served("restore", "files", "web/db/vda", "--by", "libguestfs")
    assert (result.code, "libguestfs-tools" in result.err) == (SetupFailed.exit_code, True)


@pytest.mark.skipif(not guest_fish.present(), reason="no libguestfs")
def test_the_real_programs_know_these_arguments(tmp_path) -> None:
    """Without booting anything: an argument that they don't know makes them tell their usage."""
    for command in (guest_fish.list_command(URI), guest_fish.mount_command(URI, "/dev/sda1", tmp_path)):
        told = subprocess.run([command[0], "--help"], capture_output=True, text=True, check=True).stdout
        for option in (word.partition("=")[0] for word in command if word.startswith("-")):
            assert option in told, (command[0], option)
