"""A simulated host through its real OpenSSH and shell: algorithms, tools, locks, lost connections."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import paramiko
import pytest

from drctl.errors import HostUnreachable, LoginRefused
from tests.esxsim import host
from tests.esxsim.host import EsxSim, parts

if reason := host.lacking():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def esx() -> Iterator[EsxSim]:
    one = EsxSim().start()
    yield one
    one.close()


def ssh(esx: EsxSim, *words: str) -> subprocess.CompletedProcess[str]:
    login = esx.login()
    options = f"-F none -i {login.identity} -o UserKnownHostsFile={login.known_hosts} -o BatchMode=yes -p {login.port}"
    argv = ["ssh", *options.split(), f"{login.user}@127.0.0.1", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_programs_and_the_shell(esx: EsxSim) -> None:
    """Facts 4.1: busybox ash with `[[ ]]` and `${x//a/b}`; `tr` is absent from 7 on, and no bash, sudo, python."""
    script = (
        "x=aba; [[ $x == a* ]] && echo ${x//a/c}; for p in tr bash sudo rsync truncate; do which $p; done; echo $PATH"
    )
    assert esx.shell().run(["sh", "-c", script]).out == b"cbc\n/bin:/sbin\n"
    done = esx.shell().run(["tr", "a", "b"])
    assert (done.code, done.err) == (127, b"sh: tr: not found\n")
    assert esx.shell().run(["vmware", "-v"]).out == b"VMware ESXi 8.0.3 build-24022510\n"


def test_a_label_is_a_link_to_its_uuid(esx: EsxSim) -> None:
    """Facts 8.8."""
    uuid = esx.hostd.datastores[0].uuid
    assert esx.shell().run(["readlink", "/vmfs/volumes/datastore1"]).out.decode().strip() == uuid


def test_ed25519_is_refused_and_sftp_is_there_on_8(esx: EsxSim) -> None:
    """Facts 4.3: FIPS; plain scp worked on 8.0.2."""
    with pytest.raises(LoginRefused):
        esx.shell("ed25519").run(["true"])
    client = paramiko.SSHClient()
    client.load_host_keys(esx.login().known_hosts)
    client.connect("127.0.0.1", esx.port, esx.login().user, key_filename=esx.login().identity, allow_agent=False)
    assert sorted(client.open_sftp().listdir("/vmfs")) == ["devices", "volumes"]
    client.close()


def test_nothing_is_forwarded(esx: EsxSim) -> None:
    """Facts 4.3: AllowTcpForwarding no."""
    shell = esx.shell()
    shell.run(["true"])
    assert shell._client is not None
    transport = shell._client.get_transport()
    assert transport is not None
    with pytest.raises(paramiko.ChannelException, match="Administratively prohibited"):
        transport.open_channel("direct-tcpip", ("127.0.0.1", esx.port), ("127.0.0.1", 1))


def test_locked_files_are_busy(esx: EsxSim) -> None:
    """Facts 2: `cp *` of a running machine on a snapshot: what it writes fails, the base is copied. A switch says no."""
    vm = esx.add_vm("busy", on=True)
    esx.run("vim-cmd", "vmsvc/snapshot.create", str(vm.id), "s", "", "0", "0")
    place, shell = "/vmfs/volumes/datastore1/busy", esx.shell()
    done = shell.run(["cat", f"{place}/busy-000001-sesparse.vmdk"])
    assert (done.code, done.told) == (
        1,
        f"cat: can't open '{place}/busy-000001-sesparse.vmdk': Device or resource busy",
    )
    read = ["dd", f"if={place}/busy-flat.vmdk", "of=/dev/null", "bs=1M", "count=1"]
    assert shell.run(read).code == 0
    assert shell.run(["rm", f"{place}/busy-flat.vmdk"]).told.startswith("rm: can't remove")
    esx.hostd.switches.raw_read_of_frozen_base = False
    assert shell.run(read).told.endswith("Device or resource busy")
    esx.hostd.switches.raw_read_of_frozen_base = True


@pytest.mark.parametrize("event", ["begin", "end"])
def test_the_connection_drops_and_the_worker_lives_on(esx: EsxSim, event: str) -> None:
    """Facts 8.8: at `begin` nothing was done, at `end` all was."""
    esx.hostd.drop = (event, 0)
    shell = esx.shell()
    done: object = None
    try:
        done = shell.run(["touch", f"/tmp/{event}"]).code
    except HostUnreachable as exc:
        done = exc
    assert done == -1 or isinstance(done, HostUnreachable)
    assert (esx.root / "tmp" / event).exists() == (event == "end")
    assert shell.run(["echo", "again"]).out == b"again\n"


def test_a_detached_worker_outlives_its_connection(esx: EsxSim) -> None:
    """Facts 2: long clones are started by setsid, and polled."""
    shell = esx.shell()
    shell.run(["sh", "-c", "setsid sh -c 'sleep 0.3; echo $? > /tmp/code' </dev/null >/dev/null 2>&1 &"])
    shell.close()
    deadline = time.monotonic() + 10
    while not (esx.root / "tmp/code").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (esx.root / "tmp/code").read_text() == "0\n"


def test_five_failures_lock_the_account() -> None:
    """Facts 4.3: Security.AccountLockFailures."""
    one = EsxSim("6.7").start()
    for _ in range(5):
        with pytest.raises(LoginRefused):
            one.shell("stranger").run(["true"])
    with pytest.raises(LoginRefused):
        one.shell().run(["true"])
    one.close()


def test_sftp_is_absent_before_8() -> None:
    """Facts 4.3: the subsystem's line is there, its program is not: exit code 127."""
    one = EsxSim("7.0U3").start()
    assert ssh(one, "-s", "sftp").returncode == 127
    assert ssh(one, "which", "tr").returncode == 1
    one.close()


def test_the_keys_are_there() -> None:
    assert (parts() / "id").exists()
