"""What one may choose about a group's move: the same words in commands, plans and appliances."""

from __future__ import annotations

from enum import StrEnum


class OnTimeout(StrEnum):
    """What to do about a guest that does not power off in time."""

    ABORT = "abort"
    SUSPEND = "suspend"


class Settlement(StrEnum):
    """What the recovery site does by itself after a time."""

    COMMIT = "commit"
    ROLLBACK = "rollback"
