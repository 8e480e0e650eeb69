"""A disk that an I/O thread serves is known as one, however its definition says it: on an old QEMU it ends the guest."""

from __future__ import annotations

import pytest

from drctl.hypervisor import domain_xml

OWN = "<disk type='file' device='disk'><driver name='qemu' iothread='1'/><target dev='vda' bus='virtio'/></disk>"
SEVERAL = (
    "<disk type='file' device='disk'><driver name='qemu'><iothreads><iothread id='1'/></iothreads></driver>"
    "<target dev='vda' bus='virtio'/></disk>"
)
PLAIN = "<disk type='file' device='disk'><driver name='qemu'/><target dev='vda' bus='virtio'/></disk>"
SCSI = "<disk type='file' device='disk'><target dev='sda' bus='scsi'/>{}</disk>"
AT = "<address type='drive' controller='{}' bus='0' target='0' unit='0'/>"
QUIET = "<controller type='scsi' index='0' model='virtio-scsi'/>"
THREADED = "<controller type='scsi' index='1' model='virtio-scsi'><driver iothread='1'/></controller>"


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (OWN, True),
        (SEVERAL, True),
        (PLAIN, False),
        (QUIET + SCSI.format(AT.format(0)), False),
        (QUIET + THREADED + SCSI.format(AT.format(1)), True),
        (QUIET + THREADED + SCSI.format(AT.format(0)), False),
        (QUIET + THREADED + SCSI.format(""), True),
        (QUIET + SCSI.format(""), False),
        # A thread of the SCSI controller is nothing to a disk on another bus.
        (THREADED + PLAIN, False),
    ],
)
def test_who_serves_a_disk(devices: str, expected: bool) -> None:
    root = domain_xml.parse(f"<domain><name>m</name><devices>{devices}</devices></domain>")
    assert [disk.iothread for disk in domain_xml.disks(root)] == [expected]
