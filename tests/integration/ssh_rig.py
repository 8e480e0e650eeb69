"""A host to install on: this machine's file system under an overlay, in namespaces of its own, with a private OpenSSH.

What is changed there (users, units, /opt) is in memory and gone with it; nothing of this machine is touched. Its sshd
listens on a loopback port, with keys and configuration of its own. Root may log in, and `ops`, who is nobody there."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from drctl.hypervisor.shell import Shell
from drctl.model.site import Login

SSHD = "/usr/sbin/sshd"
ROOT = Path(__file__).parents[2]

_BEGIN = """
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs {base}
mkdir {base}/upper {base}/work {base}/root
mount -t overlay overlay -o lowerdir=/,upperdir={base}/upper,workdir={base}/work {base}/root
cd {base}/root
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
for each in run tmp; do mount -t tmpfs -o mode=755 tmpfs $each; done
chmod 1777 tmp
mkdir -p run/sshd .{share}
mount --bind {share} .{share}
chroot . useradd --create-home --shell /bin/bash --password x ops
{prepare}
exec chroot . {command}
"""

#: A root that systemd can be process 1 of: nothing of the machine's devices and cgroups is in it.
_BOOT = """
set -eu
mount --make-rprivate /
mount -t overlay overlay -o lowerdir=/,upperdir={base}/upper,workdir={base}/work {base}/root
cd {base}/root
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mountpoint -q /sys/fs/cgroup/unified && mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
for each in run tmp dev; do mount -t tmpfs -o mode=755 tmpfs $each; done
chmod 1777 tmp
mkdir -m 1777 dev/shm
mount -t tmpfs tmpfs dev/shm
mkdir dev/pts
mount -t devpts -o newinstance,ptmxmode=666,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for each in null zero full random urandom tty; do touch dev/$each; mount --bind /dev/$each dev/$each; done
mkdir -p .{share}
mount --bind {share} .{share}
rm -rf etc/systemd/system/*.wants etc/libvirt/qemu/networks/autostart
mkdir -p etc/systemd/system/multi-user.target.wants etc/systemd/system/sockets.target.wants
for each in libvirtd.socket virtlogd.socket; do ln -s /lib/systemd/system/$each etc/systemd/system/sockets.target.wants/; done
printf '[Service]\nRuntimeDirectory=sshd\nExecStart={command}\n' > etc/systemd/system/private-sshd.service
ln -s ../private-sshd.service etc/systemd/system/multi-user.target.wants/
exec env -i container=drctl PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . /lib/systemd/systemd --unit=multi-user.target
"""

#: What a hypervisor host has and this machine may lack, put into the overlay alone.
_PACKAGES = """
set -eu
mount --make-rprivate /
mount -t overlay overlay -o lowerdir=/,upperdir={base}/upper,workdir={base}/work {base}/root
cd {base}/root
mount -t proc proc proc
mount --rbind /dev dev
mount -t tmpfs -o mode=1777 tmpfs tmp
printf '#!/bin/sh\\nexit 101\\n' > usr/sbin/policy-rc.d
chmod 755 usr/sbin/policy-rc.d
chroot . apt-get update -qq
DEBIAN_FRONTEND=noninteractive chroot . apt-get install -y -qq --no-install-recommends \
    libvirt-daemon-system qemu-system-x86 qemu-utils systemd-sysv dbus sudo
rm usr/sbin/policy-rc.d
"""
_CGROUPS = [Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")]


@dataclass
class HostRig:
    """A running one. `share` is a directory that it and this machine both see, at the same path."""

    share: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    #: What stands before a command that has to be in the host's network, where that is not this machine's.
    enter: tuple[str, ...] = ()
    cgroup: Path | None = None
    shells: list[Shell] = field(default_factory=list)

    @property
    def identity(self) -> Path:
        return self.share / "id"

    @property
    def known_hosts(self) -> Path:
        return self.share / "known_hosts"

    def login(self, user: str = "root", **changes: object) -> Login:
        values: dict[str, object] = {
            "host": "127.0.0.1",
            "user": user,
            "port": self.port,
            "identity": str(self.identity),
            "known_hosts": str(self.known_hosts),
        }
        return Login(**{**values, **changes})  # type: ignore[arg-type]

    def shell(self, user: str = "root", **changes: object) -> Shell:
        shell = Shell(self.login(user, **changes))
        self.shells.append(shell)
        return shell

    def run(self, script: str, user: str = "root") -> str:
        """What a script says there, by the system's own ssh. Fails the test when it fails."""
        options = f"-F none -i {self.identity} -o UserKnownHostsFile={self.known_hosts} -o BatchMode=yes -p {self.port}"
        argv = [*self.enter, "ssh", *options.split(), f"{user}@127.0.0.1", script]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        for shell in self.shells:
            shell.close()
        if self.process is not None:
            self.process.kill()  # and, by --kill-child, all of its namespaces
            self.process.wait()
        if self.cgroup is not None:
            _remove_cgroup(self.cgroup)
        shutil.rmtree(self.share)


def _remove_cgroup(cgroup: Path) -> None:
    """Once its processes are gone, which takes a moment after the kill of their first."""
    deadline = time.monotonic() + 20
    while cgroup.exists():
        for directory in [*sorted(cgroup.rglob("*/"), key=lambda path: -len(path.parts)), cgroup]:
            try:
                directory.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
        time.sleep(0.05)


def lacking() -> str:
    """Why there can be no such host here; empty when there can."""
    if os.geteuid() != 0:
        return "namespaces with an overlay need root"
    programs = [program for program in (SSHD, "ssh-keygen", "ssh", "unshare") if not shutil.which(program)]
    return f"needs {', '.join(programs)}; run: make setup" if programs else ""


def start(prepare: str = "", settings: str = "") -> HostRig:
    """A host that takes logins. `prepare` is shell run in its root before, `settings` more lines of sshd_config."""
    rig = _make(settings)
    base = tempfile.mkdtemp(prefix="base-", dir=rig.share)
    script = _BEGIN.format(base=base, share=rig.share, prepare=prepare.format(share=rig.share), command=_command(rig))
    _launch(rig, ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "sh", "-c", script])
    _wait(rig)
    return rig


def boot() -> HostRig:
    """A host with systemd as its first process, Debian's libvirt-daemon-system, and a network of its own.

    Its overlay is on disk, and its packages come from the network."""
    cgroup = next((path for path in _CGROUPS if (path / "cgroup.controllers").exists()), None)
    if cgroup is None or not Path("/lib/systemd/systemd").exists():
        pytest.skip("booting systemd needs systemd and a cgroup2 hierarchy")
    rig = _make("")
    rig.share.joinpath("base").mkdir()
    for name in ("upper", "work", "root"):
        (rig.share / "base" / name).mkdir()
    values = {"base": rig.share / "base", "share": rig.share, "command": _command(rig)}
    with (rig.share / "packages.log").open("wb") as log:
        argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _PACKAGES.format(**values)]
        if subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=900, check=False).returncode:
            told = (rig.share / "packages.log").read_text()[-400:]
            rig.close()
            pytest.skip(f"the host's packages can't be had: {told}")
    rig.cgroup = cgroup / rig.share.name
    rig.cgroup.mkdir()
    namespaces = ["--mount", "--pid", "--net", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child"]
    inside = f'echo $$ > {rig.cgroup}/cgroup.procs; exec unshare {" ".join(namespaces)} sh -c "$0"'
    _launch(rig, ["sh", "-c", inside, _BOOT.format(**values)])
    assert rig.process is not None
    deadline = time.monotonic() + 60
    while not (children := _children(rig.process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    rig.enter = ("nsenter", f"--net=/proc/{children[0]}/ns/net", "--")
    while subprocess.run(
        [*rig.enter, "bash", "-c", f"</dev/tcp/127.0.0.1/{rig.port}"], capture_output=True, check=False
    ).returncode:
        if time.monotonic() > deadline:
            told = (rig.share / "sshd.log").read_text()[-1000:]
            rig.close()
            pytest.fail(f"the host did not boot: {told}")
        time.sleep(0.2)
    return rig


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _make(settings: str) -> HostRig:
    """Keys and sshd's configuration in a directory of their own."""
    if reason := lacking():
        pytest.skip(reason)
    share = Path(tempfile.mkdtemp(prefix="drctl-host-", dir="/var/tmp"))
    share.chmod(0o755)
    rig = HostRig(share, _free_port())
    for name in ("id", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", share / name], check=True)
    (share / "known_hosts").write_text(f"[127.0.0.1]:{rig.port} {(share / 'host_key.pub').read_text()}")
    (share / "authorized_keys").write_text((share / "id.pub").read_text())
    (share / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{rig.port}\nHostKey {share}/host_key\nAuthorizedKeysFile {share}/authorized_keys\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        # bash reads no .bashrc at that level: this machine's may take a second, or wait for somebody's lock.
        f"PermitRootLogin prohibit-password\nPidFile none\nSetEnv SHLVL=2\n{settings}\n"
    )
    return rig


def _command(rig: HostRig) -> str:
    return f"{SSHD} -D -e -f {rig.share}/sshd_config"


def _launch(rig: HostRig, argv: list[str]) -> None:
    with (rig.share / "sshd.log").open("wb") as log:
        rig.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def _wait(rig: HostRig) -> None:
    assert rig.process is not None
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and rig.process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", rig.port)) == 0:
                return
        time.sleep(0.05)
    log = (rig.share / "sshd.log").read_text()
    rig.close()
    if "unshare:" in log or "mount:" in log:
        pytest.skip(f"no namespaces with an overlay can be had here: {log[-400:]}")
    pytest.fail(f"the host's sshd did not start: {log[-1000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
