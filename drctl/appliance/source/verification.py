"""The control method `source.verify`: both sides of a group held against each other while its guests run."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from drctl.appliance.control import Progress
from drctl.appliance.source.group_state import GroupState
from drctl.appliance.source.protection import Protection
from drctl.errors import Refused, WrongPhase
from drctl.model.phase import Phase


class SourceVerification:
    """Verifications of the groups of this host; the shipper does the work (replication/verification.py)."""

    def __init__(self, protection: Callable[[str], Protection]) -> None:
        self._protection = protection

    def verify(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """{group, share (0 to 1), rate (bytes a second, 0: none), repair} → {group, total_bytes, done_bytes,
        read_bytes, undecided_bytes, wrong_bytes, repaired_bytes, wrong [{disk, offset, length}], seconds}."""
        protection = self._protection(str(params.get("group")))
        name = protection.state.spec.name
        if protection.state.phase is not Phase.LIVE:
            raise WrongPhase(
                f"{name} is {protection.state.phase}; it is held against its replica while it is live",
                hint=f"see: drctl status {name}",
                group=name,
            )
        share, rate = float(params.get("share") or 1), int(params.get("rate") or 0)
        if not 0 < share <= 1 or rate < 0:
            raise Refused(f"a share of {share} at {rate} bytes a second can't be read")
        order = {"share": share, "rate": rate, "seed": secrets.randbits(31), "repair": bool(params.get("repair"))}
        protection.survey.order(name, order)
        protection.wake()
        found = protection.survey.wait(name, lambda: protection.shipper.status.get("verification") or {}, progress)
        return {"group": name, **found, "wrong": [_named(each, protection.state) for each in found.get("wrong") or ()]}


def _named(extent: dict[str, Any], state: GroupState) -> dict[str, Any]:
    names = {disk.number: disk.name for disk in state.disks}
    return {**extent, "disk": names.get(extent["disk"], str(extent["disk"]))}
