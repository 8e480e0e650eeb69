"""Machines (VMs) and their disks, as a hypervisor tells them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MachineState(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    #: Its hypervisor makes it; no instruction of the guest has run yet, and nothing else can be asked of it.
    STARTING = "starting"
    SHUT_OFF = "shut-off"
    CRASHED = "crashed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Disk:
    """A virtual disk. `target` is the guest-side name (`vda`), unique in its machine; `size` in bytes.

    `refusal` is empty when the disk can be tapped, else the reason why not (shared, read-only, vhost-user…)."""

    target: str
    source: str
    format: str
    size: int
    bus: str = "virtio"
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    name: str
    uuid: str
    state: MachineState
    disks: tuple[Disk, ...]
    memory: int = 0
    vcpus: int = 1
    persistent: bool = True
    autostart: bool = False
