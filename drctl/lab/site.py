"""A site of the lab: a libvirtd of its own in session mode, and what the lab asks of it (by virsh)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from drctl.errors import SetupFailed, StepFailed
from drctl.lab import process
from drctl.lab.command import need, run
from drctl.lab.layout import Site
from drctl.lab.process import Process

#: libvirtd answers within a second on an idle machine; TCG guests may keep both cores busy.
_START_SECONDS = 30.0


def environment(site: Site) -> dict[str, str]:
    """The environment of everything that runs at a site: directories of its own, nothing of the caller's session."""
    return {
        "HOME": str(site.root),
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "XDG_CONFIG_HOME": str(site.config),
        "XDG_CACHE_HOME": str(site.root / "libvirt" / "cache"),
        "XDG_DATA_HOME": str(site.root / "libvirt" / "data"),
        "XDG_RUNTIME_DIR": str(site.run / "r"),
    }


def prepare(site: Site) -> None:
    """Makes the site's directories and libvirtd's configuration."""
    config = site.root / "libvirt" / "config"
    for directory in (
        config / "libvirt",
        site.images,
        site.logs,
        site.home,
        site.appliance_run,
        site.run / "r",
        site.run / "s",
    ):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("cache", "data"):
        (site.root / "libvirt" / name).mkdir(exist_ok=True)
    if not site.config.is_symlink():
        site.config.symlink_to(config)
    (config / "libvirt" / "qemu.conf").write_text('stdio_handler = "file"\n')
    (config / "libvirt" / "libvirtd.conf").write_text(
        f'unix_sock_dir = "{site.socket.parent}"\n'
        'unix_sock_rw_perms = "0700"\n'
        'auth_unix_rw = "none"\n'
        f'log_outputs = "2:file:{site.logs / "libvirtd.log"}"\n'
    )


def start_libvirtd(site: Site) -> Process:
    """Starts the site's libvirtd; it outlives us."""
    pid_file = site.run / "libvirtd.pid"
    pid_file.unlink(missing_ok=True)
    argv = [need("libvirtd"), "--config", str(site.config / "libvirt" / "libvirtd.conf"), "--pid-file", str(pid_file)]
    return process.spawn(f"{site.name}/libvirtd", argv, environment(site), site.logs / "libvirtd.out")


def seed_capabilities(site: Site, cache: Path) -> None:
    """Gives the site what another lab's libvirtd found out about QEMU: finding it out costs the first use two seconds.
    libvirt itself throws it away when QEMU or libvirt have changed."""
    if (cache / "capabilities").is_dir():
        shutil.copytree(cache / "capabilities", _capabilities(site), dirs_exist_ok=True)


def keep_capabilities(site: Site, cache: Path) -> None:
    """Keeps what the site's libvirtd found out about QEMU, for the next lab."""
    if _capabilities(site).is_dir():
        shutil.copytree(_capabilities(site), cache / "capabilities", dirs_exist_ok=True)


def _capabilities(site: Site) -> Path:
    return site.root / "libvirt" / "cache" / "libvirt" / "qemu" / "cache" / "capabilities"


def await_libvirtd(site: Site, daemon: Process) -> None:
    """Returns when libvirtd takes connections. Raises SetupFailed with the end of its log."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.alive(daemon):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(site.socket))
            except OSError:
                time.sleep(0.02)
                continue
        return
    raise SetupFailed(f"libvirtd of site {site.name} does not answer: {_log_end(site)}")


def _log_end(site: Site) -> str:
    text = "".join(path.read_text(errors="replace") for path in sorted(site.logs.glob("libvirtd.*")))
    return text[-800:].strip()


def virsh(site: Site, *arguments: str, timeout: float = 60) -> str:
    return run(["virsh", "-q", "-c", site.uri, *arguments], timeout=timeout)


def define(site: Site, xml: str, name: str) -> None:
    path = site.root / "libvirt" / f"{name}.xml"
    path.write_text(xml)
    virsh(site, "define", str(path))


def domains(site: Site, *flags: str) -> list[str]:
    """Names of the site's domains (`--all`, `--state-running`…). Raises StepFailed when libvirtd is away."""
    return virsh(site, "list", "--name", *flags).split()


def domain_states(site: Site) -> dict[str, str]:
    """Name to state in libvirt's words, e.g. `running`, `shut off`."""
    lines = virsh(site, "list", "--all").splitlines()
    return {row[1]: row[2] for row in (line.split(None, 2) for line in lines) if len(row) == 3}


def destroy_all(site: Site) -> None:
    """Pulls the plug of every domain; what libvirtd can't do is left to `stray_machines`."""
    if not site.socket.exists():
        return
    with contextlib.suppress(StepFailed), ThreadPoolExecutor(4) as pool:
        for _ in pool.map(partial(_destroy, site), domains(site)):
            pass


def _destroy(site: Site, name: str) -> None:
    with contextlib.suppress(StepFailed):
        virsh(site, "destroy", name, timeout=20)


def stray_machines(site: Site) -> list[Process]:
    """QEMU processes of this site, by libvirt's pid files; only those whose command line names its directories."""
    found = []
    for path in (site.run / "r").glob("libvirt/qemu/run/*.pid"):
        text = path.read_text().strip()
        if not re.fullmatch(r"\d+", text):
            continue
        pid = int(text)
        start = process.start_time(pid)
        if start is not None and _names(pid, (site.run, site.root)):
            found.append(Process(f"{site.name}/{path.stem}", pid, start))
    return found


def _names(pid: int, places: tuple[Path, ...]) -> bool:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return any(os.fsencode(place) + b"/" in line for place in places)
