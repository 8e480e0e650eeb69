"""Health checks: one attempt each, blocking and bounded, and the loop that repeats them until one passes."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Timer
from urllib.parse import urlsplit

from drctl.errors import DrctlError
from drctl.plan.output import tame_line

#: Of an answer's body so much is looked through for a text.
BODY_LIMIT = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Probe:
    """One attempt: whether it passed, and what was seen, in one line."""

    passed: bool
    seen: str


@dataclass(frozen=True, slots=True)
class Checked:
    """All attempts: `seen` at the last one."""

    passed: bool
    seen: str
    attempts: int


def repeat(attempt: Callable[[], Probe], *, retries: int, interval: float, cancelled: Event) -> Checked:
    """Attempt until one passes, at most `retries` times more, `interval` seconds apart."""
    for number in range(1, retries + 2):
        probe = attempt()
        if probe.passed:
            return Checked(True, probe.seen, number)
        if cancelled.is_set() or (number <= retries and cancelled.wait(interval)):
            return Checked(False, f"given up; {probe.seen}", number)
    return Checked(False, probe.seen, retries + 1)


def probe_tcp(host: str, port: int, timeout: float) -> Probe:
    """Whether a connection is taken."""
    try:
        with socket.create_connection((host, port), timeout):
            return Probe(True, f"{host}:{port} takes connections")
    except OSError as exc:
        return Probe(False, f"{host}:{port}: {_reason(exc)}")


def probe_http(url: str, *, status: int, text: str, insecure: bool, timeout: float) -> Probe:
    """Whether a GET is answered with `status`, and `text` is in the body. Redirects are answers, not followed.

    `timeout` is that of the whole attempt, also when the answer comes byte by byte."""
    parts = urlsplit(url)
    context = ssl._create_unverified_context() if insecure else ssl.create_default_context()
    host, port = parts.hostname or "", parts.port
    connection = (
        http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
        if parts.scheme == "https"
        else http.client.HTTPConnection(host, port, timeout=timeout)
    )
    late = Event()
    timer: Timer | None = None
    try:
        connection.connect()
        # http.client forgets its socket once the answer's head is there, so the timer has it.
        timer = Timer(timeout, _hang_up, (connection.sock, late))
        timer.daemon = True
        timer.start()
        probe = _get(connection, f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}", status, text)
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as exc:
        probe = Probe(False, tame_line(_reason(exc)))
    finally:
        if timer is not None:
            timer.cancel()
        connection.close()
    return Probe(False, "no answer in time") if late.is_set() and not probe.passed else probe


def _hang_up(taken: socket.socket, late: Event) -> None:
    """End a connection from another thread: a read in it returns at once."""
    late.set()
    with suppress(OSError):
        socket.socket.shutdown(taken, socket.SHUT_RDWR)


def _get(connection: http.client.HTTPConnection, path: str, status: int, text: str) -> Probe:
    connection.request("GET", path, headers={"User-Agent": "drctl", "Connection": "close"})
    answer = connection.getresponse()
    if answer.status != status:
        return Probe(False, tame_line(f"answers {answer.status} {answer.reason}, not {status}"))
    if text and text.encode() not in answer.read(BODY_LIMIT):
        return Probe(False, f"answers {status}, but without {text!r}")
    return Probe(True, f"answers {status}")


def probe_console(read: Callable[[], str], text: str) -> Probe:
    """Whether the text stands in what a machine's console has said so far."""
    try:
        said = read()
    except DrctlError as exc:
        return Probe(False, exc.message)
    if text in said:
        return Probe(True, f"the console says {text!r}")
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    return Probe(False, f"no {text!r} yet; its last line: {tame_line(last) or 'nothing'}")


def probe_agent(ping: Callable[[], object]) -> Probe:
    """Whether the guest's agent answers."""
    try:
        ping()
    except DrctlError as exc:
        return Probe(False, exc.message)
    return Probe(True, "the guest agent answers")


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
