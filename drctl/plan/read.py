"""`plans/NAME.toml` → Plan. Every error names file, line and key; all that is wrong in a file is told at once.

Knows no inventory: whether machines and networks exist is asked elsewhere (findings.py)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from drctl.errors import ConfigInvalid
from drctl.model.move import Settlement
from drctl.plan.plan import (
    Mac,
    Manual,
    OnFailure,
    Plan,
    Script,
    Stage,
    Vm,
    When,
    Where,
    find_cycle,
    in_order,
)
from drctl.plan.read_address import read_re_ip
from drctl.plan.read_check import read_check
from drctl.plan.read_common import (
    NAME,
    arguments,
    check_unique,
    limit,
    machine_name,
    modes,
    on_failure,
    own_name,
)
from drctl.toml.table import Table, parse_toml, read_toml

Made = TypeVar("Made")

MEBIBYTE = 1024 * 1024
#: More than that is no plan but a mistake, and would make graphs that nobody can look at.
MAXIMUM_VMS = 20_000


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What came of a file: a plan, or everything that is wrong with it."""

    plan: Plan | None
    errors: tuple[ConfigInvalid, ...] = ()


def read_plan(path: Path) -> ReadPlan:
    """The plan in a file, or its errors; never raises ConfigInvalid."""
    try:
        table = read_toml(path)
    except ConfigInvalid as exc:
        return ReadPlan(None, (exc,))
    return _decode(table, path.stem)


def load_plan(path: Path) -> Plan:
    """The plan in a file. Raises ConfigInvalid, with how many more errors there are in its hint."""
    return _whole(read_plan(path))


def parse_plan(text: str, file: str = "plan.toml", stem: str = "") -> Plan:
    """The plan in a text. Raises ConfigInvalid."""
    return _whole(decode_plan(parse_toml(text, file), stem))


def _whole(found: ReadPlan) -> Plan:
    if found.plan is not None:
        return found.plan
    first, *others = found.errors
    if not others:
        raise first
    fields = first.fields
    hint = f"{first.hint}; " if first.hint else ""
    raise ConfigInvalid(
        str(fields["file"]),
        int(fields["line"]),
        str(fields["key"]),
        str(fields["problem"]),
        hint=f"{hint}{len(others)} more: drctl plan validate",
    )


def decode_plan(table: Table, stem: str = "") -> ReadPlan:
    """The plan that a file's top table describes; `stem` is the file's name without its ending, "" any."""
    return _decode(table, stem)


def _decode(table: Table, stem: str) -> ReadPlan:
    reader = _Reader(table)
    plan = reader.attempt(lambda: reader.top(table, stem))
    if plan is not None and not reader.errors:
        return ReadPlan(plan)
    return ReadPlan(None, tuple(sorted(reader.errors, key=lambda error: int(error.fields["line"]))))


class _Reader:
    """Reads table by table; what is wrong in one does not hide what is wrong in the next."""

    def __init__(self, table: Table) -> None:
        self.errors: list[ConfigInvalid] = []
        self._file = table.file
        self._groups: tuple[str, ...] = ()

    def attempt(self, read: Callable[[], Made]) -> Made | None:
        """What `read` makes; None when it is wrong, and then the error is kept."""
        try:
            return read()
        except ConfigInvalid as exc:
            self.errors.append(exc)
            return None

    def each(self, tables: Sequence[Table], read: Callable[[Table], Made]) -> tuple[Made, ...]:
        """What `read` makes of each table, without those that are wrong."""
        made = [self.attempt(lambda one=one: read(one)) for one in tables]  # type: ignore[misc]
        return tuple(one for one in made if one is not None)

    def top(self, table: Table, stem: str) -> Plan:
        name = table.text("plan", pattern=NAME, example="shop")
        if stem and name != stem:
            raise table.error("plan", f"is {name!r}, but the file is {stem}.toml", hint=f"rename it to {name}.toml")
        self._groups = table.strings("groups")
        if not self._groups:
            raise table.error("groups", "names no group", hint='e.g. groups = ["shop"]; see: drctl group list')
        failure = on_failure(table, OnFailure.STOP)
        settlement, after = _settlement(table)
        plan = Plan(
            name=name,
            groups=self._groups,
            description=table.text("description", ""),
            time_limit=limit(table, "time_limit", 3600.0),
            rto_target=table.duration("rto_target", 0.0),
            rpo_target=table.duration("rpo_target", 0.0),
            on_failure=failure,
            settlement=settlement,
            settle_after=after,
            scripts=self.each(table.tables("script"), lambda one: self.script(one, failure)),
            manuals=self.each(table.tables("manual"), lambda one: self.manual(one, failure)),
            stages=self.each(table.tables("stage"), lambda one: self.stage(one, failure)),
            file=table.file,
            lines=tuple((key, table.line(key)) for key in ("plan", "groups", "stage", "rto_target")),
        )
        tables = table.tables("stage")
        self.attempt(table.finish)
        if not tables:
            raise table.error("", "the plan has no [[stage]]", hint='write [[stage]] and name = "…" below it')
        check_unique(table.tables("script"), "script", "name")
        if len(plan.stages) == len(tables):
            self.attempt(lambda: _check_graph(tables, plan.stages))
        if not self.errors:
            self.attempt(lambda: _check_vms(tables, plan))
            return replace(plan, stages=in_order(plan.stages))
        return plan

    def stage(self, table: Table, failure: OnFailure) -> Stage:
        failure = on_failure(table, failure)
        vms = self.each(table.tables("vm"), lambda one: self.vm(one, failure))
        stage = Stage(
            name=table.text("name", pattern=NAME, example="database"),
            after=table.strings("after", []),
            vms=vms,
            all_of=table.strings("all_of", []),
            time_limit=limit(table, "time_limit", 0.0),
            rto_target=table.duration("rto_target", 0.0),
            on_failure=failure,
            checks=self.each(table.tables("check"), lambda one: read_check(one, failure, of_machine=False)),
            scripts=self.each(table.tables("script"), lambda one: self.script(one, failure)),
            manuals=self.each(table.tables("manual"), lambda one: self.manual(one, failure)),
            line=table.line(),
        )
        for group in stage.all_of:
            self._check_group(table, "all_of", group)
        named = stage.vms or stage.all_of or stage.scripts or stage.manuals or stage.checks
        if not named and not self.errors:
            hint = "write [[stage.vm]] below it, or all_of = [GROUP]"
            raise table.error("", f"stage {stage.name!r} does nothing", hint=hint)
        table.finish()
        return stage

    def vm(self, table: Table, failure: OnFailure) -> Vm:
        failure = on_failure(table, failure)
        checks = self.each(table.tables("check"), lambda one: read_check(one, failure, of_machine=True))
        way, addresses, test_addresses = read_re_ip(table)
        vm = Vm(
            name=machine_name(table, "name"),
            group=self._group_of(table),
            boot=table.boolean("boot", True),
            memory=table.size("memory", 0, minimum=16 * MEBIBYTE),
            vcpus=_vcpus(table),
            mac=_mac(table),
            networks=_networks(table, "networks"),
            test_networks=_networks(table, "test_networks"),
            re_ip=way,
            addresses=addresses,
            test_addresses=test_addresses,
            time_limit=limit(table, "time_limit", 300.0),
            rto_target=table.duration("rto_target", 0.0),
            on_failure=failure,
            checks=checks,
            scripts=self.each(table.tables("script"), lambda one: self.script(one, failure, of_machine=True)),
            line=table.line(),
        )
        table.finish()
        if not vm.boot and (vm.checks or vm.scripts or vm.re_ip):
            raise table.error("boot", f"{vm.name} is left off, but has checks, scripts or re_ip", hint="take them out")
        return vm

    def script(self, table: Table, failure: OnFailure, *, of_machine: bool = False) -> Script:
        run = arguments(table)
        where = Where(table.choice("where", [*Where], Where.OPERATOR.value))
        script = Script(
            name=own_name(table, run[0]),
            when=When(table.choice("when", [*When])),
            run=run,
            where=where,
            machine=machine_name(table, "vm") if where is Where.GUEST and not of_machine else "",
            time_limit=limit(table, "time_limit", 300.0),
            on_failure=on_failure(table, failure),
            modes=modes(table),
        )
        table.finish()
        if of_machine and where is Where.GUEST and script.when is When.BEFORE:
            raise table.error("where", "a guest that is not up yet can run nothing", hint='write when = "after"')
        return script

    def manual(self, table: Table, failure: OnFailure) -> Manual:
        text = table.text("text")
        manual = Manual(
            name=own_name(table, text),
            when=When(table.choice("when", [*When])),
            text=text,
            time_limit=limit(table, "time_limit", 3600.0),
            on_failure=on_failure(table, failure),
            skippable=table.boolean("skippable", False),
            modes=modes(table),
        )
        table.finish()
        return manual

    def _group_of(self, table: Table) -> str:
        if "group" in table or len(self._groups) != 1:
            group = table.text("group")
            self._check_group(table, "group", group)
            return group
        table.text("group", "")
        return self._groups[0]

    def _check_group(self, table: Table, key: str, group: str) -> None:
        if group not in self._groups:
            raise table.error(key, f"{group!r} is not in groups", hint=_nearest(group, self._groups))


def _settlement(table: Table) -> tuple[Settlement | None, float]:
    found = [one for one in Settlement if f"{one}_after" in table]
    times = {one: table.duration(f"{one}_after", 0.0, minimum=60.0) for one in Settlement}
    if len(found) == 2:
        raise table.error("rollback_after", "excludes commit_after", hint="one of them can happen by itself")
    return (found[0], times[found[0]]) if found else (None, 0.0)


def _vcpus(table: Table) -> int:
    return table.integer("vcpus", 0, minimum=1) if "vcpus" in table else table.integer("vcpus", 0)


def _mac(table: Table) -> Mac:
    return Mac(table.choice("mac", [*Mac], Mac.KEEP.value))


def _networks(table: Table, key: str) -> tuple[tuple[str, str], ...]:
    return table.mapping(key)


def _check_graph(tables: Sequence[Table], stages: Sequence[Stage]) -> None:
    check_unique(tables, "stage", "name")
    names = [stage.name for stage in stages]
    for table, stage in zip(tables, stages, strict=True):
        for other in stage.after:
            if other not in names:
                raise table.error("after", f"there is no stage {other!r}", hint=_nearest(other, names))
    if cycle := find_cycle((stage.name, stage.after) for stage in stages):
        where = tables[names.index(cycle[0])]
        problem = f"stages wait for each other: {' -> '.join(cycle)}"
        raise where.error("after", problem, hint="take one of them out of another's after")


def _check_vms(tables: Sequence[Table], plan: Plan) -> None:
    holders: dict[tuple[str, str], str] = {}
    rest: dict[str, str] = {}
    for table, stage in zip(tables, plan.stages, strict=True):
        for row, vm in zip(table.tables("vm"), stage.vms, strict=True):
            if (other := holders.get((vm.group, vm.name))) is not None:
                raise row.error("name", f"{vm.name!r} is in stage {other!r} already", hint="a machine boots once")
            holders[vm.group, vm.name] = stage.name
        for group in stage.all_of:
            if (other := rest.setdefault(group, stage.name)) != stage.name:
                raise table.error("all_of", f"the rest of {group!r} is in stage {other!r} already")
    if len(plan.vms) > MAXIMUM_VMS:
        raise tables[0].error("", f"{len(plan.vms)} machines are more than {MAXIMUM_VMS}", hint="make several plans")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
