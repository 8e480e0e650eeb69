"""Commands on another machine by SSH: the only module that knows paramiko. Knows no hypervisor.

A host's key is checked strictly: what known_hosts does not have is refused, nothing is ever learned. `~/.ssh/config` is
not read. A lost connection means that the outcome is unknown: look again, never begin again blindly."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import pwd
import shlex
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import paramiko

from drctl.errors import HostKeyRejected, HostUnreachable, LoginRefused, PrivilegeMissing
from drctl.model.site import Login

#: paramiko tells each failure also in its own log; ours tells it once.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False

#: A running command's stdin, stdout and stderr, for whoever wants a stream.
Channel = paramiko.Channel
CONNECT_SECONDS = 10.0
#: For banner, key exchange and login: a busy host is slow, not away.
HANDSHAKE_SECONDS = 20.0
KEEPALIVE_SECONDS = 15
#: OpenSSH allows ten channels a connection (MaxSessions); two are left to others who share it.
CHANNELS = 8
#: Between attempts to have one more channel, in seconds.
SESSION_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
_CHUNK = 65536
_FED = 256 * 1024
_SYSTEM_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended. `code` is -1 when a signal ended it."""

    code: int
    out: bytes
    err: bytes

    @property
    def told(self) -> str:
        """The last line that it said on stderr, or on stdout."""
        lines = (self.err or self.out).decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self.code}"


class Shell:
    """One host by SSH: one connection, made when first needed and kept; each command is a channel of it.

    Any thread may run commands. Raises HostUnreachable, HostKeyRejected, LoginRefused."""

    def __init__(self, login: Login) -> None:
        self.login = login
        self._client: paramiko.SSHClient | None = None
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(CHANNELS)

    @contextmanager
    def channel(self, argv: Sequence[str], *, timeout: float | None = None) -> Iterator[Channel]:
        """A command that was started; its stdin and stdout are the channel. `timeout` is for the connection."""
        with self._free:
            channel = self._open(shlex.join(argv), timeout)
            try:
                yield channel
            finally:
                channel.close()

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float = 60.0) -> Done:
        """Run one command to its end. Raises HostUnreachable when it does not end in time, or the connection does."""
        with self.channel(argv) as channel:
            channel.settimeout(timeout)
            try:
                return _finish(channel, stdin)
            except (OSError, paramiko.SSHException) as exc:
                raise self._lost(exc) from exc

    def host_key(self) -> tuple[str, str]:
        """The kind and the base64 of the key that the host has proven to have; it is in known_hosts."""
        key = self._connected(None).get_remote_server_key()
        return key.get_name(), key.get_base64()

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _open(self, command: str, timeout: float | None) -> paramiko.Channel:
        transport = self._connected(timeout)
        try:
            channel = _session(transport)
            channel.exec_command(command)
        except (OSError, EOFError, paramiko.SSHException) as exc:
            raise self._lost(exc) from exc
        return channel

    def _lost(self, exc: BaseException) -> HostUnreachable:
        slow = isinstance(exc, TimeoutError)
        what = "did not answer in time" if slow else f"the connection was lost ({exc or type(exc).__name__})"
        return HostUnreachable(
            f"{self.login}: {what}", hint="whether the command was carried out is not known: look", host=self.login.host
        )

    def _connected(self, timeout: float | None) -> paramiko.Transport:
        with self._lock:
            transport = self._client.get_transport() if self._client else None
            if transport is None or not transport.is_active():
                self._client = _connect(self.login, timeout or CONNECT_SECONDS)
                transport = self._client.get_transport()
                assert transport is not None
                transport.set_keepalive(KEEPALIVE_SECONDS)
            return transport


def need_root(shell: Shell) -> list[str]:
    """What has to stand in front of a command so that root runs it: nothing, or `sudo -n --`.

    Raises PrivilegeMissing when the login can't become root without being asked."""
    if shell.run(["id", "-u"]).out.strip() == b"0":
        return []
    done = shell.run(["sudo", "-n", "--", "id", "-u"])
    if done.out.strip() == b"0":
        return ["sudo", "-n", "--"]
    raise PrivilegeMissing(
        f"{shell.login}: this login may not become root: {done.told}",
        hint=f'log in as root (ssh = "root@{shell.login.host}"), or let it use sudo without a password',
        host=shell.login.host,
    )


def _session(transport: paramiko.Transport) -> paramiko.Channel:
    """A new channel; no command runs in it yet. One that we closed may still count there while its process ends."""
    for pause in SESSION_PAUSES:
        try:
            return transport.open_session(timeout=HANDSHAKE_SECONDS)
        except paramiko.SSHException as exc:
            if not _is_refusal(exc):
                raise
            time.sleep(pause)
    return transport.open_session(timeout=HANDSHAKE_SECONDS)


def _is_refusal(exc: paramiko.SSHException) -> bool:
    """Whether the host would have no more channels. Of two refusals at once paramiko 5 tells one thread so, and the
    other, whose exception the first has taken (Transport.get_exception), only that there is none."""
    return isinstance(exc, paramiko.ChannelException) or str(exc) == "Unable to open channel."


def _finish(channel: paramiko.Channel, stdin: bytes) -> Done:
    """Feed a command and collect what it says; all three at once, so that none waits for another."""
    feeder = threading.Thread(target=_feed, args=(channel, stdin), daemon=True)
    feeder.start()
    errors: list[bytes] = []
    reader = threading.Thread(target=_collect, args=(channel, errors), daemon=True)
    reader.start()
    out = bytearray()
    while data := channel.recv(_CHUNK):
        out += data
    code = channel.recv_exit_status()
    reader.join(HANDSHAKE_SECONDS)
    return Done(code, bytes(out), b"".join(errors))


def _feed(channel: paramiko.Channel, data: bytes) -> None:
    try:
        for at in range(0, len(data), _FED):  # paramiko copies all that is left for each packet that it sends
            channel.sendall(data[at : at + _FED])
        channel.shutdown_write()
    except (OSError, EOFError, paramiko.SSHException):
        return  # it ended without reading all, or the connection did (paramiko: EOFError): its exit code tells more


def _collect(channel: paramiko.Channel, into: list[bytes]) -> None:
    try:
        while data := channel.recv_stderr(_CHUNK):
            into.append(data)
    except OSError:
        return  # the reader of stdout raises the same


def _connect(login: Login, timeout: float) -> paramiko.SSHClient:
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(_Refuse(login, _load_known_hosts(client, login)))
    place = f"{login.host} port {login.port}"
    try:
        sock = socket.create_connection((login.host, login.port), timeout=timeout)
    except OSError as exc:
        hint = "is it up, and does its firewall let SSH through?"
        raise HostUnreachable(f"{place}: {exc.strerror or exc}", hint=hint, host=login.host) from exc
    try:
        _log_in(client, login, sock)
    except BaseException:
        client.close()
        sock.close()
        raise
    return client


def _log_in(client: paramiko.SSHClient, login: Login, sock: socket.socket) -> None:
    try:
        client.connect(
            login.host,
            login.port,
            login.user or pwd.getpwuid(os.getuid()).pw_name,
            sock=sock,
            key_filename=login.identity or None,
            allow_agent=not login.identity,
            look_for_keys=not login.identity,
            timeout=HANDSHAKE_SECONDS,
            banner_timeout=HANDSHAKE_SECONDS,
            auth_timeout=HANDSHAKE_SECONDS,
        )
    except paramiko.BadHostKeyException as exc:
        raise HostKeyRejected(
            f"{login.host}: its SSH key is not the one in known_hosts: got {_fingerprint(exc.key)}, "
            f"known is {_fingerprint(exc.expected_key)}",
            hint=f"somebody may be in between; if the host has new keys: ssh-keygen -R {_known_name(login)}",
            host=login.host,
        ) from exc
    except (paramiko.AuthenticationException, paramiko.PasswordRequiredException, FileNotFoundError) as exc:
        raise _refused(login, exc) from exc
    except (OSError, EOFError, paramiko.SSHException) as exc:
        if _is_waiting_for_login(client):
            raise _refused(login, "the key is not accepted there, or is none") from exc
        raise HostUnreachable(f"{login.host} port {login.port}: no SSH session: {exc}", host=login.host) from exc


def _refused(login: Login, reason: object) -> LoginRefused:
    hint = f"offered: {login.identity or 'the keys of ssh-agent and ~/.ssh'}; a passphrase needs the agent"
    return LoginRefused(f"{login}: the login was refused: {reason}", hint=hint, host=login.host)


def _is_waiting_for_login(client: paramiko.SSHClient) -> bool:
    """Whether the session stands and only its login failed.

    paramiko tries a key file as each kind of key: after a refused ECDSA key it tells that it is no Ed25519 key."""
    transport = client.get_transport()
    return transport is not None and transport.is_active() and not transport.is_authenticated()


def _load_known_hosts(client: paramiko.SSHClient, login: Login) -> set[str]:
    """Let the client know the keys of known_hosts but those (base64) that are `@revoked` there, which it returns."""
    files = [Path(login.known_hosts)] if login.known_hosts else [Path.home() / ".ssh/known_hosts", _SYSTEM_KNOWN_HOSTS]
    revoked: set[str] = set()
    for file in files:
        if not file.is_file():
            continue
        lines = [" ".join(line.split()) for line in file.read_text("utf-8", "replace").splitlines()]
        marked = [line.split() for line in lines if line.startswith("@revoked ")]
        revoked |= {words[3] for words in marked if len(words) > 3}
        for name, key in _known_keys(lines):
            if key.get_base64() not in revoked:
                client.get_host_keys().add(name, key.get_name(), key)
    return revoked


def _known_keys(lines: Sequence[str]) -> Iterator[tuple[str, paramiko.PKey]]:
    """The (name, key) pairs of known_hosts. Marked lines are left out, and such as can't be read: they know nobody."""
    for number, line in enumerate(lines, 1):
        if not line or line[0] in "#@":
            continue
        with suppress(paramiko.hostkeys.InvalidHostKey, paramiko.SSHException):
            entry = paramiko.hostkeys.HostKeyEntry.from_line(line, number)
            if entry is not None and entry.key is not None:
                yield from ((name, entry.key) for name in entry.hostnames or ())


class _Refuse(paramiko.MissingHostKeyPolicy):
    """What known_hosts does not have is refused."""

    def __init__(self, login: Login, revoked: set[str]) -> None:
        self._login = login
        self._revoked = revoked

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        del client, hostname
        login = self._login
        user = f"{login.user}@" if login.user else ""
        if key.get_base64() in self._revoked:
            raise HostKeyRejected(f"{login.host}: its SSH key is marked @revoked in known_hosts", host=login.host)
        raise HostKeyRejected(
            f"{login.host}: its SSH key is not in known_hosts: {_fingerprint(key)}",
            hint=f"compare it with the host's own, then: ssh -p {login.port} {user}{login.host} true",
            host=login.host,
        )


def _known_name(login: Login) -> str:
    return login.host if login.port == 22 else f"'[{login.host}]:{login.port}'"


def _fingerprint(key: paramiko.PKey) -> str:
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")
    return f"{key.get_name()} SHA256:{digest}"
