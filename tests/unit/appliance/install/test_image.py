"""The parts of an appliance's image and of its machine's description that need no Debian and no host."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drctl.appliance.install import vm_text
from drctl.appliance.install.bundle import Bundle
from drctl.appliance.install.ext4 import used_inodes
from drctl.appliance.install.image import MANIFEST, VMDK, Source, boot_sector, build_image, load_image, set_content_id
from drctl.cli.config import load_config
from drctl.errors import ConfigInvalid, IntegrityError, NotFound, SetupFailed, UnsupportedFormat
from drctl.hypervisor import vmdk, vmx
from drctl.model.site import ApplianceMachine

MACHINE = ApplianceMachine("image", "datastore1", 'VM "Network"', "key")


def line(text: str) -> str:
    return f"drctl-appliance {text} {hashlib.sha256(text.encode()).hexdigest()[:16]}\r\n"


def test_what_a_console_tells_is_believed_where_it_proves_itself() -> None:
    key = line("key ssh-ed25519 AAAA")
    noise = "[  12.3] something\r\n" + line("key ssh-rsa BBBB").replace("BBBB", "BB[ 3.1] audit: BB")
    told = vm_text.told(noise + key + key + line("address 192.0.2.20") + line("ready 1-2"))
    assert told == vm_text.Told((("ssh-ed25519", "AAAA"),), ("192.0.2.20",), True)
    assert vm_text.told(key[:-4]) == vm_text.Told((), (), False)


@given(st.text(max_size=200))
def test_any_console_can_be_read(text: str) -> None:
    assert vm_text.told(text).keys == ()


def test_a_definition_is_one_that_the_driver_reads() -> None:
    made = vmx.parse(vm_text.definition("drctl-esx1", "uuid", MACHINE))
    assert [disk.file for disk in made.disks()] == ["system.vmdk", "seed.vmdk"]
    assert made["ethernet0.networkName"] == 'VM "Network"'
    assert (made["memSize"], made["numvcpus"]) == ("2048", "2")
    assert (made["serial0.fileType"], made["serial0.fileName"]) == ("file", "console.log")
    assert vmdk.parse(vm_text.descriptor("seed-flat.vmdk", vm_text.SEED_SIZE)).size == vm_text.SEED_SIZE


def test_a_seed_brings_key_name_and_network() -> None:
    machine = ApplianceMachine(
        "image", "d", "n", "k", "192.0.2.20/24", gateway="192.0.2.1", nameservers=("192.0.2.53",)
    )
    data = vm_text.seed("drctl-esx1", machine, "ssh-ed25519 AAAA me\n\n")
    assert len(data) == vm_text.SEED_SIZE
    assert data == vm_text.seed("drctl-esx1", machine, "ssh-ed25519 AAAA me")
    assert data.startswith(b"drctl-seed/")  # what the guest looks for
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {each.name: archive.extractfile(each).read().decode() for each in archive if each.isfile()}  # type: ignore[union-attr]
    assert files["drctl-seed/authorized_keys"] == "ssh-ed25519 AAAA me\n"
    assert files["drctl-seed/hostname"] == "drctl-esx1\n"
    assert files["drctl-seed/network"].endswith("Address=192.0.2.20/24\nGateway=192.0.2.1\nDNS=192.0.2.53\n")
    with pytest.raises(ConfigInvalid, match="is no address"):
        vm_text.seed("x", ApplianceMachine("i", "d", "n", "k", "192.0.2.20/24", nameservers=("a\nDHCP=no",)), "key")
    with pytest.raises(ConfigInvalid, match="too large"):
        vm_text.seed("x", MACHINE, "k" * 65536)


@pytest.mark.skipif(not shutil.which("mke2fs") or not shutil.which("debugfs"), reason="needs e2fsprogs")
def test_the_inodes_of_a_file_system_are_found(tmp_path: Path) -> None:
    tree, disk = tmp_path / "tree", tmp_path / "disk"
    for number in range(40):
        (tree / f"{number % 7}").mkdir(parents=True, exist_ok=True)
        (tree / f"{number % 7}/{number}").write_text("x")
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-E", "offset=1048576", "-d", str(tree), str(disk), "32768k"]
    with disk.open("wb") as file:
        file.truncate(33 << 20)
    subprocess.run(argv, check=True)
    with disk.open("rb") as file:
        found = used_inodes(file, 1 << 20)
    # 10 reserved, lost+found, 7 directories, 40 files
    assert len(found) == 10 + 1 + 7 + 40
    assert found[:11] == list(range(1, 12))
    told = subprocess.run(["debugfs", "-R", "ls -l /3", f"{disk}?offset=1048576"], capture_output=True, check=True)
    assert {int(row.split()[0]) for row in told.stdout.decode().splitlines() if row.strip()} <= set(found)
    with pytest.raises(UnsupportedFormat, match="no ext4"):
        used_inodes(io.BytesIO(bytes(4096)))


def test_a_partition_table_is_put_beside_the_boot_code() -> None:
    made = boot_sector(b"\xeb" + bytes(511), "seed")
    assert (len(made), made[0], made[510:]) == (512, 0xEB, b"\x55\xaa")
    assert made[446:462][4] == 0x83
    assert int.from_bytes(made[454:458], "little") == 2048
    assert made != boot_sector(b"\xeb" + bytes(511), "other")


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")
def test_the_same_disk_is_the_same_vmdk(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(hashlib.sha512(b"x").digest() * 4096 + bytes(1 << 20))
    made = []
    for place in (tmp_path / "one", tmp_path / "other"):
        place.mkdir()
        argv = ["qemu-img", "convert", "-m", "1", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]
        subprocess.run([*argv, str(tmp_path / "raw"), str(place / VMDK)], check=True)
        set_content_id(place / VMDK, "ffffffff")
        made.append((place / VMDK).read_bytes())
    assert made[0] == made[1]
    assert b"\nCID=fffffffd\n" in made[0]
    compared = ["qemu-img", "compare", "-f", "raw", "-F", "vmdk", str(tmp_path / "raw"), str(place / VMDK)]
    assert subprocess.run(compared, capture_output=True, check=False).returncode == 0
    (tmp_path / "none").write_bytes(b"none")
    with pytest.raises(SetupFailed):
        set_content_id(tmp_path / "none", "00000000")


def test_only_a_whole_image_is_taken(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="image"):
        load_image(tmp_path)
    (tmp_path / VMDK).write_bytes(b"disk")
    row = {"name": VMDK, "size": 4, "sha256": hashlib.sha256(b"disk").hexdigest()}
    fields = {"format": 1, "identity": "1-a", "suite": "bookworm", "size": 4, "files": [row]}
    (tmp_path / MANIFEST).write_text(json.dumps(fields))
    assert load_image(tmp_path).sha256 == row["sha256"]
    (tmp_path / VMDK).write_bytes(b"disc")
    with pytest.raises(IntegrityError, match="is not the file"):
        load_image(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(fields | {"format": 9}))
    with pytest.raises(UnsupportedFormat):
        load_image(tmp_path)


def test_wheels_for_a_python_that_no_debian_has_make_no_image(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match=r"Python 3\.12"):
        build_image(tmp_path / "i", Bundle(tmp_path, "1", "3.12", "x86_64", ()), Source(), lambda _: None)
    assert not (tmp_path / "i").exists()


HOST = """[[site]]
name = "alpha"
[[host]]
name = "esx1"
site = "alpha"
kind = "esx"
ssh = "root@esx1"
appliance = "root@192.0.2.20"
"""


def test_a_machine_is_told_of_in_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "drctl.toml"
    keys = 'appliance_identity = "id"\nappliance_known_hosts = "known"\n[host.machine]\ndatastore = "ds"\n'
    file.write_text(HOST + keys)
    [host] = load_config(file).hosts
    assert host.machine
    assert (host.machine.image, host.machine.authorized_key) == (str(tmp_path / "image"), str(tmp_path / "id.pub"))
    file.write_text(HOST + keys + 'adress = "x"\n')
    with pytest.raises(ConfigInvalid, match="adress"):
        load_config(file)
    file.write_text(HOST + '[host.machine]\ndatastore = "ds"\n')
    with pytest.raises(ConfigInvalid, match="can't be reached"):
        load_config(file)
