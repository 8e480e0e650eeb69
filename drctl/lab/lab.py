"""The lab's verbs: up, status, down. Root acts through the lab user; anybody else is the lab user."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from drctl.lab import layout, user, worker
from drctl.lab.build import build
from drctl.lab.layout import DEFAULT_DIRECTORY, Options
from drctl.lab.report import Report, report
from drctl.lab.teardown import remove, tear_down

Progress = Callable[[str], None]


def _silent(_: str) -> None:
    return


def up(directory: Path = DEFAULT_DIRECTORY, options: Options | None = None, progress: Progress = _silent) -> Report:
    """Makes the lab, or what is missing of it, and returns when its guests write. Raises SetupFailed or StepFailed."""
    options = options or Options()
    if user.is_root():
        entry = user.ensure()
        user.check_python(entry)
        if not directory.exists():
            user.give(directory, entry)
        return msgspec.convert(worker.call("up", directory, options, entry, progress), Report)
    build(directory, options, progress)
    return report(directory)


def status(directory: Path = DEFAULT_DIRECTORY) -> Report:
    """What runs of the lab. Works for root and for the lab user."""
    return report(directory)


def down(directory: Path = DEFAULT_DIRECTORY, progress: Progress = _silent, *, purge: bool = False) -> None:
    """Ends every process of the lab and removes its directories; with `purge` also the cache and the lab user.
    Raises StepFailed when something survives."""
    if user.is_root():
        if layout.state_path(directory).exists():
            worker.call("down", directory, Options(), user.ensure(), progress)
            if directory.exists():  # the user could empty it, not unlink it from its parent
                remove(directory)
        elif directory.is_dir() and not any(directory.iterdir()):  # an `up` that broke off before its first file
            directory.rmdir()
        if purge:
            user.remove()
        return
    tear_down(directory, progress)
    if purge:
        shutil.rmtree(user.cache(), ignore_errors=True)
