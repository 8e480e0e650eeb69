"""What a recovery would do and need, worked out without doing any of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from drctl.appliance.recovery.ports import Recoverable, Tools
from drctl.appliance.recovery.state import RecoveryRecord
from drctl.appliance.recovery.steps import is_ours
from drctl.errors import DrctlError, OutOfSpace
from drctl.hypervisor.domain_xml import memory_bytes, parse
from drctl.model.checkpoint import Checkpoint
from drctl.model.duration import format_duration
from drctl.model.extent import GiB, MiB, format_bytes

#: A test's scratch unless told otherwise: what a boot and an hour of checks write, with room to spare.
DEFAULT_SCRATCH = 16 * GiB
#: With less than this a guest doesn't even boot through.
SMALLEST_SCRATCH = 256 * MiB
#: Beginnings of notes of a rewritten definition that a person should know of before the worst hour.
_WEIGHTY = ("machine type:", "cpu: this host can't", "nvram:", "firmware: nothing", "tpm:")


def scratch_limit(tools: Tools, wanted: int) -> int:
    """Bytes that a test may write. Raises OutOfSpace when what is wanted (or the least that makes sense) isn't free.

    Without a wish it is the default or half of what is free above the reserve, whichever is less: the store's journal
    may live on the same file system and must go on growing. A wish may be as small as one likes."""
    free = tools.images.free(tools.room.scratch) - tools.room.reserve
    limit = wanted or max(min(DEFAULT_SCRATCH, free // 2), SMALLEST_SCRATCH)
    if limit > free:
        raise OutOfSpace(
            f"a test needs {format_bytes(limit)} of scratch, {tools.room.scratch} has "
            f"{format_bytes(max(free, 0))} above the {format_bytes(tools.room.reserve)} that are kept",
            hint="free space there, or stop another test",
            free=free,
            needed=limit,
        )
    return limit


def forecast(tools: Tools, record: RecoveryRecord, chosen: Checkpoint, source: Recoverable) -> dict[str, Any]:
    """The result of `failover.plan`, see docs/internals.md. Findings of severity `error` mean a machine would fail."""
    age = max(0.0, tools.clock.time() - chosen.time)
    held = tools.stores.allocated(record.group, chosen.number)
    memory = {machine.name: _memory(machine.definition) for machine in source.machines}
    findings = [*_space(tools, record, sum(held.values())), *examine(tools, record, source)]
    if age > 2 * source.spec.checkpoint_interval:
        findings.append(
            _finding(
                "warning",
                record.group,
                f"the checkpoint is {format_duration(age)} old, {format_duration(source.spec.checkpoint_interval)} is "
                "the interval",
                "writes since then are lost, unless the source comes back",
            )
        )
    return {
        "group": record.group,
        "checkpoint": asdict(chosen),
        "loss_seconds": age,
        "generation": record.generation,
        "source": source_of(tools, record.group, source),
        "machines": [
            {
                "name": machine.name,
                "recovery_name": machine.recovery_name,
                "memory": memory.get(machine.name),
                "disks": [
                    {"target": disk.target, "size": disk.size, "allocated": held.get(disk.export)}
                    for disk in machine.disks
                ],
            }
            for machine in record.machines
        ],
        "networks": [list(pair) for pair in source.spec.networks],
        "space": {"commit_bytes": sum(held.values()), "free_bytes": tools.images.free(tools.room.images)},
        "findings": findings,
    }


def _memory(definition: str) -> int | None:
    """Bytes that a machine is defined with; None when its definition can't be read (that is a finding elsewhere)."""
    try:
        return memory_bytes(parse(definition))
    except DrctlError:
        return None


def source_of(tools: Tools, group: str, source: Recoverable) -> dict[str, Any]:
    """What this site knows of the source by itself: a stream that stands proves that it lives, silence nothing."""
    heard = tools.sources.heard(group)
    return {
        "site": source.source_site,
        "host": source.source_host,
        "reachable": True if heard is not None and heard.connected else None,
        "silent_seconds": heard.seconds_ago if heard is not None else None,
        "fenced": False,
    }


def _finding(severity: str, subject: str, message: str, hint: str = "") -> dict[str, str]:
    return {"severity": severity, "subject": subject, "message": message, "hint": hint}


def _space(tools: Tools, record: RecoveryRecord, held: int) -> list[dict[str, str]]:
    free = tools.images.free(tools.room.images)
    if held <= free:
        return []
    if tools.images.copies:
        message = f"its disks take {format_bytes(held)}, {tools.room.images} has {format_bytes(free)}"
        return [_finding("error", record.group, message, "free space there, or the failover is refused")]
    message = f"commit will need {format_bytes(held)}, {tools.room.images} has {format_bytes(free)}"
    return [
        _finding("warning", record.group, message, "the failover itself needs little; free space before the commit")
    ]


def examine(tools: Tools, record: RecoveryRecord, source: Recoverable) -> list[dict[str, str]]:
    """Names and identities that the host has already, and what each definition loses or lacks here."""
    findings = []
    identities = {machine.uuid: machine.name for machine in tools.hypervisor.machines()}
    for machine in record.machines:
        if is_ours(tools, machine) is False:
            message = f"the host has a machine named {machine.recovery_name} already"
            findings.append(_finding("error", machine.name, message, "rename or remove it, or this one will fail"))
        elif identities.get(machine.uuid, machine.recovery_name) != machine.recovery_name:
            message = f"the host has a machine with its UUID already: {identities[machine.uuid]}"
            findings.append(_finding("error", machine.name, message, "remove it, or this one will fail"))
        try:
            rewritten = tools.definitions.rewrite(record, machine, source)
            findings += [_finding(_weight(note), machine.name, note) for note in rewritten.notes]
            lacking = tools.definitions.unmet(rewritten.definition, tools.hypervisor.capabilities())
            findings += [_finding("error", machine.name, each) for each in lacking]
        except DrctlError as exc:
            findings.append(_finding("error", machine.name, exc.message, exc.hint))
    return findings


def _weight(note: str) -> str:
    """A machine that is another machine for its guest is worth a warning."""
    return "warning" if note.startswith(_WEIGHTY) else "info"
