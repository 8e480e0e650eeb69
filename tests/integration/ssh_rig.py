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


@dataclass
class HostRig:
    """A running one. `share` is a directory that it and this machine both see, at the same path."""

    share: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
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
        argv = ["ssh", *options.split(), f"{user}@127.0.0.1", script]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        for shell in self.shells:
            shell.close()
        if self.process is not None:
            self.process.kill()  # and, by --kill-child, all of its namespaces
            self.process.wait()
        shutil.rmtree(self.share)


def lacking() -> str:
    """Why there can be no such host here; empty when there can."""
    if os.geteuid() != 0:
        return "namespaces with an overlay need root"
    programs = [program for program in (SSHD, "ssh-keygen", "ssh", "unshare") if not shutil.which(program)]
    return f"needs {', '.join(programs)}; run: make setup" if programs else ""


def start(prepare: str = "", settings: str = "") -> HostRig:
    """A host that takes logins. `prepare` is shell run in its root before, `settings` more lines of sshd_config."""
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
        f"PermitRootLogin prohibit-password\nPidFile none\n{settings}\n"
    )
    command = f"{SSHD} -D -e -f {share}/sshd_config"
    base = tempfile.mkdtemp(prefix="base-", dir=share)
    script = _BEGIN.format(base=base, share=share, prepare=prepare.format(share=share), command=command)
    with (share / "sshd.log").open("wb") as log:
        argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "sh", "-c", script]
        rig.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    _wait(rig)
    return rig


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
