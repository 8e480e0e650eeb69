"""Debian packages that the lab's guest is made of: downloaded and unpacked into a cache, never installed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from drctl.errors import SetupFailed
from drctl.lab.command import run

#: Meta packages of a kernel for virtual machines, Debian's first, then Ubuntu's.
_KERNELS = ("linux-image-cloud-amd64", "linux-image-virtual")

Progress = Callable[[str], None]


def kernel(cache: Path, progress: Progress) -> Path:
    """A directory with `boot/vmlinuz-*` and `[usr/]lib/modules/*` of the distribution's kernel for virtual machines.

    What the cache holds is used as it is: a lab must not need the network twice. Raises SetupFailed."""
    for found in sorted(cache.glob("linux-image-*/unpacked")):
        return found
    name = _kernel_package()
    wanted = [name]
    modules = name.replace("linux-image-", "linux-modules-")
    if _known(modules):  # Ubuntu keeps the modules in a package of their own
        wanted.append(modules)
    return _unpack(cache, name, wanted, progress)


def guest_agent(cache: Path, progress: Progress) -> Path:
    """A directory with `usr/sbin/qemu-ga`. Raises SetupFailed."""
    found = cache / "qemu-guest-agent" / "unpacked"
    return found if found.is_dir() else _unpack(cache, "qemu-guest-agent", ["qemu-guest-agent"], progress)


def _known(package: str) -> bool:
    return "Candidate: (none)" not in (policy := run(["apt-cache", "policy", package])) and "Candidate:" in policy


def _kernel_package() -> str:
    for meta in _KERNELS:
        if not _known(meta):
            continue
        depends = re.findall(r"Depends: (linux-image-\d\S*)", run(["apt-cache", "depends", meta]))
        if depends:
            return str(depends[0])
    raise SetupFailed(
        f"no package {' or '.join(_KERNELS)} is known here: the lab's guest has no kernel", hint="run: apt-get update"
    )


def _unpack(cache: Path, name: str, wanted: list[str], progress: Progress) -> Path:
    work = cache / f".{name}.part"
    shutil.rmtree(work, ignore_errors=True)
    (work / "unpacked").mkdir(parents=True)
    progress(f"downloading {', '.join(wanted)} (unpacked into the cache, not installed)")
    try:
        run(["apt-get", "download", "-q", *wanted], cwd=work, timeout=300)
        for package in sorted(work.glob("*.deb")):
            run(["dpkg-deb", "-x", str(package), str(work / "unpacked")])
            package.unlink()
        work.rename(cache / name)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return cache / name / "unpacked"
