"""The receiver's background work on its stores, in a process of its own: `python -m drctl.replication.maintenance DIR`.

A process, because merging is Python and numpy for seconds, and in the receiver it would delay acknowledgements. It
lives as long as its standard input is open. In: JSON lines `{"hold": [GROUP…]}`, groups to keep away from. Out: a JSON
line for each round in which something was done or failed.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import time
from pathlib import Path

import msgspec

from drctl.errors import DrctlError, Locked, NotFound
from drctl.replication.priority import nice_of_session
from drctl.store.maintenance import Maintenance
from drctl.store.tier import Indexer

ROUND_EVERY = 5.0
NICE = 10

log = logging.getLogger(__name__)


class Round(msgspec.Struct, frozen=True):
    """What one round did with one group. `error`: a damaged segment or a full disk is in the way."""

    group: str
    wall_ns: int
    seconds: float = 0.0
    indexed: int = 0
    merged: int = 0
    promoted: int = 0
    error: str = ""


class Hold(msgspec.Struct, frozen=True):
    hold: list[str]


#: What each store's indexer knows lives on: without it a round opens every run to see that it is there.
_indexers: dict[Path, Indexer] = {}


def run_round(root: Path) -> Round:
    """One round of maintenance of one group's store."""
    begun = time.monotonic()
    name, now = root.name, time.time()
    try:
        maintenance = Maintenance(root, indexer=_indexers.get(root))
        _indexers[root] = maintenance.indexer
        try:
            done = maintenance.run(now)
        finally:
            maintenance.close()
    except (Locked, NotFound):
        return Round(name, time.time_ns())
    except (DrctlError, OSError) as exc:
        return Round(name, time.time_ns(), time.monotonic() - begun, error=str(exc))
    return Round(name, time.time_ns(), time.monotonic() - begun, done.indexed, done.merged, done.promoted)


def _serve(directory: Path) -> None:
    held: set[str] = set()
    pending = b""
    told: dict[str, str] = {}
    due = time.monotonic()
    while True:
        readable, _, _ = select.select([0], [], [], max(0.0, due - time.monotonic()))
        if readable:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                held = set(msgspec.json.decode(line, type=Hold).hold)
            continue
        for path in sorted(directory.glob("*/group.json")):
            if path.parent.name not in held:
                _tell(run_round(path.parent), told)
        due = time.monotonic() + ROUND_EVERY


def _tell(done: Round, told: dict[str, str]) -> None:
    """A line, unless nothing was done and nothing changed."""
    if done.indexed or done.merged or done.promoted or done.error != told.get(done.group, ""):
        told[done.group] = done.error
        os.write(1, msgspec.json.encode(done) + b"\n")


def main(arguments: list[str]) -> int:
    """Exit code: 0 when the input was closed, 2 for wrong usage."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s maintenance %(levelname)s %(message)s")
    if len(arguments) != 1:
        log.error("usage: python -m drctl.replication.maintenance DIRECTORY")
        return 2
    os.nice(NICE)
    nice_of_session(NICE)
    _serve(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
