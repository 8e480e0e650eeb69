"""Memory, processors and addresses as a plan wants them at the other site."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from drctl.errors import HypervisorRefused
from drctl.hypervisor.domain_xml import memory_bytes, vcpus
from drctl.hypervisor.recovery_xml import Recovery, rewrite

PLAIN = """
<domain type='kvm'><name>db</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>
  <memory unit='GiB'>8</memory><currentMemory unit='GiB'>6</currentMemory>
  <vcpu placement='static' current='2' cpuset='0-3'>8</vcpu><vcpus><vcpu id='0' enabled='yes'/></vcpus>
  <cputune><vcpupin vcpu='0' cpuset='1'/><vcpupin vcpu='7' cpuset='2'/><shares>10</shares></cputune>
  <cpu mode='host-model'><topology sockets='2' dies='1' cores='4' threads='1'/></cpu>
  <devices><interface type='network'><mac address='52:54:00:00:00:01'/><source network='lan'/></interface>
    <interface type='network'><source network='lan'/></interface></devices></domain>
"""
GIB = 2**30


def recovered(text=PLAIN, **changes):
    done = rewrite(text, Recovery({}, networks={"lan": "lan-b"}, **changes))
    return ET.fromstring(done.definition), done.notes


def test_memory() -> None:
    root, notes = recovered(memory=2 * GIB)
    assert (memory_bytes(root), root.findtext("currentMemory")) == (2 * GIB, str(2 * 1024 * 1024))
    assert "memory: 2.0 GiB, as the plan says" in notes


def test_processors_and_what_names_them_one_by_one() -> None:
    root, notes = recovered(vcpus=4)
    assert (vcpus(root), root.find("vcpu").attrib, root.find("vcpus")) == (4, {"placement": "static"}, None)
    assert [pin.get("vcpu") for pin in root.iterfind("cputune/vcpupin")] == ["0"]
    assert root.findtext("cputune/shares") == "10"
    assert root.find("cpu/topology") is None
    assert any("topology: dropped" in note for note in notes)
    assert recovered(vcpus=8)[0].find("cpu/topology") is not None, "it fits"


def addresses(root) -> list[str]:
    return [mac.get("address") for mac in root.iterfind("devices/interface/mac")]


def test_addresses_are_new_and_the_same_each_time() -> None:
    first, _ = recovered(new_macs=True)
    made = addresses(first)
    assert len(set(made)) == 2
    assert all(address.startswith("52:54:00:") for address in made)
    assert "52:54:00:00:00:01" not in made
    assert addresses(recovered(new_macs=True)[0]) == made
    assert addresses(recovered(new_macs=True, name="other")[0]) != made
    assert addresses(recovered()[0]) == ["52:54:00:00:00:01"]


@pytest.mark.parametrize("change", [{"memory": GIB}, {"vcpus": 2}])
def test_numa_cells_are_not_guessed(change) -> None:
    numa = PLAIN.replace("<topology", "<numa><cell id='0' cpus='0-7' memory='8' unit='GiB'/></numa><topology")
    with pytest.raises(HypervisorRefused, match="NUMA"):
        recovered(numa, **change)
    recovered(numa, new_macs=True)


def test_nothing_is_changed_unasked() -> None:
    root, notes = recovered()
    assert (memory_bytes(root), vcpus(root)) == (8 * GIB, 8)
    assert not any("as the plan says" in note for note in notes)
