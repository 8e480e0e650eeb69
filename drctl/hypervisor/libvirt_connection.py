"""A libvirt connection that comes back: event loop, reconnection, and the one translation of libvirt's errors.

Beside `libvirt.py` the only module that imports libvirt.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import libvirt

from drctl.errors import HostUnreachable, HypervisorRefused, NotFound

log = logging.getLogger(__name__)

#: (machine, event); the machine is empty for events of the host itself.
Callback = Callable[[str, str], None]

HOST_LOST: Final = "host-lost"
HOST_BACK: Final = "host-back"

#: Seconds between two attempts to connect again.
_RECONNECT_SECONDS: Final = 1.0
#: A libvirtd that answers nothing for 5 × 3 s is taken for lost.
_KEEPALIVE: Final = (5, 3)

_LIFECYCLE: Final = {
    libvirt.VIR_DOMAIN_EVENT_DEFINED: "defined",
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: "undefined",
    libvirt.VIR_DOMAIN_EVENT_STARTED: "started",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "suspended",
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: "shutdown",
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: "pm-suspended",
    libvirt.VIR_DOMAIN_EVENT_CRASHED: "crashed",
}
_STOPPED: Final = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED: "migrated",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: "crashed",
}
#: Told before `stopped`, so that whoever hears that knows already.
_ENDED_BY: Final = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: "destroyed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED: "saved",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: "failed",
}
_BLOCK_JOB: Final = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_COMPLETED: "completed",
    libvirt.VIR_DOMAIN_BLOCK_JOB_FAILED: "failed",
    libvirt.VIR_DOMAIN_BLOCK_JOB_CANCELED: "canceled",
    libvirt.VIR_DOMAIN_BLOCK_JOB_READY: "ready",
}
_UNREACHABLE: Final = {
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_INVALID_CONN,
    libvirt.VIR_ERR_RPC,
    libvirt.VIR_ERR_AUTH_FAILED,
    libvirt.VIR_ERR_AUTH_CANCELLED,
    libvirt.VIR_ERR_AUTH_UNAVAILABLE,
}
_TRANSPORT: Final = {libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE}

_loop_lock = threading.Lock()
_loop: threading.Thread | None = None


def start_event_loop() -> None:
    """Start libvirt's event loop in a thread of its own, once per process. Must come before the first connection."""
    global _loop  # libvirt's event loop is global, too
    with _loop_lock:
        if _loop is None:
            # Without it libvirt prints every error on stderr, beside the one we raise.
            libvirt.registerErrorHandler(lambda *_: None, None)
            libvirt.virEventRegisterDefaultImpl()
            _loop = threading.Thread(target=_run_event_loop, name="libvirt-events", daemon=True)
            _loop.start()


def _run_event_loop() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as exc:
            log.warning("libvirt's event loop: %s", exc)


class Connection:
    """One libvirt connection. Any thread may use it. While it is lost every use raises HostUnreachable at once."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._callbacks: list[Callback] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._lost = threading.Event()
        self._connection: libvirt.virConnect | None = None
        start_event_loop()
        with self.translated():
            self._open()
        self._keeper = threading.Thread(target=self._keep, name=f"libvirt {uri}", daemon=True)
        self._keeper.start()

    def get(self) -> libvirt.virConnect:
        """The live connection. Raises HostUnreachable."""
        connection = self._connection
        if connection is None or self._lost.is_set() or self._closed.is_set():
            raise self._unreachable("connection lost")
        return connection

    @contextmanager
    def translated(self, machine: str = "", *, network: str = "") -> Iterator[None]:
        """Turn libvirt's errors into drctl's, about a machine or a network."""
        try:
            yield
        except libvirt.libvirtError as exc:
            if network and exc.get_error_code() == libvirt.VIR_ERR_NO_NETWORK:
                raise NotFound("network", network) from exc
            raise self._translate(exc, machine or network) from exc

    def watch(self, callback: Callback) -> None:
        """Call back for each event. From libvirt's thread: the callback must hand over, and call nothing of libvirt."""
        with self._lock:
            self._callbacks.append(callback)

    def close(self) -> None:
        self._closed.set()
        self._lost.set()  # wakes the keeper
        self._drop()

    def _translate(self, exc: libvirt.libvirtError, machine: str) -> HostUnreachable | NotFound | HypervisorRefused:
        code = exc.get_error_code()
        message = exc.get_error_message() or str(exc)
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return NotFound("machine", machine)
        transport = code == libvirt.VIR_ERR_SYSTEM_ERROR and exc.get_error_domain() in _TRANSPORT
        if code in _UNREACHABLE or transport or not self._alive():
            return self._unreachable(message)
        subject = f"{machine}: " if machine else ""
        return HypervisorRefused(f"{subject}libvirt refused: {message}", machine=machine, code=code)

    def _unreachable(self, why: str) -> HostUnreachable:
        return HostUnreachable(
            f"libvirt at {self.uri} can't be reached: {why}",
            hint="is libvirtd running, and may this user use it?",
            uri=self.uri,
        )

    def _alive(self) -> bool:
        connection = self._connection
        try:
            return connection is not None and not self._lost.is_set() and connection.isAlive() == 1
        except libvirt.libvirtError:
            return False

    def _open(self) -> None:
        connection = libvirt.open(self.uri)
        with suppress(libvirt.libvirtError):  # local drivers have no keepalive, no close callback
            connection.setKeepAlive(*_KEEPALIVE)
        with suppress(libvirt.libvirtError):
            connection.registerCloseCallback(self._on_close, None)
        self._subscribe(connection)
        self._connection = connection

    def _on_close(self, _connection: libvirt.virConnect, _reason: int, _opaque: object) -> None:
        self._lost.set()

    def _keep(self) -> None:
        """Wait for the loss, then try until it is back."""
        while not self._closed.is_set():
            self._lost.wait()
            if self._closed.is_set():
                return
            self._tell("", HOST_LOST)
            self._drop()
            while not self._closed.wait(_RECONNECT_SECONDS):
                self._lost.clear()
                try:
                    self._open()
                except libvirt.libvirtError as exc:
                    self._lost.set()
                    log.debug("%s: %s", self.uri, exc)
                    continue
                self._tell("", HOST_BACK)
                break

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(libvirt.libvirtError):
                connection.unregisterCloseCallback()
            with suppress(libvirt.libvirtError):
                connection.close()

    def _tell(self, machine: str, event: str) -> None:
        with self._lock:
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback(machine, event)

    def _subscribe(self, connection: libvirt.virConnect) -> None:
        handlers: dict[int, Callable[..., None]] = {
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE: self._on_lifecycle,
            libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2: self._on_block_job,
            libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE: self._on_agent,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED: self._on_device("device-added"),
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED: self._on_device("device-removed"),
            libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON: self._on_io_error,
            libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED: self._on_job,
        }
        for event, handler in handlers.items():
            try:
                connection.domainEventRegisterAny(None, event, handler, None)
            except libvirt.libvirtError as exc:
                if exc.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                    raise

    def _on_lifecycle(self, _c: Any, domain: libvirt.virDomain, event: int, detail: int, _o: Any) -> None:
        word = _LIFECYCLE.get(event, f"lifecycle-{event}")
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            word = _STOPPED.get(detail, word)
            if how := _ENDED_BY.get(detail):
                self._tell(domain.name(), how)
        self._tell(domain.name(), word)

    def _on_block_job(self, _c: Any, domain: libvirt.virDomain, disk: str, _kind: int, status: int, _o: Any) -> None:
        self._tell(domain.name(), f"block-job:{disk}:{_BLOCK_JOB.get(status, status)}")

    def _on_agent(self, _c: Any, domain: libvirt.virDomain, state: int, _reason: int, _o: Any) -> None:
        self._tell(domain.name(), "agent:connected" if state == 1 else "agent:disconnected")

    def _on_device(self, word: str) -> Callable[..., None]:
        return lambda _c, domain, alias, _o: self._tell(domain.name(), f"{word}:{alias}")

    def _on_io_error(self, _c: Any, domain: libvirt.virDomain, *rest: Any) -> None:
        _path, alias, _action, reason, _opaque = rest
        self._tell(domain.name(), f"io-error:{alias}:{reason}")

    def _on_job(self, _c: Any, domain: libvirt.virDomain, _params: Any, _o: Any) -> None:
        self._tell(domain.name(), "job-completed")
