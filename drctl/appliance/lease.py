"""Leases: one changing operation of a group at a time, whoever orders it and wherever. Kept in the recovery store.

`store/GROUP/lease.json` names holder, verb, expiry and generation. A command line that works at both sites takes a
lease first and renews it; a method that changes the store takes one for as long as it runs. What is not renewed ends by
itself: an operator whose laptop died blocks nobody for longer than that."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from drctl.appliance.control import Handler, Progress
from drctl.appliance.process import start_time_of
from drctl.errors import DrctlError, Locked, NotFound
from drctl.model.duration import format_duration
from drctl.store.group_info import read_info

#: A lease that is not renewed ends after this; its holder renews it each third of it.
LEASE_SECONDS = 30.0
LONGEST_SECONDS = 600.0
FILE = "lease.json"
#: Methods that change a group at its recovery site; each runs under a lease.
LEASED = (
    "failover.run",
    "switchover.run",
    "rollback",
    "commit",
    "group.remove",
)

log = logging.getLogger(__name__)


class Lease(msgspec.Struct, frozen=True):
    """`token` is the holder's secret; `process` names the appliance whose method holds it, where one does.

    Times are wall seconds of the recovery site."""

    group: str
    holder: str
    verb: str
    generation: int
    taken: float
    expires: float
    token: str
    process: str = ""

    def stands(self, now: float, process: str) -> bool:
        """Whether it still binds others. One held by an appliance's method ended with that appliance; one from the
        future was written before the clock was set back, and its expiry means nothing."""
        if self.process and self.process != process:
            return False
        return self.taken <= now + 1.0 and now < self.expires

    def told(self) -> dict[str, Any]:
        """For anybody: without the token."""
        whole = msgspec.to_builtins(self)
        return {key: whole[key] for key in ("group", "holder", "verb", "generation", "taken", "expires")}


class Leases:
    """The leases of one appliance's stores. Methods may be called from any thread."""

    def __init__(
        self,
        store: Path,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._store = store
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._process = f"{os.getpid()}:{start_time_of(os.getpid())}"

    # -- control methods --------------------------------------------------------------------------------------------

    def take(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group, verb, holder, seconds} → the lease, with its token. Raises Locked, NotFound."""
        del progress
        lease = self._take(str(params["group"]), str(params.get("holder") or params.get("by") or "somebody"), params)
        return lease.told() | {"token": lease.token}

    def renew(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group, token, seconds} → the lease. Raises Locked when it was lost: the holder must stop."""
        del progress
        group = str(params["group"])
        with self._lock:
            lease = self._load(group)
            if lease is None or lease.token != params.get("token"):
                raise Locked(
                    f"the lease on {group} is lost" + (f": {_who(lease, self._clock())}" if lease else ""),
                    hint=f"see: drctl history {group}",
                    group=group,
                )
            renewed = msgspec.structs.replace(lease, expires=self._clock() + _seconds(params))
            self._save(renewed)
            return renewed.told()

    def release(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group, token} → {group, released}; one that was lost is no error."""
        del progress
        group = str(params["group"])
        return {"group": group, "released": self._release(group, str(params.get("token") or ""))}

    def show(self, params: dict[str, Any], progress: Progress) -> dict[str, Any] | None:
        """{group} → the lease that stands, or null."""
        del progress
        lease = self._load(str(params["group"]))
        return lease.told() if lease and lease.stands(self._clock(), self._process) else None

    def watch(self, handlers: dict[str, Handler]) -> dict[str, Handler]:
        """The handlers, changing ones under a lease, and the methods above."""
        watched = {name: self._leased(name, one) if name in LEASED else one for name, one in handlers.items()}
        own: dict[str, Handler] = {
            "lease.take": self.take,
            "lease.renew": self.renew,
            "lease.release": self.release,
            "lease.show": self.show,
        }
        return watched | own

    # -- inside -----------------------------------------------------------------------------------------------------

    def _leased(self, method: str, handler: Handler) -> Handler:
        def call(params: dict[str, Any], progress: Progress) -> Any:
            group = str(params.get("group") or "")
            if not (self._store / group / "group.json").exists() or not group:
                return handler(params, progress)  # it says itself what is wrong, or is about the source side
            with self._held(group, method, params):
                return handler(params, progress)

        return call

    @contextmanager
    def _held(self, group: str, method: str, params: dict[str, Any]) -> Iterator[None]:
        """Under the caller's own lease, or under one for as long as this lasts."""
        if token := str(params.get("lease") or ""):
            lease = self._load(group)
            if lease is not None and lease.token == token and lease.stands(self._clock(), self._process):
                yield
                return
        order = {"verb": method.removesuffix(".run"), "process": self._process}
        lease = self._take(group, str(params.get("by") or "somebody"), order)
        ended = threading.Event()
        renewer = threading.Thread(target=self._renew, args=(lease, ended), name=f"lease-{group}", daemon=True)
        renewer.start()
        try:
            yield
        finally:
            ended.set()
            self._release(group, lease.token)

    def _renew(self, lease: Lease, ended: threading.Event) -> None:
        while not self._sleep(ended, LEASE_SECONDS / 3):
            with suppress(DrctlError):
                self.renew({"group": lease.group, "token": lease.token}, lambda _: None)

    def _take(self, group: str, holder: str, params: dict[str, Any]) -> Lease:
        root = self._store / group
        if not group or "/" in group or not (root / "group.json").exists():
            raise NotFound("group", group, hint="no store of that group is here")
        with self._lock:
            now = self._clock()
            before = self._load(group)
            if before is not None and before.stands(now, self._process):
                raise Locked(
                    f"{group} is being worked on: {_who(before, now)}",
                    hint="wait for it; what is not renewed ends by itself at that time",
                    **before.told(),
                )
            if before is not None:
                log.warning("%s: the lease of %s (%s) ended unreleased; taken over", group, before.holder, before.verb)
            lease = Lease(
                group,
                holder,
                str(params.get("verb") or "change"),
                read_info(root).generation,
                now,
                now + _seconds(params),
                secrets.token_hex(16),
                str(params.get("process") or ""),
            )
            self._save(lease)
            return lease

    def _release(self, group: str, token: str) -> bool:
        with self._lock:
            lease = self._load(group)
            if lease is None or lease.token != token:
                return False
            (self._store / group / FILE).unlink(missing_ok=True)
            return True

    def _load(self, group: str) -> Lease | None:
        """A file that can't be read binds nobody: it would bind for ever."""
        try:
            return msgspec.json.decode((self._store / group / FILE).read_bytes(), type=Lease)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError, ValueError) as exc:
            log.warning("%s: its lease can't be read: %s", group, exc)
            return None

    def _save(self, lease: Lease) -> None:
        path = self._store / lease.group / FILE
        fresh = path.with_suffix(".new")
        with fresh.open("wb") as out:
            out.write(msgspec.json.encode(lease))
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(path)


def _seconds(params: dict[str, Any]) -> float:
    return min(max(1.0, float(params.get("seconds") or LEASE_SECONDS)), LONGEST_SECONDS)


def _who(lease: Lease, now: float) -> str:
    return f"{lease.holder}, {lease.verb}, its lease ends in {format_duration(max(0.0, lease.expires - now))}"
