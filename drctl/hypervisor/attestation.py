"""Whether a machine's disks are attached to the tap: decided from one round of queries. Pure.

Silence proves nothing: every fact must have been seen. QEMU alone can't prove that the tap has the connection (a tap
that died while the guest was idle goes unnoticed): that part is the ring's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from drctl.hypervisor.block_graph import MirrorName, look
from drctl.hypervisor.qmp import Monitor, command

#: The machine's life is elsewhere, or on its way: its writes may be made on another host, and the job left behind
#: says `ready` all the same (7 of 7 live migrations).
_ELSEWHERE: Final = {
    "inmigrate": "it arrives from another host",
    "postmigrate": "it was moved to another host",
    "finish-migrate": "it is being moved to another host",
    "colo": "it is replicated by COLO",
}
_MIGRATING: Final = frozenset(
    (
        "setup",
        "cancelling",
        "active",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover",
        "pre-switchover",
        "device",
        "wait-unplug",
    )
)


@dataclass(frozen=True, slots=True)
class Attestation:
    """Attached or not, and if not, why (for status, and for the history of marks that were not proven)."""

    attached: bool
    reason: str = ""


def attest(
    names: Iterable[MirrorName],
    jobs: Iterable[Mapping[str, Any]],
    status: Mapping[str, Any],
    migration: Mapping[str, Any],
) -> Attestation:
    """Judge the answers to `query-block-jobs`, `query-status` and `query-migrate`, for all disks of one machine.

    A finished migration (`completed`) counts only with a run state that says so: after a cancelled or failed one, and
    after one that brought the machine *here*, the machine runs on."""
    if (state := str(status.get("status", ""))) in _ELSEWHERE:
        return Attestation(False, _ELSEWHERE[state])
    if str(migration.get("status", "")) in _MIGRATING:
        return Attestation(False, "it is being moved to another host")
    every = list(jobs)
    for name in names:
        found = look(name, every, None)
        if not found.present:
            return Attestation(False, f"disk {name.disk}: its mirror is gone")
        if not found.healthy:
            return Attestation(False, f"disk {name.disk}: its mirror is {found.status}, io-status {found.io_status}")
    return Attestation(True)


def ask(monitor: Monitor, names: Iterable[MirrorName]) -> Attestation:
    """One round of queries to a machine's QEMU, judged. Raises HostUnreachable or HypervisorRefused: then, too, it is
    not attested."""
    jobs = monitor(command("query-block-jobs"))
    # The place is asked last: a job seen before the machine left proves nothing after it.
    return attest(names, jobs, monitor(command("query-status")), monitor(command("query-migrate")))
