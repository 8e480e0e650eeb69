"""A lease for as long as a command works on a group: taken at the recovery site, renewed, and given back."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from drctl.cli.context import Context
from drctl.cli.inventory import READ_TIMEOUT, Inventory, side, take_inventory
from drctl.errors import ApplianceUnreachable, DrctlError, Locked, NotFound
from drctl.model.site import Host

LEASE_SECONDS = 30.0


@contextmanager
def leased(
    context: Context, group: str, verb: str, inventory: Inventory | None = None, *, must: bool = False
) -> Iterator[None]:
    """Nobody else changes the group meanwhile; the calls inside carry the lease. Raises Locked, naming its holder.

    A recovery site that does not answer keeps no lease, and nothing can be changed there: then it goes on without,
    unless it `must` have one (ApplianceUnreachable)."""
    with lease(context, group, verb, inventory, must=must) as token:
        before, context.lease = context.lease, token or context.lease
        try:
            yield
        finally:
            context.lease = before


@contextmanager
def lease(
    context: Context, group: str, verb: str, inventory: Inventory | None = None, *, must: bool = False
) -> Iterator[str]:
    """The same for one of several groups: the token of its lease, for `Context.under`; empty where there is none."""
    taken = _take(context, group, verb, inventory, must=must)
    if taken is None:
        yield ""
        return
    host, token = taken
    ended = threading.Event()
    threading.Thread(target=_renew, args=(context, host, group, token, ended), daemon=True).start()
    try:
        yield token
    finally:
        ended.set()
        with suppress(DrctlError):
            context.call(host, "lease.release", timeout=READ_TIMEOUT, group=group, token=token)


def _take(
    context: Context, group: str, verb: str, inventory: Inventory | None, *, must: bool
) -> tuple[Host, str] | None:
    """The lease's keeper and its token; None where there is none to be had."""
    holder = f"{context.settings.operator}@{platform.node()} (pid {os.getpid()})"
    try:
        host = side(context, group, "recovery", inventory or take_inventory(context))
        taken = context.call(
            host, "lease.take", timeout=READ_TIMEOUT, group=group, verb=verb, holder=holder, seconds=LEASE_SECONDS
        )
        return host, str(taken["token"])
    except ApplianceUnreachable as exc:
        if must:
            raise
        context.screen.say(f"no lease on {group}: {exc.message}; see to it that nobody else works on it")
    except NotFound:  # a group that no site knows is refused by the command itself
        pass
    return None


def _renew(context: Context, host: Host, group: str, token: str, ended: threading.Event) -> None:
    while not ended.wait(LEASE_SECONDS / 3):
        try:
            context.call(host, "lease.renew", timeout=READ_TIMEOUT, group=group, token=token, seconds=LEASE_SECONDS)
        except Locked as exc:
            context.screen.say(f"warning: {exc.message}")
            return
        except DrctlError:
            continue
