"""Disks for the judge: raw files as they are; anything else that qemu-img reads (qcow2, NBD) as a raw dump of it."""

from __future__ import annotations

import os
from pathlib import Path

from drctl.errors import IntegrityError
from drctl.lab.command import run


class FileDisk:
    """A raw image file, read only. Close it, or use it in a `with`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Raises IntegrityError when the file is too short."""
        parts = []
        while length:
            part = os.pread(self._descriptor, length, offset)
            if not part:
                raise IntegrityError(f"{self.path}: ends at {offset}, {length} bytes short")
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> FileDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def dump(source: str, target: Path, *, image_format: str = "raw") -> FileDisk:
    """Copies an image or NBD URI (`nbd+unix:///EXPORT?socket=PATH`) to a raw file with qemu-img and opens that."""
    run(["qemu-img", "convert", "-U", "-f", image_format, "-O", "raw", source, str(target)], timeout=300)
    return FileDisk(target)


def open_image(path: Path, image_format: str, scratch: Path) -> FileDisk:
    """A lab image for the judge; what isn't raw is dumped below `scratch`."""
    if image_format == "raw":
        return FileDisk(path)
    return dump(str(path), scratch / f"{path.name}.judge", image_format=image_format)
