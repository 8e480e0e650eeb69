"""Addresses before a machine boots: the seed's content, its drive, reservations that are taken back."""

from __future__ import annotations

import json
import shutil
import subprocess
import xml.etree.ElementTree as ET

import pytest

from drctl.appliance.recovery.memory import Killed, MemoryWorld
from drctl.appliance.recovery.recoveries import Recovery
from drctl.appliance.recovery.seed_image import iso_image, network_config, seed_image, user_data
from drctl.appliance.recovery.state import RecoveryFiles
from drctl.errors import Refused
from drctl.hypervisor.seed_drive import insert_seed
from drctl.model.address import CardAddress

CARD = CardAddress(1, ("10.9.0.11/24", "fd00::11/64"), ("10.9.0.1",), ("10.9.0.2",), ("shop.example.org",))
DHCP = {"web": {"re_ip": "dhcp", "addresses": [{"card": 1, "ip": ["10.9.0.11"]}]}}
WEB_MAC = "52:54:00:00:00:01"


class Host:
    """A recovery host whose supervisor can be killed and started again."""

    def __init__(self, directory):
        self.world = MemoryWorld()
        self.files = RecoveryFiles(directory / "recoveries")
        self.start()

    def start(self):
        self.recovery = Recovery(
            self.world.tools(), self.files, "boot-1", background=lambda _name, action: action(), parallel=1
        )
        self.recovery.resume()

    def test(self, changes, **more):
        return self.recovery.test_start({"group": "erp", "changes": changes, **more}, lambda _: None)

    def stop(self, identity):
        return self.recovery.test_stop({"id": identity}, lambda _: None)


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_a_tests_reservation_goes_with_it(host):
    told = host.test(DHCP)
    assert (told["state"], host.world.addresses.given) == ("running", {WEB_MAC: "10.9.0.11"})
    assert host.world.addresses.lasting == set()
    (card,) = next(one for one in told["machines"] if one["name"] == "web")["cards"]
    assert card == {"mac": WEB_MAC, "network": "lan", "reserved": "10.9.0.11"}
    host.stop(told["id"])
    assert host.world.addresses.given == {}


def test_what_was_reserved_before_is_used_and_stays(host):
    host.world.addresses.given[WEB_MAC] = "10.9.0.11"
    host.stop(host.test(DHCP)["id"])
    assert host.world.addresses.given == {WEB_MAC: "10.9.0.11"}


def test_another_reservation_fails_that_machine_alone(host):
    host.world.addresses.given[WEB_MAC] = "10.9.0.99"
    told = host.test(DHCP)
    states = {one["name"]: (one["state"], one["reason"]) for one in told["machines"]}
    assert states["db"][0] == "running"
    assert states["web"] == ("failed", f"web: lan has 10.9.0.99 reserved for {WEB_MAC}, and 10.9.0.11 is wanted")


def test_a_card_that_is_not_there_fails_its_machine(host):
    told = host.test({"web": {"re_ip": "dhcp", "addresses": [{"card": 2, "ip": ["10.9.0.11"]}]}})
    assert {one["name"]: one["state"] for one in told["machines"]} == {"db": "running", "web": "failed"}


def test_an_unknown_way_is_refused(host):
    with pytest.raises(Refused):
        host.test({"web": {"re_ip": "carrier-pigeon", "addresses": []}})


def test_killed_at_any_point_nothing_stays_reserved_after_the_end(tmp_path):
    """The supervisor dies before and after each effect of a test's start; the next one takes it down whole."""
    counted = Host(tmp_path / "count")
    counted.test(DHCP)
    effects = counted.world.effects.count
    for number in range(1, effects + 1):
        for side in ("die_before", "die_after"):
            host = Host(tmp_path / f"{number}-{side}")
            setattr(host.world.effects, side, number)
            with pytest.raises(Killed):
                host.test(DHCP, label="r")
            host.start()
            told = host.test(DHCP, label="r")
            assert host.world.addresses.given == {WEB_MAC: "10.9.0.11"}
            host.stop(told["id"])
            assert host.world.addresses.given == {}


def test_a_seed_is_written_before_the_machine_boots(host):
    told = host.test({"web": {"re_ip": "cloud-init", "addresses": [{"ip": ["10.9.0.11/24"], "card": 1}]}})
    log = host.world.effects.log
    name = f"web-test-{told['id']}"
    assert log.index("put web.seed.iso") < log.index(f"create {name}")


# -- the image ----------------------------------------------------------------------------------------------------------


def extracted(tmp_path, data, *arguments):
    image = tmp_path / "seed.iso"
    image.write_bytes(data)
    return subprocess.run([*arguments, str(image)], capture_output=True, text=True, check=True, timeout=20).stdout


def test_the_label_is_what_cloud_init_looks_for(tmp_path):
    program = shutil.which("blkid", path="/usr/sbin:/sbin:/usr/bin")
    if program is None:
        pytest.skip("no blkid")
    told = extracted(tmp_path, seed_image("i-1", [(WEB_MAC, CARD)]), program, "-p", "-o", "export")
    assert {"LABEL=cidata", "TYPE=iso9660"} <= set(told.splitlines())


def test_the_files_can_be_read_by_their_long_names():
    """The Joliet directory, read as ISO 9660 says: at the place that the second descriptor's root record names."""
    data = seed_image("drctl-1", [(WEB_MAC, CARD)])
    assert (data[32769:32774], data[17 * 2048], data[17 * 2048 + 88 : 17 * 2048 + 91]) == (b"CD001", 2, b"%/E")
    root = int.from_bytes(data[17 * 2048 + 158 : 17 * 2048 + 162], "little") * 2048
    found, at = {}, root
    while (length := data[at]) != 0:
        name = data[at + 33 : at + 33 + data[at + 32]]
        where, size = (int.from_bytes(data[at + n : at + n + 4], "little") for n in (2, 10))
        found[name] = data[where * 2048 : where * 2048 + size]
        at += length
    names = {name.decode("utf-16-be").removesuffix(";1"): text for name, text in found.items() if len(name) > 1}
    assert set(names) == {"meta-data", "network-config", "user-data"}
    assert json.loads(names["meta-data"]) == {"instance-id": "drctl-1"}
    assert json.loads(names["network-config"]) == network_config([(WEB_MAC, CARD)])
    assert names["user-data"].startswith(b"#cloud-config\n")
    assert json.loads(names["user-data"].partition(b"\n")[2]) == user_data()


def test_the_image_has_the_size_that_it_says():
    data = iso_image({"a": b"x" * 5000, "b": b""})
    assert int.from_bytes(data[16 * 2048 + 80 : 16 * 2048 + 84], "little") * 2048 == len(data)


def test_a_cards_settings():
    told = network_config([(WEB_MAC.upper(), CARD), (WEB_MAC, CardAddress(2, ("10.8.0.2/16",), interface="ens4"))])
    first, second = told["ethernets"]["card1"], told["ethernets"]["ens4"]
    assert (first["match"], first["gateway4"], "gateway6" in first) == ({"macaddress": WEB_MAC}, "10.9.0.1", False)
    assert (second["set-name"], "gateway4" in second, "nameservers" in second) == ("ens4", False, False)


# -- the drive ----------------------------------------------------------------------------------------------------------

DOMAIN = "<domain><name>m</name><os><type arch='{arch}' machine='{machine}'>hvm</type></os><devices>{disks}</devices></domain>"
EMPTY = "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>"
FULL = "<disk type='file' device='cdrom'><source file='/x.iso'/><target dev='sdd' bus='sata'/></disk>"
VIRTIO = "<disk type='file' device='disk'><source file='/d.raw'/><target dev='vda' bus='virtio'/></disk>"
SCSI = "<controller type='scsi' index='0' model='{}'/>"


@pytest.mark.parametrize(
    ("machine", "disks", "target"),
    [
        ("pc-q35-7.2", EMPTY, ("sda", "sata")),
        ("pc-q35-7.2", FULL, ("sdc", "sata")),
        ("pc-q35-7.2", VIRTIO + EMPTY, ("sda", "sata")),
        ("pc-q35-7.2", VIRTIO, ("sdd", "scsi")),
        ("pc-q35-7.2", VIRTIO + FULL, ("sdc", "scsi")),
        ("pc-q35-7.2", SCSI.format("virtio-scsi"), ("sdd", "scsi")),
        ("pc-q35-7.2", VIRTIO + SCSI.format("lsilogic"), ("sdd", "sata")),
        ("pc-q35-7.2", "", ("sdd", "sata")),
        ("pc-i440fx-7.2", VIRTIO, ("hdd", "ide")),
        ("pc-i440fx-7.2", "", ("hdd", "ide")),
        ("pc", "", ("hdd", "ide")),
    ],
)
def test_the_seed_is_in_an_empty_drive_or_in_a_new_one(machine, disks, target):
    definition, note = insert_seed(DOMAIN.format(arch="x86_64", machine=machine, disks=disks), "/i/m.seed.iso")
    drives = ET.fromstring(definition).findall("devices/disk")
    (drive,) = [one for one in drives if one.find("source").get("file") == "/i/m.seed.iso"]
    assert (drive.find("target").get("dev"), drive.find("target").get("bus")) == target
    assert drive.find("readonly") is not None
    assert target[0] in note
    controllers = ET.fromstring(definition).findall("devices/controller[@type='scsi']")
    assert len(controllers) == (target[1] == "scsi" or "scsi" in disks)


def test_other_machines_have_scsi():
    definition, _ = insert_seed(DOMAIN.format(arch="aarch64", machine="virt", disks=""), "/s.iso")
    assert ET.fromstring(definition).find("devices/disk/target").get("bus") == "scsi"
