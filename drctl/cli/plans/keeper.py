"""A run's record at the recovery site: written there while it goes on, its head noted at the other site.

The record on the operator's machine comes first and is the same, byte by byte. A site that does not answer holds
nothing up: its copy is caught up with as soon as it answers, and what it lacks at the end is said."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drctl.cli.context import Context
from drctl.cli.inventory import READ_TIMEOUT, Inventory, ask_all, side, take_inventory
from drctl.errors import DrctlError, IntegrityError, Locked, NotFound
from drctl.model.site import Host
from drctl.store import atomic
from drctl.store.run_log import RunLog, encode_event, head_at

LEASE_SECONDS = 30.0
#: One message; a control socket takes 4 MiB, and JSON in JSON grows by its quotes.
BATCH_BYTES = 1024 * 1024
#: A copy's bytes at most; see RunArchive.
_APPEND_TIMEOUT = 10.0


@dataclass(slots=True)
class Keeper:
    """Where the record is kept; no `host`: nowhere but here. `sent` lines of it are there."""

    context: Context
    plan: str
    run: str
    host: Host | None = None
    other: Host | None = None
    token: str = ""
    sent: int = 0
    head: str = ""
    quiet: bool = False
    problem: str = ""

    def send(self, lines: Sequence[bytes], *, last: bool = False) -> int:
        """Bring lines there, in batches; how many arrived. What goes wrong is said once, and kept as `problem`."""
        done = 0
        for batch in _batches(lines):
            if not self._send(batch, last=last and done + len(batch) == len(lines)):
                break
            done += len(batch)
            self.sent += len(batch)
        return done

    def _send(self, batch: Sequence[bytes], *, last: bool) -> bool:
        if self.host is None:
            return False
        try:
            told = self.context.call(
                self.host,
                "run.append",
                plan=self.plan,
                token=self.token,
                first=self.sent + 1,
                lines=[line.decode() for line in batch],
                last=last,
                timeout=_APPEND_TIMEOUT,
            )
        except DrctlError as exc:
            self._fail(f"the record is not kept at {self.host.name} now: {exc.message}")
            return False
        self.problem = ""
        if told.get("unsigned"):
            self._fail(f"the record is not signed: {told['unsigned']}")
        return True

    def _fail(self, problem: str) -> None:
        self.problem = problem
        if not self.quiet:
            self.context.screen.say(f"warning: {problem}")
        self.quiet = True

    def anchor(self, lines: int, head: str) -> None:
        """Note the head at the other site, when it answers; else say that it is not."""
        if self.other is None or not lines:
            return
        try:
            self.context.call(self.other, "run.anchor", run=self.run, lines=lines, head=head, timeout=READ_TIMEOUT)
        except DrctlError as exc:
            self.context.screen.say(f"the record's head is not noted at {self.other.name}: {exc.message}")


@dataclass(slots=True)
class KeptRun:
    """A run's log here, and its copy there. For the thread that conducts the run."""

    log: RunLog
    keeper: Keeper
    _pending: list[bytes] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.log.head

    def append(self, event: Mapping[str, Any], time: float) -> dict[str, Any]:
        """Durable here when it returns. Raises OutOfSpace."""
        whole = self.log.append(event, time)
        self._pending.append(encode_event(whole))
        return whole

    def flush(self) -> None:
        """Bring all that is not there yet to the recovery site."""
        self._flush(last=False)

    def _flush(self, *, last: bool) -> None:
        if self._pending:
            done = self.keeper.send(self._pending, last=last)
            del self._pending[:done]
        if self.keeper.host is None:
            self._pending.clear()

    def finish(self) -> None:
        """At the run's end: the rest, signed durably, and its head noted at the other site."""
        self._flush(last=True)
        if self._pending and self.keeper.host is not None:
            name = self.keeper.host.name
            self.keeper.context.screen.say(f"warning: {len(self._pending)} lines of the record are not at {name}")
        self.keeper.anchor(self.log.count, self.log.head)


@contextmanager
def keep(context: Context, groups: Sequence[str], plan: str, run: str, log: RunLog | None = None) -> Iterator[Keeper]:
    """Nobody else runs the plan meanwhile, from whatever machine; and a keeper of the run's record.

    `log`: of a run that goes on; what the site lacks of it is brought there first. Raises Locked, naming who runs it;
    IntegrityError when the site's record is another one."""
    inventory = take_inventory(context)
    keeper = Keeper(context, plan, run, other=_find(context, groups, "source", inventory))
    _begin(keeper, _find(context, groups, "recovery", inventory))
    ended = threading.Event()
    if keeper.host is not None:
        threading.Thread(target=_renew, args=(keeper, ended), daemon=True).start()
    try:
        if log is not None:
            _send_rest(keeper, log)
        yield keeper
    finally:
        ended.set()
        if keeper.host is not None:
            _quietly(context, keeper.host, "run.end", plan=plan, token=keeper.token)


def _find(context: Context, groups: Sequence[str], role: str, inventory: Inventory) -> Host | None:
    """The host of the first group: one place for a run, however many groups it has."""
    try:
        return side(context, groups[0], role, inventory)
    except DrctlError:
        return None


def _begin(keeper: Keeper, host: Host | None) -> None:
    if host is None:
        return
    context = keeper.context
    holder = f"{context.settings.operator}@{platform.node()} (pid {os.getpid()})"
    try:
        order: dict[str, Any] = {"run": keeper.run, "plan": keeper.plan, "holder": holder, "seconds": LEASE_SECONDS}
        told = context.call(host, "run.begin", timeout=READ_TIMEOUT, **order)
    except Locked:
        raise
    except NotFound:
        context.screen.say(f"the record is kept here alone: the appliance of {host.name} is of an older version")
    except DrctlError as exc:
        context.screen.say(f"the record is kept here alone: {exc.message}; see to it that nobody else runs the plan")
    else:
        keeper.host, keeper.token = host, str(told["token"])
        keeper.sent, keeper.head = int(told["lines"]), str(told["head"])


def _send_rest(keeper: Keeper, log: RunLog) -> None:
    if keeper.host is None:
        return
    data = log.path.read_bytes()
    if keeper.sent and head_at(data, keeper.sent) != keeper.head:
        raise IntegrityError(
            f"the recovery site's record of {keeper.run} goes on otherwise than the one here",
            hint=f"drctl run verify {keeper.run}; perhaps somebody has just gone on with it: give the command again",
        )
    keeper.send(data.split(b"\n")[keeper.sent : log.count])


def _renew(keeper: Keeper, ended: threading.Event) -> None:
    assert keeper.host is not None, "without a host there is no lease"
    while not ended.wait(LEASE_SECONDS / 3):
        order: dict[str, Any] = {"plan": keeper.plan, "token": keeper.token, "seconds": LEASE_SECONDS}
        try:
            keeper.context.call(keeper.host, "run.renew", timeout=READ_TIMEOUT, **order)
        except Locked as exc:
            keeper.context.screen.say(f"warning: {exc.message}")
            return
        except DrctlError:
            continue


def _quietly(context: Context, host: Host, method: str, **params: Any) -> None:
    try:
        context.call(host, method, timeout=READ_TIMEOUT, **params)
    except DrctlError:
        return  # it ends by itself


def _batches(lines: Sequence[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for line in lines:
        if batch and size + len(line) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line)
    if batch:
        yield batch


# -- copies -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Copy:
    """A record as a site has it. `signature` is what its appliance says of it."""

    host: Host
    data: bytes
    signature: Mapping[str, Any] | None

    @property
    def label(self) -> str:
        return f"{self.host.site}/{self.host.name}"


def copies(context: Context, run: str) -> list[Copy]:
    """Every site's copy of a run's record. What does not answer, or has none, is passed over."""
    answers = [one for one in ask_all(context, "run.read", run=run) if not one.failed]
    return [Copy(one.host, _rest(context, one.host, run, one.result), one.result.get("signature")) for one in answers]


def _rest(context: Context, host: Host, run: str, told: Mapping[str, Any]) -> bytes:
    data = str(told["text"]).encode()
    while len(data) < int(told["size"]):
        more = context.call(host, "run.read", run=run, offset=len(data), timeout=4 * READ_TIMEOUT)
        if not more["text"]:
            break
        data += str(more["text"]).encode()
    return data


def catch_up(context: Context, path: Path) -> None:
    """Take from a site what the record here lacks: the run was begun, or gone on with, on another machine.

    Raises IntegrityError when the two tell different things."""
    own = _whole_lines(path.read_bytes()) if path.exists() else b""
    best = max((_whole_lines(copy.data) for copy in copies(context, path.stem)), key=len, default=b"")
    if own.startswith(best):
        return  # also when neither is there: whoever opens it says so
    if not best.startswith(own):
        raise IntegrityError(
            f"{path} and the recovery site's record of {path.stem} differ", hint=f"drctl run verify {path.stem}"
        )
    atomic.make_directory(path.parent)
    fresh = atomic.temporary(path)
    with atomic.space_errors(path):
        fresh.write_bytes(best)
        fresh.chmod(0o600)
        atomic.commit(fresh, path)
    context.screen.say(f"{path.stem}: {best.count(bytes([10])) - own.count(bytes([10]))} lines taken from the site")


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]
