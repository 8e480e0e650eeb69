"""Who speaks in a stream: authority (generation), unbroken ring (epoch), place in it (sequence)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StreamIdentity:
    """`generation` rises at every failover and rollback; `epoch` is the UUID (32 hex digits) of one unbroken ring;
    sequences count per (group, host, epoch) from 1."""

    group: str
    host: str
    generation: int
    epoch: str

    def __post_init__(self) -> None:
        if len(self.epoch) != 32 or not set(self.epoch) <= set("0123456789abcdef"):
            raise ValueError(f"epoch must be 32 hex digits, not {self.epoch!r}")
        if not 0 < self.generation < 2**32:
            raise ValueError(f"generation must be 1..2^32-1, not {self.generation}")
