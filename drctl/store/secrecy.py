"""Keeps what is in this process's memory out of core dumps, and from other processes of the same user."""

from __future__ import annotations

import ctypes
import logging
import resource

#: prctl(2), linux/prctl.h
_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


def keep_memory_secret() -> None:
    """For a process that holds private keys: no core dump, wherever core_pattern sends it, and no ptrace by its user.

    The limit is for kernels and handlers that write a file, the flag for those that take it through a pipe."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        log.warning("prctl(PR_SET_DUMPABLE): error %d; a core dump may hold keys", ctypes.get_errno())


def memory_is_secret() -> bool:
    """Whether the kernel makes no dump of this process."""
    return bool(_libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 0)
