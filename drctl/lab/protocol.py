"""What witness and host say to each other, one line each, and the lines of witness.log. Pure.

Guest to host:
    UP GUEST BOOT CHAINS            it is up: boot disk verified (also the answer to `hello`)
    RESUMED CHAIN NUMBER            where a chain goes on after a boot
    ACK BOOT N0 N1 …                newest completed record of each chain; each implies all before it
    TOKEN CHAIN NUMBER DIGEST       a record that another guest may refer to
    DONE COMMAND    ERROR CHAIN NUMBER ERRNO    BROKEN REASON    ENDING    UNKNOWN LINE
Host to guest:
    hello | token GUEST CHAIN NUMBER DIGEST | token - 0 0 | rate N | rate max | stop | go
    corrupt | encrypt | decrypt | power off | reboot

witness.log: `WALL_NS SITE DOMAIN GUEST` (`-` before its first UP) and then one of the guest's lines but TOKEN, or
COMMAND LINE (sent to it) or GONE (its channel ended); the wall time is the host's. E.g.
`1764000000123456789 alpha web-1 web-1 ACK 8b26a6ed 90 91 88 90`.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field

#: Commands a host may forward; the witness obeys no others.
COMMANDS = ("stop", "go", "corrupt", "encrypt", "decrypt", "power off", "reboot")


def is_command(line: str) -> bool:
    """Whether an operator may send this line (tokens are the relay's own)."""
    if line in COMMANDS or line == "rate max":
        return True
    word, _, number = line.partition(" ")
    return word == "rate" and number.isdigit() and int(number) > 0


@dataclass
class AckLog:
    """What one guest had acknowledged when, at the host's clock. Lines must come in order of time."""

    times: list[int] = field(default_factory=list)
    numbers: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, wall_ns: int, numbers: tuple[int, ...]) -> None:
        self.times.append(wall_ns)
        self.numbers.append(numbers)

    def acknowledged(self, chain: int, number: int) -> int | None:
        """Host time (ns) at which record `number` was first known to be acknowledged; None: never."""
        index = bisect.bisect_left(self.numbers, number, key=lambda row: row[chain])
        return self.times[index] if index < len(self.times) else None

    def newest(self, chain: int, moment_ns: int) -> int:
        """The newest record acknowledged at or before the moment; 0: none."""
        index = bisect.bisect_right(self.times, moment_ns)
        return self.numbers[index - 1][chain] if index else 0

    @property
    def chains(self) -> int:
        return len(self.numbers[0]) if self.numbers else 0


def read_log(lines: Iterable[str], site: str, *, until_ns: int | None = None) -> dict[str, AckLog]:
    """Per guest the acknowledgements of its original (domain named as the guest) at one site, up to a moment.

    A torn last line is skipped. A rollback within the log (numbers fall) starts that guest's log anew."""
    logs: dict[str, AckLog] = {}
    for line in lines:
        if not line.endswith("\n"):
            break
        fields = line.split()
        if len(fields) < 7 or fields[4] != "ACK" or fields[1] != site or fields[2] != fields[3]:
            continue
        wall_ns, numbers = int(fields[0]), tuple(int(word) for word in fields[6:])
        if until_ns is not None and wall_ns > until_ns:
            break
        log = logs.setdefault(fields[3], AckLog())
        if log.numbers and any(new < old for new, old in zip(numbers, log.numbers[-1], strict=True)):
            log.times.clear()
            log.numbers.clear()
        log.add(wall_ns, numbers)
    return logs
