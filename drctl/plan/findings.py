"""What stands in the way of a plan, found before it is needed: plan × inventory → findings. Pure.

What is not known is no error: it is told as a warning where it matters."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from drctl.errors import ConfigInvalid
from drctl.model.extent import format_bytes
from drctl.plan.compile import unnamed
from drctl.plan.inventory import Ability, GroupFacts, Inventory, MachineFacts
from drctl.plan.plan import CheckKind, Mac, Mode, Plan, Script, Vm, Where

#: Phases of a source in which a group's newest checkpoint is seconds old, or soon will be.
_WELL = ("live", "catching-up", "failed-over")


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing. `file` and `line` (0: unknown) say where the plan speaks of it; `group` and `machine` whom it hits.

    `passable`: a failover goes on all the same, since it says something of the source, or of one machine alone."""

    severity: Severity
    message: str
    hint: str = ""
    file: str = ""
    line: int = 0
    key: str = ""
    group: str = ""
    machine: str = ""
    passable: bool = False

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.line else f"{self.file}: " if self.file else ""
        return f"{place}{self.message}"


def of_error(error: ConfigInvalid) -> Finding:
    """A mistake in the file itself."""
    fields = error.fields
    key = str(fields["key"])
    message = f"{key}: {fields['problem']}" if key else str(fields["problem"])
    return Finding(Severity.ERROR, message, error.hint, str(fields["file"]), int(fields["line"]), key)


def examine(plan: Plan, inventory: Inventory, mode: Mode = Mode.TEST) -> list[Finding]:
    """Everything that is found for a run in this mode, in order of the plan."""
    found = [*_coverage(plan, inventory), *_health(plan)]
    for name in plan.groups:
        if name in inventory.groups:
            found += _group(plan, inventory.groups[name])
    for vm in plan.vms:
        if vm.group in inventory.groups:
            found += _vm(plan, vm, inventory.groups[vm.group])
    return found + list(_memory(plan, inventory)) + list(_left_off(plan, inventory, mode))


def _memory(plan: Plan, inventory: Inventory) -> Iterator[Finding]:
    """Whether each recovery host has memory for what the plan boots there. A host may lend more than it has, so it is
    a warning; what is not known is not counted."""
    named = {(vm.group, vm.name): vm for vm in plan.vms}
    needed: dict[str, int] = {}
    rooms: dict[str, int] = {}
    for facts in (inventory.groups[name] for name in plan.groups if name in inventory.groups):
        if facts.room is None:
            continue
        rooms[facts.host] = facts.room
        for machine in facts.machines:
            vm = named.get((facts.name, machine.name))
            if vm is None or vm.boot:
                wanted = (vm.memory if vm else 0) or machine.memory or 0
                needed[facts.host] = needed.get(facts.host, 0) + wanted
    for host, room in rooms.items():
        if needed.get(host, 0) > room:
            message = (
                f"{host}: its machines take {format_bytes(needed[host])} of memory, {format_bytes(room)} are available"
            )
            hint = "give less (memory = …), leave some off (boot = false), or stop something there"
            yield Finding(Severity.WARNING, message, hint, plan.file, plan.line("groups"), "groups")


def _left_off(plan: Plan, inventory: Inventory, mode: Mode) -> Iterator[Finding]:
    """Machines that a switchover or failover would boot although the plan leaves them off."""
    for vm in plan.vms:
        facts = inventory.groups.get(vm.group)
        if vm.boot or mode is Mode.TEST or facts is None or Ability.STAGED_BOOT in facts.abilities:
            continue
        message = f"{vm.name!r} can't be left off: the appliance boots all machines of {vm.group!r} in a {mode}"
        hint = "put it into a group of its own"
        yield Finding(Severity.ERROR, message, hint, plan.file, vm.line, "boot", vm.group, vm.name)


def _coverage(plan: Plan, inventory: Inventory) -> Iterator[Finding]:
    line = plan.line("groups")
    for name in plan.groups:
        if name not in inventory.groups:
            hint = _near(name, list(inventory.groups)) or "see: drctl group list"
            yield Finding(Severity.ERROR, f"there is no group {name!r}", hint, plan.file, line, "groups", name)
    for group, machine in unnamed(plan, inventory):
        message = f"machine {machine!r} of group {group!r} is in no stage"
        hint = f"name it with boot = false to leave it off, or write all_of = [{group!r}] in a stage"
        yield Finding(Severity.ERROR, message, hint, plan.file, line, "groups", group, machine)


def _health(plan: Plan) -> Iterator[Finding]:
    if not any(stage.checks or any(vm.checks for vm in stage.vms) for stage in plan.stages):
        message = "the plan has no health check, so a run can't tell whether the service is well"
        yield Finding(
            Severity.WARNING, message, "e.g. [[stage.vm.check]] with kind = tcp", plan.file, plan.line("stage")
        )


def _group(plan: Plan, facts: GroupFacts) -> Iterator[Finding]:
    def tell(severity: Severity, message: str, hint: str = "", machine: str = "") -> Finding:
        line = plan.line("groups")
        return Finding(severity, message, hint, plan.file, line, "groups", facts.name, machine, passable=True)

    if facts.applied is False:
        yield tell(Severity.ERROR, f"the appliances don't have group {facts.name!r} as its file says", "drctl apply")
    if facts.phase in ("unprotected", "syncing"):
        hint = f"drctl replicate start {facts.name}" if facts.phase == "unprotected" else "wait for its first sync"
        yield tell(Severity.ERROR, f"group {facts.name!r} is {facts.phase}: nothing can be recovered", hint)
    elif facts.phase is not None and facts.phase not in _WELL:
        yield tell(Severity.WARNING, f"group {facts.name!r} is {facts.phase}", f"see: drctl status {facts.name}")
    if facts.restorable is False:
        none = tell(Severity.ERROR, f"group {facts.name!r} has no restorable checkpoint", f"drctl status {facts.name}")
        yield replace(none, passable=False)
    if Ability.STAGED_BOOT not in facts.abilities and len(plan.stages) > 1:
        message = f"all machines of {facts.name!r} boot at once: its appliance can't boot them one by one yet"
        yield tell(Severity.WARNING, message, "stages gate health checks and scripts, and groups as a whole")
    for severity, subject, message in facts.problems:
        yield tell(Severity(severity), f"{subject or facts.name}: {message}", "", subject)
    for machine in facts.machines:
        for message, hint in _disks(machine):
            yield tell(Severity.ERROR, message, hint, machine.name)


def _disks(machine: MachineFacts) -> Iterator[tuple[str, str]]:
    name = machine.name
    if machine.exists is False:
        yield f"machine {name!r} is not on its source host", "see: drctl vm list"
    for target in machine.uncovered:
        yield (
            f"disk {target} of {name!r} is not replicated",
            "see: drctl vm show; a new disk needs replicate stop and start",
        )
    for refusal in machine.refused:
        yield f"{name!r} can't be replicated whole: {refusal}", "see: drctl vm show"


def _vm(plan: Plan, vm: Vm, facts: GroupFacts) -> Iterator[Finding]:
    def tell(message: str, hint: str = "") -> Finding:
        return Finding(Severity.ERROR, message, hint, plan.file, vm.line, "name", vm.group, vm.name)

    names = [machine.name for machine in facts.machines]
    if vm.name not in names:
        hint = _near(vm.name, names) or f"its machines: {', '.join(names[:12])}"
        yield tell(f"machine {vm.name!r} is not in group {vm.group!r}", hint)
    changed = vm.memory or vm.vcpus or vm.networks or vm.test_networks or vm.mac is not Mac.KEEP
    if changed and Ability.OVERRIDES not in facts.abilities:
        message = f"{vm.name!r}: the appliance can't change memory, vcpus, networks or MAC of one machine yet"
        yield tell(message, "take them out; networks of the whole group: groups/NAME.toml")
    needed = {_NEEDS[check.kind] for check in vm.checks if check.kind in _NEEDS}
    needed |= {Ability.GUEST_AGENT for one in (*vm.checks, *vm.scripts) if _in_guest(one)}
    if vm.re_ip is not None and Ability.RE_IP not in facts.abilities:
        message = f"{vm.name!r}: its appliance can't give a machine other addresses yet"
        yield tell(message, "upgrade it, or take re_ip out")
    for ability in sorted(needed - facts.abilities):
        yield tell(
            f"{vm.name!r}: its appliance gives no access to its {ability}", "upgrade it, or use tcp, http or command"
        )


_NEEDS = {CheckKind.CONSOLE: Ability.CONSOLE, CheckKind.GUEST_AGENT: Ability.GUEST_AGENT}


def _in_guest(one: object) -> bool:
    return getattr(one, "where", None) is Where.GUEST or (isinstance(one, Script) and one.where is Where.GUEST)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.6)
    return f"did you mean {near[0]!r}?" if near else ""
