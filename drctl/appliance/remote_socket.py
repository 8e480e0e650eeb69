"""An appliance's control socket on another host, as a stream over SSH. Knows no method's meaning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from drctl.appliance.client import Stream
from drctl.appliance.connect import EX_NOPERM
from drctl.errors import ApplianceUnreachable, DrctlError, PrivilegeMissing
from drctl.hypervisor.shell import Channel, Shell

#: What a shell says about a program that is not there, and about one that may not be run.
_NOT_FOUND = 127
_NOT_EXECUTABLE = 126
_WAIT_SECONDS = 5.0


class RemoteSocket:
    """Opens streams to one control socket. `prefix` is where drctl is installed on that host."""

    def __init__(self, shell: Shell, path: str, prefix: str) -> None:
        self._shell = shell
        self._path = path
        self._command = [f"{prefix}/current/bin/python", "-I", "-m", "drctl.appliance.connect", path]
        self.address = f"ssh:{shell.login}:{path}"

    @contextmanager
    def open(self, timeout: float) -> Iterator[Stream]:
        """A stream to the socket. Raises the Shell's errors; what is wrong beyond SSH is told when the stream ends."""
        with self._shell.channel(self._command, timeout=timeout) as channel:
            channel.settimeout(timeout)
            yield _RemoteStream(self, channel)

    def failure(self, code: int, told: str) -> DrctlError:
        """What a stream that ended without an answer was about."""
        login = self._shell.login
        if code == EX_NOPERM or told.startswith("sudo:"):
            return PrivilegeMissing(
                f"{login}: the appliance's socket is not open to this login: {told}",
                hint="log in as root, or let it use sudo without a password",
                host=login.host,
            )
        if code in (_NOT_FOUND, _NOT_EXECUTABLE):
            return ApplianceUnreachable(
                f"{login}: no appliance is installed there ({told})",
                hint="drctl appliance install HOST; another place: prefix in drctl.toml",
                address=self.address,
            )
        hint = "is it running? systemctl status drctl-appliance there"
        return ApplianceUnreachable(
            f"{login}: {told or 'the appliance hung up without an answer'}", hint=hint, address=self.address
        )


class _RemoteStream:
    """A channel as the client wants its stream."""

    def __init__(self, socket: RemoteSocket, channel: Channel) -> None:
        self._socket = socket
        self._channel = channel
        self._reader = channel.makefile("rb")

    def sendall(self, data: bytes) -> None:
        try:
            self._channel.sendall(data)
        except OSError:
            return  # the command ended; why is told by its end

    def readline(self, limit: int) -> bytes:
        line: bytes = self._reader.readline(limit)
        return line

    def ended(self) -> DrctlError:
        channel = self._channel
        channel.settimeout(_WAIT_SECONDS)
        told = bytearray()
        while data := channel.recv_stderr(4096):
            told += data
        lines = told.decode(errors="replace").strip().splitlines()
        return self._socket.failure(channel.recv_exit_status(), lines[-1] if lines else "")
