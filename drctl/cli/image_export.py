"""One disk from an NBD export into an image file: copied and compared by qemu-img, put in place when it is whole.

Knows no appliance. A file that exists is never touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from drctl.errors import AlreadyExists, IntegrityError, OutOfSpace, PreconditionFailed, SetupFailed, StepFailed
from drctl.model.extent import format_bytes

TOOL = "qemu-img"
#: What `qemu-img -p` prints, again and again: `    (12.34/100%)`.
_SHARE = re.compile(rb"\((\d+(?:\.\d+)?)/100%\)")

#: Share of the step that is done, 0 to 1.
Tell = Callable[[float], None]


class ImageFormat(StrEnum):
    RAW = "raw"
    QCOW2 = "qcow2"
    VMDK = "vmdk"


@dataclass(frozen=True, slots=True)
class Target:
    """An image file that is to be made. `part` is what it is called until it is whole."""

    file: Path
    format: ImageFormat

    @property
    def part(self) -> Path:
        return self.file.with_name(f".{self.file.name}.part")

    def demand_absent(self) -> None:
        """Raises AlreadyExists."""
        if os.path.lexists(self.file):
            raise AlreadyExists(f"{self.file} is there already", hint="it is not overwritten: another --output DIR")


def demand_tool() -> None:
    """Raises SetupFailed."""
    if shutil.which(TOOL) is None:
        raise SetupFailed(f"{TOOL} is not there", hint="install qemu-utils (Debian) or qemu-img (Fedora)")


def demand_directory(directory: Path) -> None:
    """Make it where it is not there. Raises PreconditionFailed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise PreconditionFailed(f"{directory}: {exc.strerror}") from exc
    if not os.access(directory, os.W_OK):
        raise PreconditionFailed(f"{directory} can't be written to")


def needed(uri: str) -> int:
    """Bytes that hold data, about. Raises StepFailed."""
    done = subprocess.run(
        [TOOL, "measure", "--output=json", "-f", "raw", "-O", "qcow2", uri],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise _failed("measure", done.stderr)
    return int(json.loads(done.stdout)["required"])


def demand_room(directory: Path, count: int) -> None:
    """Raises OutOfSpace."""
    free = shutil.disk_usage(directory).free
    if count > free:
        raise OutOfSpace(
            f"{format_bytes(count)} don't fit: {directory} has {format_bytes(free)} free", hint="another --output DIR"
        )


def export_image(uri: str, target: Target, copied: Tell, compared: Tell) -> int:
    """Make the file, whole and equal to the export, or not at all; returns the bytes that it takes.

    Raises AlreadyExists, StepFailed, OutOfSpace, IntegrityError (it was written, and reads back otherwise)."""
    target.demand_absent()
    target.part.unlink(missing_ok=True)  # of a run that was killed
    try:
        os.close(os.open(target.part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # qemu-img keeps the mode
        _run(["convert", "-p", "-f", "raw", "-O", target.format.value, "-m", "8", uri, str(target.part)], copied)
        _run(["compare", "-p", "-f", "raw", "-F", target.format.value, uri, str(target.part)], compared)
        return _put(target)
    finally:
        target.part.unlink(missing_ok=True)


def _put(target: Target) -> int:
    """Durable, and under its name. A link and not a rename: another's file of that name stays."""
    with target.part.open("rb") as file:
        os.fsync(file.fileno())
        taken = os.fstat(file.fileno()).st_blocks * 512
    try:
        os.link(target.part, target.file)
    except FileExistsError:
        target.demand_absent()
        raise
    except OSError:  # a file system without links
        target.demand_absent()
        target.part.rename(target.file)
    directory = os.open(target.file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return taken


def _run(arguments: list[str], tell: Tell) -> None:
    process = subprocess.Popen(
        [TOOL, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said = b""
    try:
        while text := os.read(process.stdout.fileno(), 4096):
            said = (said + text)[-4096:]
            if shares := _SHARE.findall(text):
                tell(float(shares[-1]) / 100)
        errors = process.stderr.read().decode(errors="replace")
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
    if code == 1 and arguments[0] == "compare" and not errors:
        words = " ".join(_SHARE.sub(b"", said).decode(errors="replace").split())
        raise IntegrityError(
            f"{arguments[-1]} reads back otherwise than it was written: {words}", hint="is the disk sound?"
        )
    if code:
        raise _failed(arguments[0], errors)


def _failed(step: str, errors: str) -> StepFailed | OutOfSpace:
    lines = errors.strip().splitlines()
    said = lines[-1] if lines else "it gave no reason"
    if "No space left" in errors:
        return OutOfSpace(f"{TOOL} {step}: {said}", hint="another --output DIR")
    return StepFailed(f"{TOOL} {step} failed: {said}")
