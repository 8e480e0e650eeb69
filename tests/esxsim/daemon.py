"""The daemon behind a simulated host's programs: takes their calls from a unix socket, keeps the door of SSH."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

from tests.esxsim import esxcli, vimcmd, vmkfstools
from tests.esxsim.call import Call
from tests.esxsim.guest import Guest
from tests.esxsim.state import Profile, State, Vm

WRITES = {"mv", "rm"}
PROGRAMS: dict[str, Callable[[Call], int]] = {
    "vim-cmd": vimcmd.run,
    "esxcli": esxcli.run,
    "vmkfstools": vmkfstools.run,
}


class Hostd(State):
    """Serves one host. Each call has a thread, as each program has a process."""

    def __init__(self, root: Path, profile: Profile) -> None:
        super().__init__(root, profile)
        #: what came through SSH, in order
        self.commands: list[str] = []
        #: every program that ran, as (name, words)
        self.ran: list[list[str]] = []
        #: event of the door (`begin`, `end`) and how many more of it until the connection is dropped at it
        self.drop: tuple[str, int] | None = None
        #: as above for the programs: the connection drops when this one has just ended, its work done
        self.drop_program = 0
        #: seconds that every program takes at least, by its name
        self.delays: dict[str, float] = {}
        self.cloning: set[Path] = set()
        self.networks = {"VM Network": 0}
        #: machines that are powered on run under QEMU
        self.boots = False
        self.guests: dict[int, Guest] = {}
        self._world = 2557000
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(root / "var/run/hostd.sock"))
        os.chmod(root / "var/run/hostd.sock", 0o777)
        self._socket.listen(64)
        threading.Thread(target=self._serve, daemon=True).start()

    def stop(self) -> None:
        for guest in self.guests.values():
            guest.stop()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def started(self, vm: Vm) -> None:
        self._world += 7
        vm.power, vm.world = "on", self._world
        vm.vmx.with_suffix(".vswp").write_bytes(b"")
        if self.boots:
            self.guests[vm.id] = Guest(vm)

    def stopped(self, vm: Vm) -> None:
        vm.vmx.with_suffix(".vswp").unlink(missing_ok=True)
        if guest := self.guests.pop(vm.id, None):
            guest.stop()

    def create_snapshot(self, vm: Vm, name: str, description: str, memory: bool) -> None:
        if guest := self.guests.get(vm.id):
            guest.freeze()
        super().create_snapshot(vm, name, description, memory)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            length = struct.unpack("=I", _exactly(connection, 4))[0]
            words = _exactly(connection, length).decode("utf-8", "surrogateescape").split("\0")[:-1]
            call = Call(self, words[0], words[1], words[2:], connection)
            call.end(self._run(call, _peer(connection)))

    def _run(self, call: Call, pid: int) -> int:
        if call.name in ("begin", "end"):
            return self._door(call, pid)
        if call.name == "may":
            return self._may(call)
        self.ran.append([call.name, *call.words])
        if seconds := self.delays.get(call.name):
            threading.Event().wait(seconds)
        if call.name == "vmware":
            own = self.profile
            call.out(f"VMware ESXi {own.version} build-{own.build}\n")
            return 0
        code = PROGRAMS[call.name](call)
        if self.drop_program:
            self.drop_program -= 1
            if not self.drop_program:
                _kill_session(pid)
        return code

    def _door(self, call: Call, pid: int) -> int:
        if call.name == "begin":
            self.commands.append(call.words[0])
        if self.drop and self.drop[0] == call.name:
            self.drop = (call.name, self.drop[1] - 1)
            if self.drop[1] < 0:
                self.drop = None
                _kill_session(pid)
                return 1
        return 0

    def _may(self, call: Call) -> int:
        """Whether busybox's program may touch its files: VMFS refuses what another holds (facts 2, locking)."""
        program, *words = call.words
        program = Path(program).name
        paths = [word.partition("=")[2] if program == "dd" else word for word in words]
        for word, path in zip(words, paths, strict=True):
            if not path or (path.startswith("-") and program != "dd"):
                continue
            writes = program in WRITES or word.startswith("of=") or (program == "cp" and word == words[-1])
            if self._refuses(self.real(path, call.cwd), writes):
                what = "can't remove" if program == "rm" else "can't open"
                call.err(f"{program}: {what} '{path}': {os.strerror(errno.EBUSY)}\n")
                return 1
        return 0

    def _refuses(self, path: Path, writes: bool) -> bool:
        with self.lock:
            state = self.locked(path)
        if state == "shared" and not writes:
            flat = path.name.endswith("-flat.vmdk")
            allowed = self.switches.raw_read_of_frozen_base if flat else self.switches.raw_read_of_frozen_delta
            return not allowed
        if writes and path.is_relative_to(self.root.resolve() / "vmfs/volumes"):
            return bool(state) or self.datastore_of(path).read_only
        return bool(state)


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise ConnectionResetError
        data += part
    return data


def _peer(connection: socket.socket) -> int:
    size = struct.calcsize("3i")
    return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0])


def _kill_session(pid: int) -> None:
    """End the sshd process that a program came through: the connection is lost, the program lives on."""
    while pid > 1:
        stat = Path(f"/proc/{pid}/stat").read_text()
        name, _, rest = stat.partition("(")[2].rpartition(")")
        if name.startswith("sshd"):
            os.kill(pid, signal.SIGKILL)
            return
        pid = int(rest.split()[1])
