"""A Debian with cloud-init, moved by a plan: at the other site it has the address that its seed tells, and comes home with its
own. Minutes, since it boots under emulation."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from drctl.appliance.recovery.seed_image import seed_image
from drctl.hypervisor.seed_drive import insert_seed
from drctl.model.address import CardAddress
from tests.integration import debian_rig
from tests.integration.plan_rig import Operator, wait_for

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(5400)]

BOOT = 1500.0
PLAN = """\
plan = "wiki"
groups = ["wiki"]
time_limit = "1h"
[[stage]]
name = "wiki"
[[stage.vm]]
name = "wiki"
re_ip = "cloud-init"
time_limit = "20m"
[[stage.vm.address]]
ip = ["10.9.0.11/24", "fd00:9::11/64"]
gateway = ["10.9.0.1"]
dns = ["10.9.0.2"]
[[stage.vm.check]]
kind = "console"
text = "10.9.0.11/24"
interval = "2s"
retries = 600
"""


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    if lacking := debian_rig.missing():
        pytest.skip(lacking)
    directory = Path(tempfile.mkdtemp(prefix="drctl-debian-", dir="/var/tmp"))
    yield debian_rig.make_image(directory)
    shutil.rmtree(directory)


def test_it_takes_its_address_from_the_seed(image, tmp_path):
    """QEMU alone, on a copy: the seed is where a recovery would put it, and cloud-init sees a new instance in it."""
    target = ET.fromstring(insert_seed(debian_rig.definition("wiki", image, image), "/s")[0]).find(
        "devices/disk[@device='cdrom']/target"
    )
    assert target.get("bus") == "scsi"
    seed, serial, overlay = tmp_path / "seed.iso", tmp_path / "serial.log", tmp_path / "overlay.qcow2"
    card = CardAddress(1, ("10.9.0.11/24", "fd00:9::11/64"), ("10.9.0.1",), ("10.9.0.2",))
    seed.write_bytes(seed_image("drctl-test", [(debian_rig.MAC, card)]))
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "raw", str(overlay)]
    subprocess.run(create, check=True)
    command = [
        *("qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "768", "-nodefaults"),
        *("-display", "none", "-serial", f"file:{serial}", "-drive", f"file={overlay},format=qcow2,if=virtio"),
        *("-device", "virtio-scsi-pci", "-drive", f"file={seed},format=raw,if=none,id=seed,readonly=on"),
        *("-device", "scsi-cd,drive=seed", "-netdev", "user,id=n,restrict=on"),
        *("-device", f"virtio-net-pci,netdev=n,mac={debian_rig.MAC}"),
    ]
    process = subprocess.Popen(command)
    try:
        line = await_told(SimpleNamespace(serial=serial), "10.9.0.11/24", 0)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert line.startswith("wiki has addresses"), "it keeps its name"
    assert "fd00:9::11/64" in line
    assert debian_rig.OLD_ADDRESS not in line


@pytest.fixture(scope="module")
def wiki(make_lab, image) -> Iterator[SimpleNamespace]:
    """It runs at alpha, protected; `serial` is what it says at whichever site."""
    rig = make_lab(guests=1, rate=1, chains=1, slots=256)
    rig.virsh("alpha", "destroy", "web-1")  # what comes with the lab is not needed
    alpha = rig.layout.site("alpha")
    disk, serial = alpha.images / "wiki.raw", rig.layout.serial("wiki")
    shutil.move(image, disk)
    shutil.chown(disk, alpha.images.owner(), alpha.images.group())
    xml = rig.directory / "wiki.xml"
    xml.write_text(debian_rig.definition("wiki", disk, serial))
    xml.chmod(0o644)
    rig.virsh("alpha", "define", str(xml))
    rig.virsh("alpha", "start", "wiki")
    made = SimpleNamespace(rig=rig, operator=Operator(rig, {"wiki": ["wiki"]}), serial=serial)
    await_told(made, debian_rig.OLD_ADDRESS, 0)
    yield made
    made.operator.close()


def await_told(wiki, address: str, begin: int) -> str:
    """The line in which it tells this address, after that place in what it says."""

    def look() -> str:
        text = wiki.serial.read_bytes()[begin:].decode(errors="replace") if wiki.serial.exists() else ""
        lines = [line for line in text.splitlines() if "has addresses" in line]
        return lines[-1] if lines and address in lines[-1] else ""

    return str(wait_for(look, f"wiki has {address}", BOOT))


def test_it_has_the_seeds_address_there_and_its_own_at_home(wiki):
    operator = wiki.operator
    operator.drctl("apply", "--yes")
    operator.drctl("replicate", "start", "wiki", "--yes", "--wait", "--timeout", "20m")
    operator.write("wiki", PLAN)
    operator.drctl("plan", "validate", "wiki")
    said = wiki.serial.stat().st_size
    document = operator.json("plan", "run", "wiki", "--mode", "switchover", "--shutdown-timeout", "10m", "--yes")
    assert document["verdict"] == "passed"
    line = await_told(wiki, "fd00:9::11/64", said)
    assert line.startswith("wiki has addresses"), "cloud-init gave it no other name"
    assert "10.9.0.11/24" in line
    assert debian_rig.OLD_ADDRESS not in line
    assert "wiki.seed-g" in wiki.rig.virsh("beta", "dumpxml", "wiki")

    said = wiki.serial.stat().st_size
    operator.drctl("rollback", "wiki", "--yes")
    assert "10.9.0.11" not in await_told(wiki, debian_rig.OLD_ADDRESS, said)
