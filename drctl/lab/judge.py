"""Decides whether disks of lab guests are one true prefix of what the guests did. Pure: reads, writes nothing.

Per chain: every record of the visible window is there, whole, in its slot and linked to the one before it; only the
slot of the record that would come next may be torn. Across chains: what a record has seen completed is there. Across
guests: what a token names is there, and is that very record. One lost, older or foreign write in the window breaks one
of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from drctl.errors import IntegrityError
from drctl.lab.protocol import AckLog
from drctl.lab.record import (
    AREA_OFFSETS,
    Record,
    Superblock,
    payload_sum,
    slot_of,
    unpack_record,
    unpack_superblock,
)
from drctl.model.extent import BLOCK, SECTOR, MiB

_TARGETS = ("vda", "vdb")
#: More contradictions than this per guest say nothing new.
_MAX_REASONS = 20
_EMPTY = bytes(BLOCK)


class Readable(Protocol):
    """A disk at one point in time: a view, a file, bytes."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes | memoryview: ...


@dataclass(frozen=True, slots=True)
class Reason:
    """One contradiction. `chain`, `number` and `offset` are -1 where they don't apply."""

    guest: str
    disk: str
    problem: str
    chain: int = -1
    number: int = -1
    offset: int = -1

    def __str__(self) -> str:
        place = f"{self.guest}.{self.disk}" if self.disk else self.guest
        if self.offset >= 0:
            place += f" at {self.offset}"
        subject = f", chain {self.chain} record {self.number}" if self.chain >= 0 else ""
        return f"{place}{subject}: {self.problem}"


@dataclass
class GuestVerdict:
    """What one guest's disks hold. `newest` has the newest record's number per chain; `oldest` the window's begin."""

    guest: str
    newest: list[int] = field(default_factory=list)
    oldest: list[int] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """`true_prefix` says whether all disks together are one point of the guests' history."""

    guests: Mapping[str, GuestVerdict]

    @property
    def reasons(self) -> list[Reason]:
        return [reason for guest in self.guests.values() for reason in guest.reasons]

    @property
    def true_prefix(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        lines = [
            f"{guest.guest}: newest records {' '.join(map(str, guest.newest)) or 'none'}"
            for guest in self.guests.values()
        ]
        return "\n".join([*lines, *(str(reason) for reason in self.reasons)])


@dataclass(frozen=True, slots=True)
class GuestLoss:
    """What a guest had acknowledged before a moment and its disks don't hold. Times are the host's, in ns.

    `proven_until_ns`: everything acknowledged until then is there; `rpo_seconds`: from the first missing record's
    acknowledgement to the moment, 0 when nothing is missing; `missing` per chain."""

    guest: str
    proven_until_ns: int
    first_missing_ns: int | None
    rpo_seconds: float
    missing: tuple[int, ...]


@dataclass
class _Chain:
    index: int
    records: dict[int, Record] = field(default_factory=dict)
    newest: int = 0


def judge(disks: Mapping[str, Sequence[Readable]], *, payload: bool = False) -> Verdict:
    """Judges the disks (vda, vdb) of each machine. With `payload` also vda's payload is read and summed (64 MiB).

    Machines are judged as one: pass all of a group at one checkpoint."""
    verdicts: dict[str, GuestVerdict] = {}
    chains: dict[str, list[_Chain]] = {}
    for machine, pair in disks.items():
        verdict = GuestVerdict(machine)
        superblock = _superblock(verdict, pair)
        if superblock is None:
            verdicts[machine] = verdict
            continue
        verdict.guest = superblock.guest
        if payload and _sum_payload(pair[0], superblock) != superblock.payload_sum:
            _blame(verdict, Reason(verdict.guest, "vda", "payload differs", offset=superblock.payload_offset))
        chains[superblock.guest] = [_judge_chain(verdict, pair, superblock, c) for c in range(superblock.chains)]
        verdicts[superblock.guest] = verdict
    for guest, own in chains.items():
        _judge_seen(verdicts[guest], own)
        _judge_tokens(verdicts[guest], own, chains)
    return Verdict(verdicts)


def loss(verdict: Verdict, logs: Mapping[str, AckLog], moment_ns: int) -> dict[str, GuestLoss]:
    """Per guest what was acknowledged before the moment (a destruction, or a mark) and is missing."""
    return {
        name: _guest_loss(guest, logs[name], moment_ns)
        for name, guest in verdict.guests.items()
        if name in logs and guest.newest
    }


def _guest_loss(guest: GuestVerdict, log: AckLog, moment_ns: int) -> GuestLoss:
    first: int | None = None
    missing = []
    for chain, newest in enumerate(guest.newest):
        missing.append(max(0, log.newest(chain, moment_ns) - newest))
        when = log.acknowledged(chain, newest + 1)
        if missing[-1] and when is not None and (first is None or when < first):
            first = when
    last = max((time for time in log.times if time <= moment_ns), default=0)
    rpo = (moment_ns - first) / 1e9 if first is not None else 0.0
    return GuestLoss(guest.guest, last if first is None else first - 1, first, rpo, tuple(missing))


def _blame(verdict: GuestVerdict, reason: Reason) -> None:
    if len(verdict.reasons) < _MAX_REASONS:
        verdict.reasons.append(reason)


def _superblock(verdict: GuestVerdict, pair: Sequence[Readable]) -> Superblock | None:
    """Vda's superblock when both disks have one and they belong together."""
    found = []
    for index, disk in enumerate(pair):
        place = f"{verdict.guest}.{_TARGETS[index]}"
        try:
            found.append(unpack_superblock(disk.read(AREA_OFFSETS[index], BLOCK), place))
        except IntegrityError as exc:
            problem = str(exc).removeprefix(f"{place}: ")
            _blame(verdict, Reason(verdict.guest, _TARGETS[index], problem, offset=AREA_OFFSETS[index]))
    if len(found) != 2:
        return None
    if found[0].on(1) != found[1]:
        _blame(verdict, Reason(verdict.guest, "vdb", f"superblock is not that of vda: {found[1]}"))
        return None
    return found[0]


def _sum_payload(disk: Readable, superblock: Superblock) -> int:
    parts = range(0, superblock.payload_length, MiB)
    return payload_sum(b"".join(bytes(disk.read(superblock.payload_offset + at, MiB)) for at in parts))


def _slots(pair: Sequence[Readable], superblock: Superblock, chain: int) -> Iterator[tuple[int, int, bytes]]:
    """Each slot of a chain as (disk, offset, block)."""
    for disk in (0, 1):
        first = slot_of(superblock, chain, disk)[1]
        length = superblock.slots * BLOCK
        data = bytes(pair[disk].read(first, length))
        for at in range(0, length, BLOCK):
            yield disk, first + at, data[at : at + BLOCK]


def _judge_chain(verdict: GuestVerdict, pair: Sequence[Readable], superblock: Superblock, index: int) -> _Chain:
    chain = _Chain(index)
    slots = list(_slots(pair, superblock, index))
    found = [_own_record(block, superblock, index, (disk, offset)) for disk, offset, block in slots]
    chain.records = {record.number: record for record in found if record}
    chain.newest = max(chain.records, default=0)
    following = slot_of(superblock, index, chain.newest + 1)
    for (disk, offset, block), record in zip(slots, found, strict=True):
        expected = _expected(superblock, disk, (offset - slots[disk * superblock.slots][1]) // BLOCK, chain.newest)
        if (record.number if record else 0) == expected and (record or block == _EMPTY):
            continue
        if record is None and (disk, offset) == following and _torn(block, first_turn=not expected):
            verdict.notes.append(f"chain {index} record {chain.newest + 1} is torn, as the next one may be")
            continue
        held = f"record {record.number}" if record else ("nothing" if block == _EMPTY else "no whole record")
        problem = f"missing: the slot holds {held}" if expected else f"the slot must be empty and holds {held}"
        _blame(verdict, Reason(verdict.guest, _TARGETS[disk], problem, index, expected, offset))
    _judge_links(verdict, superblock, chain)
    verdict.newest.append(chain.newest)
    verdict.oldest.append(max(1, chain.newest - 2 * superblock.slots + 1) if chain.newest else 0)
    return chain


def _own_record(block: bytes, superblock: Superblock, chain: int, place: tuple[int, int]) -> Record | None:
    """The record in a slot if it is one of this guest, this chain and this slot."""
    record = unpack_record(block)
    if record is None or (record.lab, record.guest, record.chain) != (superblock.lab, superblock.guest, chain):
        return None
    return record if record.number and slot_of(superblock, chain, record.number) == place else None


def _torn(block: bytes, *, first_turn: bool) -> bool:
    """Whether a block can be what an unfinished write left: its first sector is the old or the new record's, and both
    begin with the magic, unless the old one was empty."""
    return block.startswith(b"DRWITREC") or (first_turn and not any(block[:SECTOR]))


def _expected(superblock: Superblock, disk: int, slot: int, newest: int) -> int:
    """The number that the slot must hold when the chain's newest is `newest`; 0: it was never written."""
    first = 2 * slot + disk  # the slot's first number (slot 0 of vda: 0, which isn't a record)
    if newest < first:
        return 0
    turn = 2 * superblock.slots
    return first + (newest - first) // turn * turn


def _judge_links(verdict: GuestVerdict, superblock: Superblock, chain: _Chain) -> None:
    for number, record in chain.records.items():
        before = chain.records.get(number - 1)
        linked = not any(record.previous) if number == 1 else before is None or record.previous == before.digest
        if not linked or record.seen[chain.index] != number - 1:
            disk, offset = slot_of(superblock, chain.index, number)
            problem = f"does not follow record {number - 1}, which is of another history"
            _blame(verdict, Reason(verdict.guest, _TARGETS[disk], problem, chain.index, number, offset))


def _judge_seen(verdict: GuestVerdict, chains: Sequence[_Chain]) -> None:
    for chain in chains:
        for number, record in chain.records.items():
            for other in chains:
                if record.seen[other.index] > other.newest:
                    problem = (
                        f"was written after chain {other.index} record {record.seen[other.index]}, "
                        f"which is missing (newest: {other.newest})"
                    )
                    _blame(verdict, Reason(verdict.guest, _TARGETS[number % 2], problem, chain.index, number))


def _judge_tokens(verdict: GuestVerdict, chains: Sequence[_Chain], every: Mapping[str, Sequence[_Chain]]) -> None:
    for chain in chains:
        for number, record in chain.records.items():
            token = record.token
            if token is None or token.guest not in every or token.chain >= len(every[token.guest]):
                continue
            theirs = every[token.guest][token.chain]
            named = f"{token.guest}'s chain {token.chain} record {token.number}"
            held = theirs.records.get(token.number)
            if token.number > theirs.newest:
                problem = f"was written after {named}, which is missing (newest: {theirs.newest})"
            elif held is not None and held.digest != token.digest:
                problem = f"was written after {named} of another history"
            else:
                continue
            _blame(verdict, Reason(verdict.guest, _TARGETS[number % 2], problem, chain.index, number))
