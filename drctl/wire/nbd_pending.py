"""A request of an NBD client that waits for its reply, and whether the reply was whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from drctl.errors import ProtocolViolation


@dataclass(slots=True)
class Pending:
    """What came so far: `covered` of a read as (offset, length), `extents` of a block status."""

    command: int
    offset: int
    length: int
    data: bytearray = field(default_factory=bytearray)
    covered: list[tuple[int, int]] = field(default_factory=list)
    extents: list[tuple[int, int]] = field(default_factory=list)
    error: int = 0
    message: str = ""


def check_covered(pending: Pending) -> None:
    """Raises ProtocolViolation unless the chunks cover the read exactly: a gap would be served as zeroes."""
    position = pending.offset
    for offset, length in sorted(pending.covered):
        if offset != position:
            raise ProtocolViolation("the NBD server left a gap in a read, or sent a part twice")
        position += length
    if position != pending.offset + pending.length:
        raise ProtocolViolation("the NBD server sent less than was asked for")
