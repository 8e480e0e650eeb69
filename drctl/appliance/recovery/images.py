"""Overlay files, made and asked about with qemu-img. Knows no recovery."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from drctl.appliance.recovery.ports import Told
from drctl.errors import OutOfSpace, SetupFailed, StepFailed
from drctl.store import atomic

#: Creating an overlay and asking about one touches its header only; it hangs when the view does.
SHORT_SECONDS = 20.0


def nobody(done: int, total: int) -> None:
    """Nobody follows."""
    del done, total


class QemuImages:
    """qcow2 overlays. Stateless; safe from any thread."""

    copies = False

    def exists(self, path: Path) -> bool:
        return path.exists()

    def create(self, path: Path, backing: str, size: int, told: Told = nobody) -> None:
        """A new overlay, whole or not there at all (made beside and renamed)."""
        del told
        atomic.make_directory(path.parent)
        beside = atomic.temporary(path)
        beside.unlink(missing_ok=True)
        # The size is stated and the backing file not opened (-u): its answer would add nothing but a way to fail.
        self._run("create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, str(beside), str(size))
        with atomic.space_errors(path):
            descriptor = os.open(beside, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            atomic.commit(beside, path)

    def put(self, path: Path, data: bytes) -> None:
        """A small file, whole or not there at all."""
        atomic.make_directory(path.parent)
        beside = atomic.temporary(path)
        with atomic.space_errors(path):
            beside.write_bytes(data)
            descriptor = os.open(beside, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            atomic.commit(beside, path)

    def backing(self, path: Path) -> str | None:
        """What the overlay still needs below it. -U: the guest's QEMU has it open; the header is read, nothing else."""
        info = self._info(path)
        backing = info.get("full-backing-filename") or info.get("backing-filename")
        return str(backing) if backing else None

    def localize(self, path: Path) -> None:
        """Copy what is below and cut the tie. Repeated after a crash it copies again, and ends the same."""
        self._run("rebase", "-q", "-f", "qcow2", "-b", "", str(path), seconds=None)

    def allocated(self, path: Path) -> int:
        try:
            return path.stat().st_blocks * 512
        except FileNotFoundError:
            return 0

    def remove(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
            atomic.temporary(path).unlink(missing_ok=True)

    def free(self, directory: Path) -> int:
        return free_at(directory)

    def _info(self, path: Path) -> dict[str, Any]:
        info: dict[str, Any] = json.loads(self._run("info", "-U", "--output=json", "-f", "qcow2", str(path)))
        return info

    def _run(self, command: str, *arguments: str, seconds: float | None = SHORT_SECONDS) -> str:
        try:
            done = subprocess.run(
                ["qemu-img", command, *arguments], capture_output=True, text=True, timeout=seconds, check=False
            )
        except FileNotFoundError as exc:
            raise SetupFailed("qemu-img is not installed", hint="apt install qemu-utils") from exc
        except subprocess.TimeoutExpired as exc:
            raise StepFailed(f"qemu-img {command} did not end within {seconds:.0f} s") from exc
        if done.returncode:
            said = done.stderr.strip() or f"exit code {done.returncode}"
            error = OutOfSpace if "No space left" in said else StepFailed
            raise error(f"qemu-img {command}: {said}")
        return done.stdout


def free_at(directory: Path) -> int:
    """Bytes that may be written to the file system on which the directory is, or will be."""
    while not directory.exists():
        directory = directory.parent
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize
