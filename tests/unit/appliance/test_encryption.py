"""What the kernel tells of the volume under a directory, on hosts that are directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from drctl.appliance.encryption import Encryption, encryption
from drctl.appliance.info import store_findings


class Host:
    """`/proc` and `/sys` of a host with the given mounts and block devices."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        self.table = root / "proc/self/mountinfo"
        self.table.write_text("")

    def mount(self, place: str, device: str, kind: str = "ext4", source: str = "/dev/x") -> None:
        with self.table.open("a") as file:
            file.write(f"22 1 {device} / {place} rw,relatime shared:1 - {kind} {source} rw\n")

    def block(self, device: str, *below: str, uuid: str = "") -> None:
        place = self.root / "sys/dev/block" / device
        (place / "slaves").mkdir(parents=True)
        if uuid:
            (place / "dm").mkdir()
            (place / "dm/uuid").write_text(f"{uuid}\n")
        for other in below:
            (place / "slaves" / other.replace(":", "_")).symlink_to(self.root / "sys/dev/block" / other)

    def of(self, path: str = "/var/lib/drctl/store") -> Encryption:
        return encryption(Path(path), self.root)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_a_plain_disk_is_not(host: Host) -> None:
    host.mount("/", "8:1")
    host.block("8:1")
    assert host.of() is Encryption.NO


def test_a_logical_volume_on_luks_is_and_the_innermost_mount_counts(host: Host) -> None:
    host.mount("/", "8:1")
    host.block("8:1")
    host.mount("/var/lib/drctl", "253:1")
    host.block("253:1", "253:0", uuid="LVM-abc")
    host.block("253:0", "8:2", uuid="CRYPT-LUKS2-abc")
    host.block("8:2")
    assert host.of() is Encryption.YES
    assert host.of("/var/lib/drctl2") is Encryption.NO


def test_one_plain_disk_below_is_enough(host: Host) -> None:
    host.mount("/", "9:0")
    host.block("9:0", "253:0", "8:2")
    host.block("253:0", uuid="CRYPT-LUKS2-abc")
    host.block("8:2")
    assert host.of() is Encryption.NO


@pytest.mark.parametrize("kind", ["tmpfs", "zfs", "overlay", "nfs4", "fuse.sshfs"])
def test_of_what_hides_its_disks_nothing_is_known(host: Host, kind: str) -> None:
    host.mount("/", "0:44", kind)
    assert host.of() is Encryption.UNKNOWN


def test_one_that_encrypts_by_itself(host: Host) -> None:
    host.mount("/var/lib/drctl", "0:50", "ecryptfs", "/secret")
    assert host.of() is Encryption.YES


def test_btrfs_has_a_number_of_its_own(host: Host) -> None:
    host.mount("/", "0:30", "btrfs", "/dev/sda2")
    (host.root / "sys/class/block/sda2/slaves").mkdir(parents=True)
    assert host.of() is Encryption.NO


def test_a_host_that_tells_nothing(tmp_path: Path) -> None:
    assert encryption(tmp_path, tmp_path / "none") is Encryption.UNKNOWN
    assert Host(tmp_path).of() is Encryption.UNKNOWN


@pytest.mark.parametrize(
    ("uri", "told", "warned"),
    [
        ("qemu:///system", Encryption.NO, True),
        ("qemu:///system", Encryption.YES, False),
        ("qemu:///system", Encryption.UNKNOWN, False),
        ("qemu+unix:///session?socket=x", Encryption.NO, False),
    ],
)
def test_what_doctor_says_of_a_store(tmp_path: Path, uri: str, told: Encryption, warned: bool) -> None:
    assert store_findings(uri, tmp_path, lambda _: told) == [], "there is no store"
    (tmp_path / "web").mkdir()
    (tmp_path / "web/group.json").write_text("{}")
    assert [one["severity"] for one in store_findings(uri, tmp_path, lambda _: told)] == ["warning"] * warned
