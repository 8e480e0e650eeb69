"""How much of a busy host's processors the shipper may take: little while its ring has room, its full share when not.

The guest is worth more than the replica, and being behind by a second is what the ring is for; but a shipper that
never gets a processor would fill the ring, and a full ring costs the order. On a host with idle processors niceness
changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

#: `nice` of a shipper in no hurry, of one in a hurry, and of one that may not choose. At 10 it still gets a
#: hundredth of a processor for which ten others compete, enough to see that it starves; at 19 it would look hung.
YIELDING, PRESSED, FIXED = 10, 0, 5
#: The hurry begins above this fill of the ring, and is over below that one.
HURRY_FILL, CALM_FILL = 0.5, 0.2
#: It begins, too, when a mark has waited so long (s) to become a checkpoint, or this process for a processor, and is
#: not over before it has lasted so long.
HURRY_MARK, HURRY_STARVED, HURRY_LASTS = 1.0, 0.5, 1.0
_AUTOGROUP = Path("/proc/self/autogroup")


class Priority:
    """The priority of all threads of this process, changed as the backlog demands."""

    def __init__(
        self, set_nice: Callable[[int], bool] | None = None, set_session: Callable[[int], bool] | None = None
    ) -> None:
        """`set_nice` sets the niceness of the whole process; False: that is not allowed. `set_session` sets that of
        its session; False: not now, try again."""
        self._set_nice = set_nice or nice_of_all_threads
        self._set_session = set_session or nice_of_session
        self._session: int | None = None
        self.pressed: bool | None = None
        self._hurry_until = 0.0
        # Without the right to be less nice again, yielding would be for ever.
        self._may_choose = self._set_nice(FIXED) and self._set_nice(FIXED - 1)
        if not self._may_choose:
            self._set_nice(FIXED)

    def look(self, now: float, fill: float, mark_age: float, starved: float) -> None:
        """`now` (s) of any clock; `fill` of the ring, 0 to 1; `mark_age` (s) of the oldest mark that is not a
        checkpoint yet; `starved`: by how much (s) this call comes late."""
        hurry = fill > HURRY_FILL or mark_age > HURRY_MARK or starved > HURRY_STARVED
        if hurry:
            self._hurry_until = now + HURRY_LASTS
        elif self.pressed:
            hurry = fill > CALM_FILL or now < self._hurry_until
        nice = PRESSED if hurry else YIELDING
        if hurry != self.pressed and self._may_choose:
            self._set_nice(nice)
        self.pressed = hurry
        if nice != self._session and self._set_session(nice):
            self._session = nice


def nice_of_all_threads(nice: int) -> bool:
    """Niceness belongs to threads on Linux (setpriority(2), NOTES). New ones inherit their maker's. False: refused."""
    for task in Path("/proc/self/task").iterdir():
        try:
            os.setpriority(os.PRIO_PROCESS, int(task.name), nice)
        except PermissionError:
            return False
        except ProcessLookupError:
            continue
    return True


def nice_of_session(nice: int) -> bool:
    """Niceness of this process's session against others. False: refused for a moment.

    Where the kernel groups tasks by session (sched(7), "The autogroup feature"; on by default in Debian and Ubuntu),
    a thread's niceness counts within its session only, and each process of ours has one of its own. Nobody needs a
    right for it down to 0, but without CAP_SYS_ADMIN there is one change per 0.1 s for the whole machine."""
    if os.getsid(0) != os.getpid():
        return True  # others are in it
    try:
        os.write(_OPENED, str(nice).encode())
    except BlockingIOError:
        return False
    except OSError:  # a kernel without it
        return True
    return True


def _open_autogroup() -> int:
    """Open while we may: a process that keeps its memory secret (store/secrecy.py) does not own this file any more."""
    try:
        return os.open(_AUTOGROUP, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:  # a kernel without it
        return -1


_OPENED = _open_autogroup()
