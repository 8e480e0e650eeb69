"""A command of the operator's that is told when something changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Default limit of one call of the command, seconds.
TIME_LIMIT = 10.0


@dataclass(frozen=True, slots=True)
class Hook:
    """The command, an argument list, and the directory where it runs; empty: nobody is told.

    `time_limit` in seconds."""

    command: Sequence[str] = ()
    time_limit: float = TIME_LIMIT
    directory: str = "/"
