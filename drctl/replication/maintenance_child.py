"""The receiver's hold on its maintenance process: started, started again when it died, told what to keep away from."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

import msgspec

from drctl.replication.maintenance import Hold, Round

RESTART_AFTER = 5.0

log = logging.getLogger(__name__)


class MaintenanceChild:
    """Runs `drctl.replication.maintenance` over a directory of stores."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: set[str] = set()
        self._input: asyncio.StreamWriter | None = None
        self._rounds: dict[str, Round] = {}

    async def run(self) -> None:
        """Until cancelled; the process ends when its input does."""
        while True:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "drctl.replication.maintenance",
                str(self._directory),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            self._input = process.stdin
            self._tell()
            try:
                await self._hear(process)
            finally:
                self._input = None
                if process.stdin is not None:
                    process.stdin.close()
            log.warning("maintenance ended with %s", process.returncode)
            await asyncio.sleep(RESTART_AFTER)

    async def _hear(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            done = msgspec.json.decode(line, type=Round)
            self._rounds[done.group] = done
            if done.error:
                log.warning("maintenance of %s: %s", done.group, done.error)
        await process.wait()

    def hold(self, group: str) -> None:
        """Keep away from a group from its next round on."""
        self._held.add(group)
        self._tell()

    def let_go(self, group: str) -> None:
        self._held.discard(group)
        self._tell()

    def _tell(self) -> None:
        if self._input is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._input.write(msgspec.json.encode(Hold(sorted(self._held))) + b"\n")

    def status(self, group: str) -> dict[str, Any] | None:
        """The newest round that did something; None when there was none."""
        done = self._rounds.get(group)
        return msgspec.to_builtins(done) if done is not None else None
