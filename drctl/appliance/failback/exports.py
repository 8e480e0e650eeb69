"""Disks of machines that are off, served for reading by `qemu-nbd`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from drctl.appliance.failback.record import OldDisk
from drctl.appliance.process import Processes
from drctl.replication.disk_connection import Export


class OldExports:
    """One `qemu-nbd` for each disk, for as long as it is read."""

    def __init__(self, run: Path, processes: Processes) -> None:
        self._run = run
        self._processes = processes

    @contextmanager
    def serve(self, group: str, disks: Sequence[OldDisk]) -> Iterator[Mapping[int, Export]]:
        """{number: where}. Raises StepFailed; nothing is left running."""
        started: list[str] = []
        exports: dict[int, Export] = {}
        try:
            for disk in disks:
                name = f"old-{group}-{disk.number}"
                socket = self._run / "exports" / f"{name}.sock"
                socket.unlink(missing_ok=True)
                arguments = ["--read-only", "--persistent", "--shared=16", f"--socket={socket}"]
                arguments += [f"--export-name={disk.name}", f"--format={disk.format}", disk.path]
                started.append(name)
                self._processes.run(name, ["qemu-nbd", *arguments], ready=socket)
                exports[disk.number] = Export(str(socket), disk.name)
            yield exports
        finally:
            for name in started:
                self._processes.end(name, force=True)  # it only reads
