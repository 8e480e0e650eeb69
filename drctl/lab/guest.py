"""Makes what every lab guest boots from, once per version of its parts, in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from drctl.lab import image, initramfs, package

Progress = Callable[[str], None]
#: Modules whose text decides what the template looks like.
_SOURCES = (
    "image.py",
    "initramfs.py",
    "record.py",
    "guest_files/witness.c",
    "guest_files/init.sh",
    "guest_files/agent.sh",
    "guest_files/shutdown.sh",
)

#: A kit of another version may still be in use by a lab that is just being made; not after an hour.
_STALE_SECONDS = 3600


class Kit(msgspec.Struct, frozen=True):
    """A finished template: vda's image, the payload's sum, and kernel and initramfs for a boot without a disk."""

    template: str
    vmlinuz: str
    initrd: str
    payload_sum: int


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """One lab at a time works on the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(cache: Path, agent: bool, progress: Progress) -> Kit:
    """The kit from the cache, made if it isn't there. Raises SetupFailed or StepFailed."""
    with locked(cache):
        kernel = package.kernel(cache, progress)
        agent_root = package.guest_agent(cache, progress) if agent else None
        directory = cache / f"kit-{_fingerprint(kernel, agent_root)}"
        known = directory / "kit.json"
        if known.exists():
            return msgspec.json.decode(known.read_bytes(), type=Kit)
        return _build(cache, directory, kernel, agent_root, progress)


def _build(cache: Path, directory: Path, kernel: Path, agent: Path | None, progress: Progress) -> Kit:
    progress("building the guest: witness, initramfs, boot disk")
    for old in cache.glob("kit-*"):
        if old == directory or old.stat().st_mtime < time.time() - _STALE_SECONDS:
            shutil.rmtree(old)
    directory.mkdir()
    vmlinuz = next(iter(sorted(kernel.glob("boot/vmlinuz-*"))))
    initramfs.build_witness(directory / "witness")
    archive = initramfs.build(kernel, agent, directory / "witness")
    (directory / "initrd").write_bytes(archive)
    total = image.make_template(directory / "vda.raw", vmlinuz, archive)
    kit = Kit(str(directory / "vda.raw"), str(vmlinuz), str(directory / "initrd"), total)
    part = directory / "kit.part"
    part.write_bytes(msgspec.json.encode(kit))
    os.sync()
    part.rename(directory / "kit.json")
    return kit


def _fingerprint(kernel: Path, agent: Path | None) -> str:
    digest = hashlib.sha256(f"{kernel.parent.name} {agent and agent.parent.name}".encode())
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:16]
