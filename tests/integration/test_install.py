"""Installing over a real OpenSSH: on a host that is namespaces over this machine's files, and on one that systemd booted."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from drctl.appliance.install import bundle as bundles
from drctl.appliance.install.preflight import Place, look
from drctl.appliance.install.session import agent_session
from drctl.cli.app import run
from drctl.errors import HostUnreachable, IntegrityError, Locked, OutOfSpace, StepFailed
from tests.integration import ssh_rig
from tests.integration.ssh_rig import HostRig

STUB = Path(__file__).with_name("systemctl_stub.py")
#: Debian's libvirt-daemon-system makes the groups and the user; systemctl is a stand-in for one service.
PREPARE = f"""
mkdir -p run/systemd/system etc/libvirt var/log/libvirt
cp {STUB} usr/local/sbin/systemctl
chmod 755 usr/local/sbin/systemctl
chroot . groupadd --system --force libvirt
chroot . groupadd --system --force libvirt-qemu
chroot . id libvirt-qemu >/dev/null 2>&1 || chroot . useradd --system --no-create-home --gid libvirt-qemu libvirt-qemu
mkdir tiny
mount -t tmpfs -o size=1m,mode=755 tmpfs tiny
printf '#!/bin/sh\\necho sudo: a password is required >&2\\nexit 1\\n' > usr/local/bin/sudo
chmod 755 usr/local/bin/sudo
"""
PYTHON = "/usr/bin/python3"
#: Left alone by an installation: what the rig itself and a checkout below it are made of.
FIND = "find /etc /opt /usr/local /var/lib /run -name '*drctl*' -not -path '*/drctl-lab*' 2>/dev/null"


@pytest.fixture(scope="module")
def host() -> Iterator[HostRig]:
    rig = ssh_rig.start(PREPARE)
    yield rig
    rig.close()


def config(rig: HostRig, user: str = "root", link: str = "127.0.0.1:17077") -> Path:
    place = rig.share / "config"
    if not place.exists():
        assert run(["init", str(place), "--site", "alpha", "--site", "beta", "--yes"]) == 0
    ssh = f'ssh = "{user}@127.0.0.1:{rig.port}"\nssh_identity = "../id"\nssh_known_hosts = "../known_hosts"\n'
    (place / "drctl.toml").write_text(
        '[[site]]\nname = "alpha"\n[[site]]\nname = "beta"\n'
        f'[[host]]\nname = "a1"\nsite = "alpha"\nlink = "{link}"\n{ssh}'
        '[[host]]\nname = "b1"\nsite = "beta"\nlink = "127.0.0.1:17078"\nssh = "root@127.0.0.1:1"\n'
    )
    return place


def drctl(rig: HostRig, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line as a process of its own, in the host's network."""
    argv = [*rig.enter, sys.executable, "-m", "drctl.cli", *words, "--config", str(config(rig))]
    return subprocess.run(argv, capture_output=True, text=True, timeout=900, check=False, stdin=subprocess.DEVNULL)


def test_a_host_is_looked_at(host: HostRig) -> None:
    facts = look(host.shell(), Place("/opt/drctl", "/var/lib/drctl", "/run/drctl", host.port))
    assert (facts["root"], facts["uid"], facts["listening"]) == ("yes", "0", "yes")
    assert (facts["machine"], facts["systemd"], facts["qemu_group"]) == (os.uname().machine, "252", "libvirt-qemu")
    assert facts.agent_python.startswith("/usr/")
    assert facts.space["/var/lib/drctl"] > 0
    assert facts["libvirt"].split(".")[0].isdigit()
    assert facts["qemu"].split(".")[0].isdigit()
    assert look(host.shell("ops"), Place("/o", "/h", "/r", 9))["root"] == "no sudo: a password is required"


def test_users_and_files_are_made_on_the_host_and_not_here(host: HostRig) -> None:
    with agent_session("a1", host.shell(), PYTHON, []) as remote:
        assert remote.ask("user", name="drctl", home="/var/lib/drctl", groups=["libvirt", "nothing"])
        assert not remote.ask("user", name="drctl", home="/var/lib/drctl", groups=["libvirt", "nothing"])
        assert remote.ask("directory", path="/opt/drctl-x", mode=0o750, owner="drctl")
        assert remote.ask("run", argv=["id", "-Gn"], user="drctl")["out"].split() == ["drctl", "libvirt"]
        assert host.run("stat -c '%U %a' /opt/drctl-x") == "drctl 750\n"
        assert remote.ask("user_gone", name="drctl")
        assert remote.ask("remove", path="/opt/drctl-x")
    assert not Path("/opt/drctl-x").exists()


def test_a_second_operator_is_told_who_is_at_work(host: HostRig) -> None:
    first, second = (agent_session("a1", host.shell(), PYTHON, []) for _ in range(2))
    with first, pytest.raises(Locked, match=r"a1: \S+ at \S+, since .* is at work"):
        second.__enter__()
    with agent_session("a1", host.shell(), PYTHON, []) as remote:
        assert remote.ask("names", path="/nothing") == []


def test_a_full_disk_leaves_nothing_half_there(host: HostRig, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(os.urandom(3 * 2**20))
    with agent_session("a1", host.shell(), PYTHON, []) as remote:
        with pytest.raises(OutOfSpace, match="No space left on device"):
            remote.put("/tiny/wheel", big, hashlib.sha256(big.read_bytes()).hexdigest())
        with pytest.raises(OutOfSpace):
            remote.ask("file", path="/tiny/x", text="y" * 2**21, mode=0o644)
        assert remote.ask("names", path="/tiny") == []
        assert remote.put("/opt/wheel", big, hashlib.sha256(big.read_bytes()).hexdigest())
        with pytest.raises(IntegrityError):
            remote.put("/opt/other", big, "0" * 64)
        assert remote.ask("names", path="/opt").count("other") == 0
        remote.ask("remove", path="/opt/wheel")


def test_a_connection_that_ends_gives_the_lock_back(host: HostRig) -> None:
    shell = host.shell()
    with agent_session("a1", shell, PYTHON, []) as remote:
        shell.close()
        with pytest.raises(HostUnreachable, match="the connection was lost") as caught:
            remote.ask("names", path="/")
    assert "the same command again" in caught.value.hint
    with agent_session("a1", host.shell(), PYTHON, []) as remote, pytest.raises(StepFailed, match="no/such"):
        remote.ask("run", argv=["/no/such"])


@pytest.mark.parametrize(
    ("user", "link", "code", "words"),
    [
        ("ops", "127.0.0.1:17077", 25, "a1: the login may not become root: sudo: a password is required"),
        ("stranger", "127.0.0.1:17077", 24, "the login was refused"),
        ("root", "127.0.0.1:{port}", 42, "is taken"),
    ],
)
def test_what_keeps_a_host_from_being_installed_on(
    host: HostRig, capsys: pytest.CaptureFixture[str], user: str, link: str, code: int, words: str
) -> None:
    before = host.run(FIND)
    place = config(host, user, link.format(port=host.port))
    bundle = str(_small_bundle(host.share / "bundle"))
    assert run(["appliance", "install", "a1", "--yes", "--bundle", bundle, "--config", str(place)]) == code
    assert words in capsys.readouterr().err
    assert host.run(FIND) == before


def _small_bundle(directory: Path) -> Path:
    """As far as a preflight looks: the list is whole, the wheels are not those of drctl."""
    import json
    import platform

    if not directory.exists():
        directory.mkdir()
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        fields = {"format": 1, "version": "0", "python": version, "machine": platform.machine(), "wheels": []}
        (directory / "bundle.json").write_text(json.dumps(fields))
    return directory


def test_all_hosts_are_looked_at_before_any_is_changed(host: HostRig, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(_small_bundle(host.share / "bundle"))
    words = ["appliance", "install", "a1", "b1", "--yes", "--bundle", bundle, "--config", str(config(host))]
    assert run(words) == 20
    err = capsys.readouterr().err
    assert "b1: 127.0.0.1 port 1: Connection refused" in err
    assert "nothing was changed" in err
    assert "drctl:x:" not in host.run("cat /etc/passwd")


@pytest.mark.long
def test_from_nothing_to_a_service_under_systemd_and_back() -> None:
    rig = ssh_rig.boot()
    try:
        _from_nothing_and_back(rig)
    finally:
        rig.close()


def _from_nothing_and_back(rig: HostRig) -> None:
    before = rig.run(FIND)
    # The connection is lost in the middle: the sshd that serves it is killed while the environment is made.
    broken: list[subprocess.CompletedProcess[str]] = []
    thread = threading.Thread(target=lambda: broken.append(drctl(rig, "appliance", "install", "a1", "--yes")))
    thread.start()
    # pip's or venv's process, above it the agent, above that the sshd of its connection
    rig.run(
        "until pid=$(pgrep -o -f '[w]ithout-pip|[r]oot-user-action'); do sleep 0.1; done; "
        "kill $(ps -o ppid= -p $(ps -o ppid= -p $pid))"
    )
    thread.join()
    assert broken[0].returncode == 20, broken[0].stderr
    assert "the same command again" in broken[0].stderr

    # What ran there when the connection was lost runs to its end, under the lock.
    while (done := drctl(rig, "appliance", "install", "a1", "--yes")).returncode == 13:
        assert "is at work there" in done.stderr
    assert done.returncode == 0, done.stderr
    assert rig.run("systemctl is-active drctl-appliance; systemctl is-enabled drctl-appliance") == "active\nenabled\n"
    status = rig.run("systemctl show drctl-appliance -p StatusText -p WatchdogUSec -p KillMode -p User -p Type")
    assert {"StatusText=appliance of a1, site alpha", "WatchdogUSec=30s", "KillMode=process", "User=drctl"} <= set(
        status.split("\n")
    )
    again = drctl(rig, "appliance", "install", "a1", "--yes")
    assert (again.returncode, again.stdout) == (0, "a1: already as it should be; nothing was changed\n")
    listed = drctl(rig, "appliance", "list")
    assert "a1    alpha  running" in listed.stdout

    # A guest of the system's libvirt, whose QEMU runs as libvirt-qemu, is mirrored to a tap of the user drctl.
    rig.run(GUEST)
    assert '"state": "attached"' in rig.run(f"sleep 3; {_call('group.status', group='g', role='source')}")
    tap = rig.run("pgrep -f [d]rctl.replication.tap")
    refused = drctl(rig, "appliance", "uninstall", "a1", "--confirm", "a1")
    assert (refused.returncode, "a1 protects g" in refused.stderr) == (14, True)

    # Stop and crash of the supervisor: tap and guest go on, and it comes back by itself. At an upgrade the tap hands over.
    main = rig.run("systemctl show -p MainPID --value drctl-appliance")
    rig.run(
        f"kill -9 {main.strip()}; for i in $(seq 100); do drctl group list >/dev/null 2>&1 && exit 0; sleep 0.3; done; exit 1"
    )
    assert rig.run("systemctl show -p MainPID --value drctl-appliance") != main
    newer = str(_newer_bundle(rig.share / "newer"))
    upgraded = drctl(rig, "appliance", "upgrade", "a1", "--yes", "--bundle", newer)
    assert upgraded.returncode == 0, upgraded.stderr
    assert "processes (taps, views) still run" not in upgraded.stderr
    assert len(rig.run("ls /opt/drctl/versions").split()) == 1
    assert rig.run("pgrep -f [d]rctl.replication.tap") != tap
    assert "took over 1 connections" in rig.run("cat /var/lib/drctl/logs/tap-g.log")
    assert '"state": "attached"' in rig.run(f"sleep 3; {_call('group.status', group='g', role='source')}")

    rig.run(f"{_call('replicate.stop', group='g')}; {_call('group.remove', group='g')}")
    gone = drctl(rig, "appliance", "uninstall", "a1", "--confirm", "a1")
    assert gone.returncode == 0, gone.stderr
    assert rig.run(FIND) == before
    assert rig.run(
        "pgrep -c -f '[d]rctl.appliance' || true; getent passwd drctl || true; virsh list --name"
    ).split() == [
        "0",
        "g1",
    ]
    again = drctl(rig, "appliance", "uninstall", "a1", "--confirm", "a1")
    assert "already removed" in again.stdout


def _newer_bundle(directory: Path) -> Path:
    """The bundle of this drctl, with one more file in drctl's own wheel: another version as far as a host sees."""
    import json
    import zipfile

    made = bundles.make_bundle(directory)
    [wheel] = [wheel for wheel in made.wheels if wheel.project == "drctl"]
    with zipfile.ZipFile(directory / wheel.name, "a") as archive:
        archive.writestr("drctl/newer.txt", "newer")
    listing = json.loads((directory / bundles.LIST).read_text())
    data = (directory / wheel.name).read_bytes()
    for row in listing["wheels"]:
        if row["name"] == wheel.name:
            row |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (directory / bundles.LIST).write_text(json.dumps(listing))
    return directory


def _call(method: str, **params: object) -> str:
    """A shell command that speaks to the appliance's socket on the host."""
    import json

    request = json.dumps({"method": method, "params": params, "id": 1})
    return f"echo '{request}' | /opt/drctl/current/bin/python -I -m drctl.appliance.connect /run/drctl/control.sock"


GUEST = f"""
set -e
truncate -s 64M /var/lib/libvirt/images/g1.raw
cat > /tmp/g1.xml <<END
<domain type="qemu"><name>g1</name><memory unit="MiB">64</memory><os><type arch="x86_64">hvm</type></os><devices>
<disk type="file" device="disk"><driver name="qemu" type="raw"/><source file="/var/lib/libvirt/images/g1.raw"/>
<target dev="vda" bus="virtio"/></disk></devices></domain>
END
virsh --quiet define /tmp/g1.xml
virsh --quiet start g1
[ "$(stat -c %U /proc/$(pgrep -o qemu-system))" = libvirt-qemu ]
{_call("group.put", spec={"name": "g", "source": "alpha", "recovery": "beta", "machines": ["g1"], "source_host": "a1", "recovery_host": "b1", "ring_size": 16777216})}
{_call("replicate.start", group="g")}
"""
