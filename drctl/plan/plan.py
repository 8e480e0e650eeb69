"""A plan as frozen values: what is recovered, in which order, and how it is known to be well. Knows no file, no host.

All times are seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from drctl.model.address import CardAddress, ReIp
from drctl.model.move import Settlement


class Mode(StrEnum):
    """What a run does with the plan's groups; the three verbs of the command line."""

    TEST = "test"
    SWITCHOVER = "switchover"
    FAILOVER = "failover"


class OnFailure(StrEnum):
    """What a failed step means for the run.

    stop      nothing more is begun; what was recovered stays as it is, the run can be resumed
    continue  the run goes on as if the step had been done; its verdict is failed all the same
    rollback  nothing more is begun, and what was recovered is undone
    """

    STOP = "stop"
    CONTINUE = "continue"
    ROLLBACK = "rollback"


class Where(StrEnum):
    """Where a command runs: beside drctl, or in the guest by its agent."""

    OPERATOR = "operator"
    GUEST = "guest"


class When(StrEnum):
    BEFORE = "before"
    AFTER = "after"


class CheckKind(StrEnum):
    TCP = "tcp"
    HTTP = "http"
    COMMAND = "command"
    GUEST_AGENT = "guest-agent"
    CONSOLE = "console"


class Mac(StrEnum):
    """A test's copies get new MAC addresses unless their network is cut off from the original's anyway."""

    KEEP = "keep"
    NEW = "new"


@dataclass(frozen=True, slots=True)
class Script:
    """A command before or after something. `run` is an argument list: no shell is in between.

    `modes` are those in which it runs; `on_failure` is already the plan's where the file names none."""

    name: str
    when: When
    run: tuple[str, ...]
    where: Where = Where.OPERATOR
    machine: str = ""
    time_limit: float = 300.0
    on_failure: OnFailure = OnFailure.STOP
    modes: tuple[Mode, ...] = tuple(Mode)


@dataclass(frozen=True, slots=True)
class Manual:
    """Something that a person does and confirms. Without a terminal it fails, or passes when it is `skippable`."""

    name: str
    when: When
    text: str
    time_limit: float = 3600.0
    on_failure: OnFailure = OnFailure.STOP
    skippable: bool = False
    modes: tuple[Mode, ...] = tuple(Mode)


@dataclass(frozen=True, slots=True)
class Check:
    """A health check. It passes when one of its attempts does: the first and `retries` more, `interval` apart, each of
    at most `timeout`.

    `host` and `port` for tcp; `url`, `status` and `text` (in the body) for http; `run` for command; `text` for console.
    In a test `test_host` and `test_url` stand for `host` and `url`, when they are given."""

    name: str
    kind: CheckKind
    host: str = ""
    test_host: str = ""
    port: int = 0
    url: str = ""
    test_url: str = ""
    status: int = 200
    insecure: bool = False
    text: str = ""
    run: tuple[str, ...] = ()
    where: Where = Where.OPERATOR
    retries: int = 30
    interval: float = 2.0
    timeout: float = 5.0
    on_failure: OnFailure = OnFailure.STOP
    modes: tuple[Mode, ...] = tuple(Mode)

    @property
    def time_limit(self) -> float:
        """The longest that all attempts can take, and a little for going from one to the next."""
        return (self.retries + 1) * self.timeout + self.retries * self.interval + 5.0


@dataclass(frozen=True, slots=True)
class Vm:
    """One machine of a stage. `memory` in bytes and `vcpus` replace those of its definition (0: as they are).

    `networks` and `test_networks` take precedence over its group's, network by network. `re_ip` says how its cards get
    `addresses` in a move and `test_addresses` in a test; a mode without any leaves them as they are."""

    name: str
    group: str
    boot: bool = True
    memory: int = 0
    vcpus: int = 0
    mac: Mac = Mac.KEEP
    networks: tuple[tuple[str, str], ...] = ()
    test_networks: tuple[tuple[str, str], ...] = ()
    re_ip: ReIp | None = None
    addresses: tuple[CardAddress, ...] = ()
    test_addresses: tuple[CardAddress, ...] = ()
    time_limit: float = 300.0
    rto_target: float = 0.0
    on_failure: OnFailure = OnFailure.STOP
    checks: tuple[Check, ...] = ()
    scripts: tuple[Script, ...] = ()
    #: where the file says it, for findings against the inventory
    line: int = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """Machines that boot in parallel, once every stage in `after` is done, its checks passed.

    `all_of` are groups whose machines that no stage names belong here. `time_limit` 0: none of its own."""

    name: str
    after: tuple[str, ...] = ()
    vms: tuple[Vm, ...] = ()
    all_of: tuple[str, ...] = ()
    time_limit: float = 0.0
    rto_target: float = 0.0
    on_failure: OnFailure = OnFailure.STOP
    checks: tuple[Check, ...] = ()
    scripts: tuple[Script, ...] = ()
    manuals: tuple[Manual, ...] = ()
    line: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What `plans/NAME.toml` says. Invariant: stages are in an order that satisfies `after`, and name no other's VM.

    `settlement` happens `settle_after` seconds after a switchover or failover, done by the recovery site.
    `rto_target` (0: none) is compared with how long it took, as those of stages and machines are; `rpo_target` with
    how old the newest checkpoint of a group was when its recovery was ordered."""

    name: str
    groups: tuple[str, ...]
    stages: tuple[Stage, ...]
    description: str = ""
    time_limit: float = 3600.0
    rto_target: float = 0.0
    rpo_target: float = 0.0
    on_failure: OnFailure = OnFailure.STOP
    settlement: Settlement | None = None
    settle_after: float = 0.0
    scripts: tuple[Script, ...] = ()
    manuals: tuple[Manual, ...] = ()
    file: str = ""
    lines: tuple[tuple[str, int], ...] = field(default=(), compare=False)

    @property
    def vms(self) -> tuple[Vm, ...]:
        """Those that stages name one by one."""
        return tuple(vm for stage in self.stages for vm in stage.vms)

    def line(self, key: str) -> int:
        """The line of a top-level key, 0 when the file has it not."""
        return dict(self.lines).get(key, 0)


def find_cycle(waits: Iterable[tuple[str, tuple[str, ...]]]) -> list[str]:
    """Names that wait for each other, the first one again at the end; empty when there is an order.

    Names that are waited for and not there are passed over. Iterative: a chain of thousands is no problem."""
    graph = dict(waits)
    finished: set[str] = set()
    for root in graph:
        path: list[str] = []
        on_path: set[str] = set()
        pending: list[tuple[str, bool]] = [(root, False)]
        while pending:
            name, leaving = pending.pop()
            if leaving:
                path.pop()
                on_path.discard(name)
                finished.add(name)
            elif name in on_path:
                return [*path[path.index(name) :], name]
            elif name not in finished and name in graph:
                path.append(name)
                on_path.add(name)
                pending.append((name, True))
                pending += [(other, False) for other in reversed(graph[name])]
    return []


def in_order(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    """The stages so that each comes behind those it waits for; else as they were written. There must be no cycle."""
    waiting = {stage.name: stage for stage in stages}
    ordered: dict[str, Stage] = {}
    for root in list(waiting):
        pending = [root]
        while pending:
            name = pending[-1]
            missing = [other for other in waiting[name].after if other not in ordered]
            if name in ordered or not missing:
                ordered.setdefault(name, waiting[name])
                pending.pop()
            else:
                pending += reversed(missing)
    return tuple(ordered.values())
