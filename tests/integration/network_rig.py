"""The system's libvirtd, as root, in a network and a mount namespace of its own: networks with DHCP that are nobody's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

#: $1: the rig's directory. Becomes libvirtd.
SCRIPT = r"""
set -e
work=$1
cp -a /etc/libvirt $work/etc
mkdir -p $work/lib $work/cache $work/log $work/run
for file in passwd group; do cp /etc/$file $work/$file; done
grep -q ^libvirt-qemu: $work/passwd || echo 'libvirt-qemu:x:64055:64055::/:/bin/false' >> $work/passwd
grep -q ^libvirt-qemu: $work/group || echo 'libvirt-qemu:x:64055:' >> $work/group
for file in passwd group; do mount --bind $work/$file /etc/$file; done
mount --bind $work/lib /var/lib && mount --bind $work/cache /var/cache && mount --bind $work/log /var/log
mkdir -p /var/lib/libvirt/dnsmasq
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /etc/libvirt
cp -a $work/etc/. /etc/libvirt/
rm -rf /etc/libvirt/qemu
mkdir -p /etc/libvirt/qemu/networks
ip link set lo up
printf 'security_driver = "none"\nuser = "root"\ngroup = "root"\ncgroup_controllers = []\nnamespaces = []\nstdio_handler = "file"\n' > /etc/libvirt/qemu.conf
printf 'unix_sock_dir = "%s"\nauth_unix_rw = "none"\nlog_outputs = "3:file:%s"\n' "$work/run" "$work/libvirtd.log" > $work/lv.conf
exec libvirtd --config $work/lv.conf
"""

NETWORK = """<network><name>{name}</name><bridge name='drbr0' stp='off' delay='0'/>
<ip address='10.9.0.1' netmask='255.255.255.0'><dhcp><range start='10.9.0.100' end='10.9.0.200'/></dhcp></ip></network>"""


def network_missing() -> str:
    """Why there can be none here; empty when there can."""
    if os.getuid() != 0:
        return "needs root, for a libvirtd in namespaces of its own"
    lacking = [
        one for one in ("libvirtd", "virsh", "dnsmasq", "unshare", "nsenter", "ip", "busybox") if not _which(one)
    ]
    if lacking:
        return f"not installed: {', '.join(lacking)}"
    made = subprocess.run(
        ["unshare", "--net", "--mount", "ip", "link", "add", "x", "type", "bridge"], capture_output=True
    )
    return "this kernel or container gives no network namespaces with bridges" if made.returncode else ""


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


class NetworkRig:
    """Started at once. `uri` is reached from outside; `inside` runs a command in its namespaces."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="drctl-net-", dir="/tmp"))
        self._log = (self.directory / "out.log").open("wb")
        argv = [
            "unshare",
            "--net",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            SCRIPT,
            "sh",
            str(self.directory),
        ]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        self.socket = self.directory / "run" / "libvirt-sock"
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        deadline = time.monotonic() + 30
        while not self.socket.exists() or self.virsh("version", check=False).returncode:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def log(self) -> str:
        files = (self.directory / "out.log", self.directory / "libvirtd.log")
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in files if path.exists())

    def inside(self, *command: str, check: bool = True, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        argv = ["nsenter", "-t", str(self.process.pid), "-n", "-m", *command]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout)
        assert not check or not done.returncode, f"{command}: {done.stdout}{done.stderr}{self.log()}"
        return done

    def virsh(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(["virsh", "-q", "-c", self.uri, *command], capture_output=True, text=True, timeout=60)
        assert not check or not done.returncode, f"{command}: {done.stderr}{self.log()}"
        return done

    def network(self, name: str = "shop-test") -> str:
        """A network that runs and is defined."""
        path = self.directory / f"{name}.xml"
        path.write_text(NETWORK.format(name=name))
        self.virsh("net-define", str(path))
        self.virsh("net-start", name)
        return name

    def lease(self, mac: str) -> str:
        """The address that a machine of that MAC address gets by DHCP; "" for none."""
        self.inside("ip", "link", "add", "drv0", "type", "veth", "peer", "name", "drv1")
        try:
            self.inside("ip", "link", "set", "drv0", "master", "drbr0", "up")
            self.inside("ip", "link", "set", "drv1", "address", mac, "up")
            script = self.directory / "got"
            script.write_text('#!/bin/sh\n[ "$1" = bound ] && echo "got $ip"\nexit 0\n')
            script.chmod(0o755)
            asked = ("busybox", "udhcpc", "-i", "drv1", "-n", "-q", "-f", "-t", "5", "-T", "2", "-s", str(script))
            told = self.inside(*asked, check=False).stdout
        finally:
            self.inside("ip", "link", "del", "drv0")
        return next((line.removeprefix("got ") for line in told.splitlines() if line.startswith("got ")), "")

    def close(self) -> None:
        for name in self.virsh("net-list", "--name", check=False).stdout.split():
            self.virsh("net-destroy", name, check=False)
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)
