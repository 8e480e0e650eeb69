"""The lab guests' libvirt definitions. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import quoteattr

#: Where the witness talks; libvirt picks the socket's path, so that the definition names nothing of its host.
WITNESS_CHANNEL = "org.drctl.witness.0"
AGENT_CHANNEL = "org.qemu.guest_agent.0"


@dataclass(frozen=True, slots=True)
class DiskFile:
    target: str
    path: str
    format: str
    cache: str


@dataclass(frozen=True, slots=True)
class GuestDefinition:
    """What varies between lab guests. `accelerator` is `kvm` or `tcg`; `bus` of the disks `virtio` or `scsi`, which is
    virtio-scsi; `iothread`: they are served by a thread of their own."""

    name: str
    uuid: str
    memory_mib: int
    accelerator: str
    disks: tuple[DiskFile, ...]
    serial: str
    bus: str = "virtio"
    iothread: bool = False


def domain_xml(guest: GuestDefinition) -> str:
    """The guest's persistent definition: two virtio disks, a serial log, two channels, no network, no display."""
    kvm = guest.accelerator == "kvm"
    disks = "\n".join([*_controller(guest), *(_disk(disk, guest) for disk in guest.disks)])
    threads = "\n  <iothreads>1</iothreads>" if guest.iothread else ""
    return f"""<domain type='{"kvm" if kvm else "qemu"}'>
  <name>{guest.name}</name>
  <uuid>{guest.uuid}</uuid>
  <memory unit='MiB'>{guest.memory_mib}</memory>
  <vcpu>1</vcpu>{threads}
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <boot dev='hd'/>
  </os>
  <features><acpi/></features>
  <cpu mode='{"host-passthrough" if kvm else "maximum"}'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
{disks}
    <controller type='usb' model='none'/>
    <controller type='virtio-serial' index='0'/>
    <serial type='file'>
      <source path={quoteattr(guest.serial)} append='on'/>
      <target port='0'/>
    </serial>
    <channel type='unix'><target type='virtio' name='{WITNESS_CHANNEL}'/></channel>
    <channel type='unix'><target type='virtio' name='{AGENT_CHANNEL}'/></channel>
    <video><model type='none'/></video>
    <memballoon model='none'/>
  </devices>
</domain>
"""


def _controller(guest: GuestDefinition) -> list[str]:
    """Of SCSI disks; their thread is the controller's."""
    if guest.bus != "scsi":
        return []
    driver = "<driver iothread='1'/>" if guest.iothread else ""
    return [f"    <controller type='scsi' index='0' model='virtio-scsi'>{driver}</controller>"]


def _disk(disk: DiskFile, guest: GuestDefinition) -> str:
    thread = " iothread='1'" if guest.iothread and guest.bus == "virtio" else ""
    return f"""    <disk type='file' device='disk'>
      <driver name='qemu' type='{disk.format}' cache='{disk.cache}' io='threads'{thread}/>
      <source file={quoteattr(disk.path)}/>
      <target dev='{disk.target}' bus='{guest.bus}'/>
      <serial>{disk.target}</serial>
    </disk>"""
