"""Protection groups: which machines share checkpoints, and how they are kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from drctl.model.bandwidth import Priority, RateLimit
from drctl.model.extent import GiB


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung of the retention ladder: for checkpoints younger than `within` seconds keep one every `every` seconds
    (0: every one)."""

    within: float
    every: float


DEFAULT_LADDER = (Rung(3600, 0), Rung(86400, 60), Rung(7 * 86400, 3600))


@dataclass(frozen=True, slots=True)
class Retention:
    """How long history is kept. `history` is the target in seconds, `journal_limit` the hard limit in bytes; of the
    last `lock` seconds nothing may be shortened or deleted (store/retention_lock.py; 0: no lock)."""

    history: float = 7 * 86400
    ladder: tuple[Rung, ...] = DEFAULT_LADDER
    journal_limit: int = 64 * GiB
    lock: float = 0.0


class BootPolicy(StrEnum):
    """Whether the source starts a group's guests at the host's boot while the other site does not answer."""

    WAIT = "wait"
    ALLOW = "allow"
    DENY = "deny"


class StrayPolicy(StrEnum):
    """What the source does about a guest that runs though its group reigns at the other site."""

    TELL = "tell"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """What the operator wrote in `groups/NAME.toml`. Intervals in seconds.

    `networks` maps a source network to its name at the recovery site, `test_networks` the same for tests
    (a network not named there is cut off in a test). `spill_size` bounds, in bytes on the source's disk, what the ring
    can't hold (0: nothing goes there). `limits` bounds what its stream may send (the first one whose
    window is open counts), `priority` its part of a link that is limited."""

    name: str
    source: str
    recovery: str
    machines: tuple[str, ...]
    source_host: str = ""
    recovery_host: str = ""
    checkpoint_interval: float = 5.0
    retention: Retention = field(default_factory=Retention)
    ring_size: int = 256 * 1024 * 1024
    spill_size: int = GiB
    networks: tuple[tuple[str, str], ...] = ()
    test_networks: tuple[tuple[str, str], ...] = ()
    boot_without_peer: str = BootPolicy.WAIT.value
    superseded_guest: str = StrayPolicy.TELL.value
    limits: tuple[RateLimit, ...] = ()
    priority: str = Priority.NORMAL.value


def turned_around(spec: GroupSpec) -> GroupSpec:
    """The group as it is protected from its recovery site back to its source.

    Of networks that are one at the recovery site the first is gone back to; tests are cut off there."""
    back: dict[str, str] = {}
    for here, there in spec.networks:
        back.setdefault(there, here)
    return replace(
        spec,
        source=spec.recovery,
        recovery=spec.source,
        source_host=spec.recovery_host,
        recovery_host=spec.source_host,
        networks=tuple(back.items()),
        test_networks=(),
    )


@dataclass(frozen=True, slots=True)
class GroupDisk:
    """A disk of a group with its number in the stream. Numbers are never reused within a group."""

    number: int
    machine: str
    target: str
    size: int

    @property
    def name(self) -> str:
        """`MACHINE.TARGET`: directory of its replica, name of its NBD exports."""
        return f"{self.machine}.{self.target}"
