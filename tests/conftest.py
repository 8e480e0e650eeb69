"""Fixtures for every test: a lab of two real libvirt sites, made once per module that asks for it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from drctl.lab import lab, layout, site
from drctl.lab.disk import FileDisk
from drctl.lab.judge import Verdict, judge
from drctl.lab.layout import Layout, Options
from drctl.lab.observer import Observer

# A busy machine is no bug of ours. Under CI hypothesis takes its own profile, which says the same and repeats itself.
if not os.environ.get("CI"):
    settings.register_profile("drctl", deadline=None)
    settings.load_profile("drctl")

# A shell starts what it puts in the background with ctrl-C ignored, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_PROGRAMS = ("libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "gcc", "syslinux", "mcopy", "mke2fs", "sfdisk")


#: select(2) takes none above 1023, and a soft limit of 1024 is usual.
_MANY_DESCRIPTORS = 100


@pytest.fixture(scope="module", autouse=True)
def few_descriptors() -> Iterator[None]:
    """What a module's tests opened and dropped in cycles does not pile up until the collector happens to come by."""
    yield
    if len(os.listdir("/proc/self/fd")) > _MANY_DESCRIPTORS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


@dataclass
class LabRig:
    """A lab that is up. Sites are named alpha and beta; the guests start at alpha."""

    directory: Path
    layout: Layout
    observer: Observer

    def virsh(self, name: str, *arguments: str, timeout: float = 120) -> str:
        return site.virsh(self.layout.site(name), *arguments, timeout=timeout)

    def state(self, name: str, guest: str) -> str:
        return site.domain_states(self.layout.site(name)).get(guest, "")

    def images(self, guest: str, name: str = "alpha") -> list[Path]:
        return [self.layout.site(name).images / f"{guest}.{target}.raw" for target in ("vda", "vdb")]

    def guests(self) -> list[str]:
        state = layout.load(self.directory)
        assert state is not None
        return [guest.name for guest in state.guests]

    def judge(self, name: str = "alpha", *, payload: bool = False) -> Verdict:
        """The judge's word on the guests' own disks as they are now; the guests must not run."""
        with ExitStack() as stack:
            disks = {g: [stack.enter_context(FileDisk(p)) for p in self.images(g, name)] for g in self.guests()}
            return judge(disks, payload=payload)


def _lacking() -> str:
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return ", ".join(program for program in _PROGRAMS if not shutil.which(program, path=path))


@pytest.fixture(scope="module")
def make_lab() -> Iterator[Callable[..., LabRig]]:
    """Makes labs with given Options; all are down after the module's tests."""
    if lacking := _lacking():
        pytest.skip(f"the lab needs {lacking}; run: make setup")
    made: list[Path] = []

    def make(**options: object) -> LabRig:
        directory = Path(tempfile.mkdtemp(prefix="drctl-lab-test-", dir="/var/tmp"))
        directory.rmdir()
        made.append(directory)
        lab.up(directory, Options(**options))  # type: ignore[arg-type]
        state = layout.load(directory)
        assert state is not None
        return LabRig(directory, Layout(directory, Path(state.run)), Observer(directory))

    yield make
    for directory in made:
        lab.down(directory)


@pytest.fixture(scope="module")
def lab_rig(make_lab: Callable[..., LabRig]) -> LabRig:
    """Two guests that write at alpha, and an empty beta; no appliances."""
    return make_lab(appliances=False, rate=20)
