"""What plans are held against: group files, and what the appliances say of groups, machines, disks and recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from drctl.cli.context import Context
from drctl.cli.group_file import read_groups
from drctl.cli.inventory import Answer, Inventory, Place, ask, ask_all, in_parallel, take_inventory
from drctl.errors import DrctlError
from drctl.model.group import GroupSpec
from drctl.plan import inventory as facts
from drctl.plan.inventory import Ability, GroupFacts, MachineFacts

#: A forecast opens views' catalogs and looks at the host's machines.
FORECAST_TIMEOUT = 60.0
#: Groups whose last day is drawn in a report.
MOST_AGES = 12


@dataclass(frozen=True, slots=True)
class Stock:
    """What is known of groups; `silent` appliances did not answer. `loss` by group in seconds, where it was told.
    `versions` of software by host."""

    known: facts.Inventory
    silent: tuple[Answer, ...] = ()
    loss: Mapping[str, float] | None = None
    versions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def from_files(context: Context) -> Stock:
    """The groups of groups/*.toml, without asking anybody. Raises ConfigInvalid."""
    if context.config.directory is None:
        return Stock(facts.Inventory({}))
    specs = read_groups(context.config)
    return Stock(facts.Inventory({name: _of_spec(spec) for name, spec in specs.items()}))


def from_appliances(context: Context, groups: Sequence[str]) -> Stock:
    """The same, with what is true of `groups` now. Raises ConfigInvalid; appliances that are silent leave gaps."""
    base = dict(from_files(context).known.groups)
    inventory = take_inventory(context)
    machines = {answer.host.name: answer for answer in ask_all(context, "machine.list")}
    infos = {answer.host.name: answer for answer in ask_all(context, "appliance.info")}
    wanted = [name for name in groups if name in base or name in inventory.groups]
    looked = in_parallel(lambda name: _Look(context, inventory, name).take(base.get(name)), wanted)
    loss: dict[str, float] = {}
    for name, look in zip(wanted, looked, strict=True):
        base[name] = look.facts(machines, infos)
        if look.loss is not None:
            loss[name] = look.loss
    silent = tuple(answer for answer in machines.values() if answer.failed)
    complete = not silent and not inventory.silent
    versions = {name: _versions(answer.result) for name, answer in infos.items() if not answer.failed}
    return Stock(facts.Inventory(base, complete=complete), silent or inventory.silent, loss, versions)


def checkpoint_ages(context: Context, groups: Sequence[str]) -> dict[str, Any]:
    """By group how old its newest checkpoint was in the last day, for reports; what does not answer has none."""
    inventory = take_inventory(context)
    places = [place for name in groups[:MOST_AGES] if (place := inventory.find(name, "recovery")) is not None]
    answers = in_parallel(lambda place: ask(context, place.host, "checkpoint.ages", group=place.group), places)
    return {place.group: one.result for place, one in zip(places, answers, strict=True) if not one.failed}


def _of_spec(spec: GroupSpec) -> GroupFacts:
    machines = tuple(MachineFacts(name) for name in spec.machines)
    return GroupFacts(spec.name, machines, spec.networks, spec.test_networks)


def _of_json(spec: Mapping[str, Any]) -> GroupFacts:
    def pairs(key: str) -> tuple[tuple[str, str], ...]:
        return tuple((str(one), str(other)) for one, other in spec.get(key) or ())

    machines = tuple(MachineFacts(str(name)) for name in spec.get("machines") or ())
    return GroupFacts(str(spec["name"]), machines, pairs("networks"), pairs("test_networks"))


def _abilities(answer: Answer) -> frozenset[Ability]:
    if answer.failed:
        return frozenset(Ability)  # unknown is no lack
    told = answer.result.get("capabilities") or {}
    return frozenset(ability for ability in Ability if told.get(ability.value))


def _room(answer: Answer | None) -> int | None:
    """Bytes of memory that are available at a host; None when it did not say so."""
    if answer is None or answer.failed:
        return None
    available = (answer.result.get("memory") or {}).get("available")
    return None if available is None else int(available)


def _versions(info: Mapping[str, Any]) -> dict[str, str]:
    told = {"drctl": info.get("version"), **(info.get("versions") or {})}
    return {str(name): str(version) for name, version in told.items() if version}


class _Look:
    """One group, as its two sides tell of it."""

    def __init__(self, context: Context, inventory: Inventory, name: str) -> None:
        self._context = context
        self._name = name
        #: somebody who may know was not asked, or did not answer
        self._gaps = bool(inventory.silent) or len(context.config.sites) < 2
        self._source = inventory.find(name, "source")
        self._recovery = inventory.find(name, "recovery")
        self._base = GroupFacts(name, ())
        self._status: Any = None
        self._restorable: bool | None = None
        self._problems: list[tuple[str, str, str]] = []
        self._memory: dict[str, int] = {}
        self.loss: float | None = None

    def take(self, base: GroupFacts | None) -> _Look:
        place = self._source or self._recovery
        self._base = base or _of_json({"name": self._name, **(place.spec if place else {})})
        if self._source is not None:
            self._status = self._ask(self._source, "group.status", role="source")
        if self._recovery is not None:
            store = self._ask(self._recovery, "group.status", role="recovery")
            if isinstance(store, dict):
                self._restorable = bool((store.get("checkpoints") or {}).get("count"))
            if self._restorable:
                self._forecast(self._recovery)
        return self

    def facts(self, machines: Mapping[str, Answer], infos: Mapping[str, Answer]) -> GroupFacts:
        host = self._source.host.name if self._source else ""
        seen = machines.get(host)
        listed = {str(one["name"]): one for one in seen.result} if seen is not None and not seen.failed else None
        covered = self._covered()
        recovery = self._recovery.host.name if self._recovery else ""
        return replace(
            self._base,
            applied=self._applied(),
            machines=tuple(
                _machine(replace(one, memory=self._memory.get(one.name)), listed, covered.get(one.name))
                for one in self._base.machines
            ),
            phase=self._source.state if self._source is not None else None,
            restorable=self._restorable,
            abilities=_abilities(infos[recovery]) if recovery in infos else frozenset(Ability),
            problems=tuple(self._problems),
            host=recovery,
            room=_room(infos.get(recovery)),
        )

    def _applied(self) -> bool | None:
        places = [place for place in (self._source, self._recovery) if place is not None]
        if len(places) < 2 and self._gaps:
            return None
        names = {machine.name for machine in self._base.machines}
        return len(places) == 2 and all(names == set(place.spec.get("machines") or ()) for place in places)

    def _covered(self) -> dict[str, frozenset[str]]:
        """Machine → disks that are replicated, where the source tells them."""
        if not isinstance(self._status, dict):
            return {}
        return {
            str(machine["name"]): frozenset(str(disk["target"]) for disk in machine.get("disks") or ())
            for machine in self._status.get("machines") or ()
        }

    def _ask(self, place: Place, method: str, **params: Any) -> Any:
        return ask(self._context, place.host, method, group=self._name, **params).result

    def _forecast(self, place: Place) -> None:
        if place.state == "failed-over":
            return
        try:
            told = self._context.call(
                place.host, "failover.plan", group=self._name, checkpoint="latest", timeout=FORECAST_TIMEOUT
            )
        except DrctlError as exc:
            self._problems.append(("warning", "", f"no forecast from {place.host.name}: {exc.message}"))
            return
        self.loss = told.get("loss_seconds")
        self._memory = {str(one["name"]): one["memory"] for one in told.get("machines") or () if one.get("memory")}
        self._problems += [
            (str(one["severity"]), str(one["subject"]), _spell(one))
            for one in told.get("findings") or ()
            if one.get("severity") in ("error", "warning")
        ]


def _spell(finding: Mapping[str, Any]) -> str:
    hint = finding.get("hint")
    return f"{finding['message']} ({hint})" if hint else str(finding["message"])


def _machine(
    base: MachineFacts, listed: Mapping[str, Mapping[str, Any]] | None, covered: frozenset[str] | None
) -> MachineFacts:
    """`listed`: the machines of the source host; `covered`: the disks that are replicated. None: unknown."""
    if listed is None:
        return base
    found = listed.get(base.name)
    if found is None:
        return replace(base, exists=False)
    disks = found.get("disks") or ()
    refused = [f"{disk['target']}: {disk['refusal']}" for disk in disks if disk.get("refusal")]
    takable = [str(disk["target"]) for disk in disks if not disk.get("refusal")]
    uncovered = [target for target in takable if covered is not None and target not in covered]
    memory = base.memory or found.get("memory")
    return replace(base, exists=True, uncovered=tuple(uncovered), refused=tuple(refused), memory=memory)
