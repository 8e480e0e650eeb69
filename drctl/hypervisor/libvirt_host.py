"""What libvirt tells of a host beside its machines: secrets by name, processors that it can give."""

from __future__ import annotations

from typing import Final

import libvirt

from drctl.errors import DrctlError, HypervisorRefused
from drctl.hypervisor.libvirt_connection import Connection

#: virSecretUsageType, as definitions have it.
_USAGES: Final = ("none", "volume", "ceph", "iscsi", "tls", "vtpm")
_FITTING: Final = (libvirt.VIR_CPU_COMPARE_IDENTICAL, libvirt.VIR_CPU_COMPARE_SUPERSET)


def secrets(connection: Connection) -> dict[str, tuple[str, str]]:
    """Type and usage by UUID; none where the driver has no secrets."""
    try:
        with connection.translated():
            every = connection.get().listAllSecrets(0)
            return {one.UUIDString(): (_usage(one.usageType()), one.usageID()) for one in every}
    except HypervisorRefused:
        return {}


def _usage(number: int) -> str:
    return _USAGES[number] if 0 <= number < len(_USAGES) else str(number)


def networks(connection: Connection) -> frozenset[str] | None:
    """Names of the networks that are defined; None where the driver knows none."""
    try:
        with connection.translated():
            return frozenset(one.name() for one in connection.get().listAllNetworks(0))
    except HypervisorRefused:
        return None


def processor_fits(connection: Connection, guest: tuple[str, str, str], processor: str) -> bool | None:
    """`guest`: architecture, machine type, domain type. None where the comparison fails: a model that libvirt does not
    know here is one of these cases, and is told at the start."""
    arch, machine, kind = guest
    try:
        with connection.translated():
            result = connection.get().compareHypervisorCPU(
                None, arch or None, machine or None, kind or None, processor, 0
            )
    except DrctlError:
        return None
    return result in _FITTING if result != libvirt.VIR_CPU_COMPARE_ERROR else None
