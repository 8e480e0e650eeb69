"""Asks a lab's recorder: who is up since when, what was acknowledged; sends the guests commands."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from drctl.errors import NotFound, StepFailed
from drctl.lab import layout
from drctl.lab.layout import Layout
from drctl.lab.protocol import AckLog, read_log


class Seen(msgspec.Struct, frozen=True):
    """One guest as the recorder sees it. `up_ns`: host time of this boot's first line; 0: not yet."""

    site: str
    domain: str
    guest: str
    boot: str
    up_ns: int
    ack_ns: int
    numbers: list[int]
    trouble: str


class Observer:
    """A lab's observer. Every call makes its own connection; failures are NotFound (no lab) or StepFailed."""

    def __init__(self, directory: Path) -> None:
        state = layout.load(directory)
        if state is None:
            raise NotFound("lab", str(directory), hint="see: drctl lab up")
        self._layout = Layout(directory, Path(state.run))

    def seen(self) -> list[Seen]:
        return msgspec.convert(self._ask({"status": True})["channels"], list[Seen])

    def send(
        self,
        command: str,
        *,
        guest: str | None = None,
        site: str | None = None,
        domain: str | None = None,
        wait: float = 0,
    ) -> list[str]:
        """Sends a command of protocol.COMMANDS (or `rate N`) to the guests that match; with `wait`, waits that many
        seconds for each to say that it is done. Returns the domains reached. Raises StepFailed for those too late."""
        request = {"send": command, "guest": guest, "site": site, "domain": domain, "wait": wait}
        answer = self._ask(request, patience=wait + 10)
        late = sorted(set(answer["sent"]) - set(answer["done"])) if wait else []
        if late:
            raise StepFailed(f"{', '.join(late)} did not say within {wait:.0f} s that `{command}` is done")
        return list(answer["sent"])

    def await_up(self, guest: str, site: str, *, after_ns: int = 0, timeout: float = 60) -> int:
        """Host time (ns) of the guest's first line of a boot after `after_ns` at a site. Raises StepFailed."""

        def look() -> int | None:
            ups = [seen.up_ns for seen in self.seen() if (seen.guest, seen.site) == (guest, site)]
            return max((up for up in ups if up > after_ns), default=None)

        return self._await(look, f"{guest} did not come up at {site}", timeout)

    def await_records(self, guest: str, site: str, count: int, *, timeout: float = 60) -> int:
        """Waits until every chain of the guest's has `count` acknowledged records; returns the host time (ns)."""

        def look() -> int | None:
            for seen in self.seen():
                if (seen.guest, seen.site) == (guest, site) and seen.numbers and min(seen.numbers) >= count:
                    return seen.ack_ns
            return None

        return self._await(look, f"{guest} at {site} has not written {count} records in each chain", timeout)

    def await_more(self, guest: str, site: str, count: int, *, timeout: float = 60) -> int:
        """Waits until every chain of the guest has `count` acknowledged records more than at the first look at it;
        returns the host time (ns). Raises StepFailed."""
        before: list[int] = []

        def look() -> int | None:
            for seen in self.seen():
                if (seen.guest, seen.site) != (guest, site) or not seen.numbers:
                    continue
                if not before:
                    before.extend(seen.numbers)
                enough = all(now >= then + count for now, then in zip(seen.numbers, before, strict=True))
                return seen.ack_ns if enough else None
            return None

        return self._await(look, f"{guest} at {site} has not written {count} more records in each chain", timeout)

    def logs(self, site: str, *, until_ns: int | None = None) -> dict[str, AckLog]:
        """What the guests of a site had acknowledged when, from witness.log."""
        with self._layout.witness_log.open() as lines:
            return read_log(lines, site, until_ns=until_ns)

    def _await(self, look: Callable[[], int | None], complaint: str, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if (found := look()) is not None:
                return found
            time.sleep(0.05)
        raise StepFailed(f"{complaint} within {timeout:.0f} s")

    def _ask(self, request: dict[str, Any], patience: float = 10.0) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(patience)
            try:
                connection.connect(str(self._layout.recorder_socket))
                connection.sendall(msgspec.json.encode(request) + b"\n")
                with connection.makefile("rb") as reader:
                    answer = msgspec.json.decode(reader.readline(), type=dict[str, Any])
            except (OSError, msgspec.DecodeError) as exc:
                raise StepFailed(f"the lab's recorder does not answer: {exc}", hint="see: drctl lab status") from exc
        if "error" in answer:
            raise StepFailed(str(answer["error"]))
        return answer
