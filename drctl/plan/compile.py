"""Plan × inventory × mode × how far a run is → steps. Pure: the same for a dry run, a run and a resumed one.

plan before ─▶ stage begin ─▶ recover (in the first stage that names the group)
                    │            ▼
                    └─▶ VM before ─▶ boot ─▶ re-ip ─▶ checks ─▶ VM after ─▶ stage checks ─▶ stage after ─▶ stage done
stages done ─▶ plan after ─▶ hold          and aside: clean-up of a test, undo of the others
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from drctl.errors import PreconditionFailed
from drctl.model.address import CardAddress, ReIp
from drctl.model.move import Settlement
from drctl.plan.inventory import Ability, Ending, GroupFacts, Inventory, Progress
from drctl.plan.plan import Check, Mac, Manual, Mode, OnFailure, Plan, Script, Stage, Vm, When, Where
from drctl.plan.step import Compiled, MachineOrder, Options, Readdress, Recovery, Step, StepKind, spell_id

#: Opening views, writing overlays and definitions takes seconds. A switchover also ships the rest, and shuts guests
#: down, one after the other: for that there is more.
RECOVER_LIMIT = 1200.0
ENDING_LIMIT = 900.0
_VERBS = {Mode.TEST: "boot copies of", Mode.SWITCHOVER: "move without loss", Mode.FAILOVER: "fail over"}


def compile_plan(
    plan: Plan,
    inventory: Inventory,
    mode: Mode,
    progress: Progress | None = None,
    options: Options | None = None,
) -> Compiled:
    """The plan's steps. Raises PreconditionFailed when a group is not known, or has machines that no stage names."""
    progress = progress or Progress()
    options = options or Options()
    stages = resolve_stages(plan, inventory)
    builder = _Builder(plan, inventory, mode, options, stages)
    steps = [_look(step, progress) for step in builder.build()]
    return Compiled(
        plan,
        mode,
        options,
        tuple(steps),
        begun=progress.begun,
        ending=progress.ending,
        flawed=progress.flawed,
        interrupted=progress.interrupted,
    )


def resolve_stages(plan: Plan, inventory: Inventory) -> tuple[Stage, ...]:
    """The stages with the machines that `all_of` stands for. Raises PreconditionFailed."""
    if missing := [name for name in plan.groups if name not in inventory.groups]:
        raise PreconditionFailed(
            f"plan {plan.name}: group {missing[0]!r} is known neither here nor to an appliance",
            hint="see: drctl group list",
        )
    if loose := unnamed(plan, inventory):
        group, machine = loose[0]
        raise PreconditionFailed(
            f"plan {plan.name}: no stage names machine {machine!r} of group {group!r}"
            + (f" (and {len(loose) - 1} more)" if len(loose) > 1 else ""),
            hint=f"name it with boot = false to leave it off, or write all_of = [{group!r}] in a stage",
        )
    named = {(vm.group, vm.name) for vm in plan.vms}
    return tuple(_resolve(stage, inventory, named) for stage in plan.stages)


def unnamed(plan: Plan, inventory: Inventory) -> list[tuple[str, str]]:
    """Machines (group, name) of the plan's groups that no stage takes."""
    named = {(vm.group, vm.name) for vm in plan.vms}
    whole = {group for stage in plan.stages for group in stage.all_of}
    return [
        (name, machine.name)
        for name in plan.groups
        if name in inventory.groups and name not in whole
        for machine in inventory.groups[name].machines
        if (name, machine.name) not in named
    ]


def _resolve(stage: Stage, inventory: Inventory, named: set[tuple[str, str]]) -> Stage:
    rest = [
        Vm(machine.name, group, on_failure=stage.on_failure, line=stage.line)
        for group in stage.all_of
        for machine in inventory.groups[group].machines
        if (group, machine.name) not in named
    ]
    return replace(stage, vms=(*stage.vms, *rest)) if rest else stage


def _look(step: Step, progress: Progress) -> Step:
    """The step, marked as satisfied when it is: scripts by the record, recoveries and machines by the hosts.

    Checks are done again after an interruption: that they passed once says nothing about now."""
    recovered = step.group in progress.recovered
    if step.part is not None:
        satisfied = not recovered and (progress.ending is not None or step.id in progress.done)
    elif step.kind is StepKind.RECOVER:
        satisfied = recovered
    elif step.kind is StepKind.BOOT:
        satisfied = recovered and (step.group, step.machine) in progress.up
    else:
        satisfied = step.id in progress.done and step.kind in (StepKind.SCRIPT, StepKind.MANUAL, StepKind.HOLD)
    return replace(step, satisfied=True) if satisfied else step


class _Builder:
    """Puts the steps together, in order. Invariant: what a step waits for is in `_steps` already."""

    def __init__(self, plan: Plan, inventory: Inventory, mode: Mode, options: Options, stages: Sequence[Stage]) -> None:
        self._plan = plan
        self._inventory = inventory
        self._mode = mode
        self._options = options
        self._stages = stages
        self._steps: dict[str, Step] = {}
        self._vms: dict[str, list[Vm]] = {name: [] for name in plan.groups}
        for stage in stages:
            for vm in stage.vms:
                self._vms[vm.group].append(vm)

    def build(self) -> Iterable[Step]:
        plan = self._plan
        start = self._around("plan", When.BEFORE, plan.manuals, plan.scripts, ())
        for stage in self._stages:
            self._stage(stage, start)
        ends = tuple(f"stage:{stage.name}/done" for stage in self._stages) or start
        done = self._around("plan", When.AFTER, plan.manuals, plan.scripts, ends)
        if self._mode is not Mode.TEST and plan.settlement is Settlement.ROLLBACK:
            for name in plan.groups:
                text = f"let {name} stay: no rollback by itself, since it has proven well"
                self._add(Step(f"group:{name}/hold", StepKind.HOLD, text, done, 60.0, group=name))
        self._endings()
        return self._steps.values()

    def _add(self, step: Step) -> str:
        identity, number = step.id, 1
        while identity in self._steps:
            number += 1
            identity = f"{step.id}-{number}"
        self._steps[identity] = replace(step, id=identity)
        return identity

    def _around(
        self,
        owner: str,
        when: When,
        manuals: Sequence[Manual],
        scripts: Sequence[Script],
        after: tuple[str, ...],
        place: Step | None = None,
    ) -> tuple[str, ...]:
        """Manual steps and scripts, one after the other: people first before, and last after."""
        place = place or Step("", StepKind.GATE, "")
        todo: list[Manual | Script] = [*manuals, *scripts] if when is When.BEFORE else [*scripts, *manuals]
        for one in todo:
            if one.when is not when or self._mode not in one.modes:
                continue
            kind = StepKind.MANUAL if isinstance(one, Manual) else StepKind.SCRIPT
            text = f"wait for somebody: {one.text}" if isinstance(one, Manual) else _script_text(one, place.machine)
            step = replace(
                place,
                id=f"{owner}/{when}:{spell_id(one.name)}",
                kind=kind,
                text=text,
                after=after,
                time_limit=one.time_limit,
                on_failure=one.on_failure,
                action=one,
            )
            if isinstance(one, Script) and one.machine:
                step = replace(step, machine=one.machine, group=self._group_of(one.machine))
            after = (self._add(step),)
        return after

    def _group_of(self, machine: str) -> str:
        """The group of a machine that a plan's or stage's script runs in. Raises PreconditionFailed."""
        for name, vms in self._vms.items():
            if any(vm.name == machine and vm.boot for vm in vms):
                return name
        raise PreconditionFailed(
            f"plan {self._plan.name}: a script is to run in {machine!r}, which the plan does not boot",
            hint="vm = … names a machine of one of its stages",
        )

    def _stage(self, stage: Stage, start: tuple[str, ...]) -> None:
        owner = f"stage:{stage.name}"
        place = Step("", StepKind.GATE, "", stage=stage.name, on_failure=stage.on_failure)
        after = tuple(f"stage:{name}/done" for name in stage.after) or start
        begin = self._add(replace(place, id=f"{owner}/begin", text=f"begin stage {stage.name}", after=after))
        begun = self._around(owner, When.BEFORE, stage.manuals, stage.scripts, (begin,), place)
        for name in dict.fromkeys(vm.group for vm in stage.vms):
            self._recover(name, begun, place)
        ends = [end for vm in stage.vms if vm.boot for end in self._vm(vm, begun, place)]
        ends = ends or [*begun, *(f"group:{name}/recover" for name in dict.fromkeys(vm.group for vm in stage.vms))]
        ends = list(self._checks(owner, stage.checks, tuple(ends), place)) or ends
        after = self._around(owner, When.AFTER, stage.manuals, stage.scripts, tuple(ends), place)
        text = f"stage {stage.name} is done"
        self._add(replace(place, id=f"{owner}/done", text=text, after=after, time_limit=stage.time_limit))

    def _recover(self, name: str, after: tuple[str, ...], place: Step) -> None:
        if f"group:{name}/recover" in self._steps:
            return
        facts = self._inventory.groups[name]
        staged = Ability.STAGED_BOOT in facts.abilities
        plan, real = self._plan, self._mode is not Mode.TEST
        action = Recovery(
            group=name,
            mode=self._mode,
            checkpoint="final" if self._mode is Mode.SWITCHOVER else self._options.checkpoint,
            machines=tuple(self._order(vm, facts) for vm in self._vms[name]),
            staged=staged,
            settlement=plan.settlement if real else None,
            settle_after=plan.settle_after if real else 0.0,
        )
        on = [vm.name for vm in self._vms[name] if vm.boot]
        verb = f"prepare to {_VERBS[self._mode]}" if staged else _VERBS[self._mode]
        text = f"{verb} {name}, as of {action.checkpoint}" + ("" if staged else f": {', '.join(on) or 'no machine'}")
        step = replace(
            place,
            id=f"group:{name}/recover",
            kind=StepKind.RECOVER,
            text=text,
            after=after,
            time_limit=RECOVER_LIMIT + (self._shutdown(name) if self._mode is Mode.SWITCHOVER else 0.0),
            on_failure=plan.on_failure if plan.on_failure is not OnFailure.CONTINUE else OnFailure.STOP,
            stage="",
            group=name,
            action=action,
        )
        self._add(step)

    def _shutdown(self, name: str) -> float:
        return self._options.shutdown_seconds * len(self._vms[name])

    def _order(self, vm: Vm, facts: GroupFacts) -> MachineOrder:
        test = self._mode is Mode.TEST
        networks = dict(facts.test_networks if test else facts.networks)
        networks |= dict(vm.test_networks if test else vm.networks)
        own = vm.test_networks if test else vm.networks
        way = vm.re_ip if vm.re_ip is not ReIp.GUEST_AGENT and self._addresses(vm) else None
        return MachineOrder(
            vm.name,
            vm.boot,
            vm.memory,
            vm.vcpus,
            vm.mac,
            tuple(sorted(networks.items())),
            changed=bool(vm.memory or vm.vcpus or own or vm.mac is Mac.NEW or way),
            re_ip=way,
            addresses=self._addresses(vm) if way else (),
        )

    def _addresses(self, vm: Vm) -> tuple[CardAddress, ...]:
        return vm.test_addresses if self._mode is Mode.TEST else vm.addresses

    def _vm(self, vm: Vm, begun: tuple[str, ...], place: Step) -> tuple[str, ...]:
        among = f"@{vm.group}" if len(self._plan.groups) > 1 else ""
        owner = f"stage:{place.stage}/vm:{spell_id(vm.name)}{among}"
        facts = self._inventory.groups[vm.group]
        place = replace(place, group=vm.group, machine=vm.name)
        ready = self._around(owner, When.BEFORE, (), vm.scripts, begun, place)
        text = f"boot {vm.name}" if Ability.STAGED_BOOT in facts.abilities else f"see that {vm.name} runs"
        boot = replace(
            place,
            id=f"{owner}/boot",
            kind=StepKind.BOOT,
            text=text,
            after=(*ready, f"group:{vm.group}/recover"),
            time_limit=vm.time_limit,
            on_failure=vm.on_failure,
            action=self._order(vm, facts),
        )
        up = (self._add(boot),)
        if vm.re_ip is ReIp.GUEST_AGENT and (addresses := self._addresses(vm)):
            text = f"give {vm.name} {', '.join(ip for card in addresses for ip in card.ip)} by its agent"
            action = Readdress(addresses)
            step = replace(boot, id=f"{owner}/re-ip", kind=StepKind.RE_IP, text=text, after=up, action=action)
            up = (self._add(step),)
        well = self._checks(owner, vm.checks, up, place) or up
        return self._around(owner, When.AFTER, (), vm.scripts, well, place)

    def _checks(self, owner: str, checks: Sequence[Check], after: tuple[str, ...], place: Step) -> tuple[str, ...]:
        return tuple(
            self._add(
                replace(
                    place,
                    id=f"{owner}/check:{spell_id(check.name)}",
                    kind=StepKind.CHECK,
                    text=check_text(check, self._mode, place.machine),
                    after=after,
                    time_limit=check.time_limit,
                    on_failure=check.on_failure,
                    action=check,
                )
            )
            for check in checks
            if self._mode in check.modes
        )

    def _endings(self) -> None:
        """Steps aside of the way forward. A test that is kept has none."""
        names = [step.group for step in self._steps.values() if step.kind is StepKind.RECOVER]
        shape = Step("", StepKind.GATE, "", time_limit=ENDING_LIMIT, on_failure=OnFailure.CONTINUE)
        if self._mode is Mode.TEST:
            for name in names if not self._options.keep else []:
                text = f"power off and remove the copies of {name}"
                kind, part = StepKind.CLEAN_UP, Ending.CLEAN_UP
                self._add(replace(shape, id=f"group:{name}/clean-up", kind=kind, part=part, text=text, group=name))
            return
        after: tuple[str, ...] = ()
        for name in reversed(names):
            text = f"roll {name} back to its source"
            step = replace(shape, id=f"group:{name}/undo", kind=StepKind.UNDO, part=Ending.UNDO, text=text, group=name)
            after = (self._add(replace(step, after=after)),)


def check_text(check: Check, mode: Mode, machine: str = "") -> str:
    """What a check looks at, in words."""
    of = f" of {machine}" if machine else ""
    if check.name not in [check.kind.value, *check.run]:
        of = f" {check.name!r}{of}"
    test = mode is Mode.TEST
    match check.kind.value:
        case "tcp":
            return f"check{of}: {(test and check.test_host) or check.host} takes connections on port {check.port}"
        case "http":
            return f"check{of}: {(test and check.test_url) or check.url} answers {check.status}"
        case "command":
            return f"check{of}: {_words(check.run)} exits with 0" + (" in the guest" if check.where == "guest" else "")
        case "guest-agent":
            return f"check{of}: the guest agent answers"
        case _:
            return f"check{of}: the console says {check.text!r}"


def _script_text(script: Script, machine: str) -> str:
    if script.where is Where.GUEST:
        return f"run in {script.machine or machine}: {_words(script.run)}"
    return f"run {_words(script.run)}"


def _words(run: Sequence[str]) -> str:
    return " ".join(word if word and word.isprintable() and " " not in word else repr(word) for word in run)
