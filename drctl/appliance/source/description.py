"""The machines of a group as they travel, without contents: what the recovery side is asked about beforehand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

import msgspec

from drctl.appliance.source.definition import machines_of
from drctl.appliance.source.guest_files import files_from
from drctl.appliance.source.guest_reader import GuestHost, GuestReader
from drctl.hypervisor import domain_xml
from drctl.model.group import GroupDisk, GroupSpec
from drctl.model.machine import Machine


class DescribingHost(GuestHost, Protocol):
    def machine(self, name: str) -> Machine: ...


def describe(host: DescribingHost, spec: GroupSpec) -> dict[str, Any]:
    """The machines of a group, as a DEFINITION would have them; contents and passwords are left out.

    Raises NotFound, HostUnreachable."""
    machines = machines_of(host, spec.machines, GuestReader(host))
    for machine in machines:
        machine["files"] = files_from(machine["files"]).described().as_dict()
        machine["definition"] = domain_xml.without_passwords(machine["definition"])
    disks = [GroupDisk(0, name, disk.target, disk.size) for name in spec.machines for disk in host.machine(name).disks]
    numbered = [asdict(GroupDisk(number, d.machine, d.target, d.size)) for number, d in enumerate(disks)]
    return {"spec": msgspec.to_builtins(spec), "machines": machines, "disks": numbered}
