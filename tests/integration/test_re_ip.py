"""Addresses of recovered machines with the real programs: libvirt's networks and dnsmasq, the guest agent, cloud-init."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from threading import Event

import pytest

from drctl.appliance.recovery.seed_image import network_config, seed_image
from drctl.errors import HypervisorRefused, NotFound
from drctl.model.address import CardAddress
from drctl.plan.readdress import readdress
from tests.integration.libvirt_rig import libvirt_missing
from tests.integration.network_rig import NetworkRig, network_missing

MAC, OTHER = "52:54:00:00:00:11", "52:54:00:00:00:22"
CARD = CardAddress(1, ("10.9.0.11/24", "fd00::11/64"), ("10.9.0.1",), ("10.9.0.2",), ("shop.example.org",))


# -- dhcp ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rig():
    if lacking := libvirt_missing() or network_missing():
        pytest.skip(lacking)
    made = NetworkRig()
    yield made
    made.close()


@pytest.fixture(scope="module")
def book(rig):
    from drctl.hypervisor.libvirt import LibvirtHypervisor

    rig.network()
    with LibvirtHypervisor(rig.uri) as host:
        yield host.addresses


@pytest.mark.lab
@pytest.mark.long
def test_a_machine_gets_what_is_reserved_and_no_longer_when_it_is_released(rig, book):
    book.reserve("shop-test", MAC, "10.9.0.11", lasting=False)
    book.reserve("shop-test", MAC.upper(), "10.9.0.11", lasting=False)
    assert book.reserved("shop-test", MAC.upper()) == "10.9.0.11"
    assert rig.lease(MAC) == "10.9.0.11"
    assert rig.lease(OTHER).startswith("10.9.0.1")
    assert rig.lease(OTHER) != "10.9.0.11"
    assert MAC not in rig.virsh("net-dumpxml", "--inactive", "shop-test").stdout
    book.release("shop-test", MAC, "10.9.0.11")
    book.release("shop-test", MAC, "10.9.0.11")
    assert book.reserved("shop-test", MAC) == ""
    assert MAC not in rig.virsh("net-dumpxml", "shop-test").stdout


@pytest.mark.lab
@pytest.mark.long
def test_a_lasting_one_is_there_after_the_network_was_started_anew(rig, book):
    book.reserve("shop-test", OTHER, "10.9.0.12", lasting=True)
    rig.virsh("net-destroy", "shop-test")
    rig.virsh("net-start", "shop-test")
    assert rig.lease(OTHER) == "10.9.0.12"
    with pytest.raises(HypervisorRefused, match="reserved for"):
        book.reserve("shop-test", MAC, "10.9.0.12", lasting=True)
    book.release("shop-test", OTHER, "10.9.0.12")
    assert OTHER not in rig.virsh("net-dumpxml", "--inactive", "shop-test").stdout


@pytest.mark.lab
@pytest.mark.long
def test_a_network_that_is_not_there_or_has_no_dhcp(rig, book):
    with pytest.raises(NotFound):
        book.reserved("nowhere", MAC)
    path = rig.directory / "bare.xml"
    path.write_text("<network><name>bare</name><bridge name='drbr1'/></network>")
    rig.virsh("net-define", str(path))
    with pytest.raises(HypervisorRefused):
        book.reserve("bare", MAC, "10.9.0.11", lasting=True)


# -- guest agent --------------------------------------------------------------------------------------------------------


class RealAgent:
    """qemu-ga with a channel of its own, in namespaces of its own, where a network card is."""

    def __init__(self, directory: Path, program: Path) -> None:
        self.socket = directory / "ga"
        script = (
            f"mount --bind {directory}/resolv.conf /etc/resolv.conf; ip link set lo up; "
            f"ip link add ens3 type veth peer name ens3p; ip link set ens3p up; ip link set ens3 address {MAC} up; ip addr add 192.0.2.7/24 dev ens3; "
            f"exec {program} -m unix-listen -p {self.socket} -t {directory} -f {directory}/pid"
        )
        argv = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c", script]
        self._log = (directory / "log").open("wb")
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        deadline = time.monotonic() + 10
        while not self.socket.exists():
            assert self.process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self._channel = socket.socket(socket.AF_UNIX)
        self._channel.settimeout(10)
        self._channel.connect(str(self.socket))
        self._lines = self._channel.makefile("rb")

    def __call__(self, sent: dict) -> object:
        self._channel.sendall(json.dumps(sent).encode() + b"\n")
        told = json.loads(self._lines.readline())
        if "error" in told:
            raise HypervisorRefused(told["error"]["desc"])
        return told["return"]

    def inside(self, *command: str) -> str:
        argv = ["nsenter", "-t", str(self.process.pid), "-n", "-m", *command]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=10).stdout

    def close(self) -> None:
        self._lines.close()
        self._channel.close()
        self.process.kill()
        self.process.wait(10)
        self._log.close()


@pytest.fixture
def agent():
    program = shutil.which("qemu-ga", path="/usr/sbin:/usr/bin")
    unpacked = Path("/var/cache/drctl-lab/qemu-guest-agent/unpacked/usr/sbin/qemu-ga")
    if program is None and unpacked.exists():
        program = str(unpacked)
    if os.getuid() != 0 or program is None:
        pytest.skip("needs root and qemu-ga (the lab's cache has one)")
    directory = Path(tempfile.mkdtemp(prefix="drctl-ga-", dir="/tmp"))
    (directory / "resolv.conf").write_text("nameserver 192.0.2.53\n")
    made = RealAgent(directory, Path(program))
    yield made
    made.close()
    shutil.rmtree(directory)


def test_the_real_agent_gives_a_card_its_addresses(agent):
    limit = {"time_limit": 20.0, "cancelled": Event(), "monotonic": time.monotonic}
    done = readdress(agent, [MAC], [CARD], **limit)
    assert (done.reason, done.seen) == ("", "ens3 10.9.0.11, fd00::11")
    assert "way: ip" in done.output
    told = json.loads(agent.inside("ip", "-j", "addr", "show", "dev", "ens3"))[0]["addr_info"]
    assert {one["local"] for one in told if one["scope"] == "global"} == {"10.9.0.11", "fd00::11"}
    assert "default via 10.9.0.1 dev ens3" in agent.inside("ip", "route")
    assert "search shop.example.org\nnameserver 10.9.0.2" in agent.inside("cat", "/etc/resolv.conf")
    again = readdress(agent, [MAC], [CARD], **limit)
    assert again.reason == ""


def test_the_real_agent_tells_what_the_commands_said(agent):
    done = readdress(
        agent,
        [MAC],
        [CardAddress(1, ("10.9.0.11/24",), ("10.8.0.1",))],
        time_limit=20.0,
        cancelled=Event(),
        monotonic=time.monotonic,
    )
    assert done.reason.startswith("/bin/sh: exited with 2: ")
    assert "way: ip" in done.output


# -- cloud-init ---------------------------------------------------------------------------------------------------------


def test_cloud_init_takes_the_network_configuration(tmp_path):
    """Its own renderers, run as a program: netplan's file and Debian's older one say what was wanted."""
    program = shutil.which("cloud-init")
    if program is None:
        pytest.skip("no cloud-init")
    path = tmp_path / "network-config"
    path.write_text(
        json.dumps(network_config([(MAC, CardAddress(1, CARD.ip, CARD.gateway, CARD.dns, CARD.search, "ens3"))]))
    )
    for kind in ("netplan", "eni"):
        argv = [program, "devel", "net-convert", "-p", str(path), "-k", "yaml", "-d", str(tmp_path / kind)]
        subprocess.run([*argv, "-D", "debian", "-O", kind, "-m", f"ens3,{MAC}"], check=True, capture_output=True)
    texts = "\n".join(one.read_text() for one in tmp_path.rglob("*") if one.is_file() and one != path)
    assert texts.count("10.9.0.11/24") >= 2
    assert texts.count("fd00::11/64") >= 2
    assert texts.count("10.9.0.1\n") >= 2


def test_the_kernel_mounts_the_seed(tmp_path):
    if os.getuid() != 0:
        pytest.skip("needs root")
    image = tmp_path / "seed.iso"
    image.write_bytes(seed_image("i-1", [(MAC, CARD)]))
    (tmp_path / "m").mkdir()
    script = f"mount -o loop,ro -t iso9660 {image} {tmp_path}/m && cd {tmp_path}/m && ls && cat meta-data"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no loop devices here: {done.stderr}")
    assert done.stdout == 'meta-data\nnetwork-config\nuser-data\n{"instance-id": "i-1"}\n'
