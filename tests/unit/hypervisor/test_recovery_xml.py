"""Definitions rewritten for another site."""

import xml.etree.ElementTree as ET
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drctl.errors import HypervisorRefused, IntegrityError
from drctl.hypervisor.domain_xml import disks, memory_bytes, parse
from drctl.hypervisor.recovery_xml import Overlay, Recovery, rewrite, settle, unmet

DEFINITION = """
<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>db</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e193f</uuid>
  <genid>aaaaaaaa-0000-0000-0000-000000000000</genid>
  <memory unit='MiB'>512</memory><vcpu>2</vcpu>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><kernel>/alpha/guest/vmlinuz</kernel>
    <initrd>/elsewhere/initrd</initrd></os>
  <sysinfo type='smbios'><system><entry name='uuid'>6695eb01-f6a4-8304-79aa-97f2502e193f</entry></system></sysinfo>
  <devices>
    <emulator>/opt/qemu</emulator>
    <disk type='file' device='disk' snapshot='external'>
      <driver name='qemu' type='raw' cache='none' io='native' discard='unmap' error_policy='report'/>
      <source file='/alpha/images/db.raw'/><target dev='vda' bus='virtio'/><serial>S1</serial><boot order='1'/>
      <address type='pci' domain='0x0000' bus='0x04' slot='0x00' function='0x0'/>
    </disk>
    <disk type='network' device='disk'>
      <driver name='qemu' type='raw'/><auth username='u'><secret type='ceph' uuid='x'/></auth>
      <source protocol='rbd' name='pool/db'><host name='mon'/></source><target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'><source dev='/dev/scratch'/><target dev='vdc' bus='virtio'/></disk>
    <disk type='file' device='cdrom'>
      <source file='/iso/install.iso'/><target dev='sda' bus='sata'/><readonly/></disk>
    <disk type='file' device='floppy'><source file='/f.img'/><target dev='fda' bus='fdc'/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='prod'/>
      <model type='virtio'/></interface>
    <interface type='bridge'><mac address='52:54:00:00:00:02'/><source bridge='br9'/></interface>
    <interface type='direct'><mac address='52:54:00:00:00:03'/><source dev='eth0' mode='bridge'/></interface>
    <serial type='unix'><source mode='bind' path='/alpha/run/db.sock'/><log file='/var/log/db.log'/></serial>
    <channel type='unix'><source mode='bind' path='/else/agent.sock'/>
      <target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <hostdev mode='subsystem' type='pci'/>
    <filesystem type='mount'><source dir='/srv/share'/><target dir='share'/></filesystem>
    <graphics type='vnc' port='5901' autoport='no'><listen type='address' address='127.0.0.1'/></graphics>
  </devices>
  <qemu:commandline><qemu:arg value='-name'/></qemu:commandline>
</domain>
"""
OVERLAYS = {
    "vda": Overlay("/scratch/db.vda.qcow2", "/run/views/1.sock", "db.vda"),
    "vdb": Overlay("/scratch/db.vdb.qcow2"),
}


def recovered(**changes):
    done = rewrite(DEFINITION, Recovery(OVERLAYS, **changes))
    return ET.fromstring(done.definition), done.notes


def disk(root, target):
    return next(each for each in root.iterfind("devices/disk") if each.find("target").get("dev") == target)


def test_a_replicated_disk_becomes_an_overlay_on_its_view_in_the_same_place():
    root, _ = recovered()
    found = disk(root, "vda")
    assert found.get("type") == "file"
    assert found.get("snapshot") is None
    assert found.find("source").attrib == {"file": "/scratch/db.vda.qcow2"}
    assert found.find("driver").attrib == {
        "name": "qemu", "type": "qcow2", "error_policy": "stop", "rerror_policy": "stop", "discard": "unmap",
    }  # fmt: skip
    assert found.find("address").get("bus") == "0x04"
    assert found.findtext("serial") == "S1"
    backing = found.find("backingStore")
    assert backing.get("type") == "network"
    assert backing.find("format").get("type") == "raw"
    assert backing.find("source").attrib == {"protocol": "nbd", "name": "db.vda"}
    assert backing.find("source/host").attrib == {"transport": "unix", "socket": "/run/views/1.sock"}
    assert backing.find("backingStore") is not None, "the chain ends here: QEMU must not probe"


def test_an_overlay_that_stands_alone_has_nothing_under_it():
    root, _ = recovered()
    found = disk(root, "vdb")
    assert found.find("backingStore") is None
    assert found.find("auth") is None
    assert found.find("source").attrib == {"file": "/scratch/db.vdb.qcow2"}


def test_every_replicated_disk_stops_the_guest_instead_of_showing_it_an_error():
    root, _ = recovered()
    for target in OVERLAYS:
        driver = disk(root, target).find("driver")
        assert (driver.get("error_policy"), driver.get("rerror_policy")) == ("stop", "stop")


def test_what_is_not_replicated_is_dropped_and_told():
    root, notes = recovered()
    assert {each.find("target").get("dev") for each in root.iterfind("devices/disk")} == {"vda", "vdb", "sda"}
    assert "disk vdc: dropped, it is not replicated (was /dev/scratch)" in notes
    assert "floppy fda: dropped, it is not replicated (was /f.img)" in notes
    assert "cdrom sda: medium dropped (was /iso/install.iso)" in notes
    assert disk(root, "sda").find("source") is None
    assert "hostdev: dropped, it is a device of the source host" in notes
    assert root.find("devices/hostdev") is None
    assert root.find("devices/filesystem") is None
    assert root.find("devices/emulator") is None


def test_a_disk_that_the_definition_lacks_is_refused():
    with pytest.raises(HypervisorRefused, match="no disk vdz"):
        rewrite(DEFINITION, Recovery({**OVERLAYS, "vdz": Overlay("/x")}))


def test_a_failover_keeps_identity_and_a_test_has_its_own():
    root, _ = recovered()
    assert (root.findtext("name"), root.findtext("uuid")) == ("db", "6695eb01-f6a4-8304-79aa-97f2502e193f")
    assert root.get("id") is None
    other = "11111111-2222-3333-4444-555555555555"
    root, _ = recovered(name="db-test", uuid=other)
    assert (root.findtext("name"), root.findtext("uuid")) == ("db-test", other)
    assert root.findtext("sysinfo/system/entry") == other


def test_the_guest_gets_a_new_generation_id():
    root, notes = recovered()
    assert not root.findtext("genid")
    assert any(note.startswith("genid:") for note in notes)


def interfaces(root):
    return {each.find("mac").get("address")[-2:]: each for each in root.iterfind("devices/interface")}


def test_networks_are_mapped_in_a_failover_and_what_is_tied_to_the_host_is_cut_off():
    root, notes = recovered(networks={"prod": "dr", "br9": "bridge:br0"})
    found = interfaces(root)
    assert (found["01"].get("type"), found["01"].find("source").attrib) == ("network", {"network": "dr"})
    assert found["01"].find("model").get("type") == "virtio"
    assert (found["02"].get("type"), found["02"].find("source").attrib) == ("bridge", {"bridge": "br0"})
    assert found["03"].find("link").get("state") == "down"
    assert "interface 52:54:00:00:00:01: prod becomes dr" in notes


def test_a_network_without_a_mapping_keeps_its_name_in_a_failover():
    root, notes = recovered()
    assert interfaces(root)["01"].find("source").get("network") == "prod"
    assert any("keeps prod" in note for note in notes)


def test_in_a_test_only_mapped_networks_are_reached():
    root, notes = recovered(networks={"prod": "bubble"}, isolated=True)
    found = interfaces(root)
    assert found["01"].find("source").get("network") == "bubble"
    for number in ("02", "03"):
        assert found[number].find("link").get("state") == "down"
        assert found[number].get("type") == "udp"
    assert "interface 52:54:00:00:00:02: cut off (was br9)" in notes
    text = ET.tostring(root, encoding="unicode")
    assert "br9" not in text
    assert "eth0" not in text


def test_paths_move_to_this_site_or_are_told():
    root, notes = recovered(paths={"/alpha": "/beta", "/alpha/run": "/beta/sockets"})
    assert root.findtext("os/kernel") == "/beta/guest/vmlinuz"
    assert root.find("devices/serial/source").get("path") == "/beta/sockets/db.sock"
    assert root.find("devices/serial/log") is None
    assert "serial: /var/log/db.log dropped, it is a path of the source host" in notes
    assert root.find("devices/channel/source") is None, "libvirt chooses one"
    assert root.find("devices/channel/target") is not None
    assert any(note.startswith("initrd: /elsewhere/initrd must be here") for note in notes)


def test_a_prefix_is_a_directory_and_not_a_beginning_of_a_name():
    root, _ = recovered(paths={"/alph": "/x", "/alpha/run/d": "/y"})
    assert root.findtext("os/kernel") == "/alpha/guest/vmlinuz"


def test_fixed_ports_are_freed():
    root, _ = recovered()
    graphics = root.find("devices/graphics")
    assert graphics.get("port") is None
    assert graphics.get("autoport") == "yes"


def test_the_qemu_command_line_survives():
    done = rewrite(DEFINITION, Recovery(OVERLAYS))
    assert "<qemu:arg value=" in done.definition


def test_settled_overlays_have_nothing_under_them():
    done = settle(rewrite(DEFINITION, Recovery(OVERLAYS)).definition)
    assert "backingStore" not in done
    assert "/scratch/db.vda.qcow2" in done


CAPABILITIES = """<capabilities><guest><arch name='x86_64'><machine>pc-q35-7.2</machine>
<domain type='qemu'/><domain type='kvm'><machine>pc-q35-kvm</machine></domain></arch></guest></capabilities>"""


def test_a_machine_that_fits_needs_nothing():
    assert unmet(DEFINITION, CAPABILITIES) == ()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("type='kvm'", "type='xen'", "domain type xen"),
        ("pc-q35-7.2", "pc-q35-10.0", "machine type pc-q35-10.0"),
        ("x86_64", "aarch64", "architecture aarch64"),
    ],
)
def test_what_a_host_lacks_is_named(old, new, reason):
    (lacking,) = unmet(DEFINITION.replace(old, new), CAPABILITIES)
    assert lacking.startswith(reason)


@pytest.mark.parametrize(
    "hostile",
    [
        "<!DOCTYPE domain [<!ENTITY a 'b'>]><domain><name>&a;</name></domain>",
        "<!DOCTYPE domain SYSTEM 'file:///etc/passwd'><domain><name>x</name></domain>",
        "<domain><name>x</name>",
        "",
        "<network><name>x</name></network>",
        "<domain/>",
        "\x00",
        "<domain><name>x</name></domain><domain/>",
        f"<domain><name>x</name>{'<a>' * 100_000}{'</a>' * 100_000}</domain>",
        "<domain><name>x</name></domain>" + " " * (5 << 20),
    ],
    ids=["entity", "external", "torn", "empty", "network", "nameless", "nul", "two-roots", "deep", "long"],
)
def test_hostile_text_is_refused_whole(hostile):
    with pytest.raises(IntegrityError):
        rewrite(hostile, Recovery({}))


@settings(max_examples=200)
@given(st.text(max_size=200))
def test_no_text_ends_in_another_error(text):
    with suppress(IntegrityError):
        parse("<domain>" + text + "</domain>")


@settings(max_examples=50)
@given(st.sets(st.sampled_from(["vda", "vdb", "vdc"])))
def test_no_byte_of_the_source_is_reached_after_a_rewrite(targets):
    """Every virtual disk left in the definition is an overlay of ours, whichever were replicated."""
    done = rewrite(DEFINITION, Recovery({target: Overlay(f"/scratch/{target}") for target in targets}, isolated=True))
    left = disks(parse(done.definition))
    assert {each.target for each in left} == targets
    assert all(each.source == f"/scratch/{each.target}" and each.format == "qcow2" for each in left)


def machine(devices):
    return f"<domain><name>x</name><devices>{devices}</devices></domain>"


REFUSED = {
    "<shareable/>": "shareable",
    "<readonly/>": "read-only",
    "<transient/>": "transient",
    "<encryption format='luks'/>": "encrypted",
}


@pytest.mark.parametrize("element", REFUSED)
def test_a_disk_that_can_not_be_tapped_is_refused_by_name(element):
    (found,) = disks(parse(machine(f"<disk><source file='/a'/><target dev='vda'/>{element}</disk>")))
    assert found.refusal.startswith(REFUSED[element])


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ("device='lun' type='block'", "a LUN"),
        ("type='vhostuser'", "vhostuser"),
        ("type='dir'", "a directory"),
        ("type='file'", "no source"),
    ],
)
def test_a_kind_of_disk_that_can_not_be_tapped_is_refused_by_name(attributes, reason):
    (found,) = disks(
        parse(f"<domain><name>x</name><devices><disk {attributes}><target dev='vda'/></disk></devices></domain>")
    )
    assert found.refusal.startswith(reason)


def test_drives_for_media_are_no_disks():
    assert [each.target for each in disks(parse(DEFINITION))] == ["vda", "vdb", "vdc"]


def test_io_threads_are_seen():
    xml = "<domain><name>x</name><devices><disk><driver iothread='1'/><source file='/a'/></disk></devices></domain>"
    assert disks(parse(xml))[0].iothread


@pytest.mark.parametrize(
    ("memory", "size"),
    [
        ("<memory>1024</memory>", 1 << 20),
        ("<memory unit='GB'>2</memory>", 2 * 10**9),
        ("", 0),
        ("<memory>x</memory>", 0),
    ],
)
def test_memory_in_bytes(memory, size):
    assert memory_bytes(parse(f"<domain><name>x</name>{memory}</domain>")) == size
