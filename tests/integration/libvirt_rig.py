"""A libvirtd of its own in session mode, as an unprivileged user, with directories and a socket of its own."""

from __future__ import annotations

import importlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path


def libvirt_missing() -> str:
    """Why there is no libvirt to test with; empty when there is."""
    for tool in ("/usr/sbin/libvirtd", "/usr/bin/qemu-system-x86_64"):
        if not Path(tool).exists():
            return f"{tool} is not installed"
    try:
        importlib.import_module("libvirt")
    except ImportError:
        return "libvirt-python is not installed"
    return ""


class Libvirtd:
    """Started at once; `restart()` kills and starts it again (its machines run on)."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="drctl-lv-", dir="/tmp"))
        self.directory.chmod(0o755)
        self.images = self.directory / "images"
        for name in ("run", "cfg", "cache", "home", "images"):
            (self.directory / name).mkdir(mode=0o700)
        self._user: dict[str, object] = {}
        if os.getuid() == 0:
            # libvirtd run by root is never in session mode.
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            subprocess.run(["chown", "-R", f"{nobody.pw_uid}:{nobody.pw_gid}", str(self.directory)], check=True)
        (self.directory / "libvirtd.conf").write_text(
            f'unix_sock_dir = "{self.directory}/run"\nauth_unix_rw = "none"\nlog_level = 3\n'
        )
        self.socket = self.directory / "run" / "libvirt-sock"
        self.uri = f"qemu+unix:///session?socket={self.socket}"
        self._log = (self.directory / "libvirtd.log").open("wb")
        self.start()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            ["/usr/sbin/libvirtd", "--config", str(self.directory / "libvirtd.conf")],
            env={
                "PATH": os.environ["PATH"],
                "HOME": f"{self.directory}/home",
                "XDG_RUNTIME_DIR": f"{self.directory}/run",
                "XDG_CONFIG_HOME": f"{self.directory}/cfg",
                "XDG_CACHE_HOME": f"{self.directory}/cache",
            },
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            **self._user,  # type: ignore[call-overload]
        )
        deadline = time.monotonic() + 20
        while not self.socket.exists():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def log(self) -> str:
        return (self.directory / "libvirtd.log").read_text(errors="replace")[-3000:]

    def image(self, name: str, size: int) -> Path:
        path = self.images / name
        path.touch()
        os.truncate(path, size)
        path.chmod(0o666)
        return path

    def close(self) -> None:
        """Ends libvirtd and what it started: only processes whose pid files are in our own directory."""
        self.stop()
        for pid_file in self.directory.glob("run/libvirt/qemu/run/*.pid"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(pid_file.read_text()), signal.SIGKILL)
        self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def definition(name: str, images: dict[str, Path], extra: str = "", attributes: str = "") -> str:
    """A machine without an operating system: its firmware idles, its disks are real."""
    disks = "".join(
        f"<disk type='file' device='disk'><driver name='qemu' type='raw' {attributes}/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>"
        for target, path in images.items()
    )
    return (
        f"<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>"
        f"<os><type arch='x86_64' machine='pc'>hvm</type></os>"
        f"<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}"
        f"<controller type='usb' model='none'/><memballoon model='none'/>{extra}</devices></domain>"
    )
