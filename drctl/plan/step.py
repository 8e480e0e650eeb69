"""Steps: what a plan comes to in one mode with one inventory. Frozen values; whoever carries them out is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from drctl.model.address import CardAddress, ReIp
from drctl.model.move import OnTimeout, Settlement
from drctl.plan.inventory import Ending
from drctl.plan.plan import Check, Mac, Manual, Mode, OnFailure, Plan, Script


class StepKind(StrEnum):
    """gate     nothing is done: steps that wait for many wait for it instead
    recover  a group's checkpoint is pinned and served at the recovery site, its machines defined (a switchover hands
             over first); an appliance without staged boot switches all of them on
    boot     a machine is switched on; without staged boot: seen to run
    re-ip    a machine that runs is given its addresses by its guest agent
    hold     the group's automatic rollback is called off, since it has proven well
    """

    GATE = "gate"
    SCRIPT = "script"
    MANUAL = "manual"
    RECOVER = "recover"
    BOOT = "boot"
    RE_IP = "re-ip"
    CHECK = "check"
    HOLD = "hold"
    CLEAN_UP = "clean-up"
    UNDO = "undo"


@dataclass(frozen=True, slots=True)
class MachineOrder:
    """A machine as it is to run at the recovery site. `memory` in bytes and `vcpus`: 0 as defined. `changed`: the plan
    wants something of it that its definition and its group don't say. `re_ip` with `addresses` is what the recovery
    site sees to before it boots (cloud-init, dhcp)."""

    name: str
    boot: bool = True
    memory: int = 0
    vcpus: int = 0
    mac: Mac = Mac.KEEP
    networks: tuple[tuple[str, str], ...] = ()
    changed: bool = False
    re_ip: ReIp | None = None
    addresses: tuple[CardAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Readdress:
    """What a machine that runs is given by its agent."""

    addresses: tuple[CardAddress, ...]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a recover step orders: the whole group. `settlement` happens by itself `settle_after` seconds later."""

    group: str
    mode: Mode
    checkpoint: str
    machines: tuple[MachineOrder, ...]
    staged: bool
    settlement: Settlement | None = None
    settle_after: float = 0.0


Action = Script | Manual | Check | Recovery | MachineOrder | Readdress | None


@dataclass(frozen=True, slots=True)
class Step:
    """One step. Invariant: ids in `after` are of steps before it in the compiled order.

    `part` is None for steps of the way forward, else the ending that it belongs to. `satisfied`: true already, by the
    record or by the hosts' state; it is not done again. `time_limit` in seconds, 0: none."""

    id: str
    kind: StepKind
    text: str
    after: tuple[str, ...] = ()
    time_limit: float = 0.0
    on_failure: OnFailure = OnFailure.STOP
    part: Ending | None = None
    stage: str = ""
    group: str = ""
    machine: str = ""
    action: Action = None
    satisfied: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """What the operator chose for this run. `keep`: a test's copies stay when it is over.

    `source_is_down` says why the source of a failover can't run; `on_timeout` is done about a guest that is not off
    `shutdown_seconds` after a switchover asked it to be."""

    checkpoint: str = "latest"
    keep: bool = False
    source_is_down: str = ""
    on_timeout: OnTimeout = OnTimeout.ABORT
    shutdown_seconds: float = 180.0


@dataclass(frozen=True, slots=True)
class Compiled:
    """A plan's steps in an order in which one could do them.

    Of a run that goes on: `begun` steps, the `ending` that was decided, whether it was `flawed` or `interrupted`."""

    plan: Plan
    mode: Mode
    options: Options
    steps: tuple[Step, ...]
    begun: frozenset[str] = frozenset()
    ending: Ending | None = None
    flawed: bool = False
    interrupted: bool = False

    @property
    def forward(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.part is None)

    def find(self, identity: str) -> Step | None:
        """The step of that id."""
        return next((step for step in self.steps if step.id == identity), None)

    def ending_steps(self, ending: Ending) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.part is ending)


def spell_id(text: str) -> str:
    """A name as a part of a step's id: no slash, no blank, nothing that a terminal takes for a command."""
    return "".join(
        letter if letter.isalnum() or letter in "-_.+" else "".join(f"%{byte:02X}" for byte in letter.encode())
        for letter in text
    )
