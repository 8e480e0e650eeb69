"""The operator's end of an installation: the agent on one host, spoken to over SSH. Knows no step."""

from __future__ import annotations

import getpass
import inspect
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from drctl.appliance.install import agent
from drctl.errors import DrctlError, HostUnreachable, IntegrityError, Locked, OutOfSpace, StepFailed
from drctl.hypervisor.shell import Channel, Shell

LOCK = "/run/drctl-install.lock"
#: The longest single operation: pip in a new environment on a slow disk.
OPERATION_SECONDS = 900.0
#: What libc calls ENOSPC; programs say it and exit with a code of their own.
_FULL = "No space left on device"
_CHUNK = 1024 * 1024
_BOOTSTRAP = "import sys; exec(compile(sys.stdin.buffer.read({size}), 'drctl-install', 'exec'))"


class Remote(Protocol):
    """A host that can be changed: `ask` does one operation of the agent there. Raises DrctlError."""

    def ask(self, op: str, **fields: Any) -> Any: ...

    def put(self, path: str, file: Path, sha256: str) -> bool: ...


class AgentSession:
    """One agent, on one channel. Its lock at the host is held until the session ends."""

    def __init__(self, host: str, channel: Channel) -> None:
        self._host = host
        self._channel = channel
        self._lines = channel.makefile("rb")

    def ask(self, op: str, **fields: Any) -> Any:
        """One operation's result. Raises Locked, OutOfSpace, IntegrityError, StepFailed, HostUnreachable."""
        self._send(json.dumps({"op": op, **fields}).encode() + b"\n")
        return self._answer()

    def put(self, path: str, file: Path, sha256: str) -> bool:
        """Send a file, unless it is there already. True when it was sent."""
        if self.ask("have", path=path, sha256=sha256):
            return False
        self._send(
            json.dumps({"op": "put", "path": path, "size": file.stat().st_size, "sha256": sha256}).encode() + b"\n"
        )
        with file.open("rb") as source:
            while data := source.read(_CHUNK):
                self._send(data)
        self._answer()
        return True

    def _send(self, data: bytes) -> None:
        try:
            self._channel.sendall(data)
        except OSError as exc:
            raise self._lost() from exc

    def _answer(self) -> Any:
        try:
            line = self._lines.readline()
        except OSError as exc:
            raise self._lost() from exc
        if not line:
            raise self._lost()
        reply = json.loads(line)
        if "error" in reply:
            raise failure(self._host, str(reply["error"]), str(reply["message"]))
        return reply["result"]

    def _lost(self) -> HostUnreachable:
        told = ""
        if self._channel.recv_stderr_ready():
            told = self._channel.recv_stderr(65536).decode(errors="replace").strip().rpartition("\n")[2]
        return HostUnreachable(
            f"{self._host}: the connection was lost{f' ({told})' if told else ''}",
            hint="give the same command again: it goes on where it was",
            host=self._host,
        )


@contextmanager
def agent_session(host: str, shell: Shell, python: str, sudo: list[str]) -> Iterator[AgentSession]:
    """An agent on the host, holding its lock. Raises Locked when another operator's is at work there."""
    text = inspect.getsource(agent).encode()
    command = [*sudo, python, "-I", "-c", _BOOTSTRAP.format(size=len(text))]
    with shell.channel(command) as channel:
        channel.settimeout(OPERATION_SECONDS)
        session = AgentSession(host, channel)
        session._send(text)
        session.ask("lock", path=LOCK, who=f"{getpass.getuser()} at {platform.node()}")
        yield session


def failure(host: str, kind: str, message: str) -> DrctlError:
    """What an agent's refusal is here."""
    text = f"{host}: {message}"
    if kind == "locked":
        return Locked(text, hint="wait for it to end, then give the command again", host=host)
    if kind == "full":
        return OutOfSpace(text, hint="make room there, then give the same command again", host=host)
    if kind == "damaged":
        return IntegrityError(text, hint="give the same command again", host=host)
    return StepFailed(text, hint="mend it there, then give the same command again: it goes on where it was", host=host)


def run_program(remote: Remote, host: str, argv: Sequence[str], **options: Any) -> str:
    """A program's output, as it ran on the host. Raises StepFailed with its last words, OutOfSpace when they say so."""
    done = remote.ask("run", argv=list(argv), **options)
    if done["code"] == 0:
        return str(done["out"])
    lines = (done["err"].strip() or done["out"].strip() or f"exit code {done['code']}").splitlines()
    name = argv[0].rpartition("/")[2]
    raise failure(host, "full" if _FULL in done["err"] else "failed", f"{name}: {lines[-1]}")
