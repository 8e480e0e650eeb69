"""Asks the other site, now and then, whether a group still reigns here: between its cycles no stream would tell."""

from __future__ import annotations

import time

from drctl.appliance.config import Home
from drctl.appliance.source.group_state import GroupState
from drctl.errors import NotFound
from drctl.replication.reign import Question, Reign, ask

#: A failover over there is noticed within this, and a machine that runs on here is told.
ASK_SECONDS = 10.0


class ReignAsker:
    """Of one group. One thread calls `superseded`."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._due = 0.0

    def superseded(self, state: GroupState) -> str:
        """What the other site says when the group reigns there; "" when it does not, is not known, or was asked just
        now. Blocks for some seconds where nobody answers."""
        now = time.monotonic()
        if now < self._due:
            return ""
        self._due = now + ASK_SECONDS
        try:
            peer = self._home.peer(state.spec.recovery)
        except NotFound:
            return ""
        config = self._home.config
        question = Question(state.spec.name, config.host, state.generation, config.uuid, peer.link, peer.uuid)
        answer = ask(question, self._home.tls)
        return answer.reason or "it reigns there" if answer.reign is Reign.ELSEWHERE else ""
