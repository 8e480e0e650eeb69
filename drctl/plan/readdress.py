"""Gives a machine that runs its addresses, through its guest agent, and sees that it has them. Knows no hypervisor."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from drctl.errors import DrctlError
from drctl.model.address import CardAddress, bare
from drctl.plan.guest import Agent, run_in_guest
from drctl.plan.output import Capture, tame_line
from drctl.plan.re_ip_commands import linux_script, windows_commands

#: Between two looks at an agent that does not answer yet, or at addresses that are not there yet; seconds.
_LOOK = 1.0
#: Once the commands have ended the addresses have to be there within so many seconds.
SETTLE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Readdressed:
    """What came of it. `seen` is what the guest has now; `reason` is "" when that is what was wanted."""

    reason: str
    seen: str = ""
    output: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class _Try:
    """One attempt to the end, or to the time limit. Raises DrctlError from an agent that refuses."""

    agent: Agent
    macs: Sequence[str]
    wanted: Sequence[CardAddress]
    time_limit: float
    cancelled: Event
    monotonic: Callable[[], float]
    capture: Capture = field(default_factory=Capture)
    begun: float = 0.0

    def run(self) -> Readdressed:
        self.begun = self.monotonic()
        try:
            reason = self._run()
            seen = "" if reason else self._seen()
        except DrctlError as exc:
            reason, seen = exc.message, ""
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            reason, seen = f"the guest agent's answer makes no sense: {exc!r}", ""
        return Readdressed(reason, seen, self.capture.text(), round(self.monotonic() - self.begun, 3))

    def _run(self) -> str:
        if reason := self._await_agent():
            return reason
        named = self._named()
        if isinstance(named, str):
            return named
        failed, doubtful = self._carry_out(named)
        if failed:
            return failed
        lacking = self._await_addresses(named)
        return f"{doubtful}; {lacking}" if lacking and doubtful else lacking

    @property
    def _left(self) -> float:
        return self.begun + self.time_limit - self.monotonic()

    def _await_agent(self) -> str:
        while True:
            try:
                self.agent({"execute": "guest-ping"})
            except DrctlError as exc:
                if self._left <= 0:
                    return f"its agent did not answer within {self.time_limit:g} s: {exc.message}"
            else:
                return ""
            if self.cancelled.wait(_LOOK):
                return "given up; its agent did not answer"

    def _interfaces(self) -> list[dict[str, Any]]:
        return list(self.agent({"execute": "guest-network-get-interfaces"}))

    def _named(self) -> dict[str, CardAddress] | str:
        """The cards by what the guest calls them, or what is wrong. A card is known by its MAC address alone."""
        names = {str(one.get("hardware-address") or "").lower(): str(one["name"]) for one in self._interfaces()}
        found: dict[str, CardAddress] = {}
        for card in self.wanted:
            if card.card > len(self.macs):
                return f"it has no network card {card.card}, but {len(self.macs)}"
            mac = self.macs[card.card - 1].lower()
            if mac not in names:
                return f"its guest has no interface with the address {mac} of card {card.card}"
            found[names[mac]] = card
        return found

    def _macs(self, named: Mapping[str, CardAddress]) -> dict[str, str]:
        return {name: self.macs[card.card - 1].lower() for name, card in named.items()}

    def _carry_out(self, named: Mapping[str, CardAddress]) -> tuple[str, str]:
        """Run the commands; why one failed, and what failed of those that do so when all is there already."""
        windows = self._is_windows()
        commands = windows_commands(named) if windows else [("/bin/sh", "-c", linux_script(named, self._macs(named)))]
        doubt = ""
        for command in commands:
            shown = "/bin/sh" if command[0] == "/bin/sh" else " ".join(command)
            self.capture.add(f"$ {shown}\n".encode())
            limit = max(1.0, self._left)
            ran = run_in_guest(
                self.agent,
                command,
                environment={},
                time_limit=limit,
                cancelled=self.cancelled,
                monotonic=self.monotonic,
            )
            self.capture.add(ran.output.encode())
            if not ran.done and "add" not in command:
                return f"{shown}: {ran.reason}{_last(ran.output)}", ""
            if not ran.done:
                doubt = doubt or f"{shown}: {ran.reason}{_last(ran.output)}"
        return "", doubt

    def _is_windows(self) -> bool:
        """An agent that can't say what runs there is older than Windows guests that we know of; so it is asked last."""
        try:
            told = self.agent({"execute": "guest-get-osinfo"})
        except DrctlError:
            return False
        return str(told.get("id")) == "mswindows"

    def _await_addresses(self, named: Mapping[str, CardAddress]) -> str:
        until = self.monotonic() + min(SETTLE_SECONDS, max(1.0, self._left))
        while True:
            lacking = self._lacking(named)
            if not lacking or self.monotonic() >= until:
                return lacking
            if self.cancelled.wait(_LOOK):
                return f"given up; {lacking}"

    def _lacking(self, named: Mapping[str, CardAddress]) -> str:
        """What differs from what is wanted: addresses that are missing, or others of the same kind that are there."""
        have = {str(one["name"]): _addresses(one) for one in self._interfaces()}
        for name, card in named.items():
            wanted = {bare(one) for one in card.ip}
            has = have.get(name, set())
            if missing := sorted(wanted - has):
                return f"{name} has not got {', '.join(missing)}"
            kinds = {ipaddress.ip_address(one).version for one in wanted}
            others = [one for one in sorted(has - wanted) if ipaddress.ip_address(one).version in kinds]
            if others:
                return f"{name} has still got {', '.join(others)}"
        return ""

    def _seen(self) -> str:
        rows = [(str(one["name"]), sorted(_addresses(one))) for one in self._interfaces()]
        return tame_line("; ".join(f"{name} {', '.join(ips)}" for name, ips in rows if ips and name != "lo"))


def readdress(
    agent: Agent,
    macs: Sequence[str],
    wanted: Sequence[CardAddress],
    *,
    time_limit: float,
    cancelled: Event,
    monotonic: Callable[[], float],
) -> Readdressed:
    """Set the addresses of a running machine's cards, whose MAC addresses are `macs` in order. It may be repeated.

    Waits for the agent; a network that changes under it does no harm, since the agent does not speak over one."""
    return _Try(agent, macs, wanted, time_limit, cancelled, monotonic).run()


def _addresses(interface: Mapping[str, Any]) -> set[str]:
    """Of an interface, but those that every one gives itself (link-local)."""
    rows = interface.get("ip-addresses") or ()
    found = [ipaddress.ip_address(str(one["ip-address"]).partition("%")[0]) for one in rows]
    return {str(one) for one in found if not one.is_link_local}


def _last(output: str) -> str:
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")
    return f": {tame_line(last)}" if last else ""
