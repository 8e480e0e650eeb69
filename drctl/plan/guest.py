"""Commands inside a guest, by its agent (QEMU guest agent: guest-exec). Knows no hypervisor: it is given a channel."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any

from drctl.errors import DrctlError
from drctl.plan.output import Capture
from drctl.plan.script import Ran

#: One command to the guest's agent, and what it returned. Raises DrctlError.
Agent = Callable[[dict[str, Any]], Any]

_LOOK = 0.5


def run_in_guest(
    agent: Agent,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    time_limit: float,
    cancelled: Event,
    monotonic: Callable[[], float],
) -> Ran:
    """Run a command in the guest to its end.

    At the time limit the wait ends; the agent has no way to end the command, which the reason then says."""
    begun = monotonic()
    try:
        order: dict[str, Any] = {"path": arguments[0], "arg": list(arguments[1:]), "capture-output": True}
        if environment:  # else the command has the agent's own, which Windows' programs can't do without
            order["env"] = [f"{key}={value}" for key, value in environment.items()]
        started = agent({"execute": "guest-exec", "arguments": order})
        pid = int(started["pid"])
        while True:
            status = agent({"execute": "guest-exec-status", "arguments": {"pid": pid}})
            if status.get("exited"):
                return _ended(status, monotonic() - begun)
            if monotonic() - begun >= time_limit:
                reason = f"time limit of {time_limit:g} s; it may go on in the guest as process {pid}"
                return Ran(None, "", reason, monotonic() - begun)
            if cancelled.wait(_LOOK):
                return Ran(None, "", f"given up; it may go on in the guest as process {pid}", monotonic() - begun)
    except DrctlError as exc:
        return Ran(None, "", exc.message, monotonic() - begun)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        return Ran(None, "", f"the guest agent's answer makes no sense: {exc!r}", monotonic() - begun)


def _ended(status: Mapping[str, Any], seconds: float) -> Ran:
    capture = Capture()
    for key in ("out-data", "err-data"):
        try:
            capture.add(base64.b64decode(str(status.get(key) or "")))
        except binascii.Error:
            capture.add(b"[output that is not base64]")
    text = capture.text() + ("\n[the agent left out more]" if status.get("out-truncated") else "")
    if "signal" in status:
        return Ran(-int(status["signal"]), text, f"ended by signal {status['signal']}", seconds)
    code = int(status.get("exitcode", 0))
    return Ran(code, text, f"exited with {code}" if code else "", seconds)
