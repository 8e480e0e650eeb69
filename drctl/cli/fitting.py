"""What would come of a group's machines at their recovery host, asked of both sites before anything is replicated."""

from __future__ import annotations

from typing import Any

from drctl.cli.context import Context
from drctl.cli.inventory import Inventory, side
from drctl.errors import DrctlError
from drctl.model.site import Host

#: Each machine is a question or two to libvirt at each side.
TIMEOUT = 60.0


def fitting(context: Context, group: str, source: Host, inventory: Inventory) -> list[str]:
    """Lines to show before the question. Best effort: a site that is away, or an older appliance, forbids no start."""
    try:
        recovery = _recovery(context, group, inventory)
        if recovery is None:
            return []
        described: dict[str, Any] = context.call(source, "group.describe", group=group, timeout=TIMEOUT)
        told = context.call(recovery, "group.fit", group=group, timeout=TIMEOUT, **described)
    except DrctlError as exc:
        return [f"what its machines need at the recovery site was not looked at: {exc.message}"]
    order = {"error": 0, "warning": 1, "info": 2}
    findings = sorted(told.get("findings") or [], key=lambda one: order.get(str(one.get("severity")), 3))
    return [f"{_word(one)}{one['subject']}: {one['message']}" for one in findings]


def _word(finding: dict[str, Any]) -> str:
    return {"error": "WILL NOT RUN THERE: ", "warning": "warning: "}.get(str(finding.get("severity")), "")


def _recovery(context: Context, group: str, inventory: Inventory) -> Host | None:
    """Where it is to be replicated to: its store's host, or before there is one, what its file names, if that is one
    host."""
    if inventory.find(group, "recovery") is not None:
        return side(context, group, "recovery", inventory)
    place = inventory.find(group, "source")
    spec = place.spec if place is not None else {}
    site, name = str(spec.get("recovery") or ""), str(spec.get("recovery_host") or "")
    hosts = [one for one in context.config.hosts if one.site == site and one.served and name in ("", one.name)]
    return hosts[0] if len(hosts) == 1 else None
