"""A simulated ESXi host in a directory: its root, its daemon, its sshd."""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import pwd
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from drctl.errors import HostUnreachable
from drctl.hypervisor.shell import Done, Shell
from drctl.model.site import Login
from tests.esxsim import formats
from tests.esxsim.call import Call
from tests.esxsim.daemon import PROGRAMS, Hostd
from tests.esxsim.state import PROFILES, Datastore, Vm, write_vmx

MIB = 1 << 20
HERE = Path(__file__).parent
SSHD = "/usr/sbin/sshd"
#: What a 7.x host's busybox gives (facts 4.1); the shell has echo, printf, test and the like built in.
APPLETS = [
    "awk",
    "basename",
    "bunzip2",
    "bzip2",
    "chmod",
    "cksum",
    "cut",
    "date",
    "diff",
    "du",
    "egrep",
    "env",
    "expr",
    "find",
    "grep",
    "gunzip",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mkfifo",
    "mktemp",
    "more",
    "nohup",
    "pidof",
    "readlink",
    "rmdir",
    "sed",
    "seq",
    "setsid",
    "sha512sum",
    "sleep",
    "sort",
    "stat",
    "sync",
    "tar",
    "tee",
    "touch",
    "uname",
    "uniq",
    "unzip",
    "usleep",
    "vi",
    "wc",
    "which",
    "xargs",
    "zcat",
    "printf",
    "test",
]
#: They ask for locks first (tool.c).
LOCKING = ["cat", "dd", "cp", "mv", "rm", "head", "tail", "gzip", "md5sum", "sha1sum", "sha256sum", "hexdump", "od"]
OURS = ["vim-cmd", "esxcli", "vmkfstools", "vmware"]

#: sshd of 8.0.2, build 22380479, as it came (facts 4.3); keyboard-interactive needs PAM and is left out. SHLVL keeps
#: this machine's bash, which carries the forced command, from reading somebody's .bashrc first: one takes a second.
CONFIG = """
ListenAddress 127.0.0.1:{port}
HostKey {keys}/host
AuthorizedKeysFile {share}/authorized_keys
PidFile none
StrictModes no
UsePAM no
LogLevel VERBOSE
AllowTcpForwarding no
AllowStreamLocalForwarding no
AllowAgentForwarding no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
Ciphers aes256-gcm@openssh.com,aes128-gcm@openssh.com,aes256-ctr,aes192-ctr,aes128-ctr
MACs hmac-sha2-256,hmac-sha2-512
KexAlgorithms ecdh-sha2-nistp256,ecdh-sha2-nistp384,ecdh-sha2-nistp521,diffie-hellman-group-exchange-sha256,diffie-hellman-group16-sha512,diffie-hellman-group18-sha512,diffie-hellman-group14-sha256
HostKeyAlgorithms ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-256,rsa-sha2-512
PubkeyAcceptedAlgorithms ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-256,rsa-sha2-512
ClientAliveCountMax 3
ClientAliveInterval 200
MaxStartups 10:30:100
RekeyLimit 1G 1H
Compression no
PrintMotd no
SetEnv SHLVL=2 HOME={share}
Banner {share}/issue
Subsystem sftp /usr/lib/vmware/openssh/bin/sftp-server -f LOCAL5 -l INFO
ForceCommand {share}/enter {root}/var/run/hostd.sock {root}
"""
LOCK_FAILURES = 5


def lacking() -> str:
    """Why there can be no simulated host here; empty when there can."""
    missing = [name for name in (SSHD, "ssh-keygen", "busybox", "gcc", "unshare", "setpriv") if not shutil.which(name)]
    return f"needs {', '.join(missing)}; run: make setup" if missing else ""


@functools.cache
def parts() -> Path:
    """What all hosts have in common, made once: programs, and keys."""
    place = Path(tempfile.mkdtemp(prefix="esxsim-", dir="/var/tmp"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    place.chmod(0o755)
    subprocess.run(["gcc", "-O1", "-static", "-o", place / "tool", HERE / "tool.c"], check=True)
    busybox = shutil.which("busybox")
    assert busybox
    shutil.copy(busybox, place / "busybox")
    (place / "shell").write_bytes(shell_of(Path(busybox).read_bytes()))
    (place / "shell").chmod(0o755)
    for name, kind in (("host", "ecdsa"), ("id", "ecdsa"), ("stranger", "ecdsa"), ("ed25519", "ed25519")):
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", place / name], check=True)
    return place


def shell_of(busybox: bytes) -> bytes:
    """busybox with a shell that finds programs by PATH alone, as ESXi's does.

    Debian's takes its own programs first, so none could be absent or stand for another. Their names are made
    unfindable in its table; the table stays sorted, so `sh` is still found."""
    start = busybox.index(b"\0[\0[[\0") + 1
    end = busybox.index(b"\0\0", start)
    names = busybox[start:end].split(b"\0")
    changed = [name if name in (b"ash", b"sh", b"busybox") else name[:-1] + bytes([name[-1] - 1]) for name in names]
    return busybox[:start] + b"\0".join(changed) + busybox[end:]


class Door:
    """Commands on the host without SSH: through the same door and shell. Quick, for tests that are not about SSH."""

    def __init__(self, sim: EsxSim) -> None:
        if not (sim.share / "enter").exists():
            shutil.copy(parts() / "tool", sim.share / "enter")
        self._argv = [sim.share / "enter", sim.root / "var/run/hostd.sock", sim.root]
        self.count = 0
        #: (`begin` or `end`, number of the command): there the connection is lost, before or after its work
        self.drop: tuple[str, int] | None = None

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Done:
        self.count += 1
        event = self.drop[0] if self.drop and self.drop[1] == self.count else ""
        if event == "begin":
            raise HostUnreachable("dropped before")
        environment = {"SSH_ORIGINAL_COMMAND": shlex.join(argv)}
        done = subprocess.run(
            self._argv, input=stdin, capture_output=True, env=environment, timeout=timeout, check=False
        )
        if event == "end":
            raise HostUnreachable("dropped after")
        return Done(done.returncode, done.stdout, done.stderr)


class EsxSim:
    """One host. Made with a profile's name and its datastores as (name, type)."""

    def __init__(
        self,
        profile: str = "8.0U3",
        stores: Sequence[tuple[str, str]] = (("datastore1", "VMFS-6"),),
        *,
        size: int = 1 << 36,
        sftp: bool | None = None,
    ) -> None:
        self.share = Path(tempfile.mkdtemp(prefix="esx-", dir="/tmp"))
        self.share.chmod(0o755)
        self.root = self.share / "root"
        self.profile = PROFILES[profile]
        _make_root(self.root, tr=self.profile.tr)
        self.hostd = Hostd(self.root, self.profile)
        for name, kind in stores:
            self.add_store(name, kind, size)
        self._sftp = self.profile.sftp if sftp is None else sftp
        self.failures = 0
        self.log: list[str] = []
        self.shells: list[Shell] = []
        self._sshd: subprocess.Popen[bytes] | None = None
        self.port = 0

    # -- content ----------------------------------------------------------------------------------------------------

    def add_store(self, name: str, kind: str = "VMFS-6", size: int = 1 << 36) -> Datastore:
        raw = hashlib.md5(name.encode()).hexdigest()
        store = Datastore(name, f"{raw[:8]}-{raw[8:16]}-{raw[16:20]}-{raw[20:]}", kind, size)
        (self.root / "vmfs/volumes" / store.uuid).mkdir()
        (self.root / "vmfs/volumes" / name).symlink_to(store.uuid)
        self.hostd.datastores.append(store)
        return store

    def add_vm(
        self,
        name: str,
        disks: Sequence[int] = (8 * MIB,),
        *,
        store: str = "datastore1",
        folder: str = "",
        on: bool = False,
        **config: str,
    ) -> Vm:
        """A machine with disks of these sizes at scsi0:0 and on. Keys of `config` have `__` for `.` and `_` for `:`."""
        folder = folder or name
        place = self.hostd.real(f"/vmfs/volumes/{store}") / folder
        place.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^\w.-]", "_", Path(folder).name)
        made = {"config.version": "8", "virtualhw.version": str(self.profile.hardware), "displayname": name}
        raw = hashlib.md5(f"{store}/{folder}".encode()).hexdigest()
        pairs = " ".join(raw[index : index + 2] for index in range(0, 16, 2))
        rest = " ".join(raw[index : index + 2] for index in range(16, 32, 2))
        made |= {"uuid.bios": f"{pairs}-{rest}", "numvcpus": "2", "memsize": "512", "guestos": "centos8-64"}
        made |= {"scsi0.present": "TRUE", "scsi0.virtualdev": "pvscsi"}
        for number, size in enumerate(disks):
            own = stem if not number else f"{stem}_{number}"
            (place / f"{own}-flat.vmdk").touch()
            os.truncate(place / f"{own}-flat.vmdk", size)
            text = formats.descriptor("vmfs", size // 512, f"{own}-flat.vmdk", thin=True)
            (place / f"{own}.vmdk").write_text(text)
            made |= {f"scsi0:{number}.present": "TRUE", f"scsi0:{number}.filename": f"{own}.vmdk"}
        made |= {key.replace("__", ".").replace("_", ":"): value for key, value in config.items()}
        write_vmx(place / f"{stem}.vmx", made)
        with self.hostd.lock:
            vm = self.hostd.register(place / f"{stem}.vmx")
            if on:
                self.hostd.started(vm)
        return vm

    def write(self, vm: Vm, offset: int, data: bytes, device: str = "scsi0:0") -> None:
        """What the guest writes."""
        with self.hostd.lock:
            formats.write(vm.place(vm.disks()[device]), offset, data)

    def read(self, vm: Vm, device: str = "scsi0:0") -> bytes:
        """The disk as the guest sees it."""
        with self.hostd.lock:
            top = vm.place(vm.disks()[device])
            return formats.read([formats.layer(each) for each in formats.chain(top)], 0, formats.sectors(top) * 512)

    def run(self, name: str, *words: str, cwd: str = "/") -> tuple[int, str, str]:
        """One of VMware's programs, run without SSH: exit code, stdout, stderr."""
        call = Call(self.hostd, name, cwd, list(words))
        code = PROGRAMS[name](call)
        return code, *("".join(text for kind, text in call.said if kind == stream) for stream in (1, 2))

    # -- SSH --------------------------------------------------------------------------------------------------------

    def start(self) -> EsxSim:
        place = parts()
        if self._sftp:
            _add_sftp(self.root)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        shutil.copy(place / "tool", self.share / "enter")
        shutil.copy(place / "id.pub", self.share / "authorized_keys")
        with (self.share / "authorized_keys").open("a") as file:
            file.write((place / "ed25519.pub").read_text())
        # One file by two names: what is let in or out in the host's root is so for its sshd.
        keys = self.root / "etc/ssh/keys-root"
        keys.mkdir(parents=True)
        os.link(self.share / "authorized_keys", keys / "authorized_keys")
        (self.share / "issue").write_text("This is a simulated host.\n")
        (self.share / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {(place / 'host.pub').read_text()}")
        config = CONFIG.format(port=self.port, keys=place, share=self.share, root=self.root)
        (self.share / "sshd_config").write_text(config)
        argv = [SSHD, "-D", "-e", "-f", str(self.share / "sshd_config")]
        if os.geteuid() == 0:
            # Private first of all, also where / is no mount point of its own (a chroot).
            inside = (
                "{ mount --make-rprivate / || mount --make-private /run; } 2>/dev/null; "
                'mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec "$@"'
            )
            spaces = ["--mount", "--propagation", "unchanged", "--pid", "--fork", "--kill-child"]
            argv = ["unshare", *spaces, "sh", "-c", inside, "sh", *argv]
        argv = ["setpriv", "--pdeathsig", "KILL", *argv]  # also when a test run is killed
        self._sshd = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        deadline = time.monotonic() + 30
        while not any("listening on" in line for line in self.log):
            if self._sshd.poll() is not None or time.monotonic() > deadline:
                told = self.log[-5:]
                self.close()
                raise RuntimeError(f"sshd did not start: {told}")
            time.sleep(0.01)
        return self

    def _watch(self) -> None:
        """sshd's log. After five failures the account is locked (facts 4.3): nobody may log in."""
        assert self._sshd is not None
        assert self._sshd.stderr is not None
        for line in self._sshd.stderr:
            text = line.decode(errors="replace")
            if "Failed publickey" in text:
                self.failures += 1
                if self.failures >= LOCK_FAILURES:
                    (self.share / "authorized_keys").write_text("")
            self.log.append(text)

    @property
    def logins(self) -> int:
        return sum("Accepted publickey" in line for line in self.log)

    def login(self, identity: str = "id", **changes: object) -> Login:
        user = "root" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        values: dict[str, object] = {"host": "127.0.0.1", "user": user, "port": self.port}
        values |= {"identity": str(parts() / identity), "known_hosts": str(self.share / "known_hosts")}
        return Login(**{**values, **changes})  # type: ignore[arg-type]

    def shell(self, identity: str = "id", **changes: object) -> Shell:
        shell = Shell(self.login(identity, **changes))
        self.shells.append(shell)
        return shell

    def close(self) -> None:
        for shell in self.shells:
            shell.close()
        if self._sshd is not None:
            self._sshd.kill()
            self._sshd.wait()
            self._watcher.join(10)
            assert self._sshd.stderr is not None
            self._sshd.stderr.close()
        self.hostd.settle()
        self.hostd.stop()
        shutil.rmtree(self.share, ignore_errors=True)


def _make_root(root: Path, *, tr: bool) -> None:
    for name in (
        "bin",
        "lib",
        "etc/vmware",
        "tmp",
        "dev",
        "proc",
        "var/run",
        "var/log",
        "vmfs/volumes",
        "vmfs/devices/disks",
    ):
        (root / name).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:Administrator:/:/bin/sh\n")
    (root / "sbin").symlink_to("bin")
    place = parts()
    for source, target in (("busybox", "lib/busybox"), ("shell", "lib/shell"), ("tool", "lib/tool")):
        os.link(place / source, root / target) if _same(place, root) else shutil.copy(place / source, root / target)
    for name in [*APPLETS, *(["tr"] if tr else [])]:
        (root / "bin" / name).symlink_to("/lib/busybox")
    for name in [*LOCKING, *OURS]:
        (root / "bin" / name).symlink_to("/lib/tool")
    (root / "bin/sh").symlink_to("/lib/shell")


def _same(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev


def _add_sftp(root: Path) -> None:
    """This machine's sftp-server and its libraries: what 8.0.2 has (facts 4.3)."""
    program = next(
        (p for p in ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server") if Path(p).exists()), ""
    )
    if not program:
        return
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"(/\S+) \(", listed):
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    place = root / "usr/lib/vmware/openssh/bin"
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(program, place / "sftp-server")
