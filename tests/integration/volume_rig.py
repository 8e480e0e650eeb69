"""A small file system of one's own, to be filled: an ext4 in a file, mounted over a directory. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from drctl.model.extent import MiB


class Volume:
    """Mounted over `place`, with what was there copied into it. `close` takes it away; what was below is as it was."""

    def __init__(self, place: Path, size: int) -> None:
        """Raises OSError with what mkfs or mount said."""
        self.place = place
        self._directory = Path(tempfile.mkdtemp(prefix="drctl-volume-", dir="/var/tmp"))
        image = self._directory / "image"
        image.touch()
        os.truncate(image, size)
        try:
            _run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(image))
            staging = self._directory / "mnt"
            staging.mkdir()
            _run("mount", "-o", "loop", str(image), str(staging))
            (staging / "lost+found").rmdir()
            _run("cp", "-a", f"{place}/.", str(staging))
            _run("mount", "--bind", str(staging), str(place))
            _run("umount", "--lazy", str(staging))
        except OSError:
            self.close()
            raise

    @property
    def _ballast(self) -> Path:
        return self.place / ".ballast"

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.place).free

    def fill(self, leave: int = 0) -> None:
        """Take all space but `leave` bytes."""
        with self._ballast.open("ab") as file:
            for step in (256 * MiB, MiB, 4096):
                while self.free_bytes() > leave + step:
                    size = os.fstat(file.fileno()).st_size
                    try:
                        os.posix_fallocate(file.fileno(), size, step)
                    except OSError:  # the file system needs some of it for itself
                        break

    def make_room(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        for place in (self.place, self._directory / "mnt"):
            if os.path.ismount(place):
                subprocess.run(["umount", "--lazy", str(place)], check=False)
        shutil.rmtree(self._directory, ignore_errors=True)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{argv[0]}: {done.stderr.strip()}")
